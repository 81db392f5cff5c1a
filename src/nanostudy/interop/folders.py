"""Folders that appear whole."""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

from nanostudy.atomic import explain_writing
from nanostudy.errors import NanostudyError, UsageError


@contextlib.contextmanager
def appearing(target: Path, overwrite: bool = False) -> Iterator[Path]:
    """A temporary folder beside the target, which takes its place in the end; nothing is left of it after a failure.

    A target that has files keeps them and gets the new ones, one by one, each atomically. Raises UsageError where that would
    replace some and `overwrite` does not say so.
    """
    target = Path(os.path.abspath(target))
    temporary = target.with_name(f".{target.name}.{os.getpid()}.tmp")
    try:
        if target.exists() and not target.is_dir():
            raise UsageError(f"{target} is a file. Name a folder.")
        temporary.mkdir(parents=True)
        yield temporary
        new = sorted(path.name for path in temporary.iterdir())
        there = sorted(path.name for path in target.iterdir()) if target.is_dir() else []
        replaced = [name for name in new if name in there]
        if replaced and not overwrite:
            raise UsageError(
                f"{target} holds {', '.join(replaced)} already. Choose another folder with --out, or replace with --overwrite; "
                "nothing was changed."
            )
        if there or target == Path.cwd():
            for name in new:
                os.replace(temporary / name, target / name)
        else:
            if target.exists():
                target.rmdir()
            os.replace(temporary, target)
    except OSError as problem:
        raise NanostudyError(explain_writing(target, problem)) from problem
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def check_free(target: Path) -> None:
    """Raises UsageError where something is there already."""
    try:
        there = target.exists() and (not target.is_dir() or any(target.iterdir()))
    except OSError as problem:
        raise NanostudyError(f"{target} cannot be read: {problem.strerror}.") from None
    if there:
        raise UsageError(f"{target} is there already, and a run is never written over. Choose another folder.")
