"""The error of a finite text: by how much a loss, a difference of losses or a gap would change on another text of the kind.

The losses of single windows (window_losses.safetensors) vary along a text, from word to word and from scene to scene. Their slow
waves decide how far the mean lies from that of a longer text: the long-run variance is estimated from the first COSINES cosines
over the text's length, with Student's t at as many degrees of freedom (equal-weighted cosines: Müller, 2007; Lazarus, Lewis, Stock
and Watson, 2018, HAR inference). A block bootstrap with blocks of a fourteenth of the text gives the same standard errors.

The waves of two experiments that read the same text are subtracted wave by wave: differences are paired, whatever the windows'
lengths. What the text does not show is in no interval: how far other texts differ from all passages of this one.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd

from nanostudy.analysis.frames import AT_CONTEXT, Results, known
from nanostudy.analysis.intervals import CONFIDENCE, student
from nanostudy.errors import NanostudyError
from nanostudy.text import counted
from nanostudy.training.window_losses import WINDOW_LOSSES, Windows, name_at, read_window_losses

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

    def of_contrasts(self, names: Sequence[str], weights: Array) -> Array:
        """The variances (contrasts, splits) of weighted sums, (contrasts, experiments), of the losses of these experiments.

        Nothing is counted for experiments whose windows are not known.
        """
        if not self.waves:
            return np.zeros((len(weights), 1))
        shape = next(iter(self.waves.values())).shape
        each = np.array([self.waves.get(name, np.zeros(shape)) for name in names]).reshape(-1, *shape)
        return np.square(np.tensordot(weights, each, axes=1)).mean(axis=-1)


def margin(seeds: Array | float, df: Array | float, texts: Array, confidence: Array | float = CONFIDENCE) -> Array:
    """Half an interval that contains the error from seeds, a variance with its `df`, and from texts, one in each of the last axis.

    The root of the sum of squares of the single margins: never narrower than one of them, as a pooled t may be with few seeds
    (Howe, 1974; Zou and Donner, 2008, Construction of confidence limits, equation 8).
    """
    of_seeds, of_texts = (student(freedom, confidence) ** 2 for freedom in (df, COSINES))
    return np.asarray(np.sqrt(of_seeds * seeds + of_texts * texts.sum(axis=-1)))


def text_errors(results: Results, by: str = "val_loss", names: Sequence[str] | None = None) -> TextErrors:
    """Of the finished experiments, or of these. `by` is a loss, "gap", or a loss at a fixed context."""
    finished = results.finished if names is None else results.finished.loc[list(names)]
    if finished["corpus_sha256"].nunique() > 1:
        return TextErrors({}, "The experiments read different texts, so no error of the text is in the intervals.")
    waves: dict[str, Array] = {}
    for name, folder in finished["folder"].items():
        each = _waves(Path(folder), by) if known(folder) else None
        if each is not None:
            waves[str(name)] = each
    missing = len(finished) - len(waves)
    if missing:
        which = "any" if missing == len(finished) else f"{missing:,} of {counted(len(finished), 'experiment')}"
        return TextErrors(waves, f"The losses of single windows are not known of {which}: {LEFT_OUT}")
    return TextErrors(waves, CONTAINED)


def _waves(folder: Path, by: str) -> Array | None:
    """None where the windows are not known, or too few."""
    try:
        changed = (folder / WINDOW_LOSSES).stat().st_mtime_ns
    except OSError:
        return None
    return _waves_read(folder, by, changed)


@functools.lru_cache(maxsize=2**16)
def _waves_read(folder: Path, by: str, changed: int) -> Array | None:
    """Read once for all figures of a page. A damaged file, which the results' notes name, counts as none."""
    try:
        there = read_window_losses(folder)
    except NanostudyError:
        return None
    if by.startswith(AT_CONTEXT):
        context = int(by.removeprefix(AT_CONTEXT))
        own = {"val": 1.0} if "val" in there and there["val"].context == context else {name_at(context): 1.0}
    else:
        own = SPLITS.get(by, {"": 1.0})  # other measures have no windows
    if not all(split in there and len(there[split].losses) >= FEWEST for split in own):
        return None
    return np.stack([sign * waves_of(there[split]) for split, sign in own.items()])


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
    errors, table = text_errors(results, by), results.finished[[by]].rename(columns={by: "value"})
    variances = {name: float(np.square(waves).mean(axis=-1).sum()) for name, waves in errors.waves.items()}
    texts = np.array([variances.get(str(name), math.nan) for name in table.index])
    half = margin(0.0, 1, texts[:, None])
    table = table.assign(se=np.sqrt(texts), low=table["value"] - half, high=table["value"] + half)
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
    half = float(margin(of_seeds, max(1, n - 1), errors.of_contrasts(names, np.full((1, n), read / n)))[0])
    about = " and ".join(["seeds"] * (n > 1) + ["texts like this one"] * read)
    return Estimate(mean, mean - half, mean + half, n, about)


def difference(results: Results, first: str, second: str, by: str = "val_loss") -> tuple[float, float, float]:
    """(difference, low, high) of two experiments by name, paired by text; the 95% interval holds no seed. NaN where unknown."""
    errors, values = text_errors(results, by, [first, second]), results.finished[by]
    value = float(values[first]) - float(values[second])
    if len(errors.waves) < 2:
        return value, math.nan, math.nan
    half = float(margin(0.0, 1, errors.of_contrasts([first, second], np.array([[1.0, -1.0]])))[0])
    return value, value - half, value + half
