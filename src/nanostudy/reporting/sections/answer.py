"""The answer in a few sentences, from the numbers alone: what matters, what does not, which model, how it writes, what holds.

An effect is stated only where it differs from zero at 95% for all that was searched together; otherwise the sentence says that
it is indistinguishable from none.
"""

from __future__ import annotations

import shlex
from collections.abc import Sequence

import pandas as pd

from nanostudy.analysis.analysis import Analysis
from nanostudy.analysis.design import TIMES, TOGETHER
from nanostudy.analysis.divergence import by_settings, trained
from nanostudy.analysis.effects import Effects
from nanostudy.analysis.frames import Results, factors_of, known
from nanostudy.analysis.text_error import expected
from nanostudy.reporting.charts.experiments import ranked_cells, ranking_figure, settings_texts
from nanostudy.reporting.charts.factors import effects_figure
from nanostudy.reporting.charts.figure import Figure, each
from nanostudy.reporting.charts.numbers import curves_figure as numbers_figure
from nanostudy.reporting.document import Answer, Blocks, Quote
from nanostudy.reporting.findings import Findings
from nanostudy.reporting.next_steps import confirmation_sentence
from nanostudy.reporting.phrases import (
    are,
    change,
    in_words,
    interval,
    interval_text,
    number,
    share_text,
    short,
    signed,
)
from nanostudy.reporting.sections import numbers, pair
from nanostudy.settings import FIELDS
from nanostudy.text import counted, listed, value_text

ALL = "(95% for all at once)"  # of what an answer searched
MOST_ALIASES = 2  # that a sentence names
MOST_EFFECTS = 10  # of the first figure
LONGEST_QUOTE = 420  # characters
MOST_NAMED = 3  # settings, pairs or experiments that a sentence names
VERDICTS = ("reproduced", "better", "not reproduced", "undecided")  # of claims that were tested


def answer(f: Findings) -> Blocks:
    """In the order in which a reader asks, after a figure and what the best writes; only what the results can say."""
    if f.pair:
        return [_writes(f), Answer(pair.texts(f)), pair.table(f)]
    diverged = what_diverges(f.analysis)
    if not f.compares:
        return [Answer({"What diverges": diverged})] if diverged else []
    effects = {
        "What matters": what_matters(f.analysis),
        "What does not, and what acts together": what_does_not(f.analysis),
        "Which values are best": numbers.best_values(f.analysis.shapes),
    }
    texts = {
        "What fresh seeds confirm": confirmation_sentence(f.analysis.confirmed) if f.analysis.confirmed else "",
        "What diverges": diverged,
        **{about: text + longer_windows(f.analysis, text) for about, text in effects.items()},
        "Which model to use": which_model(f.analysis),
        "How well it generalises and writes": how_it_generalises(f.analysis),
        "Do the published claims hold": claims_hold(f.analysis),
    }
    return [_figure(f), _writes(f), Answer({about: text for about, text in texts.items() if text})]


def _figure(f: Findings) -> Figure | None:
    """What each setting does; the largest effects where there are many."""
    shapes = f.analysis.shapes
    if shapes.explanation:
        return None if shapes.changes.empty else numbers_figure(f.results, shapes, f.analysis.forest)
    return effects_figure(f.analysis.effects, most=MOST_EFFECTS) or ranking_figure(f.results, f.analysis.ranking)


def _writes(f: Findings) -> Quote | None:
    """The beginning of the best model's text."""
    best = str(f.results.finished["val_loss"].idxmin())
    row = next(row for row in f.data.experiments if row["name"] == best)
    text = next((sample["text"] for sample in f.data.samples if sample["i"] == row["i"]), "").strip("\n")
    lines: list[str] = []
    for line in text.split("\n"):
        if sum(map(len, lines)) + len(line) > LONGEST_QUOTE and lines:
            break
        lines.append(line[:LONGEST_QUOTE])
    source = f"{row['short']}, validation loss {number(row['val_loss'])} nats per token"
    return Quote("What the best writes", source, "\n".join(lines).rstrip()) if text else None


