"""What planning and recording cost as a study grows, and what the planner predicts for other machines.

python benchmarks/planning.py                     # a quarter of an hour, most of it at a million experiments
python benchmarks/planning.py --sizes 128 10000   # smaller studies alone; of the others what was measured before is kept
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import json
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from nanostudy.api import plan_study
from nanostudy.errors import Interrupted
from nanostudy.model.config import count_parameters
from nanostudy.result import Result, Status
from nanostudy.settings import Resources
from nanostudy.study.definition import Study, read_study, study_yaml
from nanostudy.study.execute import Execution
from nanostudy.study.folder import design, open_study
from nanostudy.study.listing import status_lines
from nanostudy.study.plan import Capacity, shape_of
from nanostudy.study.progress import Snapshot
from nanostudy.study.store import FILE, Store
from nanostudy.study.tasks import Done, Prepared, Report, Sampled, Task, TrainStack
from nanostudy.text import duration, table
from nanostudy.training.events import Evaluated, Finished, Started
from nanostudy.training.machine import resolve
from nanostudy.training.samples import Sample

HERE = Path(__file__).parent
SIZES = (128, 10_000, 100_000, 1_000_000)
PREDICTED, KINDS = (128, 10_000, 1_000_000), ("H200", "1 core")
WORKERS = (1, 8, 64, 1000)
DIFFERENT = {10_000: (5, 25), 100_000: (25, 50), 1_000_000: (50, 250)}  # learning rates, seeds
RECORDED = 2_000  # experiments that finish in a measurement of recording


def study_of(size: int, small: bool = False) -> Study:
    """128: the published grid. More: 16 shapes and lengths, 5 dropout rates, learning rates and seeds; `small`: tiny models."""
    if size == 128:
        return read_study("shakespeare-grid", {"n_embd": "8,16"} if small else {})
    rates, seeds = DIFFERENT[size]
    grid = {
        "n_layer": (4, 6),
        "n_embd": (8, 16) if small else (128, 256),
        "batch_size": (8, 16),
        "max_iters": (1000, 2000),
        "dropout": (0.0, 0.1, 0.2, 0.3, 0.4),
        "learning_rate": tuple(i * 1e-5 for i in range(1, rates + 1)),
    }
    settings = {"corpus": "shakespeare", "n_head": 4, "block_size": 64}
    return Study(f"grid-of-{size}", settings, grid, {"all": {}}, tuple(range(1, seeds + 1)))


class Instant:
    """A backend whose trainings end at once, and which asks to stop after so many."""

    def __init__(self, workers: int, most: int) -> None:
        self.workers, self.most, self.finished = workers, most, 0
        self.running: dict[int, Iterator[Report]] = {}
        self.machine = resolve(Resources(device="cpu", threads=1))
        self.stop: Callable[[], bool] = lambda: False
        self.times: list[float] = []

    def enough(self) -> bool:
        return self.finished >= self.most

    def idle(self) -> list[int]:
        return [worker for worker in range(self.workers) if worker not in self.running]

    def start(self, worker: int, task: Task) -> None:
        self.running[worker] = self.reports(task)

    def next(self, timeout: float) -> tuple[int, Report] | None:
        if not self.running:
            return None
        worker, reports = next(iter(self.running.items()))
        report = next(reports)
        if isinstance(report, Done):
            del self.running[worker]
        return worker, report

    def close(self) -> None:
        self.running.clear()

    def reports(self, task: Task) -> Iterator[Report]:
        yield Prepared(self.machine)
        if isinstance(task, TrainStack):
            weights = torch.zeros(1, count_parameters(shape_of(task.jobs[0].experiment, task.corpus)).total)
            for job in task.jobs:
                if self.enough():
                    break
                e, name = job.experiment, job.name
                yield Started(name, 0, -1, task.width)
                for step in (0, e.max_iters):
                    yield Evaluated(name, step, step * e.tokens_per_update, 1.0, 2.0, 2.0 + e.seed / 1e6)
                measures = {"updates": e.max_iters, "tokens": 1, "seconds": 1.0, "best_step": e.max_iters}
                settings, done = (
                    json.dumps(e.as_dict()),
                    {"step": e.max_iters, "skipped": 0, "context_losses": {32: 2.0}},
                )
                result = Result(name, job.identity, settings, Status.FINISHED, measures, **done)
                yield Finished(name, result, weights, weights)
                self.finished += 1
                self.times.append(time.perf_counter())
        else:
            yield Sampled({name: [Sample(None, "text")] for name in task.names})
        yield Done()


class Silent:
    def say(self, text: str, style: str = "") -> None: ...

    def show(self, snapshot: Snapshot) -> None: ...


def planning(size: int, what: str) -> dict[str, object]:
    with tempfile.TemporaryDirectory() as home:
        file = Path(home) / "grid.yaml"
        file.write_text(study_yaml(study_of(size)), encoding="utf-8")
        start = time.perf_counter()
        plan = plan_study(file, Path(home) / "out", plan_for=what)
        spent = time.perf_counter() - start
    assert plan.prediction
    found, (least, mean, most) = plan.prediction, plan.prediction.shares()
    return {
        "spent": spent,
        "stacks": len(plan.stacks),
        "seconds": found.seconds,
        "recording": found.recording,
        "busy": [least, mean, most],
        "tail": found.tail,
        "even": found.even,
        "longest": found.longest,
        "useful": found.useful,
    }


def recording(size: int) -> dict[str, object]:
    """Seconds to open a folder at first and again, to record an experiment's end, and to say how far the study is."""
    with tempfile.TemporaryDirectory() as home:
        path, start = Path(home) / "study", time.perf_counter()
        asked = design(path, study_of(size, small=True))
        designed = time.perf_counter() - start
        with open_study(asked):
            opened = time.perf_counter() - start - designed
        backend = Instant(8, min(size, RECORDED))
        start = time.perf_counter()
        with open_study(asked := design(path)) as folder:
            again = time.perf_counter() - start
            capacity = Capacity("cpu", "bf16", 8, None)
            execution = Execution(
                folder, asked.requested, backend, capacity, Resources(), Silent(), backend.enough, save_every=60.0
            )
            with contextlib.suppress(Interrupted):
                execution.run()
        size_on_disk, begun = (path / FILE).stat().st_size, time.perf_counter()
        with Store.read(path / FILE) as store:
            status_lines(store, path)
        status = time.perf_counter() - begun
    each = statistics.median(b - a for a, b in itertools.pairwise(backend.times))
    ready = backend.times[0] - start - again
    return {
        "designed": designed,
        "opened": opened,
        "again": again,
        "ready": ready,
        "each": each,
        "status": status,
        "bytes": size_on_disk,
    }


