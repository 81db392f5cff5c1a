"""The page and the files beside it, written into a folder: index.html, report.md, results.csv, PNG and SVG of each figure."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from altair.utils.schemapi import debug_mode

from nanostudy.analysis.analysis import Analysis
from nanostudy.analysis.frames import Results
from nanostudy.atomic import write_atomically
from nanostudy.errors import NanostudyError
from nanostudy.reporting.answer import Sentence, answer, strongest_by_factor
from nanostudy.reporting.charts.charts import colourings
from nanostudy.reporting.charts.figure import draw
from nanostudy.reporting.html import Page, render
from nanostudy.reporting.markdown import markdown
from nanostudy.reporting.page_data import page_data
from nanostudy.reporting.sections.background import lede, totals
from nanostudy.reporting.sections.sections import sections
from nanostudy.reporting.training_curve import DrawingFailed

PAGE, MARKDOWN, TABLE = "index.html", "report.md", "results.csv"
OURS = '<meta name="generator" content="nanostudy'  # in a page that may be written over


@dataclass(frozen=True)
class Published:
    folder: Path
    page: Path
    answer: Sequence[Sentence]
    notes: Sequence[str]
    beside: Sequence[Path]  # what else was written, figures left out
    figures: int
    undrawn: str  # why figures could not be drawn; empty where they were


def publish(analysis: Analysis, folder: Path) -> Published:
    """Writes everything. Raises NanostudyError where the folder cannot be written, or holds something else."""
    _prepare(folder)
    page = page_of(analysis)
    try:
        pictures, bundle = draw(page.figures, page.data.tables)
        undrawn = ""
    except DrawingFailed as problem:
        pictures, bundle, undrawn = {}, "", str(problem)
    files: dict[str, bytes | str] = {
        TABLE: results_csv(analysis.results),
        MARKDOWN: markdown(page, pictures),
        **{f"{name}.png": png for name, (png, _) in pictures.items()},
        **{f"{name}.svg": svg for name, (_, svg) in pictures.items()},
        PAGE: render(page, bundle, undrawn),
    }
    for name, content in files.items():
        write_atomically(folder / name, content)
    beside = [folder / MARKDOWN, folder / TABLE]
    return Published(folder, folder / PAGE, page.answer, page.notes, beside, len(pictures), undrawn)


def page_of(analysis: Analysis) -> Page:
    results = analysis.results
    table = analysis.effects.table
    strongest = [] if table.empty else [str(name) for name in strongest_by_factor(table)["factor_a"]]
    data = page_data(results, colourings(results, strongest))
    with debug_mode(False):  # a check of every row of data against a schema takes long; the tests make it
        said = sections(analysis, data)
    return Page(
        results.title,
        lede(results),
        totals(results),
        results.notes,
        answer(analysis),
        said,
        data,
    )


def results_csv(results: Results) -> str:
    """Every column that has a value, a row an experiment."""
    table = results.experiments.dropna(axis="columns", how="all").drop(columns=["folder"], errors="ignore")
    text: str = table.reset_index(names="name").to_csv(index=False, lineterminator="\n")
    return text


def _prepare(folder: Path) -> None:
    """Makes the folder; refuses one that holds other files than an earlier report's."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        page = folder / PAGE
        if page.exists():
            with open(page, encoding="utf-8", errors="replace") as file:
                ours = OURS in file.read(4096)
        else:
            ours = not any(folder.iterdir())
        if not ours:
            raise NanostudyError(
                f"{folder} holds other files, and no page of nanostudy's. Name another folder with --out; nothing was changed."
            )
        probe = folder / ".writable"
        probe.touch()
        probe.unlink()
    except OSError as problem:
        raise NanostudyError(
            f"{folder} cannot be written: {problem.strerror or problem}. Name a folder for the report with --out."
        ) from None
