"""Who is best, how sure that is, and at what cost."""

from __future__ import annotations

import functools
import math
from typing import Any, Literal

import numpy as np
import pandas as pd
from scipy import optimize, special, stats

from nanostudy.analysis import curves as curve
from nanostudy.analysis.design import Array, Design, design_of
from nanostudy.analysis.frames import Results
from nanostudy.analysis.noise import CONFIDENCE, Noise, judged
from nanostudy.text import counted

Cost = Literal["parameters", "flops", "seconds"]

COLUMNS = ("name", "value", "mean", "n", "se", "low", "high", "tied")
NODES = 60  # of the quadratures behind the critical value
SAMPLING = "The sampling error of a finite validation text is not in it: every model is scored on the same text."


def ranking(results: Results, by: str = "val_loss") -> pd.DataFrame:
    """The finished experiments, lowest first; index `place` from 1. Columns name, value, mean, n, se, low, high, tied.

    `value` is the experiment's own. The rest is of its settings: the `mean` over its `n` seeds, its standard error and 95%
    interval, and whether these settings cannot be told from the best ones: multiple comparisons with the best (Hsu,
    1984), at 95% for all together, paired by seed. attrs: "basis" (a text), "cells" and "tied_cells" (counts of settings).
    """
    design = design_of(results, by)
    noise = judged(design)[1]
    table = _judged_cells(design, noise)
    cell = dict(zip(map(str, design.table.index), design.cells, strict=True))
    cell |= {name: cell[first] for name, first in design.repeats.items()}
    names = list(cell)
    rows = pd.DataFrame({"name": names, "value": results.experiments.loc[names, by].to_numpy(dtype=float)})
    rows["id"] = results.experiments.loc[names, "id"].to_numpy()
    rows = rows.join(table.take([cell[name] for name in names]).reset_index(drop=True))
    rows = rows.sort_values(["value", "id"], kind="stable")[list(COLUMNS)]
    rows.index = pd.RangeIndex(1, len(rows) + 1, name="place")
    rows.attrs["basis"] = _basis(design, noise)
    rows.attrs["cells"], rows.attrs["tied_cells"] = len(table), int(table["tied"].sum())
    return rows


def top_indistinguishable(results: Results, by: str = "val_loss") -> int:
    """How many experiments have settings that cannot be told from the best; all of them where there is no noise estimate."""
    return int(ranking(results, by)["tied"].sum())


def _judged_cells(design: Design, noise: Noise) -> pd.DataFrame:
    """mean, n, se, low, high, tied of each cell. Blocks that not all cells have are made up for by the others' differences."""
    columns = ["mean", "n", "se", "low", "high", "tied"]
    if not design.n:
        return pd.DataFrame({name: pd.Series(dtype=bool if name == "tied" else float) for name in columns})
    means = _adjusted_means(design)
    counts = np.bincount(design.cells)
    variance, df = noise.of_one
    sd = math.sqrt(variance)
    se = sd / np.sqrt(counts)
    margin = float(stats.t.ppf((1 + CONFIDENCE) / 2, df)) * se
    if len(means) == 1 or math.isnan(sd):
        tied = np.full(len(means), True)
    else:
        tied = _possibly_best(means, se, critical_value(len(means), df))
    return pd.DataFrame(dict(zip(columns, (means, counts, se, means - margin, means + margin, tied), strict=True)))


def _possibly_best(means: Array, se: Array, critical: float) -> Array:
    """A cell is out where some other one is lower by more than the critical difference (Hsu, 1996, Multiple comparisons, section 4.1)."""
    allowance = critical * np.sqrt(se[:, None] ** 2 + se[None, :] ** 2)
    return ~(means[:, None] - means[None, :] > allowance).any(axis=1)


def _adjusted_means(design: Design) -> Array:
    """Of each cell, less what its blocks have more or less than the others (by least squares, cells and blocks adding up)."""
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


def _basis(design: Design, noise: Noise) -> str:
    if design.n < 2:
        return noise.explanation
    if noise.method == "none":
        return f"{noise.explanation} So nothing can be told apart. {SAMPLING}"
    means = "Each experiment stands for its settings" if design.cell_count == design.n else "Seeds are averaged"
    return (
        f"{means}; the standard deviation of one experiment is {math.sqrt(noise.of_one[0]):.4f}. {noise.explanation} Tied with the "
        f"best are settings that multiple comparisons with the best (Hsu) do not tell from them, at 95% for all "
        f"{counted(design.cell_count, 'cell')} together. {SAMPLING}"
    )


