"""What to run next, in words: how many seeds would decide, and what fresh seeds confirmed."""

from __future__ import annotations

from typing import Any

import pandas as pd

from nanostudy.analysis.frames import known
from nanostudy.analysis.power import MOST_SEEDS, Seeds
from nanostudy.analysis.winner import Confirmed, Estimate
from nanostudy.reporting.charts.figure import each
from nanostudy.reporting.phrases import are, in_words, number
from nanostudy.study.listing import fitted
from nanostudy.study.names import SHORT
from nanostudy.text import counted, duration

MOST_ROWS = 30
METHOD = (
    "Each standard deviation is drawn towards what all settings have in common, as far as they look alike (Smyth, 2004). In brackets: "
    "the seeds at the ends of its 95% interval, which is wide after few seeds."
)


def decision(seeds: Seeds) -> str:
    """How many more seeds decide between the two best settings, and how long those take on this machine."""
    if seeds.missing:
        return seeds.missing
    tied = seeds.table[seeds.table["tied"].astype(bool)]
    if tied.empty:
        return f"{in_words(seeds.best)} differs from all other settings at 95%: no more seeds are needed to choose it."
    from nanostudy.study.pool import workers_alike  # imports PyTorch

    second = tied.iloc[0]
    common = min(seeds.n, int(second["n"]))
    pair = f"{in_words(seeds.best)} and {in_words(second['settings'])}"
    if not known(second["paired"]):
        return f"{pair} share fewer than two seeds, so nothing shows how much their difference varies. Run both with the same seeds."
    apart = f"{seeds.difference:g} nats per token apart"
    more, least, most = (max(0, int(second[name]) - common) for name in ("paired", "paired_low", "paired_high"))
    if not more:
        return f"{pair} have seeds enough to be told apart, were they {apart} ({seeds.power:.0%} power, paired)."
    ends = f"{least:,} to {most:,}" if second["paired_high"] < MOST_SEEDS else f"{least:,} or more"
    time = second["seconds"] * more / workers_alike(seeds.device, seeds.threads)
    price = f", about {duration(time)}" if known(time) else ""
    return (
        f"To decide between {pair}: {counted(more, 'more seed')}{price}, for {seeds.power:.0%} power where they are {apart} "
        f"(paired; {ends}, since {counted(common, 'seed')} leave the noise uncertain)."
    )


def short(cell: str) -> str:
    """L2 E128, of "n_layer=2, n_embd=128"."""
    pairs = (part.partition("=") for part in cell.split(", "))
    return " ".join(f"{SHORT.get(name, name + equals)}{value}" for name, equals, value in pairs)


def seeds_lines(seeds: Seeds) -> list[str]:
    """For a terminal."""
    if seeds.missing:
        return [seeds.missing]
    rows = [
        {
            "settings": short(row.settings),
            "mean": number(row.mean),
            "seeds": str(row.n),
            "sd of one": number(row.sd),
            "sd of difference": number(row.paired_sd) if known(row.paired_sd) else "",
            "paired": _needed(row.paired, row.paired_low, row.paired_high),
            "unpaired": _needed(row.unpaired, row.unpaired_low, row.unpaired_high),
            "a seed of both": duration(row.seconds) if known(row.seconds) else "",
        }
        for row in each(seeds.table.head(MOST_ROWS))
    ]
    left = len(seeds.table) - len(rows)
    return [
        f"best      {short(seeds.best)}: {counted(seeds.n, 'seed')}, standard deviation of one {number(seeds.sd)}",
        f"power     {seeds.power:.0%} to tell {seeds.difference:g} nats per token from the best (at 5%): seeds of each",
        "",
        *fitted(rows, ("sd of difference", "a seed of both", "seeds", "sd of one"), "settings"),
        *([f"and {left:,} more settings; --json has every one"] if left else []),
        "",
        METHOD,
        "",
        decision(seeds),
    ]


def _needed(value: float, low: float, high: float) -> str:
    if not known(value):
        return "not known"
    most = f"{high:,.0f}" if high < MOST_SEEDS else f"over {MOST_SEEDS:,}"
    return f"{value:,.0f} ({low:,.0f} to {most})"


def seeds_record(seeds: Seeds) -> dict[str, Any]:
    """For JSON."""
    table = seeds.table.astype(object).where(pd.notna(seeds.table), None)
    return {
        "difference": seeds.difference,
        "power": seeds.power,
        "best": seeds.best,
        "seeds": seeds.n,
        "sd": seeds.sd if known(seeds.sd) else None,
        "settings": table.to_dict("records"),
        "decision": decision(seeds),
    }


def confirmation_sentence(result: Confirmed) -> str:
    """What fresh seeds say."""
    role = "is the study's best"
    if result.candidates > 1:
        role = f"has the lowest loss of {result.candidates} settings tied for the best in the study"
    if not result.was_best:
        role += ", where another led"
    losses = f"validation loss {_estimate(result.loss)}"
    if result.on_test:
        losses += f", test loss {_estimate(result.on_test)}"
    runs = counted(result.runs, "run")
    text = f"On {counted(result.n, 'fresh seed')} {result.settings} {role}: {losses}; {result.diverged or 'none'} of its {runs} diverged"
    if result.tied:
        text += f"; {counted(result.tied, 'other')} {are(result.tied)} still indistinguishable from it (95%)"
    return f"{text}."


def _estimate(loss: Estimate) -> str:
    text = f"{number(loss.mean)} nats per token"
    if known(loss.low):
        text += f" (95% interval over seeds {number(loss.low)} to {number(loss.high)}, whichever had won)"
    if known(loss.unbiased) and number(loss.unbiased) != number(loss.mean):
        text += f", {number(loss.unbiased)} on seeds that did not choose it"
    return text
