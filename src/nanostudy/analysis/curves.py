"""What training curves show: overfitting, plateaus and gradient norms, of one run and of all runs of a study.

Losses are in nats per token, steps in updates. A row is a line of evaluations.csv or training.csv. Evaluations come in the order
of their steps and with finite losses, which `finite` makes sure of. The improvement of a run is the validation loss of its first
evaluation less the lowest one.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean, median
from typing import Any

import pandas as pd

from nanostudy.analysis.frames import Results
from nanostudy.settings import Experiment
from nanostudy.text import listed

PLATEAU_SHARE = 0.01  # share of the improvement that is left on a plateau, at most
PLATEAU_LENGTH = 0.2  # share of the updates that come after a plateau begins, at least
OVERFITTING_RISE = 0.01  # a run overfits where it ends this much above its lowest validation loss (relative)
SPIKE_FACTOR, SPIKE_WINDOW, SPIKE_HISTORY = 5.0, 50, 10  # times the median of the rows before: at most 50, at least 10
MOST_STEPS = 10  # in a sentence

Row = Mapping[str, float]


def finite(rows: Sequence[Row], *columns: str) -> list[Row]:
    """The rows whose values in these columns are all finite."""
    return [row for row in rows if all(math.isfinite(row[column]) for column in columns)]


def best(evaluations: Sequence[Row]) -> Row:
    """The evaluation with the lowest validation loss; the first of several."""
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

    None where less than a fifth of the updates came after it (PLATEAU_LENGTH): the loss may still have been falling, or the
    little that was left is all that so few updates would bring. None, too, without improvement.
    """
    flat = reached(evaluations, 1 - PLATEAU_SHARE)
    return None if flat is None or _share_after(evaluations, flat) < PLATEAU_LENGTH else flat


def _share_after(evaluations: Sequence[Row], start: int) -> float:
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


def find_overfitting(evaluations: Sequence[Row]) -> Overfitting | None:
    """A validation loss that ends more than 1% above its lowest value (OVERFITTING_RISE) with a lower training loss, or None."""
    if not evaluations:
        return None
    lowest, last = best(evaluations), evaluations[-1]
    rise, fall = last["val_loss"] - lowest["val_loss"], lowest["train_loss"] - last["train_loss"]
    if rise <= OVERFITTING_RISE * lowest["val_loss"] or fall <= 0:
        return None
    return Overfitting(int(lowest["step"]), rise, fall)


@dataclass(frozen=True)
class GradientNorms:
    """The norms of the logged updates, before clipping."""

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
    """(at most `most` rows, rows per bin): each column's mean over bins of equal size; the last may be smaller."""
    size = max(1, math.ceil(len(rows) / most))
    bins = (rows[i : i + size] for i in range(0, len(rows), size))
    return [{column: fmean(row[column] for row in group) for column in group[0]} for group in bins], size


# --- all runs of a study


def overfitting(results: Results) -> pd.DataFrame:
    """name, best_step, last_step, best_val_loss, val_loss, rise (from the best evaluation to the last), overfits.

    `overfits` is that of `find_overfitting`; NA where it cannot be judged: without a curve, and where the training diverged or has
    not ended. Experiments without a curve have what their last and best losses say; those without a loss are left out.
    """
    curves = rows_by_name(results.evaluations)
    rows: list[tuple[object, ...]] = []
    for name, one in results.experiments.iterrows():
        points = finite(curves.get(str(name), []), "train_loss", "val_loss")
        if points:
            lowest, last = best(points), points[-1]
            ends = (lowest["step"], last["step"], lowest["val_loss"], last["val_loss"])
            over = find_overfitting(points) is not None if one["status"] == "finished" else pd.NA
            rows.append((name, *ends, ends[3] - ends[2], over))
        elif math.isfinite(one["val_loss"]):
            ends = (one["best_step"], one["updates"], one["best_val_loss"], one["val_loss"])
            rows.append((name, *ends, ends[3] - ends[2], pd.NA))
    columns = ["name", "best_step", "last_step", "best_val_loss", "val_loss", "rise", "overfits"]
    return pd.DataFrame(rows, columns=columns).astype({"overfits": "boolean"})


def stability(results: Results) -> pd.DataFrame:
    """name, median_norm, largest_norm, spikes, diverged: gradient norms before clipping; NaN and NA where none was logged."""
    logs = rows_by_name(results.training)
    rows = []
    for name, status in results.experiments["status"].items():
        if status == "waiting":
            continue
        norms = gradient_norms(logs.get(str(name), []))
        counts = (norms.median, norms.largest, len(norms.spikes)) if norms else (math.nan, math.nan, pd.NA)
        rows.append((name, *counts, status == "diverged"))
    columns = ["name", "median_norm", "largest_norm", "spikes", "diverged"]
    return pd.DataFrame(rows, columns=columns).astype({"spikes": "Int64", "diverged": bool})


def convergence(results: Results) -> pd.DataFrame:
    """name, plateau (the step where it begins, or NA), reason, of the finished experiments that have curves."""
    rows, finished = [], results.evaluations["name"].isin(results.finished.index)
    for name, evaluations in rows_by_name(results.evaluations[finished]).items():
        points = finite(evaluations, "val_loss")
        flat = plateau(points) if len(points) > 1 else None
        if len(points) < 2:
            why = "one evaluation is no curve"
        elif improvement(points) <= 0:
            why = "the validation loss never fell"
        elif flat is None:
            why = "the loss was still falling"
        else:
            why = "at most 1% of the fall was left"
        rows.append((name, pd.NA if flat is None else flat, why))
    return pd.DataFrame(rows, columns=["name", "plateau", "reason"]).astype({"plateau": "Int64"})


