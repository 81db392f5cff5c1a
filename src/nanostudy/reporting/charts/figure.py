"""A figure: panels in Vega-Lite, its words, one look for light, dark and print, and the one process that draws.

Every figure is made once. The page shows its panels side by side as far as they fit; print joins them into one picture.
Panels refer to the document's tables by name: the data are in the page once.
"""

from __future__ import annotations

import base64
import contextlib
import json
import subprocess
import sys
import textwrap
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from importlib import metadata
from typing import Any

import numpy as np
import pandas as pd

from nanostudy.atomic import cache_folder, safe_to_execute, write_atomically
from nanostudy.errors import NanostudyError
from nanostudy.text import value_text

TABLES = ("experiments", "curves", "batches")  # of the document's data
COLOUR = "colour"  # the page's parameter: the column that colours
AROUND, ABOVE = 60, 26  # pixels: an axis with its title; a title or a legend
PRINT_WIDTH = 820  # pixels at scale 1, of a whole figure
PRINT_SCALE = 2.0
LONGEST_DRAWING, LONGEST_OF_ONE = 300, 60  # seconds, of all figures and of one
CAPTION_WIDTH = 120  # characters of a line in a picture

# Okabe & Ito's colours, which colour-blind readers can tell apart; on dark ground the lighter ones come first.
LIGHT = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
DARK = ("#56B4E9", "#E69F00", "#2DB892", "#CC79A7", "#F0E442", "#E8743B", "#C9CDD2")
BLUE, VERMILLION, GREY = "#2F86C1", "#D55E00", "#85888F"  # that stand out on either ground
INK = {"expr": "ink"}  # each scheme's own
PALE = "#7FA8C6"  # blue that lies behind
SCHEMES = {  # ink, faint ink, grid, ground, colours
    "light": ("#2A2B2E", "#6B6E76", "#E6E4DF", "#FFFFFF", LIGHT),
    "dark": ("#E4E2DD", "#A0A3AA", "#33363C", "#1B1D21", DARK),
}

DRAW = """
import base64, json, sys, vl_convert
request = json.load(sys.stdin)
version, pictures = request["version"], {}
problems = {}
for name, spec in request["figures"].items():
    try:
        svg = vl_convert.vegalite_to_svg(json.dumps(spec), vl_version=version)
        png = vl_convert.svg_to_png(svg, scale=request["scale"])
        pictures[name] = [base64.b64encode(png).decode(), svg]
    except Exception as problem:
        problems[name] = " ".join(str(problem).split())[:200]
bundle = vl_convert.javascript_bundle(vl_version=version) if request["bundle"] else ""
sys.stdout.buffer.write(json.dumps({"pictures": pictures, "problems": problems, "bundle": bundle}).encode())
"""


class DrawingFailed(Exception):
    """The figures could not be drawn on this machine; says why."""


@dataclass(frozen=True)
class Panel:
    """One plot. `height`: pixels."""

    chart: Any  # of Altair: a chart, or layers
    height: int = 300
    title: str = ""
    meta: Mapping[str, Any] = field(default_factory=dict)  # what the page's script needs to know: lines, axes
    brief: Mapping[str, str] = field(default_factory=dict)  # words, and what stands for them on a narrow page

    @cached_property
    def spec(self) -> dict[str, Any]:
        """In Vega-Lite, without the look, which is the document's."""
        spec = {
            key: value for key, value in self.chart.to_dict(validate=False).items() if key not in ("config", "$schema")
        }
        if self.title:
            spec["title"] = {"text": self.title, "fontSize": 13, "fontWeight": "normal", "offset": 8}
        return {**spec, "height": self.height}

    @property
    def room(self) -> int:
        """Pixels that the page reserves: also for what lies around the plot."""
        return self.height + AROUND + ABOVE * (bool(self.title) + ('"legend": {' in json.dumps(self.spec)))


