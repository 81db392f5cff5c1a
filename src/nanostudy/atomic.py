"""Files and folders that appear whole or not at all, a lock that gives a folder to one process, and the user's cache folder."""

from __future__ import annotations

import contextlib
import errno
import os
import re
import shutil
import stat
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from nanostudy.errors import NanostudyError, UsageError

LEFTOVER = re.compile(
    r"\.(?P<name>.+)\.(?P<pid>\d+)\.(?P<old>old\.)?tmp(-journal)?|\.tmp\w{6}|\..+\.tmp"
)  # the second kind is the safetensors library's


def write_atomically(path: Path, content: bytes | str) -> None:
    """Writes beside the target, flushes to disk, and renames over the target. Raises NanostudyError."""
    data = content.encode() if isinstance(content, str) else content
    replace_atomically(path, lambda temporary: temporary.write_bytes(data))


def replace_atomically(path: Path, write: Callable[[Path], object], before: Path | None = None) -> None:
    """`write` fills a temporary file, which then takes the place of `path`. A failure leaves `path` as it was.

    The previous file is kept as `before`, if that is given. Raises NanostudyError.
    """
    temporary = temporary_beside(path)
    try:
        temporary.touch()
        mode = temporary.stat().st_mode  # as the umask has it; a library may make a file of another mode in its place
        write(temporary)
        if temporary.stat().st_mode != mode:
            with contextlib.suppress(OSError):
                temporary.chmod(stat.S_IMODE(mode))
        _flush(temporary)
        if before and path.exists():
            _move(path, before)
        _move(temporary, path)
    except OSError as problem:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
        raise NanostudyError(explain_writing(path, problem)) from problem
    if sys.platform != "win32":  # the rename must survive a power cut as well
        with contextlib.suppress(OSError):
            _flush(path.parent)


def temporary_beside(path: Path, end: str = "tmp") -> Path:
    """Where this process writes what becomes `path`. remove_leftovers() knows the name."""
    return path.with_name(f".{path.name}.{os.getpid()}.{end}")


@contextlib.contextmanager
def whole_folder(target: Path, overwrite: bool = False, replace: bool = False) -> Iterator[Path]:
    """Yields a temporary folder that becomes `target` at the end of the block. A failure leaves `target` as it was.

    A target with files keeps them and gets the new ones, each atomically. Raises UsageError where that would replace a file,
    unless `overwrite` is true. With `replace` the new folder takes the place of the whole target. Raises NanostudyError where
    nothing can be written.
    """
    target = Path(os.path.abspath(target))
    # a mounted folder cannot be moved away, nor one whose parent may not be written: its files are replaced one by one
    fixed = target.is_dir() and (target.is_mount() or not os.access(target.parent, os.W_OK))
    place = target / target.name if fixed else target
    temporary, previous = temporary_beside(place), temporary_beside(place, "old.tmp")
    try:
        if target.exists() and not target.is_dir():
            raise UsageError(f"{target} is a file. Name a folder.")
        remove_leftovers(place.parent, f".{target.name}.")
        temporary.mkdir(parents=True)
        yield temporary
        new = sorted(
            path.relative_to(temporary) for path in temporary.rglob("*") if path.is_symlink() or not path.is_dir()
        )
        for path in new:
            if not (temporary / path).is_symlink():
                _flush(temporary / path)
        existing = not replace and target.is_dir() and any(target.iterdir())
        replaced = [str(path) for path in new if existing and os.path.lexists(target / path)]
        if replaced and not overwrite:
            raise UsageError(
                f"{target} holds {', '.join(replaced)} already. Choose another folder with --out, or replace with --overwrite; "
                "nothing was changed."
            )
        if existing or fixed or target == Path.cwd():
            for path in new:
                (target / path).parent.mkdir(parents=True, exist_ok=True)
                _move(temporary / path, target / path)
        else:
            if target.exists():
                _move(target, previous)
            _move(temporary, target)
    except OSError as problem:
        if previous.exists() and not target.exists():
            _move(previous, target)
        raise NanostudyError(explain_writing(target, problem)) from problem
    finally:
        for leftover in (temporary, previous):
            shutil.rmtree(leftover, ignore_errors=True)


