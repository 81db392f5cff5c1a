"""What a person writes beside a study's experiments: stars and notes, in notes.yaml. No result depends on them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import yaml

from nanostudy.atomic import write_atomically
from nanostudy.errors import UsageError
from nanostudy.reading import read_text
from nanostudy.yaml_input import parse_yaml

NOTES = "notes.yaml"  # in the study's folder
LARGEST = 2**24  # bytes
LONGEST = 2000  # characters of a note
STAR = "★"


@dataclass(frozen=True)
class Note:
    text: str = ""
    star: bool = False

    def joined(self, other: Note) -> Note:
        """Both texts, once each, however often they are joined."""
        texts = dict.fromkeys([*self.text.split("; "), *other.text.split("; ")])
        return Note("; ".join(filter(None, texts))[:LONGEST], self.star or other.star)


def read_notes(folder: Path) -> dict[str, Note]:
    """By the experiments' names; empty where there are none. Raises UsageError where the file is damaged."""
    path = folder / NOTES
    if not path.is_file():
        return {}
    text = read_text(path, LARGEST)
    notes = {}
    for name, content in (parse_yaml(text, str(path)) if text.strip() else {}).items():
        note = content if isinstance(content, Mapping) else {"note": content}
        words, star = note.get("note", ""), note.get("star", False)
        if not isinstance(words, str) or not isinstance(star, bool) or set(note) - {"note", "star"}:
            raise UsageError(f"{path}: the note of {name} must be a text, or hold `star: true` and `note: a text`.")
        notes[name] = Note(" ".join(words.split())[:LONGEST], star)
    return notes


def write_notes(folder: Path, notes: Mapping[str, Note]) -> None:
    """Without those that say nothing."""
    content = {
        name: {**({"star": True} if note.star else {}), **({"note": note.text} if note.text else {})}
        for name, note in sorted(notes.items())
        if note != Note()
    }
    text = yaml.safe_dump(content, allow_unicode=True, width=10**9) if content else ""
    write_atomically(folder / NOTES, text)


def annotate(folder: Path, name: str, text: str | None = None, star: bool | None = None) -> Note:
    """Changes what is given of an experiment's note; an empty text deletes it. Raises UsageError, NanostudyError."""
    notes = read_notes(folder)
    before = notes.get(name, Note())
    words = before.text if text is None else " ".join(text.split())
    if len(words) > LONGEST:
        raise UsageError(f"A note has {LONGEST:,} characters at most, and this one has {len(words):,}.")
    notes[name] = Note(words, before.star if star is None else star)
    write_notes(folder, notes)
    return notes[name]


def merge_notes(sources: Iterable[Path], into: Path) -> list[str]:
    """Adds the sources' notes to those of `into`: an experiment keeps both texts and any star. Returns what could not be read."""
    problems = []
    before = read_notes(into)
    notes = dict(before)
    for source in sources:
        try:
            for name, note in read_notes(source).items():
                notes[name] = notes.get(name, Note()).joined(note)
        except UsageError as problem:
            problems.append(f"not taken: {problem}")
    if notes != before:
        write_notes(into, notes)
    return problems
