"""The answer in a few sentences, from the numbers alone: what matters, what does not, which model, how it writes, what holds.

An effect is stated only where its interval excludes zero; otherwise the sentence says that it is indistinguishable from none.
"""

from __future__ import annotations

from collections.abc import Sequence

import pandas as pd

from nanostudy.analysis.analysis import Analysis
from nanostudy.analysis.divergence import by_settings, trained
from nanostudy.analysis.frames import Results
from nanostudy.analysis.text_error import expected
from nanostudy.reporting.charts.experiments import ranked_cells
from nanostudy.reporting.charts.figure import each
from nanostudy.reporting.charts.marks import varying
from nanostudy.reporting.document import Answer, Blocks, Sentence
from nanostudy.reporting.findings import Findings, strongest_by_factor
from nanostudy.reporting.phrases import interval, interval_text, number, share_text, short, signed
from nanostudy.settings import FIELDS
from nanostudy.text import counted, listed, value_text

MOST_NAMED = 3  # settings, pairs or experiments that a sentence names
VERDICTS = ("reproduced", "better", "not reproduced", "undecided")  # of claims that were tested


def answer(f: Findings) -> Blocks:
    """In the order in which a reader asks; only what the results can say."""
    diverged = {"What diverges": what_diverges(f.analysis)}
    if not f.compares:
        return [Answer([Sentence(about, text) for about, text in diverged.items()])] if any(diverged.values()) else []
    texts = diverged | {
        "What matters": what_matters(f.analysis),
        "What does not, and what acts together": what_does_not(f.analysis),
        "Which model to use": which_model(f.analysis),
        "How well it generalises and writes": how_it_generalises(f.analysis),
        "Do the published claims hold": claims_hold(f.analysis),
    }
    sentences = {about: text + longer_windows(f.analysis, text) for about, text in texts.items() if text}
    return [Answer([Sentence(about, text) for about, text in sentences.items()])]


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
    where = [f"{row.cell.replace('=', ' ')} in {row.diverged:,} of {row.n:,}" for row in each(cells)]
    unclear = "; no value of a setting diverges clearly more often than the others (95%)" if len(table) else ""
    return f"{text}: {listed(where, MOST_NAMED)}{unclear}."


def what_matters(analysis: Analysis) -> str:
    effects, results = analysis.effects, analysis.results
    if effects.table.empty:
        if not results.factors:
            return "No setting varies between the experiments, so none can be said to matter."
        return effects.explanation or "The effects of the settings cannot be estimated from these experiments."
    mains = strongest_by_factor(effects.table)
    clear = mains[mains["clear"].astype(bool)]
    if mains.empty:
        return "No setting's own effect can be estimated from these experiments."
    if clear.empty:
        confidence = "" if effects.method == "none" else " at 95%"
        first = mains.iloc[0]
        return (
            f"No setting's effect differs from zero{confidence}: the largest estimate, {_change(first)}, changes the validation "
            f"loss by {_effect(first)} nats per token."
        )
    first = clear.iloc[0]
    low, high = sorted(abs(first[key]) for key in ("low", "high"))
    share = f"; {first['share']:.0%} of the variance" if first["share"] == first["share"] else ""
    text = (
        f"{first['factor_a']} matters most: going from {value_text(first['reference'])} to {value_text(first['level'])} "
        f"{'lowers' if first['effect'] < 0 else 'raises'} the validation loss by {number(abs(first['effect']), 3)} nats per "
        f"token (95% interval {number(low, 3)} to {number(high, 3)}{share})"
    )
    others = [f"{_change(row)} by {_effect(row)}" for _, row in clear.iloc[1:].iterrows()]
    if not others:
        return f"{text}; no other setting's effect differs from zero at 95%."
    return f"{text}, then {listed(others, MOST_NAMED)}."


def _effect(row: pd.Series) -> str:
    return interval(row["effect"], row["low"], row["high"])


def _change(row: pd.Series) -> str:
    return f"{row['factor_a']} {value_text(row['reference'])} → {value_text(row['level'])}"


def what_does_not(analysis: Analysis) -> str:
    table = analysis.effects.table
    if table.empty:
        return ""
    mains = strongest_by_factor(table)
    unclear = [f"{_change(row)} by {_effect(row)}" for _, row in mains[~mains["clear"].astype(bool)].iterrows()]
    all_pairs = table[(table["order"] == 2) & table["effect"].notna()]
    # Šidák: with many pairs, some would look clear each on its own where none acts together
    bound = 1 - 0.95 ** (1 / max(1, all_pairs["term"].nunique()))
    pairs = all_pairs[all_pairs["clear"].astype(bool) & (all_pairs["p"] < bound)]
    pairs = pairs.loc[pairs["effect"].abs().sort_values(ascending=False, kind="stable").index].drop_duplicates("term")
    if unclear and analysis.effects.method == "none":
        first = "without an estimate of the noise, no effect can be said to differ from zero"
    elif unclear:
        verb = "is" if len(unclear) == 1 else "are"
        first = f"{listed(unclear, MOST_NAMED)} {verb} indistinguishable from no effect (95%)"
    else:
        first = "every setting that was varied has an effect that differs from zero at 95%"
    if not (table["order"] == 2).any():
        return f"{_capital(first)}; whether settings act together cannot be estimated."
    if pairs.empty:
        return f"{_capital(first)}; no two settings can be said to act together."
    together = listed([f"{row['term']} by {_effect(row)}" for _, row in pairs.iterrows()], MOST_NAMED)
    return f"{_capital(first)}; some act together (at 95% for all pairs at once), one's effect depending on the other: {together}."


