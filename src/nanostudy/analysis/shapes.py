"""Settings that are numbers, of searches and sweeps: the curve of each with its band, where it is lowest, and which setting changes the loss most."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
import pandas as pd
from scipy import stats

from nanostudy.analysis.design import Array, Design, Factor, design_of, powers
from nanostudy.analysis.fit import Fit, Term, fit_design
from nanostudy.analysis.frames import Results, known
from nanostudy.analysis.intervals import CONFIDENCE
from nanostudy.analysis.noise import estimates
from nanostudy.text import counted, listed, value_text

CHANGES = ("factor", "change", "se", "df", "low", "high", "p", "clear", "at_lowest", "at_highest")
OPTIMA = ("factor", "where", "best", "low", "high", "lowest", "highest", "log")
CURVES = ("factor", "value", "loss", "low", "high")
POINTS = ("name", "factor", "value", "loss")
CURVE_PLACES, PLACES = 41, 401  # of a curve; where the optimum is looked for

Where = Literal["inside", "lowest end", "highest end", "unknown"]


@dataclass(frozen=True, kw_only=True)
class Shapes:
    """Losses in the measure's unit. Empty where no setting is a number, or the experiments are too few."""

    changes: pd.DataFrame  # columns CHANGES; a row per factor, from its lowest to its highest loss; at 95% for all
    leader: str | None = None  # the factor that changes the loss more than every other, at 95%
    inseparable: tuple[str, ...] = ()  # factors whose effects these experiments cannot tell from others'
    optima: pd.DataFrame  # columns OPTIMA; a row per number: its best value with a 95% interval, the ends of its range
    curves: pd.DataFrame  # columns CURVES: the mean loss along a number, the others at their average, with its 95% band
    points: pd.DataFrame  # columns POINTS: each experiment, others' effects taken out
    expected: tuple[float, float, float] = (math.nan,) * 3  # loss, low, high: of the settings with the lowest loss
    misfit: float = math.nan  # p of the test that the curves leave nothing but noise; NaN where it cannot be tested
    noise: float = math.nan  # standard deviation of one experiment around the curves
    df: int = 0  # of it
    n: int
    configurations: int
    seed: str = ""  # that all experiments have; empty where they have several
    explanation: str


def shapes(results: Results, measure: str = "val_loss") -> Shapes:
    """The curves on `measure` over the finished experiments."""
    design = design_of(results, measure)
    nothing = Shapes(
        changes=pd.DataFrame(columns=list(CHANGES)),
        optima=pd.DataFrame(columns=list(OPTIMA)),
        curves=pd.DataFrame(columns=list(CURVES)),
        points=pd.DataFrame(columns=list(POINTS)),
        n=design.n,
        configurations=design.cell_count,
        explanation="",
    )
    if not design.numbers:
        return nothing
    fit = fit_design(_clustered(design), 1)
    if fit.residual_df < 1:
        size = f"{counted(design.n, 'experiment')} for {counted(len(design.factors), 'setting')}"
        return replace(nothing, explanation=f"{size} are too few to fit curves through.")
    terms = [term for term in fit.terms if _estimable(fit, term)]
    numbers = [term for term in terms if term.factors[0] in design.numbers]
    inseparable = tuple(factor.name for factor in design.factors if factor.name not in {term.name for term in terms})
    if not numbers:
        return replace(nothing, explanation=f"These experiments cannot separate the effects of {listed(inseparable)}.")
    changes, leader = _changes(fit, terms)
    missed, seed = misfit(fit), _one_seed(design)
    return replace(
        nothing,
        changes=changes,
        leader=None if inseparable else leader,
        inseparable=inseparable,
        optima=pd.DataFrame([_optimum(fit, term, len(terms)) for term in numbers], columns=list(OPTIMA)),
        curves=pd.concat([_curve(fit, term) for term in numbers], ignore_index=True),
        points=pd.concat([_points(fit, term) for term in numbers], ignore_index=True),
        expected=_expected(fit),
        misfit=missed,
        noise=fit.sd,
        df=fit.residual_df,
        seed=seed,
        explanation=_explanation(fit, missed, seed),
    )


def _estimable(fit: Fit, term: Term) -> bool:
    """Whether the experiments determine all of a factor's effect."""
    weights = np.eye(fit.columns.shape[1])[term.columns]
    return len(weights) > 0 and all(fit.estimable(row) for row in weights)


# --- the noise


def _clustered(design: Design) -> Design:
    """Where no seed runs all configurations, each experiment is on its own: what a seed does to all alike is in no interval."""
    by_seed = design.blocks is not None and design.cell_count * (int(design.blocks.max()) + 1) == design.n
    return design if by_seed else replace(design, clusters=np.arange(design.n))


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
    extra, rest = rank - fit.span.shape[1], design.n - rank
    if extra < 1 or rest < 1 or within <= design.n * fit.negligible**2:
        return math.nan
    return float(stats.f.sf((left - within) / extra / (within / rest), extra, rest))


# --- how much each factor changes the loss


