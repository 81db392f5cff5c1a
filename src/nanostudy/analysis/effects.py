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
from nanostudy.analysis.frames import AT_CONTEXT, Results
from nanostudy.analysis.noise import CONFIDENCE, Method, Noise, contrasts, judged, margins
from nanostudy.errors import UsageError
from nanostudy.text import value_text

EFFECTS = (
    *("term", "order", "factor_a", "factor_b", "level", "reference"),
    *("effect", "se", "df", "low", "high", "p", "share", "clear"),
)
MOST_CONTRASTS = 2047  # in a half-normal plot


@dataclass(frozen=True)
class Effects:
    """In the measure's unit (losses: nats per token). Intervals are 95%, each on its own."""

    table: pd.DataFrame  # columns EFFECTS; a row per level, compared with the first one, and per pair of such levels
    method: Method  # where the noise estimate comes from
    explanation: str  # the same in words, with what it assumes
    missing: tuple[str, ...]  # sentences: what was left out, and which effects cannot be separated
    half_normal: pd.DataFrame | None  # term, effect, quantile; attrs: margin and simultaneous, NaN without noise
    balanced: bool
    n: int
    shares: Mapping[str, float]  # of the variance: the terms, the blocks, and "unexplained"
    noise: float  # standard deviation of one experiment within its block; NaN without an estimate
    measure: str = "val_loss"


def effects(results: Results, measure: str = "val_loss") -> Effects:
    """The effects on `measure` (a float column of Results.experiments) over the finished experiments. Raises UsageError."""
    _check(results, measure)
    design = design_of(results, measure)
    fit, noise = judged(design)
    shares = fit.shares()
    compared = [term for term in fit.terms if not set(term.factors) & set(design.numbers)]  # numbers: shapes.py
    rows = [row for term in compared for row in _rows(fit, noise, term, shares[term.name])]
    table = pd.DataFrame(rows, columns=list(EFFECTS)).astype({"level": object, "reference": object, "clear": bool})
    explained = sum(shares.values())
    return Effects(
        table,
        noise.method,
        noise.explanation,
        (*design.missing, *_not_estimated(fit), *_windows(results, design)),
        _half_normal(design, noise),
        design.balanced,
        design.n,
        {**shares, "unexplained": max(0.0, 1 - explained)} if explained else shares,
        math.sqrt(noise.of_one[0]),
        measure,
    )


def _check(results: Results, measure: str) -> None:
    table = results.experiments
    if measure not in table or not pd.api.types.is_float_dtype(table[measure]):
        numbers = [str(name) for name in table if pd.api.types.is_float_dtype(table[name])]
        raise UsageError(f"There is no measure {measure!r}. Measures: {', '.join(numbers)}.")


def _rows(fit: Fit, noise: Noise, term: Term, share: float) -> list[tuple[Any, ...]]:
    factors = [fit.design.factors[index] for index in term.factors]
    names = (factors[0].name, factors[1].name if len(factors) > 1 else None)
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
        values = [each[0] if len(each) == 1 else TIMES.join(map(value_text, each)) for each in (at, against)]
        p = float(2 * stats.t.sf(abs(effect) / se, df)) if se > 0 else (1.0 if se == 0 else math.nan)
        interval = (effect, se, df, effect - margin, effect + margin, p)
        rows.append((term.name, len(factors), *names, *values, *interval, share, bool(abs(effect) > margin)))
    return rows


def _reference(fit: Fit, term: Term, levels: tuple[int, ...]) -> int | None:
    """The lowest level that the experiments compare with this one, other settings alike; in a whole study, the first."""
    if len(levels) > 1:
        return 0
    return next((one for one in range(levels[0]) if fit.estimable(level_effect(fit, term, levels, one))), None)


