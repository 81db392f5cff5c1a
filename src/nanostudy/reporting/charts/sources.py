"""The figure of the same effects as several sources measured them."""

from __future__ import annotations

from typing import Any

import altair as alt
import pandas as pd

from nanostudy.analysis.sources import Sources
from nanostudy.measures import MEASURES
from nanostudy.reporting.charts import marks
from nanostudy.reporting.charts.figure import Figure, Panel, each, records
from nanostudy.reporting.phrases import change, interval

MOST_CHANGES = 16  # the table has the rest
SHAPES = ["circle", "square", "diamond", "triangle-up", "cross", "triangle-down"]


def change_of(row: Any) -> str:
    return change(row.factor, row.reference, row.level)


def sources_figure(sources: Sources) -> Figure:
    """A point with its interval per source, side by side for each change of a setting."""
    table = sources.effects
    table = table.assign(what=[change_of(row) for row in each(table)])
    largest = (
        table.groupby("what")["effect"]
        .agg(lambda effect: effect.abs().max())
        .sort_values(ascending=False, kind="stable")
    )
    shown = list(largest.index[:MOST_CHANGES])
    rows: pd.DataFrame = table[table["what"].isin(shown)].assign(
        text=[interval(r.effect, r.low, r.high) for r in each(table)]
    )
    measure, names = MEASURES["val_loss"], sources.names
    legend = alt.Legend(title="source")
    base = marks.inline(records(rows[["what", "source", "effect", "low", "high", "text"]])).encode(
        y=alt.Y("what:N", sort=shown, title=None, axis=alt.Axis(grid=True)),
        yOffset=alt.YOffset("source:N", sort=names),
        color=alt.Color("source:N", scale=alt.Scale(domain=names), legend=legend),
        tooltip=[
            alt.Tooltip("source:N", title="source"),
            alt.Tooltip("what:N", title="change"),
            alt.Tooltip("text:N", title=measure.axis),
        ],
    )
    shapes = alt.Scale(domain=names, range=(SHAPES * len(names))[: len(names)])
    shape = alt.Shape("source:N", scale=shapes, legend=legend)
    chart = marks.effects_with_intervals(base, rows, f"change of {measure.axis}", 70, shape)
    left = f" The {len(largest) - len(shown)} smallest are in the table only." if len(largest) > len(shown) else ""
    return Figure(
        "sources",
        "The same effect in each source",
        (Panel(chart, (10 + 14 * len(names)) * len(shown)),),
        f"What the same change of a setting does to the {measure.title} in each source, by its own experiments alone. Bars are 95% "
        f"intervals.{left}",
        f"Dots with intervals: {len(shown)} changes of a setting in {len(names)} sources.",
    )
