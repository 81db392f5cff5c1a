"""How the loss falls with parameters or tokens: a power law where the points support one, or the reason why they do not."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import pandas as pd
from scipy import optimize, stats

from nanostudy.analysis.design import Array
from nanostudy.analysis.frames import Results, known
from nanostudy.analysis.intervals import CONFIDENCE, student
from nanostudy.text import counted, digits, value_text

Against = Literal["parameters", "tokens"]
Key = tuple[str, ...]  # the values of settings, in words

DECIDED_BY = {  # the settings that may change x; all others must be alike at every x
    "parameters": ("n_layer", "n_embd", "bias", "tie_embeddings"),
    "tokens": ("max_iters", "batch_size", "gradient_accumulation_steps"),
}
LEAST_VALUES, LEAST_DECADES = 4, 0.5  # of x, for a power law
FLOOR_VALUES, FLOOR_DECADES = 5, 1.0  # of x, for one with a floor
SAME = 0.01  # values of x that differ by less, relatively, count as one
BEND = 0.01  # p value below which the points do not lie on the line
RESAMPLES, SEED = 2000, 1
SETTLED = 0.9  # share of the resamples that must have a floor, too


@dataclass(frozen=True)
class PowerLaw:
    """loss = coefficient * x ** -exponent + floor. Intervals are 95%, by bootstrap."""

    exponent: float
    low: float
    high: float
    coefficient: float
    floor: float | None  # None: 0
    n: int  # cells
    formula: str
    curve: pd.DataFrame  # x, y, low, high, over the range of the points
    points: pd.DataFrame  # x, y: the geometric mean loss of the cells of each size
    explanation: str


@dataclass(frozen=True)
class Refusal:
    reason: str


@dataclass(frozen=True)
class _Points:
    """The sizes x, and the logarithm of the loss of each combination of the other settings at each size."""

    x: Array  # (sizes,)
    losses: Array  # (combinations, sizes)
    others: tuple[str, ...]
    noise: tuple[float, float] | None  # between seeds: the variance of a size's mean, and its degrees of freedom

    @property
    def adjusted(self) -> Array:
        """The losses without the combinations' differences: sizes are compared within combinations."""
        return self.losses - self.losses.mean(axis=1, keepdims=True) + self.losses.mean()


def power_law(results: Results, against: Against = "parameters") -> PowerLaw | Refusal:
    """A fit to logarithms over the finished experiments, averaged over seeds, with all other settings alike at every x.

    Refused where the points' distances from the law are beyond the noise between seeds (F test at 1%), or where there is one seed,
    beyond how the combinations of the other settings disagree. The noise is assumed proportional to the loss. Residuals are resampled (seeded), inflated for the parameters fitted, and the
    percentile interval is expanded by Student's t over the normal quantile for few points (Hesterberg, 2015, What teachers should
    know about the bootstrap).
    """
    points = _points(results, against)
    if isinstance(points, str):
        return Refusal(points)
    values = 1 + int((np.diff(np.log(points.x)) > SAME).sum())
    decades = math.log10(points.x[-1] / points.x[0])
    span = f"{against} from {digits(points.x[0])} to {digits(points.x[-1])}"
    if values < LEAST_VALUES:
        return Refusal(f"Only {counted(values, 'value')} of {against}: a power law takes {LEAST_VALUES}.")
    if decades < LEAST_DECADES:
        return Refusal(f"The range, {span}, is too short: less than a factor of {10**LEAST_DECADES:.2g}.")
    means = points.adjusted.mean(axis=0)
    params = _lines(points, means[None, :])[0]
    with_floor = _bent(points, means) if values >= FLOOR_VALUES and decades >= FLOOR_DECADES else None
    if with_floor is not None and _better(points, params, with_floor):
        params = with_floor
    statistic, df, noise_df = _lack_of_fit(points, params)
    p = float(stats.f.sf(statistic, df, noise_df))
    if p < BEND:
        beside = "how the other settings disagree" if points.noise is None else "the noise between seeds"
        lack = f"F({df:.0f}, {noise_df:.0f}) = {digits(statistic)}, p {'< 0.0001' if p < 0.0001 else f'= {p:.2g}'}"
        why = f"The points do not lie on one power law over {span}: beside {beside}, the lack of fit is {lack}."
        return Refusal(why)
    return _bootstrapped(points, against, params, span)


