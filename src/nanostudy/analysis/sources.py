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

EFFECTS = ("factor", "reference", "level", "source", "effect", "low", "high", "se", "df", "n")
DIFFERENCES = ("factor", "reference", "level", "source", "other", "difference", "low", "high", "disagree")
FEWEST = 2  # sources that have an effect


@dataclass(frozen=True)
class Sources:
    """Losses in nats per token. Intervals of `effects` are 95%, each on its own; those of `differences` hold for all at once."""

    effects: pd.DataFrame  # columns EFFECTS: a row per source and main effect that another one has, too
    differences: pd.DataFrame  # columns DIFFERENCES: of each such effect each pair of sources; without an interval NaN
    settings: pd.DataFrame  # setting, and a column per source: what they do not have alike

    @property
    def names(self) -> list[str]:
        return list(dict.fromkeys(self.effects["source"]))


def sources(results: Results, measure: str = "val_loss") -> Sources | None:
    """None unless several of what was read (the column `study`) have an effect in common: the same setting between the same values.

    Each source's effects are its own experiments' alone. Two of them disagree where their difference is beyond the noise of both:
    Welch's t (1947) with Satterthwaite's degrees of freedom, at 95% for all effects and pairs together (Šidák, 1967). Sources
    share neither seeds nor machines, so their estimates are independent.
    """
    parts = {str(name): _part(results, name) for name in results.experiments["study"].unique()}
    for other in results.others:
        parts[next(name for name in _names(other.title) if name not in parts)] = other
    if len(parts) < FEWEST:
        return None
    frame = pd.concat([_effects(part, name, measure) for name, part in parts.items()], ignore_index=True)
    key = ["factor", "reference", "level"]
    frame["key"] = [tuple(map(value_text, row)) for row in frame[key].itertuples(index=False, name=None)]
    shared = frame.groupby("key")["source"].transform("nunique") >= FEWEST
    frame = frame[shared].reset_index(drop=True)
    if frame.empty:
        return None
    there = {name: without_unset(part.experiments) for name, part in parts.items() if name in set(frame["source"])}
    return Sources(frame[list(EFFECTS)], _differences(frame), _unlike(there))


def _names(title: str) -> Iterator[str]:
    yield title
    yield from (f"{title} {number}" for number in itertools.count(2))


def _part(results: Results, study: str) -> Results:
    return replace(results, experiments=results.experiments[results.experiments["study"] == study])


def _effects(results: Results, name: str, measure: str) -> pd.DataFrame:
    found = effects(results, measure)
    mains = found.table[found.table["order"] == 1].rename(columns={"term": "factor"})
    return mains.assign(source=name, n=found.n)[list(EFFECTS)]


def _differences(frame: pd.DataFrame) -> pd.DataFrame:
    pairs: list[tuple[Any, Any]] = [
        (one, other)
        for _, same in frame.groupby("key", sort=False)
        for one, other in itertools.combinations(list(same.itertuples(index=False)), 2)
    ]
    confidence = CONFIDENCE ** (1 / max(1, len(pairs)))
    rows = []
    for one, other in pairs:
        difference = other.effect - one.effect
        margin = _margin((one.se, other.se), (one.df, other.df), confidence)
        ends = (difference - margin, difference + margin)
        about = (one.factor, one.reference, one.level, one.source, other.source)
        rows.append((*about, difference, *ends, bool(abs(difference) > margin)))
    return pd.DataFrame(rows, columns=list(DIFFERENCES))


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
    return pd.DataFrame(rows, columns=["setting", *tables])
