"""Two experiments compared: which is better and by how much, what differs between them, and what that cannot say."""

from __future__ import annotations

from nanostudy.analysis.frames import known
from nanostudy.analysis.text_error import difference
from nanostudy.measures import MEASURES
from nanostudy.reporting.data import telling
from nanostudy.reporting.document import Grid
from nanostudy.reporting.findings import Findings
from nanostudy.reporting.phrases import amount, number, signed
from nanostudy.study.names import label
from nanostudy.text import brief_value, listed


def labels(f: Findings) -> tuple[str, str]:
    """By the settings that differ, the better first; by their names where none does."""
    names = f.pair or ("", "")
    settings, table = telling(f.results), f.results.experiments
    short = [label({key: table.loc[name][key] for key in settings}, settings) for name in names]
    return (short[0], short[1]) if short[0] != short[1] else names


def title(f: Findings) -> str:
    return " against ".join(labels(f))


def lede(f: Findings) -> str:
    (better, other), names = labels(f), f.pair or ()
    losses = [number(loss) for loss in f.results.finished.loc[list(names), "val_loss"]]
    return f"{better} reaches a validation loss of {losses[0]} nats per token, and {other} one of {losses[1]}, by one training each."


def texts(f: Findings) -> dict[str, str]:
    first, second = f.pair or ("", "")
    better, table = labels(f)[0], f.results.finished
    value, low, high = difference(f.results, first, second)
    interval = f" (95% interval {number(-high)} to {number(-low)} over texts like this one, with these very weights)"
    settings = [" and ".join(brief_value(table.loc[name][key]) for name in (first, second)) for key in f.data.settings]
    differ = [f"{key} {values}" for key, values in zip(f.data.settings, settings, strict=True)]
    unsaid = "The two differ in no setting but the seed, so the difference is noise."
    if f.results.factors:
        unsaid = (
            "One training each does not show what another seed would change. `nanostudy judge` trains both with several seeds "
            f"and says whether {better} is better."
        )
    lower = f"{better} has the lower validation loss, by {number(-value)} nats per token"
    answers = {
        "Which is better": f"{lower}{interval if known(low) else ''}.",
        "What differs between them": f"They differ in {listed(differ)}."
        if differ
        else "All their settings are the same.",
        "How well they generalise": _gaps(f),
        "What this cannot say": unsaid,
    }
    return {about: text for about, text in answers.items() if text}


def _gaps(f: Findings) -> str:
    gaps = [float(gap) for gap in f.results.finished.loc[list(f.pair or ()), "gap"]]
    if not all(map(known, gaps)):
        return ""
    (better, other), words = labels(f), [signed(gap) for gap in gaps]
    return f"The loss gap (validation less training) of {better} is {words[0]} nats per token, and that of {other} {words[1]}."


def table(f: Findings) -> Grid:
    """Settings that differ and everything that was measured, side by side."""
    a, b = (dict(f.results.finished.loc[name]) for name in f.pair or ())
    rows = [(name, brief_value(a[name]), brief_value(b[name]), "") for name in f.data.settings]
    for name, measure in MEASURES.items():
        if known(a[name]) and known(b[name]):
            apart = signed(float(a[name]) - float(b[name]), measure.decimals) if measure.decimals else ""
            rows.append((measure.axis, amount(a[name], name), amount(b[name], name), apart))
    return Grid("Side by side", [dict(zip(("", *labels(f), "difference"), row, strict=True)) for row in rows])
