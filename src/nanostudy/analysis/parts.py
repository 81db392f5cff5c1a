"""The parts of a study, by their mean losses over the settings that each has."""

from __future__ import annotations

import math

import numpy as np
import pandas as pd

from nanostudy.analysis.divergence import trained, unreliable
from nanostudy.analysis.frames import Results, known
from nanostudy.analysis.intervals import student

PARTS = ("part", "n", "cells", "diverged", "mean", "low", "high", "best", "best_name")


def part_means(results: Results) -> pd.DataFrame:
    """Columns PARTS of each part with finished experiments. The mean is over its settings (`cells`), which are what it is: the 95%
    interval is that of the noise between seeds alone, NaN without several seeds of a setting.

    Left out are settings that diverged with a seed; `diverged` counts their trainings that did.
    """
    ended = trained(results)
    lost = (ended["status"] == "diverged").groupby(ended["part"]).sum()
    table = results.finished.assign(cell=results.cells())
    table = table[table["part"].notna() & ~table.index.isin(unreliable(results))]
    rows = []
    for part, group in table.groupby("part", sort=False):
        mean, half = _mean(group)
        best = group["val_loss"]
        ends = (mean, mean - half, mean + half, float(best.min()), str(best.idxmin()))
        rows.append((str(part), len(group), group["cell"].nunique(), int(lost[part]), *ends))
    return pd.DataFrame(rows, columns=list(PARTS))


def _mean(group: pd.DataFrame) -> tuple[float, float]:
    """(mean over the cells, half of its interval).

    Where all cells have the same seeds, Student's t over the seeds' means, which holds whatever seeds do to several cells alike.
    Otherwise the cells' spreads are pooled.
    """
    of_cells = group.groupby("cell")["val_loss"]
    means, counts = of_cells.mean(), of_cells.size()
    seeds = pd.crosstab(group["cell"], group["seed"]) if all(known(seed) for seed in group["seed"]) else pd.DataFrame()
    if seeds.shape[1] > 1 and (seeds == 1).all(axis=None):
        of_seeds = group.groupby("seed")["val_loss"].mean()
        variance, df = float(of_seeds.var(ddof=1)) / len(of_seeds), len(of_seeds) - 1
    elif (df := len(group) - len(means)) > 0:
        within = group["val_loss"] - of_cells.transform("mean")
        variance = float((within**2).sum()) / df * float(np.mean(1 / counts)) / len(means)
    else:
        return float(means.mean()), math.nan
    return float(means.mean()), float(student(df)) * math.sqrt(variance)
