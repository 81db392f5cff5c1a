"""Taking a stack apart that keeps failing: half of it is half the memory, and one alone shows whose fault it is."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from nanostudy.errors import DamagedCheckpoint
from nanostudy.training import stack as checkpoint


@dataclass(frozen=True)
class Apart:
    """What becomes of a stack: one of it failed, or none yet, and the others go on in these stacks."""

    at_fault: str | None
    parts: list[list[str]]
    width: int


def apart(left: Sequence[str], in_slots: Collection[str]) -> Apart:
    """`left` is not done yet, and some of it had slots; others in slots are done, and trained along."""
    suspects = [name for name in left if name in in_slots]
    behind = [name for name in left if name not in in_slots]
    at_fault = None
    if len(in_slots) == 1 and suspects:
        at_fault, parts = suspects[0], [behind]
    elif len(suspects) > 1:
        parts = [suspects[::2] + behind[::2], suspects[1::2] + behind[1::2]]
    else:  # the one beside members that are done was not alone yet
        parts = [suspects, behind]
    return Apart(at_fault, [part for part in parts if part], (len(in_slots) + 1) // 2)


def checkpoint_of(path: Path) -> tuple[list[str], dict[str, str]]:
    """Who has a slot in the checkpoint, and the identities of its stack; nothing where none is whole, and then it is set aside."""
    if not checkpoint.exists(path):
        return [], {}
    try:
        return checkpoint.members(path)
    except DamagedCheckpoint:
        checkpoint.set_aside(path)
        return [], {}


def divide(path: Path, places: Mapping[Path, Mapping[str, str]]) -> None:
    """As checkpoint.divide, into folders that are made."""
    for place in places:
        make_folder(place.parent)
    checkpoint.divide(path, places)


def make_folder(place: Path) -> None:
    """And the one it lies in, no more: a drive that is gone must not get a folder in its stead."""
    place.parent.mkdir(exist_ok=True)
    place.mkdir(exist_ok=True)
