"""Worker processes: they train under the study's conditions, hung ones are noticed, and each end is told as what it is."""

import dataclasses
import json
import os
import signal
import threading
import time
from pathlib import Path

import pytest
from conftest import jobs_of, small
from test_execute import RESOURCES, Listener, posix_only, write_study

from nanostudy import api
from nanostudy.device import compiler, memory_kills
from nanostudy.errors import NanostudyError
from nanostudy.settings import Resources
from nanostudy.study import pool, workers
from nanostudy.study.lease import FILE, hold
from nanostudy.study.tasks import Broken, Measure, Noted
from nanostudy.study.workers import Workers
from nanostudy.training.events import Logged
from nanostudy.training.machine import resolve

needs_compiler = pytest.mark.skipif(compiler() is None, reason="no C++ compiler is on the PATH")
WITHOUT = Resources(device="cpu", precision="fp32", threads=1, compile="no")


def write(folder: Path, *max_iters: int, **settings) -> Path:
    """A study file with an experiment for each number of updates."""
    return write_study(folder, {"max_iters": list(max_iters)}, (1,), settings={"block_size": 8, **settings})


def machines(out: Path) -> list[dict]:
    return [json.loads(path.read_text(encoding="utf-8"))["machine"] for path in out.glob("*/run.json")]


