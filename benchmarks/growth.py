"""How an update's time and a process's memory grow with members, width, context and depth; and a study's with workers.

Each point is a process of its own, so that its peak of memory is its own too: `python growth.py SETTINGS MEMBERS DEVICE SECONDS`.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path

from ours import Ours

from nanostudy.data.corpus import load_corpus
from nanostudy.settings import Experiment, Resources
from nanostudy.study.plan import memory_of
from nanostudy.training.machine import Machine, resolve
from nanostudy.training.train import Job, measure

BASE = {"n_layer": 4, "n_head": 4, "n_embd": 128, "batch_size": 8, "block_size": 64, "dropout": 0.1}
AXES = {"members": (1, 2, 4, 8), "n_embd": (64, 128, 256, 384), "block_size": (32, 64, 128, 256), "n_layer": (2, 4, 8)}


def growth(machine: Machine, ours: Ours, seconds: float = 1.0) -> Iterator[str]:
    """Lines of two tables: around 4 members of the grid's cell, and 8 of its seeds by workers."""
    yield from ("", "## Growth", "", f"Around a stack of 4 of the grid's cell, {machine.threads} threads:", "")
    yield from ("| | ms per update and member | peak of memory, MiB | planned, MiB |", "|---|---|---|---|")
    for axis, values in AXES.items():
        for value in values:
            members = value if axis == "members" else 4
            settings = BASE if axis == "members" else {**BASE, axis: value}
            words = [json.dumps(settings), str(members), machine.device.type, str(seconds)]
            done = subprocess.run([sys.executable, __file__, *words], check=True, capture_output=True, text=True)
            update, peak, planned = json.loads(done.stdout)
            yield f"| {axis} = {value} | {update / members * 1e3:.2f} | {peak / 2**20:,.0f} | {planned / 2**20:,.0f} |"
    if machine.device.type != "cpu":
        return
    yield from ("", "8 seeds of the cell, 200 updates and 2 evaluations each, from a cold start:", "")
    yield from ("| workers | s |", "|---|---|")
    count = 1
    while count <= machine.threads:
        spent = ours.study({**BASE, "max_iters": 200}, {}, range(1, 9), f"workers{count}", "--workers", str(count))
        yield f"| {count} | {spent:.1f} |"
        count *= 2


def point(settings: Mapping[str, float], members: int, device: str, seconds: float) -> tuple[float, int, int]:
    """Seconds per update, the peak of this process's memory (of a GPU's, on one) and the planner's estimate of it, in bytes."""
    machine, corpus = resolve(Resources(device=device)), load_corpus("shakespeare", "char")
    experiments = [Experiment(**settings, seed=seed) for seed in range(1, members + 1)]
    jobs = [Job(f"job{i}", e, str(i)) for i, e in enumerate(experiments)]
    update, _ = measure(jobs, corpus, machine, seconds)
    return update, _peak(machine), memory_of(experiments[0], corpus, members, machine.precision, machine.device.type)


def _peak(machine: Machine) -> int:
    if machine.device.type == "cuda":
        import torch

        return torch.cuda.max_memory_allocated(machine.device)
    status = Path("/proc/self/status")
    if status.is_file():  # getrusage would begin with the memory of the process that started this one
        return int(next(line.split()[1] for line in status.read_text().splitlines() if line.startswith("VmHWM"))) * 1024
    import resource  # not on Windows

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # macOS counts in bytes


if __name__ == "__main__":
    print(json.dumps(point(json.loads(sys.argv[1]), int(sys.argv[2]), sys.argv[3], float(sys.argv[4]))))
