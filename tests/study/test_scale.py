"""Large studies: what an experiment costs does not grow with how many there are. Operations are counted, not seconds."""

from __future__ import annotations

import contextlib
import json
import sqlite3
import sys
import time
import tracemalloc
from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch
from conftest import Silent, cpu, write_text

from nanostudy.api import plan_study
from nanostudy.errors import Interrupted
from nanostudy.model.config import count_parameters
from nanostudy.result import Result, Status
from nanostudy.settings import Resources
from nanostudy.study.definition import Study, study_yaml
from nanostudy.study.execute import Execution
from nanostudy.study.folder import design, open_study
from nanostudy.study.plan import Capacity, shape_of
from nanostudy.study.progress import Assignment, seconds_left
from nanostudy.study.store import StackRow
from nanostudy.study.tasks import Done, Prepared, Report, Sampled, Task, TrainStack
from nanostudy.training.events import Evaluated, Finished, Started
from nanostudy.training.samples import Sample

ENOUGH = 24  # experiments that finish while operations are counted


def study_of(text: str, count: int) -> Study:
    """Two shapes, many seeds."""
    settings = {"corpus": text, "n_layer": 1, "n_head": 1, "block_size": 8, "batch_size": 2, "max_iters": 4}
    return Study(f"of {count}", settings, {"n_embd": (2, 4)}, {"all": {}}, tuple(range(count // 2)))


class Counted:
    """Operations of Python and of SQLite while `on`."""

    def __init__(self, monkeypatch) -> None:
        self.on, self.calls, self.steps = False, 0, 0
        connect = sqlite3.connect

        def counting(*args, **how):
            connection = connect(*args, **how)
            connection.set_progress_handler(self.stepped, 10)
            return connection

        monkeypatch.setattr(sqlite3, "connect", counting)

    def stepped(self) -> None:
        self.steps += self.on

    @contextlib.contextmanager
    def counting(self) -> Iterator[None]:
        def called(frame, event, argument) -> None:
            self.calls += self.on and event == "call"

        before = sys.getprofile()
        sys.setprofile(called)
        try:
            yield
        finally:
            self.on = False
            sys.setprofile(before)


class Instant:
    """One worker whose trainings end at once. Counts from the second experiment's end to the last; every stack has an end."""

    def __init__(self, counted: Counted) -> None:
        self.counted, self.ended = counted, 0
        self.running: Iterator[Report] | None = None

    def enough(self) -> bool:
        return self.ended >= ENOUGH

    def idle(self) -> list[int]:
        return [] if self.running else [0]

    def start(self, worker: int, task: Task) -> None:
        self.running = self.reports(task)

    def next(self, timeout: float) -> tuple[int, Report] | None:
        if self.running is None:
            return None
        report = next(self.running)
        if isinstance(report, Done):
            self.running = None
        return 0, report

    def close(self) -> None:
        self.running = None

    def reports(self, task: Task) -> Iterator[Report]:
        yield Prepared(cpu())
        if isinstance(task, TrainStack):
            weights = torch.zeros(1, count_parameters(shape_of(task.jobs[0].experiment, task.corpus)).total)
            for job in task.jobs:
                yield Started(job.name, 0, -1, task.width)
                yield Evaluated(job.name, 4, 64, 1.0, 2.0, 3.0)
                measures = {"updates": 4, "tokens": 64, "seconds": 1.0, "best_step": 4}
                settings = json.dumps(job.experiment.as_dict())
                result = Result(job.name, job.identity, settings, Status.FINISHED, measures, step=4, skipped=0)
                yield Finished(job.name, result, weights, weights)
                self.ended += 1
                self.counted.on = 2 <= self.ended < ENOUGH
        else:
            yield Sampled({name: [Sample(None, "text")] for name in task.names})
        yield Done()


def operations(tmp_path, monkeypatch, count: int) -> tuple[int, int, int]:
    """Calls of Python functions and steps of SQLite while experiments of so many finish, in stacks of two; calls of a snapshot."""
    text = str(write_text(tmp_path / "text.txt"))
    counted = Counted(monkeypatch)
    backend = Instant(counted)
    with open_study(design(tmp_path / str(count), study_of(text, count))) as folder:
        capacity = Capacity("cpu", "fp32", 1, None)
        run = Execution(folder, folder.design.entries, backend, capacity, Resources(), Silent(), backend.enough)
        collect_work = run.collect_work

        def in_twos() -> None:  # as a plan for many workers would have them, at the head of the queue
            collect_work()
            members = run.to_train[0].members
            for i in range(0, ENOUGH + 2, 2):
                run.store.add_stacks([(members[i : i + 2], 2)])
            twos = run.store.open_stacks()[-(ENOUGH // 2 + 1) :]
            run.to_train.extendleft(reversed(twos))

        monkeypatch.setattr(run, "collect_work", in_twos)
        monkeypatch.setattr(run, "publish", lambda: None)  # as often as the clock says; counted by itself
        with counted.counting(), contextlib.suppress(Interrupted):
            run.run()
        calls, counted.calls = counted.calls, 0
        run.snapshot()
        with counted.counting():
            counted.on = True
            run.snapshot()
        return calls, counted.steps, counted.calls


def test_recording_costs_the_same_in_a_study_of_any_size(tmp_path, monkeypatch):
    monkeypatch.setattr("os.fsync", lambda descriptor: None)
    few, many = (operations(tmp_path, monkeypatch, count) for count in (64, 4096))
    assert few[0] > 1000
    assert few[1] > 100
    assert few[2] > 0
    for a, b in zip(few, many, strict=True):
        assert b < 1.3 * a + 10  # sixty-four times as many experiments


def test_thousands_of_experiments_are_planned_in_little_memory(tmp_path):
    file = tmp_path / "large.yaml"
    file.write_text(study_yaml(study_of(str(write_text(tmp_path / "text.txt")), 8_000)), encoding="utf-8")
    tracemalloc.start()
    try:
        plan = plan_study(file, tmp_path / "out", plan_for="8xH200")
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert sum(len(stack.members) for stack in plan.stacks) == 8_000
    assert peak < 8_000 * 8_000  # bytes


def test_a_folder_of_many_experiments_is_opened_with_few_looks(tmp_path, monkeypatch):
    """Most experiments that wait have no folder: one listing shows that, not a look for each."""
    study = study_of(str(write_text(tmp_path / "text.txt")), 1000)
    with open_study(design(tmp_path / "out", study)):
        pass
    looks = 0
    is_file = type(tmp_path).is_file

    def counting(path) -> bool:
        nonlocal looks
        looks += 1
        return is_file(path)

    monkeypatch.setattr(type(tmp_path), "is_file", counting)
    design(tmp_path / "out")
    with open_study(design(tmp_path / "out")):
        pass
    assert looks < 50


def test_the_time_left_is_measured_over_whole_stacks():
    """The last seconds of a stack are evaluations: the arithmetic left in them says nothing of the stacks that wait."""
    now = time.monotonic()
    ending = Assignment(
        "a", ("a",), StackRow(1, ("a",), 1), seconds_left=1.0, estimated_at=now, ahead=1e9, since=now - 99
    )
    assert seconds_left([ending], [1e9, 2e9], 1) == pytest.approx(301, abs=1)
    assert seconds_left([ending], [1e9, 2e9], 2) == pytest.approx(201, abs=1)
    assert seconds_left([replace(ending, ahead=None)], [1e9], 1) is None  # nothing is measured yet
    assert seconds_left([replace(ending, ahead=None)], [], 1) == pytest.approx(1, abs=1)
    writing = Assignment("b", ("b",), None)
    assert seconds_left([ending, writing], [1e9], 2) == pytest.approx(100, abs=1)
