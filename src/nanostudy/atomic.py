"""Files that are whole or not there, one process per folder, and where this user's cache lies."""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from nanostudy.errors import NanostudyError, UsageError


def write_atomically(path: Path, content: bytes | str) -> None:
    """Written beside the target, flushed to disk, and renamed over it."""
    data = content.encode() if isinstance(content, str) else content

    def write(temporary: Path) -> None:
        temporary.write_bytes(data)

    replace_atomically(path, write)


def replace_atomically(path: Path, write: Callable[[Path], None], before: Path | None = None) -> None:
    """`write` fills a temporary file that then takes the place of `path`. On failure `path` is as it was.

    What was there is kept as `before`, where that is named.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        write(temporary)
        with open(temporary, "r+b") as file:
            os.fsync(file.fileno())
        if before and path.exists():
            _move(path, before)
        _move(temporary, path)
    except OSError as problem:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
        raise NanostudyError(explain_writing(path, problem)) from problem
    if sys.platform != "win32":  # the rename itself, too, survives a power cut
        with contextlib.suppress(OSError):
            folder = os.open(path.parent, os.O_RDONLY)
            try:
                os.fsync(folder)
            finally:
                os.close(folder)


def replace_folder(target: Path, fill: Callable[[Path], None]) -> None:
    """`fill` fills a temporary folder that then takes the place of `target`. On failure `target` is as it was."""
    arriving, leaving = (target.with_name(f".{target.name}.{os.getpid()}.{end}") for end in ("tmp", "old.tmp"))
    try:
        arriving.mkdir(parents=True)
        fill(arriving)
        if target.exists():
            _move(target, leaving)
        _move(arriving, target)
    except OSError as problem:
        if leaving.exists() and not target.exists():
            leaving.replace(target)
        raise NanostudyError(explain_writing(target, problem)) from problem
    finally:
        for folder in (arriving, leaving):
            shutil.rmtree(folder, ignore_errors=True)


@contextlib.contextmanager
def appearing(target: Path, overwrite: bool = False) -> Iterator[Path]:
    """A temporary folder whose files appear in `target` at the end; after a failure nothing is left of it.

    An empty or missing target becomes the new folder as a whole. One that has files keeps them and gets the new ones, each
    atomically. Raises UsageError where that would replace some and `overwrite` is not set.
    """
    target = Path(os.path.abspath(target))
    temporary = target.with_name(f".{target.name}.{os.getpid()}.tmp")
    try:
        if target.exists() and not target.is_dir():
            raise UsageError(f"{target} is a file. Name a folder.")
        temporary.mkdir(parents=True)
        yield temporary
        new = sorted(path.name for path in temporary.iterdir())
        existing = sorted(path.name for path in target.iterdir()) if target.is_dir() else []
        replaced = [name for name in new if name in existing]
        if replaced and not overwrite:
            raise UsageError(
                f"{target} holds {', '.join(replaced)} already. Choose another folder with --out, or replace with --overwrite; "
                "nothing was changed."
            )
        if existing or target == Path.cwd():
            for name in new:
                _move(temporary / name, target / name)
        else:
            if target.exists():
                target.rmdir()
            _move(temporary, target)
    except OSError as problem:
        raise NanostudyError(explain_writing(target, problem)) from problem
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def check_free(target: Path) -> None:
    """Raises UsageError where something exists already."""
    try:
        taken = target.exists() and (not target.is_dir() or any(target.iterdir()))
    except OSError as problem:
        raise NanostudyError(f"{target} cannot be read: {problem.strerror}.") from None
    if taken:
        raise UsageError(f"{target} is there already, and a run is never written over. Choose another folder.")


def _move(source: Path, target: Path) -> None:
    for attempt in range(6):
        try:
            os.replace(source, target)
            return
        except PermissionError:  # on Windows, while a virus scanner or an editor has the old file open
            if sys.platform != "win32" or attempt == 5:
                raise
            time.sleep(0.1 * 2**attempt)


def explain_writing(path: Path, problem: Exception) -> str:
    full = getattr(problem, "errno", None) == errno.ENOSPC or "No space left" in str(problem)
    if full:
        return f"No space is left for {path}. What was there before is unchanged; free some space and run again."
    return f"{path} could not be written: {problem}. What was there before is unchanged."


@contextlib.contextmanager
def sole_owner(folder: Path, patience: float = 0.0, make: bool = True) -> Iterator[bool]:
    """Holds the folder's lock, which the system releases when the process ends, however it ends. Yields whether it has one:
    a file system may know no locks.

    The folder is made where it is not there and `make` says so. Raises NanostudyError where another process still has it
    after `patience` seconds.
    """
    try:
        if make:
            folder.mkdir(parents=True, exist_ok=True)
        file = open(folder / ".lock", "a+b")  # noqa: SIM115 (closed below)
    except OSError as problem:
        raise NanostudyError(f"{folder} cannot be used as a run folder: {problem.strerror}.") from problem
    with file:
        since = time.monotonic()
        while (locked := _lock(file.fileno())) is False and time.monotonic() - since < patience:
            time.sleep(0.1)
        if locked is False:
            raise NanostudyError(
                f"Another process is working in {folder}. Wait for it, or choose another folder with --out."
            ) from BlockingIOError(errno.EAGAIN, "locked")
        yield locked is True


def _lock(descriptor: int) -> bool | None:
    """False where another process holds it, None where the file system knows no locks."""
    try:
        if sys.platform == "win32":
            import msvcrt

            os.lseek(descriptor, 0, os.SEEK_SET)
            msvcrt.locking(descriptor, msvcrt.LK_NBLCK, 1)
        else:
            import fcntl

            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as problem:
        return False if problem.errno in (errno.EACCES, errno.EAGAIN, errno.EDEADLK) else None
    return True


def cache_folder() -> Path:
    """This user's cache: NANOSTUDY_CACHE, or the place the system keeps for it."""
    if os.environ.get("NANOSTUDY_CACHE"):
        return Path(os.environ["NANOSTUDY_CACHE"])
    home = Path.home()
    if sys.platform == "win32":
        base = Path(os.environ.get("LOCALAPPDATA", home / "AppData" / "Local"))
    elif sys.platform == "darwin":
        base = home / "Library" / "Caches"
    else:
        base = Path(os.environ.get("XDG_CACHE_HOME") or home / ".cache")
    return base / "nanostudy"
