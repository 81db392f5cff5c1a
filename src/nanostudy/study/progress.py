"""How far a study is: what each worker has in hand, what is left, and how long that will take."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol

from nanostudy.study.plan import makespan
from nanostudy.study.store import Row, StackRow
from nanostudy.training.machine import Machine
from nanostudy.training.recorder import Recorder


@dataclass
class Assignment:
    """What a worker has in assignment."""

    label: str
    members: tuple[str, ...]
    stack: StackRow | None  # None: samples
    machine: Machine | None = None
    recorders: dict[str, Recorder] = field(default_factory=dict)
    saving: bool = False
    notes: set[str] = field(default_factory=set)  # told
    steps: dict[str, int] = field(default_factory=dict)
    rates: dict[str, float] = field(default_factory=dict)  # tokens per second
    seconds_left: float | None = None
    told_at: float = 0.0  # when seconds_left was told

    def left(self) -> float | None:
        return None if self.seconds_left is None else max(0.0, self.seconds_left - (time.monotonic() - self.told_at))


@dataclass(frozen=True)
class Snapshot:
    """How the study stands."""

    counts: dict[str, int]  # of the chosen experiments, by status
    workers: dict[int, Assignment]
    best: Row | None
    seconds_left: float | None
    share: float  # of the arithmetic of the chosen experiments


class Listener(Protocol):
    def say(self, text: str, style: str = "") -> None: ...

    def show(self, snapshot: Snapshot) -> None: ...


def seconds_left(
    assignments: Sequence[tuple[Assignment, float]], queued: Sequence[float], workers: int
) -> float | None:
    """At the rate of what is under way; None until something was measured. With what is in hand, and for each stack that
    waits, the arithmetic that it still needs."""
    begun, rates = [], []
    for assignment, left in assignments:
        seconds = assignment.left()
        if assignment.stack and seconds is None:
            return None
        begun.append(seconds or 0.0)
        if assignment.stack and seconds and left:
            rates.append(left / seconds)
    if queued and not rates:
        return None
    rate = sum(rates) / len(rates) if rates else 1.0
    return makespan([left / rate for left in queued], workers, begun)
