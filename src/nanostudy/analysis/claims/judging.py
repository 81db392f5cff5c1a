"""A verdict from numbers: how far ours may lie from a published one, and what follows."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
from scipy import stats

Verdict = Literal[
    "reproduced",
    "better",
    "not reproduced",
    "contradicts itself",
    "arithmetic",  # it follows from the settings or from the source's own figures: no run tests it
    "not testable here",
    "not run",
]

# The mean loss over a window of T characters varies between windows with a standard deviation of about 1.5/sqrt(T) nats.
# Measured over 1,600 random windows of T = 64 and 128, both splits of tiny Shakespeare, three models with losses from 1.8 to
# 2.4: 1.29 to 1.76, 1.53 in the mean. (Characters are no independent draws, so it is not the spread of a character's loss.)
TOKEN_SPREAD = 1.5
# The share of the training split over which our training loss is the mean: as much as the validation split.
TRAIN_WINDOWS_SHARE = 1 / 9
NORMAL = 1.959964  # 95%, two-sided

NO_INTERVAL = "One run has no interval: the noise between seeds is not known."


@dataclass(frozen=True)
class Judgement:
    verdict: Verdict
    ours: str = ""
    n: int = 0
    low: float = math.nan  # the 95% interval of ours, where n allows one
    high: float = math.nan
    why: str = ""


def held(holds: bool) -> Verdict:
    return "reproduced" if holds else "not reproduced"


def interval(values: Sequence[float]) -> tuple[float, float, float]:
    """(mean, low, high): the 95% t interval of the mean, NaN of fewer than two values."""
    mean = float(np.mean(values))
    if len(values) < 2:
        return mean, math.nan, math.nan
    half = float(stats.t.ppf(0.975, len(values) - 1)) * float(np.std(values, ddof=1)) / math.sqrt(len(values))
    return mean, mean - half, mean + half


def compare(
    values: Sequence[float],
    published: float | Sequence[float],
    tolerance: float,
    better: Literal["lower", "higher"] | None = None,
    digits: str = ".4f",
) -> Judgement:
    """Our values, one per run, against a published number or the ends of a range.

    Reproduced where the range, widened by the tolerance, meets our interval, or holds our only value. Not testable where our mean
    lies outside and our interval is too wide to say anything. Otherwise better on the better side, and not reproduced on the other.
    """
    mean, low, high = interval(values)
    least, most = float(np.min(published)), float(np.max(published))
    reach = tolerance + (0.0 if math.isnan(low) else high - mean)
    why = "" if len(values) > 1 else NO_INTERVAL
    reproduced = Judgement("reproduced", f"{mean:{digits}}", len(values), low, high, why)
    slack = 1e-9 * max(1.0, abs(least), abs(most))  # binary fractions: 1.725 - 1.72 is a little more than 0.005
    near = least - tolerance - slack <= mean <= most + tolerance + slack
    if not near and reach - tolerance > max(3 * tolerance, 0.02 * abs(mean)):
        why = "Our runs differ so much that their interval would agree with almost anything: more seeds are needed."
        return replace(reproduced, verdict="not testable here", why=why)
    if least - reach - slack <= mean <= most + reach + slack:
        return reproduced
    side = "lower" if mean < least else "higher"
    return replace(reproduced, verdict="better" if side == better else "not reproduced")


def lower(first: Sequence[float], second: Sequence[float], digits: str = ".4f") -> Judgement:
    """Whether the first mean is lower: with two values or more on both sides, by Welch's interval of the difference."""
    means = [float(np.mean(values)) for values in (first, second)]
    ours, n = f"{means[0]:{digits}} against {means[1]:{digits}}", len(first) + len(second)
    if min(len(first), len(second)) < 2:
        return Judgement(held(means[0] < means[1]), ours, n, why=NO_INTERVAL)
    if np.std(first) + np.std(second) == 0:
        low = high = means[0] - means[1]
    else:
        between = stats.ttest_ind(first, second, equal_var=False).confidence_interval()
        low, high = float(between.low), float(between.high)
    why = "The interval is that of the difference."
    return Judgement(held(high < 0), ours, n, low, high, why)


def loss_tolerance(half_unit: float, published_tokens: float, measure: str, val_tokens: float) -> float:
    """How far a reproduced loss may lie from the published one, seeds aside: the rounding, and the evaluation noise at 95%.

    The published loss is a mean over random batches of `published_tokens` tokens in all (0: taken as exact), its standard error
    TOKEN_SPREAD / sqrt(tokens). Ours is exact for validation; for training it is the mean over `val_tokens` tokens in windows
    spread over the training split, without replacement. A gap has the noise of both of its losses.
    """
    theirs = TOKEN_SPREAD**2 / published_tokens if published_tokens else 0.0
    ours = TOKEN_SPREAD**2 / val_tokens * (1 - TRAIN_WINDOWS_SHARE) if val_tokens else 0.0
    variance = {"train_loss": theirs + ours, "gap": 2 * theirs + ours}.get(measure, theirs)
    return half_unit + NORMAL * math.sqrt(variance)


def contradiction(
    published: float | Sequence[float], half_unit: float, times: Sequence[float], over: Sequence[float]
) -> float | None:
    """What the source's own figures give, where that is outside the published range; None where they agree."""
    implied = math.prod(times) / math.prod(over)
    return None if np.min(published) - half_unit <= implied <= np.max(published) + half_unit else implied
