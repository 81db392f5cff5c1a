"""A report's files: the page, its Markdown, a table of results, PNG and SVG of each figure."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from nanostudy.analysis.analysis import Analysis
from nanostudy.analysis.frames import Results
from nanostudy.analysis.results import read_run_folder
from nanostudy.atomic import whole_folder, write_atomically
from nanostudy.errors import NanostudyError
from nanostudy.reporting.charts.figure import DrawingFailed, draw
from nanostudy.reporting.document import Document
from nanostudy.reporting.html import page
from nanostudy.reporting.markdown import markdown
from nanostudy.reporting.sections import document
from nanostudy.settings import FIELDS
from nanostudy.text import csv_cell

PAGE, MARKDOWN, TABLE = "index.html", "report.md", "results.csv"
OURS = '<meta name="generator" content="nanostudy'  # in a page that may be written over


@dataclass(frozen=True)
class Published:
    page: Path
    folder: Path  # of the figures
    document: Document
    beside: Sequence[Path]  # what else was written, figures left out
    figures: int
    undrawn: str  # why figures could not be drawn; empty where they were


def publish(analysis: Analysis, folder: Path, markdown_folder: Path | None = None) -> Published:
    """Writes everything into `folder`, but the Markdown and its figures into `markdown_folder` where that is another.

    Raises NanostudyError where the folder cannot be written, or holds something else.
    """
    beside = markdown_folder or folder
    try:
        with whole_folder(folder, overwrite=True, replace=_is_ours(folder)) as place:
            report = document(analysis)
            pictures, bundle, undrawn = _drawn(report)
            write_atomically(place / PAGE, page(report, bundle, undrawn))
            write_atomically(place / TABLE, results_csv(analysis.results))
            others = markdown_folder or place
            for name, (png, svg) in pictures.items():
                write_atomically(others / f"{name}.png", png)
                write_atomically(others / f"{name}.svg", svg)
            write_atomically(others / MARKDOWN, markdown(report, pictures))
    except NanostudyError as problem:
        if not isinstance(problem.__cause__, OSError):
            raise
        raise NanostudyError(f"{problem} Name another folder for the report with --out.") from problem.__cause__
    return Published(
        page=folder / PAGE,
        folder=beside,
        document=report,
        beside=[beside / MARKDOWN, folder / TABLE],
        figures=len(pictures),
        undrawn=undrawn,
    )


def _drawn(report: Document) -> tuple[dict[str, tuple[bytes, str]], str, str]:
    """(its pictures, what the page needs to draw them, why some are missing)"""
    try:
        drawn = draw(report.figures, report.data.tables)
    except DrawingFailed as problem:
        return {}, "", str(problem)
    return dict(drawn.pictures), drawn.bundle, "; ".join(f"{name} ({why})" for name, why in drawn.problems.items())


def publish_run(folder: Path) -> Published:
    """A run's report: report.md and its figure in the run's folder, the page and the table in report/ there. Raises NanostudyError."""
    return publish(Analysis(read_run_folder(folder)), folder / "report", folder)


def results_csv(results: Results) -> str:
    """One row per experiment, every column that has a value. What is no setting here is one of another program's configuration."""
    table = results.experiments.dropna(axis="columns", how="all").drop(columns=["folder"], errors="ignore")
    table = table.rename(columns={name: f"config/{name}" for name in results.factors if name not in FIELDS})
    text: str = table.reset_index(names="name").map(csv_cell).to_csv(index=False, lineterminator="\n")
    return text


def _is_ours(folder: Path) -> bool:
    """Whether it may be replaced: it is not there, empty, or holds an earlier report alone. Raises NanostudyError at other files
    without a report.
    """
    try:
        names = [name for name in os.listdir(folder) if not name.startswith(".")] if folder.is_dir() else []
        if names and (
            PAGE not in names or OURS not in (folder / PAGE).read_text(encoding="utf-8", errors="replace")[:4096]
        ):
            raise NanostudyError(
                f"{folder} holds other files, and no page of nanostudy's. Name another folder with --out; nothing was changed."
            )
    except OSError as problem:
        raise NanostudyError(
            f"{folder} cannot be written: {problem.strerror or problem}. Name a folder for the report with --out."
        ) from None
    return all(name in (PAGE, MARKDOWN, TABLE) or name.endswith((".png", ".svg")) for name in names)