def what_diverges(analysis: Analysis) -> str:
    """Of trainings; first the values of settings that diverge clearly more often than the others of their setting."""
    rates = by_settings(analysis.results)
    lost = trained(analysis.results)["status"] == "diverged"
    if not lost.any() or len(lost) < 2:
        return ""
    if lost.all():
        return f"All {len(lost):,} trainings diverged."
    text = f"{lost.sum():,} of {counted(len(lost), 'training')} diverged"
    table = analysis.divergence
    clear = table[table["clear"] & (table["diverged"] * table["others_n"] > table["others_diverged"] * table["n"])]
    if len(clear):
        values = [
            f"with {row.factor} {value_text(row.value)} {row.diverged:,} of {row.n:,}, with its other values "
            f"{row.others_diverged or 'none'} of {row.others_n:,}"
            for row in each(clear.sort_values("p", kind="stable"))
        ]
        return f"{text}: {listed(values, MOST_NAMED)} (95% for all settings at once)."
    if not analysis.results.factors:
        return f"{text}, all with the same settings."
    cells = rates[rates["diverged"] > 0].drop_duplicates("cell").sort_values("diverged", ascending=False, kind="stable")
    where = [f"{in_words(row.cell)} in {row.diverged:,} of {row.n:,}" for row in each(cells)]
    unclear = "; no value of a setting diverges clearly more often than the others (95%)" if len(table) else ""
    return f"{text}: {listed(where, MOST_NAMED)}{unclear}."


def what_matters(analysis: Analysis) -> str:
    if analysis.shapes.explanation:
        return numbers.what_matters(analysis.shapes)
    effects, results = analysis.effects, analysis.results
    if effects.table.empty:
        if not factors_of(results.finished):
            return "No setting varies between the experiments that finished, so none can be said to matter."
        return effects.explanation or "The effects of the settings cannot be estimated from these experiments."
    mains = effects.importance
    if mains.empty:
        return "No setting's own effect can be estimated from these experiments."
    first = mains.iloc[0]
    if not first["clear"]:
        largest = f"the largest estimate, {_change(effects, first)}, changes the validation loss by {_size(first)} nats per token"
        if mains["low"].isna().all():
            return f"No setting's effect can be said to differ from zero: {largest}."
        if effects.seeds == 2:
            return f"Two seeds cannot tell which settings matter: {largest}{f' {ALL}' if known(first['low']) else ''}."
        return f"No setting's effect differs from zero {ALL}: {largest}."
    clear, rivals = mains.iloc[1:][mains["clear"].iloc[1:]], mains[mains["rival"]]
    equals, unclear = rivals[rivals["clear"]], list(rivals["factor"][~rivals["clear"]])
    if len(equals):
        names = listed([first["factor"], *equals["factor"]])
        sizes = listed(_changes(effects, mains.loc[[0, *equals.index]]))
        text = f"{names} matter most, and which of them more is undecided: {sizes} nats per token {ALL}"
    else:
        verb = "matters most" if len(mains) > 1 and not unclear else "matters"
        text = f"{_head(effects, first)} {verb}: {_going(effects, first)}"
    if unclear:
        matter = are(len(unclear), "matters", "matter")
        text += f"; whether {listed(unclear, MOST_NAMED)} {matter} as much is undecided"
    if others := _changes(effects, clear[~clear["rival"]]):
        text += f"; {listed(others, MOST_NAMED)} {are(len(others), 'has', 'have')} an effect, too"
    elif len(clear) == 0 and len(mains) > 1:
        text += "; no other setting's effect differs from zero"
    return f"{text}.{_at_best(effects)}"


def _going(effects: Effects, row: pd.Series) -> str:
    low, high = sorted(abs(row[key]) for key in ("low", "high"))
    part = effects.shares.get(row["factor"])
    share = f"; {part:.0%} of the variance" if known(part) else ""
    among = f", its largest difference among {row['levels']} values," if row["levels"] > 2 else ""
    verb = "lowers" if row["effect"] < 0 else "raises"
    return (
        f"going from {value_text(row['reference'])} to {value_text(row['level'])}{among} {verb} the validation loss by "
        f"{number(abs(row['effect']), 3)} nats per token (95% interval for all at once {number(low, 3)} to {number(high, 3)}{share})"
    )


