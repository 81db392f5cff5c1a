"""The answer in five sentences, from the numbers alone: what matters, what does not, which model, how it writes, what holds.

An effect is stated only where its interval excludes zero; otherwise the sentence says that it cannot be told from none.
"""

from __future__ import annotations

from dataclasses import dataclass

import pandas as pd

from nanostudy.analysis.analysis import Analysis
from nanostudy.analysis.frames import Results, levels
from nanostudy.reporting.charts.charts import ranked_cells
from nanostudy.reporting.phrases import interval, level_text, listed, nats, setting_text, short, signed
from nanostudy.text import counted

STATUSES = ("diverged", "failed", "running", "waiting", "finished")
MOST_NAMED = 3  # settings, pairs or experiments that a sentence names
VERDICTS = ("reproduced", "better", "not reproduced")  # of claims that were tested


@dataclass(frozen=True)
class Sentence:
    about: str
    text: str


def answer(analysis: Analysis) -> list[Sentence]:
    """Five, in the order in which a reader asks."""
    return [
        Sentence("What matters", what_matters(analysis)),
        Sentence("What does not, and what acts together", what_does_not(analysis)),
        Sentence("Which model to use", which_model(analysis)),
        Sentence("How well it generalises and writes", how_it_generalises(analysis)),
        Sentence("Do the published claims hold", claims_hold(analysis)),
    ]


def strongest_by_factor(table: pd.DataFrame) -> pd.DataFrame:
    """Of each setting the change of level with the largest effect; the largest of all first."""
    mains = table[(table["order"] == 1) & table["effect"].notna()]
    order = mains["effect"].abs().sort_values(ascending=False, kind="stable").index
    return mains.loc[order].drop_duplicates("factor_a")


def varying(results: Results) -> list[str]:
    """The settings that vary among the finished experiments."""
    return [name for name in results.factors if len(levels(results.finished[name])) > 1]


def what_matters(analysis: Analysis) -> str:
    effects = analysis.effects
    if effects.table.empty:
        return _nothing_to_compare(analysis)
    mains = strongest_by_factor(effects.table)
    clear = mains[mains["clear"].astype(bool)]
    if mains.empty:
        return "No setting's own effect can be estimated from these experiments."
    if clear.empty:
        first = mains.iloc[0]
        known = "" if effects.method == "none" else " at 95%"
        return (
            f"No setting's effect can be told from zero{known}: the largest estimate, {_change(first)}, changes the validation "
            f"loss by {interval(first['effect'], first['low'], first['high'])} nats per token."
        )
    first = clear.iloc[0]
    share = f"; {first['share']:.0%} of the variance" if first["share"] == first["share"] else ""
    verb = "lowers" if first["effect"] < 0 else "raises"
    ends = sorted(abs(first[key]) for key in ("low", "high"))
    told = (
        f"{setting_text(first['factor_a'])} matters most: {_levels(first)} {verb} the validation loss by "
        f"{nats(abs(first['effect']), 3)} nats per token (95% interval {nats(ends[0], 3)} to {nats(ends[1], 3)}{share})"
    )
    others = [f"{_change(row)} by {_known(row)}" for _, row in clear.iloc[1:].iterrows()]
    if not others:
        return f"{told}; no other setting's effect can be told from zero."
    return f"{told}, then {first_of(others)}."


def first_of(words: list[str], others: str = "more") -> str:
    """a, b, c and 2 more."""
    left = len(words) - MOST_NAMED
    return listed([*words[:MOST_NAMED], f"{left} {others}"] if left > 0 else words)


def _known(row: pd.Series) -> str:
    return interval(row["effect"], row["low"], row["high"])


def _levels(row: pd.Series) -> str:
    return f"going from {level_text(row['reference'])} to {level_text(row['level'])}"


def _change(row: pd.Series) -> str:
    return f"{setting_text(row['factor_a'])} {level_text(row['reference'])} → {level_text(row['level'])}"


def _nothing_to_compare(analysis: Analysis) -> str:
    results = analysis.results
    finished, total = len(results.finished), len(results.experiments)
    if not total:
        return "There are no experiments yet, so there is nothing to compare."
    if not finished:
        counts = results.experiments["status"].value_counts()
        how = ", ".join(f"{counts[status]:,} {status}" for status in STATUSES if counts.get(status, 0))
        return f"None of {counted(total, 'experiment')} has finished with a finite loss ({how}), so no effect can be estimated."
    if finished == 1:
        return "One finished experiment alone says nothing about the effect of any setting."
    if not results.factors:
        return "No setting varies between the experiments, so that none can be said to matter."
    return analysis.effects.explanation or "The effects of the settings cannot be estimated from these experiments."


def what_does_not(analysis: Analysis) -> str:
    table = analysis.effects.table
    if table.empty:
        return "Nor can anything be said of settings that do not matter, or that act together."
    mains = strongest_by_factor(table)
    unclear = mains[~mains["clear"].astype(bool)]
    all_pairs = table[(table["order"] == 2) & table["effect"].notna()]
    # Šidák: with many pairs, some would look clear each on its own where none acts together
    bound = 1 - 0.95 ** (1 / max(1, all_pairs["term"].nunique()))
    pairs = all_pairs[all_pairs["clear"].astype(bool) & (all_pairs["p"] < bound)]
    pairs = pairs.loc[pairs["effect"].abs().sort_values(ascending=False, kind="stable").index].drop_duplicates("term")
    named = [f"{_change(row)} by {_known(row)}" for _, row in unclear.iterrows()]
    if named and analysis.effects.method == "none":
        first = "without an estimate of the noise, no effect can be told from none"
    elif named:
        first = f"{first_of(named)} cannot be told from no effect at all"
    else:
        first = "every setting that was varied has an effect that can be told from zero"
    if not (table["order"] == 2).any():
        return f"{_capital(first)}; whether settings act together cannot be estimated."
    if pairs.empty:
        return f"{_capital(first)}; no two settings can be said to act together."
    told = [f"{row['term']} by {_known(row)}" for _, row in pairs.iterrows()]
    return f"{_capital(first)}; some act together (at 95% for all pairs at once), one's effect depending on the other: {first_of(told, 'more pairs')}."