@dataclass(frozen=True)
class Figure:
    id: str  # also the name of its files
    title: str
    panels: tuple[Panel, ...]
    caption: str  # how to read it
    alternative: str  # its content in words, made from the numbers
    columns: int = 1  # panels beside each other, where there is room
    parameters: Mapping[str, Any] = field(default_factory=dict)  # what the page can change: name and first value

    @property
    def tables(self) -> list[str]:
        """Of the document's data, those that the panels name."""
        specs = [{key: value for key, value in panel.spec.items() if key != "datasets"} for panel in self.panels]
        return [name for name in TABLES if f'"data": {{"name": "{name}"}}' in json.dumps(specs)]

    def for_page(self) -> list[dict[str, Any]]:
        """The panels' specifications, as large as their place; the page's script gives them the tables."""
        place = {"width": "container", "autosize": {"type": "fit", "contains": "padding"}}
        return [
            {**panel.spec, **place, "height": panel.room, "params": self._parameters(), "usermeta": panel.meta}
            | ({"brief": panel.brief} if panel.brief else {})
            for panel in self.panels
        ]

    def for_print(self, tables: Mapping[str, Sequence[Mapping[str, Any]]]) -> dict[str, Any]:
        """One specification with all that it needs."""
        width = (PRINT_WIDTH - 90 * (self.columns - 1)) / self.columns
        panels = [{**panel.spec, "width": round(width)} for panel in self.panels]
        datasets = {name: list(tables[name]) for name in self.tables}
        for panel in panels:
            datasets.update(panel.pop("datasets", {}))
        coloured = f" Coloured by {self.parameters[COLOUR]}." if COLOUR in self.parameters else ""
        subtitle = textwrap.wrap(f"{self.caption}{coloured}", CAPTION_WIDTH)
        return {
            "concat": panels,
            "columns": self.columns,
            "spacing": 28,
            "datasets": datasets,
            "params": self._parameters(groups_of(datasets.get("experiments", ()), self.parameters.get(COLOUR, ""))),
            "title": {"text": self.title, "subtitle": subtitle, "fontSize": 17, "offset": 14},
            "config": look("light", "Roboto, Helvetica, Arial, sans-serif") | {"padding": 16},
        }

    def _parameters(self, groups: Sequence[Any] = ()) -> list[dict[str, Any]]:
        values = {
            **self.parameters,
            **({"groups": list(groups)} if COLOUR in self.parameters else {}),
            "ink": SCHEMES["light"][0],
        }
        return [{"name": name, "value": value} for name, value in values.items()]


def groups_of(experiments: Sequence[Mapping[str, Any]], column: str) -> list[Any]:
    """What colours tell apart: the same for whatever is shown, so that a colour keeps its meaning."""
    values = {"not known" if row.get(column) is None else row[column] for row in experiments}
    return sorted(values, key=lambda value: (isinstance(value, str), value))


def look(scheme: str, font: str) -> dict[str, Any]:
    """Vega-Lite's config. Marks name their style (zero, quiet, ink, front), so that each scheme can colour them."""
    ink, faint, grid, ground, colours = SCHEMES[scheme]
    axis = {
        "labelColor": ink,
        "titleColor": ink,
        "gridColor": grid,
        "domainColor": faint,
        "tickColor": faint,
        "labelFontSize": 12,
        "titleFontSize": 12.5,
        "titleFontWeight": "normal",
        "titlePadding": 8,
        "labelPadding": 5,
        "labelOverlap": True,
        "labelSeparation": 6,
    }
    return {
        "font": font,
        "background": ground,
        "padding": 4,
        "axis": axis,
        "axisY": {"domain": False, "ticks": False, "tickCount": 6, "labelLimit": 390, "minExtent": 30},
        "axisTop": {"labelAngle": 0, "domain": False, "ticks": False, "grid": True},
        "axisX": {"grid": False, "tickCount": 7},
        "view": {"stroke": None},
        "legend": {
            "labelColor": ink,
            "titleColor": ink,
            "orient": "top",
            "direction": "horizontal",
            "labelFontSize": 12,
            "titleFontSize": 12,
            "titleFontWeight": "normal",
            "titleOrient": "left",
            "labelLimit": 260,
            "symbolOpacity": 1,
            "columnPadding": 16,
        },
        "title": {"color": ink, "subtitleColor": faint, "anchor": "start", "frame": "group", "subtitleFontSize": 12.5},
        "range": {
            "category": list(colours),
            "ordinal": {"scheme": "purples", "extent": [0.45, 1] if scheme == "light" else [0.75, 0.1]},
            "ramp": {"scheme": "viridis", "extent": [0, 0.85] if scheme == "light" else [1, 0.38]},
        },
        "mark": {"color": faint},  # what no setting colours
        "text": {"color": ink, "fontSize": 11.5},
        "rule": {"color": faint},
        "tick": {"color": faint},
        "style": {
            "zero": {"color": faint, "strokeWidth": 1, "strokeDash": [4, 3]},
            "quiet-words": {"color": faint, "fontSize": 11.5},
            "halo": {"color": ink, "stroke": ground, "strokeWidth": 4, "strokeJoin": "round", "fontSize": 11.5},
            "front": {"color": ink, "strokeWidth": 1.4},
            "mean": {"color": ink, "stroke": ground, "strokeWidth": 1},
            "band": {"color": faint, "fillOpacity": 0.2},
        },
    }


