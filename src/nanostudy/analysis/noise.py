"""How sure an estimate is: least squares whose noise is judged by how seeds disagree, whatever its size in each cell."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from scipy import stats

from nanostudy.analysis import text_error
from nanostudy.analysis.design import Array, Design, group_means
from nanostudy.analysis.fit import TOLERANCE, Fit, fit_design
from nanostudy.analysis.frames import known
from nanostudy.analysis.intervals import CONFIDENCE
from nanostudy.text import counted, digits, value_text

ENOUGH = 5  # degrees of freedom that main effects and two-way interactions must leave
ENOUGH_WITHOUT_INTERACTIONS = 3  # the same, where two-way interactions, too, count as noise
MOST_NUMBERS = 20_000_000  # in an array of the computation


@dataclass(frozen=True)
class Estimates:
    """Linear functions of a fit's parameters, an entry each."""

    effect: Array
    se: Array  # of the seeds; NaN without an estimate of the noise
    df: Array
    texts: Array  # variances, of each text

    @property
    def whole_se(self) -> Array:
        """Of seeds and text."""
        return np.asarray(np.sqrt(self.se**2 + self.texts.sum(axis=-1)))

    def margin(self, together: int = 1) -> Array:
        """Half the 95% interval: of each on its own, or of as many `together` (Šidák, 1967)."""
        return text_error.margin(self.se**2, self.df, self.texts, CONFIDENCE ** (1 / max(1, together)))

    def interval(self, together: int = 1) -> tuple[Array, Array]:
        """(low, high)."""
        margin = self.margin(together)
        return self.effect - margin, self.effect + margin

    @property
    def p(self) -> Array:
        """At which half an interval would be as wide as the effect is large."""
        size = np.abs(self.effect)
        ratio = np.divide(size, self.se, out=np.where(size > 0, np.inf, 0.0), where=self.se > 0)
        p = 2 * np.asarray(stats.t.sf(ratio, self.df))
        if self.texts.any():
            low, high = np.log(np.maximum(p, 1e-300)), np.zeros_like(p)
            for _ in range(40):  # the text only widens intervals, so the seeds' p is a lower bound
                middle = (low + high) / 2
                wider = text_error.margin(self.se**2, self.df, self.texts, 1 - np.exp(middle)) > size
                low, high = np.where(wider, middle, low), np.where(wider, high, middle)
            p = np.exp(high)
        return np.where(np.isnan(self.se), np.nan, p)


