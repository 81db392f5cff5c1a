"""Settings that are numbers, of searches and sweeps: the curve of each with its band, where it is lowest, and which setting changes the loss most."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import pandas as pd
from scipy import sparse, stats

from nanostudy.analysis.design import Array, Design, Factor, design_of
from nanostudy.analysis.fit import NEGLIGIBLE, Fit, Term, fit_design
from nanostudy.analysis.frames import Results, known
from nanostudy.analysis.noise import CONFIDENCE
from nanostudy.text import counted, value_text

CHANGES = ("factor", "change", "se", "df", "low", "high", "p", "clear", "at_lowest", "at_highest")
OPTIMA = ("factor", "where", "best", "low", "high", "lowest", "highest", "log")
CURVES = ("factor", "value", "loss", "low", "high")
POINTS = 41  # of a curve
PLACES = 401  # where the optimum is looked for
SINGULAR = 1e-9  # relative: less counts as zero

Where = Literal["inside", "lowest end", "highest end", "unknown"]


@dataclass(frozen=True)
class Shapes:
    """Losses in the measure's unit. Empty where no setting is a number, or the experiments are too few."""

    changes: (
        pd.DataFrame
    )  # columns CHANGES; a row per factor: from its lowest to its highest loss; at 95% for all that is compared
    leader: str | None  # the factor that changes the loss more than every other, at 95%
    optima: pd.DataFrame  # columns OPTIMA; a row per number: its best value with a 95% interval, the ends of its range
    curves: pd.DataFrame  # columns CURVES: the mean loss along a number, the others at their average, with its 95% band
    points: pd.DataFrame  # columns CURVES without the band: each experiment, others' effects taken out
    expected: tuple[float, float, float]  # loss, low, high: what the curves expect of the settings with the lowest loss
    misfit: float  # p of the test that the curves leave nothing but noise; NaN where it cannot be tested
    noise: float  # standard deviation of one experiment around the curves
    df: int  # of it
    n: int
    configurations: int
    seed: str  # that all experiments have; empty where they have several
    explanation: str


def shapes(results: Results, measure: str = "val_loss") -> Shapes:
    """The curves on `measure` over the finished experiments."""
    design = design_of(results, measure)
    if not design.numbers:
        return _nothing(design, "")
    fit = fit_design(design, 1)
    if fit.residual_df < 1:
        size = f"{counted(design.n, 'experiment')} for {counted(len(design.factors), 'setting')}"
        return _nothing(design, f"{size} are too few to fit curves through.")
    robust = Robust(fit)
    numbers = [term for term in fit.terms if term.factors[0] in design.numbers]
    changes, leader = _changes(robust)
    return Shapes(
        changes,
        leader,
        pd.DataFrame([_optimum(robust, term, len(fit.terms)) for term in numbers], columns=list(OPTIMA)),
        pd.concat([_curve(robust, term) for term in numbers], ignore_index=True),
        pd.concat([_points(fit, term) for term in numbers], ignore_index=True),
        _expected(robust),
        misfit(fit),
        math.sqrt(fit.residual_variance),
        fit.residual_df,
        design.n,
        design.cell_count,
        _one_seed(design),
        _explanation(robust),
    )


def _nothing(design: Design, why: str) -> Shapes:
    empty = {columns: pd.DataFrame(columns=list(columns)) for columns in (CHANGES, OPTIMA, CURVES)}
    tables = (empty[OPTIMA], empty[CURVES], empty[CURVES][["factor", "value", "loss"]], (math.nan,) * 3)
    return Shapes(empty[CHANGES], None, *tables, math.nan, math.nan, 0, design.n, design.cell_count, "", why)


# --- the noise


