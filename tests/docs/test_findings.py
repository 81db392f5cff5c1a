"""The findings are held to the tables beside them: each effect and difference, and every number of the page about them."""

import math
import re
from functools import cache
from pathlib import Path

import pandas as pd
import pytest
from markdown import FINDINGS, prose
from module_tree import SOURCE

from nanostudy.analysis.analysis import Analysis
from nanostudy.analysis.results import read_results
from nanostudy.reporting.charts.factors import change_of
from nanostudy.reporting.charts.figure import each

STUDIES = sorted(page.parent.name for page in FINDINGS.glob("*/index.html"))
ROUNDING = 1.5e-4  # of a difference of two means
NUMBER = re.compile(r"[+−]?\d+\.\d+")


def rows(page: Path, first: str) -> list[list[str]]:
    """The cells of the table whose first heading this is."""
    lines = page.read_text(encoding="utf-8").splitlines()
    start = next(i for i, line in enumerate(lines) if line.startswith(f"| {first} |"))
    end = next((i for i in range(start, len(lines)) if not lines[i].startswith("|")), len(lines))
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in (lines[start], *lines[start + 2 : end])]


def numbers(text: str) -> list[float]:
    return [float(found.replace("−", "-")) for found in NUMBER.findall(text)]


@cache
def grid() -> Analysis:
    return Analysis(read_results([FINDINGS / "shakespeare-grid", FINDINGS / "sources"]))


def test_the_whole_grid_is_there():
    experiments = read_results([FINDINGS / "shakespeare-grid"]).finished
    assert len(experiments) == 128
    assert len(experiments[["n_layer", "block_size"]].drop_duplicates()) == 4


def test_the_effects_of_every_source_follow_from_the_tables():
    """To the rounding of the tables, which have four decimals. The study's own intervals contain the error of a finite text, too,
    which follows from the losses of single windows and not from the tables.
    """
    heading, *lines = rows(FINDINGS / "shakespeare-grid" / "README.md", "change")
    found = {(change_of(row), row.source): row for row in each(grid().sources.effects)}
    compared = 0
    for what, *cells in lines:
        for source, cell in zip(heading[1:], cells, strict=True):
            if cell:
                row = found[what, source]
                effect, *ends = numbers(cell)
                assert effect == pytest.approx(row.effect, abs=ROUNDING), (what, source)
                if source == "train-logs":  # all of one seed
                    assert (ends, math.isnan(row.low)) == ([], True)
                elif source == "shakespeare-grid":
                    low, high = ends
                    assert low - ROUNDING < row.low < row.high < high + ROUNDING, what
                else:
                    assert ends == pytest.approx([row.low, row.high], abs=ROUNDING), (what, source)
                compared += 1
    assert compared == len(found) > 20


def test_the_effects_of_the_grid_are_differences_of_plain_means():
    table = pd.concat([pd.read_csv(path) for path in (FINDINGS / "shakespeare-grid").glob("*_*.csv")])
    pieces = table["Experiment"].str.extract(r"b(\d+)_L(\d)_H(\d)_E(\d+)_BS(\d+)_MI(\d+)_D(\d+)").astype(int).to_numpy()
    losses = table["Val Loss"].to_numpy()
    settings = ("block_size", "n_layer", "n_head", "n_embd", "batch_size", "max_iters", "dropout")
    shown = {
        what.split()[0]: numbers(ours)[0]
        for what, ours, *_ in rows(FINDINGS / "shakespeare-grid" / "README.md", "change")[1:]
    }
    for name, values in zip(settings, pieces.T, strict=True):
        difference = losses[values == values.max()].mean() - losses[values == values.min()].mean()
        assert shown[name] == pytest.approx(difference, abs=ROUNDING), name


def test_the_page_says_nothing_that_the_findings_do_not():
    """Nor the published claims: every number with a fraction, whatever its sign."""
    written = "".join(
        path.read_text(encoding="utf-8") for name in STUDIES for path in (FINDINGS / name).glob("*.[mc][ds]*")
    )
    published = (SOURCE / "analysis" / "claims" / "claims.yaml").read_text(encoding="utf-8")
    there = {abs(number) for number in numbers(written + published)}
    said = [abs(number) for number in numbers(prose(FINDINGS / "README.md"))]
    assert len(said) > 20
    assert set(said) <= there
