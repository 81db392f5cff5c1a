"""Which settings matter: main effects, two-way interactions, their intervals and their shares of the variance."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
from scipy import stats

from nanostudy.analysis.design import TIMES, Design, design_of
from nanostudy.analysis.fit import NEGLIGIBLE, Fit, Term, level_effect, level_mean
from nanostudy.analysis.frames import AT_CONTEXT, Results, shown
from nanostudy.analysis.noise import CONFIDENCE, Method, Noise, contrasts, judged, margins
from nanostudy.errors import UsageError

COLUMNS = (
    *("term", "order", "factor_a", "factor_b", "level", "reference"),
    *("effect", "se", "df", "low", "high", "p", "share", "clear"),
)
MOST_CONTRASTS = 2047  # of a half-normal plot


@dataclass(frozen=True)
class Effects:
    """In the measure's unit (losses: nats per token). Intervals are 95%, each on its own."""

    table: pd.DataFrame  # COLUMNS: a row a level against the first one, and a pair of such levels
    method: Method  # where the noise estimate comes from
    explanation: str  # the same in words, with what it assumes
    missing: tuple[str, ...]  # sentences: what was left out, and what cannot be told apart
    half_normal: pd.DataFrame | None  # term, effect, quantile; margin and simultaneous in attrs, NaN without noise
    balanced: bool
    n: int
    shares: Mapping[str, float]  # of the variance: the terms, the blocks, and "unexplained"
    noise: float  # standard deviation of one experiment beside its block; NaN where there is no estimate
    measure: str = "val_loss"


def effects(results: Results, measure: str = "val_loss") -> Effects:
    """Of `measure` (a column of numbers of Results.experiments), over the finished experiments."""
    _check(results, measure)
    design = design_of(results, measure)
    fit, noise = judged(design)
    shares = fit.shares()
    rows = [row for term in fit.terms for row in _rows(fit, noise, term, shares[term.name])]
    table = pd.DataFrame(rows, columns=list(COLUMNS)).astype({"level": object, "reference": object, "clear": bool})
    explained = sum(shares.values())
    known_shares = {**shares, "unexplained": max(0.0, 1 - explained)} if shares and explained else dict(shares)
    return Effects(
        table,
        noise.method,
        noise.explanation,
        (*design.missing, *_not_estimated(fit), *_windows(results, design)),
        _half_normal(design, noise),
        design.balanced,
        design.n,
        known_shares,
        math.sqrt(noise.of_one[0]),
        measure,
    )


def _check(results: Results, measure: str) -> None:
    table = results.experiments
    if measure not in table or not pd.api.types.is_float_dtype(table[measure]):
        numbers = [str(name) for name in table if pd.api.types.is_float_dtype(table[name])]
        raise UsageError(f"There is no measure {measure!r}. Measures: {', '.join(numbers)}.")


def _rows(fit: Fit, noise: Noise, term: Term, share: float) -> list[tuple[Any, ...]]:
    factors = [fit.design.factors[place] for place in term.factors]
    variance, df = noise.of(term.name)
    smallest = NEGLIGIBLE * float(np.abs(fit.design.y).max())
    rows = []
    for levels in itertools.product(*(range(1, len(factor.levels)) for factor in factors)):
        reference = _reference(fit, term, levels)
        if reference is None:
            continue
        effect, unit = fit.estimate(level_effect(fit, term, levels, reference))
        effect = 0.0 if abs(effect) <= smallest else effect
        se = max(unit * math.sqrt(variance), smallest) if not math.isnan(variance) else math.nan
        margin = float(stats.t.ppf((1 + CONFIDENCE) / 2, df)) * se
        at = [factor.levels[level] for factor, level in zip(factors, levels, strict=True)]
        against = [factor.levels[reference] for factor in factors]
        single = len(factors) == 1
        rows.append(
            (
                term.name,
                len(factors),
                factors[0].name,
                None if single else factors[1].name,
                at[0] if single else TIMES.join(map(shown, at)),
                against[0] if single else TIMES.join(map(shown, against)),
                *(effect, se, df, effect - margin, effect + margin),
                float(2 * stats.t.sf(abs(effect) / se, df)) if se > 0 else (1.0 if se == 0 else math.nan),
                share,
                bool(abs(effect) > margin),
            )
        )
    return rows


def _reference(fit: Fit, term: Term, levels: tuple[int, ...]) -> int | None:
    """The lowest level that the experiments compare with this one, other settings alike; the first, where the study is whole."""
    if len(levels) > 1:
        return 0
    return next((one for one in range(levels[0]) if fit.estimable(level_effect(fit, term, levels, one))), None)


