"""The error of a finite text: by how much a loss, a difference of losses or a gap would change on another text of the kind.

The losses of single windows (window_losses.safetensors) vary along a text, from word to word and from scene to scene. Their slow
waves decide how far the mean lies from that of a longer text: the long-run variance is estimated from the first COSINES cosines
over the text's length, with Student's t at as many degrees of freedom (equal-weighted cosines: Müller, 2007; Lazarus, Lewis, Stock
and Watson, 2018, HAR inference). A block bootstrap with blocks of a fourteenth of the text gives the same standard errors.

The waves of two experiments that read the same text are subtracted wave by wave: differences are paired, whatever the windows'
lengths. What the text does not show is in no interval: how far other texts differ from all passages of this one.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
from scipy import stats

from nanostudy.analysis.frames import AT_CONTEXT, Results, known
from nanostudy.text import counted
from nanostudy.training.window_losses import Windows, name_at, read_window_losses

COSINES = 8  # waves, from half a period over the text to four
FEWEST = 4 * COSINES  # windows
SPLITS = {"val_loss": {"val": 1.0}, "train_loss": {"train": 1.0}, "test_loss": {"test": 1.0}}
SPLITS["gap"] = {"val": 1.0, "train": -1.0}

Array = np.ndarray


@dataclass(frozen=True)
class TextErrors:
    """The waves of each experiment's loss, or gap, along the text that all of them read."""

    waves: Mapping[str, Array]  # (splits, COSINES), in nats per token: by name, of those whose windows are known
    explanation: str  # what the errors are, or why there are none

    def of(self, weights: Mapping[str, float]) -> tuple[float, float]:
        """(variance, degrees of freedom) of a weighted sum of losses; NaN where an experiment's windows are not known.

        One experiment with weight 1 is its loss; 1 and -1 are a paired difference; 1 / n each are a mean over seeds.
        """
        if not weights or any(name not in self.waves for name in weights):
            return math.nan, math.nan
        texts = self.of_contrasts(list(weights), np.array([list(weights.values())]))
        variance, df = combined(0.0, COSINES, texts)
        return float(variance[0]), float(df[0])

    def of_contrasts(self, names: Sequence[str], weights: Array) -> Array:
        """The variances (contrasts, splits) of weighted sums, (contrasts, experiments), of the losses of these experiments.

        Nothing is counted for experiments whose windows are not known.
        """
        shape = next(iter(self.waves.values())).shape if self.waves else (1, COSINES)
        each = np.stack([self.waves.get(name, np.zeros(shape)) for name in names])
        return np.square(np.tensordot(weights, each, axes=1)).mean(axis=-1)


def combined(seeds: Array | float, df: float, texts: Array) -> tuple[Array, Array]:
    """(variance, degrees of freedom) of the error from seeds, with its own `df`, and from texts, one in each of the last axis
    (Satterthwaite, 1946)."""
    variance = seeds + texts.sum(axis=-1)
    spread = np.square(seeds) / df + np.square(texts).sum(axis=-1) / COSINES
    return variance, np.divide(
        np.square(variance), spread, out=np.full(np.shape(variance), float(df)), where=spread > 0
    )


def text_errors(results: Results, by: str = "val_loss", names: Sequence[str] | None = None) -> TextErrors:
    """Of the finished experiments, or of these. `by` is a loss, "gap", or a loss at a fixed context.

    Raises NanostudyError where a file of window losses is damaged.
    """
    finished = results.finished if names is None else results.finished.loc[list(names)]
    if finished["corpus_sha256"].nunique() > 1:
        return TextErrors({}, "The experiments read different texts, so no error of the text is in the intervals.")
    waves: dict[str, Array] = {}
    for name, folder in finished["folder"].items():
        windows = _windows(Path(folder), by) if known(folder) else []
        if windows and all(len(one.losses) >= FEWEST for one, _ in windows):
            waves[str(name)] = np.stack([sign * waves_of(one) for one, sign in windows])
    missing = len(finished) - len(waves)
    if missing:
        which = "any" if missing == len(finished) else f"{missing:,} of {counted(len(finished), 'experiment')}"
        return TextErrors(waves, f"The losses of single windows are not known of {which}: {LEFT_OUT}")
    return TextErrors(waves, CONTAINED)


