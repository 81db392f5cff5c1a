"""What a study would do: on this machine after a short calibration, or on described machines by simulation."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from dataclasses import dataclass, replace

from nanostudy.errors import NanostudyError, UsageError
from nanostudy.result import Status
from nanostudy.settings import Resources, Where
from nanostudy.study.folder import Design
from nanostudy.study.grid import Entry
from nanostudy.study.hardware import CORE_START, GPU_START, Machines, Speed, assumption
from nanostudy.study.names import label, varying
from nanostudy.study.plan import Capacity, Pace, PlannedStack, makespan, plan
from nanostudy.study.pool import Pool, calibrate, make_pool, stack_memory
from nanostudy.study.simulate import Prediction, predict
from nanostudy.study.store import FILE, Store
from nanostudy.text import counted, duration
from nanostudy.training.machine import resolve


@dataclass(frozen=True)
class Plan:
    """What a study would do. `seconds` is from start to end, with all workers."""

    stacks: list[PlannedStack]
    capacity: Capacity
    threads: int  # per worker
    notes: tuple[str, ...]  # what was chosen for the machine, and why
    seconds: float | None  # None where the calibration failed
    calibration: str
    skipped: list[str]  # impossible combinations, in words
    varying: tuple[str, ...] = ()  # the settings in which the experiments differ
    done: int = 0  # experiments that have results already
    failed: int = 0  # experiments that only `retry` runs again
    elsewhere: Machines | None = None  # the described machines, where it is not for this one
    prediction: Prediction | None = None  # how it would run there

    def label(self, stack: PlannedStack) -> str:
        """Of its first experiment."""
        return label(stack.members[0].experiment.as_dict(), self.varying)

    def _repr_html_(self) -> str:
        import pandas as pd

        rows = [(len(s.members), s.width, s.memory / 2**20, s.seconds, self.label(s)) for s in self.stacks]
        table = pd.DataFrame(rows, columns=["members", "at once", "memory, MiB", "seconds", "the first"])
        total = "not known" if self.seconds is None else f"about {duration(self.seconds)}"
        workers = counted(self.capacity.workers, "worker")
        return f"<p>{counted(len(rows), 'stack')} on {workers}, time {total}</p>{table.round(1).to_html(index=False, na_rep='')}"


def forecast(design: Design, chosen: Sequence[Entry], where: Where, machines: Machines | None = None) -> Plan:
    """The plan for what is left of the chosen experiments. Writes nothing. Raises UsageError."""
    status: dict[str, Status] = {}
    if (design.path / FILE).is_file():
        with Store.read(design.path / FILE) as store:
            status = store.statuses()
    undone = [entry for entry in chosen if status.get(entry.name, Status.WAITING).is_undone]
    failed = sum(status.get(entry.name) == "failed" for entry in chosen)
    if machines is None:
        made = _here(design, undone, where, len(chosen))
    elif replace(where, precision="auto", compile="auto") != Where():
        raise UsageError("--plan-for says what there is: leave --workers, --device, --threads and --executor out.")
    else:
        made = _elsewhere(design, undone, where.resources, machines)
    names = varying(design.studies)
    return replace(made, done=len(chosen) - len(undone) - failed, failed=failed, varying=names)


def _here(design: Design, undone: Sequence[Entry], where: Where, experiments: int) -> Plan:
    pool = make_pool(where, experiments)
    capacity, pace = pool.capacity, None
    try:
        pace, how = _calibrated(design, undone, pool)
    except NanostudyError as problem:
        how = str(problem)
    stacks = plan(undone, design.inputs.corpora, capacity, pace)
    seconds = makespan([stack.seconds or 0.0 for stack in stacks], capacity.workers) if pace else None
    return Plan(stacks, capacity, pool.each.threads or 1, (*design.notes, *pool.notes), seconds, how, design.skipped)


def _calibrated(design: Design, undone: Sequence[Entry], pool: Pool) -> tuple[Pace, str]:
    """With the stacks that this machine has room for. Closes the pool."""
    with contextlib.closing(pool.backend):
        return calibrate(pool.backend, plan(undone, design.inputs.corpora, pool.capacity), design.inputs, pool.capacity)


def _elsewhere(design: Design, undone: Sequence[Entry], resources: Resources, machines: Machines) -> Plan:
    """Their pace is measured where this machine is of that kind, and else assumed."""
    here = resolve(replace(resources, device="auto" if machines.gpu else "cpu"))
    same = machines.gpu and here.device.type == "cuda" and machines.gpu.is_called(here.device_name)
    gpu = None if same else machines.gpu
    if gpu and resources.precision not in ("auto", gpu.precision):
        raise UsageError(f"--plan-for {machines.text}: for {gpu.name} only the peak in {gpu.precision} is known here.")
    memory = None if machines.memory is None else stack_memory(machines.memory)
    device = "cuda" if machines.gpu else "cpu"
    capacity = Capacity(device, gpu.precision if gpu else here.precision, machines.workers, memory)
    corpora = design.inputs.corpora
    stacks = plan(undone, corpora, capacity)
    if gpu:
        speed, how = Speed.assumed(gpu), assumption(gpu)
    else:
        local = replace(resources, device=here.device.type, threads=None if machines.gpu else 1)
        pace, calibration = _calibrated(design, undone, make_pool(Where.of((), local, {}), machines.workers))
        speed = Speed(pace, GPU_START if machines.gpu else CORE_START)
        how = f"as fast as {here.device_name} here; calibration: {calibration}"
    tokens = len(design.study.prompts) * design.study.sample_tokens
    predicted = predict(stacks, corpora, speed, machines.workers, tokens)
    timed = [replace(s, seconds=t.end - t.begin) for s, t in zip(stacks, predicted.run.turns, strict=True)]
    notes = () if gpu else here.notes
    if not machines.gpu and len(undone) < machines.workers:
        notes = (
            *notes,
            "predicted with one thread each; `study run` gives workers more where there are more cores than experiments",
        )
    return Plan(
        timed, capacity, 1, notes, predicted.seconds, how, design.skipped, elsewhere=machines, prediction=predicted
    )
