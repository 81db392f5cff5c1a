"""The Python interface to what results mean: what `nanostudy report ...` works from, as a short call."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from nanostudy.analysis.results import read_results
from nanostudy.reporting.notebook import NotebookAnalysis
from nanostudy.study.definition import folder_of, has_study
from nanostudy.training.run_folder import read_metadata

if TYPE_CHECKING:
    from nanostudy.reporting.write import Published


def analyze(*paths: str | Path) -> NotebookAnalysis:
    """Studies' folders (or names), runs' folders and tables (.csv), together. Raises UsageError, NanostudyError."""
    return NotebookAnalysis(read_results(paths))


def report(*paths: str | Path, out: str | Path | None = None) -> Path:
    """Writes the report of these results (page, Markdown, table, figures) and returns the page's path.

    In the folder `out`; by default `report` in the study or run that alone is named, and `report` here for several. A
    run's report.md and curve.png lie in the run's folder itself. Raises UsageError, NanostudyError.
    """
    return published(*paths, out=out).page


def published(*paths: str | Path, out: str | Path | None = None) -> Published:
    """What `report` writes, and what it says."""
    from nanostudy.reporting.write import publish

    alone = _folder(Path(paths[0])) if len(paths) == 1 else None
    folder = Path(out) if out is not None else (alone or Path()) / "report"
    is_run = alone is not None and out is None and not has_study(alone)
    return publish(analyze(*paths), folder, alone if is_run else None)


def _folder(path: Path) -> Path | None:
    """Of the study or the run that this names."""
    there = path if path.exists() else folder_of(str(path))
    return there if has_study(there) or (there.is_dir() and read_metadata(there)) else None
