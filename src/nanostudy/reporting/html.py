"""The page: one HTML file that opens from a disk, without a network, and holds all it shows.

Everything that was read is text: it is escaped here, or put in place as text by the page's script. The page's policy
forbids requests, and every script but its own.
"""

from __future__ import annotations

import base64
import hashlib
import html
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import resources
from typing import Any

from nanostudy.reporting.answer import Sentence
from nanostudy.reporting.charts.figure import look
from nanostudy.reporting.document import (
    Block,
    Bullets,
    Claim,
    Claims,
    Experiments,
    Facts,
    Grid,
    Missing,
    Note,
    Prose,
    Samples,
    Section,
    Shown,
)
from nanostudy.reporting.page_data import PageData
from nanostudy.reporting.phrases import level_text
from nanostudy.version import VERSION

LONG = 20  # characters of a name, that may be broken at its underscores
MOST_NOTES = 4  # before the answer; all are among the caveats
PAGE_FONT = "system-ui, -apple-system, 'Segoe UI', Roboto, Helvetica, Arial, sans-serif"
CODE = re.compile(r"`([^`]+)`|(?<![\w&;])([A-Za-z]\w*_[\w.=/-]*\w)")  # commands, settings, experiments
NUMBER = re.compile(r"[−+~<≤≥ ]*\d[\d,.]*( ?[%kMGTP]| to .*)?")


@dataclass(frozen=True)
class Page:
    title: str
    lede: str  # what was run and on what, in a sentence or two
    facts: Sequence[tuple[str, str]]
    notes: Sequence[str]  # that a reader must know first
    answer: Sequence[Sentence]
    sections: Sequence[Section]
    data: PageData

    @property
    def figures(self) -> list[Any]:
        return [block.figure for section in self.sections for block in section.blocks if isinstance(block, Shown)]


def render(page: Page, bundle: str, undrawn: str = "") -> str:
    """The whole file. `bundle`: the scripts that draw; empty where they could not be made, and then `undrawn` says why."""
    template = resources.files("nanostudy.reporting") / "template"
    css, script = ((template / name).read_text(encoding="utf-8") for name in ("page.css", "page.js"))
    scripts = [bundle, script] if bundle else [script]
    content = {
        "title": html.escape(page.title),
        "version": html.escape(VERSION),
        "policy": _policy(scripts),
        "css": css,
        "contents": _contents(page.sections),
        "masthead": _masthead(page, undrawn),
        "answer": _answer(page.answer),
        "sections": "\n".join(_section(section, page) for section in page.sections),
        "data": _json(_carried(page)),
        "scripts": "\n".join(f"<script>{text}</script>" for text in scripts),
    }
    whole = (template / "page.html").read_text(encoding="utf-8")
    return re.sub(r"\{\{(\w+)\}\}", lambda found: content[found[1]], whole)


def _policy(scripts: Sequence[str]) -> str:
    """Nothing is fetched; these scripts alone run. Their checksums are of the text between the tags."""
    for text in scripts:
        assert "</script" not in text.lower(), "a script would end early"
        assert "<!--" not in text, "a script would go on after its end"
        assert "\r" not in text, "a browser would read another text than was hashed"
    sums = " ".join(f"'sha256-{base64.b64encode(hashlib.sha256(s.encode()).digest()).decode()}'" for s in scripts)
    return f"default-src 'none'; script-src {sums}; style-src 'unsafe-inline'; img-src data:; base-uri 'none'; form-action 'none'"


def _json(value: Any) -> str:
    """That no script tag can be closed by, or begun in."""
    text = json.dumps(value, ensure_ascii=False, separators=(",", ":"), allow_nan=False)
    for character in "<>&\u2028\u2029":
        text = text.replace(character, f"\\u{ord(character):04x}")
    return text


def _carried(page: Page) -> dict[str, Any]:
    """The data once; figures by their ids."""
    data = page.data
    return {
        "experiments": _columns(data.experiments),
        "curves": _columns(data.curves),
        "samples": _columns(data.samples),
        "figures": {
            figure.id: {"panels": figure.for_page(), "tables": figure.tables, "columns": figure.columns}
            for figure in page.figures
        },
        "looks": {scheme: look(scheme, PAGE_FONT) for scheme in ("light", "dark")},
        "colourings": list(page.data.colourings),
    }


