"""The store keeps what it was told: against a plain dictionary, through kills, full disks, locks and damage.

Where a test asks what the file holds, it asks SQLite itself, not the store.
"""

import contextlib
import dataclasses
import itertools
import json
import math
import os
import random
import shutil
import sqlite3
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from nanostudy.errors import NanostudyError
from nanostudy.result import Result, Status
from nanostudy.settings import Experiment
from nanostudy.study import database, schema
from nanostudy.study.grid import Entry
from nanostudy.study.store import StackRow, Store

posix_only = pytest.mark.skipif(os.name != "posix", reason="needs POSIX signals and limits")
MACHINE = {"device": "cpu", "threads": 1}


def entries(*ids: int) -> list[Entry]:
    return [Entry(id, f"e{id}", "all", Experiment(seed=id, dropout=0.1)) for id in ids]


def fill(store: Store, *ids: int) -> None:
    store.add(entries(*ids), [f"identity {id}" for id in ids], [1000 + id for id in ids])


def start(store: Store, name: str, step: int = 0, evaluated_at: int = -1) -> None:
    store.started(name, step, evaluated_at, members=3, stack=2, machine=MACHINE)


def finish(store: Store, name: str, diverged: str | None = None, best_step: int | None = 10) -> None:
    status = Status.FINISHED if diverged is None else Status.DIVERGED
    measures = {"updates": 19, "tokens": 640, "seconds": 2.5, "best_step": best_step}
    losses = {32: 2.25, 64: math.nan}
    result = Result(name, "", "{}", status, measures, reason=diverged, step=20, skipped=1, context_losses=losses)
    store.finished(result)


def asked(path: Path, sql: str, *values: object) -> list[tuple]:
    """What the file holds, as SQLite says."""
    with contextlib.closing(sqlite3.connect(path, isolation_level=None)) as db:
        return db.execute(sql, values).fetchall()


@pytest.fixture
def path(tmp_path) -> Path:
    return tmp_path / "a study & more?" / "study.sqlite"


@pytest.fixture
def store(path):
    path.parent.mkdir()
    with Store.open(path) as opened:
        fill(opened, 1, 2, 3)
        opened.commit()
        yield opened


@pytest.fixture
def hurry(monkeypatch):
    """Patience is tested, not endured."""
    monkeypatch.setattr(database, "PATIENCE", 0.2)
    monkeypatch.setattr(database, "GLANCE", 0.02)


# --- what goes in comes out


def test_an_experiment_from_waiting_to_finished(store, path):
    settings = json.dumps(Experiment(seed=2, dropout=0.1).as_dict())
    measures = dict.fromkeys(
        ("train_loss", "val_loss", "test_loss", "best_step", "best_val_loss", "updates", "tokens", "seconds")
    )
    measures["parameters"] = 1002
    assert store.row("e2") == Result("e2", "identity 2", settings, Status.WAITING, measures, id=2, part="all")
    assert store.row("e2").experiment == Experiment(seed=2, dropout=0.1)
    assert store.row("e2").gap is None

    start(store, "e2")
    store.note("note", "bf16 is slow here", experiment="e2", stack=2)
    for step, train_loss, val_loss in ((0, 4.0, 4.1), (10, 2.0, 2.5), (20, 1.5, 2.75)):
        store.evaluated("e2", step, 32 * step, step / 10, train_loss, val_loss)
    row = store.row("e2")
    assert (row.status, row.stack, row.members, row.step, row.tokens, row.seconds) == ("running", 2, 3, 20, 640, 2.0)
    assert (row.train_loss, row.val_loss, row.best_step, row.best_val_loss, row.gap) == (1.5, 2.75, 10, 2.5, 1.25)
    assert row.machine == MACHINE

    finish(store, "e2")
    store.sampled(["e2"])
    store.commit()
    with Store.read(path) as reader:
        row = reader.row("e2")
        assert (row.status, row.reason, row.updates, row.skipped, row.step) == ("finished", None, 19, 1, 20)
        assert (row.tokens, row.seconds, row.val_loss, row.best_step, row.best_val_loss) == (640, 2.5, 2.75, 10, 2.5)
        assert (row.context_losses, row.sampled) == ({32: 2.25, 64: None}, True)
        assert reader.evaluations("e2")[1] == {
            **{"step": 10, "tokens": 320, "seconds": 1.0, "train_loss": 2.0, "val_loss": 2.5}
        }
        assert reader.counts() == {"waiting": 2, "running": 0, "finished": 1, "diverged": 0, "failed": 0}
        assert reader.identities() == {f"e{id}": f"identity {id}" for id in (1, 2, 3)}
        [event] = reader.events()
        assert (event["experiment"], event["stack"], event["kind"]) == ("e2", 2, "note")
        assert event["detail"] == "bf16 is slow here"


