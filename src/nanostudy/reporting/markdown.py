"""A document as Markdown, with its figures as pictures."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Collection, Mapping, Sequence
from typing import Any

from nanostudy.measures import MEASURES
from nanostudy.reporting import document as doc
from nanostudy.reporting.charts.figure import Figure
from nanostudy.reporting.data import Data
from nanostudy.text import plain, table, value_text

Columns = Sequence[tuple[str, str]]  # of the data's experiments, each with its heading

MOST_ROWS = 25  # of the table of experiments; results.csv has all


def markdown(document: doc.Document, pictures: Collection[str]) -> str:
    """`pictures`: the ids of the figures that have one, a file beside the Markdown."""
    lines = [f"# {plain(document.title)}", ""]
    lines += [line for note in document.notes for line in (f"> {plain(note)}", "")]
    lines += [plain(document.lede), "", *table(("", ""), list(document.facts.items()))]
    for section in document.once:
        lines += ["", f"## {plain(section.title)}"]
        for block in section.blocks:
            lines += ["", *_block(block, document.data, pictures)]
    return "\n".join(lines) + "\n"


def _block(block: doc.Block, data: Data, pictures: Collection[str]) -> list[str]:
    match block:
        case doc.Prose(text):
            return [plain(text)]
        case doc.Bullets(items):
            return [f"- {plain(item)}" for item in items]
        case doc.Answer(texts):
            return [f"{k}. **{plain(about)}.** {plain(text)}" for k, (about, text) in enumerate(texts.items(), start=1)]
        case doc.Facts(pairs):
            return table(("what", "value"), list(pairs.items()))
        case doc.Grid(caption, rows):
            return [f"{plain(caption)}:", "", *table(list(rows[0]), [list(row.values()) for row in rows])]
        case Figure():
            alternative = plain(block.alternative)
            picture = f"![{alternative}]({block.id}.png)" if block.id in pictures else alternative
            return [f"**{plain(block.title)}.** {plain(block.caption)}", "", picture]
        case doc.Experiments(columns):
            return _experiments(columns, data)
        case doc.Samples(first):
            return _samples(first, data)
        case doc.Quote(about, source, text):
            return [f"**{plain(about)}** ({plain(source)}):", "", *_fenced(text)]
        case doc.Claims(caption, claims):
            lines = [(one.verdict, one.statement, one.published, one.ours, one.why) for one in claims]
            return [plain(caption), "", *table(("verdict", "claim", "published", "ours", "why"), lines)]
        case doc.Source(text):
            return _fenced(text)


def _experiments(columns: Columns, data: Data) -> list[str]:
    rows = data.ranked[:MOST_ROWS]
    lines = table(*brief_table(columns, rows))
    left = len(data.experiments) - len(rows)
    return [*lines, "", f"These are {len(rows)} of {len(data.experiments):,}; results.csv has all."] if left else lines


def brief_table(columns: Columns, rows: Sequence[Mapping[str, Any]]) -> tuple[list[str], list[list[str]]]:
    """Headings and cells of the data's experiments, without the measures that short tables leave out."""
    columns = [(key, heading) for key, heading in columns if key not in MEASURES or MEASURES[key].brief]
    return [heading for _, heading in columns], [[_cell(row[key], key) for key, _ in columns] for row in rows]


def _cell(value: Any, column: str) -> str:
    if value is None:
        return ""
    return MEASURES[column].text(value) if column in MEASURES else value_text(value)


def _samples(first: Sequence[int], data: Data) -> list[str]:
    lines: list[str] = []
    for i in first:
        lines += [f"**{plain(data.experiments[i]['name'])}**", ""] if len(first) > 1 else []
        texts = [sample["text"].strip("\n") for sample in data.samples if sample["i"] == i]
        lines += [line for text in texts for line in (*_fenced(text), "")]
    return lines[:-1]


def _fenced(text: str) -> list[str]:
    """The text as it is, in a fence that it cannot close; control characters become replacement characters."""
    clean = "".join("\ufffd" if unicodedata.category(c) == "Cc" and c not in "\n\t" else c for c in text)
    fence = "`" * max(3, 1 + max(map(len, re.findall("`+", clean)), default=0))
    return [f"{fence}text", clean, fence]
