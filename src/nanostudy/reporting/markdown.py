"""The page's content as Markdown, with its figures as pictures beside it."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Collection
from typing import Any

from nanostudy.reporting.document import (
    Block,
    Bullets,
    Claims,
    Experiments,
    Grid,
    Missing,
    Note,
    Prose,
    Samples,
    Shown,
    Source,
)
from nanostudy.reporting.html import Page
from nanostudy.text import plain, table

MOST_ROWS = 25  # of the table of experiments; results.csv has all


def markdown(page: Page, drawn: Collection[str]) -> str:
    """`drawn`: the ids of the figures that have a picture."""
    lines = [f"# {plain(page.title)}", "", plain(page.lede), ""]
    lines += [line for note in page.notes for line in (f"> {plain(note)}", "")]
    lines += [*table(("", ""), page.facts), "", "## The answer", ""]
    for number, sentence in enumerate(page.answer, start=1):
        lines += [f"{number}. **{plain(sentence.about)}.** {plain(sentence.text)}"]
    for section in page.sections:
        lines += ["", f"## {plain(section.title)}"]
        for block in section.blocks:
            found = _block(block, page, drawn)
            lines += ["", *found] if found else []
    return "\n".join(lines) + "\n"


def _block(block: Block, page: Page, drawn: Collection[str]) -> list[str]:
    if isinstance(block, Prose | Note):
        return [plain(block.text)]
    if isinstance(block, Missing):
        return [f"*{plain(block.reason)}*"]
    if isinstance(block, Bullets):
        return [f"- {plain(item)}" for item in block.items]
    if isinstance(block, Grid):
        return [f"{plain(block.caption)}:", "", *table(block.header, block.rows)]
    if isinstance(block, Shown):
        figure = block.figure
        picture = (
            [f"![{plain(figure.alternative)}]({figure.id}.png)", ""]
            if figure.id in drawn
            else [plain(figure.alternative), ""]
        )
        return [f"**{plain(figure.title)}.** {plain(figure.caption)}", "", *picture]
    if isinstance(block, Experiments):
        return _experiments(block, page)
    if isinstance(block, Samples):
        return _samples(block, page)
    if isinstance(block, Claims):
        header = ("verdict", "claim", "published", "ours", "why")
        rows = [(one.verdict, one.statement, one.published, one.ours, one.why) for one in block.claims]
        return [f"{plain(block.caption)}", "", *table(header, rows)]
    if isinstance(block, Source):
        return fenced(block.text)
    return table(("", ""), block.pairs)


def _experiments(block: Experiments, page: Page) -> list[str]:
    rows = sorted(page.data.experiments, key=lambda row: (row["place"] is None, row["place"] or 0.0, row["i"]))
    keys = ["place", "name", *block.factors, "train_loss", "val_loss", "gap", "parameters", "status"]
    cells = [[_value(row[key]) for key in keys] for row in rows[:MOST_ROWS]]
    left = len(rows) - len(cells)
    more = ["", f"These are {len(cells)} of {len(rows):,}; results.csv has all."] if left else []
    return [*table(keys, cells), *more]


def _value(value: Any) -> Any:
    if value is None:
        return ""
    if isinstance(value, float):
        return int(value) if value.is_integer() and abs(value) > 99 else f"{value:.4f}".rstrip("0").rstrip(".")
    return value


def _samples(block: Samples, page: Page) -> list[str]:
    lines: list[str] = []
    for i in block.first:
        row = page.data.experiments[i]
        lines += [f"**{plain(row['name'])}**", ""]
        for sample in page.data.samples:
            if sample["i"] == i:
                lines += [*fenced(sample["text"].strip("\n")), ""]
    return lines


def fenced(text: str) -> list[str]:
    """The text as it is, in a fence that it cannot close; control characters become replacement characters."""
    clean = "".join("\ufffd" if unicodedata.category(c) == "Cc" and c not in "\n\t" else c for c in text)
    fence = "`" * max(3, 1 + max(map(len, re.findall("`+", clean)), default=0))
    return [f"{fence}text", clean, fence]