def test_a_restart_drops_what_is_made_again(store):
    start(store, "e1")
    for step, loss in ((0, 4.0), (10, 3.0), (20, 2.0)):
        store.evaluated("e1", step, step, step, loss, loss)
    start(store, "e1", step=12, evaluated_at=10)
    row = store.row("e1")
    assert [evaluation["step"] for evaluation in store.evaluations("e1")] == [0, 10]
    assert (row.step, row.val_loss, row.best_step, row.best_val_loss) == (12, 3.0, 10, 3.0)
    store.evaluated("e1", 10, 10, 11.0, 2.9, 3.5)  # said again: the later word counts
    assert [evaluation["val_loss"] for evaluation in store.evaluations("e1")] == [4.0, 3.5]
    start(store, "e1")
    row = store.row("e1")
    assert store.evaluations("e1") == []
    assert (row.step, row.val_loss, row.best_step, row.best_val_loss, row.tokens) == (0, None, None, None, None)


def test_losses_that_are_not_finite_are_null(store, path):
    start(store, "e1")
    store.evaluated("e1", 0, 0, 0.0, 4.0, 4.0)
    store.evaluated("e1", 5, 5, 0.5, math.inf, math.nan)
    assert (store.row("e1").val_loss, store.row("e1").best_val_loss) == (None, 4.0)
    finish(store, "e1", diverged="loss is NaN at update 7", best_step=0)
    store.commit()
    assert asked(path, "SELECT typeof(train_loss), typeof(val_loss) FROM evaluations WHERE step = 5") == [
        ("null", "null")
    ]
    row = store.row("e1")
    assert (row.status, row.reason, row.best_step, row.best_val_loss) == ("diverged", "loss is NaN at update 7", 0, 4.0)
    start(store, "e2")
    finish(store, "e2", diverged="at once", best_step=None)
    assert store.row("e2").best_step is None


def test_failures_retries_and_sittings(store):
    for name in ("e1", "e2", "e3"):
        start(store, name)
    store.progressed("e1", 7)
    finish(store, "e3")
    store.failed("e2", "out of memory")
    assert (store.row("e2").status, store.row("e2").reason) == ("failed", "out of memory")
    store.end_session()
    assert [(row.status, row.step) for row in store.rows()][:1] == [("waiting", 7)]
    store.requeue(["e1", "e2", "e3"])
    assert [(row.status, row.reason) for row in store.rows()] == [
        ("waiting", None),
        ("waiting", None),
        ("finished", None),
    ]


def test_rows_are_chosen(store):
    fill(store, 12, 11)
    for name, loss in (("e11", 2.0), ("e2", 2.0), ("e12", 1.0), ("e3", 0.5)):
        start(store, name)
        store.evaluated(name, 0, 0, 0.0, loss, loss)
        if name != "e3":
            finish(store, name)
    finish(store, "e3", diverged="yes")
    names = lambda rows: [row.name for row in rows]  # noqa: E731
    assert names(store.rows()) == ["e1", "e2", "e3", "e11", "e12"]
    assert names(store.rows("finished")) == ["e2", "e11", "e12"]
    assert names(store.rows(names=["e3", "e1", "nobody"])) == ["e1", "e3"]
    assert names(store.rows("waiting", names=["e3", "e1"])) == ["e1"]
    assert store.rows(names=[]) == []
    assert names(store.best(2)) == ["e12", "e2"]
    with pytest.raises(NanostudyError, match=r"no experiment 'e111'.*e11"):
        store.row("e111")
    for call in (lambda: store.evaluations("x"), lambda: store.progressed("x", 1), lambda: finish(store, "x")):
        with pytest.raises(NanostudyError, match="no experiment 'x'"):
            call()


