"""Simulates a study's run: the policy of execute.py with times in place of trainings. Pure: the same arguments, the same run.

An idle worker writes samples that wait, or takes the longest stack left. In a stack, a slot whose member is done takes the
next one; the models write when their stack has ended. Left out are failures, saving, and waiting for the study's own process,
whose recording only bounds the whole.
"""

from __future__ import annotations

import heapq
import math
from collections import Counter, deque
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass

from nanostudy.data.corpus import Corpus
from nanostudy.model.config import count_parameters
from nanostudy.settings import Experiment
from nanostudy.study.artifacts import models_at_once
from nanostudy.study.hardware import Speed
from nanostudy.study.plan import PlannedStack, makespan, shape_of
from nanostudy.training.inputs import corpus_key

RECORDING = 0.013  # seconds of the study's process per experiment; measured (docs/log.md), mostly the disk's


@dataclass(frozen=True)
class Work:
    """Seconds that one worker needs for a stack."""

    training: float
    writing: tuple[float, ...] = ()  # one for each task that writes samples, once it is trained


@dataclass(frozen=True)
class Turn:
    """A stack's training."""

    worker: int
    begin: float  # seconds from the study's start
    end: float


@dataclass(frozen=True)
class Run:
    """A simulated run, in seconds."""

    turns: tuple[Turn, ...]  # the stacks', in their order
    busy: tuple[float, ...]  # each worker's, without its start
    ends: tuple[float, ...]  # when each worker's last task ended

    @property
    def seconds(self) -> float:
        return max(self.ends)


@dataclass(frozen=True)
class Prediction:
    """A simulated run, and bounds for other numbers of workers."""

    run: Run
    recording: float  # seconds of the study's own process, beside the workers
    even: float  # seconds if the work were divided evenly among the workers
    longest: float  # seconds of the longest experiment on its own, start included: no number of workers is faster
    useful: int  # workers that need about that time if every experiment trains on its own

    @property
    def seconds(self) -> float:
        """From start to end."""
        return max(self.run.seconds, self.recording)

    def shares(self) -> tuple[float, float, float]:
        """The share of the time that workers are busy: the least, the mean, and the greatest."""
        busy, whole = self.run.busy, self.seconds or 1.0
        return min(busy) / whole, sum(busy) / len(busy) / whole, max(busy) / whole

    @property
    def tail(self) -> float:
        """Seconds from the first worker's end to the last one's."""
        return self.run.seconds - min(self.run.ends)


def predict(
    stacks: Sequence[PlannedStack], corpora: Mapping[Hashable, Corpus], speed: Speed, workers: int, tokens: int
) -> Prediction:
    """For planned stacks; each model writes `tokens` tokens of samples. `corpora` by corpus_key."""
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
    """One experiment of each kind, and how many there are: in a stack, only how long a member trains decides its time."""
    kinds: dict[tuple[int | None, ...], list[Experiment]] = {}
    for e in (entry.experiment for entry in stack.members):
        kinds.setdefault((e.max_iters, e.eval_interval, e.eval_tokens), []).append(e)
    return [(alike[0], len(alike)) for alike in kinds.values()]


def work(kinds: Sequence[tuple[Experiment, int]], width: int, corpus: Corpus, speed: Speed, tokens: int) -> Work:
    """The work of a stack with so many experiments of each kind."""
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
    """Takes time S log W for S stacks and W workers. `start`: seconds before a worker's first task."""
    idle, delays, writing = list(range(workers)), [start] * workers, deque[float]()
    running: list[tuple[float, int, int | None]] = []  # end, worker, stack (None: samples)
    busy, ends, turns, clock = [0.0] * workers, [0.0] * workers, list[Turn](), 0.0
    while True:
        while idle and (writing or len(turns) < len(stacks)):
            worker = heapq.heappop(idle)
            begin, delays[worker] = clock + delays[worker], 0.0
            if writing:
                stack, seconds = None, writing.popleft()
            else:
                stack, seconds = len(turns), stacks[len(turns)].training
                turns.append(Turn(worker, begin, begin + seconds))
            busy[worker] += seconds
            heapq.heappush(running, (begin + seconds, worker, stack))
        if not running:
            return Run(tuple(turns), tuple(busy), tuple(ends))
        clock, worker, ended = heapq.heappop(running)
        ends[worker] = clock
        heapq.heappush(idle, worker)
        if ended is not None:
            writing.extend(stacks[ended].writing)