def _at_best(effects: Effects) -> str:
    changes = [
        f"{change(row['factor'], row['best'], row['level'])} changes it by {_size(row)}, on average by {signed(row['average'])}"
        for _, row in effects.at_best.iterrows()
    ]
    return f" At the best settings {'; '.join(changes)} {ALL}." if changes else ""


def _head(effects: Effects, row: pd.Series) -> str:
    """The factor; of a fraction with the interactions that it may be instead."""
    others = _aliases(effects, row["factor"])
    return (
        f"{row['factor']}, or {others}, which these experiments cannot separate from it," if others else row["factor"]
    )


def _aliases(effects: Effects, term: str) -> str:
    """Of a fraction, what has the same estimate as this effect; else empty."""
    return listed(effects.aliases.get(term, ()), MOST_ALIASES, "or")


def _size(row: pd.Series) -> str:
    return interval(row["effect"], row["low"], row["high"])


def _change(effects: Effects, row: pd.Series) -> str:
    others = _aliases(effects, row["factor"])
    return change(row["factor"], row["reference"], row["level"]) + (
        f" (or {others}, not separable from it)" if others else ""
    )


def _changes(effects: Effects, table: pd.DataFrame) -> list[str]:
    return [f"{_change(effects, row)} by {_size(row)}" for _, row in table.iterrows()]


def what_does_not(analysis: Analysis) -> str:
    if analysis.shapes.explanation:
        return numbers.what_does_not(analysis.shapes)
    effects, table = analysis.effects, analysis.effects.table
    if table.empty:
        return ""
    mains = effects.importance
    without = mains["low"].isna()
    unclear = _changes(effects, mains[~mains["clear"] & ~without])
    if without.all():
        first = "without an estimate of the noise, no effect can be said to differ from zero"
    elif unclear:
        first = f"{listed(unclear, MOST_NAMED)} {are(len(unclear))} indistinguishable from no effect {ALL}"
    else:
        compared = {name for factor in mains["factor"][~without] for name in factor.split(TOGETHER)}
        which = "was varied" if compared >= set(analysis.results.factors) else "could be compared"
        first = f"every setting that {which} has an effect that differs from zero {ALL}"
    if without.any() and not without.all():
        names = list(mains["factor"][without])
        first += f"; whether {listed(names, MOST_NAMED)} {are(len(names), 'has', 'have')} an effect cannot be said"
    if not (table["order"] == 2).any():
        return f"{_capital(first)}; whether settings act together cannot be estimated."
    pairs = table[(table["order"] == 2) & table["together"]]
    pairs = pairs.sort_values("effect", key=abs, ascending=False, kind="stable").drop_duplicates("term")
    if pairs.empty:
        return f"{_capital(first)}; no two settings can be said to act together."
    together = "; ".join(_interaction(analysis, row) for _, row in pairs.head(MOST_NAMED).iterrows())
    left = f"; and {len(pairs) - MOST_NAMED} more" if len(pairs) > MOST_NAMED else ""
    return f"{_capital(first)}. Some act together {ALL}: {together}{left}."


def _interaction(analysis: Analysis, row: pd.Series) -> str:
    """What the more important of two settings does at two values of the other, and by how much that differs."""
    a, b = str(row["factor_a"]), str(row["factor_b"])
    by_size = list(analysis.effects.importance["factor"])
    (a0, b0), (a1, b1) = (str(row[key]).split(TIMES) for key in ("reference", "level"))
    if by_size.index(a) > by_size.index(b):
        (a, a0, a1), (b, b0, b1) = (b, b0, b1), (a, a0, a1)
    means = {(value_text(m.level_a), value_text(m.level_b)): m.mean for m in each(analysis.cell_means(a, b))}
    first, second = (signed(means[a1, at] - means[a0, at]) for at in (b0, b1))
    others = _aliases(analysis.effects, str(row["term"]))
    instead = f", or {others} instead" if others else ""
    difference = interval(row["effect"], row["together_low"], row["together_high"])
    return f"{a} {a0} → {a1} by {first} at {b} {b0} and {second} at {b1}, a difference of {difference}{instead}"