def _points(results: Results, against: Against) -> _Points | str:
    """The points, or why there are none."""
    table = results.finished
    table = table[np.isfinite(table[against]) & (table[against] > 0) & (table["val_loss"] > 0)]
    if not len(table):
        return "No experiment has finished." if not len(results.finished) else f"The {against} are unknown."
    for column, what in (("corpus_sha256", "texts"), ("tokenizer", "tokenizers")):
        if table[column].nunique() > 1:
            return f"The experiments have different {what}, whose losses do not compare."
    factors = results.factors
    sizes = [name for name in factors if name in DECIDED_BY[against]]
    others = tuple(name for name in factors if name not in sizes)
    cells: dict[Key, dict[Key, list[tuple[Any, float]]]] = defaultdict(lambda: defaultdict(list))
    x: dict[Key, list[float]] = defaultdict(list)
    keys = table[[*sizes, *others]].map(lambda value: value_text(value) if known(value) else "?")
    rows = zip(keys.itertuples(index=False, name=None), table[against], table["seed"], table["val_loss"], strict=True)
    for key, amount, seed, loss in rows:
        size, combination = key[: len(sizes)], key[len(sizes) :]
        cells[combination][size].append((seed, math.log(loss)))
        x[size].append(math.log(amount))
    fullest = max(cells.values(), key=len)  # the first of them
    there = list(fullest)
    whole = {combination: by_size for combination, by_size in cells.items() if all(size in by_size for size in there)}
    if len(x) >= LEAST_VALUES > len(there):
        bound = ", ".join(_bound(cells, others))
        return f"{against} vary together with other settings ({bound}): their effects cannot be separated."
    runs = [[by_size[size] for size in there] for by_size in whole.values()]
    losses = np.array([[float(np.mean([loss for _, loss in cell])) for cell in row] for row in runs])
    sizes_x = np.exp([float(np.mean(x[size])) for size in there])
    order = np.argsort(sizes_x)
    return _Points(sizes_x[order], losses[:, order], others, _seed_noise(runs))


def _seed_noise(runs: Sequence[Sequence[Sequence[tuple[Any, float]]]]) -> tuple[float, float] | None:
    """(variance of a size's mean, degrees of freedom) from the seeds of each combination at each size, (seed, loss) each.

    Where all have the same seeds, from how these disagree about the sizes: what a seed does to all sizes alike cancels, and what
    it does to a size in all combinations alike counts. Otherwise from the spread within cells.
    """
    of_seeds = [[dict(cell) for cell in row] for row in runs]
    cells = [cell for row in of_seeds for cell in row]
    seeds = {seed for cell in cells for seed in cell if known(seed)}
    if min(len(seeds), len(runs[0])) > 1 and all(cell.keys() == seeds for cell in cells):
        means = np.array([[[cell[seed] for seed in seeds] for cell in row] for row in of_seeds]).mean(axis=0)
        rest = means - means.mean(axis=0) - means.mean(axis=1, keepdims=True) + means.mean()
        df = (len(means) - 1) * (len(seeds) - 1)
        return float((rest**2).sum()) / df / len(seeds), df
    losses = [[np.array([loss for _, loss in cell]) for cell in row] for row in runs]
    df = sum(len(cell) - 1 for row in losses for cell in row)
    if df < 1:
        return None
    within = sum(float(((cell - cell.mean()) ** 2).sum()) for row in losses for cell in row) / df
    return within * float(np.mean([[1 / len(cell) for cell in row] for row in losses])) / len(losses), df


def _bound(cells: Mapping[Key, Mapping[Key, Sequence[Any]]], others: Sequence[str]) -> list[str]:
    """The other settings of which no value has four sizes; all of them, where there is none."""
    bound = []
    for index, name in enumerate(others):
        sizes: dict[str, set[Key]] = defaultdict(set)
        for combination, by_size in cells.items():
            sizes[combination[index]] |= set(by_size)
        if max(map(len, sizes.values())) < LEAST_VALUES:
            bound.append(name)
    return bound or list(others)


# --- parameters: (logarithm of the coefficient, exponent), and a floor where there are three


def _predicted(params: Array, x: Array) -> Array:
    """The logarithm of the loss."""
    line = params[0] - params[1] * np.log(x)
    return np.asarray(line if len(params) == 2 else np.log(params[2] + np.exp(line)))


def _lines(points: _Points, losses: Array) -> Array:
    """(rows, 2): the straight line through each row of logarithms of losses."""
    slopes, starts = np.polyfit(np.log(points.x), losses.T, 1)
    return np.column_stack([starts, -slopes])


def _bent(points: _Points, y: Array, start: Array | None = None) -> Array | None:
    """The fit with a floor to logarithms of losses; None where it does not settle on one between 0 and the lowest point."""
    lowest = float(np.exp(y.min()))
    starts = [start] if start is not None else []
    for share in (0.3, 0.6, 0.9) if start is None else ():
        slope, intercept = np.polyfit(np.log(points.x), np.log(np.exp(y) - share * lowest), 1)
        starts.append(np.array([intercept, -slope, share * lowest]))

    def residuals(params: Array) -> Array:
        return _predicted(params, points.x) - y

    bounds = ([-np.inf, 1e-6, 0.0], [np.inf, np.inf, lowest])
    best = None
    for guess in starts:
        try:
            fit = optimize.least_squares(residuals, guess, bounds=bounds, x_scale=np.maximum(np.abs(guess), 1e-3))
        except ValueError:  # the guess is outside the bounds
            continue
        if best is None or fit.cost < best.cost:
            best = fit
    return best.x if best is not None and 1e-3 * lowest < best.x[2] < 0.9999 * lowest else None