def test_events_stacks_and_progress(store, path):
    store.note("worker", "worker 1 died", stack=4)
    store.note("retry", "again", experiment="e1")
    store.note("worker", "worker 2 died")
    assert [event["detail"] for event in store.events()] == ["worker 1 died", "again", "worker 2 died"]
    assert [event["detail"] for event in store.events(limit=1)] == ["worker 2 died"]
    assert [event["experiment"] for event in store.events()] == [None, "e1", None]

    first = store.add_stacks([(["e1", "e2"], 2), (["e3"], 1)])
    assert first == [StackRow(1, ("e1", "e2"), 2), StackRow(2, ("e3",), 1)]
    store.close_stack(2)
    assert store.open_stacks() == first[:1]
    store.close()
    with Store.open(path) as again:
        assert [row.id for row in again.add_stacks([(["e3"], 1)])] == [3]  # an id is given once
        assert [row.id for row in again.open_stacks()] == [1, 3]

        assert again.progress() is None
        live = {"name": "e2", "step": 7, "loss": 2.5, "learning_rate": 0.001, "losses": [(5, 3.5), (6, None)]}
        worker = {"worker": 1, "doing": "e2", "phase": "training", "tokens_per_second": 5, "members": [live]}
        again.set_progress(12.5, [worker])
        again.set_progress(None, [])
        again.set_progress(3.5, [worker])
        assert again.progress()[1:] == (3.5, [worker])
        for damage in ({"loss": "low"}, {"losses": [[1]]}, {"losses": [["<b>", 1.0]]}):
            again.set_progress(3.5, [{**worker, "members": [{**live, **damage}]}])
            assert again.progress() is None


def test_the_version_changes_with_every_commit_and_with_the_file(store, path):
    with Store.read(path) as reader:
        before = reader.version()
        assert reader.version() == before
        start(store, "e1")
        store.commit()
        after = reader.version()
        assert after != before
        shutil.copy(path, path.with_name("copy"))
        os.replace(path.with_name("copy"), path)
        assert reader.version() != after


def test_adding_again_changes_nothing_and_adding_another_is_refused(store):
    start(store, "e1")
    fill(store, 1, 2, 3, 4)  # a study that grew
    assert [(row.id, row.status) for row in store.rows()] == [
        (1, "running"),
        (2, "waiting"),
        (3, "waiting"),
        (4, "waiting"),
    ]
    other = [dataclasses.replace(entries(9)[0], id=1)]
    store.add(other, ["identity 9"], [1])
    store.note("after", "goes in although the one before is refused")
    with pytest.raises(NanostudyError, match="refused a change"):
        store.commit()
    assert [event["kind"] for event in store.events()] == ["after"]
    assert store.row("e1").identity == "identity 1"


def test_a_reader_cannot_write_and_sees_only_what_is_committed(store, path):
    with Store.read(path) as reader:
        with pytest.raises(NanostudyError, match="for reading"):
            reader.note("a", "b")
        store.note("a", "b")
        assert reader.events() == []
        store.commit()
        assert len(reader.events()) == 1


# --- finished rows never change


@pytest.mark.parametrize("diverged", [None, "too hot"])
def test_results_are_immutable_whoever_writes(store, path, diverged):
    for name in ("e1", "e2"):
        start(store, name)
        store.evaluated(name, 10, 10, 1.0, 2.0, 2.0)
    finish(store, "e1", diverged)
    store.commit()
    before = asked(path, "SELECT * FROM experiments WHERE id = 1")
    columns = [row[1] for row in asked(path, "PRAGMA table_info(experiments)")]
    assert len(columns) == len(before[0]) > 20
    forbidden = [
        *(
            f"UPDATE experiments SET {column} = 77 WHERE id = 1"
            for column in columns
            if column not in ("sampled", "status")
        ),
        "UPDATE experiments SET status = 'waiting' WHERE id = 1",
        "UPDATE experiments SET sampled = 1, val_loss = 0 WHERE id = 1",
        "UPDATE experiments SET rowid = 77 WHERE id = 1",
        "DELETE FROM experiments WHERE id = 1",
        "INSERT OR REPLACE INTO experiments (id, name, part, identity, settings, parameters) VALUES (1, 'n', 'p', 'i', '{}', 1)",
        "INSERT OR REPLACE INTO experiments (name, part, identity, settings, parameters) VALUES ('e1', 'p', 'i', '{}', 1)",
        "REPLACE INTO experiments (name, part, identity, settings, parameters) VALUES ('n', 'p', 'identity 1', '{}', 1)",
        "INSERT INTO evaluations (experiment, step) VALUES (1, 11)",
        "INSERT OR REPLACE INTO evaluations (experiment, step) VALUES (1, 10)",
        "UPDATE evaluations SET val_loss = 0 WHERE experiment = 1",
        "UPDATE evaluations SET experiment = 2, step = 5 WHERE experiment = 1",
        "UPDATE evaluations SET experiment = 1, step = 5 WHERE experiment = 2",
        "DELETE FROM evaluations WHERE experiment = 1",
        "UPDATE environments SET machine = 'a better one'",
    ]
    for statement in forbidden:
        with pytest.raises(sqlite3.IntegrityError, match="never change"):
            asked(path, statement)
    for call in (
        lambda: start(store, "e1"),
        lambda: store.evaluated("e1", 30, 1, 1.0, 1.0, 1.0),
        lambda: store.failed("e1", "no"),
        lambda: finish(store, "e1", "other"),
        lambda: store.progressed("e1", 3),
    ):
        call()
        while True:  # each refused write is told once
            try:
                store.commit()
                break
            except NanostudyError as problem:
                assert "never changed" in str(problem)  # noqa: PT017
    assert asked(path, "SELECT * FROM experiments WHERE id = 1") == before
    assert [evaluation["step"] for evaluation in store.evaluations("e1")] == [10]
    store.sampled(["e1"])
    assert store.row("e1").sampled


