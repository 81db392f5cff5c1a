"""How far a study is: what each worker does, what is left, and how long that will take."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from nanostudy.result import Result, Status, finite
from nanostudy.study.folder import StudyFolder
from nanostudy.study.plan import cost, makespan
from nanostudy.study.store import StackRow
from nanostudy.training.events import Progress
from nanostudy.training.machine import Machine
from nanostudy.training.recorder import Recorder

MOST_LOSSES, MOST_OF_ALL = 32, 4000  # of batches, that one member and a whole stack report


@dataclass
class Assignment:
    """A worker's task, and how far it is."""

    label: str
    members: tuple[str, ...]
    stack: StackRow | None  # None: it writes samples
    machine: Machine | None = None
    recorders: dict[str, Recorder] = field(default_factory=dict)
    saving: bool = False
    notes: set[str] = field(default_factory=set)  # those already printed
    progress: dict[str, Progress] = field(default_factory=dict)  # the last of each member
    rates: dict[str, float] = field(default_factory=dict)  # tokens per second
    seconds_left: float | None = None
    estimated_at: float = 0.0  # the time of seconds_left
    ahead: float | None = None  # arithmetic that was left at the first estimate
    since: float = 0.0  # the time of the first estimate

    @property
    def phase(self) -> str:
        if self.stack is None:
            return "sampling"
        if not self.progress:
            return "ending" if self.estimated_at else "starting"
        return "evaluating" if any(last.evaluating for last in self.progress.values()) else "training"

    def as_dict(self) -> dict[str, Any]:
        """For the store: `members` has what is training, with the loss of its last batches, and `losses`, the (update, loss) that its
        training.csv does not have yet, thinned.
        """
        most = max(1, min(MOST_LOSSES, MOST_OF_ALL // max(1, len(self.progress))))
        members = []
        for name, last in self.progress.items():
            rows = list(self.recorders[name].rows["training.csv"].values()) if name in self.recorders else []
            losses = [(row[0], finite(row[1])) for row in rows[:: -(-len(rows) // most) or 1]]
            figures = {"step": last.step, "loss": finite(last.loss), "learning_rate": last.learning_rate}
            members.append({"name": name, **figures, "losses": losses})
        rate = round(sum(self.rates.values()))
        return {"doing": self.label, "phase": self.phase, "tokens_per_second": rate, "members": members}

    def left(self) -> float | None:
        """Seconds from now."""
        if self.seconds_left is None:
            return None
        return max(0.0, self.seconds_left - (time.monotonic() - self.estimated_at))


@dataclass(frozen=True)
class Snapshot:
    """The study at one moment."""

    counts: dict[Status, int]  # chosen experiments by status
    workers: dict[int, Assignment]
    best: Result | None
    seconds_left: float | None
    share: float  # how much of the chosen experiments' arithmetic is done


class Listener(Protocol):
    def say(self, text: str, style: str = "") -> None: ...

    def show(self, snapshot: Snapshot) -> None: ...


class StudyProgress:
    """Statuses and sums of arithmetic, updated one by one: an experiment's end costs the same in a study of any size."""

    def __init__(self, folder: StudyFolder, chosen: Iterable[str]) -> None:
        experiments = {entry.name: entry.experiment for entry in folder.design.entries}
        corpus = folder.design.inputs.corpus
        self.max_iters = {name: experiment.max_iters for name, experiment in experiments.items()}
        self.flops = {name: cost(experiment, corpus(experiment)).flops for name, experiment in experiments.items()}
        self.status = folder.store.statuses()
        self.chosen = set(chosen)
        self.counts = Counter(self.status[name] for name in self.chosen)
        self.total = sum(self.flops[name] for name in self.chosen)
        self.done = sum(self.flops[name] for name in self.chosen if not self.is_undone(name))
        self.stack_flops: dict[int, int] = {}  # what is left of a stack

    def is_undone(self, name: str) -> bool:
        return self.status[name].is_undone

    def undone(self, stack: StackRow) -> list[str]:
        return [name for name in stack.members if self.is_undone(name)]

    def set_status(self, name: str, status: Status, stack: StackRow | None = None) -> None:
        """`stack`: the one in which it was trained to its end."""
        if stack:
            self.stack_flops[stack.id] = self.left(stack) - self.flops[name]
        if name in self.chosen:
            self.counts[self.status[name]] -= 1
            self.counts[status] += 1
            self.done += self.flops[name] * (self.is_undone(name) - status.is_undone)
        self.status[name] = status

    def ended(self) -> int:
        """How many of the chosen experiments need no more training."""
        return sum(count for status, count in self.counts.items() if not status.is_undone)

    def left(self, stack: StackRow) -> int:
        """The arithmetic of its members that are not done."""
        if stack.id not in self.stack_flops:
            self.stack_flops[stack.id] = sum(self.flops[name] for name in self.undone(stack))
        return self.stack_flops[stack.id]

    def snapshot(
        self, assignments: Mapping[int, Assignment], queued: Iterable[StackRow], workers: int, best: Result | None
    ) -> Snapshot:
        done = float(self.done)
        for assignment in assignments.values():
            under_way = {
                name: self.flops[name] * last.step / max(1, self.max_iters[name])
                for name, last in assignment.progress.items()
                if self.is_undone(name)
            }
            done += sum(flops for name, flops in under_way.items() if name in self.chosen)
            if assignment.stack and assignment.ahead is None and assignment.seconds_left is not None:
                assignment.ahead = self.left(assignment.stack) - sum(under_way.values())
                assignment.since = time.monotonic()
        return Snapshot(
            counts=dict(+self.counts),
            workers=dict(assignments),
            best=best,
            seconds_left=seconds_left(list(assignments.values()), [self.left(stack) for stack in queued], workers),
            share=min(1.0, done / self.total) if self.total else 1.0,
        )


def seconds_left(assignments: Sequence[Assignment], queued: Sequence[float], workers: int) -> float | None:
    """For stacks under way and stacks that wait, of which `queued` has the arithmetic.

    Those that wait are taken to go as fast as those under way do on the whole, with what these have behind them: the last seconds
    of a stack are evaluations and hardly any arithmetic. None until something was measured.
    """
    begun, flops, seconds = [], 0.0, 0.0
    for assignment in assignments:
        left = assignment.left()
        if assignment.stack and left is None:
            return None
        begun.append(left or 0.0)
        if assignment.ahead:
            flops += assignment.ahead
            seconds += time.monotonic() - assignment.since + (left or 0.0)
    if queued and not (flops and seconds):
        return None
    return makespan([left * seconds / flops for left in queued], workers, begun)