class Robust:
    """Standard errors that stand noise of unequal size, and seeds that act differently on different settings.

    CR2 with Satterthwaite's degrees of freedom (Bell and McCaffrey, 2002; Pustejovsky and Tipton, 2018): the clusters are the
    seeds where each configuration was run with every seed, otherwise the experiments (HC2).
    """

    def __init__(self, fit: Fit) -> None:
        self.fit, design = fit, fit.design
        self.by_seed = design.blocks is not None and design.cell_count * (int(design.blocks.max()) + 1) == design.n
        self.clusters = design.blocks if self.by_seed and design.blocks is not None else np.arange(design.n)
        self._inverse = np.linalg.pinv(fit.columns)
        left, sizes, _ = np.linalg.svd(fit.columns, full_matrices=False)
        self._span = left[:, sizes > SINGULAR * sizes.max()]
        members = [np.flatnonzero(self.clusters == cluster) for cluster in range(int(self.clusters.max()) + 1)]
        self._order = np.concatenate(members)
        self._starts = np.cumsum([0, *map(len, members[:-1])])
        roots = [_inverse_root(np.eye(len(rows)) - self._span[rows] @ self._span[rows].T) for rows in members]
        self._roots: Any = sparse.block_diag(roots, format="csr")

    def estimate(self, weights: Array) -> tuple[float, float, float]:
        """(a linear function of the parameters, its standard error, its degrees of freedom)."""
        part = self._roots @ (weights @ self._inverse)[self._order]
        by_cluster = np.add.reduceat(part * self.fit.residuals[self._order], self._starts)
        # what the estimate of the variance expects of independent noise is a quadratic form: its trace, and that of its square
        own = np.add.reduceat(part**2, self._starts)
        shared = np.add.reduceat(part[:, None] * self._span[self._order], self._starts)
        inner = shared.T @ shared
        trace = float(own.sum() - np.trace(inner))
        square = float((own**2).sum() - 2 * (own * (shared**2).sum(axis=1)).sum() + (inner**2).sum())
        smallest = NEGLIGIBLE * float(np.abs(self.fit.design.y).max())
        df = trace**2 / square if square > 0 else 1.0
        return float(weights @ self.fit.params), max(math.sqrt(float((by_cluster**2).sum())), smallest), df


def _inverse_root(matrix: Array) -> Array:
    """Of a symmetric matrix, zero where that has none."""
    values, vectors = np.linalg.eigh(matrix)
    roots = np.where(values > SINGULAR, 1 / np.sqrt(np.maximum(values, SINGULAR)), 0.0)
    return (vectors * roots) @ vectors.T


def misfit(fit: Fit) -> float:
    """The p of what the curves miss, beyond noise. NaN where that cannot be tested.

    Against the spread of equal configurations where there are any; otherwise whether squares and cubes of the fitted values
    explain more (RESET; Ramsey, 1969).
    """
    design = fit.design
    left = float(fit.residuals @ fit.residuals)
    cells = (design.cells[:, None] == np.arange(design.cells.max() + 1)).astype(float)
    more = np.hstack([fit.columns[:, : fit.offset], cells])
    if np.linalg.matrix_rank(more) == design.n:
        fitted = design.y - fit.residuals
        centred = (fitted - fitted.mean()) / (fitted.std() or 1.0)
        more = np.hstack([fit.columns, centred[:, None] ** 2, centred[:, None] ** 3])
    rank = int(np.linalg.matrix_rank(more))
    unexplained = design.y - more @ (np.linalg.pinv(more) @ design.y)
    within = float(unexplained @ unexplained)
    extra, rest = rank - fit.rank, design.n - rank
    if extra < 1 or rest < 1 or within <= design.n * (NEGLIGIBLE * float(np.abs(design.y).max())) ** 2:
        return math.nan
    return float(stats.f.sf((left - within) / extra / (within / rest), extra, rest))


# --- how much each factor changes the loss


@dataclass(frozen=True)
class _Course:
    """A factor's effect along its values."""

    term: Term
    factor: Factor
    values: Sequence[Any]
    weights: Array  # (values, parameters)
    effects: Array  # (values,)

    @property
    def largest(self) -> Array:
        """The weights of the highest less the lowest."""
        return self.weights[self.effects.argmax()] - self.weights[self.effects.argmin()]


