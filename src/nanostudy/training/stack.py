"""A stack between two updates: its slots and its state, and the checkpoint file that holds both."""

from __future__ import annotations

import contextlib
import dataclasses
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from nanostudy import atomic
from nanostudy.errors import DamagedCheckpoint, NanostudyError
from nanostudy.model.engine import State
from nanostudy.training.tensors import load_tensors, save_tensors


@dataclass
class Slot:
    """One member's progress."""

    name: str
    step: int = 0  # batches so far; each was an update, unless the member diverged
    evaluated_at: int = -1
    val_loss: float = math.nan  # at that step
    best_step: int = -1
    best_val_loss: float = math.inf
    seconds: float = 0.0  # over all sessions, evaluations included
    diverged: bool = False  # as of the host's last look at the state
    idle: bool = False  # its experiment has ended, and the row trains on unread: a GPU replays updates of one width


@dataclass
class Stack:
    """Members side by side: slot m is row m of the state. `waiting` experiments take the slots of finished ones."""

    slots: list[Slot]
    waiting: list[str]
    state: State
    best: Tensor  # fp32 (M, P): each member's weights at its best validation loss

    @property
    def active(self) -> list[Slot]:
        return [slot for slot in self.slots if not slot.idle]

    def to(self, device: torch.device) -> Stack:
        moved = {name: tensor.to(device) for name, tensor in self.state.tensors().items()}
        return Stack(self.slots, self.waiting, State(**moved), self.best.to(device))

    def keep(self, rows: Sequence[int]) -> None:
        """Keeps only these members."""
        self.slots = [self.slots[m] for m in rows]
        self.state = self.state.rows(rows)
        self.best = self.best[list(rows)]

    def put(self, m: int, name: str, params_P: Tensor) -> None:
        """Gives slot m to a fresh experiment."""
        self.slots[m] = Slot(name)
        fresh = State.fresh(params_P[None]).tensors()
        for name, own in self.state.tensors().items():
            own[m] = fresh[name][0]
        self.best[m] = params_P


def exists(path: Path) -> bool:
    return newest(path) is not None


def newest(path: Path) -> Path | None:
    """The newest checkpoint file: `path`, or the one before if a save was killed between its two renames."""
    return next((file for file in (path, _before(path)) if file.exists()), None)


def remove(path: Path) -> None:
    for file in (path, _before(path)):
        file.unlink(missing_ok=True)


def set_aside(path: Path) -> None:
    """Renames damaged files, so that a training can start from the beginning."""
    for file in (path, _before(path)):
        if file.exists():
            atomic.set_aside(file)


def _before(path: Path) -> Path:
    """The path of the previous checkpoint, the fallback for a damaged newest one."""
    return path.with_name(f"{path.stem}.before{path.suffix}")


def save(stack: Stack, path: Path, identities: Mapping[str, str], machine: Mapping[str, Any]) -> None:
    """Writes the checkpoint and keeps the previous one beside it."""
    metadata = {
        "kind": "stack",
        "slots": [dataclasses.asdict(slot) for slot in stack.slots],
        "waiting": stack.waiting,
        "identities": dict(identities),
        "machine": dict(machine),
    }
    save_tensors(path, {**stack.state.tensors(), "best": stack.best}, metadata, before=_before(path))


def load(path: Path, identities: Mapping[str, str]) -> tuple[Stack, dict[str, Any], str | None]:
    """The stack, on the CPU; the machine that saved it; and what was wrong with the newest file if the previous one was loaded.

    Raises DamagedCheckpoint where no file is whole, NanostudyError where it belongs to other experiments.
    """
    stack, metadata, problem = _read(path)
    if metadata["identities"] != dict(identities):
        raise NanostudyError(
            f"{path} belongs to other experiments, or to another version of this one. Choose another folder."
        )
    return stack, metadata["machine"], problem


def _read(path: Path) -> tuple[Stack, dict[str, Any], str | None]:
    """The stack, on the CPU; all that its file says; and what was wrong with the newest file. Raises NanostudyError."""
    tensors, metadata, problem = _newest_whole(path)
    if metadata.get("kind") != "stack":
        raise NanostudyError(f"{path} holds no training to resume.")
    best, slots = tensors.pop("best"), [Slot(**slot) for slot in metadata["slots"]]
    return Stack(slots, metadata["waiting"], State(**tensors), best), metadata, problem


def _newest_whole(path: Path) -> tuple[dict[str, Tensor], dict[str, Any], str | None]:
    if not path.exists():  # killed between the two renames of a save
        path = _before(path)
    try:
        return *load_tensors(path), None
    except NanostudyError as problem:
        if isinstance(problem.__cause__, OSError):  # the file may be whole, on a drive that is out of reach
            raise
        with contextlib.suppress(NanostudyError):
            return *load_tensors(_before(path)), str(problem)
        raise DamagedCheckpoint(
            f"{problem} Restore it, delete it to train from the beginning, or choose another folder with --out."
        ) from None


def members(path: Path) -> tuple[list[str], dict[str, str]]:
    """The names that have a slot in it, and the identities of all the stack's experiments, by name."""
    stack, metadata, _ = _read(path)
    return [slot.name for slot in stack.active], metadata["identities"]


def divide(path: Path, parts: Mapping[Path, Mapping[str, str]]) -> None:
    """Splits a stack: each target path gets those of its members (name -> identity) that the stack holds.

    A target whose members have not started gets no file. Raises as `load` does.
    """
    stack, metadata, _ = _read(path)
    for target, identities in parts.items():
        rows = [m for m, slot in enumerate(stack.slots) if slot.name in identities]
        if rows:
            part = dataclasses.replace(stack, waiting=[name for name in stack.waiting if name in identities])
            part.keep(rows)
            save(part, target, identities, metadata["machine"])
