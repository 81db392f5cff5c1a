"""A study in real processes, by its command: killed, stopped, its folder taken away; compared with one that ran in peace."""

import hashlib
import json
import os
import pickle
import platform
import random
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from pathlib import Path

import pytest
from conftest import jobs_of, small
from test_execute import RESOURCES, Listener, assert_same_study, finished, posix_only, write_study

from nanostudy import api
from nanostudy import atomic as files
from nanostudy.errors import NanostudyError
from nanostudy.study import lease, plan
from nanostudy.study.lease import hold
from nanostudy.study.store import FILE, Store
from nanostudy.study.tasks import TrainStack
from nanostudy.study.workers import Workers, receive, send
from nanostudy.training.events import Saving, Started

needs_proc = pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="needs /proc to find worker processes")

# `nanostudy` with narrow stacks, so that slots are refilled, and with checkpoints in quick succession
CHILD = """
from nanostudy.cli import main as cli
from nanostudy import api
from nanostudy.study import plan
plan.WIDEST["cpu"] = 2
run_study = api.run_study
api.run_study = lambda *args, **options: run_study(*args, save_every=0.05, **options)
cli.main()
"""
OPTIONS = ["--device", "cpu", "--precision", "fp32", "--threads", "1"]
# threads that wait without spinning: what else runs on this machine would slow them down a hundredfold
ENVIRONMENT = {**os.environ, "OMP_WAIT_POLICY": "PASSIVE"}
GRID = {"block_size": [8, 16], "max_iters": [500, 700]}  # two stacks of four, two members at a time
SLOW = {"log_interval": 5, "eval_interval": 100}


def start(source: Path, out: Path, workers: int = 2) -> subprocess.Popen:
    """`nanostudy study run` in a process group of its own, as a terminal makes it."""
    arguments = ["study", "run", "--no-report", str(source), "--out", str(out), "--workers", str(workers), *OPTIONS]
    return subprocess.Popen(
        [sys.executable, "-c", CHILD, *arguments],
        env=ENVIRONMENT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=os.name == "posix",
    )


def finish(process: subprocess.Popen) -> str:
    out, err = process.communicate(timeout=300)
    assert process.returncode == 0, out + err
    assert "Traceback" not in err
    return out


def rows_of(study: Path) -> int:
    """How much was trained, as far as the tables tell."""
    return sum(path.read_bytes().count(b"\n") for path in study.glob("*/training.csv"))


def wait_for_training(process: subprocess.Popen, study: Path, more: int = 5) -> None:
    before, since = rows_of(study), time.monotonic()
    while rows_of(study) < before + more:
        assert process.poll() is None, process.communicate()
        assert time.monotonic() - since < 120
        time.sleep(0.01)


def workers_of(process: subprocess.Popen) -> list[int]:
    """The pids of its worker processes."""
    pids = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            parent = int(stat.read_text().rpartition(")")[2].split()[1])
            if parent == process.pid and "nanostudy.study.workers" in (stat.parent / "cmdline").read_text():
                pids.append(int(stat.parent.name))
        except (OSError, ValueError):
            pass
    return pids


def alive(pid: int) -> bool:
    try:
        return "nanostudy.study.workers" in Path(f"/proc/{pid}/cmdline").read_text()
    except OSError:
        return False


def assert_all_end(pids: list[int], within: float = 10.0) -> None:
    since = time.monotonic()
    while any(alive(pid) for pid in pids):
        assert time.monotonic() - since < within, "a worker outlives its study"
        time.sleep(0.02)


