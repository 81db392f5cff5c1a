"""The pool of workers that does a study's work: made as requested, and its speed measured."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch

from nanostudy.device import available_cores, available_memory
from nanostudy.errors import NanostudyError, UsageError
from nanostudy.model.kernels import WITHOUT
from nanostudy.model.kernels.cpu import GIVEN, library_path
from nanostudy.settings import Resources, Where
from nanostudy.study.grid import Entry
from nanostudy.study.plan import Capacity, Pace, PlannedStack, update_flops
from nanostudy.study.tasks import Broken, Done, Examine, Examined, Measure, Measured, Prepared
from nanostudy.study.workers import MEMORY_SHARE, PROCESS_MEMORY, Backend, Inline, Workers
from nanostudy.text import counted
from nanostudy.training.inputs import Inputs
from nanostudy.training.machine import Machine, resolve, without_kernels
from nanostudy.training.trial import Shape, settled

CALIBRATION_SECONDS = 0.5  # each size takes so long for updates, and again for evaluations
CALIBRATED_SIZES = 3
BEGINNING_SECONDS = 60.0  # a cluster's workers start within this time


@dataclass(frozen=True)
class Pool:
    backend: Backend
    capacity: Capacity
    each: Resources  # one worker's
    notes: tuple[str, ...]  # what was chosen for the machine, and why


def make_pool(where: Where, experiments: int, shapes: Sequence[Shape] = ()) -> Pool:
    """By default there are no more workers than experiments, which then share the cores. None starts yet, except one where there is
    a GPU: it says what the machine is, so that this process takes no memory of the GPU, and whether kernels run at these shapes.
    """
    resources, workers = where.resources, where.workers
    if where.executor == "ray":
        from nanostudy.study.cluster.backend import connect

        cluster, capacity, notes = connect(where.address, where.checkpoints, workers, resources, experiments)
        return Pool(cluster, capacity, cluster.each, notes)
    if where.executor == "inline":
        machine = settled(resources, resolve(resources), shapes)
        alone = replace(resources, threads=machine.threads)
        memory = _memory(available_memory(machine.device), 1)
        capacity = Capacity(machine.device.type, machine.precision, 1, memory)
        return Pool(Inline(alone), capacity, alone, machine.notes)
    first: Workers | None = None
    environment: dict[str, str] = {}
    if torch.cuda.is_available() and resources.device.startswith(("auto", "cuda")):
        first = Workers([resources], None, {})
        machine, free, reason = _examined(first, shapes)
        if reason:
            notes = (*machine.notes, without_kernels(resources.compile, reason))
            machine, environment = replace(machine, compiled=False, notes=notes), {WITHOUT: reason}
    else:
        machine = resolve(resources)
        free = available_memory(machine.device)
    kind, cores = machine.device.type, available_cores()
    devices = [f"cuda:{i}" for i in range(torch.cuda.device_count())] if kind == "cuda" else [kind]
    devices = devices if resources.device in ("auto", kind) else [resources.device]
    most = max(1, cores // (resources.threads or 1)) if kind == "cpu" else len(devices)
    count = workers or min(most, max(1, experiments))
    threads = resources.threads or max(1, cores // count)
    each = [replace(resources, threads=threads)] * count
    if len(devices) > 1:
        each = [replace(one, device=devices[i % len(devices)]) for i, one in enumerate(each)]
    if kind == "cpu" and machine.compiled:
        environment = {GIVEN: str(library_path())}
    if first and environment:  # it began without
        first.close()
    if first and not environment:
        backend, first.resources, first.machine = first, each, machine
    else:
        backend = Workers(each, machine, environment)
    capacity = Capacity(kind, machine.precision, count, _memory(free, -(-count // len(devices))))
    return Pool(backend, capacity, each[0], machine.notes)


def shapes_of(entries: Sequence[Entry], inputs: Inputs) -> list[Shape]:
    """At which kernels have to run."""
    return list({Shape.of(entry.experiment, inputs.corpus(entry.experiment)): None for entry in entries})


def _examined(backend: Workers, shapes: Sequence[Shape]) -> tuple[Machine, int | None, str | None]:
    """A worker's machine, its free memory, and why kernels do not run there, if they do not."""
    backend.start(0, Examine(tuple(shapes)))
    machine: Machine | None = None
    try:
        while True:
            report = (backend.next(60.0) or (0, None))[1]
            if isinstance(report, Prepared):
                machine = report.machine
            elif isinstance(report, Examined) and machine:
                memory, reason = report.memory, report.problem
            elif isinstance(report, Done) and machine:
                return machine, memory, reason
            elif isinstance(report, Broken):
                raise UsageError(report.reason)
    except BaseException:
        backend.close()
        raise


