"""Which settings matter: main effects, two-way interactions, their intervals and their shares of the variance."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pandas as pd
from scipy import stats

from nanostudy.analysis.design import TIMES, Array, Design, design_of
from nanostudy.analysis.fit import Fit, Term, level_effect, level_mean
from nanostudy.analysis.frames import AT_CONTEXT, Results
from nanostudy.analysis.importance import at_best, importance
from nanostudy.analysis.noise import estimates, judged
from nanostudy.errors import UsageError
from nanostudy.text import value_text

MOST_CONTRASTS = 2047  # in a half-normal plot


@dataclass(frozen=True)
class Effects:
    """In the measure's unit (losses: nats per token). Intervals in `table` are 95%, each on its own."""

    table: pd.DataFrame  # columns of `_table`; a row per level, against the first one, and per pair of such levels
    importance: pd.DataFrame  # of each factor its largest difference; intervals hold for all at once
    at_best: pd.DataFrame  # what changing one setting does at the best settings, where that is not its average effect
    explanation: str  # where the intervals come from, and what they assume
    missing: tuple[str, ...]  # sentences: what was left out, and which effects cannot be separated
    aliases: Mapping[str, tuple[str, ...]]  # of a term: interactions that these experiments cannot separate from it
    half_normal: pd.DataFrame | None  # term, effect, quantile
    balanced: bool
    n: int
    seeds: int
    shares: Mapping[str, float]  # of the variance: the terms, the blocks, and "unexplained"
    noise: float  # standard deviation of one experiment within its block; NaN without an estimate
    measure: str = "val_loss"

    def _repr_html_(self) -> str:
        return str(self.table.to_html(index=False, float_format="{:.4f}".format))


def effects(results: Results, measure: str = "val_loss") -> Effects:
    """The effects on `measure` (a float column of Results.experiments) over the finished experiments. Raises UsageError."""
    _check(results, measure)
    design = design_of(results, measure)
    fit, noise = judged(design)
    shares = fit.shares()
    explained = sum(shares.values())
    return Effects(
        _table(fit, shares),
        importance(fit),
        at_best(fit),
        f"{noise.explanation} {design.text.explanation}",
        (*design.missing, *_not_estimated(fit), *_windows(results, design)),
        fit.aliases,
        _half_normal(design),
        design.balanced,
        design.n,
        design.seed_count,
        {**shares, "unexplained": max(0.0, 1 - explained)} if explained else shares,
        noise.sd,
        measure,
    )


def _check(results: Results, measure: str) -> None:
    table = results.experiments
    if measure not in table or not pd.api.types.is_float_dtype(table[measure]):
        numbers = [str(name) for name in table if pd.api.types.is_float_dtype(table[name])]
        raise UsageError(f"There is no measure {measure!r}. Measures: {', '.join(numbers)}.")


def _table(fit: Fit, shares: Mapping[str, float]) -> pd.DataFrame:
    """term, order, factor_a, factor_b, level, reference, effect, se, df, low, high, p, share, clear, together_low, together_high,
    together: the last three are of intervals that hold for all pairs of levels of all factors, or for all interactions.
    """
    rows, weights = list[tuple[Any, ...]](), list[Array]()
    for term in (*fit.mains, *(term for term in fit.terms if len(term.factors) == 2)):
        factors = [fit.design.factors[index] for index in term.factors]
        names = (term.name, len(factors), factors[0].name, factors[1].name if len(factors) > 1 else None)
        for levels in itertools.product(*(range(1, len(factor.levels)) for factor in factors)):
            reference = _reference(fit, term, levels)
            if reference is None:
                continue
            at = [value_text(factor.levels[level]) for factor, level in zip(factors, levels, strict=True)]
            against = [value_text(factor.levels[0]) for factor in factors]
            one = (factors[0].levels[levels[0]], factors[0].levels[reference])
            rows.append((*names, *(one if len(factors) == 1 else (TIMES.join(at), TIMES.join(against)))))
            weights.append(level_effect(fit, term.factors, levels, (reference,) * len(levels)))
    found = estimates(fit, np.reshape(weights, (len(rows), fit.columns.shape[1])))
    found = replace(
        found,
        effect=np.where(np.abs(found.effect) <= fit.negligible, 0.0, found.effect),
        se=np.maximum(found.se, fit.negligible),
    )
    columns = ["term", "order", "factor_a", "factor_b", "level", "reference"]
    table = pd.DataFrame(rows, columns=columns).astype({"level": object, "reference": object})
    mains = (table["order"] == 1).to_numpy()
    pairs_of_levels = sum(math.comb(len(factor.levels), 2) for factor in fit.design.factors if not factor.degree)
    margin = found.margin()
    wide = np.where(mains, found.margin(pairs_of_levels), found.margin(int((~mains).sum())))
    return table.assign(
        effect=found.effect,
        se=found.whole_se,
        df=found.df,
        low=found.effect - margin,
        high=found.effect + margin,
        p=found.p,
        share=np.array([shares[term] for term in table["term"]], dtype=float),
        clear=np.abs(found.effect) > margin,
        together_low=found.effect - wide,
        together_high=found.effect + wide,
        together=np.abs(found.effect) > wide,
    )