class Watch:
    """Looks at a study the whole time, as `study status` does: what is finished must stay, and the store be readable."""

    def __init__(self, study: Path) -> None:
        self.study, self.seen, self.faults, self.looks = study, {}, [], 0
        self.over = threading.Event()
        self.thread = threading.Thread(target=self.look, daemon=True)

    def __enter__(self):
        self.thread.start()
        return self

    def __exit__(self, *_):
        self.over.set()
        self.thread.join()
        assert self.faults == []

    def look(self) -> None:
        while not self.over.wait(0.05):
            try:
                if (self.study / FILE).exists():
                    self.check()
            except (NanostudyError, AssertionError) as fault:
                if "has not begun" not in str(fault):
                    self.faults.append(repr(fault))

    def check(self) -> None:
        with Store.read(self.study / FILE) as store:
            rows = store.rows(status="finished")
        self.looks += 1
        now = {row.name: (row, checksum(self.study / row.name)) for row in rows}
        for name, (row, digest) in self.seen.items():
            assert name in now, f"{name} was finished and is lost"
            assert now[name][1] == digest, f"{name} was finished and its folder changed"
            assert {**vars(now[name][0]), "sampled": 0} == {**vars(row), "sampled": 0}
        self.seen = now


def checksum(folder: Path) -> str:
    names = ("run.json", "training.csv", "evaluations.csv", "best.safetensors", "last.safetensors")
    return hashlib.sha256(b"".join((folder / name).read_bytes() for name in names)).hexdigest()


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> Path:
    return write_study(tmp_path_factory.mktemp("study"), GRID, settings=SLOW)


@pytest.fixture(scope="module")
def reference(source) -> Path:
    """The folder of a study that ran in this process, undisturbed and watched."""
    out = source.parent / "reference"
    with pytest.MonkeyPatch.context() as patch, Watch(out) as watch:
        patch.setitem(plan.WIDEST, "cpu", 2)
        api.run_study(source, out, executor="inline", resources=RESOURCES, listener=Listener(), save_every=1e9)
    assert watch.looks > 10
    return out


# --- killed


def kill(process: subprocess.Popen, draw: random.Random, who: str) -> str:
    """SIGKILL for the study or for one of its workers; returns which it was."""
    workers = workers_of(process)
    if who == "worker" and workers:
        os.kill(draw.choice(workers), signal.SIGKILL)
        return "worker"
    process.kill()
    process.communicate()
    assert_all_end(workers)
    return "study"


def killed_until_done(source: Path, out: Path, kills: int, seed: int) -> Counter:
    """Starts the study again and again and kills it, or its workers, at random moments; at last lets it end."""
    draw, hit, process, printed = random.Random(seed), Counter(), None, ""
    with Watch(out):
        while hit.total() < kills and not all_done(out):
            process = process if process and process.poll() is None else start(source, out)
            if draw.random() < 0.8:  # the others hit anything from the first import on
                wait_for_training_or_end(process, out)
            time.sleep(draw.random() * (0.4 if hit.total() % 3 else 2))
            if process.poll() is None:
                hit[kill(process, draw, draw.choice(["study", "worker", "worker"]))] += 1
        process = process if process and process.poll() is None else start(source, out)
        printed = finish(process)
    assert "8 of 8 experiments finished" in printed
    return hit


def wait_for_training_or_end(process: subprocess.Popen, out: Path) -> None:
    before, since = rows_of(out), time.monotonic()
    while rows_of(out) <= before and process.poll() is None and time.monotonic() - since < 60:
        time.sleep(0.01)


def all_done(out: Path) -> bool:
    folders = [path.parent for path in out.glob("*/run.json")]
    return len(folders) == 8 and all(finished(folder) for folder in folders)


@posix_only
@needs_proc
def test_killed_studies_end_with_the_same_bits(source, reference, tmp_path):
    hit = killed_until_done(source, tmp_path / "killed", 2, seed=209)  # a worker, then the study
    assert_same_study(tmp_path / "killed", reference)
    assert hit.total() == 2, hit


