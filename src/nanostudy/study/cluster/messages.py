"""What a worker on a cluster and the driver say to each other, and checkpoints in parts that travel so."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from nanostudy.atomic import replace_atomically
from nanostudy.study.tasks import Report

PART = 2**24  # bytes of a checkpoint that travel at once


@dataclass(frozen=True)
class Wanted:
    """The worker waits for the stack's checkpoint, in parts; where there is none, for one part without bytes."""


@dataclass(frozen=True)
class Part:
    """The bytes from `offset` on of a checkpoint of `size` bytes."""

    data: bytes
    offset: int
    size: int


@dataclass(frozen=True)
class Kept:
    """A whole checkpoint lies at this address."""

    address: str


Message = Report | Wanted | Part | Kept


def parts(path: Path) -> Iterator[Part]:
    size = path.stat().st_size
    with open(path, "rb") as file:
        for offset in range(0, size, PART):
            yield Part(file.read(PART), offset, size)


def append_part(path: Path, part: Part) -> bool:
    """Whether the file is whole now, and at `path`. Raises ValueError where a part before this one is missing."""
    arriving = path.with_name(".arriving.tmp")
    with open(arriving, "ab" if part.offset else "wb") as file:
        if file.tell() != part.offset:
            raise ValueError(f"a part of {path.name} before byte {part.offset} is missing")
        file.write(part.data)
        whole = file.tell() == part.size
    if whole:
        replace_atomically(path, lambda temporary: os.replace(arriving, temporary))
    return whole