def _windows(folder: Path, by: str) -> list[tuple[Windows, float]]:
    """With their signs; empty where they are not known."""
    there = read_window_losses(folder)
    if by.startswith(AT_CONTEXT):
        context = int(by.removeprefix(AT_CONTEXT))
        own = {"val": 1.0} if "val" in there and there["val"].context == context else {name_at(context): 1.0}
    else:
        own = SPLITS[by]
    return [(there[split], sign) for split, sign in own.items()] if all(split in there for split in own) else []


LEFT_OUT = "the intervals leave out the error of a finite text."
CONTAINED = (
    "The intervals contain the error of a finite text, too, from the losses of single windows: what differs from passage to "
    "passage of this text, not what another author's would change."
)


def waves_of(windows: Windows) -> Array:
    """(COSINES,): each squared estimates the variance of the mean."""
    weights = windows.targets / windows.targets.sum()
    places = np.cumsum(weights) - weights / 2
    rest = windows.losses.astype(np.float64) - windows.mean
    return math.sqrt(2) * np.cos(np.pi * np.outer(np.arange(1, COSINES + 1), places)) @ (weights * rest)


def text_error(results: Results, by: str = "val_loss") -> pd.DataFrame:
    """value, se, low, high of each finished experiment: the 95% interval holds what a finite text contributes, and no seed."""
    errors = text_errors(results, by)
    rows = []
    for name, value in results.finished[by].items():
        variance, df = errors.of({str(name): 1.0})
        half = float(stats.t.ppf(0.975, df)) * math.sqrt(variance)
        rows.append((value, math.sqrt(variance), value - half, value + half))
    index = pd.Index(results.finished.index, name="name", dtype=object)
    table = pd.DataFrame(rows, columns=["value", "se", "low", "high"], index=index, dtype=float)
    table.attrs["explanation"] = errors.explanation
    return table


@dataclass(frozen=True)
class Estimate:
    """The expected value for settings: of a mean over seeds, with the 95% interval; NaN where there is none."""

    mean: float
    low: float
    high: float
    n: int  # seeds
    about: str  # what the interval is over

    @property
    def has_interval(self) -> bool:
        return not math.isnan(self.low)


def expected(results: Results, names: Sequence[str], by: str = "val_loss") -> Estimate:
    """Of experiments that differ in the seed alone: the spread of their own values and the error of the text, together."""
    values = results.finished.loc[list(names), by].to_numpy(dtype=float)
    n, mean = len(values), float(values.mean())
    errors = text_errors(results, by, names)
    read = len(errors.waves) == n
    if n == 1 and not read:
        return Estimate(mean, math.nan, math.nan, n, "")
    of_seeds = float(values.var(ddof=1)) / n if n > 1 else 0.0
    whole, df = combined(of_seeds, max(1, n - 1), errors.of_contrasts(names, np.full((1, n), read / n)))
    half = float(stats.t.ppf(0.975, df[0])) * math.sqrt(whole[0])
    about = " and ".join(["seeds"] * (n > 1) + ["texts like this one"] * read)
    return Estimate(mean, mean - half, mean + half, n, about)


def difference(results: Results, first: str, second: str, by: str = "val_loss") -> tuple[float, float, float]:
    """(difference, low, high) of two experiments by name, paired by text; the 95% interval holds no seed. NaN where unknown."""
    variance, df = text_errors(results, by).of({first: 1.0, second: -1.0})
    values = results.finished[by]
    value = float(values[first]) - float(values[second])
    half = float(stats.t.ppf(0.975, df)) * math.sqrt(variance)
    return value, value - half, value + half
