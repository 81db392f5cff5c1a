"""Which settings have the lowest loss, and which are indistinguishable from the best."""

from __future__ import annotations

import functools
import math

import numpy as np
import pandas as pd
from scipy import optimize, special, stats

from nanostudy.analysis.design import Array, Design, design_of, group_means
from nanostudy.analysis.divergence import by_settings, unreliable
from nanostudy.analysis.fit import Fit, cell_weights
from nanostudy.analysis.frames import Results
from nanostudy.analysis.intervals import CONFIDENCE
from nanostudy.analysis.noise import Noise, estimates, judged
from nanostudy.analysis.text_error import COSINES, margin
from nanostudy.text import counted

RANKING = ("name", "value", "mean", "n", "se", "low", "high", "tied", "diverged")
NODES = 60  # of the quadratures behind the critical value


def ranking(results: Results, by: str = "val_loss") -> pd.DataFrame:
    """The finished experiments, lowest first; index `place` from 1, columns RANKING.

    `value` is the experiment's own. The rest describes its settings: the `mean` over its `n` seeds, its standard error and
    95% interval, and `tied`: these settings are indistinguishable from the best by multiple comparisons with the best (Hsu,
    1984, Bonferroni where cells have replicates, else Dunnett), at 95% for all together, paired by seed. Settings of which `diverged` experiments diverged have no mean and are never
    tied: the survivors' would flatter them. attrs: "basis" (a text), "cells" and "tied_cells" (counts of settings).
    """
    design = design_of(results, by).of_levels()
    fit, noise = judged(design)
    table = _cell_table(fit, noise)
    cell = dict(zip(design.names, design.cells, strict=True))
    cell |= {name: cell[first] for name, first in design.repeats.items()}
    survivors = sorted(unreliable(results).intersection(map(str, results.finished[by].dropna().index)))
    names = [*cell, *survivors]
    rows = pd.DataFrame({"name": names, "value": results.experiments.loc[names, by].to_numpy(dtype=float)})
    rows["id"] = results.experiments.loc[names, "id"].to_numpy()
    rows = rows.join(pd.concat([table.take(list(cell.values())), _survivors(results, survivors)], ignore_index=True))
    rows = rows.sort_values(["value", "id"], kind="stable")[list(RANKING)]
    rows.index = pd.RangeIndex(1, len(rows) + 1, name="place")
    rows.attrs["basis"] = _basis(fit, noise)
    rows.attrs["cells"], rows.attrs["tied_cells"] = len(table), int(table["tied"].sum())
    return rows


def _cell_table(fit: Fit, noise: Noise) -> pd.DataFrame:
    """mean, n, se, low, high, tied of each cell. Where cells lack blocks, the means are adjusted for the blocks' differences."""
    columns, design = RANKING[2:-1], fit.design
    if not design.n:
        kinds = {"n": int, "tied": bool}
        return pd.DataFrame({name: pd.Series(dtype=kinds.get(name, float)) for name in columns}).assign(diverged=0)
    means, counts = _adjusted_means(design), np.bincount(design.cells)
    best = int(np.argmin(means))
    of_cells = (design.cells == np.arange(len(means))[:, None]) / counts[:, None]
    if fit.of_cells:
        weights = cell_weights(fit)
        shared = weights.mean(axis=0) if len(means) > 1 else 0  # what a seed does to all settings alike
        own, more = (estimates(fit, weights - other) for other in (shared, weights[best]))
        of_seeds, of_differences = (own.se**2, own.df), (more.se**2, more.df)
    else:
        dfs = np.full(len(means), noise.df)
        alone, paired = noise.sd**2 / counts, noise.sd**2 * (1 / counts + 1 / counts[best])
        if _confounded(fit):
            seeds = [set(design.clusters[design.cells == cell]) for cell in range(len(means))]
            alone[:], paired[[seeds[best].isdisjoint(those) for those in seeds]] = math.nan, math.nan
        of_seeds, of_differences = (alone, dfs), (paired, dfs)
    texts, apart = (design.text.of_contrasts(design.names, each) for each in (of_cells, of_cells - of_cells[best]))
    se, half = np.sqrt(of_seeds[0] + texts.sum(axis=-1)), margin(*of_seeds, texts)
    # as in `margin`: the root of the sum of squares, of what seeds and what the text allow
    variances = (of_differences, (apart.sum(axis=-1), np.full(len(means), float(COSINES))))
    allowed = [_critical(len(means), dfs, fit.of_cells) ** 2 * variance for variance, dfs in variances]
    tied = ~(means - means.min() > np.sqrt(sum(allowed)))  # where nothing is known, too
    values = (means, counts, se, means - half, means + half, tied)
    return pd.DataFrame(dict(zip(columns, values, strict=True))).assign(diverged=0)


