"""Checkpoints of stacks whose workers do not see the study's folder: at an address, or brought by the driver (actor.py).

An address is one that fsspec knows: file:///..., s3://..., and others for which a package is installed. What lies there is never
newer than what is recorded: a save waits for that (events.Saving).
"""

from __future__ import annotations

import contextlib
import os
import re
import shlex
import uuid
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from fsspec.core import url_to_fs

from nanostudy.atomic import replace_atomically, write_atomically
from nanostudy.errors import NanostudyError, UsageError
from nanostudy.study.cluster.messages import Kept, Message, Part, append_part
from nanostudy.study.tasks import Broken, Done, Noted, TrainStack
from nanostudy.text import printable
from nanostudy.training import stack as checkpoint

POINTER = "checkpoint.at"  # the file in a stack's folder that names the address of its newest checkpoint
NAME = r"[0-9a-f]{32}\.safetensors"  # a checkpoint's, at an address


@dataclass(frozen=True)
class AtAddress:
    """A transport to and from a machine that does not see the stack's folder: its checkpoints lie in a folder at an address."""

    folder: str
    newest: str | None = None

    def load(self, path: Path) -> Iterator[Message]:
        """Puts the newest checkpoint at `path`, if there is one. Raises any Exception where it cannot be read."""
        if self.newest:
            try:
                _fetch(self.newest, path)
            except FileNotFoundError:
                yield Noted(f"There is no checkpoint at {self.newest}; training from the beginning.")

    def save(self, path: Path) -> Iterator[Message]:
        address = _new_address(self.folder)
        try:
            _put(path, address)
        except Exception as problem:  # the address's library may raise anything; the next save tries again
            yield Noted(f"a checkpoint could not be kept at {self.folder}: {problem}")
        else:
            yield Kept(address)


class CheckpointStore:
    """The driver's end. `address` is a folder for all stacks; None: checkpoints lie in the stacks' folders."""

    def __init__(self, address: str | None) -> None:
        self.address = address and address.rstrip("/")
        if address:
            try:
                files, place = url_to_fs(address)
                files.makedirs(place, exist_ok=True)
            except Exception as problem:  # the address's library may raise anything
                raise UsageError(
                    f"--checkpoints {address} cannot be used: {problem}. Without it, checkpoints travel back here."
                ) from None

    def begin(self, task: TrainStack) -> AtAddress | None:
        """Moves the stack's newest checkpoint to where the worker looks for it. Raises NanostudyError, OSError."""
        newest, here = self._pointer(task), checkpoint.newest(task.path)
        if not self.address:
            return None
        folder = _folder(newest) if newest else f"{self.address}/{uuid.uuid4().hex}"
        if newest is None and here:
            newest = _new_address(folder)
            _reach(newest, lambda: _put(here, newest))
            write_atomically(task.folder / POINTER, newest)
        return AtAddress(folder, newest)

    def keep(self, task: TrainStack, message: Part | Kept) -> None:
        """Raises NanostudyError, OSError where the stack's folder cannot be written."""
        if isinstance(message, Part):
            with contextlib.suppress(ValueError):  # a part before it could not be written; the next save tries again
                append_part(task.path, message)
            return
        write_atomically(task.folder / POINTER, message.address)
        _remove(message.address, others_alone=True)

    def end(self, task: TrainStack, report: Done | Broken, stopped: bool) -> None:
        """Where the stack failed, its checkpoint is in its folder afterwards: the policy may split it."""
        newest = self._pointer(task)
        if newest is None:
            return
        if isinstance(report, Broken) and report.cause not in ("lost", "files"):
            with contextlib.suppress(FileNotFoundError):
                _reach(newest, lambda: replace_atomically(task.path, lambda temporary: _fetch(newest, temporary)))
            (task.folder / POINTER).unlink(missing_ok=True)
            _remove(newest)
        elif isinstance(report, Done) and not stopped:
            _remove(newest)

    def _pointer(self, task: TrainStack) -> str | None:
        """The address that the stack's folder names. Raises NanostudyError where it is not below --checkpoints: it may be anybody's."""
        path = task.folder / POINTER
        if not os.path.lexists(path):
            return None
        newest = path.read_text(encoding="utf-8", errors="replace")[:10_000].strip()
        if self.address and re.fullmatch(rf"{re.escape(self.address)}/[0-9a-f]{{32}}/{NAME}", newest):
            return newest
        where = newest.rsplit("/", 2)[0]
        raise NanostudyError(
            f"{path} says that a checkpoint is at {printable(newest)}, which is not below "
            f"{f'--checkpoints {self.address}' if self.address else 'any --checkpoints given here'}. If you trust this study, go on with "
            f"--checkpoints {shlex.quote(printable(where))}; or delete {path}, and its experiments train from the beginning."
        )


# --- addresses; these functions raise whatever the address's library raises


def _new_address(folder: str) -> str:
    return f"{folder}/{uuid.uuid4().hex}.safetensors"


def _folder(address: str) -> str:
    return address.rpartition("/")[0]


def _put(path: Path, address: str) -> None:
    files, place = url_to_fs(address)
    files.makedirs(_folder(place), exist_ok=True)
    files.put_file(str(path), place)


def _fetch(address: str, path: Path) -> None:
    """Raises FileNotFoundError where there is nothing."""
    files, place = url_to_fs(address)
    files.get_file(place, str(path))


def _remove(address: str, others_alone: bool = False) -> None:
    """The checkpoints beside this one, also those that the driver never heard of; and this one with its folder, unless
    `others_alone` is true. What is left over does no harm.
    """
    with contextlib.suppress(Exception):
        files, place = url_to_fs(address)
        for other in files.ls(_folder(place), detail=False):
            name = other.rpartition("/")[2]
            if re.fullmatch(NAME, name) and not (others_alone and place.endswith(name)):
                files.rm_file(other)
        if not others_alone:
            files.rmdir(_folder(place))


def _reach(address: str, action: Callable[[], None]) -> None:
    try:
        action()
    except FileNotFoundError:
        raise
    except Exception as problem:
        raise NanostudyError(f"The checkpoint at {address} could not be reached: {problem}") from problem
