"""How far a study is: what each worker has in hand, what is left, and how long that will take."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from nanostudy.gpt.machine import Machine
from nanostudy.gpt.run import Recorder
from nanostudy.study.plan import makespan
from nanostudy.study.store import Row, StackRow


@dataclass
class Assignment:
    """What a worker has in hand."""

    label: str
    members: tuple[str, ...]
    stack: StackRow | None  # None: samples
    machine: Machine | None = None
    recorders: dict[str, Recorder] = field(default_factory=dict)
    saving: bool = False
    notes: set[str] = field(default_factory=set)  # told
    steps: dict[str, int] = field(default_factory=dict)
    rates: dict[str, float] = field(default_factory=dict)  # tokens a second
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
    hands: Sequence[Assignment], queued: Sequence[StackRow], left: Callable[[str], float], workers: int
) -> float | None:
    """At the rate of what is under way; None until something was measured. `left` is the arithmetic an experiment still needs."""
    begun, rates = [], []
    for hand in hands:
        seconds = hand.left()
        if hand.stack and seconds is None:
            return None
        begun.append(seconds or 0.0)
        work = sum(left(name) for name in hand.members)
        if hand.stack and seconds and work:  # the last may be done, and its stack not heard of since
            rates.append(work / seconds)
    if queued and not rates:
        return None
    rate = sum(rates) / len(rates) if rates else 1.0
    return makespan([sum(left(name) for name in stack.members) / rate for stack in queued], workers, begun)
