"""Which settings have the lowest loss, and which are indistinguishable from the best."""

from __future__ import annotations

import functools
import math

import numpy as np
import pandas as pd
from scipy import optimize, special, stats

from nanostudy.analysis.design import Array, Design, design_of
from nanostudy.analysis.divergence import by_settings, unreliable
from nanostudy.analysis.frames import Results
from nanostudy.analysis.noise import CONFIDENCE, Noise, judged
from nanostudy.analysis.text_error import TextErrors, combined, text_errors
from nanostudy.text import counted

RANKING = ("name", "value", "mean", "n", "se", "low", "high", "tied", "diverged")
NODES = 60  # of the quadratures behind the critical value


def ranking(results: Results, by: str = "val_loss") -> pd.DataFrame:
    """The finished experiments, lowest first; index `place` from 1, columns RANKING.

    `value` is the experiment's own. The rest describes its settings: the `mean` over its `n` seeds, its standard error and
    95% interval, and `tied`: these settings are indistinguishable from the best by multiple comparisons with the best (Hsu,
    1984), at 95% for all together, paired by seed. Settings of which `diverged` experiments diverged have no mean and are never
    tied: the survivors' would flatter them. attrs: "basis" (a text), "cells" and "tied_cells" (counts of settings).
    """
    design = design_of(results, by)
    noise = judged(design)[1]
    errors = text_errors(results, by)
    table = _cell_table(design, noise, errors)
    cell = dict(zip(map(str, design.table.index), design.cells, strict=True))
    cell |= {name: cell[first] for name, first in design.repeats.items()}
    measured = results.finished[by].notna()
    survivors = [name for name in sorted(unreliable(results)) if measured[name]]
    names = [*cell, *survivors]
    rows = pd.DataFrame({"name": names, "value": results.experiments.loc[names, by].to_numpy(dtype=float)})
    rows["id"] = results.experiments.loc[names, "id"].to_numpy()
    rows = rows.join(pd.concat([table.take(list(cell.values())), _survivors(results, survivors)], ignore_index=True))
    rows = rows.sort_values(["value", "id"], kind="stable")[list(RANKING)]
    rows.index = pd.RangeIndex(1, len(rows) + 1, name="place")
    rows.attrs["basis"] = _basis(design, noise, errors)
    rows.attrs["cells"], rows.attrs["tied_cells"] = len(table), int(table["tied"].sum())
    return rows


def _cell_table(design: Design, noise: Noise, errors: TextErrors) -> pd.DataFrame:
    """mean, n, se, low, high, tied of each cell. Where cells lack blocks, the means are adjusted for the blocks' differences."""
    columns = RANKING[2:-1]
    if not design.n:
        kinds = {"n": int, "tied": bool}
        return pd.DataFrame({name: pd.Series(dtype=kinds.get(name, float)) for name in columns}).assign(diverged=0)
    means = _adjusted_means(design)
    counts = np.bincount(design.cells)
    variance, df = noise.of_one
    names, of_cells = (
        list(map(str, design.table.index)),
        (design.cells == np.arange(len(means))[:, None]) / counts[:, None],
    )
    best = int(np.argmin(means))
    whole, dfs = combined(variance / counts, df, errors.of_contrasts(names, of_cells))
    se = np.sqrt(whole)
    margin = stats.t.ppf((1 + CONFIDENCE) / 2, dfs) * se
    more = variance / counts + variance / counts[best], df, errors.of_contrasts(names, of_cells - of_cells[best])
    tied = (
        np.full(len(means), True)
        if len(means) == 1 or math.isnan(variance)
        else _possibly_best(means, *combined(*more))
    )
    values = (means, counts, se, means - margin, means + margin, tied)
    return pd.DataFrame(dict(zip(columns, values, strict=True))).assign(diverged=0)


def _survivors(results: Results, names: list[str]) -> pd.DataFrame:
    """Rows without a mean, of experiments whose settings diverged with other seeds."""
    rates = by_settings(results).loc[names]
    finished = rates["n"] - rates["diverged"]
    rows = pd.DataFrame({"n": finished, "tied": False, "diverged": rates["diverged"]})
    return rows.assign(**dict.fromkeys(("mean", "se", "low", "high"), math.nan))


def _possibly_best(means: Array, variances: Array, dfs: Array) -> Array:
    """A cell is out where the lowest is lower by more than the critical difference (Hsu, 1996, Multiple comparisons, section 4.1).

    `variances` and `dfs` are of the differences from the lowest.
    """
    inverse = np.linspace(1 / dfs.max(), 1 / dfs.min(), 6)  # critical values between are very nearly linear in 1 / df
    critical = [critical_value(len(means), 1 / one if one else math.inf) for one in inverse.tolist()]
    return np.asarray(means - means.min() <= np.interp(1 / dfs, inverse, critical) * np.sqrt(variances))


def _adjusted_means(design: Design) -> Array:
    """Each cell's mean with the blocks' effects taken out (least squares, cells and blocks additive)."""
    means = _mean_by(design.y, design.cells)
    if design.blocks is None:
        return means
    of_blocks = np.zeros(int(design.blocks.max()) + 1)
    for _ in range(100):  # alternating projections; one round where every cell has every block
        rest = design.y - _mean_by(design.y - of_blocks[design.blocks], design.cells)[design.cells]
        now = _mean_by(rest, design.blocks)
        now -= now.mean()
        if np.abs(now - of_blocks).max() < 1e-12 * max(1.0, np.abs(design.y).max()):
            break
        of_blocks = now
    return _mean_by(design.y - of_blocks[design.blocks], design.cells)


def _mean_by(values: Array, groups: Array) -> Array:
    return np.bincount(groups, weights=values) / np.bincount(groups)


def _basis(design: Design, noise: Noise, errors: TextErrors) -> str:
    if design.n < 2:
        return noise.explanation
    if noise.method == "none":
        return f"{noise.explanation} So all settings count as indistinguishable. {errors.explanation}"
    means = "Each experiment stands for its settings" if design.cell_count == design.n else "Seeds are averaged"
    return (
        f"{means}; the standard deviation of one experiment is {math.sqrt(noise.of_one[0]):.4f}. {noise.explanation} "
        "Settings are tied with the best where multiple comparisons with the best (Hsu) find them indistinguishable from "
        f"it, at 95% for all {counted(design.cell_count, 'cell')} together. {errors.explanation}"
    )


@functools.cache
def critical_value(cells: int, df: float) -> float:
    """Dunnett's one-sided critical value for comparing cells - 1 others with one, equal numbers in each, at 95%.

    The t for which P(max (Z_i - Z_0) / (sqrt(2) S) <= t) = 0.95, S being chi over the root of its degrees of freedom (Dunnett, 1955).
    """
    z, z_weights = special.roots_hermitenorm(NODES)
    z_weights = z_weights / z_weights.sum()
    u, u_weights = special.roots_legendre(NODES)
    s = np.sqrt(stats.chi2.ppf((u + 1) / 2, df) / df) if math.isfinite(df) else np.ones(NODES)
    u_weights = u_weights / u_weights.sum()

    def covered(t: float) -> float:
        inner = special.ndtr(z[None, :] + math.sqrt(2) * t * s[:, None]) ** (cells - 1)
        return float(u_weights @ (inner @ z_weights)) - CONFIDENCE

    return float(optimize.brentq(covered, 0.0, 1e4))