@dataclass(frozen=True)
class Drawn:
    pictures: Mapping[str, tuple[bytes, str]]  # PNG and SVG of each figure by its id
    bundle: str  # the scripts that draw figures in a browser
    problems: Mapping[str, str]  # why a figure is missing, by its id


def draw(figures: Sequence[Figure], tables: Mapping[str, Sequence[Mapping[str, Any]]]) -> Drawn:
    """Raises DrawingFailed where no figure can be drawn.

    One process of its own draws them all: the engine inside reserves far more address space than it uses, and where a
    cluster limits that, its process dies. Where that happens each figure gets a process, so that one alone takes away itself
    alone. The scripts are the same for every page and stay in the cache.
    """
    version = vega_lite_version()
    cached = cache_folder() / f"vega-lite-{version}-{metadata.version('vl-convert-python')}.js"
    bundle = cached.read_text(encoding="utf-8") if safe_to_execute(cached) and cached.is_file() else ""
    request: dict[str, Any] = {"version": version, "scale": PRINT_SCALE, "bundle": not bundle}
    specs = {figure.id: figure.for_print(tables) for figure in figures}
    problems: dict[str, str] = {}
    try:
        answers = [_answer({**request, "figures": specs}, LONGEST_DRAWING)]
    except DrawingFailed:
        answers = [_answer({**request, "figures": {}}, LONGEST_OF_ONE)]  # raises where nothing can be drawn
        for name, spec in specs.items() if len(specs) > 1 else ():
            try:
                answers.append(_answer({**request, "bundle": False, "figures": {name: spec}}, LONGEST_OF_ONE))
            except DrawingFailed as its_own:
                problems[name] = str(its_own)
        if len(answers) == 1:
            raise
    if not bundle:
        bundle = answers[0]["bundle"]
        with contextlib.suppress(OSError, NanostudyError):
            cached.parent.mkdir(parents=True, exist_ok=True)
            write_atomically(cached, bundle)
    pictures: dict[str, tuple[bytes, str]] = {}
    for answer in answers:
        pictures |= {name: (base64.b64decode(png), svg) for name, (png, svg) in answer["pictures"].items()}
        problems |= answer["problems"]
    return Drawn(pictures, bundle, problems)


def scripts() -> str:
    """Those that draw figures in a browser. Raises DrawingFailed."""
    return draw([], {}).bundle


def _answer(request: Mapping[str, Any], longest: float) -> Any:
    command = [sys.executable, "-P", "-c", DRAW]
    try:
        done = subprocess.run(
            command, input=json.dumps(request).encode(), capture_output=True, check=False, timeout=longest
        )
    except subprocess.TimeoutExpired:
        raise DrawingFailed(f"the drawing process took longer than {longest:g} s") from None
    if done.returncode:
        lines = done.stderr.decode(errors="replace").strip().splitlines()
        raise DrawingFailed(lines[-1] if lines else f"the drawing process ended with {done.returncode}")
    return json.loads(done.stdout)


def vega_lite_version() -> str:
    """As vl-convert wants it: 6.4."""
    import altair

    return ".".join(altair.SCHEMA_VERSION.removeprefix("v").split(".")[:2])


def records(frame: pd.DataFrame) -> list[dict[str, Any]]:
    """Rows as plain values: no NaN, no infinity, no NumPy. Nothing is rounded: only what is shown is, once."""
    plain = frame.copy()
    for name in plain.select_dtypes("float"):
        plain[name] = plain[name].where(np.isfinite(plain[name]))
    values = plain.astype(object).where(plain.notna(), None)
    return [{str(key): value for key, value in row.items()} for row in values.to_dict("records")]


def plain_value(value: Any) -> Any:
    """A setting's value as the page's data have it: a number, or text."""
    return value_text(value) if isinstance(value, (bool, np.bool_)) else value


def each(table: pd.DataFrame) -> Iterator[Any]:
    """Its rows, with columns as attributes, and an index called `name` as one, too."""
    return (table.reset_index() if table.index.name == "name" else table).itertuples()