def _capital(text: str) -> str:
    """A sentence that begins with the name of a setting keeps it as it is typed."""
    return text if text.split(" ")[0] in FIELDS else text[:1].upper() + text[1:]


def which_model(analysis: Analysis) -> str:
    if analysis.shapes.explanation and analysis.shapes.configurations == analysis.shapes.n:
        return numbers.lowest_of_search(analysis)
    return " ".join(filter(None, [_best(analysis), _optimism(analysis)]))


def _optimism(analysis: Analysis) -> str:
    """The lowest of several losses was chosen for its luck, too."""
    rows, replicated = ranked_cells(analysis.results, analysis.ranking)
    if len(rows) < 2 or analysis.confirmed:
        return ""
    mean, value = float(rows["mean"].iloc[0]), analysis.best_unbiased
    chosen = f"That {'mean' if replicated else 'loss'} was chosen as the lowest of {len(rows):,}, so it is optimistic"
    if not known(value):
        text = f"{chosen}."
    elif number(value) == number(mean):
        text = "Luck hardly flatters it: whichever seed is left out, the others choose the same settings."
    else:
        text = f"{chosen}: on seeds that did not choose it, it is {number(value)}."
    provenance = analysis.results.provenance
    paths = provenance.get("paths") or []
    if len(paths) > 1 or not provenance.get("definition"):
        return text
    return f"{text} `nanostudy study confirm {shlex.quote(paths[0])}` runs the best on fresh seeds."


def _best(analysis: Analysis) -> str:
    ranking, results = analysis.ranking, analysis.results
    if ranking.empty:
        return ""
    rows, replicated = ranked_cells(results, ranking)
    if rows.empty:
        return "Every setting diverged with some seed, so none can be recommended."
    first, table = rows.iloc[0], results.experiments
    seeds = _seeds_of(rows)
    loss = expected(results, seeds)
    size = table.loc[first["name"]]["parameters"]
    sized = f", with {short(size)} parameters" if known(size) else ""
    alone = replicated and not factors_of(table[table["status"].isin(["finished", "diverged"])])
    if replicated:
        single = ranking.iloc[0]
        lost = f", whose settings diverged with {counted(int(single['diverged']), 'other seed')}"
        head = f"There is one choice of settings, with a mean validation loss of {number(loss.mean)}"
        if not alone:
            head = f"{_capital(first['label'])} has the lowest mean validation loss, {number(loss.mean)}"
        text = (
            f"{head} nats per token over "
            f"{counted(loss.n, 'seed')}{interval_text(loss)}{sized}; the lowest single one is {number(single['value'])}, of {single['name']}"
            f"{lost if single['diverged'] else ''}"
        )
    else:
        through = settings_texts(results, [first["name"]])[first["name"]]
        text = (
            f"{first['name']}{f' ({through})' if through else ''} has the lowest validation loss, {number(loss.mean)} nats per token"
            f"{interval_text(loss)}{sized}"
        )
    text += _in_equal_windows(analysis, first["label"]) + _on_the_test_part(results, seeds)
    others = f"other {'settings' if replicated else 'experiments'}{' that never diverged' if (ranking['diverged'] > 0).any() else ''}"
    if len(rows) == 1:
        return f"{text}." if alone else f"{text}; there is no other to compare it with."
    if not rows["low"].notna().any():
        return f"{text}; how sure that is cannot be said without an estimate of the noise."
    tied = rows[rows["tied"].astype(bool)].iloc[1:]
    if tied.empty:
        return f"{text}, and it differs from all {len(rows) - 1:,} {others} at 95%."
    smallest = table.loc[list(tied["name"])]["parameters"].min()
    cheaper = f", the smallest of which has {short(smallest)} parameters" if smallest < size else ""
    return f"{text}; {len(tied):,} of the {len(rows) - 1:,} {others} {are(len(tied))} indistinguishable from it (95%){cheaper}."


def _seeds_of(rows: pd.DataFrame) -> list[str]:
    """The experiments of the first settings."""
    return [name for name, label in rows.attrs["labels"].items() if label == rows.iloc[0]["label"]]


