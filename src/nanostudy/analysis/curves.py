"""What a training curve shows: pure functions over the rows of evaluations.csv and training.csv.

Losses are in nats per token, steps in updates. Evaluations come in order of their steps and with finite losses: `finite`
sees to that. The improvement of a run is the validation loss of its first evaluation less the lowest one.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean, median

from nanostudy.settings import Experiment

PLATEAU_SHARE = 0.01  # of the improvement: at most what is left to gain on a plateau
PLATEAU_LENGTH = 0.2  # of the updates: at least what comes after the beginning of a plateau
OVERFITTING_RISE = 0.01  # of the lowest validation loss: how far above it a run ends that is said to overfit
SPIKE_FACTOR, SPIKE_WINDOW, SPIKE_HISTORY = 5.0, 50, 10  # times the median of the rows before; their most, their least
MOST_STEPS = 10  # that a sentence lists

Row = Mapping[str, float]


def finite(rows: Sequence[Row], *columns: str) -> list[Row]:
    """The rows whose values in these columns are all finite."""
    return [row for row in rows if all(math.isfinite(row[column]) for column in columns)]


def best(evaluations: Sequence[Row]) -> Row:
    """The evaluation with the lowest validation loss; the first where several have it."""
    return min(evaluations, key=lambda row: row["val_loss"])


def improvement(evaluations: Sequence[Row]) -> float:
    """Nats per token; 0 where the validation loss never fell below its first value."""
    return evaluations[0]["val_loss"] - best(evaluations)["val_loss"] if evaluations else 0.0


def reached(evaluations: Sequence[Row], share: float) -> int | None:
    """The first evaluated step by which at least this share of the improvement was made; None without improvement."""
    total = improvement(evaluations)
    if total <= 0:
        return None
    lowest = best(evaluations)["val_loss"]
    return next(int(row["step"]) for row in evaluations if row["val_loss"] - lowest <= (1 - share) * total)


def plateau(evaluations: Sequence[Row]) -> int | None:
    """Where the plateau begins: the first evaluated step by which 99% of the improvement was made (PLATEAU_SHARE).

    None where less than a fifth of the updates came after it (PLATEAU_LENGTH): the loss was still falling, for all that
    one can tell, or the little that was left is all that so few updates would bring. None, too, without improvement.
    """
    flat = reached(evaluations, 1 - PLATEAU_SHARE)
    if flat is None or _after(evaluations, flat) < PLATEAU_LENGTH:
        return None
    return flat


def _after(evaluations: Sequence[Row], start: int) -> float:
    """The share of the evaluated updates that came after `start`."""
    first, last = evaluations[0]["step"], evaluations[-1]["step"]
    return (last - start) / (last - first) if last > first else 0.0


def gap(evaluation: Row) -> float:
    """Validation loss less training loss."""
    return evaluation["val_loss"] - evaluation["train_loss"]


@dataclass(frozen=True)
class Overfitting:
    since: int  # the step of the lowest validation loss
    rise: float  # of the validation loss from there to the end, nats per token
    fall: float  # of the training loss over the same updates


def overfitting(evaluations: Sequence[Row]) -> Overfitting | None:
    """Where the validation loss ends more than 1% above its lowest value (OVERFITTING_RISE), the training loss lower.

    None where that is not so.
    """
    if not evaluations:
        return None
    lowest, last = best(evaluations), evaluations[-1]
    rise, fall = last["val_loss"] - lowest["val_loss"], lowest["train_loss"] - last["train_loss"]
    if rise <= OVERFITTING_RISE * lowest["val_loss"] or fall <= 0:
        return None
    return Overfitting(int(lowest["step"]), rise, fall)


@dataclass(frozen=True)
class GradientNorms:
    """Of the logged updates, before clipping."""

    rows: int  # with a finite norm
    median: float
    largest: float
    largest_step: int
    spikes: tuple[int, ...]  # steps
    not_finite: int  # rows


def gradient_norms(training: Sequence[Row]) -> GradientNorms | None:
    """A spike is a norm above 5 times the median of the (10 to 50) rows before it. None without a finite norm."""
    rows = finite(training, "grad_norm")
    if not rows:
        return None
    norms = [row["grad_norm"] for row in rows]
    spikes = [
        int(row["step"])
        for i, row in enumerate(rows)
        if i >= SPIKE_HISTORY and norms[i] > SPIKE_FACTOR * median(norms[max(0, i - SPIKE_WINDOW) : i])
    ]
    top = max(rows, key=lambda row: row["grad_norm"])
    return GradientNorms(
        len(rows), median(norms), top["grad_norm"], int(top["step"]), tuple(spikes), len(training) - len(rows)
    )


def median_speed(training: Sequence[Row]) -> tuple[float, int] | None:
    """(median tokens per second, its rows) over the rows where it was measured, or None."""
    speeds = [row["tokens_per_second"] for row in finite(training, "tokens_per_second") if row["tokens_per_second"] > 0]
    return (median(speeds), len(speeds)) if speeds else None


def binned(rows: Sequence[Row], most: int) -> tuple[list[Row], int]:
    """(at most `most` rows, rows a bin): each column's mean over bins of equal size; the last may be smaller."""
    size = max(1, math.ceil(len(rows) / most))
    bins = (rows[i : i + size] for i in range(0, len(rows), size))
    return [{column: fmean(row[column] for row in group) for column in group[0]} for group in bins], size


# --- in words