def _capital(text: str) -> str:
    """A sentence that begins with the name of a setting keeps it as it is typed."""
    return text if "_" in text.split(" ")[0] else text[:1].upper() + text[1:]


def which_model(analysis: Analysis) -> str:
    ranking, results = analysis.ranking, analysis.results
    if ranking.empty:
        return "No model can be recommended: none has finished."
    rows, replicated = ranked_cells(results, ranking)
    first, table = rows.iloc[0], results.experiments
    size = table.loc[first["name"]]["parameters"]
    sized = f", with {short(size)} parameters" if size == size else ""
    if replicated:
        single = ranking.iloc[0]
        told = (
            f"{_capital(first['label'])} has the lowest mean validation loss, {nats(first['mean'])} nats per token over "
            f"{counted(int(first['n']), 'seed')}{sized}; the lowest single one is {nats(single['value'])}, of {single['name']}"
        )
    else:
        axes = varying(results)
        through = ", ".join(f"{setting_text(f)} {level_text(table.loc[first['name']][f])}" for f in axes)
        settings = f" ({through})" if through else ""
        told = f"{first['name']}{settings} has the lowest validation loss, {nats(first['value'])} nats per token{sized}"
    if len(rows) == 1:
        return f"{told}; there is no other to compare it with."
    if not rows["low"].notna().any():
        return f"{told}; how sure that is cannot be said, for want of an estimate of the noise."
    others = "settings" if replicated else "experiments"
    tied = rows[rows["tied"].astype(bool)].iloc[1:]
    if tied.empty:
        return f"{told}, and it can be told from all {len(rows) - 1:,} other {others} at 95%."
    sizes = table.loc[list(tied["name"])]["parameters"].dropna()
    smaller = sizes[sizes < size]
    cheaper = f", the smallest of which has {short(smaller.min())} parameters" if len(smaller) else ""
    return f"{told}; {len(tied):,} of the {len(rows) - 1:,} other {others} cannot be told from it at 95%{cheaper}."


def how_it_generalises(analysis: Analysis) -> str:
    results = analysis.results
    known = results.finished.dropna(subset=["gap"])
    if known.empty:
        return "Nothing can be said of generalisation: it takes a finished experiment with both losses."
    best = str(known["val_loss"].idxmin())
    told = f"The loss gap (validation less training) of the best is {signed(float(known['gap'][best]))} nats per token"
    if known["gap"].max() > known["gap"].min():
        told += f", and between {signed(known['gap'].min())} and {signed(known['gap'].max())} over all"
    over = analysis.overfitting
    judged = over["overfits"].dropna()
    if len(judged) == 1:
        told += "; it overfits" if bool(judged.iloc[0]) else "; it does not overfit"
    elif len(judged):
        told += f"; {int(judged.sum()) or 'none'} of {len(judged):,} trainings overfit"
    quality = analysis.quality
    if best in quality.index and quality.loc[best]["words_real"] == quality.loc[best]["words_real"]:
        row = quality.loc[best]
        told += f"; of the words that the best writes, {row['words_real']:.0%} are real ones"
        if row["speakers_real"] == row["speakers_real"]:
            told += f", and {row['speakers_real']:.0%} of its speakers exist in the text"
    return f"{told}."


def claims_hold(analysis: Analysis) -> str:
    verdicts = analysis.verdicts
    if verdicts.empty:
        return "There are no published claims to hold these results against."
    decided = verdicts["verdict"].isin(VERDICTS)
    tested, counted_out = verdicts[decided & (verdicts["n"] > 0)], verdicts[decided & (verdicts["n"] == 0)]
    told = f"Of {counted(len(verdicts), 'published claim')} these experiments test {len(tested) or 'none'}"
    if len(tested):
        counts = tested["verdict"].value_counts()
        told += (
            f": {listed([_verdict(verdict, int(counts[verdict])) for verdict in VERDICTS if counts.get(verdict, 0)])}"
        )
    rest = []
    if len(counted_out):
        holds = int((counted_out["verdict"] != "not reproduced").sum())
        rest.append(f"by arithmetic alone {holds} of {len(counted_out)} {'holds' if holds == 1 else 'hold'}")
    against = int((verdicts["verdict"] == "contradicts itself").sum())
    if against:
        rest.append(f"{against} {'contradicts itself' if against == 1 else 'contradict themselves'}")
    left = len(verdicts) - int(decided.sum()) - against
    if left:
        rest.append(f"{left} {'was' if left == 1 else 'were'} not run or cannot be tested here")
    return f"{told}; {listed(rest)}." if rest else f"{told}."


def _verdict(verdict: str, count: int) -> str:
    be = "is" if count == 1 else "are"
    return f"{count} {be} {'bettered' if verdict == 'better' else verdict}"