def _estimate(fit: Fit, weights: Array) -> tuple[float, float, float]:
    """(a linear function of the parameters, its standard error, its degrees of freedom)."""
    found = estimates(fit, weights[None, :])
    return float(found.effect[0]), max(float(found.se[0]), fit.negligible), float(found.df[0])


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
        values = list(factor.unscaled(np.linspace(-1, 1, CURVE_PLACES)))
        rows = factor.columns_at(np.array(values))
    weights = np.zeros((len(values), fit.columns.shape[1]))
    weights[:, term.columns] = rows
    return _Course(term, factor, values, weights, weights @ fit.params)


def _changes(fit: Fit, terms: Sequence[Term]) -> tuple[pd.DataFrame, str | None]:
    """The largest change of each factor, and the factor whose change exceeds all others'.

    Intervals are Scheffé's over all changes within a factor, divided among the factors (Bonferroni).
    """
    courses = [_course(fit, term) for term in terms]
    rows = []
    for course in courses:
        change, se, df = _estimate(fit, course.largest)
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
    ahead = all(_exceeds(fit, by_change[0], other, len(courses) - 1) for other in by_change[1:])
    return table, str(table["factor"].iloc[0]) if ahead else None


def _scheffe(size: int, df: float, factors: int) -> float:
    return math.sqrt(size * float(stats.f.isf((1 - CONFIDENCE) / factors, size, df)))


def _exceeds(fit: Fit, a: _Course, b: _Course, others: int) -> bool:
    """Whether the largest change of `a` exceeds that of `b`, at 95% for all `others`."""
    difference, se, df = _estimate(fit, a.largest - b.largest)
    return difference > float(stats.t.isf((1 - CONFIDENCE) / 2 / others, df)) * se


# --- the curve of a number


def _curve(fit: Fit, term: Term) -> pd.DataFrame:
    """The band is of the distance from the mean of all, whose own noise all values share."""
    course, level = _course(fit, term), float(fit.mean @ fit.params)
    found = estimates(fit, course.weights)
    low, high = found.interval()
    band = {"loss": level + found.effect, "low": level + low, "high": level + high}
    return pd.DataFrame({"factor": course.factor.name, "value": course.values, **band})


def _points(fit: Fit, term: Term) -> pd.DataFrame:
    factor = fit.design.factors[term.factors[0]]
    own = fit.columns[:, term.columns] @ fit.params[term.columns]
    losses = float(fit.mean @ fit.params) + own + fit.residuals
    values = np.array(factor.levels, dtype=float)[factor.codes]
    return pd.DataFrame({"name": fit.design.table.index, "factor": factor.name, "value": values, "loss": losses})


def _expected(fit: Fit) -> tuple[float, float, float]:
    weights = fit.columns[fit.design.y.argmin()].copy()
    weights[: fit.offset] = fit.mean[: fit.offset]
    found = estimates(fit, weights[None, :])
    loss, low, high = (float(value[0]) for value in (found.effect, *found.interval()))
    return loss, low, high


def _optimum(fit: Fit, term: Term, factors: int) -> tuple[Any, ...]:
    """Where a number's curve is lowest, and the values whose slope may be nil: Fieller's interval (1954).

    Inside, where the curve falls at the lowest value and rises at the highest, each at 97.5% for all factors together (Lind
    and Mehlum, 2010, With or without U?); at an end, where it falls or rises throughout.
    """
    factor = fit.design.factors[term.factors[0]]
    places = np.linspace(-1, 1, PLACES)
    slopes = np.zeros((PLACES, fit.columns.shape[1]))
    slopes[:, term.columns] = np.stack([power * places ** (power - 1) for power in range(1, factor.degree + 1)], axis=1)
    found = estimates(fit, slopes)
    t = found.effect / np.maximum(found.se, fit.negligible)
    alone, together = (np.asarray(stats.t.isf((1 - CONFIDENCE) / 2 / count, found.df)) for count in (1, factors))
    falls, rises = t < -together, t > together
    curve = powers(places, factor.degree) @ fit.params[term.columns]
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


# --- words


def _explanation(fit: Fit, p: float, seed: str) -> str:
    design = fit.design
    numbers = [design.factors[place] for place in design.numbers]
    logs = [factor.name for factor in numbers if factor.log]
    line = "a straight line, because the experiments are too few for bends," if numbers[0].degree == 1 else "a parabola"
    text = f"Each number is fitted as {line}{_on(logs, len(numbers))}, beside the other settings by least squares (n = {design.n}). "
    if design.blocks is not None and design.seed_count < design.n:
        text += (
            f"The noise is how the {design.seed_count} seeds disagree about the curves (CR2), whatever one "
            "does to all configurations alike."
        )
    else:
        text += (
            f"The noise is the spread of the experiments around the curves, {fit.sd:.4f} with "
            f"{counted(fit.residual_df, 'degree')} of freedom, and may differ in size from place to place (HC2). What the curves "
            "miss counts as noise."
        )
        if seed:
            text += f" All have seed {seed}: what another would change is in no interval."
    if math.isnan(p):
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
