"""A stack between two updates: its slots, its state, and both as one atomic file."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from nanostudy.gpt.engine import State
from nanostudy.gpt.errors import NanostudyError
from nanostudy.gpt.files import load_tensors, save_tensors


@dataclass
class Slot:
    """Where one member stands."""

    name: str
    step: int = 0  # batches done; all were updates, unless the state says that the member diverged
    evaluated_at: int = -1
    best_step: int = -1
    best_val_loss: float = math.inf
    seconds: float = 0.0  # over all sittings, evaluations included
    diverged: bool = False  # as far as the host has looked


@dataclass
class Stack:
    """Members side by side: slot m is row m of the state. `waiting` experiments take slots that come free."""

    slots: list[Slot]
    waiting: list[str]
    state: State
    best: Tensor  # fp32 (M, P): each member's weights at its best validation loss

    def keep(self, rows: Sequence[int]) -> None:
        """Drops all other members."""
        self.slots = [self.slots[m] for m in rows]
        self.state = self.state.rows(rows)
        self.best = self.best[list(rows)]

    def put(self, m: int, name: str, params_P: Tensor) -> None:
        """Gives slot m to a fresh experiment."""
        self.slots[m] = Slot(name)
        for own, fresh in zip(
            self.state.tensors().values(), State.fresh(params_P[None]).tensors().values(), strict=True
        ):
            own[m] = fresh[0]
        self.best[m] = params_P


def save(stack: Stack, path: Path, identities: Mapping[str, str], machine: Mapping[str, Any]) -> None:
    metadata = {
        "kind": "stack",
        "slots": [dataclasses.asdict(slot) for slot in stack.slots],
        "waiting": stack.waiting,
        "identities": dict(identities),
        "machine": dict(machine),
    }
    save_tensors(path, {**stack.state.tensors(), "best": stack.best}, metadata)


def load(path: Path, identities: Mapping[str, str], device: torch.device) -> tuple[Stack, dict[str, Any]]:
    """The stack, and the machine that it was saved on. Raises NanostudyError where it is not of these experiments."""
    try:
        tensors, metadata = load_tensors(path)
    except NanostudyError as problem:
        raise NanostudyError(
            f"{problem} Restore it, delete it to train from the beginning, or choose another folder with --out."
        ) from None
    if metadata.get("kind") != "stack":
        raise NanostudyError(f"{path} holds no training to go on with.")
    if metadata["identities"] != dict(identities):
        raise NanostudyError(
            f"{path} belongs to other experiments, or to another version of this one. Choose another folder."
        )
    moved = {name: tensor.to(device) for name, tensor in tensors.items()}
    best = moved.pop("best")
    slots = [Slot(**slot) for slot in metadata["slots"]]
    return Stack(slots, list(metadata["waiting"]), State(**moved), best), metadata["machine"]