def _not_estimated(fit: Fit) -> list[str]:
    told = []
    bound = [
        f"{term.name}={shown(fit.design.factors[term.factors[0]].levels[level])}"
        for term in fit.terms
        if len(term.factors) == 1
        for level in range(1, len(fit.design.factors[term.factors[0]].levels))
        if _reference(fit, term, (level,)) is None
    ]
    if bound:
        told.append(f"Not estimated, because other settings always change with them: {', '.join(bound)}.")
    if fit.dropped:
        listed = "; ".join(fit.dropped)
        told.append(f"Not estimated, and taken to be nil: {listed}.")
    if fit.order == 1 and len(fit.design.factors) > 1:
        told.append("Two-way interactions are not estimated: there are too few experiments to tell them from noise.")
    return told


def _windows(results: Results, design: Design) -> list[str]:
    """That a longer context lowers the loss by itself."""
    if design.measure not in ("val_loss", "train_loss") or not any("block_size" in f.settings for f in design.factors):
        return []
    common = [c for c in results.contexts if design.table[f"{AT_CONTEXT}{c}"].notna().all()]
    where = f" At equal context that is taken out: see {AT_CONTEXT}{max(common)}." if common else ""
    return [
        f"Each loss is measured in windows of the experiment's own block_size, and longer ones alone lower it.{where}"
    ]


def _half_normal(design: Design, noise: Noise) -> pd.DataFrame | None:
    """The contrasts of all orders by size, against the quantiles that noise alone would give; only of balanced two-level designs."""
    if not (design.balanced and design.two_level) or not 3 <= design.cell_count - 1 <= MOST_CONTRASTS:
        return None
    found = contrasts(design)
    table = pd.DataFrame({"term": list(found), "effect": list(found.values())})
    table = table.sort_values("effect", key=lambda column: column.abs(), ignore_index=True)
    places = (np.arange(len(table)) + 0.5) / len(table)
    table["quantile"] = stats.norm.ppf(0.5 + places / 2)
    variance, df = noise.of_one
    margin, simultaneous = margins(math.sqrt(4 * variance / design.n), df, len(table))
    table.attrs["margin"], table.attrs["simultaneous"] = margin, simultaneous
    return table


def cell_means(results: Results, factor_a: str, factor_b: str | None = None, measure: str = "val_loss") -> pd.DataFrame:
    """level_a, level_b, mean, low, high, n: the mean at each level (or pair of levels), every level of the others counting alike.

    By the model of `effects` where it has the term, so that what is unbalanced is made up for; plain means otherwise (`adjusted` is
    false then). Intervals are of comparisons: what seeds do to all alike is not in them.
    """
    _check(results, measure)
    design = design_of(results, measure)
    fit, noise = judged(design)
    places = [_place(design, name) for name in (factor_a, factor_b) if name is not None]
    variance, df = noise.of(TIMES.join(design.factors[place].name for place in sorted(places)))
    rows = []
    for levels in itertools.product(*(range(len(design.factors[place].levels)) for place in places)):
        here = np.all([design.factors[p].codes == level for p, level in zip(places, levels, strict=True)], axis=0)
        weights = level_mean(fit, dict(zip(places, levels, strict=True))) if here.any() else None
        if weights is not None:
            mean, unit = fit.estimate(weights)
        else:
            mean = float(design.y[here].mean()) if here.any() else math.nan
            unit = 1 / math.sqrt(here.sum()) if here.any() else math.nan
        margin = float(stats.t.ppf((1 + CONFIDENCE) / 2, df)) * unit * math.sqrt(variance)
        at = [design.factors[p].levels[level] for p, level in zip(places, levels, strict=True)]
        rows.append(
            (
                at[0],
                at[1] if len(at) > 1 else None,
                mean,
                mean - margin,
                mean + margin,
                int(here.sum()),
                weights is not None,
            )
        )
    columns = ["level_a", "level_b", "mean", "low", "high", "n", "adjusted"]
    return pd.DataFrame(rows, columns=columns).astype({"level_a": object, "level_b": object})


def _place(design: Design, name: str) -> int:
    """Of the factor with this name, or with this setting in it."""
    for place, factor in enumerate(design.factors):
        if name == factor.name or name in factor.settings:
            return place
    known_names = ", ".join(factor.name for factor in design.factors)
    raise UsageError(f"{name} is no factor of these experiments. Factors: {known_names or 'none'}.")