@functools.cache
def critical_value(cells: int, df: float) -> float:
    """Dunnett's one-sided critical value for the comparison of cells - 1 others with one, equal numbers in each, at 95%.

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


# --- costs


def pareto(results: Results, cost: Cost = "parameters") -> pd.DataFrame:
    """name, cost, val_loss, on_front: no other finished experiment is as cheap and as good, and better in one of the two.

    By cost, then loss. attrs["explanation"] says what `seconds` compares.
    """
    table = results.finished
    table = table[np.isfinite(table[cost].to_numpy(dtype=float))]
    rows = pd.DataFrame(
        {"name": list(table.index), "cost": table[cost].to_numpy(), "val_loss": table["val_loss"].to_numpy()}
    )
    rows = rows.sort_values(["cost", "val_loss"], kind="stable", ignore_index=True)
    better = rows["val_loss"] < rows["val_loss"].cummin().shift(fill_value=math.inf)
    rows["on_front"] = better.groupby([rows["cost"], rows["val_loss"]]).transform("any").astype(bool)  # twins, too
    rows.attrs["explanation"] = apart_in_time(table) if cost == "seconds" else ""
    return rows


def apart_in_time(table: pd.DataFrame) -> str:
    """Why times cannot be compared; empty where they can."""
    differing = [
        name
        for name in ("device", "device_name", "precision", "threads", "members")
        if table[name].nunique(dropna=False) > 1
    ]
    if not differing:
        return ""
    values = "; ".join(f"{name} {', '.join(sorted({str(v) for v in table[name]}))}" for name in differing)
    return f"Times are not like for like: the experiments differ in {values}. Members of a stack share their seconds."


# --- curves


def overfitting(results: Results) -> pd.DataFrame:
    """name, best_step, last_step, best_val_loss, val_loss, rise, overfits; `rise` is from the best evaluation to the last.

    `overfits` as in curve.overfitting: a rise of more than 1% while the training loss falls. Those without curves have what their
    last and best losses tell, and NA there. Experiments that were never evaluated are left out.
    """
    curves = _rows_by_name(results.evaluations)
    rows: list[tuple[object, ...]] = []
    for name, one in results.experiments.iterrows():
        points = curve.finite(curves.get(str(name), []), "train_loss", "val_loss")
        if points:
            best, last = curve.best(points), points[-1]
            found = (best["step"], last["step"], best["val_loss"], last["val_loss"])
            rows.append((name, *found, found[3] - found[2], curve.overfitting(points) is not None))
        elif math.isfinite(one["val_loss"]):
            found = (one["best_step"], one["updates"], one["best_val_loss"], one["val_loss"])
            rows.append((name, *found, found[3] - found[2], pd.NA))
    columns = ["name", "best_step", "last_step", "best_val_loss", "val_loss", "rise", "overfits"]
    return pd.DataFrame(rows, columns=columns).astype({"overfits": "boolean"})


def stability(results: Results) -> pd.DataFrame:
    """name, median_norm, largest_norm, spikes, diverged: gradient norms before clipping, as curve.gradient_norms counts them.

    NaN and NA where no norm was logged.
    """
    logs = _rows_by_name(results.training)
    rows = []
    for name, status in results.experiments["status"].items():
        if status == "waiting":
            continue
        norms = curve.gradient_norms(logs.get(str(name), []))
        found = (norms.median, norms.largest, len(norms.spikes)) if norms else (math.nan, math.nan, pd.NA)
        rows.append((name, *found, status == "diverged"))
    columns = ["name", "median_norm", "largest_norm", "spikes", "diverged"]
    return pd.DataFrame(rows, columns=columns).astype({"spikes": "Int64", "diverged": bool})


def convergence(results: Results) -> pd.DataFrame:
    """name, plateau (the step where it begins, or NA), reason: by curve.plateau, of the experiments that have curves."""
    rows = []
    for name, found in _rows_by_name(results.evaluations).items():
        points = curve.finite(found, "val_loss")
        flat = curve.plateau(points) if len(points) > 1 else None
        if len(points) < 2:
            why = "one evaluation is no curve"
        elif curve.improvement(points) <= 0:
            why = "the validation loss never fell"
        elif flat is None:
            why = "the loss was still falling"
        else:
            why = "at most 1% of the fall was left"
        rows.append((name, pd.NA if flat is None else flat, why))
    return pd.DataFrame(rows, columns=["name", "plateau", "reason"]).astype({"plateau": "Int64"})


def _rows_by_name(table: pd.DataFrame) -> dict[str, list[Any]]:
    columns = [str(column) for column in table if column != "name"]
    found: dict[str, list[Any]] = {}
    for name, *values in table[["name", *columns]].itertuples(index=False, name=None):
        found.setdefault(str(name), []).append(dict(zip(columns, values, strict=True)))
    return found