@pytest.mark.soak
@posix_only
@needs_proc
def test_fifty_kills_end_with_the_same_bits(tmp_path):
    source = write_study(tmp_path, {**GRID, "max_iters": [1500, 2000]}, settings=SLOW)
    reference = tmp_path / "reference"
    finish(start(source, reference))
    hit: Counter = Counter()
    for attempt in range(50):
        if hit.total() >= 50:
            break
        out = tmp_path / f"killed {attempt}"
        hit += killed_until_done(source, out, 50 - hit.total(), seed=100 + attempt)
        assert_same_study(out, reference)
    print(f"kills: {dict(hit)} in {attempt} studies")
    assert hit.total() >= 50
    assert min(hit["study"], hit["worker"]) >= 10


@posix_only
def test_a_killed_worker_goes_on_from_its_checkpoint(source, reference, tmp_path, monkeypatch):
    """By Python, with the real policy and real workers: each is killed in its midst, once."""
    monkeypatch.setitem(plan.WIDEST, "cpu", 2)
    killed, starts, original = set(), [], Workers.next

    def next_report(self, timeout):
        arrived = original(self, timeout)
        report = arrived[1] if arrived else None
        starts.extend([report.step] if isinstance(report, Started) else [])
        if arrived and arrived[0] not in killed and getattr(report, "step", 0) > 150:
            killed.add(arrived[0])
            self.processes[arrived[0]].kill()
        return arrived

    monkeypatch.setattr(Workers, "next", next_report)
    listener = Listener()
    rows = api.run_study(source, tmp_path / "out", workers=2, resources=RESOURCES, listener=listener, save_every=0.05)
    assert {row.status for row in rows} == {"finished"}
    assert sum(step > 0 for step in starts) >= 2, "it began again"
    assert sum("killed by SIGKILL); it goes on from its last checkpoint" in text for text in listener.messages) == 2
    assert_same_study(tmp_path / "out", reference)


