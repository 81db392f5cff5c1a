"""How fast a machine is: stacks of a few sizes, tried for a moment."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import replace

from nanostudy.errors import NanostudyError
from nanostudy.study.folder import Texts
from nanostudy.study.plan import Capacity, Pace, PlannedStack, update_flops
from nanostudy.study.tasks import Broken, Done, Measure, Measured
from nanostudy.study.workers import Backend
from nanostudy.text import counted
from nanostudy.training.train import Job

CALIBRATION_SECONDS = 0.5  # for each of the sizes that are tried, for updates and evaluations each
CALIBRATED_SIZES = 3
BEGINNING_SECONDS = 60.0  # in which workers of a cluster begin


def calibrate(backend: Backend, stacks: Sequence[PlannedStack], texts: Texts, capacity: Capacity) -> tuple[Pace, str]:
    """Tries stacks of a few sizes, on all workers at once as the study would, and says what it did."""
    longest_last = reversed(stacks)
    by_size = {update_flops(s.members[0].experiment, texts.corpus(s.members[0].experiment)): s for s in longest_last}
    sizes = sorted(by_size)
    steps = [i * (len(sizes) - 1) / (CALIBRATED_SIZES - 1) for i in range(CALIBRATED_SIZES)] if sizes else []
    tried = sorted({sizes[round(step)] for step in steps})
    training, evaluation, began = [], [], capacity.workers
    for size in tried:
        stack = by_size[size]
        first = stack.members[0].experiment
        jobs = [_one_micro_batch(texts.job(entry)) for entry in stack.members[: stack.width]]
        ready = _ready(backend, capacity.workers)
        for worker in ready:
            backend.start(worker, Measure(tuple(jobs), texts.corpus(first), CALIBRATION_SECONDS))
        began = len(ready)
        measured = list(_answers(backend, began))
        update = sum(m.update for m in measured) / len(measured) * first.gradient_accumulation_steps
        token = sum(m.evaluated_token for m in measured) / len(measured)
        training.append((float(size), len(jobs) * size / update))
        evaluation.append((float(size), len(jobs) * size / first.tokens_per_update / 3 / token))
    at_once = f", on {began} workers at once" if began > 1 else ""
    how = f"{len(tried)} of {counted(len(sizes), 'size')} tried for a second each{at_once}"
    return Pace(tuple(training), tuple(evaluation)), how


def _ready(backend: Backend, expected: int) -> list[int]:
    """Those that have nothing to do, and on a cluster those that begin in a while. Raises NanostudyError where none does."""
    end = time.monotonic() + BEGINNING_SECONDS
    while len(ready := backend.idle()) < expected and time.monotonic() < end:
        backend.next(0.5)
    if not ready:
        raise NanostudyError(f"no worker began within {BEGINNING_SECONDS:.0f} seconds")
    return ready


def _one_micro_batch(job: Job) -> Job:
    """An update of forty micro-batches takes forty times as long, and minutes on a small machine."""
    return replace(job, experiment=replace(job.experiment, gradient_accumulation_steps=1))


def _answers(backend: Backend, expected: int) -> Iterator[Measured]:
    ended = 0
    while ended < expected:
        arrived = backend.next(60.0)
        report = arrived[1] if arrived else None  # it takes longer: a worker that dies says so
        if isinstance(report, Measured):
            yield report
        elif isinstance(report, Broken):
            raise NanostudyError(f"it failed: {report.reason}")
        elif isinstance(report, Done):
            ended += 1