def _in_equal_windows(analysis: Analysis, chosen: str) -> str:
    """Where contexts differ: which settings are the best if all read windows of one length."""
    if analysis.equal_windows is None:
        return ""
    rows, _ = ranked_cells(analysis.results, analysis.equal_windows.ranking)
    if rows.empty:
        return ""
    best = rows.iloc[0]
    which = "it still has" if best["label"] == chosen else f"{best['label']} has"
    return (
        f"; in windows of {analysis.equal_windows.context} tokens for all, {which} the lowest, {number(best['mean'])}"
    )


def longer_windows(analysis: Analysis, text: str) -> str:
    """After a text that names the effect of block_size: what it is in equal windows, since their length alone changes a loss."""
    if "block_size" not in text or analysis.results.finished["block_size"].nunique() < 2:
        return ""
    if analysis.equal_windows is None:
        return " A part of the effect of block_size comes from evaluating in longer windows; how large it is was not scored."
    effects = analysis.equal_windows.effects
    changes = _changes(effects, effects.importance[effects.importance["factor"] == "block_size"])
    if not changes:
        return " A part of the effect of block_size comes from evaluating in longer windows."
    return (
        f" In windows of {analysis.equal_windows.context} tokens for all, {listed(changes, MOST_NAMED)}: the rest of its effect comes "
        "from evaluating in longer windows."
    )


def _on_the_test_part(results: Results, names: Sequence[str]) -> str:
    """A confirmation: the settings were chosen before."""
    if not results.finished.loc[list(names), "test_loss"].notna().all():
        return ""
    loss = expected(results, names, "test_loss")
    return f"; on the test part, which no choice has read, its loss is {number(loss.mean)}{interval_text(loss)}"


def how_it_generalises(analysis: Analysis) -> str:
    finished = analysis.results.finished.dropna(subset=["gap"])
    rows = analysis.ranking[analysis.ranking["diverged"] == 0]
    if finished.empty or rows.empty:
        return ""
    gaps, best = finished["gap"], str(rows["name"].iloc[0])
    gap = expected(analysis.results, _seeds_of(ranked_cells(analysis.results, analysis.ranking)[0]), "gap")
    text = f"The loss gap (validation less training) of the best is {signed(gap.mean)} nats per token"
    text += interval_text(gap, signed, 3)
    if gaps.max() > gaps.min():
        text += f", and between {signed(gaps.min())} and {signed(gaps.max())} over all"
        cells, tied = (analysis.generalisation.attrs[key] for key in ("cells", "tied_cells"))
        if cells > 1 and tied > 1 and analysis.generalisation["low"].notna().any():
            which = f"{tied:,} of {cells:,} gaps" if tied < cells else "all gaps"
            text += f" ({which} are indistinguishable from the smallest)"
    overfits = analysis.overfitting["overfits"]
    judged = overfits.dropna()
    if len(judged):
        text += f"; {int(judged.sum()) or 'none'} of {counted(len(judged), 'training')} overfit"
        text += f" ({len(overfits) - len(judged):,} cannot be judged)" if len(judged) < len(overfits) else ""
    quality = analysis.quality
    if best in quality.index and known(quality.loc[best]["words_real"]):
        row = quality.loc[best]
        text += f"; of the words that the best writes, {share_text(row, 'words_real')} are real ones"
        if known(row["speakers_real"]):
            text += f", and {share_text(row, 'speakers_real')} of its speakers exist in the text"
    return f"{text}."


def claims_hold(analysis: Analysis) -> str:
    """Only of claims that these experiments test, if there are any."""
    tested = analysis.verdicts[analysis.verdicts["verdict"].isin(VERDICTS)]
    if tested.empty:
        follow = int((analysis.verdicts["verdict"] == "arithmetic").sum())
        one = "s" if follow == 1 else ""
        return f"These experiments test none of them; {follow} follow{one} from arithmetic." if follow else ""
    counts = tested["verdict"].value_counts()
    kinds = [
        f"{counts[kind]} {are(counts[kind])} {'bettered' if kind == 'better' else kind}"
        for kind in VERDICTS
        if kind in counts
    ]
    return f"Of {counted(len(tested), 'published claim')} that these experiments test, {listed(kinds)}."
