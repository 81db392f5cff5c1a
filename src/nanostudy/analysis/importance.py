"""Which setting matters most, and what changing one does at the best settings: statements that hold for all that was searched."""

from __future__ import annotations

import itertools
import math
from typing import Any

import numpy as np
import pandas as pd

from nanostudy.analysis.fit import Fit, cell_weights, level_effect
from nanostudy.analysis.noise import estimates

IMPORTANCE = ("factor", "reference", "level", "levels", "effect", "low", "high", "clear", "rival")
AT_BEST = ("factor", "best", "level", "effect", "low", "high", "average")


def importance(fit: Fit) -> pd.DataFrame:
    """A row per factor, columns IMPORTANCE: its largest difference between two levels, clear ones first, then by size.

    Intervals hold at 95% for all pairs of levels of all factors at once. A factor with a clear pair is shown by the largest of
    those. `rival`: whether the factor's largest difference may be as large as the first one's. None is where the first exceeds
    every other in a two-sided test at 95%, corrected for the first one's own pairs of levels alone: the selection of the winner
    needs no more (Hung and Fithian, 2019, Rank verification for exponential families). Otherwise those that it does not exceed
    at 95% for all of them.
    """
    searched = _pairs(fit)
    if not searched:
        return pd.DataFrame(columns=list(IMPORTANCE)).astype({"clear": bool, "rival": bool})
    weights = np.stack([level_effect(fit, (index,), (level,), (other,)) for index, other, level in searched])
    found = estimates(fit, weights)
    low, high = found.interval(len(searched))
    clear = (low > 0) | (high < 0)  # false where the interval is not known
    order = np.lexsort([-np.abs(found.effect), ~clear]).tolist()
    chosen = list({searched[i][0]: i for i in reversed(order)}.values())
    chosen.sort(key=order.index)
    first = chosen[0]
    own = sum(index == searched[first][0] for index, *_ in searched)
    signed = weights[first] * np.sign(found.effect[first])
    exceeded = []  # of each other factor whether all its differences are smaller, corrected for own pairs, and for all
    for i in chosen[1:]:
        others = weights[[index == searched[i][0] for index, *_ in searched]]
        more = estimates(fit, np.concatenate([signed - others, signed + others]))
        exceeded.append([bool((more.effect > more.margin(own * count)).all()) for count in (1, len(chosen) - 1)])
    verified = all(alone for alone, _ in exceeded)
    rows = []
    for place, i in enumerate(chosen):
        index, other, level = searched[i]
        factor = fit.design.factors[index]
        numbers = (float(found.effect[i]), float(low[i]), float(high[i]))
        rival = place > 0 and not verified and not exceeded[place - 1][1]
        at = (factor.levels[other], factor.levels[level], len(factor.levels))
        rows.append((factor.name, *at, *numbers, bool(clear[i]), rival))
    table = pd.DataFrame(rows, columns=list(IMPORTANCE))
    return table.astype({"reference": object, "level": object, "clear": bool, "rival": bool})


def _pairs(fit: Fit) -> list[tuple[int, int, int]]:
    """(factor, lower level, higher level): every difference of a main effect that the experiments determine."""
    return [
        (index, a, b)
        for (index,) in (term.factors for term in fit.mains)
        for a, b in itertools.combinations(range(len(fit.design.factors[index].levels)), 2)
        if fit.estimable(level_effect(fit, (index,), (b,), (a,)))
    ]


def at_best(fit: Fit) -> pd.DataFrame:
    """What changing one setting does at the best settings, where that is not what it does on average; columns AT_BEST.

    A row per factor at most, of cell means alone. Because the best settings were chosen by the same losses, intervals and the
    comparison with the average hold at 95% for all pairs of cells that differ in one factor.
    """
    design, rows = fit.design, list[tuple[Any, ...]]()
    if not fit.of_cells or len(design.factors) < 2:
        return pd.DataFrame(columns=list(AT_BEST))
    shape, means = tuple(len(factor.levels) for factor in design.factors), cell_weights(fit)
    lowest = int(np.argmin(means @ fit.params))
    best = [int(level) for level in np.unravel_index(lowest, shape)]
    searched = len(means) * sum(count - 1 for count in shape) // 2
    for index, factor in enumerate(design.factors):
        others = [level for level in range(shape[index]) if level != best[index]]
        there = [np.ravel_multi_index((*best[:index], level, *best[index + 1 :]), shape) for level in others]
        here = means[there] - means[lowest]
        average = np.stack([level_effect(fit, (index,), (level,), (best[index],)) for level in others])
        change, usual, differs = (estimates(fit, weights) for weights in (here, average, here - average))
        excess = np.abs(differs.effect) - differs.margin(searched)
        if not (excess > 0).any():
            continue
        i = int(np.argmax(np.where(excess > 0, np.abs(differs.effect), -math.inf)))
        numbers = (float(each[i]) for each in (change.effect, *change.interval(searched), usual.effect))
        rows.append((factor.name, factor.levels[best[index]], factor.levels[others[i]], *numbers))
    return pd.DataFrame(rows, columns=list(AT_BEST)).astype({"best": object, "level": object})