def test_an_experiment_stays_itself_while_unfinished(store, path):
    for column in ("id", "name", "identity", "settings"):
        with pytest.raises(sqlite3.IntegrityError, match="never change"):
            asked(path, f"UPDATE experiments SET {column} = 77 WHERE id = 1")
    asked(path, "UPDATE experiments SET step = 77 WHERE id = 1")


# --- migrations


def test_an_old_store_is_migrated_by_a_writer_only(store, path, monkeypatch):
    def colour(db):
        db.execute("ALTER TABLE experiments ADD COLUMN colour TEXT")

    store.close()
    monkeypatch.setattr(schema, "MIGRATIONS", [*schema.MIGRATIONS, colour])
    before = path.read_bytes()
    with pytest.raises(NanostudyError, match="older nanostudy"):
        Store.read(path)
    assert path.read_bytes() == before
    for _ in range(2):
        Store.open(path).close()
    assert asked(path, "SELECT name, colour FROM experiments") == [("e1", None), ("e2", None), ("e3", None)]
    assert asked(path, "SELECT name FROM migrations ORDER BY rowid") == [("create",), ("colour",)]
    assert Store.read(path).counts()["waiting"] == 3


def test_a_migration_that_fails_leaves_nothing_half_done(store, path, monkeypatch):
    def half(db):
        db.execute("ALTER TABLE experiments ADD COLUMN colour TEXT")
        db.execute("UPDATE experiments SET colour = 'red'")
        raise sqlite3.OperationalError("the power fails")

    store.close()
    before = path.read_bytes()
    with monkeypatch.context() as patch:
        patch.setattr(schema, "MIGRATIONS", [*schema.MIGRATIONS, half])
        with pytest.raises(NanostudyError, match="the power fails"):
            Store.open(path)
    assert path.read_bytes() == before
    Store.open(path).close()


def test_a_newer_store_is_refused(store, path):
    store.close()
    asked(path, "INSERT INTO migrations VALUES ('wormholes', 'later')")
    before = path.read_bytes()
    for opening in (Store.open, Store.read):
        with pytest.raises(NanostudyError, match=r"newer nanostudy.*wormholes"):
            opening(path)
    assert path.read_bytes() == before


# --- what is no store


def test_no_file_no_database_no_study(tmp_path, hurry):
    path = tmp_path / "study.sqlite"
    with pytest.raises(NanostudyError, match=r"no study in.*study\.sqlite"):
        Store.read(path)
    assert not path.exists()
    path.touch()
    with pytest.raises(NanostudyError, match="has not begun"):
        Store.read(path)
    path.write_text("Dear diary, " * 500)
    for opening in (Store.open, Store.read):
        with pytest.raises(NanostudyError, match="study rebuild") as caught:
            opening(path)
        assert isinstance(caught.value.__cause__, sqlite3.DatabaseError)
    assert path.read_text() == "Dear diary, " * 500
    path.unlink()
    asked(path, "CREATE TABLE recipes (cake)")
    for opening in (Store.open, Store.read):
        with pytest.raises(NanostudyError, match="no study's"):
            opening(path)
    with pytest.raises(NanostudyError, match="drive and folder"):
        Store.open(tmp_path / "gone" / "study.sqlite")


