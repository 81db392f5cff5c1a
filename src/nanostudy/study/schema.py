"""The store's tables, and how an older store is brought to this version.

A migration is a function that never changes once it is released; its name goes into the table `migrations`. It spells out what
it makes, even where other code has the same, because older files hold what it made then.
"""

from __future__ import annotations

import contextlib
import re
import sqlite3
from collections.abc import Callable, Iterable
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any

from nanostudy.errors import NanostudyError
from nanostudy.measures import stored
from nanostudy.study.definition import command

TABLES = """
CREATE TABLE environments (id INTEGER PRIMARY KEY, machine TEXT NOT NULL UNIQUE);

CREATE TABLE stacks (
    id INTEGER PRIMARY KEY, members TEXT NOT NULL, width INTEGER NOT NULL,
    state TEXT NOT NULL DEFAULT 'open' CHECK (state IN ('open', 'closed')));

CREATE TABLE experiments (
    id INTEGER PRIMARY KEY, name TEXT NOT NULL UNIQUE, part TEXT NOT NULL, identity TEXT NOT NULL UNIQUE,
    settings TEXT NOT NULL, parameters INTEGER NOT NULL,
    status TEXT NOT NULL DEFAULT 'waiting' CHECK (status IN ('waiting', 'running', 'finished', 'diverged', 'failed')),
    reason TEXT, stack INTEGER, step INTEGER NOT NULL DEFAULT 0, tokens INTEGER, seconds REAL,
    updates INTEGER, skipped INTEGER, train_loss REAL, val_loss REAL, best_step INTEGER, best_val_loss REAL,
    context_losses TEXT NOT NULL DEFAULT '{}', environment INTEGER REFERENCES environments, members INTEGER,
    sampled INTEGER NOT NULL DEFAULT 0 CHECK (sampled IN (0, 1)), finished_at TEXT);

CREATE INDEX experiments_by_result ON experiments (status, val_loss, id);

CREATE TABLE evaluations (
    experiment INTEGER NOT NULL REFERENCES experiments, step INTEGER NOT NULL, tokens INTEGER, seconds REAL,
    train_loss REAL, val_loss REAL, PRIMARY KEY (experiment, step)) WITHOUT ROWID;

CREATE TABLE events (
    id INTEGER PRIMARY KEY, at TEXT NOT NULL, experiment INTEGER, stack INTEGER, kind TEXT NOT NULL, detail TEXT NOT NULL);

CREATE TABLE progress (
    id INTEGER PRIMARY KEY CHECK (id = 1), updated_at TEXT NOT NULL, seconds_left REAL, workers TEXT NOT NULL);
"""


FINISHED = "OLD.status IN ('finished', 'diverged')"
HELD = "a finished experiment is never changed"


def create(db: sqlite3.Connection) -> None:
    """The first tables, and triggers that keep results from every program that writes to the file."""
    for statement in TABLES.split(";"):
        db.execute(statement)
    fixed = ("id", "name", "identity", "settings")
    results = (
        *("part", "parameters", "status", "reason", "stack", "step", "tokens", "seconds", "updates", "skipped"),
        *("train_loss", "val_loss", "best_step", "best_val_loss", "context_losses", "environment", "members"),
        "finished_at",
    )
    done = "SELECT 1 FROM experiments WHERE status IN ('finished', 'diverged') AND"
    refuse = partial(_refuse, db)
    unchanging = "id, name, identity and settings of an experiment never change"
    refuse("experiments_are_themselves", "BEFORE UPDATE ON experiments", _changed(fixed), unchanging)
    refuse("results_stay", "BEFORE UPDATE ON experiments", f"{FINISHED} AND ({_changed(results)})", HELD)
    refuse("results_are_kept", "BEFORE DELETE ON experiments", FINISHED, HELD)
    # INSERT OR REPLACE deletes conflicting rows without firing the trigger on DELETE.
    same = "(id = NEW.id OR name = NEW.name OR identity = NEW.identity)"
    refuse("results_are_not_replaced", "BEFORE INSERT ON experiments", f"EXISTS ({done} {same})", HELD)
    for when, rows in (("INSERT", "(NEW.experiment)"), ("DELETE", "(OLD.experiment)"), ("UPDATE", None)):
        condition = f"EXISTS ({done} id IN {rows or '(NEW.experiment, OLD.experiment)'})"
        refuse(f"curves_stay_{when.lower()}", f"BEFORE {when} ON evaluations", condition, HELD)
    environment = "a recorded environment never changes"
    refuse("environments_stay", "BEFORE UPDATE ON environments", _changed(("id", "machine")), environment)


def _refuse(db: sqlite3.Connection, name: str, when: str, condition: str, message: str) -> None:
    db.execute(f"CREATE TRIGGER {name} {when} WHEN {condition} BEGIN SELECT RAISE(ABORT, '{message}'); END")