def _confounded(fit: Fit) -> bool:
    """Whether settings of other seeds cannot be compared, since no residual shows what the seeds do."""
    return not fit.of_cells and fit.design.blocks is None and not fit.shows_seeds


def _survivors(results: Results, names: list[str]) -> pd.DataFrame:
    """Rows without a mean, of experiments whose settings diverged with other seeds."""
    rates = by_settings(results).loc[names]
    finished = rates["n"] - rates["diverged"]
    rows = pd.DataFrame({"n": finished, "tied": False, "diverged": rates["diverged"]})
    return rows.assign(**dict.fromkeys(("mean", "se", "low", "high"), math.nan))


def _critical(cells: int, dfs: Array, of_cells: bool) -> Array:
    """Of comparisons with the lowest mean (Hsu, 1996, Multiple comparisons, section 4.1), one for each degree of freedom.

    Cells with replicates give each difference a standard error of its own: Bonferroni's t. One noise for all: Dunnett's value.
    """
    if cells < 2 or np.isnan(dfs).all():
        return np.full(len(dfs), np.nan)
    if of_cells:
        return np.asarray(stats.t.ppf(1 - (1 - CONFIDENCE) / (cells - 1), dfs))
    inverse = np.linspace(1 / np.nanmax(dfs), 1 / np.nanmin(dfs), 6)  # values between are very nearly linear in 1 / df
    critical = [critical_value(cells, 1 / one if one else math.inf) for one in inverse.tolist()]
    return np.asarray(np.interp(1 / dfs, inverse, critical))


def _adjusted_means(design: Design) -> Array:
    """Each cell's mean with the blocks' effects taken out (least squares, cells and blocks additive)."""
    y, cells, blocks = design.y, design.cells, design.blocks
    if blocks is None:
        return group_means(y, cells)
    of_blocks = np.zeros(int(blocks.max()) + 1)
    for _ in range(100):  # alternating projections; one round where every cell has every block
        now = group_means(y - group_means(y - of_blocks[blocks], cells)[cells], blocks)
        now -= now.mean()
        if np.abs(now - of_blocks).max() < 1e-12 * max(1.0, np.abs(y).max()):
            break
        of_blocks = now
    return group_means(y - of_blocks[blocks], cells)


def _basis(fit: Fit, noise: Noise) -> str:
    if fit.design.n < 2:
        return noise.explanation
    if math.isnan(noise.sd):
        return f"{noise.explanation} So all settings count as indistinguishable. {fit.design.text.explanation}"
    if fit.design.cell_count == 1:
        spread = f"The standard deviation over seeds is about {noise.sd:.4f}."
        return f"{spread} {noise.explanation} {fit.design.text.explanation}"
    means = "Each experiment stands for its settings" if fit.design.cell_count == fit.design.n else "Seeds are averaged"
    judged_by = "each difference by its own standard error" if fit.of_cells else "taking the noise to be equal"
    if _confounded(fit):
        judged_by += ", and those of other seeds cannot be compared with it"
    return (
        f"{means}; the standard deviation of one experiment is about {noise.sd:.4f}. {noise.explanation} "
        "Settings are tied with the best where multiple comparisons with the best (Hsu) find them indistinguishable from "
        f"it, {judged_by}, at 95% for all {counted(fit.design.cell_count, 'cell')} together. Intervals leave out what a seed does "
        f"to all settings alike. {fit.design.text.explanation}"
    )


def tied_settings(results: Results) -> set[str]:
    """The settings, in words, that are indistinguishable from the best by validation loss."""
    rows = ranking(results)
    return set(results.cells()[rows["name"][rows["tied"]]])


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