def _columns(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Names once, then rows of values."""
    names = list(rows[0]) if rows else []
    return {"columns": names, "rows": [[row[name] for name in names] for row in rows]}


# --- HTML


def _text(text: Any) -> str:
    """Escaped, with commands, settings and experiments in the type of code."""

    def set_as_code(found: re.Match[str]) -> str:
        name = found[1] or found[2]
        return f"<code>{name.replace('_', '_<wbr>') if len(name) > LONG else name}</code>"

    return CODE.sub(set_as_code, html.escape(str(text)))


def _contents(sections: Sequence[Section]) -> str:
    links = "".join(f'<li><a href="#{s.id}">{html.escape(s.title)}</a></li>' for s in sections)
    return f'<ol><li><a href="#answer">The answer</a></li>{links}</ol>'


def _masthead(page: Page, undrawn: str) -> str:
    notes = [*page.notes[:MOST_NOTES], *([f"The figures could not be drawn here: {undrawn}."] if undrawn else [])]
    facts = "".join(f"<div><dt>{html.escape(k)}</dt><dd>{html.escape(v)}</dd></div>" for k, v in page.facts)
    told = "".join(f'<p class="note">{_text(note)}</p>' for note in notes)
    return f'<h1>{html.escape(page.title)}</h1>\n<p class="lede">{_text(page.lede)}</p>\n{told}\n<dl class="facts">{facts}</dl>'


def _answer(sentences: Sequence[Sentence]) -> str:
    items = "".join(f"<li><h3>{html.escape(one.about)}</h3><p>{_text(one.text)}</p></li>" for one in sentences)
    return f'<section id="answer" aria-labelledby="answer-title"><h2 id="answer-title">The answer</h2><ol class="answer">{items}</ol></section>'


def answer_as_html(page: Page) -> str:
    """The answer with what must be known before it, without the page around it."""
    notes = "".join(f"<p><em>{_text(note)}</em></p>" for note in page.notes)
    sentences = "".join(f"<dt><b>{html.escape(one.about)}</b></dt><dd>{_text(one.text)}</dd>" for one in page.answer)
    return f"<h3>{html.escape(page.title)}</h3><p>{_text(page.lede)}</p>{notes}<dl>{sentences}</dl>"


def _section(section: Section, page: Page) -> str:
    blocks = "\n".join(block_as_html(block, page, section.title) for block in section.blocks)
    heading = f'<h2 id="{section.id}-title">{html.escape(section.title)}</h2>'
    return f'<section id="{section.id}" aria-labelledby="{section.id}-title">{heading}\n{blocks}</section>'


def block_as_html(block: Block, page: Page, section: str) -> str:
    if isinstance(block, Prose):
        return f"<p>{_text(block.text)}</p>"
    if isinstance(block, Missing):
        return f'<p class="missing">{_text(block.reason)}</p>'
    if isinstance(block, Note):
        return f'<p class="note">{_text(block.text)}</p>'
    if isinstance(block, Bullets):
        return f"<ul>{''.join(f'<li>{_text(item)}</li>' for item in block.items)}</ul>" if block.items else ""
    if isinstance(block, Facts):
        pairs = "".join(f"<div><dt>{_text(k)}</dt><dd>{_text(v)}</dd></div>" for k, v in block.pairs)
        return f'<dl class="pairs">{pairs}</dl>'
    if isinstance(block, Grid):
        return _grid(block)
    if isinstance(block, Shown):
        return _figure(block, page, section)
    if isinstance(block, Experiments):
        return _experiments(block, page)
    if isinstance(block, Samples):
        return _samples(block)
    if isinstance(block, Claims):
        return _claims(block)
    return f"<pre tabindex=0><code>{html.escape(block.text)}</code></pre>"


def _grid(grid: Grid) -> str:
    right = [
        bool(grid.rows) and all(NUMBER.fullmatch(str(row[k])) or str(row[k]) in ("", "not known") for row in grid.rows)
        for k in range(len(grid.header))
    ]
    aligned = [' class="n"' if one else "" for one in right]
    head = "".join(f'<th scope="col"{a}>{_text(name)}</th>' for name, a in zip(grid.header, aligned, strict=True))
    body = "".join(
        f"<tr>{''.join(f'<td{a}>{_cell(value)}</td>' for value, a in zip(row, aligned, strict=True))}</tr>"
        for row in grid.rows
    )
    table = (
        f'<div class="scroll" tabindex="0" role="region" aria-label="{html.escape(grid.caption)}"><table><caption>'
        f"{_text(grid.caption)}</caption><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>"
    )
    if not grid.folded:
        return table
    return f"<details><summary>{_text(grid.caption)}</summary>{table}</details>"


def _cell(value: Any) -> str:
    return _text(f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else value)


def _claims(block: Claims) -> str:
    items = "".join(
        f'<li><span class="tag" data-tag="{html.escape(one.verdict)}">{html.escape(one.verdict)}</span><div>'
        f"<p>{_text(one.statement)}</p>"
        + "".join(f"<p>{_text(told)}</p>" for told in _evidence(one) if told)
        + f'<p class="source">{html.escape(one.source)}{_setting(one.setting)}</p></div></li>'
        for one in block.claims
    )
    told = f'<ul class="claims">{items}</ul>'
    shut = "" if block.folded else " open"
    return f"<details{shut}><summary>{_text(block.caption)}</summary>{told}</details>"


def _setting(setting: str) -> str:
    return f" <code>{html.escape(setting)}</code>" if setting else ""


def _evidence(claim: Claim) -> list[str]:
    figures = [
        f"Published: {claim.published}." if claim.published else "",
        f"Ours: {claim.ours}." if claim.ours else "",
    ]
    return [" ".join(told for told in figures if told), claim.why]


def _figure(shown: Shown, page: Page, section: str) -> str:
    figure = shown.figure
    controls = ""
    if shown.colours and len(page.data.colourings) > 1:
        options = "".join(f"<option>{html.escape(name)}</option>" for name in page.data.colourings)
        controls += f'<label>Colour by <select class="colour">{options}</select></label>'
    if shown.whole:
        top, whole = shown.whole
        controls += f'<label><input type="checkbox" class="whole" data-top="{top}" data-whole="{whole}"> from the very start</label>'
    panels = "".join(f'<div class="panel" data-panel="{k}"></div>' for k in range(len(figure.panels)))
    return (
        f'<figure id="figure-{figure.id}" class="figure" data-figure="{figure.id}" data-columns="{figure.columns}">'
        + ("" if figure.title == section else f"<h3>{_text(figure.title)}</h3>")
        + (f'<div class="controls">{controls}</div>' if controls else "")
        + f'<div class="panels" role="img" aria-label="{html.escape(figure.alternative)}">{panels}</div>'
        f"<figcaption>{_text(figure.caption)}</figcaption></figure>"
    )


def _experiments(block: Experiments, page: Page) -> str:
    rows = page.data.experiments
    filters = ""
    choices = [*block.factors, *(["part"] if len({row["part"] for row in rows}) > 1 else []), "status"]
    for name in choices:
        values = sorted({row[name] for row in rows if row[name] is not None}, key=lambda v: (isinstance(v, str), v))
        if len(values) < 2:
            continue
        options = "".join(
            f'<option value="{html.escape(json.dumps(v))}">{html.escape(level_text(v))}</option>' for v in values
        )
        filters += (
            f'<label>{_text(name)} <select data-filter="{name}"><option value="">any</option>{options}</select></label>'
        )
    losses = [("val_loss", "validation"), ("train_loss", "training"), ("gap", "gap")]
    headings = [("place", "place"), ("name", "experiment"), *losses, *((f, f) for f in block.factors)]
    headings += [("seed", "seed")] if len({row["seed"] for row in rows}) > 1 else []
    headings += [*block.columns, ("status", "status")]
    head = "".join(
        f'<th scope="col" data-column="{key}" aria-sort="none"><button type="button">{html.escape(name)}</button></th>'
        for key, name in headings
    )
    return (
        '<form class="filters" role="search" aria-label="Filter the experiments">'
        '<label class="find">Find <input type="search" id="find" placeholder="part of a name or a reason" autocomplete="off"></label>'
        f'{filters}<button type="reset">Clear</button></form><p class="count" id="count" role="status" aria-live="polite"></p>'
        '<div class="scroll tall" tabindex="0" role="region" aria-label="All experiments"><table id="experiments-table">'
        f'<thead><tr><th scope="col"><span class="hidden">choose</span></th>{head}</tr></thead><tbody></tbody></table></div>'
        "<noscript><p>This table needs the page's own script. results.csv, beside this page, has all of it.</p></noscript>"
    )


def _samples(block: Samples) -> str:
    return (
        f'<div class="sampler" data-first="{html.escape(json.dumps(list(block.first)))}"><div class="controls">'
        '<label>Add the samples of <select id="sample-add"></select></label>'
        '<label>going on from <select id="sample-prompt"></select></label></div>'
        '<div id="sample-cards" class="samples" aria-live="polite"></div></div>'
    )
