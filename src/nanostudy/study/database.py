"""One SQLite file that one process writes and others read, on any file system and through its faults.

Writes gather in memory until commit() makes one short transaction of them; after a failure the next commit() tries again. It
uses a rollback journal: a write-ahead log needs shared memory, which mounted drives lack.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import shutil
import sqlite3
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import quote

from nanostudy.atomic import temporary_beside
from nanostudy.errors import NanostudyError
from nanostudy.study.definition import command
from nanostudy.text import listed

PATIENCE = 4.0  # seconds for which a write waits for another program's lock, and a read is tried again
LONGEST = 2**27  # bytes of a text in the file
GLANCE = 0.25  # seconds for which a read waits for a lock before it reads a copy: a commit is shorter
PASSING = ("BUSY", "LOCKED", "READONLY", "CORRUPT", "NOTADB", "IOERR", "CANTOPEN", "PROTOCOL")


class Database:
    """A writer creates or migrates the file with `prepare(connection, path)`; a reader changes nothing, ever."""

    def __init__(
        self,
        path: Path,
        prepare: Callable[[sqlite3.Connection, Path], None] | None = None,
        strangers: Callable[[sqlite3.Connection], list[str]] = lambda _: [],
    ) -> None:
        self.path, self.writes, self.strangers = path, prepare is not None, strangers
        self._connection: sqlite3.Connection | None = None
        self._pending: list[tuple[str, Sequence[Any]]] = []
        self._commits = self._tried = 0  # the file's count of commits; how many writes the last attempt held
        self._locks, self._checked = True, False
        if path.is_symlink():  # it may lead anywhere
            raise NanostudyError(damaged(path, "is a link, and only a file of the study's own is opened"))
        if prepare is not None:
            with self._faults():
                self._locks = locks_work(path.parent)
                prepare(self._connected("rwc"), path)
                db = self._connected("rw")
                self._commits = _count(db)

    def write(self, sql: str, *values: Any) -> None:
        """Kept in memory until commit()."""
        if not self.writes:
            raise NanostudyError(f"{self.path} is open for reading.")
        self._pending.append((sql, values))

    def commit(self) -> None:
        """Stores everything written since the last commit, or raises NanostudyError and keeps it all for the next commit.

        Only a write that the tables refuse is dropped, since they would refuse it again.
        """
        if not self._pending:
            return
        with self._faults():
            db = self._connected("rw")
            db.execute("BEGIN IMMEDIATE")
            commits = _count(db)
            if commits != self._commits:  # the last attempt reached the disk although it ended in an error
                del self._pending[: self._tried]
            self._commits, self._tried = commits, len(self._pending)
            for index, (sql, values) in enumerate(self._pending):
                try:
                    db.execute(sql, values)
                except (sqlite3.IntegrityError, sqlite3.ProgrammingError):
                    del self._pending[index]
                    raise
            db.execute(f"PRAGMA user_version = {commits + 1}")
            db.execute("COMMIT")
            self._pending, self._tried, self._commits = [], 0, commits + 1

    def fetch(self, sql: str, *values: Any) -> list[tuple[Any, ...]]:
        """All rows. A writer sees its own writes; a reader tries again where the file is busy or out of reach."""
        if self.writes:
            self.commit()
            with self._faults():
                return self._connected("rw").execute(sql, values).fetchall()
        pause, deadline = 0.01, time.monotonic() + PATIENCE
        while True:
            try:
                return self._read(sql, values)
            except (sqlite3.Error, OSError) as problem:
                passing = isinstance(problem, OSError) or _code(problem).startswith(PASSING)
                if not passing or time.monotonic() > deadline:
                    raise NanostudyError(explain(self.path, problem)) from problem
            time.sleep(pause)
            pause = min(2 * pause, 0.5)

    def discard(self) -> None:
        """Forgets what was written since the last commit."""
        self._pending, self._tried = [], 0

    def close(self) -> None:
        try:
            self.commit()
        finally:
            self._disconnect()

    def _read(self, sql: str, values: Sequence[Any]) -> list[tuple[Any, ...]]:
        try:
            return self._connected("ro").execute(sql, values).fetchall()
        except sqlite3.Error as problem:
            self._disconnect()
            if not _code(problem).startswith(PASSING):
                raise
        # A writer was killed within a commit, and only a writer may repair the file; or locks do not work here.
        with contextlib.closing(_copy(self.path)) as copy:
            self._guard(copy)
            return copy.execute(sql, values).fetchall()

    def _connected(self, mode: str) -> sqlite3.Connection:
        """`mode` is "rwc" only at first: a drive that comes back without the file must not get an empty one."""
        if self._connection is None:
            address = f"{_address(self.path)}?mode={mode}{'' if self._locks else '&nolock=1'}"
            patience = PATIENCE if self.writes else GLANCE
            self._connection = sqlite3.connect(address, uri=True, timeout=patience, isolation_level=None)
            if self.writes:
                for pragma in ("journal_mode = DELETE", "synchronous = FULL", "foreign_keys = ON"):
                    self._connection.execute(f"PRAGMA {pragma}")
            try:
                self._guard(self._connection)
            except BaseException:
                self._disconnect()
                raise
        return self._connection

    def _guard(self, db: sqlite3.Connection) -> None:
        """The file may have come from anybody: it is checked when it is first opened, and can run nothing of its own. Raises NanostudyError."""
        db.create_function("digest", -1, digest, deterministic=True)
        db.execute("PRAGMA trusted_schema = OFF")
        db.execute("PRAGMA cell_size_check = ON")
        db.setlimit(sqlite3.SQLITE_LIMIT_LENGTH, LONGEST)
        if self._checked:
            return
        if strange := self.strangers(db):
            raise NanostudyError(
                f"{self.path} holds {listed(strange, 3)}, which no study's store has. It was not opened; "
                f"`{command('rebuild', self.path.parent)}` makes one from the run folders."
            )
        if db.execute("PRAGMA quick_check(1)").fetchone()[0] != "ok":
            raise NanostudyError(damaged(self.path))
        self._checked = True

    def _disconnect(self) -> None:
        if self._connection is not None:
            with contextlib.suppress(sqlite3.Error):
                self._connection.close()
            self._connection = None

    @contextlib.contextmanager
    def _faults(self) -> Iterator[None]:
        """After any exception, Ctrl-C too, nothing half-written is left, and the next use connects anew."""
        try:
            yield
        except BaseException as problem:
            self._disconnect()
            if isinstance(problem, sqlite3.Error | OSError):
                raise NanostudyError(explain(self.path, problem)) from problem
            raise


def digest(*names_and_values: Any) -> str:
    """The SHA-256 of columns that have a value, in Python as in SQL."""
    pairs = zip(names_and_values[::2], names_and_values[1::2], strict=True)
    return hashlib.sha256(repr([pair for pair in pairs if pair[1] is not None]).encode()).hexdigest()


def locks_work(folder: Path) -> bool:
    """Whether SQLite can lock a file in this folder, tried with a new file that no other process has open."""
    probe = temporary_beside(folder / "locks")
    try:
        with contextlib.closing(sqlite3.connect(_address(probe), uri=True, timeout=0, isolation_level=None)) as db:
            db.execute("BEGIN EXCLUSIVE")
            return True
    except sqlite3.Error as problem:
        return not _code(problem).startswith(("BUSY", "LOCKED", "PROTOCOL", "IOERR_LOCK", "IOERR_RDLOCK"))
    finally:
        with contextlib.suppress(OSError):
            probe.unlink(missing_ok=True)


def explain(path: Path, problem: Exception) -> str:
    """A message: what happened, and what to do."""
    code = _code(problem)
    if code.startswith("FULL"):
        return f"No space is left for {path}. What was there before is unchanged; free some space and run again."
    if code.startswith(("BUSY", "LOCKED", "PROTOCOL")):
        return f"{path} is locked by another program. Close what has it open, and run again."
    if code.startswith(("CORRUPT", "NOTADB", "ERROR")):
        return f"{damaged(path)} ({problem})"
    if code.startswith("READONLY") or code == "PERM":
        return (
            f"{path} may not be written ({problem}). Give yourself the right to write it and its folder, and run again."
        )
    if code.startswith("CONSTRAINT"):
        return f"{path} refused a change: {problem}."
    return f"{path} could not be read or written ({problem}). Check that its drive and folder are there, and run again."


def damaged(path: Path, what: str = "is damaged, or is no study's database") -> str:
    return f"{path} {what}. `{command('rebuild', path.parent)}` makes it again from the run folders."


def _code(problem: Exception) -> str:
    """SQLite's name for the problem, such as IOERR_WRITE; empty for other problems."""
    return getattr(problem, "sqlite_errorname", "").removeprefix("SQLITE_")


