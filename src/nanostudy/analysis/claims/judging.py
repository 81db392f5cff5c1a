"""A verdict from numbers: what the noise between seeds, of evaluations and of rounding allows to be said, and what it does not."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np

from nanostudy.analysis.intervals import satterthwaite, student

Verdict = Literal[
    "reproduced",
    "better",
    "not reproduced",
    "undecided",  # the runs are there, and too few or too unlike each other to tell
    "contradicts itself",
    "arithmetic",  # it follows from the settings or from the source's own figures: no run tests it
    "not tested",  # no run tests it, or none can
]


@dataclass(frozen=True)
class Noise:
    """Of one run, between seeds, as measured elsewhere: a standard deviation, worth so many degrees of freedom."""

    sd: float
    df: float


# Seeds differ more in some settings than in others: final losses of 38 settings of small GPTs on tiny Shakespeare (16 and 6 of
# ours with 8 and 3 seeds, docs/log.md; 16 published with 4) have standard deviations of 0.002 to 0.028. Three quarters are below
# this one, so that intervals hold in noisy settings, too (tests/analysis/test_verdict_rates.py). A run's own seeds are added as in
# Smyth (2004), Linear models and empirical Bayes methods, Statistical Applications in Genetics and Molecular Biology 3.
LOSSES = Noise(0.012, 2)
# Shares of the whole fall of a loss, of 16 settings with 8 seeds: 0.002 to 0.013.
SHARES = Noise(0.01, 2)
# PyTorch's default initialisation, 12 seeds of 4/4/256; GPT-2's varies less.
INITIAL_LOSSES = Noise(0.04, 2)

# The mean loss over a window of T characters varies between windows with a standard deviation of about 1.5/sqrt(T) nats.
# Measured over 1,600 random windows of T = 64 and 128, both splits of tiny Shakespeare, three models with losses from 1.8 to
# 2.4: 1.29 to 1.76, 1.53 in the mean. (Characters are no independent draws, so it is not the spread of a character's loss.)
TOKEN_SPREAD = 1.5
# The share of the training split over which our training loss is the mean: as much as the validation split.
TRAIN_WINDOWS_SHARE = 1 / 9
NARROW = 0.03  # of the published figure: what is compared more coarsely than this cannot be called reproduced

ONE_RUN = "One run does not show the noise between seeds: more seeds are needed."
CLOSE_ONCE = "One run may be close by chance: more seeds are needed."
TOO_WIDE = "The seeds differ so much that they would agree with almost anything: more are needed."


@dataclass(frozen=True)
class Judgement:
    verdict: Verdict
    ours: str = ""
    n: int = 0
    low: float = math.nan  # the 95% interval that the verdict is judged by
    high: float = math.nan
    why: str = ""


def spread(values: Sequence[float], before: Noise | None = None) -> tuple[float, float]:
    """(variance of one run, degrees of freedom): of the values, and of what was known before. NaN and 0 where nothing is known."""
    squares = float(np.sum((np.asarray(values) - np.mean(values)) ** 2))
    df = len(values) - 1.0
    if before is not None:
        squares, df = squares + before.df * before.sd**2, df + before.df
    return (squares / df, df) if df > 0 else (math.nan, 0.0)


def interval(values: Sequence[float], before: Noise | None = None) -> tuple[float, float, float]:
    """(mean, low, high): the 95% t interval of the mean, NaN where the noise is not known."""
    mean, (variance, df) = float(np.mean(values)), spread(values, before)
    half = float(student(df)) * math.sqrt(variance / len(values)) if df else math.nan
    return mean, mean - half, mean + half


def inside(low: float, high: float, least: float = -math.inf, most: float = math.inf) -> Verdict:
    """Reproduced where the whole interval lies between the bounds, not reproduced where all of it lies outside; else undecided."""
    if least <= low and high <= most:
        return "reproduced"
    return "not reproduced" if high < least or low > most else "undecided"


def compare(
    values: Sequence[float],
    published: float | Sequence[float],
    half_unit: float,
    evaluation: float = 0.0,
    before: Noise | None = None,
    better: Literal["lower", "higher"] | None = None,
    digits: str = ".4f",
) -> Judgement:
    """Our values, one per run, against the figure of one published run, or the ends of a range.

    The interval is a prediction: the figure of another run with these settings lies in it with 95%. Its variance is that between
    seeds, once for that run and 1/n for our mean; that of the `evaluation` (a variance) and of rounding (half_unit^2 / 3); the
    degrees of freedom are Satterthwaite's. Reproduced where the figure lies inside, we have two runs or more, and the interval is
    narrow. Outside, better on the better side, and not reproduced on the other. Undecided everywhere else.
    """
    n, mean = len(values), float(np.mean(values))
    variance, df = spread(values, before)
    undecided = Judgement("undecided", f"{mean:{digits}}", n, why=ONE_RUN)
    if not df:
        return undecided
    seeds, rest = variance * (1 + 1 / n), evaluation + half_unit**2 / 3
    total = seeds + rest
    half = max(half_unit, math.sqrt(total) * float(student(df * (total / seeds) ** 2 if seeds else math.inf)))
    least, most = float(np.min(published)), float(np.max(published))
    slack = 1e-9 * max(1.0, abs(least), abs(most))  # binary fractions: 1.725 - 1.72 is a little more than 0.005
    judgement = replace(undecided, low=mean - half, high=mean + half, why="")
    if not least - half - slack <= mean <= most + half + slack:
        side = "lower" if mean < least else "higher"
        return replace(judgement, verdict="better" if side == better else "not reproduced")
    if n < 2:
        return replace(judgement, why=CLOSE_ONCE)
    narrow = max(3 * half_unit, 3 * float(student(math.inf)) * math.sqrt(rest), NARROW * max(abs(least), abs(most)))
    return replace(judgement, why=TOO_WIDE) if half > narrow else replace(judgement, verdict="reproduced")


def lower(
    first: Sequence[float], second: Sequence[float], before: Noise | None = None, digits: str = ".4f"
) -> Judgement:
    """Whether the first mean is lower, by Welch's interval of the difference; undecided where that holds 0."""
    means = [float(np.mean(values)) for values in (first, second)]
    ours, n = f"{means[0]:{digits}} against {means[1]:{digits}}", len(first) + len(second)
    sides = [(*spread(values, before), len(values)) for values in (first, second)]
    if not all(df for _, df, _ in sides):
        return Judgement("undecided", ours, n, why=ONE_RUN)
    parts = [variance / count for variance, _, count in sides]
    df = satterthwaite(parts, [df for _, df, _ in sides])
    difference, half = means[0] - means[1], float(student(df)) * math.sqrt(sum(parts))
    low, high = difference - half, difference + half
    verdict = "undecided" if low == high == 0 else inside(low, high, most=0.0)
    return Judgement(verdict, ours, n, low, high, "The interval is that of the difference.")


def evaluation_variance(published_tokens: float, measure: str, val_tokens: float) -> float:
    """Of the difference between a published loss and ours, as far as evaluations are its cause.

    The published loss is a mean over random batches of `published_tokens` tokens in all (0: taken as exact), its standard error
    TOKEN_SPREAD / sqrt(tokens). Ours is exact for validation; for training it is the mean over `val_tokens` tokens in windows
    spread over the training split, without replacement. A gap has the noise of both of its losses.
    """
    theirs = TOKEN_SPREAD**2 / published_tokens if published_tokens else 0.0
    ours = TOKEN_SPREAD**2 / val_tokens * (1 - TRAIN_WINDOWS_SHARE) if val_tokens else 0.0
    return {"train_loss": theirs + ours, "gap": 2 * theirs + ours}.get(measure, theirs)


def contradiction(
    published: float | Sequence[float], half_unit: float, times: Sequence[float], over: Sequence[float]
) -> float | None:
    """What the source's own figures give, where that is outside the published range; None where they agree."""
    implied = math.prod(times) / math.prod(over)
    return None if np.min(published) - half_unit <= implied <= np.max(published) + half_unit else implied