def measured(sizes: Sequence[int]) -> Iterator[tuple[str, dict[str, Any]]]:
    """What each measurement gives in a process of its own, and the memory that it took, in bytes."""
    for size in sizes:
        planned = [f"{workers}x{kind}" for kind in KINDS for workers in WORKERS] if size in PREDICTED else ["8xH200"]
        for words in (*(("planning", str(size), what) for what in planned), ("recording", str(size))):
            call = [sys.executable, __file__, "--one", *words]
            done = subprocess.run(call, stdout=subprocess.PIPE, text=True, check=True)
            yield " ".join(words), json.loads(done.stdout)


def predicted(kept: Mapping[str, Any]) -> list[str]:
    """Lines of the table of predictions."""
    rows = []
    for size in PREDICTED:
        for kind in KINDS:
            for workers in WORKERS:
                found = kept.get(f"planning {size} {workers}x{kind}")
                if found is None:
                    continue
                least, mean, most = found["busy"]
                bound = found["recording"] >= found["seconds"]
                rows.append(
                    [
                        size,
                        f"{workers:,} x {kind}",
                        found["stacks"],
                        duration(found["seconds"]) + (" (recording)" if bound else ""),
                        duration(found["even"]),
                        f"{least:.0%} / {mean:.0%} / {most:.0%}",
                        duration((1 - least) * found["seconds"]),
                        found["useful"],
                        f"{found['spent']:.1f} s, {found['memory'] / 2**20:,.0f} MiB",
                    ]
                )
    header = ("experiments", "workers", "stacks", "predicted time", "divided evenly", "busy: least / mean / most")
    return table([*header, "least busy waits", "workers that help", "planning took"], rows)


def grown(kept: Mapping[str, Any]) -> list[str]:
    """Lines of the table of growth."""
    rows = []
    for size in SIZES:
        plan, found = kept.get(f"planning {size} 8xH200"), kept.get(f"recording {size}")
        if plan is None or found is None:
            continue
        rows.append(
            [
                size,
                f"{plan['spent']:.1f} s, {plan['memory'] / 2**20:,.0f} MiB",
                f"{found['designed'] + found['opened']:.1f} s",
                f"{found['again'] + found['ready']:.1f} s",
                f"{found['each'] * 1e3:.1f} ms",
                f"{found['status'] * 1e3:.0f} ms",
                f"{found['memory'] / 2**20:,.0f} MiB",
                f"{found['bytes'] / 2**20:,.1f} MiB",
            ]
        )
    header = ("experiments", "plan", "begin the folder", "open it again, to the first result", "record one", "status")
    return table([*header, "memory of a run", "store"], rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--sizes",
        nargs="*",
        type=int,
        choices=SIZES,
        default=SIZES,
        help="numbers of experiments; none: only the tables",
    )
    parser.add_argument("--out", type=Path, default=HERE / "results", help="where the tables are kept")
    parser.add_argument("--one", nargs="+", help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if asked.one:
        what, size, *rest = asked.one
        found = planning(int(size), *rest) if what == "planning" else recording(int(size))
        memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
        print(json.dumps({**found, "memory": memory}))
        return
    machine, file = resolve(Resources(device="cpu")), asked.out / "planning.json"
    kept = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    for words, found in measured(asked.sizes):
        kept[words] = found
        file.write_text(json.dumps(kept, indent=1) + "\n", encoding="utf-8")
    lines = [
        "# Planning and recording as studies grow",
        "",
        f"{machine.device_name}, {machine.threads} threads, {time.strftime('%Y-%m-%d')}. 128 is shakespeare-grid; the others are 16 shapes "
        "and lengths with 5 dropout rates, learning rates and seeds.",
        "",
        "## Predicted",
        "",
        "`nanostudy study plan --plan-for`. An H200 was not measured: its pace is assumed, as src/nanostudy/study/hardware.py says. "
        "The pace of a core was measured here. `divided evenly` is the same work without a rest; `least busy waits` the time for "
        "which the least busy worker starts or waits; where recording in the study's one process takes longer than the "
        "workers do, it is the time, and says so.",
        "",
        *predicted(kept),
        "",
        "## Growth",
        "",
        "Recording is of trainings that end at once, of tiny models: the median from one experiment's end to the next, with its "
        "run folder, its weights and the store on this machine's disk.",
        "",
        *grown(kept),
    ]
    print("\n".join(lines))
    file.with_suffix(".md").write_text("\n".join(lines) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