def test_a_damaged_store_says_how_to_rebuild(store, path, hurry):
    store.close()
    whole = bytearray(path.read_bytes())
    whole[1024:] = random.Random(1).randbytes(len(whole) - 1024)
    path.write_bytes(whole)
    with pytest.raises(NanostudyError, match=r"damaged.*rebuild .*more\?'` makes it again"):
        Store.open(path)
    with pytest.raises(NanostudyError, match=r"damaged.*rebuild"):
        Store.read(path).rows()


# --- faults while writing: told, and nothing lost


def test_a_full_disk_loses_nothing(store, path):
    connection = store._db._connected("rw")
    pages = connection.execute("PRAGMA page_count").fetchone()[0]
    connection.execute(f"PRAGMA max_page_count = {pages + 1}")
    for i in range(20):
        store.note("long", f"{i} " + "x" * 2000)
    with pytest.raises(NanostudyError, match=r"No space is left for .*study\.sqlite") as caught:
        store.commit()
    assert isinstance(caught.value.__cause__, sqlite3.OperationalError)
    assert asked(path, "SELECT count(*) FROM events") == [(0,)]
    store.note("last", "after the failure")
    store.commit()
    details = [detail.split()[0] for (detail,) in asked(path, "SELECT detail FROM events ORDER BY id")]
    assert details == [*map(str, range(20)), "after"]


@posix_only
def test_a_write_that_the_system_refuses_loses_nothing(store, path):
    import resource

    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    store.note("long", "x" * 100_000)
    resource.setrlimit(resource.RLIMIT_FSIZE, (path.stat().st_size + 4096, hard))
    try:
        for _ in range(2):
            with pytest.raises(NanostudyError, match="run again"):
                store.commit()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert asked(path, "SELECT count(*) FROM events") == [(0,)]
    store.commit()
    assert asked(path, "SELECT length(detail) FROM events") == [(100_000,)]


def test_a_lock_held_too_long_is_told_and_then_gone(hurry, store, path):
    with contextlib.closing(sqlite3.connect(path, isolation_level=None)) as other:
        other.execute("BEGIN IMMEDIATE")
        store.note("a", "b")
        with pytest.raises(NanostudyError, match="locked by another program") as caught:
            store.commit()
        assert isinstance(caught.value.__cause__, sqlite3.OperationalError)
    store.commit()
    assert asked(path, "SELECT detail FROM events") == [("b",)]


def test_a_drive_that_drops_out_and_returns(store, path):
    away = path.parent.with_name("away")
    path.parent.rename(away)
    store._db._disconnect()  # as its file handle is lost
    store.note("a", "b")
    path.parent.mkdir()  # the bare mount point
    with pytest.raises(NanostudyError, match="drive"):
        store.commit()
    assert list(path.parent.iterdir()) == []  # no new, empty store
    path.parent.rmdir()
    away.rename(path.parent)
    store.commit()
    assert asked(path, "SELECT detail FROM events") == [("b",)]


class Stub:
    """A connection whose COMMIT reaches the disk and then reports a failure."""

    def __init__(self, real, problem):
        self.real, self.problem = real, problem

    def execute(self, sql, values=()):
        cursor = self.real.execute(sql, values)
        if sql == "COMMIT":
            raise self.problem
        return cursor

    def close(self):
        self.real.close()


@pytest.mark.parametrize("problem", [sqlite3.OperationalError("disk I/O error"), KeyboardInterrupt()])
def test_a_commit_that_was_made_but_not_confirmed_is_not_made_twice(store, path, problem):
    start(store, "e1")
    finish(store, "e1")
    store.note("a", "first")
    store._db._connection = Stub(store._db._connected("rw"), problem)
    with pytest.raises((NanostudyError, KeyboardInterrupt)):
        store.commit()
    store.note("a", "second")
    store.commit()
    assert asked(path, "SELECT detail FROM events ORDER BY id") == [("first",), ("second",)]


def test_a_store_put_back_from_a_copy_loses_no_write(store, path):
    """The count of commits in the file is not the writer's: that alone must not look like a confirmed commit."""
    copy = path.read_bytes()
    store.note("a", "before")
    store.commit()
    store._db._disconnect()
    path.write_bytes(copy)
    store.note("a", "after")
    store.commit()
    assert asked(path, "SELECT detail FROM events") == [("after",)]