def _squares(points: _Points, params: Array) -> tuple[float, int]:
    """(sum of squared residuals, degrees of freedom)."""
    residuals = points.adjusted - _predicted(params, points.x)
    return float((residuals**2).sum()), residuals.size - (len(residuals) - 1) - len(params)


def _better(points: _Points, line: Array, bent: Array) -> bool:
    """Whether the floor earns its parameter: F test at 5%."""
    without, (with_floor, df) = _squares(points, line)[0], _squares(points, bent)
    if df < 1:
        return False
    if with_floor <= 1e-20:
        return without > 1e-20
    return bool(stats.f.sf((without - with_floor) * df / with_floor, 1, df) < 1 - CONFIDENCE)


def _lack_of_fit(points: _Points, params: Array) -> tuple[float, float, float]:
    """F of the sizes' mean residuals beside the noise between seeds, or, of one seed, beside the combinations' disagreement; its
    degrees of freedom. 0 where it cannot be computed."""
    combinations, sizes = points.adjusted.shape
    means, df = points.adjusted.mean(axis=0), sizes - len(params)
    lack = float(((means - _predicted(params, points.x)) ** 2).sum())
    noise_df = float((combinations - 1) * (sizes - 1))
    disagreement = float(((points.adjusted - means) ** 2).sum()) / max(noise_df, 1.0) / combinations
    variance, noise_df = points.noise or (disagreement, noise_df)
    if df < 1 or noise_df < 1 or lack <= 1e-20:
        return 0.0, 1.0, 1.0
    return (lack / df / variance if variance > 1e-20 else math.inf), df, noise_df


def _bootstrapped(points: _Points, against: Against, params: Array, span: str) -> PowerLaw | Refusal:
    df = _squares(points, params)[1]
    fitted = _predicted(params, points.x)
    residuals = (points.adjusted - fitted).ravel() * math.sqrt(points.adjusted.size / max(df, 1))
    random = np.random.default_rng(SEED)
    tries = RESAMPLES if len(params) == 2 else RESAMPLES // 5
    again = fitted + random.choice(residuals, size=(tries, *points.adjusted.shape)).mean(axis=1)
    if len(params) == 2:
        drawn = list(_lines(points, again))
    else:
        bent = (_bent(points, each, params) for each in again)
        drawn = [each for each in bent if each is not None]
    if len(drawn) < SETTLED * tries:
        return Refusal(f"The points over {span} bend, but do not determine a floor.")
    expansion = float(student(df) / stats.norm.ppf((1 + CONFIDENCE) / 2))

    def interval(values: Array, middle: Array | float) -> tuple[Array, Array]:
        ends = np.quantile(values, [(1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2], axis=0)
        low, high = middle + (ends - middle) * expansion
        return low, high

    low, high = (float(end) for end in interval(np.array([each[1] for each in drawn]), float(params[1])))
    law = f"x^-{params[1]:.3g} (95% interval of the exponent {low:.3g} to {high:.3g})"
    if high <= 0:
        return Refusal(f"The loss does not fall with {against} over {span}: it rises.")
    if low <= 0:
        return Refusal(f"The exponent is indistinguishable from 0 over {span} (95%): the fit gives {law}.")
    x = np.geomspace(points.x[0], points.x[-1], 50)
    middle = _predicted(params, x)
    below, above = interval(np.array([_predicted(each, x) for each in drawn]), middle)
    exponent, coefficient = float(params[1]), float(np.exp(params[0]))
    floor = float(params[2]) if len(params) == 3 else None
    formula = f"loss = {coefficient:.4g} × {against}^-{exponent:.3g}" + ("" if floor is None else f" + {floor:.4g}")
    curve = pd.DataFrame({"x": x, "y": np.exp(middle), "low": np.exp(below), "high": np.exp(above)})
    cells = pd.DataFrame({"x": points.x, "y": np.exp(points.losses.mean(axis=0))})
    why, n = _explanation(points, against, span, df), points.losses.size
    return PowerLaw(exponent, low, high, coefficient, floor, n, formula, curve, cells, why)


def _explanation(points: _Points, against: Against, span: str, df: int) -> str:
    combinations, sizes = points.losses.shape
    text = f"Fitted to the logarithms of {counted(sizes, 'point')} over {span} ({df} degrees of freedom)"
    if combinations > 1:
        text += f"; each is the geometric mean of the same {combinations} combinations of {', '.join(points.others)}"
    if points.noise is None:
        text += "; without several seeds of each it is not tested against the noise between them"
    return f"{text}. It holds for this range and these settings alone."
