"""A report's files: the page, its Markdown, a table of results, PNG and SVG of each figure."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from nanostudy.analysis.analysis import Analysis
from nanostudy.analysis.frames import Results
from nanostudy.analysis.results import read_run_folder
from nanostudy.atomic import write_atomically
from nanostudy.errors import NanostudyError
from nanostudy.reporting.charts.figure import DrawingFailed, draw
from nanostudy.reporting.document import Sentence
from nanostudy.reporting.html import page
from nanostudy.reporting.markdown import markdown
from nanostudy.reporting.sections import document

PAGE, MARKDOWN, TABLE = "index.html", "report.md", "results.csv"
OURS = '<meta name="generator" content="nanostudy'  # in a page that may be written over


@dataclass(frozen=True)
class Published:
    page: Path
    folder: Path  # of the figures
    summary: str
    answer: Sequence[Sentence]  # empty where nothing is compared
    notes: Sequence[str]
    beside: Sequence[Path]  # what else was written, figures left out
    figures: int
    undrawn: str  # why figures could not be drawn; empty where they were


def publish(analysis: Analysis, folder: Path, markdown_folder: Path | None = None) -> Published:
    """Writes everything into `folder`, but the Markdown and its figures into `markdown_folder` where that is another.

    Raises NanostudyError where the folder cannot be written, or holds something else.
    """
    _prepare(folder)
    beside = markdown_folder or folder
    report = document(analysis)
    pictures: dict[str, tuple[bytes, str]] = {}
    bundle = undrawn = ""
    try:
        drawn = draw(report.figures, report.data.tables)
        pictures, bundle = dict(drawn.pictures), drawn.bundle
        undrawn = "; ".join(f"{name} ({why})" for name, why in drawn.problems.items())
    except DrawingFailed as problem:
        undrawn = str(problem)
    files: dict[Path, bytes | str] = {
        folder / PAGE: page(report, bundle, undrawn),  # first: it marks the folder as a report's
        folder / TABLE: results_csv(analysis.results),
        **{beside / f"{name}.png": png for name, (png, _) in pictures.items()},
        **{beside / f"{name}.svg": svg for name, (_, svg) in pictures.items()},
        beside / MARKDOWN: markdown(report, pictures),
    }
    for path, content in files.items():
        write_atomically(path, content)
    return Published(
        page=folder / PAGE,
        folder=beside,
        summary=report.lede,
        answer=report.answer,
        notes=report.notes,
        beside=[beside / MARKDOWN, folder / TABLE],
        figures=len(pictures),
        undrawn=undrawn,
    )


def publish_run(folder: Path) -> Published:
    """A run's report: report.md and its figure in the run's folder, the page and the table in report/ there. Raises NanostudyError."""
    return publish(Analysis(read_run_folder(folder)), folder / "report", folder)


def results_csv(results: Results) -> str:
    """One row per experiment, every column that has a value."""
    table = results.experiments.dropna(axis="columns", how="all").drop(columns=["folder"], errors="ignore")
    text: str = table.reset_index(names="name").to_csv(index=False, lineterminator="\n")
    return text


def _prepare(folder: Path) -> None:
    """Makes the folder; refuses one that holds other files than an earlier report's."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        existing = folder / PAGE
        if existing.exists():
            with open(existing, encoding="utf-8", errors="replace") as file:
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