def test_a_worker_saves_only_what_was_answered_and_ends_with_its_study(tmp_path, corpus):
    """Spoken to as its study does: it holds still before a checkpoint, and ends when nobody is left to answer."""
    (tmp_path / "stack").mkdir()
    task = TrainStack(tuple(jobs_of(small(n_layer=1))), corpus, tmp_path / "stack", 1, 0.0)
    command = [sys.executable, "-c", "from nanostudy.study.workers import main; main()"]
    worker = subprocess.Popen(command, env=ENVIRONMENT, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    try:
        send(worker.stdin, ("task", pickle.dumps((task, RESOURCES))))
        for answered in (False, True):
            while not isinstance(receive(worker.stdout), Saving):
                pass
            time.sleep(0.3)
            assert task.path.exists() is answered
            if not answered:
                send(worker.stdin, ("answer", None))
        worker.stdin.close()
        assert worker.wait(timeout=10) == 0
    finally:
        worker.kill()
        worker.wait()


# --- asked to stop, refused, moved, taken away


def stopped(process: subprocess.Popen, workers: list[int]) -> tuple[str, str, float]:
    begun = time.monotonic()
    out, err = process.communicate(timeout=60)
    assert process.returncode == 130, out + err
    assert "Traceback" not in out + err
    assert_all_end(workers)
    return out, err, time.monotonic() - begun


@posix_only
@needs_proc
def test_a_study_is_stopped_and_moved_and_loses_its_folder_for_a_while(source, reference, tmp_path):
    """One study through three sessions; it ends as the one that was undisturbed."""
    out = tmp_path / "first place"
    with Watch(out) as watch:
        process = start(source, out)
        wait_for_training(process, out)
        refused_beside(source, out)
        workers = workers_of(process)
        assert workers
        for pid in (process.pid, *workers):  # as a batch system does
            os.kill(pid, signal.SIGTERM)
        printed, problem, seconds = stopped(process, workers)
        assert seconds < 15
        assert "the same command goes on" in problem
        assert "stopping" in printed
        assert progress_is_saved(out)
    assert watch.looks > 10

    process = start(source, out, workers=1)
    wait_for_training(process, out)
    workers = workers_of(process)
    for pid in workers:
        os.kill(pid, signal.SIGSTOP)  # it will not answer
    os.killpg(process.pid, signal.SIGINT)  # as a terminal does
    time.sleep(0.5)
    assert process.poll() is None
    process.send_signal(signal.SIGINT)
    _, problem, seconds = stopped(process, workers)
    assert seconds < 10
    assert "stopped at once" in problem

    out = out.rename(tmp_path / "second place")
    process = start(source, out)
    wait_for_training(process, out)
    out.rename(tmp_path / "away")
    time.sleep(1)
    assert not out.exists(), "a folder was made in the place of the one that is away"
    (tmp_path / "away").rename(out)
    printed = finish(process)
    assert "does not answer" in printed
    assert "answers again; going on" in printed
    assert_same_study(out, reference)


def refused_beside(source: Path, out: Path) -> None:
    """A second process cannot use the folder, and changes nothing there."""
    definition = (out / "study.yaml").read_bytes()
    with pytest.raises(NanostudyError, match=f"Another process is working in {out}"):
        api.run_study(source, out, workers=1, resources=RESOURCES, listener=Listener())
    assert (out / "study.yaml").read_bytes() == definition


def progress_is_saved(out: Path) -> bool:
    """Every experiment under way stands in the store at the update that its table ends with."""
    with Store.read(out / FILE) as store:
        rows = [row for row in store.rows() if row.status != "finished" and row.step]
        assert all(row.status == "waiting" for row in rows)
    for row in rows:
        last = (out / row.name / "training.csv").read_text().splitlines()[-1].split(",")[0]
        assert last in ("step", str(row.step - row.step % 5)), row.name
    return True


# --- the folder on a drive that several machines mount


def test_a_folder_in_use_on_another_machine_is_refused(tmp_path, capsys):
    """Its sign changes while one looks. A sign that stands still is of a process that was killed, and gives way."""
    sign = tmp_path / ".owner"
    sign.write_text('{"host": "another", "token": "a", "renewals": 1}')
    beating = threading.Timer(0.3, lambda: sign.write_text('{"host": "another", "token": "a", "renewals": 2}'))
    beating.start()
    with pytest.raises(NanostudyError, match="on another is working in"), hold(tmp_path, watched_for=5.0):
        pass
    beating.join()
    assert sign.exists()
    with hold(tmp_path, watched_for=0.5) as here:
        assert json.loads(sign.read_text())["token"] == here.content["token"]
    assert not sign.exists()
    assert capsys.readouterr().err.count("was in use on another; watching") == 2


def test_a_sign_is_renewed_and_one_that_was_taken_over_is_noticed(tmp_path, monkeypatch):
    monkeypatch.setattr(lease, "RENEWED_EVERY", 0.05)
    sign = tmp_path / ".owner"
    with hold(tmp_path) as here:
        end = time.monotonic() + 10
        while json.loads(sign.read_text() or "{}").get("renewals", 0) < 2 and time.monotonic() < end:
            time.sleep(0.01)
        assert json.loads(sign.read_text())["renewals"] >= 2
        here.check()
        while here.taken_by is None and time.monotonic() < end:
            sign.write_text('{"host": "another", "token": "b"}')
            time.sleep(0.1)
        with pytest.raises(NanostudyError, match="another took"):
            here.check()
    assert json.loads(sign.read_text())["token"] == "b", "the sign is no longer ours to remove"


def test_a_sign_of_this_machine_is_not_waited_for(tmp_path, monkeypatch):
    """The folder's lock shows that no process here has it; where there are no locks, it has not."""
    before = json.dumps({"host": platform.node(), "token": "a", "renewals": 1})
    (tmp_path / ".owner").write_text(before)
    began = time.monotonic()
    with hold(tmp_path):
        pass
    (tmp_path / ".owner").write_text("half a si")
    with hold(tmp_path):
        pass
    assert time.monotonic() - began < 10
    monkeypatch.setattr(files, "_lock", lambda descriptor: None)
    (tmp_path / ".owner").write_text(before)
    began = time.monotonic()
    with hold(tmp_path, watched_for=0.5):
        assert time.monotonic() - began >= 0.5