@needs_compiler
@posix_only
def test_workers_load_the_studys_kernels_and_ask_no_compiler(tmp_path, monkeypatch):
    """Here the workers' compiler is broken, and their cache is empty."""
    source = write(tmp_path / "source", 5, 6)
    assert resolve(RESOURCES).compiled
    (tmp_path / "bin").mkdir()
    for name in ("c++", "g++"):
        (tmp_path / "bin" / name).write_text("#!/bin/sh\nexit 1\n")
        (tmp_path / "bin" / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:{os.environ['PATH']}")
    monkeypatch.setenv("NANOSTUDY_CACHE", str(tmp_path / "cache"))
    api.run_study(source, tmp_path / "out", workers=2, resources=RESOURCES, listener=Listener())
    assert [machine["compiled"] for machine in machines(tmp_path / "out")] == [True, True]


@needs_compiler
def test_a_worker_under_other_conditions_is_told_tried_again_and_refused(tmp_path, monkeypatch):
    source, made = write(tmp_path / "source", 5, 6), []

    def make(each, machine, environment):
        made.append(Workers([WITHOUT, *each[1:]], machine, environment))
        return made[0]

    monkeypatch.setattr(pool, "Workers", make)
    listener = Listener()
    rows = api.run_study(source, tmp_path / "out", workers=2, resources=RESOURCES, listener=listener)
    assert {row.status for row in rows} == {"finished"}
    assert [machine["compiled"] for machine in machines(tmp_path / "out")] == [True, True]
    told = [text for text in listener.messages if text.startswith("worker 0 did not begin: it would train under other")]
    assert 1 <= len(told) <= workers_tried()
    assert "compiled false instead of true" in told[0]
    assert told[0].endswith("it is tried again")
    monkeypatch.setattr(pool, "Workers", lambda each, *rest: Workers([WITHOUT] * len(each), *rest))
    with pytest.raises(NanostudyError, match=r"Workers fail before they begin \(it would train under other conditions"):
        api.run_study(source, tmp_path / "none", workers=2, resources=RESOURCES, listener=listener)
    assert "worker 1 did not begin: .*it gets no more work" in listener


def workers_tried() -> int:
    from nanostudy.study.execute import MOST_FAILED_STARTS

    return MOST_FAILED_STARTS


@posix_only
def test_a_hung_worker_is_noticed_and_its_work_goes_on(tmp_path, monkeypatch):
    source, stopped = write(tmp_path / "source", 300), []
    original = Workers.next

    def next_report(self, timeout):
        arrived = original(self, timeout)
        if arrived and isinstance(arrived[1], Logged) and not stopped:
            stopped.append(self.processes[0].pid)
            os.kill(stopped[0], signal.SIGSTOP)
            monkeypatch.setattr(workers, "HUNG", 2.0)
        elif arrived and isinstance(arrived[1], Broken):
            monkeypatch.setattr(workers, "HUNG", 900.0)
        return arrived

    monkeypatch.setattr(Workers, "next", next_report)
    listener = Listener()
    rows = api.run_study(source, tmp_path / "out", workers=1, resources=RESOURCES, listener=listener, save_every=0.05)
    assert [row.status for row in rows] == ["finished"]
    assert "no sign of life for 2.0 s and was ended; it goes on from its last checkpoint" in listener
    with pytest.raises(ProcessLookupError):
        os.kill(stopped[0], 0)


def test_only_time_spent_listening_counts_as_silence(corpus, monkeypatch):
    """A study that waits for its drive for hours blames no worker."""
    monkeypatch.setattr(workers, "HUNG", 0.5)
    backend = Workers([WITHOUT], resolve(WITHOUT), {})
    monkeypatch.setattr(backend, "_send", lambda worker, message: None)
    backend.start(0, Measure(tuple(jobs_of(small())), corpus, 0.1))
    try:
        time.sleep(0.7)
        assert backend.next(0.1) is None
        reports = [backend.next(0.2) for _ in range(3)]
        assert isinstance(reports[1][1], Broken), reports
        assert "no sign of life" in reports[1][1].reason
        assert backend.idle() == [0]
    finally:
        backend.close()


def test_a_hung_worker_is_noticed_while_another_reports_all_the_time(corpus, monkeypatch):
    monkeypatch.setattr(workers, "HUNG", 0.5)
    backend = Workers([WITHOUT] * 2, resolve(WITHOUT), {})
    monkeypatch.setattr(backend, "_send", lambda worker, message: None)
    for worker in (0, 1):
        backend.start(worker, Measure(tuple(jobs_of(small())), corpus, 0.1))
    ended, process = threading.Event(), backend.processes[1]

    def chatter() -> None:
        while not ended.wait(0.02):
            backend.arrived.put((1, process, Noted("still here")))

    threading.Thread(target=chatter).start()
    try:
        reports = [backend.next(0.5) for _ in range(60)]
        [(worker, broken)] = [report for report in reports if not isinstance(report[1], Noted)]
        assert (worker, broken.cause) == (0, "died")
        assert "no sign of life" in broken.reason
        assert backend.idle() == [0]
    finally:
        ended.set()
        backend.close()


@pytest.mark.soak
def test_a_long_step_gives_signs_of_life(tmp_path, monkeypatch):
    """Between the micro-batches of an update that takes longer than the limit, there are no reports."""
    monkeypatch.setattr(workers, "HUNG", 20.0)
    source = write(tmp_path / "source", 1, gradient_accumulation_steps=40_000)
    listener = Listener()
    rows = api.run_study(source, tmp_path / "out", workers=1, resources=RESOURCES, listener=listener)
    assert [row.status for row in rows] == ["finished"]
    assert not [text for text in listener.messages if "sign of life" in text]


@pytest.mark.parametrize(
    ("code", "kills", "reason"),
    [
        (-signal.SIGTERM, (0, 1), "killed by SIGTERM"),
        (3, (0, 1), "exit code 3"),
        *(
            [
                (-signal.SIGKILL, (4, 4), "killed by SIGKILL"),
                (-signal.SIGKILL, (None, None), "killed by SIGKILL"),
                (-signal.SIGKILL, (4, 5), "the system killed it because memory ran out; fewer --workers"),
            ]
            if os.name == "posix"
            else []
        ),
    ],
)
def test_an_end_is_told_as_what_it_is(monkeypatch, code, kills, reason):
    counts = iter(kills)
    monkeypatch.setattr(workers, "_memory_kills", lambda: next(counts))
    assert Workers([WITHOUT], resolve(WITHOUT), {})._ending(code).startswith(reason)


def test_the_systems_count_of_kills_is_read():
    count = memory_kills()
    assert count is None or count >= 0
    if Path("/proc/vmstat").exists() and "\noom_kill " in Path("/proc/vmstat").read_text():
        assert count is not None


def test_files_of_the_current_folder_are_no_modules_of_a_worker(tmp_path, monkeypatch):
    source = write(tmp_path / "source", 2)
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    for name in ("json", "torch", "pickle", "nanostudy"):
        Path(f"{name}.py").write_text(f"open({str(tmp_path / 'executed')!r}, 'w')\nraise SystemExit('executed')\n")
    api.run_study(source, tmp_path / "out", workers=1, resources=RESOURCES, listener=Listener())
    assert not (tmp_path / "executed").exists()


@posix_only
def test_an_owner_file_that_is_a_link_leads_nowhere(tmp_path):
    other = tmp_path / "other.json"
    other.write_text(json.dumps({"host": "another", "token": "x", "renewals": 0}))
    before = other.read_text()
    (tmp_path / "study").mkdir()
    (tmp_path / "study" / FILE).symlink_to(other)
    with hold(tmp_path / "study", watched_for=0.2) as lease:
        assert not lease.path.is_symlink()
        assert json.loads(lease.path.read_text())["token"] == lease.content["token"]
    assert other.read_text() == before


@posix_only
def test_a_folder_with_other_files_begins_no_study(tmp_path):
    source = write(tmp_path / "source", 2)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").write_text("everything")
    with pytest.raises(
        NanostudyError, match=r"holds other files \(thesis.tex\) and no study.*--out; nothing was changed"
    ):
        api.run_study(source, tmp_path / "mine", executor="inline", resources=RESOURCES, listener=Listener())
    assert [path.name for path in (tmp_path / "mine").iterdir()] == ["thesis.tex"]


def test_mixed_conditions_are_named(tmp_path):
    """As a study of an earlier version may hold them, whose workers built kernels each for itself."""
    from nanostudy.analysis.results import _mixed, read_results

    source = write(tmp_path / "source", 2, 3, 4)
    api.run_study(source, tmp_path / "out", executor="inline", resources=RESOURCES, listener=Listener())
    assert not [note for note in read_results([tmp_path / "out"]).notes if "mixed" in note]
    from nanostudy.study.store import FILE as STORE
    from nanostudy.study.store import Store

    with Store.read(tmp_path / "out" / STORE) as store:
        rows = store.rows()
    odd = dataclasses.replace(rows[1], machine={**rows[1].machine, "compiled": not rows[1].machine["compiled"]})
    (note,) = _mixed([rows[0], odd, rows[2]])
    assert f"1 of 3 experiments ({rows[1].name}) ran in fp32" in note
    elsewhere = dataclasses.replace(odd, machine={**odd.machine, "device_name": "another"})
    assert _mixed([rows[0], elsewhere, rows[2]]) == []
