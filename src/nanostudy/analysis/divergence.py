"""Which settings diverge, and how often: a mean over the seeds that survived says nothing about the settings."""

from __future__ import annotations

import numpy as np
import pandas as pd
from scipy import stats

from nanostudy.analysis.frames import Results, known
from nanostudy.analysis.intervals import CONFIDENCE


def trained(results: Results) -> pd.DataFrame:
    """The experiments that were trained as far as they go: finished, or diverged."""
    return results.experiments[results.experiments["status"].isin(["finished", "diverged"])]


def by_settings(results: Results) -> pd.DataFrame:
    """cell, diverged, n (trainings with the same settings, whatever the seed) of each experiment that was trained; index `name`."""
    table = trained(results)
    cells = results.cells()[table.index]
    lost = (table["status"] == "diverged").groupby(cells)
    return pd.DataFrame({"cell": cells, "diverged": lost.transform("sum").astype(int), "n": lost.transform("size")})


def unreliable(results: Results) -> frozenset[str]:
    """The finished experiments whose settings diverged with another seed."""
    rates = by_settings(results)
    finished = results.experiments.loc[rates.index, "status"] == "finished"
    return frozenset(map(str, rates.index[finished & (rates["diverged"] > 0)]))


def divergence(results: Results) -> pd.DataFrame:
    """factor, value, diverged, n, others_diverged, others_n, p, clear: a row per value of every setting that varies.

    p is Fisher's exact test of this value against the others of its setting; `clear` is at 95% for all rows together (Bonferroni).
    """
    table, rows = trained(results), []
    lost = table["status"] == "diverged"
    for factor in results.factors if lost.any() else ():
        values = [value for value in dict.fromkeys(table[factor]) if known(value)]
        for value in values if len(values) > 1 else ():
            here = table[factor] == value
            counts = [int(lost[here].sum()), int(here.sum()), int(lost[~here].sum()), int((~here).sum())]
            square = np.array([[counts[0], counts[1] - counts[0]], [counts[2], counts[3] - counts[2]]])
            rows.append((factor, value, *counts, float(stats.fisher_exact(square).pvalue)))
    frame = pd.DataFrame(rows, columns=["factor", "value", "diverged", "n", "others_diverged", "others_n", "p"])
    return frame.assign(clear=frame["p"] * len(frame) < 1 - CONFIDENCE)
