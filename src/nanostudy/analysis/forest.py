"""Random forests over any set of experiments: how much their predictions owe to each setting, and how they run along numbers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd

from nanostudy.analysis.design import Array, Design, Factor, design_of
from nanostudy.analysis.frames import Results

IMPORTANCE = ("factor", "share", "by_chance", "p", "clear")
DEPENDENCE = ("factor", "value", "loss")
FEWEST = 20  # experiments
TREES, FOLDS, REPEATS = 50, 3, 10
SHUFFLES = 19  # of the losses: a setting that beats all of them does so by chance in 1 of 20 studies
PLACES = 20  # of a curve


@dataclass(frozen=True)
class Forest:
    """Empty tables where there are fewer than FEWEST experiments or nothing varies."""

    table: pd.DataFrame  # columns IMPORTANCE; a row per factor, the most important first
    dependence: pd.DataFrame  # columns DEPENDENCE: a forest's mean prediction along each number
    predicted: float  # share of the variance of experiments that a forest has not seen; can be negative
    n: int


def forest(results: Results, measure: str = "val_loss") -> Forest:
    """Of random forests (Breiman, 2001), each judged on the experiments that it has not seen.

    `share`: half of how much the squared error grows where a factor's values are permuted, over the variance, which estimates
    the share of the variance that the factor takes part in (Sobol's total index; Gregorutti, Michel and Saint-Pierre, 2017).
    `by_chance`: the largest of any factor over SHUFFLES studies with shuffled losses; `p`: in how many of these studies, and this
    one, chance does as well.
    """
    design = design_of(results, measure)
    y, spread = design.y, float(design.y.std()) if design.n else 0.0
    if design.n < FEWEST or not design.factors or spread == 0:
        return Forest(pd.DataFrame(columns=list(IMPORTANCE)), pd.DataFrame(columns=list(DEPENDENCE)), np.nan, design.n)
    x = np.stack([_column(factor) for factor in design.factors], axis=1)
    random = np.random.default_rng(0)
    own, predicted = _permuted(x, y, random)
    chance = np.array([_permuted(x, random.permutation(y), random)[0].max() for _ in range(SHUFFLES)])
    p = [(1 + int((chance >= one).sum())) / (SHUFFLES + 1) for one in own]
    rows = [
        (factor.name, float(one), float(chance.max()), q, q <= 1 / (SHUFFLES + 1))
        for factor, one, q in zip(design.factors, own, p, strict=True)
    ]
    table = pd.DataFrame(rows, columns=list(IMPORTANCE))
    table = table.sort_values("share", ascending=False, kind="stable", ignore_index=True)
    return Forest(table, _dependence(design, x), predicted, design.n)


def _column(factor: Factor) -> Array:
    """Numbers on their scale, others by their order."""
    return factor.places if factor.degree else factor.codes.astype(float)


def _new() -> Any:
    from sklearn.ensemble import RandomForestRegressor

    return RandomForestRegressor(TREES, random_state=0)


def _permuted(x: Array, y: Array, random: np.random.Generator) -> tuple[Array, float]:
    """(each column's importance, share of the variance that is predicted), over FOLDS parts that are left out in turn."""
    folds = np.array_split(random.permutation(len(y)), FOLDS)
    factors = x.shape[1]
    worse, error = np.zeros(factors), 0.0
    for part in folds:
        rest = np.setdiff1d(np.arange(len(y)), part)
        trees = _new().fit(x[rest], y[rest])
        copies = np.tile(x[part], (1 + factors * REPEATS, 1, 1))
        for copy in range(factors * REPEATS):
            copies[1 + copy, :, copy % factors] = random.permutation(x[part, copy % factors])
        guesses = trees.predict(copies.reshape(-1, factors)).reshape(len(copies), -1)
        errors = ((guesses - y[part]) ** 2).sum(axis=1)
        error += errors[0]
        worse += errors[1:].reshape(REPEATS, factors).mean(axis=0) - errors[0]
    total = float(((y - y.mean()) ** 2).sum())
    return worse / 2 / total, 1 - float(error) / total


def _dependence(design: Design, x: Array) -> pd.DataFrame:
    """Friedman (2001): the mean prediction with one column set to a value, the others as they are."""
    from sklearn.inspection import partial_dependence

    if not design.numbers:
        return pd.DataFrame(columns=list(DEPENDENCE))
    trees, tables = _new().fit(x, design.y), []
    for place in design.numbers:
        factor = design.factors[place]
        found = partial_dependence(trees, x, [place], kind="average", grid_resolution=PLACES, percentiles=(0, 1))
        values = factor.unscaled(found["grid_values"][0])
        tables.append(pd.DataFrame({"factor": factor.name, "value": values, "loss": found["average"][0]}))
    return pd.concat(tables, ignore_index=True)