def _course(fit: Fit, term: Term) -> _Course:
    factor = fit.design.factors[term.factors[0]]
    values: Sequence[Any] = factor.levels
    rows = factor.coding
    if factor.degree:
        values = list(factor.unscaled(np.linspace(-1, 1, POINTS)))
        rows = factor.columns_at(np.array(values))
    weights = np.zeros((len(values), fit.columns.shape[1]))
    weights[:, term.columns] = rows
    return _Course(term, factor, values, weights, weights @ fit.params)


def _changes(robust: Robust) -> tuple[pd.DataFrame, str | None]:
    """The largest change of each factor, and the factor whose change exceeds all others'.

    Intervals are Scheffé's over all changes within a factor, divided among the factors (Bonferroni).
    """
    fit = robust.fit
    courses = [_course(fit, term) for term in fit.terms]
    rows = []
    for course in courses:
        change, se, df = robust.estimate(course.largest)
        size = course.term.columns.stop - course.term.columns.start
        margin = _scheffe(size, df, len(courses)) * se
        p = min(1.0, len(courses) * float(stats.f.sf((change / se) ** 2 / size, size, df)))
        ends = (course.values[int(course.effects.argmin())], course.values[int(course.effects.argmax())])
        rows.append(
            (course.factor.name, change, se, df, max(0.0, change - margin), change + margin, p, change > margin, *ends)
        )
    table = pd.DataFrame(rows, columns=list(CHANGES)).astype({"at_lowest": object, "at_highest": object, "clear": bool})
    table = table.sort_values("change", ascending=False, kind="stable")
    by_change = [courses[place] for place in table.index]
    table = table.reset_index(drop=True)
    if not table["clear"].iloc[0]:
        return table, None
    ahead = all(_exceeds(robust, by_change[0], other, len(courses) - 1) for other in by_change[1:])
    return table, str(table["factor"].iloc[0]) if ahead else None


def _scheffe(size: int, df: float, factors: int) -> float:
    return math.sqrt(size * float(stats.f.isf((1 - CONFIDENCE) / factors, size, df)))


def _exceeds(robust: Robust, a: _Course, b: _Course, others: int) -> bool:
    """Whether the largest change of `a` exceeds that of `b`, at 95% for all `others`."""
    difference, se, df = robust.estimate(a.largest - b.largest)
    return difference > float(stats.t.isf((1 - CONFIDENCE) / 2 / others, df)) * se


# --- the curve of a number


def _curve(robust: Robust, term: Term) -> pd.DataFrame:
    course = _course(robust.fit, term)
    rows = []
    for value, weights in zip(course.values, course.weights, strict=True):
        loss, low, high = _interval(robust, _mean(robust.fit) + weights)
        rows.append((course.factor.name, value, loss, low, high))
    return pd.DataFrame(rows, columns=list(CURVES))


def _mean(fit: Fit) -> Array:
    weights = np.zeros(fit.columns.shape[1])
    weights[0] = 1.0
    weights[1 : fit.offset] = 1 / fit.offset
    return weights


def _interval(robust: Robust, weights: Array) -> tuple[float, float, float]:
    value, se, df = robust.estimate(weights)
    margin = float(stats.t.ppf((1 + CONFIDENCE) / 2, df)) * se
    return value, value - margin, value + margin


def _points(fit: Fit, term: Term) -> pd.DataFrame:
    factor = fit.design.factors[term.factors[0]]
    own = fit.columns[:, term.columns] @ fit.params[term.columns]
    losses = float(_mean(fit) @ fit.params) + own + fit.residuals
    values = np.array(factor.levels, dtype=float)[factor.codes]
    return pd.DataFrame({"factor": factor.name, "value": values, "loss": losses})


