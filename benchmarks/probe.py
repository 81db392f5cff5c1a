"""One stack in a process of its own, so that its peak of memory is its own: its pace, or a profile of its updates.

    python probe.py pace|profile SETTINGS MEMBERS DEVICE SECONDS

prints one line of JSON.
"""

from __future__ import annotations

import json
import sys
import time
from collections import Counter
from collections.abc import Mapping
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity

from nanostudy.data.corpus import Corpus, load_corpus
from nanostudy.settings import Experiment, Resources
from nanostudy.study.plan import memory_of
from nanostudy.training.machine import Machine, resolve
from nanostudy.training.train import Job, _Training, measure

LONGEST_KERNELS = 10


def pace(settings: Mapping[str, float], members: int, device: str, seconds: float) -> dict[str, float]:
    """Seconds an update and an evaluated token, of all members together; the peak of this process's memory (of a GPU's, on one) and
    the planner's estimate of it, in bytes.
    """
    machine, corpus, jobs = _stack(settings, members, device)
    update, token = measure(jobs, corpus, machine, seconds)
    planned = memory_of(jobs[0].experiment, corpus, members, machine.precision, machine.device.type)
    return {"update": update, "token": token, "peak": _peak(machine), "planned": planned}


def profile(settings: Mapping[str, float], members: int, device: str, seconds: float) -> dict[str, object]:
    """Of at most 20 updates in about `seconds`: the device's busy share, kernels and host seconds an update, and the longest
    kernels with their seconds an update. On a CPU its operations stand for kernels.
    """
    machine, corpus, jobs = _stack(settings, members, device)
    training = _Training(jobs, corpus, machine, lambda: False)
    stack = training.fresh(members).to(machine.device)
    on_gpu = machine.device.type == "cuda"

    def updates(count: int) -> tuple[float, float]:
        """(host seconds until all are issued, seconds until all are done)"""
        start = time.perf_counter()
        for _ in range(count):
            metrics = training.step(stack)
        issued = time.perf_counter() - start
        metrics.loss.tolist()
        return issued, time.perf_counter() - start

    updates(3)
    count = max(1, min(20, int(seconds / updates(1)[1] / 2)))
    issued, took = updates(count)
    with torch.profiler.profile(activities=[ProfilerActivity.CPU, *([ProfilerActivity.CUDA] * on_gpu)]) as recorded:
        updates(count)
    spent: Counter[str] = Counter()
    kernels = 0
    for event in recorded.events() or []:
        if on_gpu and event.device_type == torch.autograd.DeviceType.CUDA:
            spent[event.name] += event.self_device_time_total
            kernels += 1
        elif not on_gpu and event.name.startswith("aten::"):
            spent[event.name] += event.self_cpu_time_total
            kernels += 1
    return {
        "updates": count,
        "busy": sum(spent.values()) / 1e6 / took,
        "kernels": kernels / count,
        "host": issued / count,
        "update": took / count,
        "longest": [(name, total / 1e6 / count) for name, total in spent.most_common(LONGEST_KERNELS)],
    }


def _stack(settings: Mapping[str, float], members: int, device: str) -> tuple[Machine, Corpus, list[Job]]:
    machine, corpus = resolve(Resources(device=device)), load_corpus("shakespeare", "char")
    experiments = [Experiment(**settings, seed=seed) for seed in range(1, members + 1)]
    return machine, corpus, [Job(f"job{i}", e, str(i)) for i, e in enumerate(experiments)]


def _peak(machine: Machine) -> int:
    if machine.device.type == "cuda":
        return torch.cuda.max_memory_allocated(machine.device)
    status = Path("/proc/self/status")
    if status.is_file():  # getrusage would begin with the memory of the process that started this one
        return int(next(line.split()[1] for line in status.read_text().splitlines() if line.startswith("VmHWM"))) * 1024
    import resource  # not on Windows

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # macOS counts in bytes


if __name__ == "__main__":
    what = {"pace": pace, "profile": profile}[sys.argv[1]]
    print(json.dumps(what(json.loads(sys.argv[2]), int(sys.argv[3]), sys.argv[4], float(sys.argv[5]))))
