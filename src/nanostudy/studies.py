"""The Python interface to studies: what `nanostudy study ...` does, as short calls."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from nanostudy.gpt.device import available_cores, available_memory
from nanostudy.gpt.errors import NanostudyError, UsageError
from nanostudy.gpt.machine import resolve
from nanostudy.gpt.resources import Resources
from nanostudy.gpt.train import Job
from nanostudy.signals import stop_requests
from nanostudy.study.backends import MEMORY_SHARE, PROCESS_MEMORY, Backend, Inline, Workers
from nanostudy.study.definition import folder_of, has_study, read_study, with_assignments
from nanostudy.study.execute import Execution
from nanostudy.study.folder import Design, StudyFolder, Texts, definitions, design, open_study
from nanostudy.study.grid import Entry, select
from nanostudy.study.hardware import CORE_START, GPU_START, AssumedSpeed, Machines, MeasuredSpeed, parse_machines
from nanostudy.study.merge import merge
from nanostudy.study.plan import Capacity, Pace, PlannedStack, makespan, plan, update_flops
from nanostudy.study.progress import Listener
from nanostudy.study.simulate import Prediction, Speed, predict
from nanostudy.study.store import FILE, UNDONE, Row, Store
from nanostudy.study.tasks import Broken, Done, Measure, Measured
from nanostudy.tracking import check_track, tracking
from nanostudy.view import StudyView
from nanostudy.words import counted

CALIBRATION_SECONDS = 0.5  # for each of the sizes that are tried, for updates and evaluations each
CALIBRATED_SIZES = 3
BEGINNING_SECONDS = 60.0  # in which workers of a cluster begin


@dataclass(frozen=True)
class Crew:
    """Who does the work."""

    backend: Backend
    capacity: Capacity
    asked: Resources
    each: Resources  # of one worker
    notes: tuple[str, ...]  # what was chosen for the machine, and why


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
    track = check_track(track)
    asked, chosen = _drafted(source, out, settings, parts, only)
    crew = _crew(executor, workers, resources or Resources(), len(chosen), address, checkpoints)
    with contextlib.closing(crew.backend), open_study(asked.path, asked) as folder:
        return _execute(folder, chosen, crew, save_every, listener, track)


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
    track = check_track(track)
    with open_study(Path(path)) as folder:
        for name in names:
            folder.store.row(name)  # raises at an unknown one
        failed = {row.name for row in folder.store.rows(status="failed") if not names or row.name in names}
        if not failed:
            raise UsageError(f"No experiment of {path} has failed{' under these names' if names else ''}.")
        chosen = [entry for entry in folder.entries if entry.name in failed]
        crew = _crew(executor, workers, resources or Resources(), len(chosen), address, checkpoints)
        with contextlib.closing(crew.backend):
            folder.store.requeue(failed)
            return _execute(folder, chosen, crew, save_every, listener, track)


def _execute(
    folder: StudyFolder,
    chosen: Sequence[Entry],
    crew: Crew,
    save_every: float,
    listener: Listener | None,
    track: str | None,
) -> list[Row]:
    backend, capacity, each = crew.backend, crew.capacity, crew.each
    with contextlib.ExitStack() as stack:
        listener = listener or stack.enter_context(StudyView(folder, chosen, capacity, each, crew.notes))
        stop = stack.enter_context(stop_requests())
        tracked = stack.enter_context(tracking(track, listener.say))
        try:
            Execution(folder, chosen, backend, capacity, crew.asked, listener, stop, save_every, tracked).run()
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
    crew = _crew(executor, workers, resources or Resources(), len(chosen), address, checkpoints)
    corpora, capacity = asked.texts.corpora, crew.capacity
    pace: Pace | None = None
    try:
        pace, how = calibrate(crew.backend, plan(undone, corpora, capacity), asked.texts, capacity)
    except NanostudyError as problem:
        how = str(problem)
    finally:
        crew.backend.close()
    stacks = plan(undone, corpora, capacity, pace)
    seconds = makespan([stack.seconds or 0.0 for stack in stacks], capacity.workers) if pace else None
    done = len(chosen) - len(undone) - failed
    return Plan(stacks, capacity, crew.each.threads or 1, crew.notes, seconds, how, asked.skipped, done, failed)


def _elsewhere(machines: Machines, asked: Design, undone: Sequence[Entry], resources: Resources) -> Plan:
    """A plan for described machines: their pace is measured where this machine is of that kind, and else assumed."""
    here = resolve(replace(resources, device="auto" if machines.gpu else "cpu"))
    same = machines.gpu and here.device.type == "cuda" and machines.gpu.is_called(here.device_name)
    gpu = None if same else machines.gpu
    if gpu and resources.precision not in ("auto", gpu.precision):
        raise UsageError(f"--plan-for {machines.text}: for {gpu.name} only the peak in {gpu.precision} is known here.")
    memory = None if machines.memory is None else _share(machines.memory)
    capacity = Capacity(machines.device, gpu.precision if gpu else here.precision, machines.workers, memory)
    corpora = asked.texts.corpora
    stacks = plan(undone, corpora, capacity)
    if gpu:
        speed: Speed = AssumedSpeed(gpu)
        how = str(speed)
    else:
        local = replace(resources, device=here.device.type, threads=None if machines.gpu else 1)
        crew = _crew("workers", None, local, machines.workers)
        try:
            # stacks as this machine has room for them
            pace, calibration = calibrate(
                crew.backend, plan(undone, corpora, crew.capacity), asked.texts, crew.capacity
            )
        finally:
            crew.backend.close()
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


def calibrate(backend: Backend, stacks: Sequence[PlannedStack], texts: Texts, capacity: Capacity) -> tuple[Pace, str]:
    """Tries stacks of a few sizes, on all workers at once as the study would, and says what it did."""
    longest_last = reversed(stacks)
    by_size = {update_flops(s.members[0].experiment, texts.corpus(s.members[0].experiment)): s for s in longest_last}
    sizes = sorted(by_size)
    steps = [i * (len(sizes) - 1) / (CALIBRATED_SIZES - 1) for i in range(CALIBRATED_SIZES)] if sizes else []
    tried = sorted({sizes[round(step)] for step in steps})
    training, evaluation = [], []
    for size in tried:
        stack = by_size[size]
        first = stack.members[0].experiment
        jobs = [_one_micro_batch(texts.job(entry)) for entry in stack.members[: stack.width]]
        ready = _ready(backend, capacity.workers)
        for worker in ready:
            backend.start(worker, Measure(tuple(jobs), texts.corpus(first), CALIBRATION_SECONDS))
        measured = list(_answers(backend, len(ready)))
        update = sum(m.update for m in measured) / len(measured) * first.gradient_accumulation_steps
        token = sum(m.evaluated_token for m in measured) / len(measured)
        training.append((float(size), len(jobs) * size / update))
        evaluation.append((float(size), len(jobs) * size / first.tokens_per_update / 3 / token))
    at_once = f", on {capacity.workers} workers at once" if capacity.workers > 1 else ""
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


def _crew(
    executor: str,
    workers: int | None,
    resources: Resources,
    experiments: int,
    address: str | None = None,
    checkpoints: str | None = None,
) -> Crew:
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
        from nanostudy.study.cluster import connect

        cluster, capacity, notes = connect(address, checkpoints, workers, resources, experiments)
        return Crew(cluster, capacity, resources, cluster.each, notes)
    machine = resolve(resources)
    kind, cores = machine.device.type, available_cores()
    if executor == "inline":
        alone = replace(resources, threads=machine.threads)
        capacity = Capacity(kind, machine.precision, 1, _memory(machine.device, 1))
        return Crew(Inline(alone), capacity, resources, alone, machine.notes)
    devices = [f"cuda:{i}" for i in range(torch.cuda.device_count())] if kind == "cuda" else [kind]
    devices = devices if resources.device in ("auto", kind) else [resources.device]
    most = max(1, cores // (resources.threads or 1)) if kind == "cpu" else len(devices)
    count = workers or min(most, max(1, experiments))
    threads = resources.threads or max(1, cores // count)
    each = [replace(resources, threads=threads)] * count
    if len(devices) > 1:
        each = [replace(one, device=devices[i % len(devices)]) for i, one in enumerate(each)]
    memory = _memory(machine.device, -(-count // len(devices)))
    return Crew(Workers(each), Capacity(kind, machine.precision, count, memory), resources, each[0], machine.notes)


def _memory(device: torch.device, workers: int) -> int | None:
    free = available_memory(device)
    return None if free is None else _share(free / workers)


def _share(free: float) -> int:
    """Of so many bytes that are free for a worker, those that its stack may take."""
    return max(0, int(MEMORY_SHARE * free) - PROCESS_MEMORY)
