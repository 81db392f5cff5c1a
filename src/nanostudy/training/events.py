"""What a training tells as it goes. The trainer yields these; it knows nothing of who listens."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class Event:
    name: str  # of the experiment


@dataclass(frozen=True)
class Started(Event):
    """The experiment took a slot. After a resume, `step` updates and the evaluation at `evaluated_at` stand."""

    step: int
    evaluated_at: int  # -1: none yet
    members: int  # that train in this stack, this one included
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Progress(Event):
    """At most twice a second. `seconds_left` is for the whole stack, evaluations included; None until measured."""

    step: int
    seconds_left: float | None


@dataclass(frozen=True)
class Logged(Event):
    """One update: the loss of its batches (dropout on) before it, the rate it used, the norm before clipping."""

    step: int  # updates done, this one included
    loss: float
    learning_rate: float
    grad_norm: float
    tokens_per_second: float  # of this experiment, since the last such event, evaluations left out


@dataclass(frozen=True)
class Evaluated(Event):
    step: int
    tokens: int  # seen in training so far
    seconds: float  # of this sitting and those before, evaluations included
    train_loss: float  # nats per token, over fixed windows
    val_loss: float


@dataclass(frozen=True)
class Saving(Event):
    """The stack's checkpoint is about to be written. What was told before will not be told again once it is: whoever
    listens has it on disk before asking for the next event.
    """

    step: int


@dataclass(frozen=True)
class Stopped(Event):
    """Asked to stop; saved."""

    step: int


@dataclass(frozen=True)
class Finished(Event):
    """The experiment left its slot: all updates done, or diverged. Weights are fp32 (1, P), on the CPU."""

    updates: int
    skipped: int  # batches whose gradient overflowed in fp16
    tokens: int
    seconds: float
    diverged: str | None  # the reason
    best_step: int
    context_losses: dict[int, float]  # validation loss of the last weights at fixed contexts
    last_weights: Tensor
    best_weights: Tensor
    moments: Tensor | None = None  # AdamW's averages of gradients and of their squares, fp32 (2, P); where asked for