# --- places without locks, killed writers


def test_locks_are_probed(tmp_path):
    assert database.locks_work(tmp_path)
    assert list(tmp_path.iterdir()) == []
    probe = tmp_path / f".locks.{os.getpid()}.tmp"
    with contextlib.closing(sqlite3.connect(probe, isolation_level=None)) as other:
        other.execute("BEGIN EXCLUSIVE")  # as on a file system that grants no lock to anyone
        assert not database.locks_work(tmp_path)


def test_without_locks_one_writes_and_others_read(hurry, store, path, monkeypatch):
    store.close()
    with contextlib.closing(sqlite3.connect(path, isolation_level=None)) as nobody_can_lock:
        nobody_can_lock.execute("BEGIN EXCLUSIVE")
        with pytest.raises(NanostudyError, match="locked"):
            Store.open(path)
        monkeypatch.setattr(database, "locks_work", lambda folder: False)
        with Store.open(path) as writer, Store.read(path) as reader:
            for i in range(3):
                writer.note("a", str(i))
                writer.commit()
                assert [event["detail"] for event in reader.events()] == [str(n) for n in range(i + 1)]


def test_a_copy_that_a_commit_falls_into_is_not_used(hurry, store, path, monkeypatch):
    store.close()
    monkeypatch.setattr(database, "locks_work", lambda folder: False)
    torn = []

    def copy_with_a_commit_between(source: Path, target: Path) -> None:
        content = source.read_bytes()
        if not torn:
            torn.append(True)
            progress(6)
        half = len(content) // 2
        target.write_bytes(content[:half] + source.read_bytes()[half:])

    def progress(step: int) -> None:
        for name in writer.identities():
            writer.progressed(name, step)
        writer.commit()

    monkeypatch.setattr(database.shutil, "copyfile", copy_with_a_commit_between)
    with contextlib.closing(sqlite3.connect(path, isolation_level=None)) as other, Store.open(path) as writer:
        fill(writer, *range(4, 300))
        progress(5)
        with Store.read(path) as reader:
            reader._db._disconnect()
            other.execute("BEGIN EXCLUSIVE")  # so that the reader copies
            assert {row.step for row in reader.rows()} == {6}
        assert torn


HALF = """
import os, sqlite3, sys
db = sqlite3.connect(sys.argv[1], isolation_level=None)
db.execute("PRAGMA cache_size = 1")  # so that changed pages go to the file before the commit
db.execute("BEGIN")
for i in range(300):
    db.execute("UPDATE events SET detail = ?", ("half " + "y" * 300,))
    db.execute("INSERT INTO events (at, kind, detail) VALUES ('', 'half', ?)", ("y" * 3000,))
os.kill(os.getpid(), 9)
"""


@posix_only
def test_a_reader_reads_after_a_kill_within_a_commit_and_changes_nothing(store, path):
    for _ in range(50):
        store.note("whole", "x" * 3000)
    store.close()
    subprocess.run([sys.executable, "-c", HALF, path], check=False)
    journal = Path(f"{path}-journal")
    left = path.read_bytes(), journal.read_bytes()
    assert b"half yyy" in left[0]  # there was something to mend
    assert journal.stat().st_size > 0
    with Store.read(path) as reader:
        assert [event["kind"] for event in reader.events()] == ["whole"] * 50
    assert (path.read_bytes(), journal.read_bytes()) == left
    with Store.open(path) as writer:
        assert len(writer.events()) == 50
    assert not journal.exists()


WRITER = """
import itertools, pathlib, sys
from nanostudy.study.store import Store
store = Store.open(pathlib.Path(sys.argv[1]))
print(flush=True)
for batch in itertools.count():
    for i in range(40):
        store.note(sys.argv[2], "z" * 500)
    store.set_progress(float(batch), [])
    store.commit()
"""


@posix_only
def test_kills_leave_whole_transactions(store, path):
    store.close()
    draw = random.Random(3)
    total = 0
    for sitting in range(10):
        command = [sys.executable, "-c", WRITER, path, str(sitting)]
        with subprocess.Popen(command, stdout=subprocess.PIPE) as child:
            child.stdout.readline()
            time.sleep(draw.uniform(0, 0.06))
            child.kill()
        with Store.read(path) as reader:
            found = reader.events()
        assert len(found) % 40 == 0
        assert len(found) >= total  # what was committed before is still there
        total = len(found)
    assert total > 0
    with Store.open(path) as writer:
        assert len(writer.events()) == total
    assert asked(path, "PRAGMA integrity_check") == [("ok",)]