def estimates(fit: Fit, weights: Array) -> Estimates:
    """The functions of the parameters whose weights are the rows of `weights`, with cluster-robust standard errors.

    CR2 and its degrees of freedom under equal, independent noise (Bell and McCaffrey, 2002; Pustejovsky and Tipton, 2018,
    Small-sample methods for cluster-robust variance estimation, equations 3 to 11). The clusters are the seeds of a source.
    Seeds that all cells share make it Student's t over the effects within each seed; where no two experiments share a seed it
    is HC2. What leaves no residual of its own, such as a cell with one experiment, is taken to be as noisy as the rest of the
    estimate; without an estimate of half of the noise there is none. Margins and p contain the error of a finite text, too.
    """
    m, p = len(weights), fit.span.shape[1]
    clusters = len(fit.clusters)
    most = max(1, MOST_NUMBERS // max(1, clusters * p))
    if m > most:
        parts = [estimates(fit, weights[start : start + most]) for start in range(0, m, most)]
        return Estimates(
            *(np.concatenate([getattr(part, name) for part in parts]) for name in ("effect", "se", "df", "texts"))
        )
    combined = weights @ fit.inverse  # what each experiment's loss counts
    scores, sizes, shadows = np.zeros((m, clusters)), np.zeros((m, clusters)), np.zeros((m, clusters, p))
    for cluster, (rows, sides, leverages) in enumerate(fit.clusters):
        left = 1 - leverages
        factor = np.where(left > TOLERANCE, 1 / np.sqrt(np.maximum(left, TOLERANCE)), 0.0)
        adjusted = combined[:, rows] + (combined[:, rows] @ sides * (factor - 1)) @ sides.T
        scores[:, cluster] = adjusted @ fit.residuals[rows]
        sizes[:, cluster] = (adjusted**2).sum(axis=1)
        shadows[:, cluster] = adjusted @ fit.span[rows]
    # residuals are what the fit's projection leaves: the scores' covariance under noise of variance 1 is diag(sizes) - S S'
    overlap = shadows @ shadows.transpose(0, 2, 1) if clusters <= p else shadows.transpose(0, 2, 1) @ shadows
    own = (shadows**2).sum(axis=2)
    trace = (sizes - own).sum(axis=1)
    squares = (sizes**2).sum(axis=1) - 2 * (sizes * own).sum(axis=1) + (overlap**2).sum(axis=(1, 2))
    wanted = (combined**2).sum(axis=1)
    seen = (trace > wanted / 2) & (squares > 0)
    ratio = np.divide(wanted, trace, out=np.full(m, np.nan), where=seen)
    df = np.divide(trace**2, squares, out=np.full(m, np.nan), where=seen)
    texts = fit.design.text.of_contrasts(fit.design.names, combined)
    return Estimates(combined @ fit.design.y, np.sqrt((scores**2).sum(axis=1) * ratio), df, texts)


# --- the model


@dataclass(frozen=True)
class Noise:
    """The noise of one experiment, without what its block shares."""

    sd: float  # NaN without an estimate
    df: float
    explanation: str  # of every interval


def judged(design: Design) -> tuple[Fit, Noise]:
    """The model that the design supports, and its noise."""
    if design.n < 2:
        why = "One experiment shows no noise." if design.n else "There is no experiment to compare."
        return fit_design(design, 2), _none(why)
    pure, seeds = _replicate_df(design), design.seed_count
    if design.complete and not design.numbers and pure >= max(1, design.cell_count // 2):
        fit = fit_design(design, len(design.factors))
    else:
        fit = fit_design(design, 2)
        if seeds > 1 and fit.residual_df < ENOUGH and not (pure and fit.residual_df):
            fewer = fit_design(design, 1)
            fit = fewer if fewer.residual_df >= ENOUGH_WITHOUT_INTERACTIONS else fit
    if seeds == 1:
        seed = value_text(design.table["seed"].iloc[0])
        why = f"All experiments have seed {seed}: nothing shows what another seed would change, so there are no intervals."
        return fit, _none(f"{why} Run each cell with more seeds.")
    if fit.residual_df < (1 if pure else ENOUGH_WITHOUT_INTERACTIONS):
        size = f"{counted(design.n, 'experiment')} in {counted(design.cell_count, 'cell')}"
        why = f"{size} are too few to estimate the noise: there are no intervals. Run each cell with more seeds."
        return fit, _none(why)
    return fit, Noise(fit.sd, fit.residual_df, " ".join([_explanation(fit), *_unequal(fit)]))


def _none(why: str) -> Noise:
    return Noise(math.nan, math.nan, why)


def _replicate_df(design: Design) -> int:
    """Degrees of freedom of the differences between experiments of one cell, without what blocks share."""
    if design.blocks is None:
        return design.n - design.cell_count
    indicator = (design.blocks[:, None] == np.arange(1, design.blocks.max() + 1)).astype(float)
    within = indicator - group_means(indicator, design.cells)[design.cells]
    return design.n - design.cell_count - int(np.linalg.matrix_rank(within))


def _explanation(fit: Fit) -> str:
    design, seeds, n = fit.design, fit.design.seed_count, f"n = {fit.design.n}"
    shared, unknown = seeds < design.n, not design.table["seed"].map(known).any()
    judged_by = f"how the {seeds} seeds disagree" if shared else "what differs between experiments of other seeds"
    if unknown:
        judged_by = "what differs between experiments, whose seeds are not known"
    robust = "cluster-robust" if shared else "heteroskedasticity-robust"
    if design.cell_count == 1:
        return f"The interval of the mean rests on {judged_by} ({n}; {robust} standard errors)."
    if fit.of_cells:
        model = f"Effects are differences of the means of {counted(design.cell_count, 'cell')}, all with equal weight"
    else:
        terms, nil = "Main effects alone", "two"
        if fit.order == 2:
            terms, nil = "Main effects and two-way interactions", "three"
        model = f"{terms} are fitted by least squares, which takes interactions of {nil} and more factors to be nil"
    if design.balanced and design.blocks is not None:
        noise = (
            f"Each is computed within each of the {seeds} seeds, and its interval is Student's over these {seeds} values "
            f"({n}, {counted(seeds - 1, 'degree')} of freedom)"
        )
    else:
        noise = f"Their intervals rest on {judged_by} ({n}; {robust} standard errors)"
    limits = ""
    if unknown:
        limits = " If all have one seed, as nanoGPT's trainings do, what another would change is in no interval."
    elif seeds == 2:
        limits = " Two seeds can tell next to nothing: with one degree of freedom, intervals are very wide."
    return (
        f"{model}. {noise}: the noise may differ from cell to cell, and a seed may do better with some settings than with "
        f"others.{limits}"
    )


# --- unequal noise


def _unequal(fit: Fit) -> list[str]:
    """A sentence where the spread over seeds goes with a factor's level.

    The test is an analysis of variance of the logarithm of each cell's spread, at 95% for all factors (Bartlett and Kendall, 1946).
    """
    design = fit.design
    counts = np.bincount(design.cells)
    if not fit.of_cells or counts.min() < 2 or not design.factors:
        return []
    spread = np.sqrt(np.bincount(design.cells, weights=fit.residuals**2) / (counts - 1))
    if spread.min() <= TOLERANCE * np.abs(design.y).max():
        return []
    first = np.unique(design.cells, return_index=True)[1]
    tests = []
    for factor in design.factors:
        groups = [np.log(spread[factor.codes[first] == level]) for level in range(len(factor.levels))]
        if min(map(len, groups)) > 1:
            sizes = [math.exp(group.mean()) for group in groups]
            tests.append((float(stats.f_oneway(*groups).pvalue), factor, sizes))
    p, factor, sizes = min(tests, key=lambda test: test[0], default=(1.0, design.factors[0], [1.0]))
    if p >= 1 - CONFIDENCE ** (1 / max(1, len(tests))):
        return []
    low, high = int(np.argmin(sizes)), int(np.argmax(sizes))
    return [
        f"The noise is not equal: its standard deviation is about {digits(sizes[low])} at {factor.name} "
        f"{value_text(factor.levels[low])} and {digits(sizes[high])} at {value_text(factor.levels[high])} (p = {p:.2g}), which "
        "the intervals allow for."
    ]
