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
from nanostudy.study.cluster.actor import Kept, Message, Part, append_part
from nanostudy.study.tasks import Broken, Done, Noted, TrainStack
from nanostudy.text import printable
from nanostudy.training import stack as checkpoint

POINTER = "checkpoint.at"  # the file in a stack's folder that names the address of its newest checkpoint


@dataclass(frozen=True)
class AtAddress:
    """A transport: one stack's checkpoints lie in a folder at an address."""

    folder: str
    newest: str | None = None

    def load(self, path: Path) -> Iterator[Message]:
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
        if newest is None and here:
            newest = _new_address(f"{self.address}/{uuid.uuid4().hex}")
            _reach(newest, lambda: _put(here, newest))
            write_atomically(task.folder / POINTER, newest)
        return AtAddress(_folder(newest) if newest else f"{self.address}/{uuid.uuid4().hex}", newest)

    def keep(self, task: TrainStack, message: Part | Kept) -> None:
        """Raises NanostudyError, OSError where the stack's folder cannot be written."""
        if isinstance(message, Part):
            with contextlib.suppress(ValueError):  # a part before it could not be written; the next save tries again
                append_part(task.path, message)
            return
        write_atomically(task.folder / POINTER, message.address)
        with contextlib.suppress(Exception):  # the next save tries again
            files, place = url_to_fs(message.address)
            for other in files.ls(_folder(place), detail=False):  # also those that the driver never heard of
                if other.rpartition("/")[2] != place.rpartition("/")[2] and other.endswith(".safetensors"):
                    files.rm_file(other)

    def end(self, task: TrainStack, report: Done | Broken, stopped: bool) -> None:
        """Where the stack failed, its checkpoint is in its folder afterwards: the policy may split it."""
        newest = self._pointer(task)
        if isinstance(report, Broken) and report.cause not in ("lost", "files"):
            self._bring_back(task)
        elif newest and isinstance(report, Done) and not stopped:
            _remove_folder(newest)

    def _bring_back(self, task: TrainStack) -> None:
        newest = self._pointer(task)
        if newest is None:
            return
        with contextlib.suppress(FileNotFoundError):
            _reach(newest, lambda: replace_atomically(task.path, lambda temporary: _fetch(newest, temporary)))
        (task.folder / POINTER).unlink(missing_ok=True)
        _remove_folder(newest)

    def _pointer(self, task: TrainStack) -> str | None:
        """The address that the stack's folder names. Raises NanostudyError where it is not below --checkpoints: it may be anybody's."""
        path = task.folder / POINTER
        if not os.path.lexists(path):
            return None
        newest = path.read_text(encoding="utf-8", errors="replace")[:10_000].strip()
        if self.address and re.fullmatch(
            rf"{re.escape(self.address)}/[0-9a-f]{{32}}/[0-9a-f]{{32}}\.safetensors", newest
        ):
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


def _remove_folder(address: str) -> None:
    """Of this checkpoint, with the others that lie there, and nothing else. What is left over does no harm."""
    with contextlib.suppress(Exception):
        files, place = url_to_fs(_folder(address))
        for other in files.ls(place, detail=False):
            if re.fullmatch(r"[0-9a-f]{32}\.safetensors", other.rpartition("/")[2]):
                files.rm_file(other)
        files.rmdir(place)


def _reach(address: str, action: Callable[[], None]) -> None:
    try:
        action()
    except FileNotFoundError:
        raise
    except Exception as problem:
        raise NanostudyError(f"The checkpoint at {address} could not be reached: {problem}") from problem
