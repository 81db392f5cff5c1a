"""The events of a training. The trainer yields them and knows nothing about its listeners."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

from nanostudy.result import Result
from nanostudy.training.window_losses import Windows


@dataclass(frozen=True)
class Event:
    name: str  # of the experiment


@dataclass(frozen=True)
class Started(Event):
    """The experiment took a slot. After a resume it has `step` updates, and its last evaluation was at `evaluated_at`."""

    step: int
    evaluated_at: int  # -1: none yet
    members: int  # members of the stack, this one included
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Progress(Event):
    """At most twice a second, and as an evaluation begins. `seconds_left` is for the whole stack, evaluations included.

    `loss` is that of one update's batches (with dropout), of the last update that was looked at. What is not measured yet is None.
    """

    step: int
    seconds_left: float | None
    loss: float | None = None
    learning_rate: float | None = None
    evaluating: bool = False


@dataclass(frozen=True)
class Logged(Event):
    """One update: the loss of its batches before it (with dropout), its learning rate, the gradient norm before clipping."""

    step: int  # updates so far, this one included
    loss: float
    learning_rate: float
    grad_norm: float
    tokens_per_second: float  # of this experiment since the last Logged event, without evaluations


@dataclass(frozen=True)
class Evaluated(Event):
    step: int
    tokens: int  # trained on so far
    seconds: float  # over all sessions, evaluations included
    train_loss: float  # nats per token, over fixed windows of the training split
    val_loss: float  # nats per token, over the validation split
    windows: Mapping[str, Windows] = field(default_factory=dict)  # "train" and "val", of the last evaluation


@dataclass(frozen=True)
class Saving(Event):
    """The stack's checkpoint is about to be written, after which no earlier event is repeated. A listener writes those events to
    disk before it asks for the next one.
    """

    step: int


@dataclass(frozen=True)
class Stopped(Event):
    """The training stopped on request; everything is saved."""

    step: int


@dataclass(frozen=True)
class Finished(Event):
    """The experiment left its slot: it made all updates, or diverged. Weights are fp32 (1, P), on the CPU."""

    result: Result
    last_weights: Tensor
    best_weights: Tensor
    moments: Tensor | None = None  # AdamW's exp_avg and exp_avg_sq, fp32 (2, P); on request
    # of the evaluations at the end: other contexts, and "test"
    windows: Mapping[str, Windows] = field(default_factory=dict)