def rows_by_name(table: pd.DataFrame) -> dict[str, list[Any]]:
    by_name: dict[str, list[Any]] = {}
    for row in table.to_dict("records"):
        by_name.setdefault(str(row.pop("name")), []).append(row)
    return by_name


# --- one run, in words


def observations(
    evaluations: Sequence[Row],
    training: Sequence[Row],
    experiment: Experiment,
    entropy: float | None = None,
    characters_per_token: float = 1.0,
) -> list[str]:
    """Sentences about one run, from its numbers alone. `entropy` is the validation text's, in nats per token."""
    if not evaluations:
        sentences = ["No evaluation was recorded, so the losses cannot be described."]
    elif len(evaluations) == 1:
        sentences = ["One evaluation is no curve: it does not show how the loss fell.", _gaps(evaluations)]
    else:
        sentences = [*_fall(evaluations), _end(evaluations), _gaps(evaluations)]
    if evaluations and entropy is not None:
        distance = above_entropy(best(evaluations), entropy, characters_per_token)
        why = "Evaluation windows begin without context, so even a perfect model would stay a little above it."
        sentences.append(f"The lowest validation loss is {distance}. {why}")
    return [*sentences, *_learning_rates(training, experiment), *_norms(training, experiment)]


def course(evaluations: Sequence[Row]) -> str:
    first, last = evaluations[0], evaluations[-1]
    if first is last:
        return f"The only evaluation, at update {step(first)}, measured {losses(first)}."
    val, train = (f"{first[split]:.4f} to {last[split]:.4f}" for split in ("val_loss", "train_loss"))
    bits = f"{last['val_bits_per_character']:.4f} bits per character"
    return f"The validation loss went from {val} nats per token ({bits}), the training loss from {train}."


def losses(row: Row) -> str:
    bits = f"{row['val_bits_per_character']:.4f} and {row['train_bits_per_character']:.4f} bits per character"
    return f"validation {row['val_loss']:.4f}, training {row['train_loss']:.4f} nats per token ({bits})"


def above_entropy(row: Row, entropy: float, characters_per_token: float) -> str:
    distance, floor = (row["val_loss"] - entropy) / characters_per_token, entropy / characters_per_token
    side = "above" if distance >= 0 else "below"
    return f"{abs(distance):.4f} nats per character {side} the entropy of the validation text, {floor:.4f}"


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
        f"The validation loss fell by {improvement(evaluations):.4f} nats per token to its lowest value: half of that by "
        f"update {half:,}, 90% by update {most:,}, as far as evaluations show."
    )
    length = f"{_share_after(evaluations, flat):.0%} of the run"
    left = f"at most {PLATEAU_SHARE:.0%} of the fall was left"
    if plateau(evaluations) is not None:
        return [fall, f"The plateau begins at update {flat:,}: from there on, {length}, {left}."]
    bound = f"a plateau takes {PLATEAU_LENGTH:.0%}"
    return [fall, f"No plateau was reached: {left} only from update {flat:,} on, {length}, and {bound}."]


def _end(evaluations: Sequence[Row]) -> str:
    """Whether the last loss is the lowest, and if not, why."""
    lowest, last = best(evaluations), evaluations[-1]
    if lowest is last:
        return f"The lowest validation loss is the last one, at update {step(last)}: it has not begun to rise."
    rise, over = difference(last["val_loss"] - lowest["val_loss"]), find_overfitting(evaluations)
    text = f"The validation loss was lowest at update {step(lowest)}, and {rise} nats per token higher at the last one"
    if over:
        return f"{text}, while the training loss fell by {over.fall:.4f}: it overfits from update {over.since:,} on."
    bound = f"a rise of more than {OVERFITTING_RISE:.0%} of the lowest loss while the training loss falls"
    return f"{text}. That is not called overfitting here, which takes {bound}."


def _gaps(evaluations: Sequence[Row]) -> str:
    lowest, last = best(evaluations), evaluations[-1]
    text = f"The gap, validation less training loss, is {difference(gap(last))} nats per token at update {step(last)}"
    return text + ("." if lowest is last else f", and was {difference(gap(lowest))} at the lowest validation loss.")


def _learning_rates(training: Sequence[Row], e: Experiment) -> list[str]:
    if not training:
        return []
    rates, last = [row["learning_rate"] for row in training], int(training[-1]["step"])
    text = f"The logged learning rate goes from {rates[0]:.3g} to {rates[-1]:.3g}; its highest is {max(rates):.3g}."
    if e.decay_lr and last < e.warmup_iters:
        text += f" The log ends at update {last:,}, inside the warm-up of {e.warmup_iters:,}, below the full rate."
    return [text]


def _norms(training: Sequence[Row], e: Experiment) -> list[str]:
    norms = gradient_norms(training)
    if norms is None:
        return ["No finite gradient norm was logged."] if training else []
    sentences = [
        f"The gradient's norm before clipping had a median of {norms.median:.3g} over the logged updates "
        f"({norms.rows:,}) and was largest, {norms.largest:.3g}, at update {norms.largest_step:,}."
    ]
    if e.grad_clip:
        clipped = sum(row["grad_norm"] > e.grad_clip for row in finite(training, "grad_norm"))
        sentences.append(f"It was clipped to {e.grad_clip:g} in {clipped / norms.rows:.0%} of them.")
    spikes = listed([f"{spike:,}" for spike in norms.spikes], MOST_STEPS)
    definition = f"norms above {SPIKE_FACTOR:g} times the median of the {SPIKE_WINDOW} logged before"
    sentences.append(f"Spikes, {definition}: {f'at updates {spikes}' if spikes else 'none'}.")
    if norms.not_finite:
        sentences.append(f"Logged updates whose gradient was not finite: {norms.not_finite:,}.")
    return [" ".join(sentences)]