def workers_alike(device: str | None, threads: float | None) -> int:
    """How many workers like the one that had this device and so many threads this machine has room for."""
    return 1 if device != "cpu" else max(1, available_cores() // int(threads or 1))


def _memory(free: int | None, workers: int) -> int | None:
    return None if free is None else stack_memory(free / workers)


def stack_memory(free: float) -> int:
    """Bytes that a stack may take, where so many are free for its worker."""
    return max(0, int(MEMORY_SHARE * free) - PROCESS_MEMORY)


# --- calibration


def calibrate(backend: Backend, stacks: Sequence[PlannedStack], inputs: Inputs, capacity: Capacity) -> tuple[Pace, str]:
    """Tries stacks of a few sizes, on all workers at once as the study would. Returns the pace, and in words what was tried."""
    longest_last = reversed(stacks)
    by_size = {update_flops(s.members[0].experiment, inputs.corpus(s.members[0].experiment)): s for s in longest_last}
    sizes = sorted(by_size)
    steps = [i * (len(sizes) - 1) / (CALIBRATED_SIZES - 1) for i in range(CALIBRATED_SIZES)] if sizes else []
    tried = sorted({sizes[round(step)] for step in steps})
    training, evaluation, ready = [], [], list(range(capacity.workers))
    for size in tried:
        stack = by_size[size]
        first = stack.members[0].experiment
        jobs = [inputs.job(entry.name, entry.experiment) for entry in stack.members[: stack.width]]
        # one micro-batch: an update of forty would take minutes on a small machine
        jobs = [replace(j, experiment=replace(j.experiment, gradient_accumulation_steps=1)) for j in jobs]
        ready = _ready(backend, capacity.workers)
        for worker in ready:
            backend.start(worker, Measure(tuple(jobs), inputs.corpus(first), CALIBRATION_SECONDS))
        measured = list(_results(backend, len(ready)))
        update = sum(m.update for m in measured) / len(measured) * first.gradient_accumulation_steps
        token = sum(m.evaluated_token for m in measured) / len(measured)
        training.append((float(size), len(jobs) * size / update))
        evaluation.append((float(size), len(jobs) * size / first.tokens_per_update / 3 / token))
    at_once = f", on {len(ready)} workers at once" if len(ready) > 1 else ""
    how = f"{len(tried)} of {counted(len(sizes), 'size')} tried for a second each{at_once}"
    return Pace(tuple(training), tuple(evaluation)), how


def _ready(backend: Backend, expected: int) -> list[int]:
    """The idle workers; waits for those of a cluster. Raises NanostudyError where none starts."""
    end = time.monotonic() + BEGINNING_SECONDS
    while len(ready := backend.idle()) < expected and time.monotonic() < end:
        arrived = backend.next(0.5)
        if arrived and isinstance(arrived[1], Broken):
            raise NanostudyError(f"it failed: {arrived[1].reason}")
    if not ready:
        raise NanostudyError(f"no worker began within {BEGINNING_SECONDS:.0f} seconds")
    return ready


def _results(backend: Backend, expected: int) -> Iterator[Measured]:
    ended = 0
    while ended < expected:
        arrived = backend.next(60.0)
        report = arrived[1] if arrived else None  # None: it takes longer; a worker that dies reports it
        if isinstance(report, Measured):
            yield report
        elif isinstance(report, Broken):
            raise NanostudyError(f"it failed: {report.reason}")
        elif isinstance(report, Done):
            ended += 1
