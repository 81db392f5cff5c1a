"""A document: sections made of blocks, which html, markdown and notebook each render in their own way."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from nanostudy.reporting.charts.figure import Figure
from nanostudy.reporting.data import Data


@dataclass(frozen=True)
class Prose:
    text: str


@dataclass(frozen=True)
class Bullets:
    items: Sequence[str]

    def __bool__(self) -> bool:
        return bool(self.items)


@dataclass(frozen=True)
class Answer:
    """Numbered texts by what each is about."""

    texts: Mapping[str, str]


@dataclass(frozen=True)
class Facts:
    """Names and values."""

    pairs: Mapping[str, str]


@dataclass(frozen=True)
class Grid:
    """A small table: each row by its headings. `folded`: shut, until a reader opens it."""

    caption: str
    rows: Sequence[Mapping[str, Any]]
    folded: bool = False

    def __bool__(self) -> bool:
        return bool(self.rows)


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
class Experiments:
    """The table of all experiments: on the page sortable, with filters."""

    columns: Sequence[tuple[str, str]]  # of the data's experiments, each with its heading
    filters: Sequence[str]
    example: str  # of an expression


@dataclass(frozen=True)
class Samples:
    """Texts side by side, of experiments that a reader chooses; `first` are shown at the beginning."""

    first: Sequence[int]


@dataclass(frozen=True)
class Quote:
    """What a model wrote, with what it is."""

    about: str
    source: str
    text: str


@dataclass(frozen=True)
class Source:
    """Text as it is: commands, a definition."""

    text: str


Block = Prose | Bullets | Answer | Facts | Grid | Figure | Experiments | Samples | Quote | Source | Claims
Blocks = list[Block | None]  # of a section; None, bullets without items and tables without rows are left out


@dataclass(frozen=True)
class Section:
    id: str
    title: str
    blocks: Sequence[Block]


@dataclass(frozen=True)
class Document:
    title: str
    lede: str  # what was run and on what, in a sentence or two
    facts: Mapping[str, str]
    notes: Sequence[str]  # that a reader must know first
    sections: Sequence[Section]
    data: Data

    @property
    def once(self) -> list[Section]:
        """The sections with each figure where it comes first."""
        seen: set[str] = set()
        sections = []
        for section in self.sections:
            blocks = [block for block in section.blocks if not (isinstance(block, Figure) and block.id in seen)]
            seen |= {block.id for block in blocks if isinstance(block, Figure)}
            sections.append(Section(section.id, section.title, blocks))
        return [section for section in sections if section.blocks]

    @property
    def blocks(self) -> list[Block]:
        return [block for section in self.once for block in section.blocks]

    @property
    def figures(self) -> list[Figure]:
        return [block for block in self.blocks if isinstance(block, Figure)]

    @property
    def answer(self) -> Mapping[str, str]:
        """Empty where nothing is compared."""
        return next((block.texts for block in self.blocks if isinstance(block, Answer)), {})