READER = """
import json, pathlib, sys, threading
from nanostudy.result import Result, Status
from nanostudy.study import database
from nanostudy.study.store import Store
database.GLANCE = float(sys.argv[2])
done = threading.Event()
threading.Thread(target=lambda: (sys.stdin.read(), done.set()), daemon=True).start()
seen = []
with Store.read(pathlib.Path(sys.argv[1])) as store:
    print(flush=True)
    while not done.is_set():
        counts = store.counts()
        seen.append(sum(counts.values()) % 10 or counts["running"] % 10)
print(json.dumps([len(seen), sum(seen)]))
"""


@pytest.mark.parametrize("locks", [True, False])
def test_a_reader_reads_while_the_writer_writes(store, path, locks, monkeypatch):
    store.close()
    monkeypatch.setattr(database, "locks_work", lambda folder: locks)
    with contextlib.closing(sqlite3.connect(path, isolation_level=None)) as other, Store.open(path) as writer:
        if not locks:
            other.execute("BEGIN EXCLUSIVE")  # so that no reader gets a lock
        fill(writer, *range(4, 11))
        writer.commit()
        command = [sys.executable, "-c", READER, path, "0.25" if locks else "0.005"]
        pipe = subprocess.PIPE
        with subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=pipe, text=True) as reader:
            reader.stdout.readline()
            end = time.monotonic() + 0.8
            for batch in itertools.count(1):
                ids = range(10 * batch + 1, 10 * batch + 11)
                fill(writer, *ids)
                for id in ids:
                    start(writer, f"e{id}")
                writer.commit()
                if time.monotonic() > end:
                    break
            told, trouble = reader.communicate()
    assert trouble == ""
    reads, wrong = json.loads(told)
    assert reads > 3  # each of a copy, while the disk is busy
    assert wrong == 0


# --- speed


@pytest.fixture(scope="module")
def large(tmp_path_factory) -> Path:
    """10,000 experiments with 20 evaluations each; the curves go in by SQL, to be quick."""
    path = tmp_path_factory.mktemp("large") / "study.sqlite"
    with Store.open(path) as store:
        template = Experiment()
        every = [Entry(id, f"b64_L4_H4_E128_BS8_MI1000_D10_s{id}", "all", template) for id in range(1, 10_001)]
        store.add(every, [f"{id:016x}" for id in range(1, 10_001)], [800_000] * 10_000)
        store.set_progress(100.0, [{"worker": 0, "doing": "e1", "tokens_per_second": 5}])
    with contextlib.closing(sqlite3.connect(path, isolation_level=None)) as db:
        db.execute("BEGIN")
        curves = ((id, 50 * i, i, i, 3 / (i + 1), 3 / (i + 1) + id / 1e5) for id in range(1, 10_001) for i in range(20))
        db.executemany("INSERT INTO evaluations VALUES (?, ?, ?, ?, ?, ?)", curves)
        db.execute("UPDATE experiments SET val_loss = 1 + id / 1e5, status = 'finished' WHERE id <= 8000")
        db.execute("COMMIT")
    return path


def test_status_is_quick_on_ten_thousand_experiments(large):
    begin = time.perf_counter()
    with Store.read(large) as store:
        counts, best, progress = store.counts(), store.best(5), store.progress()
    seconds = time.perf_counter() - begin
    assert (counts["finished"], counts["waiting"]) == (8000, 2000)
    assert [row.id for row in best] == [1, 2, 3, 4, 5]
    assert progress[1] == 100.0
    assert seconds < 0.2
    begin = time.perf_counter()
    with Store.read(large) as store:
        assert len(store.rows()) == 10_000
    assert time.perf_counter() - begin < 1.0  # 10,000 Experiment objects alone take longer


def test_recording_does_not_slow_down_as_the_study_grows(large):
    """Every write finds its rows by an index, however many there are."""
    with Store.open(large) as store:
        begin = time.perf_counter()
        for id in range(9001, 9101):
            name = f"b64_L4_H4_E128_BS8_MI1000_D10_s{id}"
            start(store, name, step=900, evaluated_at=900)
            store.evaluated(name, 1000, 1, 1.0, 2.0, 2.0)
        store.commit()
        assert time.perf_counter() - begin < 0.5
    for query in ("SELECT status, count(*) FROM experiments GROUP BY status",):
        assert "COVERING INDEX" in asked(large, f"EXPLAIN QUERY PLAN {query}")[0][3]


