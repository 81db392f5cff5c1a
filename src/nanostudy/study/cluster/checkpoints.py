"""Checkpoints of stacks that train where the study's folder is not seen: they come back in parts, or lie at an address.

An address is one that fsspec knows. What it holds is never newer than what is recorded: a save waits for that (events.Saving).
"""

from __future__ import annotations

import contextlib
import os
import uuid
from collections.abc import Callable
from pathlib import Path

from nanostudy.atomic import replace_atomically, write_atomically
from nanostudy.errors import NanostudyError, UsageError
from nanostudy.study.cluster.actor import Kept, Part
from nanostudy.study.cluster.addresses import fetch, make_folder, put, remove_folder, remove_others
from nanostudy.study.tasks import Broken, Done, TrainStack
from nanostudy.training import stack as checkpoint

AT = "checkpoint.at"  # in a stack's folder: the address of its newest checkpoint


class CheckpointStore:
    """Where the driver keeps them. `address` is that of a folder; None: the stacks' folders."""

    def __init__(self, address: str | None) -> None:
        self.address = address and address.rstrip("/")
        if address:
            try:
                make_folder(address)
            except Exception as problem:  # of whatever library the address needs
                raise UsageError(
                    f"--checkpoints {address} cannot be used: {problem}. Without it, checkpoints travel back here."
                ) from None

    def begin(self, task: TrainStack) -> tuple[str | None, str | None]:
        """(the folder for the stack's checkpoints, the newest one) as addresses; None, None where they lie here."""
        at = _text(task.folder / AT)
        if not self.address:
            self.bring_back(task)
            return None, None
        if at is None:
            home = f"{self.address}/{uuid.uuid4().hex}"
            here = checkpoint.newest(task.path)
            if here is None:
                return home, None
            at = f"{home}/{uuid.uuid4().hex}.safetensors"
            _reach(at, lambda: put(here, at))
            write_atomically(task.folder / AT, at)
        return at.rpartition("/")[0], at

    def keep(self, task: TrainStack, told: Part | Kept) -> None:
        """Raises NanostudyError, OSError where the stack's folder cannot be written."""
        if isinstance(told, Part):
            _put_together(task.path, told)
            return
        write_atomically(task.folder / AT, told.address)
        with contextlib.suppress(Exception):  # the next time
            remove_others(told.address)

    def end(self, task: TrainStack, report: Done | Broken, stopped: bool) -> None:
        """Where it failed, whoever takes the stack apart finds its checkpoint in its folder."""
        at = _text(task.folder / AT)
        if isinstance(report, Broken) and report.cause not in ("lost", "files"):
            self.bring_back(task)
        elif at and isinstance(report, Done) and not stopped:
            with contextlib.suppress(Exception):  # what is left over does no harm
                remove_folder(at.rpartition("/")[0])

    def bring_back(self, task: TrainStack) -> None:
        at = _text(task.folder / AT)
        if at is None:
            return
        with contextlib.suppress(FileNotFoundError):
            _reach(at, lambda: replace_atomically(task.path, lambda temporary: fetch(at, temporary)))
        (task.folder / AT).unlink(missing_ok=True)
        with contextlib.suppress(Exception):
            remove_folder(at.rpartition("/")[0])


def _reach(address: str, act: Callable[[], None]) -> None:
    try:
        act()
    except FileNotFoundError:
        raise
    except Exception as problem:  # of whatever library the address needs
        raise NanostudyError(f"The checkpoint at {address} could not be reached: {problem}") from problem


def _put_together(path: Path, part: Part) -> None:
    arriving = path.with_name(".arriving.tmp")
    with open(arriving, "ab" if part.offset else "wb") as file:
        if file.tell() != part.offset:  # a part before it could not be written
            return
        file.write(part.data)
        whole = file.tell() == part.size
    if whole:
        replace_atomically(path, lambda temporary: os.replace(arriving, temporary))


def _text(path: Path) -> str | None:
    return path.read_text(encoding="utf-8") if path.exists() else None
