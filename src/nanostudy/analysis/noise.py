"""How large the noise is that effects are judged against, where that estimate comes from, and what it assumes."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
from scipy import stats

from nanostudy.analysis.design import TIMES, Array, Design, coded, group_means
from nanostudy.analysis.fit import Fit, Term, fit_design
from nanostudy.analysis.frames import known
from nanostudy.text import counted, value_text

Method = Literal["replicates", "higher-order", "lenth", "least-squares", "none"]

ENOUGH = 5  # degrees of freedom, to estimate the noise from interactions of three and more factors
ENOUGH_WITHOUT_INTERACTIONS = 3  # the same, where two-way interactions, too, count as noise
LENTH_CONTRASTS = 7  # at least
CONFIDENCE = 0.95


@dataclass(frozen=True)
class Between:
    """The noise between seeds, for the terms that vary with them."""

    variance: float  # of one experiment, if all of its noise were of this kind
    df: float
    terms: frozenset[str]
    size: float  # experiments per seed


@dataclass(frozen=True)
class Noise:
    """The noise of one experiment, without what its block shares."""

    method: Method
    variance: float  # NaN without an estimate
    df: float
    explanation: str
    between: Between | None = None  # where seeds are confounded with factors; `variance` is then that within seeds

    @property
    def of_one(self) -> tuple[float, float]:
        """(variance, degrees of freedom) of an experiment compared with one of another seed (Satterthwaite, 1946)."""
        if self.between is None:
            return self.variance, self.df
        size = self.between.size
        parts = np.array([(size - 1) / size * self.variance, self.between.variance / size])
        dfs = np.array([self.df, self.between.df])
        total = float(parts.sum())
        return total, total**2 / float((parts**2 / dfs).sum()) if total > 0 else self.df

    def of(self, term: str) -> tuple[float, float]:
        """(variance, degrees of freedom) that a term is judged against."""
        if self.between is not None and term in self.between.terms:
            return self.between.variance, self.between.df
        return self.variance, self.df


def judged(design: Design) -> tuple[Fit, Noise]:
    """The model that the design supports, and its noise."""
    fit = fit_design(design, 2)
    if design.n < 2:
        why = "There is no experiment to compare." if design.n == 0 else "One experiment shows no noise."
        return fit, _no_estimate(why)
    pure = _replicate_df(design)
    if design.balanced and pure > 0:
        return fit, _replicates(design, pure)
    if fit.residual_df >= ENOUGH or (pure > 0 and fit.residual_df > 0):
        return fit, _unexplained(fit, pure)
    if design.balanced and design.two_level and design.n > LENTH_CONTRASTS:
        return fit, _lenth(design)
    fewer = fit_design(design, 1)
    if fewer.residual_df >= ENOUGH_WITHOUT_INTERACTIONS:
        return fewer, _unexplained(fewer, pure)
    size = f"{counted(design.n, 'experiment')} in {counted(design.cell_count, 'cell')}"
    why = f"{size} are too few to estimate the noise: there are no intervals. Run each cell with more seeds."
    return fit, _no_estimate(why)


def _no_estimate(why: str) -> Noise:
    return Noise("none", math.nan, math.nan, why)


def _replicate_df(design: Design) -> int:
    """Degrees of freedom of the differences between experiments of one cell, without what blocks share."""
    if design.blocks is None:
        return design.n - design.cell_count
    indicator = (design.blocks[:, None] == np.arange(1, design.blocks.max() + 1)).astype(float)
    within = indicator - group_means(indicator, design.cells)[design.cells]
    return design.n - design.cell_count - int(np.linalg.matrix_rank(within))


def _replicates(design: Design, df: int) -> Noise:
    """Of a balanced design: the interaction of seeds (blocks) and cells, or the spread within cells."""
    y = design.y[:, None]
    rest = y - group_means(y, design.cells)[design.cells]
    each, cells = design.n // design.cell_count, counted(design.cell_count, "cell")
    size = f"n = {design.n}, {df} degrees of freedom"
    if design.blocks is not None:
        rest = rest - group_means(y, design.blocks)[design.blocks] + y.mean()
        explanation = (
            f"The noise is how much the {each} {design.block_words} disagree about the {cells} ({size}). "
            f"{design.block_words.capitalize()} are blocks: comparisons are paired, and what one does to all cells alike "
            "cancels. This assumes that the noise is about as large in every cell."
        )
    else:
        explanation = (
            f"The noise is the spread of the {each} seeds in each of {cells} ({size}). "
            "This assumes that it is about as large in every cell."
        )
    return Noise("replicates", float(rest[:, 0] @ rest[:, 0]) / df, df, explanation)


def _unexplained(fit: Fit, pure: int) -> Noise:
    """What the fit leaves unexplained."""
    design, df = fit.design, fit.residual_df
    size = f"n = {design.n}, {df} degrees of freedom"
    smallest = "three" if fit.order == 2 else "two"
    if design.balanced:
        explanation = (
            f"There is one experiment per cell, so the noise is estimated from the interactions of {smallest} and more factors "
            f"({size}). This assumes that those are nil; where they are not, the intervals are too wide."
        )
    else:
        terms = "Main effects and two-way interactions" if fit.order == 2 else "Main effects"
        also = " and the replicates" if pure > 0 else ""
        explanation = (
            f"The study is not balanced. {terms} are fitted by least squares, and the noise is what they leave unexplained "
            f"({size}): interactions of {smallest} and more factors{also}. This assumes that those interactions are nil or small."
        )
        if design.blocks is not None:
            explanation += f" {design.block_words.capitalize()} are blocks: comparisons are within them."
    method: Method = "higher-order" if design.balanced else "least-squares"
    return _with_strata(Noise(method, fit.residual_variance, df, explanation + _one_seed(design)), fit)


def _one_seed(design: Design) -> str:
    seeds = {seed for seed in design.table["seed"] if known(seed)}
    if len(seeds) != 1 or not all(known(seed) for seed in design.table["seed"]):
        return ""
    return f" All have seed {value_text(seeds.pop())}: its effect on all of them alike is in no interval."


def _with_strata(noise: Noise, fit: Fit) -> Noise:
    """Noise of two sizes, between seeds and within them, as in split plots, where seeds are confounded with factors.

    Only of a balanced design in which every term varies either with the seeds alone or within them alone.
    """
    design = fit.design
    if design.shared is None or not design.balanced:
        return noise
    strata = {term.name: _stratum(fit, term, design.shared) for term in fit.terms}
    if None in strata.values():
        return noise
    seeds = len(np.unique(design.shared))
    bound = frozenset(name for name, stratum in strata.items() if stratum == "between")
    df_terms = sum(term.columns.stop - term.columns.start for term in fit.terms if term.name in bound)
    df_between = seeds - 1 - df_terms
    df_within = fit.residual_df - df_between
    if min(df_between, df_within) < ENOUGH:
        return noise
    means = group_means(fit.residuals[:, None], design.shared)[design.shared][:, 0]
    within = fit.residuals - means
    between = float(means @ means) / df_between
    explanation = (
        f" Seeds are shared by several cells: what varies with the seed is judged between the {seeds} seeds "
        f"({df_between} degrees of freedom), the rest within them ({df_within})."
    )
    return replace(
        noise,
        variance=float(within @ within) / df_within,
        df=df_within,
        between=Between(between, df_between, bound, design.n / seeds),
        explanation=noise.explanation + explanation,
    )


def _stratum(fit: Fit, term: Term, seeds: Array) -> Literal["between", "within"] | None:
    columns = fit.columns[:, term.columns]
    means = group_means(columns, seeds)[seeds]
    if np.allclose(columns, means):
        return "between"
    return "within" if np.allclose(means, 0) else None


# --- Lenth's method


def _lenth(design: Design) -> Noise:
    effects = contrasts(design)
    error, df = pseudo_standard_error(list(effects.values())), len(effects) / 3
    explanation = (
        "There is one experiment per cell, and too few interactions of higher order: the noise is Lenth's pseudo standard error "
        f"of the {len(effects)} contrasts (n = {design.n}; t with {len(effects)}/3 degrees of freedom). This assumes that most "
        "of them are nil; with few contrasts the intervals are wide."
    )
    # a contrast is the difference of two means of n / 2 experiments: its variance is 4 / n of an experiment's
    return Noise("lenth", error**2 * design.n / 4, df, explanation + _one_seed(design))


def pseudo_standard_error(effects: list[float]) -> float:
    """Lenth (1989), Quick and easy analysis of unreplicated factorials, Technometrics 31, equations 1 and 2."""
    sizes = np.abs(np.asarray(effects, dtype=float))
    first = 1.5 * float(np.median(sizes))
    small = sizes[sizes < 2.5 * first]
    return 1.5 * float(np.median(small)) if len(small) else 0.0


def contrasts(design: Design) -> dict[str, float]:
    """Every contrast of a balanced two-level design: the mean where the product of the signs is 1, less that where it is -1."""
    columns: dict[str, Array] = {"": np.ones(design.n)}
    orders: dict[str, int] = {"": 0}
    for factor in design.factors:
        signs = coded(factor)[:, 0]
        for name, column in list(columns.items()):
            joint = f"{name}{TIMES}{factor.name}" if name else factor.name
            columns[joint], orders[joint] = column * signs, orders[name] + 1
    ordered = sorted((name for name in columns if name), key=lambda name: orders[name])
    return {name: float(columns[name] @ design.y) / (design.n / 2) for name in ordered}


def margins(error: float, df: float, count: int) -> tuple[float, float]:
    """(margin of error, simultaneous margin of error) of `count` contrasts: Lenth (1989), equations 3 to 5."""
    together = (1 + CONFIDENCE ** (1 / count)) / 2
    return float(stats.t.ppf((1 + CONFIDENCE) / 2, df)) * error, float(stats.t.ppf(together, df)) * error
