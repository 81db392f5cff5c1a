"""What a page is made of: sections of blocks, which the page and the Markdown each render in their own way."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from nanostudy.reporting.charts.figure import Figure


@dataclass(frozen=True)
class Prose:
    text: str


@dataclass(frozen=True)
class Missing:
    """Why something is not there, in a sentence."""

    reason: str


@dataclass(frozen=True)
class Note:
    """Something to know before reading on."""

    text: str


@dataclass(frozen=True)
class Bullets:
    items: Sequence[str]


@dataclass(frozen=True)
class Facts:
    """Names and values."""

    pairs: Sequence[tuple[str, str]]


@dataclass(frozen=True)
class Grid:
    """A small table. `folded`: shut, until a reader opens it."""

    caption: str
    header: Sequence[str]
    rows: Sequence[Sequence[Any]]
    folded: bool = False


@dataclass(frozen=True)
class Claim:
    verdict: str
    statement: str
    published: str
    ours: str
    why: str
    setting: str
    source: str


@dataclass(frozen=True)
class Claims:
    """Claims with their verdicts. `folded`: shut, until a reader opens them."""

    caption: str
    claims: Sequence[Claim]
    folded: bool = False


@dataclass(frozen=True)
class Shown:
    figure: Figure
    colours: bool = False  # with the choice of what colours it
    whole: tuple[float, float] | None = None  # with the choice of the axis's top: after the first fall, and all of it


@dataclass(frozen=True)
class Experiments:
    """The table of all experiments: on the page sortable, with filters."""

    factors: Sequence[str]
    columns: Sequence[tuple[str, str]]  # a column of the page's experiments, its heading


@dataclass(frozen=True)
class Samples:
    """Texts side by side, of experiments that a reader chooses; `first` are shown at the beginning."""

    first: Sequence[int]


@dataclass(frozen=True)
class Source:
    """Text as it is: commands, a definition."""

    text: str


Block = Prose | Missing | Note | Bullets | Facts | Grid | Shown | Experiments | Samples | Source | Claims


@dataclass(frozen=True)
class Section:
    id: str
    title: str
    blocks: Sequence[Block]


def figure_or_reason(figure: Figure | str | None, *, colours: bool = False) -> list[Block]:
    if figure is None:
        return []
    return [Missing(figure)] if isinstance(figure, str) else [Shown(figure, colours)]
