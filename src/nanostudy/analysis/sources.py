"""The same effect as several sources measured it: other people's tables and studies side by side, and where they disagree beyond noise."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import pandas as pd

from nanostudy.analysis.effects import effects
from nanostudy.analysis.frames import Results, factors_of, levels, without_unset
from nanostudy.analysis.intervals import CONFIDENCE, satterthwaite, student
from nanostudy.text import value_text

CHANGE = ("factor", "reference", "level")
EFFECTS = (*CHANGE, "source", "effect", "low", "high", "se", "df", "n")
DIFFERENCES = (
    *CHANGE,
    "source",
    "other",
    "effect",
    "other_effect",
    "difference",
    "low",
    "high",
    "disagree",
    "settings",
)
FEWEST = 2  # sources that have an effect


@dataclass(frozen=True)
class Sources:
    """Losses in nats per token. Intervals of `effects` are 95%, each on its own; those of `differences` hold for all at once."""

    effects: pd.DataFrame  # columns EFFECTS: a row per source and main effect that another one has, too
    differences: pd.DataFrame  # columns DIFFERENCES: a row per pair of sources, on the settings of both; or NaN
    settings: pd.DataFrame  # setting, and a column per source: what they do not have alike
    tokenizers: Mapping[str, set[str]]  # of the sources where they are known

    @property
    def names(self) -> list[str]:
        return list(dict.fromkeys(self.effects["source"]))

    @property
    def one_unit(self) -> bool:
        """Whether a token is the same in all sources, as far as is known."""
        return len({frozenset(kinds) for kinds in self.tokenizers.values() if kinds}) < 2


def sources(results: Results, measure: str = "val_loss") -> Sources | None:
    """None unless several of what was read (the column `study`) have an effect in common: the same setting between the same values.

    Each source's effects are its own experiments' alone. Two sources disagree where their effects on the settings that both were
    run with differ beyond the noise of both: Welch's t (1947) with Satterthwaite's degrees of freedom, at 95% for all effects and
    pairs together (Šidák, 1967). Sources share neither seeds nor machines, so their estimates are independent. Losses per token of
    different tokenizers have different units, and are not compared.
    """
    parts = {str(name): _part(results, name) for name in results.experiments["study"].unique()}
    for other in results.others:
        parts[next(name for name in _names(other.title) if name not in parts)] = other
    if len(parts) < FEWEST:
        return None
    frame = pd.concat([_effects(part, name, measure) for name, part in parts.items()], ignore_index=True)
    frame["key"] = [_key(row) for row in frame.itertuples()]
    shared = frame.groupby("key")["source"].transform("nunique") >= FEWEST
    frame = frame[shared].reset_index(drop=True)
    if frame.empty:
        return None
    there = {name: without_unset(part.experiments) for name, part in parts.items() if name in set(frame["source"])}
    units = {
        name: set(map(value_text, levels(table["tokenizer"]))) for name, table in there.items() if "tokenizer" in table
    }
    return Sources(frame[list(EFFECTS)], _differences(frame, parts, units, measure), _unlike(there), units)


def _names(title: str) -> Iterator[str]:
    yield title
    yield from (f"{title} {number}" for number in itertools.count(2))


def _part(results: Results, study: str) -> Results:
    return replace(results, experiments=results.experiments[results.experiments["study"] == study])


def _effects(results: Results, name: str, measure: str) -> pd.DataFrame:
    found = effects(results, measure)
    mains = found.table[found.table["order"] == 1].rename(columns={"term": "factor"})
    return mains.assign(source=name, n=found.n)[list(EFFECTS)]


def _differences(
    frame: pd.DataFrame, parts: Mapping[str, Results], units: Mapping[str, set[str]], measure: str
) -> pd.DataFrame:
    """Of each effect and pair of sources that have it: between the two effects on the settings that both were run with."""
    order = list(dict.fromkeys(frame["key"]))
    found: list[tuple[Any, ...]] = []
    for one, other in itertools.combinations(dict.fromkeys(frame["source"]), 2):
        if units.get(one) and units.get(other) and units[one] != units[other]:
            continue
        *alike, n = _alike(parts[one], parts[other])
        there = [{_key(row): row for row in _effects(part, "", measure).itertuples()} for part in alike]
        both = set.intersection(*(set(frame["key"][frame["source"] == name]) for name in (one, other)))
        found += [(key, one, other, n, *(effects.get(key) for effects in there)) for key in both]
    found.sort(key=lambda pair: order.index(pair[0]))
    confidence = CONFIDENCE ** (1 / max(1, len(found)))
    shown = {
        key: tuple(row) for key, row in zip(frame["key"], frame[list(CHANGE)].itertuples(index=False), strict=True)
    }
    rows = []
    for key, one, other, n, ours, theirs in found:
        if ours is None or theirs is None:
            rows.append((*shown[key], one, other, *[math.nan] * 5, False, n))
            continue
        difference = theirs.effect - ours.effect
        margin = _margin((ours.se, theirs.se), (ours.df, theirs.df), confidence)
        ends = (difference - margin, difference + margin)
        apart = bool(abs(difference) > margin)
        rows.append((*shown[key], one, other, ours.effect, theirs.effect, difference, *ends, apart, n))
    return pd.DataFrame(rows, columns=list(DIFFERENCES))


def _key(row: Any) -> tuple[str, ...]:
    return tuple(value_text(getattr(row, name)) for name in CHANGE)


def _alike(one: Results, other: Results) -> tuple[Results, Results, int]:
    """The experiments of both whose settings the other has results of, too, and how many settings these are: as settings act
    together, effects over other settings are other effects. Settings without a value in common cannot be matched.
    """
    tables = (one.finished, other.finished)
    varied = factors_of(pd.concat(tables))
    values = {name: [set(map(value_text, levels(table[name]))) for table in tables if name in table] for name in varied}
    common = [name for name, sides in values.items() if len(sides) == 2 and sides[0] & sides[1]]
    cells = [
        pd.Series([tuple(map(value_text, row)) for row in t[common].itertuples(index=False)], t.index) for t in tables
    ]
    shared = set(cells[0]) & set(cells[1])
    first, second = (
        replace(part, experiments=part.experiments.loc[cell.index[cell.isin(shared)]])
        for part, cell in zip((one, other), cells, strict=True)
    )
    return first, second, len(shared)


def _margin(errors: Sequence[float], dfs: Sequence[float], confidence: float) -> float:
    """NaN where one of the two has no estimate of its noise."""
    variances = [error**2 for error in errors]
    total = sum(variances)
    if not math.isfinite(total) or total == 0:
        return math.nan
    return float(student(satterthwaite(variances, dfs), confidence)) * math.sqrt(total)


def _unlike(tables: Mapping[str, pd.DataFrame]) -> pd.DataFrame:
    """The settings whose values are not those of all sources: what a disagreement may come from, beside the programs."""
    rows = []
    for setting in factors_of(pd.concat(tables.values())):
        values = [
            ", ".join(map(value_text, levels(table[setting]) if setting in table else [])) or "not known"
            for table in tables.values()
        ]
        if len(set(values)) > 1:
            rows.append((setting, *values))
    seeds = [_seeds(table) for table in tables.values()]
    if len(set(seeds)) > 1:
        rows.append(("seed", *seeds))
    return pd.DataFrame(rows, columns=["setting", *tables])


def _seeds(table: pd.DataFrame) -> str:
    seeds = table["seed"].dropna().unique()
    return value_text(seeds[0]) if len(seeds) == 1 else f"{len(seeds):,} of them" if len(seeds) else "not known"