def _changed(columns: Iterable[str]) -> str:
    return " OR ".join(f"NEW.{column} IS NOT OLD.{column}" for column in columns)


CHECKSUMS = ("row_sha256", "curve_sha256")  # of a result's row and of its evaluations
MIGRATIONS: list[Callable[[sqlite3.Connection], None]] = [create]
APPLIED = "SELECT name FROM migrations ORDER BY rowid"
KIND = "SELECT coalesce(sum(name = 'migrations'), 0), count(*) FROM sqlite_master"  # ours?, anything?


def migrate(db: sqlite3.Connection, path: Path) -> None:
    """Brings the file to this version, wholly or not at all. Raises NanostudyError."""
    db.execute("BEGIN IMMEDIATE")
    ours, anything = db.execute(KIND).fetchone()
    if not ours:
        if anything:
            raise NanostudyError(f"{path} is a database, but no study's. Move it away, or choose another folder.")
        db.execute("CREATE TABLE migrations (name TEXT NOT NULL UNIQUE, applied_at TEXT NOT NULL)")
    applied = [name for (name,) in db.execute(APPLIED)]
    _refuse_newer(applied, path)
    for migration in MIGRATIONS:
        if migration.__name__ not in applied:
            migration(db)
            row = (migration.__name__, datetime.now(UTC).isoformat(timespec="seconds"))
            db.execute("INSERT INTO migrations VALUES (?, ?)", row)
    add_measures(db)
    db.execute("COMMIT")


def add_measures(db: sqlite3.Connection) -> None:
    """Adds the columns of new measures, and of checksums; results keep them, too. Older versions of nanostudy can still use the file."""
    columns = {name for (name,) in db.execute("SELECT name FROM pragma_table_info('experiments')")}
    if CHECKSUMS[0] not in columns:
        add_checksums(db)
    for name in stored():
        if name not in columns:
            add_measure(db, name)


def add_measure(db: sqlite3.Connection, name: str) -> None:
    db.execute(f"ALTER TABLE experiments ADD COLUMN {name}")
    _refuse(db, f"{name}_stays", "BEFORE UPDATE ON experiments", f"{FINISHED} AND ({_changed([name])})", HELD)


def add_checksums(db: sqlite3.Connection) -> None:
    for name in CHECKSUMS:
        db.execute(f"ALTER TABLE experiments ADD COLUMN {name} TEXT")
        changed = f"OLD.{name} IS NOT NULL AND ({_changed([name])})"  # it is computed from the finished row
        _refuse(db, f"{name}_stays", "BEFORE UPDATE ON experiments", changed, HELD)


def strangers(db: sqlite3.Connection) -> list[str]:
    """Views, triggers and other things in the file that no study's store has: they could do anything when it is read or written."""
    ours = sqlite3.connect(":memory:", isolation_level=None)
    with contextlib.closing(ours):
        create(ours)
        add_checksums(ours)
        columns = [name for (name,) in db.execute("SELECT name FROM pragma_table_info('experiments')")]
        for name in columns:  # of another version's measures, too
            if name.isidentifier():
                with contextlib.suppress(sqlite3.Error):  # one that is there already
                    add_measure(ours, name)
        expected = _objects(ours)
    tables = {name for name, (kind, _) in expected.items() if kind == "table"} | {"migrations"}
    return [
        f"{kind} {name}"
        for name, (kind, sql) in _objects(db).items()
        if (kind != "table" or name not in tables or re.match(r"CREATE\s+TABLE\b", sql or "", re.I) is None)
        and (kind, sql) != expected.get(name)
        and not (kind == "index" and sql is None)  # of a table's own UNIQUE
    ]


def _objects(db: sqlite3.Connection) -> dict[str, tuple[str, str | None]]:
    return {name: (kind, sql) for name, kind, sql in db.execute("SELECT name, type, sql FROM sqlite_master")}


def check(fetch: Callable[[str], list[tuple[Any, ...]]], path: Path) -> None:
    """For readers, which change nothing. Raises NanostudyError where the file is not of this version."""
    [(ours, anything)] = fetch(KIND)
    if not ours:
        kind = "is a database, but no study's" if anything else "is empty: its study has not begun"
        raise NanostudyError(f"{path} {kind}. Choose a study's folder.")
    applied = [name for (name,) in fetch(APPLIED)]
    _refuse_newer(applied, path)
    if len(applied) < len(MIGRATIONS):
        raise NanostudyError(
            f"{path} was written by an older nanostudy. `{command('run', path.parent)}` brings it to this version."
        )


def _refuse_newer(applied: Iterable[str], path: Path) -> None:
    ours = [migration.__name__ for migration in MIGRATIONS]
    unknown = [name for name in applied if name not in ours]
    if unknown:
        raise NanostudyError(
            f"{path} was written by a newer nanostudy (this one does not know its {', '.join(unknown)}). "
            "Update nanostudy, or use the version that wrote the study."
        )