def _not_estimated(fit: Fit) -> list[str]:
    sentences = []
    bound = [
        f"{term.name}={value_text(value)}"
        for term in fit.terms
        if len(term.factors) == 1
        for level, value in enumerate(fit.design.factors[term.factors[0]].levels)
        if level and _reference(fit, term, (level,)) is None
    ]
    if bound:
        sentences.append(f"Not estimated, because other settings always change with them: {', '.join(bound)}.")
    if fit.dropped:
        sentences.append(f"Not estimated, and taken to be nil: {'; '.join(fit.dropped)}.")
    if fit.order == 1 and len(fit.design.factors) > 1:
        sentences.append("Two-way interactions are not estimated: too few experiments separate them from noise.")
    return sentences


def _windows(results: Results, design: Design) -> list[str]:
    """A sentence where contexts differ: a longer one lowers the loss by itself."""
    if design.measure not in ("val_loss", "train_loss") or not any("block_size" in f.settings for f in design.factors):
        return []
    common = [c for c in results.contexts if design.table[f"{AT_CONTEXT}{c}"].notna().all()]
    where = f" At equal context that is taken out: see {AT_CONTEXT}{max(common)}." if common else ""
    why = "Each loss is measured in windows of the experiment's own block_size, and longer windows alone lower it."
    return [f"{why}{where}"]


def _half_normal(design: Design, noise: Noise) -> pd.DataFrame | None:
    """The contrasts of all orders by size, against the quantiles of pure noise; of balanced two-level designs alone."""
    if not (design.balanced and design.two_level) or not 3 <= design.cell_count - 1 <= MOST_CONTRASTS:
        return None
    by_term = contrasts(design)
    table = pd.DataFrame({"term": list(by_term), "effect": list(by_term.values())})
    table = table.sort_values("effect", key=lambda column: column.abs(), ignore_index=True)
    places = (np.arange(len(table)) + 0.5) / len(table)
    table["quantile"] = stats.norm.ppf(0.5 + places / 2)
    variance, df = noise.of_one
    margin, simultaneous = margins(math.sqrt(4 * variance / design.n), df, len(table))
    table.attrs["margin"], table.attrs["simultaneous"] = margin, simultaneous
    return table


def cell_means(results: Results, factor_a: str, factor_b: str | None = None, measure: str = "val_loss") -> pd.DataFrame:
    """level_a, level_b, mean, low, high, n, adjusted: the mean at each level (or pair), all levels of the others weighted equally.

    By the model of `effects` where it has the term, which adjusts for what is unbalanced; plain means otherwise (`adjusted` is
    false then). Intervals are for comparisons: they leave out what seeds do to all alike. Raises UsageError.
    """
    _check(results, measure)
    design = design_of(results, measure)
    fit, noise = judged(design)
    indices = [_factor_index(design, name) for name in (factor_a, factor_b) if name is not None]
    variance, df = noise.of(TIMES.join(design.factors[index].name for index in sorted(indices)))
    rows = []
    for levels in itertools.product(*(range(len(design.factors[index].levels)) for index in indices)):
        at = list(zip(indices, levels, strict=True))
        here = np.all([design.factors[index].codes == level for index, level in at], axis=0)
        n = int(here.sum())
        weights = level_mean(fit, dict(at)) if n else None
        if weights is not None:
            mean, unit = fit.estimate(weights)
        else:
            mean, unit = (float(design.y[here].mean()), 1 / math.sqrt(n)) if n else (math.nan, math.nan)
        margin = float(stats.t.ppf((1 + CONFIDENCE) / 2, df)) * unit * math.sqrt(variance)
        values = [design.factors[index].levels[level] for index, level in at]
        second = values[1] if len(values) > 1 else None
        rows.append((values[0], second, mean, mean - margin, mean + margin, n, weights is not None))
    columns = ["level_a", "level_b", "mean", "low", "high", "n", "adjusted"]
    return pd.DataFrame(rows, columns=columns).astype({"level_a": object, "level_b": object})


def _factor_index(design: Design, name: str) -> int:
    """The factor with this name, or with this setting in it."""
    for index, factor in enumerate(design.factors):
        if name == factor.name or name in factor.settings:
            return index
    names = ", ".join(factor.name for factor in design.factors)
    raise UsageError(f"{name} is no factor of these experiments. Factors: {names or 'none'}.")
