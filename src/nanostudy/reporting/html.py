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
from importlib import resources
from typing import Any

from nanostudy.measures import MEASURES
from nanostudy.reporting import document as doc
from nanostudy.reporting.charts.figure import SCHEMES, Figure, look
from nanostudy.reporting.data import Data
from nanostudy.version import VERSION

MODULES = (
    "dom",
    "expression",
    "selection",
    "means",
    "figures",
    "table",
    "samples",
    "page",
)  # each uses those before it
LONG = 20  # characters of a name, that may be broken at its underscores
MOST_NOTES = 4  # before the first section; all are among the caveats
PAGE_FONT = "system-ui, -apple-system, 'Segoe UI', Roboto, Helvetica, Arial, sans-serif"
CODE = re.compile(r"`([^`]+)`|(?<![\w&;])([A-Za-z]\w*_[\w.=/-]*\w)")  # commands, settings, experiments
NUMBER = re.compile(r"[−+~<≤≥ ]*\d[\d,.]*( ?[%kMGTP]| to .*)?")


def page(document: doc.Document, bundle: str, undrawn: str = "") -> str:
    """The whole file. `bundle`: the scripts that draw; empty where they could not be made, and then `undrawn` says why."""
    template = resources.files("nanostudy.reporting") / "template"
    css = (template / "page.css").read_text(encoding="utf-8")
    modules = "\n".join((template / f"{name}.js").read_text(encoding="utf-8") for name in MODULES)
    script = re.sub(r"^(import .*\n|export )", "", modules, flags=re.MULTILINE)  # one script has them all
    scripts = {"classic": bundle, "module": script} if bundle else {"module": script}
    content = {
        "title": html.escape(document.title),
        "version": html.escape(VERSION),
        "policy": _policy(list(scripts.values())),
        "css": css,
        "contents": "".join(f'<li><a href="#{s.id}">{html.escape(s.title)}</a></li>' for s in document.once),
        "masthead": _masthead(document, undrawn),
        "sections": sections_html(document),
        "data": _json(page_data(document)),
        "scripts": "\n".join(
            f"<script{' type=module' * (kind == 'module')}>{text}</script>" for kind, text in scripts.items()
        ),
    }
    whole = (template / "page.html").read_text(encoding="utf-8")
    return re.sub(r"\{\{(\w+)\}\}", lambda match: content[match[1]], whole)


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


def page_data(document: doc.Document) -> dict[str, Any]:
    """The data once; figures by their ids."""
    data = document.data
    return {
        "tables": {name: _columns(rows) for name, rows in {**data.tables, "samples": data.samples}.items()},
        "figures": {figure.id: {"panels": figure.for_page(), "tables": figure.tables} for figure in document.figures},
        "looks": looks(),
        "colourings": list(data.colourings),
        "settings": list(data.settings),
        "first": [i for block in document.blocks if isinstance(block, doc.Samples) for i in block.first],
        "filters": [name for block in document.blocks if isinstance(block, doc.Experiments) for name in block.filters],
        "decimals": {"step": None, "loss": 4} | {name: measure.decimals for name, measure in MEASURES.items()},
        "lowest": [name for name, measure in MEASURES.items() if measure.lower_is_better],
    }


def looks() -> dict[str, Any]:
    """Of figures, in light and dark."""
    return {scheme: look(scheme, PAGE_FONT) for scheme in SCHEMES}


