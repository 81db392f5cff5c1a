"""Who does a study's work: the backend that was asked for, and what the planner must know of where it runs."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from nanostudy.device import available_cores, available_memory
from nanostudy.errors import UsageError
from nanostudy.settings import Resources
from nanostudy.study.plan import Capacity
from nanostudy.study.workers import MEMORY_SHARE, PROCESS_MEMORY, Backend, Inline, Workers
from nanostudy.training.machine import resolve


@dataclass(frozen=True)
class Pool:
    """Who does the work."""

    backend: Backend
    capacity: Capacity
    asked: Resources
    each: Resources  # of one worker
    notes: tuple[str, ...]  # what was chosen for the machine, and why


def make_pool(
    executor: str,
    workers: int | None,
    resources: Resources,
    experiments: int,
    address: str | None = None,
    checkpoints: str | None = None,
) -> Pool:
    """No worker is started yet. By default no more workers than experiments: the cores are theirs, then."""
    if executor not in ("workers", "inline", "ray"):
        raise UsageError(f"executor={executor!r} is not known: workers, inline or ray.")
    if executor != "ray" and (address or checkpoints):
        raise UsageError(f"{'--address' if address else '--checkpoints'} is for a cluster: add --executor ray.")
    if workers is not None and workers < 1:
        raise UsageError(f"workers={workers} must be at least 1.")
    if executor == "inline" and workers not in (None, 1):
        raise UsageError("inline is one worker; --executor workers takes several.")
    if executor == "ray":
        from nanostudy.study.cluster.backend import connect

        cluster, capacity, notes = connect(address, checkpoints, workers, resources, experiments)
        return Pool(cluster, capacity, resources, cluster.each, notes)
    machine = resolve(resources)
    kind, cores = machine.device.type, available_cores()
    if executor == "inline":
        alone = replace(resources, threads=machine.threads)
        capacity = Capacity(kind, machine.precision, 1, _memory(machine.device, 1))
        return Pool(Inline(alone), capacity, resources, alone, machine.notes)
    devices = [f"cuda:{i}" for i in range(torch.cuda.device_count())] if kind == "cuda" else [kind]
    devices = devices if resources.device in ("auto", kind) else [resources.device]
    most = max(1, cores // (resources.threads or 1)) if kind == "cpu" else len(devices)
    count = workers or min(most, max(1, experiments))
    threads = resources.threads or max(1, cores // count)
    each = [replace(resources, threads=threads)] * count
    if len(devices) > 1:
        each = [replace(one, device=devices[i % len(devices)]) for i, one in enumerate(each)]
    memory = _memory(machine.device, -(-count // len(devices)))
    return Pool(Workers(each), Capacity(kind, machine.precision, count, memory), resources, each[0], machine.notes)


def _memory(device: torch.device, workers: int) -> int | None:
    free = available_memory(device)
    return None if free is None else stack_memory(free / workers)


def stack_memory(free: float) -> int:
    """Of so many bytes that are free for a worker, those that its stack may take."""
    return max(0, int(MEMORY_SHARE * free) - PROCESS_MEMORY)