def _reference(fit: Fit, term: Term, levels: tuple[int, ...]) -> int | None:
    """The lowest level that the experiments compare with this one, other settings alike; in a whole study, the first."""
    if len(levels) > 1:
        return 0
    others = range(levels[0])
    return next((one for one in others if fit.estimable(level_effect(fit, term.factors, levels, (one,)))), None)


def _not_estimated(fit: Fit) -> list[str]:
    sentences = []
    bound = [
        f"{term.name}={value_text(value)}"
        for term in fit.mains
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
    """A sentence where contexts differ: the length of a window changes the loss by itself."""
    if design.measure not in ("val_loss", "train_loss") or not any("block_size" in f.settings for f in design.factors):
        return []
    common = [c for c in results.contexts if design.table[f"{AT_CONTEXT}{c}"].notna().all()]
    where = f" At equal context that is taken out: see {AT_CONTEXT}{max(common)}." if common else ""
    why = "Each loss is measured in windows of the experiment's own block_size, and their length alone changes it."
    return [f"{why}{where}"]


def _half_normal(design: Design) -> pd.DataFrame | None:
    """The contrasts of all orders by size, against the quantiles of pure noise; of balanced two-level designs alone."""
    if not (design.balanced and design.two_level) or not 3 <= design.cell_count - 1 <= MOST_CONTRASTS:
        return None
    columns: dict[tuple[str, ...], Array] = {(): np.ones(design.n)}
    for factor in design.factors:
        columns |= {(*names, factor.name): column * factor.coded[:, 0] for names, column in columns.items()}
    del columns[()]
    effects = [float(column @ design.y) / (design.n / 2) for column in columns.values()]
    table = pd.DataFrame({"term": list(map(TIMES.join, columns)), "effect": effects})
    table = table.sort_values("effect", key=lambda column: column.abs(), ignore_index=True)
    table["quantile"] = stats.norm.ppf(0.5 + (np.arange(len(table)) + 0.5) / len(table) / 2)
    return table


def cell_means(results: Results, factor_a: str, factor_b: str | None = None, measure: str = "val_loss") -> pd.DataFrame:
    """level_a, level_b, mean, low, high, n, adjusted: the mean at each level (or pair), all levels of the others weighted equally.

    By the model of `effects` where it has the term, which adjusts for what is unbalanced; plain means otherwise (`adjusted` is
    false then, and there is no interval). Intervals are of a mean's distance from the mean of all: they leave out what seeds do
    to all alike. Raises UsageError.
    """
    _check(results, measure)
    design = design_of(results, measure)
    fit = judged(design)[0]
    indices = [_factor_index(design, name) for name in (factor_a, factor_b) if name is not None]
    overall = level_mean(fit, {})
    rows = []
    for levels in itertools.product(*(range(len(design.factors[index].levels)) for index in indices)):
        at = list(zip(indices, levels, strict=True))
        here = np.all([design.factors[index].codes == level for index, level in at], axis=0)
        n, margin = int(here.sum()), math.nan
        weights = level_mean(fit, dict(at)) if n else None
        if weights is not None and overall is not None:
            mean = float(weights @ fit.inverse @ design.y)
            margin = float(estimates(fit, (weights - overall)[None, :]).margin()[0])
        else:
            mean = float(design.y[here].mean()) if n else math.nan
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
