"""How a study would run: the policy of execute.py with times in place of trainings. Pure: the same arguments, the same run.

A worker that comes free writes the samples that wait, or takes the longest stack left; within a stack a slot whose member is
done takes the next one; a stack's models write when it has ended. Left out: failures, saving, and waiting for the study's own
process, whose recording is only a bound on the whole.
"""

from __future__ import annotations

import heapq
import math
from collections import Counter, deque
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from nanostudy.data.corpus import Corpus
from nanostudy.model.gpt import count_parameters
from nanostudy.settings import Experiment
from nanostudy.study.artifacts import models_at_once
from nanostudy.study.plan import PlannedStack, corpus_key, makespan, shape_of

RECORDING = 0.013  # seconds that the study's process takes for an experiment; measured (docs/log.md), mostly the disk's


class Speed(Protocol):
    """Seconds that things take a worker."""

    @property
    def start(self) -> float:
        """From the worker's start to its first step."""

    def update(self, experiment: Experiment, corpus: Corpus) -> tuple[float, float]:
        """A stack's step: what it takes however many members there are, and what each adds."""

    def evaluations(self, experiment: Experiment, corpus: Corpus) -> float:
        """All evaluations of one experiment, and its final scores."""

    def token(self, experiment: Experiment, corpus: Corpus) -> tuple[float, float]:
        """A token that models of this shape write beside each other: likewise as for a step."""


@dataclass(frozen=True)
class Work:
    """Seconds that a stack takes one worker."""

    training: float
    writing: tuple[float, ...] = ()  # as many tasks, once it is trained


@dataclass(frozen=True)
class Turn:
    """A stack's training."""

    worker: int
    begin: float  # seconds from the study's start
    end: float


@dataclass(frozen=True)
class Run:
    """What simulate() gives. Seconds."""

    turns: tuple[Turn, ...]  # of the stacks, in their order
    busy: tuple[float, ...]  # of each worker, without its start
    ends: tuple[float, ...]  # when each worker had no more to do

    @property
    def seconds(self) -> float:
        return max(self.ends)


@dataclass(frozen=True)
class Prediction:
    """A run, and what other numbers of workers would do."""

    run: Run
    recording: float  # seconds of the study's own process, beside the workers
    even: float  # seconds, were its work divided evenly among the workers
    longest: float  # seconds from start to end of the longest experiment on its own: no number of workers is faster
    useful: int  # workers that could do it in about that time, were every experiment on its own

    @property
    def seconds(self) -> float:
        """From start to end."""
        return max(self.run.seconds, self.recording)

    def shares(self) -> tuple[float, float, float]:
        """Of the time, that workers are busy: the least, the mean, and the greatest."""
        busy, whole = self.run.busy, self.seconds or 1.0
        return min(busy) / whole, sum(busy) / len(busy) / whole, max(busy) / whole

    @property
    def tail(self) -> float:
        """Seconds before the last worker's end at which the first has no more to do."""
        return self.run.seconds - min(self.run.ends)


def predict(
    stacks: Sequence[PlannedStack], corpora: Mapping[Hashable, Corpus], speed: Speed, workers: int, tokens: int
) -> Prediction:
    """For planned stacks, each model of which writes so many tokens of samples. `corpora` by corpus_key."""
    works, alone = [], Counter[float]()
    for stack in stacks:
        corpus, kinds = corpora[corpus_key(stack.members[0].experiment)], _kinds(stack)
        works.append(work(kinds, stack.width, corpus, speed, tokens))
        for experiment, count in kinds:
            one = works[-1] if len(stack.members) == 1 else work([(experiment, 1)], 1, corpus, speed, tokens)
            alone[one.training + sum(one.writing)] += count
    run = simulate(works, workers, speed.start)
    longest = max(alone, default=0.0)
    useful = math.ceil(sum(seconds * count for seconds, count in alone.items()) / longest - 1e-6) if longest else 0
    return Prediction(
        run, RECORDING * sum(alone.values()), speed.start + sum(run.busy) / workers, speed.start + longest, useful
    )


def _kinds(stack: PlannedStack) -> list[tuple[Experiment, int]]:
    """One of each kind, and how many there are: what decides a member's time in its stack is how long it trains."""
    kinds: dict[tuple[int, int], Experiment] = {}
    counted: Counter[tuple[int, int]] = Counter()
    for entry in stack.members:
        kind = entry.experiment.max_iters, entry.experiment.eval_interval
        kinds.setdefault(kind, entry.experiment)
        counted[kind] += 1
    return [(experiment, counted[kind]) for kind, experiment in kinds.items()]


def work(kinds: Sequence[tuple[Experiment, int]], width: int, corpus: Corpus, speed: Speed, tokens: int) -> Work:
    """Of a stack with so many of each kind."""
    shape = kinds[0][0]
    fixed, each = speed.update(shape, corpus)
    steps = makespan([e.max_iters for e, count in kinds for _ in range(count)], width)
    training = fixed * steps
    training += sum(count * (each * e.max_iters + speed.evaluations(e, corpus)) for e, count in kinds)
    shared, own = speed.token(shape, corpus)
    models, at_once = sum(count for _, count in kinds), models_at_once(count_parameters(shape_of(shape, corpus)).total)
    beside = [min(at_once, models - i) for i in range(0, models, at_once)] if tokens else []
    return Work(training, tuple(tokens * (shared + own * some) for some in beside))


def simulate(stacks: Sequence[Work], workers: int, start: float = 0.0) -> Run:
    """In time S log W for S stacks and W workers. `start`: seconds before a worker's first task."""
    idle, begun, writing = list(range(workers)), [False] * workers, deque[float]()
    running: list[tuple[float, int, int | None]] = []  # end, worker, stack (None: samples)
    busy, ends, turns, clock = [0.0] * workers, [0.0] * workers, list[Turn](), 0.0
    while True:
        while idle and (writing or len(turns) < len(stacks)):
            worker = heapq.heappop(idle)
            begin = clock if begun[worker] else clock + start
            if writing:
                stack, seconds = None, writing.popleft()
            else:
                stack, seconds = len(turns), stacks[len(turns)].training
                turns.append(Turn(worker, begin, begin + seconds))
            begun[worker] = True
            busy[worker] += seconds
            heapq.heappush(running, (begin + seconds, worker, stack))
        if not running:
            return Run(tuple(turns), tuple(busy), tuple(ends))
        clock, worker, ended = heapq.heappop(running)
        ends[worker] = clock
        heapq.heappush(idle, worker)
        if ended is not None:
            writing.extend(stacks[ended].writing)