def _columns(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Names once, then rows of values."""
    names = list(rows[0]) if rows else []
    return {"columns": names, "rows": [[row[name] for name in names] for row in rows]}


# --- HTML


def _text(text: Any) -> str:
    """Escaped, with commands, settings and experiments in the type of code."""

    def as_code(match: re.Match[str]) -> str:
        name = match[1] or match[2]
        return f"<code>{name.replace('_', '_<wbr>') if len(name) > LONG else name}</code>"

    return CODE.sub(as_code, html.escape(str(text)))


def _masthead(document: doc.Document, undrawn: str) -> str:
    why = [f"Figures could not be drawn here: {undrawn}."] if undrawn else []
    lede = f'<p class="lede">{_text(document.lede)}</p>'
    return f"<h1>{html.escape(document.title)}</h1>\n{lede}\n{notes_html(document.notes)}{notes_html(why)}"


def notes_html(notes: Sequence[str]) -> str:
    return "".join(f'<p class="note">{_text(note)}</p>' for note in notes[:MOST_NOTES])


def sections_html(document: doc.Document) -> str:
    """The facts follow the answer, which a reader wants first."""
    texts = [_section(section, document.data) for section in document.once]
    first = 1 if document.once and document.once[0].id == "answer" else 0
    return "\n".join([*texts[:first], _pairs("facts", document.facts), *texts[first:]])


def _section(section: doc.Section, data: Data) -> str:
    content = "\n".join(block_as_html(block, data, section.title) for block in section.blocks)
    heading = f'<h2 id="{section.id}-title">{html.escape(section.title)}</h2>'
    return f'<section id="{section.id}" aria-labelledby="{section.id}-title">{heading}\n{content}</section>'


def block_as_html(block: doc.Block, data: Data, section: str) -> str:
    """`section`: its title, which a figure of the same title does not repeat."""
    match block:
        case doc.Prose(text):
            return f"<p>{_text(text)}</p>"
        case doc.Bullets(items):
            return f"<ul>{''.join(f'<li>{_text(item)}</li>' for item in items)}</ul>"
        case doc.Answer(texts):
            items = "".join(f"<li><h3>{html.escape(k)}</h3><p>{_text(text)}</p></li>" for k, text in texts.items())
            return f'<ol class="answer">{items}</ol>'
        case doc.Facts(pairs):
            return _pairs("pairs", pairs)
        case doc.Grid():
            return _grid(block)
        case Figure():
            return _figure(block, data, section)
        case doc.Experiments():
            return _experiments(block, data)
        case doc.Samples():
            return _samples(block, data)
        case doc.Quote(about, source, text):
            return (
                f'<article class="sample quote"><h3>{html.escape(about)}</h3><p>{html.escape(source)}</p>'
                f"<pre>{html.escape(text)}</pre></article>"
            )
        case doc.Claims(caption, claims, folded):
            items = "".join(_claim(claim) for claim in claims)
            shut = "" if folded else " open"
            return f'<details{shut}><summary>{_text(caption)}</summary><ul class="claims">{items}</ul></details>'
        case doc.Source(text):
            return f"<pre tabindex=0><code>{html.escape(text)}</code></pre>"


def _pairs(kind: str, pairs: Mapping[str, str]) -> str:
    items = "".join(f"<div><dt>{_text(name)}</dt><dd>{_text(value)}</dd></div>" for name, value in pairs.items())
    return f'<dl class="{kind}">{items}</dl>'


def _grid(grid: doc.Grid) -> str:
    aligned = {name: ' class="n"' * _numeric([row[name] for row in grid.rows]) for name in grid.rows[0]}
    head = "".join(f'<th scope="col"{a}>{_text(name)}</th>' for name, a in aligned.items())
    rows = ("".join(f"<td{a}>{_cell(row[name])}</td>" for name, a in aligned.items()) for row in grid.rows)
    body = "".join(f"<tr>{row}</tr>" for row in rows)
    table = (
        f'<div class="scroll" tabindex="0" role="region" aria-label="{html.escape(grid.caption)}"><table><caption>'
        f"{_text(grid.caption)}</caption><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>"
    )
    return f"<details><summary>{_text(grid.caption)}</summary>{table}</details>" if grid.folded else table


def _numeric(column: Sequence[Any]) -> bool:
    return all(NUMBER.fullmatch(str(value)) or value in ("", "not known") for value in column)


def _cell(value: Any) -> str:
    return _text(f"{value:,}" if isinstance(value, int) else value)


def _claim(claim: doc.Claim) -> str:
    published = f"Published: {claim.published}." if claim.published else ""
    ours = f"Ours: {claim.ours}." if claim.ours else ""
    lines = (claim.statement, " ".join(text for text in (published, ours) if text), claim.why)
    setting = f" <code>{html.escape(claim.setting)}</code>" if claim.setting else ""
    return (
        f'<li><span class="tag" data-tag="{html.escape(claim.verdict)}">{html.escape(claim.verdict)}</span><div>'
        f"{''.join(f'<p>{_text(line)}</p>' for line in lines if line)}"
        f'<p class="source">{html.escape(claim.source)}{setting}</p></div></li>'
    )


def _figure(figure: Figure, data: Data, section: str) -> str:
    controls = ""
    if "colour" in figure.parameters and len(data.colourings) > 1:
        options = "".join(f"<option>{html.escape(name)}</option>" for name in data.colourings)
        controls += f'<label>Colour by <select class="colour">{options}</select></label>'
    if "floor" in figure.parameters:
        controls += '<label><input type="checkbox" class="floor"> with the entropy of the text</label>'
    panels = "".join(
        f'<div class="panel" data-panel="{k}" data-key="{figure.id}.{k}" style="height:{panel.room}px"></div>'
        for k, panel in enumerate(figure.panels)
    )
    return (
        f'<figure id="figure-{figure.id}" class="figure" data-figure="{figure.id}" data-columns="{figure.columns}">'
        + ("" if figure.title == section else f"<h3>{_text(figure.title)}</h3>")
        + (f'<div class="controls">{controls}</div>' if controls else "")
        + f'<div class="panels" role="img" aria-label="{html.escape(figure.alternative)}">{panels}</div>'
        f'<figcaption>{_text(figure.caption)} <span class="of-shown"></span></figcaption></figure>'
    )


def _experiments(block: doc.Experiments, data: Data) -> str:
    head = "".join(
        f'<th scope="col" data-column="{key}" aria-sort="none"><button type="button">{html.escape(name)}</button></th>'
        for key, name in block.columns
    )
    how = (
        "What is shown and what is ticked here is so in every figure and in the samples: write what to show, tick rows, click dots or "
        "lines, drag along an axis of parallel coordinates. A drag zooms, a double click goes back, and the address keeps all of it."
    )
    return (
        f"<p>{how}</p>"
        '<form class="filters" role="search" aria-label="Filter the experiments">'
        f'<label class="find">Show <input type="search" id="where" placeholder="{html.escape(block.example)}" autocomplete="off" '
        'autocapitalize="off" spellcheck="false" aria-describedby="problem"></label>'
        '<select id="filter-add" aria-label="Add a value"><option value="">with …</option></select>'
        '<button type="button" class="show-all">Show all</button><button type="button" class="untick">Untick all</button></form>'
        '<p class="problem" id="problem" role="status"></p><p class="count" role="status" aria-live="polite"></p>'
        '<div class="scroll tall" tabindex="0" role="region" aria-label="All experiments"><table id="experiments-table">'
        f'<thead><tr><th scope="col"><span class="hidden">tick</span></th>{head}</tr></thead><tbody></tbody></table></div>'
        "<noscript><p>This table needs the page's own script. results.csv, beside this page, has all of it.</p></noscript>"
    )


def _samples(block: doc.Samples, data: Data) -> str:
    if len(data.experiments) == 1:
        texts = "".join(f"<pre>{html.escape(sample['text'].strip(chr(10)))}</pre>" for sample in data.samples)
        return f'<article class="sample">{texts}</article>'
    return (
        '<div class="sampler"><div class="controls">'
        '<label>Add the samples of <select id="sample-add"></select></label>'
        '<label>going on from <select id="sample-prompt"></select></label></div>'
        '<div id="sample-cards" class="samples" aria-live="polite"></div></div>'
    )