def _capital(text: str) -> str:
    """A sentence that begins with the name of a setting keeps it as it is typed."""
    return text if text.split(" ")[0] in FIELDS else text[:1].upper() + text[1:]


def which_model(analysis: Analysis) -> str:
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
    sized = f", with {short(size)} parameters" if size == size else ""
    if replicated:
        single = ranking.iloc[0]
        lost = f", whose settings diverged with {counted(int(single['diverged']), 'other seed')}"
        text = (
            f"{_capital(first['label'])} has the lowest mean validation loss, {number(loss.mean)} nats per token over "
            f"{counted(loss.n, 'seed')}{interval_text(loss)}{sized}; the lowest single one is {number(single['value'])}, of {single['name']}"
            f"{lost if single['diverged'] else ''}"
        )
    else:
        through = ", ".join(f"{name} {value_text(table.loc[first['name']][name])}" for name in varying(results))
        settings = f" ({through})" if through else ""
        text = (
            f"{first['name']}{settings} has the lowest validation loss, {number(loss.mean)} nats per token"
            f"{interval_text(loss)}{sized}"
        )
    text += _in_equal_windows(analysis, first["label"]) + _on_the_test_part(results, seeds)
    others = f"other {'settings' if replicated else 'experiments'}{' that never diverged' if (ranking['diverged'] > 0).any() else ''}"
    if len(rows) == 1:
        return f"{text}; there is no other to compare it with."
    if not rows["low"].notna().any():
        return f"{text}; how sure that is cannot be said without an estimate of the noise."
    tied = rows[rows["tied"].astype(bool)].iloc[1:]
    if tied.empty:
        return f"{text}, and it differs from all {len(rows) - 1:,} {others} at 95%."
    sizes = table.loc[list(tied["name"])]["parameters"].dropna()
    smaller = sizes[sizes < size]
    cheaper = f", the smallest of which has {short(smaller.min())} parameters" if len(smaller) else ""
    verb = "is" if len(tied) == 1 else "are"
    return f"{text}; {len(tied):,} of the {len(rows) - 1:,} {others} {verb} indistinguishable from it (95%){cheaper}."


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
    """After a text that names the effect of block_size: what it is in equal windows, since a longer window alone helps."""
    if "block_size" not in text or analysis.results.finished["block_size"].nunique() < 2:
        return ""
    if analysis.equal_windows is None:
        return " A longer window alone gives a part of the effect of block_size, which was not scored."
    table = analysis.equal_windows.effects.table
    changes = [f"{_change(row)} by {_effect(row)}" for _, row in table[table["term"] == "block_size"].iterrows()]
    if not changes:
        return " A longer window alone gives a part of the effect of block_size."
    return (
        f" In windows of {analysis.equal_windows.context} tokens for all, {listed(changes, MOST_NAMED)}: the rest of its effect is "
        "what a longer window alone gives."
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
        if cells > 1 and tied > 1:
            which = f"{tied:,} of {cells:,} settings'" if tied < cells else "all settings'"
            text += f" ({which} are indistinguishable from the smallest)"
    overfits = analysis.overfitting["overfits"]
    judged = overfits.dropna()
    if len(judged):
        text += f"; {int(judged.sum()) or 'none'} of {counted(len(judged), 'training')} overfit"
        text += f" ({len(overfits) - len(judged):,} cannot be judged)" if len(judged) < len(overfits) else ""
    quality = analysis.quality
    if best in quality.index and quality.loc[best]["words_real"] == quality.loc[best]["words_real"]:
        row = quality.loc[best]
        text += f"; of the words that the best writes, {share_text(row, 'words_real')} are real ones"
        if row["speakers_real"] == row["speakers_real"]:
            text += f", and {share_text(row, 'speakers_real')} of its speakers exist in the text"
    return f"{text}."


def claims_hold(analysis: Analysis) -> str:
    """Of the claims about settings that were run; what arithmetic decides is not counted."""
    verdicts = analysis.verdicts[analysis.verdicts["verdict"] != "arithmetic"]
    if verdicts.empty:
        return ""
    tested = verdicts[verdicts["verdict"].isin(VERDICTS)]
    text = f"Of {counted(len(verdicts), 'published claim')} about these settings, the experiments test {len(tested) or 'none'}"
    if len(tested):
        counts = tested["verdict"].value_counts()
        text += f": {listed([_verdict(kind, int(counts[kind])) for kind in VERDICTS if counts.get(kind, 0)])}"
    rest = []
    against = int((verdicts["verdict"] == "contradicts itself").sum())
    if against:
        rest.append(f"{against} {'contradicts itself' if against == 1 else 'contradict themselves'}")
    left = len(verdicts) - len(tested) - against
    if left:
        rest.append(f"{left} {'is' if left == 1 else 'are'} not tested")
    return f"{text}; {listed(rest)}." if rest else f"{text}."


def _verdict(verdict: str, count: int) -> str:
    be = "is" if count == 1 else "are"
    return f"{count} {be} {'bettered' if verdict == 'better' else verdict}"