def remove_leftovers(folder: Path, start: str = ".") -> None:
    """Deletes what killed processes left in a folder: temporaries whose names begin with `start`.

    Those of a process that runs on this machine stay, unless it is this one, which is about to begin. A folder that was moved
    away, and not replaced any more, comes back.
    """
    for name in os.listdir(folder) if folder.is_dir() else ():
        match = LEFTOVER.fullmatch(name) if name.startswith(start) else None
        if match is None or (match["pid"] and _runs(int(match["pid"]))):
            continue
        with contextlib.suppress(OSError):
            if match["old"] and not os.path.lexists(folder / match["name"]):
                os.rename(folder / name, folder / match["name"])
            elif os.path.isdir(folder / name) and not os.path.islink(folder / name):
                shutil.rmtree(folder / name, ignore_errors=True)
            else:
                os.unlink(folder / name)


def _runs(pid: int) -> bool:
    """Whether another process of this number runs on this machine."""
    if pid == os.getpid() or sys.platform == "win32":  # there, a file that is open cannot be deleted anyway
        return False
    try:
        os.kill(pid, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except PermissionError:  # another user's
        pass
    return True


def set_aside(path: Path) -> Path:
    """Renames a damaged file or folder to `NAME.damaged`, or the first such name that is free, and returns the new path.

    Raises NanostudyError where that cannot be done.
    """
    names = (f"{path.name}.damaged{end}" for end in ("", *(f".{n}" for n in range(2, 1000))))
    aside = next(place for place in map(path.with_name, names) if not os.path.lexists(place))
    try:
        _move(path, aside)
    except OSError as problem:
        raise NanostudyError(explain_writing(path, problem)) from problem
    return aside


def check_free(target: Path) -> None:
    """Raises UsageError where `target` is a file or a folder that is not empty."""
    try:
        taken = target.exists() and (not target.is_dir() or any(target.iterdir()))
    except OSError as problem:
        raise NanostudyError(f"{target} cannot be read: {problem.strerror}.") from None
    if taken:
        raise UsageError(f"{target} is there already, and a run is never written over. Choose another folder.")


def _flush(path: Path) -> None:
    """Of a file, or of a folder outside Windows."""
    descriptor = os.open(path, os.O_RDWR if sys.platform == "win32" else os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


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
    if getattr(problem, "errno", None) == errno.ENOSPC or "No space left" in str(problem):
        return f"No space is left for {path}. What was there before is unchanged; free some space and run again."
    why = getattr(problem, "strerror", None) or problem
    return f"{path} could not be written: {why}. What was there before is unchanged."


@contextlib.contextmanager
def sole_owner(folder: Path, patience: float = 0.0, make: bool = True) -> Iterator[bool]:
    """Holds the folder's lock, which the system releases however the process ends. Yields False on a file system without locks.

    Makes a missing folder if `make` is true. Raises NanostudyError if another process still holds the lock after `patience`
    seconds.
    """
    try:
        if make:
            folder.mkdir(parents=True, exist_ok=True)
        file = open(folder / ".lock", "a+b", opener=_unlinked)  # noqa: SIM115 (closed below)
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


def _unlinked(path: str, flags: int) -> int:
    """A link may lead anywhere."""
    return os.open(path, flags | getattr(os, "O_NOFOLLOW", 0), 0o666)


def _lock(descriptor: int) -> bool | None:
    """False where another process holds the lock, None on a file system without locks."""
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
    """NANOSTUDY_CACHE, or the operating system's place for this user's caches."""
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


def cache_of_code(name: str) -> Path:
    """A folder of the cache for files that will be executed: this user's alone, where others share the cache. Raises OSError."""
    mine = os.getuid() if hasattr(os, "getuid") else None
    for folder in (cache_folder() / name, cache_folder() / f"{name}-{mine}"):
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        if mine is None or folder.lstat().st_uid == mine:
            if mine is not None and not safe_to_execute(folder):
                folder.chmod(0o700)
            return folder
    raise PermissionError(errno.EPERM, "belongs to another user; name another folder in NANOSTUDY_CACHE", str(folder))


def safe_to_execute(path: Path) -> bool:
    """Whether only this user and the administrator can have written this file or folder. A link is not."""
    if sys.platform == "win32":  # a user's cache is closed to others there
        return True
    try:
        state = path.lstat()
    except OSError:
        return False
    others = stat.S_IWGRP | stat.S_IWOTH
    return state.st_uid in (0, os.getuid()) and not state.st_mode & others and not stat.S_ISLNK(state.st_mode)