def observations(
    evaluations: Sequence[Row],
    training: Sequence[Row],
    experiment: Experiment,
    entropy: float | None = None,
    characters_per_token: float = 1.0,
) -> list[str]:
    """Sentences, each from the numbers alone. `entropy` is the validation text's, in nats per token."""
    if not evaluations:
        told = ["No evaluation was recorded, so nothing can be said of the losses."]
    elif len(evaluations) == 1:
        told = ["One evaluation is no curve: how the loss fell cannot be said.", _gaps(evaluations)]
    else:
        told = [*_fall(evaluations), _end(evaluations), _gaps(evaluations)]
    if evaluations and entropy is not None:
        apart = above_entropy(best(evaluations), entropy, characters_per_token)
        why = "Evaluation windows begin without context, so that even a perfect model would stay a little above it."
        told.append(f"The lowest validation loss is {apart}. {why}")
    return [*told, *_rates(training, experiment), *_norms(training, experiment)]


def course(evaluations: Sequence[Row]) -> str:
    first, last = evaluations[0], evaluations[-1]
    if first is last:
        return f"The one evaluation, at update {step(first)}, found {losses(first)}."
    val, train = (f"{first[split]:.4f} to {last[split]:.4f}" for split in ("val_loss", "train_loss"))
    bits = f"{last['val_bits_per_character']:.4f} bits per character"
    return f"The validation loss went from {val} nats per token ({bits}), the training loss from {train}."


def losses(row: Row) -> str:
    bits = f"{row['val_bits_per_character']:.4f} and {row['train_bits_per_character']:.4f} bits per character"
    return f"validation {row['val_loss']:.4f}, training {row['train_loss']:.4f} nats per token ({bits})"


def above_entropy(row: Row, entropy: float, characters_per_token: float) -> str:
    apart = (row["val_loss"] - entropy) / characters_per_token
    side, known = "above" if apart >= 0 else "below", entropy / characters_per_token
    return f"{abs(apart):.4f} nats per character {side} the entropy of the validation text, {known:.4f}"


def difference(value: float) -> str:
    """Four decimals, and no minus before a zero."""
    return f"{round(value, 4) + 0.0:.4f}"


def step(row: Row) -> str:
    return f"{int(row['step']):,}"


def _fall(evaluations: Sequence[Row]) -> list[str]:
    half, most, flat = (reached(evaluations, share) for share in (0.5, 0.9, 1 - PLATEAU_SHARE))
    if half is None or most is None or flat is None:
        return ["The validation loss never fell below its first value."]
    fall = (
        f"The validation loss fell by {improvement(evaluations):.4f} nats per token to its lowest value. The first "
        f"evaluation to find half of that fall done was at update {half:,}, and 90% at update {most:,}."
    )
    length, left = f"{_after(evaluations, flat):.0%} of the run", f"at most {PLATEAU_SHARE:.0%} of the fall was left"
    if plateau(evaluations) is not None:
        return [fall, f"The plateau begins at update {flat:,}: from there on, {length}, {left}."]
    bound = f"a plateau takes {PLATEAU_LENGTH:.0%}"
    return [fall, f"No plateau was reached: {left} only from update {flat:,} on, {length}, and {bound}."]


def _end(evaluations: Sequence[Row]) -> str:
    """Whether the last loss is the lowest, and if not, why."""
    lowest, last = best(evaluations), evaluations[-1]
    if lowest is last:
        return f"The lowest validation loss is the last one, at update {step(last)}: it has not begun to rise."
    rise, over = difference(last["val_loss"] - lowest["val_loss"]), overfitting(evaluations)
    told = f"The validation loss was lowest at update {step(lowest)}, and {rise} nats per token higher at the last one"
    if over:
        return f"{told}, while the training loss fell by {over.fall:.4f}: it overfits from update {over.since:,} on."
    bound = f"a rise of more than {OVERFITTING_RISE:.0%} of the lowest loss while the training loss falls"
    return f"{told}. That is not called overfitting here, which takes {bound}."


def _gaps(evaluations: Sequence[Row]) -> str:
    lowest, last = best(evaluations), evaluations[-1]
    told = f"The gap, validation less training loss, is {difference(gap(last))} nats per token at update {step(last)}"
    return told + ("." if lowest is last else f", and was {difference(gap(lowest))} at the lowest validation loss.")


def _rates(training: Sequence[Row], e: Experiment) -> list[str]:
    if not training:
        return []
    rates, last = [row["learning_rate"] for row in training], int(training[-1]["step"])
    told = f"The learning rate in the log goes from {rates[0]:.3g} to {rates[-1]:.3g}; its highest is {max(rates):.3g}."
    if e.decay_lr and last < e.warmup_iters:
        told += f" The log ends at update {last:,}, inside the warm-up of {e.warmup_iters:,}, below the full rate."
    return [told]


def _norms(training: Sequence[Row], e: Experiment) -> list[str]:
    norms = gradient_norms(training)
    if norms is None:
        return ["No finite gradient norm was logged."] if training else []
    told = [
        f"The gradient's norm before clipping had a median of {norms.median:.3g} over the logged updates "
        f"({norms.rows:,}) and was largest, {norms.largest:.3g}, at update {norms.largest_step:,}."
    ]
    if e.grad_clip:
        clipped = sum(row["grad_norm"] > e.grad_clip for row in finite(training, "grad_norm"))
        told.append(f"It was clipped to {e.grad_clip:g} in {clipped / norms.rows:.0%} of them.")
    meant = f"norms above {SPIKE_FACTOR:g} times the median of the {SPIKE_WINDOW} logged before"
    shown = ", ".join(f"{spike:,}" for spike in norms.spikes[:MOST_STEPS])
    more = f" and {len(norms.spikes) - MOST_STEPS:,} more" if len(norms.spikes) > MOST_STEPS else ""
    told.append(f"Spikes, {meant}: {f'at updates {shown}{more}' if shown else 'none'}.")
    if norms.not_finite:
        told.append(f"Logged updates whose gradient was not finite: {norms.not_finite:,}.")
    return [" ".join(told)]