def _count(db: sqlite3.Connection) -> int:
    return int(db.execute("PRAGMA user_version").fetchone()[0])


def _address(path: Path) -> str:
    absolute = path.absolute().as_posix()
    return f"file://{'' if absolute.startswith('/') else '/'}{quote(os.fsencode(absolute))}"


def _copy(path: Path) -> sqlite3.Connection:
    """The file after its last complete transaction, in memory, without a lock. Raises sqlite3.OperationalError if it changed meanwhile."""
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder) / "copy.sqlite"
        before = _moment(path)
        shutil.copyfile(path, copy)
        if _moment(path) != before:
            problem = sqlite3.OperationalError("written while it was read")
            problem.sqlite_errorname = "SQLITE_BUSY"
            raise problem
        if before[1]:
            Path(f"{copy}-journal").write_bytes(before[1])
        memory = sqlite3.connect(":memory:", isolation_level=None)
        with contextlib.closing(sqlite3.connect(copy)) as source:
            source.backup(memory)
        return memory


def _moment(path: Path) -> tuple[bytes, bytes]:
    """The file's header, which counts transactions, and the journal of an open one. If neither changes, a copy made meanwhile is whole.

    SQLite writes the previous content of a page to the journal before it changes the page.
    """
    journal = Path(f"{os.path.realpath(path)}-journal")
    with open(path, "rb") as file:
        header = file.read(100)
    try:
        return header, journal.read_bytes()
    except FileNotFoundError:
        return header, b""
