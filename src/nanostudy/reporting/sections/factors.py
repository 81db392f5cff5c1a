"""What settings do: the ranking, effects, interactions, and every experiment through its settings."""

from __future__ import annotations

import itertools

import pandas as pd

from nanostudy.analysis.effects import Effects
from nanostudy.analysis.frames import known
from nanostudy.reporting.charts import experiments as charts
from nanostudy.reporting.charts import factors
from nanostudy.reporting.charts.figure import each
from nanostudy.reporting.document import Blocks, Bullets, Grid, Prose
from nanostudy.reporting.findings import Findings
from nanostudy.reporting.phrases import ends, signed
from nanostudy.text import value_text

MOST_ROWS = 200  # of the table of effects
MOST_RANKED = 10  # of the ranking by the gap


def ranking(f: Findings) -> Blocks:
    figure = charts.ranking_figure(f.results, f.analysis.ranking)
    if figure is None:
        return []
    basis = f.analysis.ranking.attrs.get("basis")
    cells, replicated = charts.ranked_cells(f.results, f.analysis.generalisation)
    rows = [
        {
            "place": place,
            "settings" if replicated else "experiment": row.label,
            "seeds": int(row.n),
            "mean gap" if replicated else "gap": signed(row.mean, 4),
            "95% interval": ends(row.low, row.high, signed),
            "indistinguishable from the first": value_text(row.tied),
        }
        for place, row in enumerate(each(cells.head(MOST_RANKED)), start=1)
    ]
    by_gap = Grid("Ranking by generalisation: the smallest loss gap", rows, folded=True)
    return [figure, Prose(str(basis)) if basis else None, by_gap if len(cells) > 1 else None]


def effects(f: Findings) -> Blocks:
    on_loss = f.analysis.effects
    if on_loss.table.empty:
        return []
    return [
        factors.effects_figure(on_loss),
        Prose(on_loss.explanation),
        Bullets(on_loss.missing),
        factors.half_normal_figure(on_loss) if on_loss.table["low"].isna().all() else None,
        factors.variance_figure(on_loss),
        factors.effects_figure(f.analysis.gap_effects, "gap"),
        _effects_table(on_loss.table),
    ]


def _effects_table(table: pd.DataFrame) -> Grid:
    rows = [
        {
            "change": row.what,
            "effect, nats per token": signed(row.effect, 4),
            "95% interval": ends(row.low, row.high, signed),
            "standard error": f"{row.se:.4f}" if known(row.se) else "",
            "p": ("< 0.0001" if row.p < 0.0001 else f"{row.p:.4f}") if known(row.p) else "",
            "clear among all": value_text(bool(row.together)),
            "share of variance": f"{row.share:.1%}" if known(row.share) else "",
        }
        for row in each(factors.worded(table).head(MOST_ROWS))
    ]
    return Grid("All effects on the validation loss", rows, folded=True)


def interactions(f: Findings) -> Blocks:
    table = f.analysis.effects.table
    if table.empty or len(f.results.factors) < 2:
        return []
    pairs = [(a, b, f.analysis.cell_means(a, b)) for a, b in _important_pairs(f.analysis.effects)]
    return [factors.interactions_figure(pairs)]


def _important_pairs(effects: Effects) -> list[tuple[str, str]]:
    """By the size of the interaction; where none is estimated, of the settings with the largest effects."""
    table = effects.table
    seconds = table[(table["order"] == 2) & table["effect"].notna()]
    if len(seconds):
        pairs = seconds.sort_values("effect", key=abs, ascending=False, kind="stable").drop_duplicates("term")
        return [(str(row.factor_a), str(row.factor_b)) for row in each(pairs.head(factors.MOST_INTERACTIONS))]
    return list(itertools.combinations(map(str, effects.importance["factor"][:3]), 2))


def parallel(f: Findings) -> Blocks:
    return [charts.parallel_figure(f.results)]
