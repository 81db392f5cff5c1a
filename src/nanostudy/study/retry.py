"""Waiting for a folder that does not answer, as when a mounted drive drops out."""

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
OF_STORE = ("IOERR", "CANTOPEN", "BUSY", "PROTOCOL")  # SQLite's names for the same, and for locks of other programs
TRIES = 4  # of what fails although the folder answers

T = TypeVar("T")


class Patience:
    """Does things in a folder again for as long as it is out of reach; all other problems are raised as they are."""

    def __init__(self, folder: Path, say: Callable[[str, str], None], stop: Callable[[], bool]) -> None:
        self.folder, self.say, self.stop = folder, say, stop

    def __call__(self, action: Callable[[], T]) -> T:
        in_vain = 0
        while True:
            try:
                return action()
            except NanostudyError as problem:
                failure = problem
            except OSError as problem:
                failure = NanostudyError(f"{self.folder}: {problem}")
                failure.__cause__ = problem
            in_vain = 0 if self.wait(failure, in_vain) else in_vain + 1

    def wait(self, problem: NanostudyError, in_vain: int = 0) -> bool:
        """Returns once it may be tried again; True where the folder had been out of reach, and False where it answers.

        Raises the problem where it is of another kind, or where so many tries were in vain while the folder answered.
        """
        reason = out_of_reach(self.folder)
        if reason is None and (not passing(problem) or in_vain >= TRIES - 1):
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


def passing(problem: NanostudyError) -> bool:
    """Whether it is of a kind that goes away with the reason for it."""
    cause = problem.__cause__
    if isinstance(cause, sqlite3.Error):
        return getattr(cause, "sqlite_errorname", "").removeprefix("SQLITE_").startswith(OF_STORE)
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
