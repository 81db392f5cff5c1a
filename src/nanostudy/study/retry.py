"""Tries again while a folder does not answer, as when a mounted drive drops out."""

from __future__ import annotations

import errno
import sqlite3
import time
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from nanostudy.errors import Interrupted, NanostudyError

OUT_OF_REACH = {errno.EIO, errno.ENOTCONN, errno.ESTALE, errno.ENODEV, errno.ETIMEDOUT, errno.ENXIO}
OUT_OF_REACH |= {getattr(errno, name) for name in ("EHOSTDOWN", "EHOSTUNREACH", "ENETDOWN") if hasattr(errno, name)}
GONE = {errno.ENOENT, errno.ENOTDIR}  # the drive was taken away, and the folder with it
TRANSIENT_SQLITE = ("IOERR", "CANTOPEN", "BUSY", "PROTOCOL")  # likewise by SQLite's names, and other programs' locks
ATTEMPTS = 4  # how often an action may fail while the folder answers

T = TypeVar("T")


class Retry:
    """Calls an action again for as long as the folder is out of reach. Raises every other problem as it is."""

    def __init__(self, folder: Path, say: Callable[[str, str], None], stop: Callable[[], bool]) -> None:
        self.folder, self.say, self.stop = folder, say, stop

    def __call__(self, action: Callable[[], T]) -> T:
        failures = 0
        while True:
            try:
                return action()
            except NanostudyError as problem:
                failure = problem
            except OSError as problem:
                failure = NanostudyError(f"{self.folder}: {problem}")
                failure.__cause__ = problem
            failures = 0 if self.wait(failure, failures) else failures + 1

    def wait(self, problem: NanostudyError, failures: int = 0) -> bool:
        """Returns when it is time to try again: True where the folder was out of reach, False where it answers.

        `failures` counts those before this one while the folder answered. Raises the problem where it is of another kind, or at the
        last of the ATTEMPTS.
        """
        reason = out_of_reach(self.folder)
        if reason is None and (not is_transient(problem) or failures >= ATTEMPTS - 1):
            raise problem
        time.sleep(0.2)
        if reason is None:
            return False
        self.say(f"{self.folder} does not answer ({reason}); waiting for it", "yellow")
        while out_of_reach(self.folder):
            if self.stop():
                raise Interrupted(f"Stopped while {self.folder} did not answer. The last checkpoints are kept there.")
            time.sleep(0.5)
        self.say(f"{self.folder} answers again; going on", "")
        return True


def is_transient(problem: NanostudyError) -> bool:
    """Whether the problem goes away when its cause does."""
    cause = problem.__cause__
    if isinstance(cause, sqlite3.Error):
        return getattr(cause, "sqlite_errorname", "").removeprefix("SQLITE_").startswith(TRANSIENT_SQLITE)
    return isinstance(cause, OSError) and cause.errno in OUT_OF_REACH | GONE | {errno.EAGAIN}


def out_of_reach(folder: Path) -> str | None:
    """Why the folder can be neither read nor written now; None where it can, or is full or forbidden."""
    probe = folder / ".reachable"
    try:
        probe.write_bytes(b"")
        probe.unlink()
    except OSError as problem:
        return problem.strerror if problem.errno in OUT_OF_REACH | GONE else None
    return None
