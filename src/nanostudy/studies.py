"""The Python interface to studies: what `nanostudy study ...` does, as short calls."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from nanostudy.errors import NanostudyError, UsageError
from nanostudy.settings import Resources, check_value
from nanostudy.signals import stop_requests
from nanostudy.study.definition import folder_of, has_study, read_study, with_assignments
from nanostudy.study.execute import Execution
from nanostudy.study.folder import Design, StudyFolder, definitions, design, open_study
from nanostudy.study.grid import Entry, select
from nanostudy.study.hardware import CORE_START, GPU_START, AssumedSpeed, Machines, MeasuredSpeed, parse_machines
from nanostudy.study.merge import merge
from nanostudy.study.plan import Capacity, Pace, PlannedStack, makespan, plan
from nanostudy.study.pool import Pool, calibrate, make_pool, stack_memory
from nanostudy.study.progress import Listener
from nanostudy.study.simulate import Prediction, Speed, predict
from nanostudy.study.store import FILE, UNDONE, Row, Store
from nanostudy.tracking import check_installed, tracking
from nanostudy.training.machine import resolve
from nanostudy.view import StudyView


@dataclass(frozen=True)
class Plan:
    """What a study would do here. `seconds` is from start to end, with all workers."""

    stacks: list[PlannedStack]
    capacity: Capacity
    threads: int  # of each worker
    notes: tuple[str, ...]  # what was chosen for the machine, and why
    seconds: float | None  # None where the calibration failed
    calibration: str
    skipped: list[str]  # impossible combinations, in words
    done: int  # experiments that have results already
    failed: int  # experiments that only `retry` runs again
    elsewhere: Machines | None = None  # for which it was made, instead of this one
    prediction: Prediction | None = None  # of the run there


def _drafted(
    source: str | Path,
    out: str | Path | None,
    settings: Mapping[str, str] | None,
    parts: Sequence[str],
    only: str | None,
) -> tuple[Design, list[Entry]]:
    """What is asked, and the experiments chosen from it; nothing is written. Raises UsageError."""
    path = Path(out) if out is not None else folder_of(str(source))
    there = definitions(Path(source)) if has_study(Path(source)) else []
    if there and not settings and path == Path(source):
        asked = design(path)
        return asked, select(asked.entries, parts, only)
    study = with_assignments(there[-1], settings or {}) if there else read_study(str(source), settings or {})
    asked = design(path, study)
    return asked, select(asked.asked, parts, only)


def run_study(
    source: str | Path,
    out: str | Path | None = None,
    *,
    settings: Mapping[str, str] | None = None,
    parts: Sequence[str] = (),
    only: str | None = None,
    workers: int | None = None,
    executor: str = "workers",
    address: str | None = None,
    checkpoints: str | None = None,
    resources: Resources | None = None,
    track: str | None = None,
    save_every: float = 60.0,
    listener: Listener | None = None,
) -> list[Row]:
    """Runs a study in the folder `out` (default: studies/ and its name) to its end and returns the chosen experiments' rows.

    Goes on where an earlier call stopped. `settings` are changes as on the command line, {"dropout": "0.1,0.2"}; `parts` and
    `only` choose experiments; `track` is tensorboard, wandb or mlflow; `address` is of the cluster for executor="ray", and
    `checkpoints` one that its nodes share. Raises UsageError, NanostudyError (Interrupted, with everything saved, on Ctrl-C).
    """
    track = check_value("track", track)
    check_installed(track)
    asked, chosen = _drafted(source, out, settings, parts, only)
    pool = make_pool(executor, workers, resources or Resources(), len(chosen), address, checkpoints)
    with contextlib.closing(pool.backend), open_study(asked.path, asked) as folder:
        return _execute(folder, chosen, pool, save_every, listener, track)


def retry_study(
    path: str | Path,
    names: Sequence[str] = (),
    *,
    workers: int | None = None,
    executor: str = "workers",
    address: str | None = None,
    checkpoints: str | None = None,
    resources: Resources | None = None,
    track: str | None = None,
    save_every: float = 60.0,
    listener: Listener | None = None,
) -> list[Row]:
    """Runs the failed experiments of a study's folder again, or those of them that are named."""
    track = check_value("track", track)
    check_installed(track)
    with open_study(Path(path)) as folder:
        for name in names:
            folder.store.row(name)  # raises at an unknown one
        failed = {row.name for row in folder.store.rows(status="failed") if not names or row.name in names}
        if not failed:
            raise UsageError(f"No experiment of {path} has failed{' under these names' if names else ''}.")
        chosen = [entry for entry in folder.entries if entry.name in failed]
        pool = make_pool(executor, workers, resources or Resources(), len(chosen), address, checkpoints)
        with contextlib.closing(pool.backend):
            folder.store.requeue(failed)
            return _execute(folder, chosen, pool, save_every, listener, track)