def test_the_store_does_not_wait_for_torch():
    code = "import sys, nanostudy.study.store; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


# --- against a plain dictionary


class Model(RuleBasedStateMachine):
    """The store beside dictionaries, with reopenings and failing commits between."""

    NAMES = st.sampled_from(["e1", "e2", "e3", "e4"])

    @initialize()
    def begin(self):
        self.folder = tempfile.TemporaryDirectory()
        self.path = Path(self.folder.name) / "study.sqlite"
        self.store = Store.open(self.path)
        fill(self.store, 1, 2, 3, 4)
        self.status = dict.fromkeys(("e1", "e2", "e3", "e4"), "waiting")
        self.curves = {name: {} for name in self.status}
        self.steps = dict.fromkeys(self.status, 0)

    def unfinished(self, name):
        return self.status[name] not in ("finished", "diverged")

    @rule(name=NAMES, kept=st.integers(-1, 5))
    def start(self, name, kept):
        if self.unfinished(name):
            start(self.store, name, step=max(kept, 0), evaluated_at=kept)
            self.status[name], self.steps[name] = "running", max(kept, 0)
            self.curves[name] = {step: loss for step, loss in self.curves[name].items() if step <= kept}

    @rule(name=NAMES, step=st.integers(0, 9), loss=st.sampled_from([1.0, 2.0, 3.0, math.nan]))
    def evaluate(self, name, step, loss):
        if self.status[name] == "running":
            self.store.evaluated(name, step, step, 0.0, loss, loss)
            self.curves[name][step], self.steps[name] = (None if math.isnan(loss) else loss), step

    @rule(name=NAMES, diverged=st.sampled_from([None, "why"]))
    def finish(self, name, diverged):
        if self.status[name] == "running":
            finish(self.store, name, diverged, best_step=self.best(name)[0] or -1)
            self.status[name], self.steps[name] = ("diverged" if diverged else "finished"), 20

    @rule(name=NAMES)
    def fail(self, name):
        if self.unfinished(name):
            self.store.failed(name, "why")
            self.status[name] = "failed"

    @rule(names=st.lists(NAMES))
    def requeue(self, names):
        self.store.requeue(names)
        self.status.update({name: "waiting" for name in names if self.status[name] == "failed"})

    @rule()
    def end_session(self):
        self.store.end_session()
        self.status = {name: "waiting" if status == "running" else status for name, status in self.status.items()}

    @rule()
    def reopen(self):
        self.store.close()
        self.store = Store.open(self.path)

    @precondition(lambda self: self.store._db._pending)
    @rule()
    def commit_in_vain(self):
        with contextlib.closing(sqlite3.connect(self.path, isolation_level=None)) as other:
            other.execute("BEGIN IMMEDIATE")
            with pytest.raises(NanostudyError):
                self.store.commit()

    def best(self, name):
        measured = [(loss, step) for step, loss in self.curves[name].items() if loss is not None]
        return min(measured)[::-1] if measured else (None, None)

    @rule()
    def compare(self):
        self.store.commit()
        with Store.read(self.path) as reader:
            for name, status in self.status.items():
                row, curve = reader.row(name), self.curves[name]
                assert (row.status, row.step) == (status, self.steps[name])
                assert {e["step"]: e["val_loss"] for e in reader.evaluations(name)} == curve
                assert row.val_loss == (curve[max(curve)] if curve else None)
                if self.unfinished(name):
                    assert (row.best_step, row.best_val_loss) == self.best(name)
            statuses = list(self.status.values())
            assert reader.counts() == {status: statuses.count(status) for status in Status}

    @invariant()
    def names_stay(self):
        if hasattr(self, "store"):
            assert list(self.store._ids) == ["e1", "e2", "e3", "e4"]

    def teardown(self):
        if hasattr(self, "store"):
            self.compare()
            self.store.close()
            self.folder.cleanup()


def test_the_store_agrees_with_a_dictionary(monkeypatch):
    monkeypatch.setattr(database, "PATIENCE", 0.0)
    run_state_machine_as_test(
        Model, settings=settings(max_examples=20, stateful_step_count=25, deadline=None, derandomize=True)
    )
