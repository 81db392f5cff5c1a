"""What the report says, for the ui: effects so far while a study runs, its sections after it, and the page to hand on."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from nanostudy.analysis.analysis import Analysis
from nanostudy.analysis.results import read_results
from nanostudy.reporting.charts.factors import effects_figure
from nanostudy.reporting.charts.figure import scripts
from nanostudy.reporting.charts.losses import curves_figure
from nanostudy.reporting.charts.marks import MOST_COLOURS
from nanostudy.reporting.data import Data
from nanostudy.reporting.document import Block, Document, Experiments, Samples, Section
from nanostudy.reporting.html import looks, notes_html, page, page_data, sections_html
from nanostudy.reporting.sections import document

SAMPLES = ("samples", "Samples")
# columns while it runs
NOW = {"status": "status", "step": "update", "loss": "loss now", "val_loss": "val", "train_loss": "train"}


def effects_so_far(path: Path) -> dict[str, Any] | None:
    """The figure of effects, from what has finished; None where nothing can be compared yet."""
    analysis = Analysis(read_results([path]))
    figure = effects_figure(analysis.effects)
    if figure is None:
        return None
    return {
        "panels": figure.for_page(),
        "looks": looks(),
        "caption": figure.caption,
        "alternative": figure.alternative,
        "finished": len(analysis.results.finished),
        "total": len(analysis.results.experiments),
    }


def live(state: Mapping[str, Any]) -> dict[str, Any]:
    """As `report`, of a study that runs: the table and the curves, which the page goes on with by itself."""
    rows, settings = state["rows"], tuple(state["settings"])
    curves, batches = points_of(state["curves"])
    colourings = [name for name in settings if len({row[name] for row in rows}) <= MOST_COLOURS]
    colour = [*colourings, "status"]
    columns = [("name", "experiment"), *NOW.items(), *((name, name) for name in settings)]
    example = "status == running"
    figure = curves_figure(
        [], curves, batches, colour[0]
    )  # the report's, without the text's entropy, which is not known here
    blocks: list[Block] = [Experiments(columns, [*state["factors"], "status"], example), *([figure] if figure else [])]
    data = Data(rows, curves, batches, [], tuple(colour), settings)
    made = Document(state["title"], "", {}, [], [Section("now", "Experiments", blocks)], data)
    return {"lede": "", "sections": sections_html(made), "data": page_data(made), "live": True}


def points_of(curves: Mapping[int, Mapping[str, Sequence[Any]]]) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """The page's tables of evaluations and of batches; ui.js makes them, too, of what changes."""
    evaluations = [
        {"i": i, "step": step, "train_loss": train, "val_loss": val, "gap": val - train}
        for i, curve in curves.items()
        for step, train, val in curve["evaluations"]
    ]
    batches = [{"i": i, "step": step, "loss": loss} for i, curve in curves.items() for step, loss in curve["batches"]]
    return evaluations, batches


def report(path: Path) -> dict[str, Any]:
    """The sections as HTML, and the data that the page's modules draw."""
    made = document(Analysis(read_results([path])))
    sections = notes_html(made.notes) + sections_html(made)
    return {"lede": made.lede, "sections": sections, "data": page_data(made), "live": False}


def static_page(path: Path, texts: Sequence[Mapping[str, str]]) -> str:
    """Today's page, whole, with these samples first: {name, prompt, text} of each."""
    made = document(Analysis(read_results([path])))
    return page(with_samples(made, texts), scripts())


def with_samples(made: Document, texts: Sequence[Mapping[str, str]]) -> Document:
    place = {row["name"]: row["i"] for row in made.data.experiments}
    new = [
        {"i": place[one["name"]], "prompt": one["prompt"], "text": one["text"]} for one in texts if one["name"] in place
    ]
    if not new:
        return made
    samples = Section(*SAMPLES, [Samples(list(dict.fromkeys(row["i"] for row in new)))])
    sections = {section.id: section for section in made.sections} | {samples.id: samples}
    return replace(made, sections=list(sections.values()), data=replace(made.data, samples=[*new, *made.data.samples]))