def _execute(
    folder: StudyFolder,
    chosen: Sequence[Entry],
    pool: Pool,
    save_every: float,
    listener: Listener | None,
    track: str | None,
) -> list[Row]:
    backend, capacity, each = pool.backend, pool.capacity, pool.each
    with contextlib.ExitStack() as stack:
        listener = listener or stack.enter_context(StudyView(folder, chosen, capacity, each, pool.notes))
        stop = stack.enter_context(stop_requests())
        tracked = stack.enter_context(tracking(track, listener.say))
        try:
            Execution(folder, chosen, backend, capacity, pool.requested, listener, stop, save_every, tracked).run()
        finally:
            with contextlib.suppress(NanostudyError):
                folder.write_results()
        return folder.store.rows(names=[entry.name for entry in chosen])


def plan_study(
    source: str | Path,
    out: str | Path | None = None,
    *,
    settings: Mapping[str, str] | None = None,
    parts: Sequence[str] = (),
    only: str | None = None,
    workers: int | None = None,
    executor: str = "workers",
    address: str | None = None,
    checkpoints: str | None = None,
    resources: Resources | None = None,
    plan_for: str | None = None,
) -> Plan:
    """What run_study would do here, were no stack under way: runs nothing but a short calibration, and writes nothing.

    `plan_for` describes other machines, such as 8xH200 or 64 cores: the run there is simulated.
    """
    machines = None if plan_for is None else parse_machines(plan_for)
    asked, chosen = _drafted(source, out, settings, parts, only)
    status = _status(asked.path)
    undone = [entry for entry in chosen if status.get(entry.name, "waiting") in UNDONE]
    failed = sum(status.get(entry.name) == "failed" for entry in chosen)
    if machines:
        plain = replace(resources or Resources(), precision="auto", compile="auto")
        if (workers, executor, address, checkpoints, plain) != (None, "workers", None, None, Resources()):
            raise UsageError("--plan-for says what there is: leave --workers, --device, --threads and --executor out.")
        elsewhere = _elsewhere(machines, asked, undone, resources or Resources())
        return replace(elsewhere, done=len(chosen) - len(undone) - failed, failed=failed)
    pool = make_pool(executor, workers, resources or Resources(), len(chosen), address, checkpoints)
    corpora, capacity = asked.texts.corpora, pool.capacity
    pace: Pace | None = None
    try:
        pace, how = calibrate(pool.backend, plan(undone, corpora, capacity), asked.texts, capacity)
    except NanostudyError as problem:
        how = str(problem)
    finally:
        pool.backend.close()
    stacks = plan(undone, corpora, capacity, pace)
    seconds = makespan([stack.seconds or 0.0 for stack in stacks], capacity.workers) if pace else None
    done = len(chosen) - len(undone) - failed
    return Plan(stacks, capacity, pool.each.threads or 1, pool.notes, seconds, how, asked.skipped, done, failed)


def _elsewhere(machines: Machines, asked: Design, undone: Sequence[Entry], resources: Resources) -> Plan:
    """A plan for described machines: their pace is measured where this machine is of that kind, and else assumed."""
    here = resolve(replace(resources, device="auto" if machines.gpu else "cpu"))
    same = machines.gpu and here.device.type == "cuda" and machines.gpu.is_called(here.device_name)
    gpu = None if same else machines.gpu
    if gpu and resources.precision not in ("auto", gpu.precision):
        raise UsageError(f"--plan-for {machines.text}: for {gpu.name} only the peak in {gpu.precision} is known here.")
    memory = None if machines.memory is None else stack_memory(machines.memory)
    capacity = Capacity(machines.device, gpu.precision if gpu else here.precision, machines.workers, memory)
    corpora = asked.texts.corpora
    stacks = plan(undone, corpora, capacity)
    if gpu:
        speed: Speed = AssumedSpeed(gpu)
        how = str(speed)
    else:
        local = replace(resources, device=here.device.type, threads=None if machines.gpu else 1)
        pool = make_pool("workers", None, local, machines.workers)
        try:
            # stacks as this machine has room for them
            pace, calibration = calibrate(
                pool.backend, plan(undone, corpora, pool.capacity), asked.texts, pool.capacity
            )
        finally:
            pool.backend.close()
        speed = MeasuredSpeed(pace, GPU_START if machines.gpu else CORE_START)
        how = f"as fast as {here.device_name} here; calibration: {calibration}"
    predicted = predict(stacks, corpora, speed, machines.workers, len(asked.study.prompts) * asked.study.sample_tokens)
    timed = [replace(s, seconds=t.end - t.begin) for s, t in zip(stacks, predicted.run.turns, strict=True)]
    seconds, notes = predicted.seconds, () if gpu else here.notes
    if not machines.gpu and len(undone) < machines.workers:
        notes = (
            *notes,
            "predicted with one thread each; `study run` gives workers more where there are more cores than experiments",
        )
    return Plan(timed, capacity, 1, notes, seconds, how, asked.skipped, 0, 0, machines, predicted)


def merge_study(sources: Sequence[str | Path], into: str | Path) -> list[str]:
    """Puts the results of several people's or machines' folders of one study together, and says what came from where."""
    return merge([Path(source) for source in sources], Path(into))


def _status(path: Path) -> dict[str, str]:
    if not (path / FILE).is_file():
        return {}
    with Store.read(path / FILE) as store:
        return store.statuses()
