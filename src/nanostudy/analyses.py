"""The Python interface to what results mean: what `nanostudy report ...` works from, as a short call."""

from __future__ import annotations

from pathlib import Path

from nanostudy.insight.analysis import Analysis
from nanostudy.insight.results import read_results


def analyze(*paths: str | Path) -> Analysis:
    """Studies' folders (or names), runs' folders and tables (.csv), together. Raises UsageError, NanostudyError."""
    return Analysis(read_results(paths))