def _expected(robust: Robust) -> tuple[float, float, float]:
    fit = robust.fit
    weights = fit.columns[fit.design.y.argmin()].copy()
    weights[: fit.offset] = _mean(fit)[: fit.offset]
    return _interval(robust, weights)


def _optimum(robust: Robust, term: Term, factors: int) -> tuple[Any, ...]:
    """Where a number's curve is lowest, and the values whose slope may be nil: Fieller's interval (1954).

    Inside, where the curve falls at the lowest value and rises at the highest, each at 97.5% for all factors together (Lind
    and Mehlum, 2010, With or without U?); at an end, where it falls or rises throughout.
    """
    factor = robust.fit.design.factors[term.factors[0]]
    places = np.linspace(-1, 1, PLACES)
    slopes = np.zeros((PLACES, robust.fit.columns.shape[1]))
    slopes[:, term.columns] = np.stack([power * places ** (power - 1) for power in range(1, factor.degree + 1)], axis=1)
    judged = np.array([robust.estimate(row) for row in slopes])
    t = judged[:, 0] / judged[:, 1]
    alone, together = (np.asarray(stats.t.isf((1 - CONFIDENCE) / 2 / count, judged[:, 2])) for count in (1, factors))
    falls, rises = t < -together, t > together
    curve = _powered(places, factor.degree) @ robust.fit.params[term.columns]
    best = float(factor.unscaled(places[[int(curve.argmin())]])[0])
    where: Where = "unknown"
    if falls[0] and rises[-1]:
        where = "inside"
    elif falls.all():
        where = "highest end"
    elif rises.all():
        where = "lowest end"
    flat = np.abs(t) <= alone
    flat[0] |= t[0] > -alone[0]
    flat[-1] |= t[-1] < alone[-1]
    flat[curve.argmin()] = True
    inside = factor.unscaled(places[flat])
    ends = (float(factor.levels[0]), float(factor.levels[-1]))
    return factor.name, where, best, float(inside.min()), float(inside.max()), *ends, factor.log


def _powered(places: Array, degree: int) -> Array:
    return np.stack([places**power for power in range(1, degree + 1)], axis=1)


# --- words


def _explanation(robust: Robust) -> str:
    fit, design = robust.fit, robust.fit.design
    numbers = [design.factors[place] for place in design.numbers]
    logs = [factor.name for factor in numbers if factor.log]
    line = "a straight line, because the experiments are too few for bends," if numbers[0].degree == 1 else "a parabola"
    text = f"Each number is fitted as {line}{_on(logs, len(numbers))}, beside the other settings by least squares (n = {design.n}). "
    if robust.by_seed:
        text += (
            f"The noise is how the {len(set(robust.clusters))} {design.block_words} disagree about the curves (CR2), whatever one "
            "does to all configurations alike."
        )
    else:
        text += (
            f"The noise is the spread of the experiments around the curves, {math.sqrt(fit.residual_variance):.4f} with "
            f"{counted(fit.residual_df, 'degree')} of freedom, and may differ in size from place to place (HC2). What the curves "
            "miss counts as noise."
        )
        if _one_seed(design):
            text += f" All have seed {_one_seed(design)}: what another would change is in no interval."
    p = misfit(fit)
    if p != p:
        return f"{text} Whether the curves miss anything cannot be tested."
    if p < 1 - CONFIDENCE:
        return f"{text} The curves miss something (p = {p:.2g}): a bend of another form, or settings that act together."
    return f"{text} A test finds nothing that the curves miss (p = {p:.2f})."


def _one_seed(design: Design) -> str:
    seeds = {value_text(seed) if known(seed) else "" for seed in design.table["seed"]}
    return seeds.pop() if len(seeds) == 1 else ""


def _on(logs: Sequence[str], numbers: int) -> str:
    if not logs:
        return ""
    return " in its logarithm" if numbers == len(logs) else f" ({', '.join(logs)}: in the logarithm)"
