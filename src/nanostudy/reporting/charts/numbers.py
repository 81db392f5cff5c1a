"""Figures of settings that are numbers: their curves with bands, the experiments around them, and where they are lowest."""

from __future__ import annotations

import math
from typing import Any

import altair as alt
import numpy as np
import pandas as pd

from nanostudy.analysis.forest import Forest
from nanostudy.analysis.frames import Results
from nanostudy.analysis.shapes import Shapes
from nanostudy.measures import NATS
from nanostudy.reporting.charts import marks
from nanostudy.reporting.charts.figure import GREY, Figure, Panel, each, records
from nanostudy.reporting.phrases import rounded

MOST_CURVES = 6  # panels
DIGITS = ".3~g"


def curves_figure(results: Results, shapes: Shapes, forest: Forest) -> Figure | None:
    """A panel for each number, the one that changes the loss most first."""
    if shapes.curves.empty:
        return None
    rank = {name: place for place, name in enumerate(shapes.changes["factor"])}
    optima = sorted(each(shapes.optima), key=lambda row: rank[row.factor])[:MOST_CURVES]
    names = [row.factor for row in optima]
    there = shapes.curves[shapes.curves["factor"].isin(names)]
    points = shapes.points[shapes.points["factor"].isin(names)]
    points = points.assign(i=points["name"].map(marks.places(results)))
    ends = np.concatenate([there[["low", "high"]].to_numpy(float).ravel(), points["loss"].to_numpy(float)])
    domain = marks.domain(ends)
    dashed = " Dashed: a random forest's mean prediction." if len(forest.dependence) else ""
    inside = [row for row in optima if row.where == "inside"]
    ruled = " Where a curve has a lowest point inside the range, a bar below marks its 95% interval." if inside else ""
    found = [
        f"{row.factor} is lowest near {rounded(row.best)} ({rounded(row.low)} to {rounded(row.high)})" for row in inside
    ]
    return Figure(
        "curves-of-numbers",
        "How the loss runs along each setting",
        tuple(_panel(row, shapes, points, forest, domain) for row in optima),
        f"Mean validation loss along a setting, the others at their average, with the 95% band of its distance from the mean of all. Dots are the experiments, the "
        f"others' effects taken out.{dashed}{ruled}",
        f"A curve with its band in each of {len(names)} plots: {', '.join(names)}. {'; '.join(found) or 'None has a lowest point that is sure'}.",
        columns=min(3, len(names)),
        parameters={"chosen": []},
    )


def _ticks(low: float, high: float) -> list[float]:
    """1, 2 and 5 times the powers of ten in the range; over more than two decades, the powers alone."""
    powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    factors = (1,) if high / low > 200 else (1, 2, 5)
    return [float(f"{factor}e{power}") for power in powers for factor in factors if low <= factor * 10.0**power <= high]


def _panel(row: Any, shapes: Shapes, points: pd.DataFrame, forest: Forest, domain: list[float]) -> Panel:
    scale = alt.Scale(nice=False, padding=8, **({"type": "log"} if row.log else {"zero": False}))
    axis = alt.Axis(format="~g", values=_ticks(row.lowest, row.highest) if row.log else alt.Undefined, tickCount=5)
    x = alt.X("value:Q", title=row.factor, scale=scale, axis=axis)
    y = marks.y_of("val_loss", "loss", scale=alt.Scale(zero=False, domain=domain, nice=False))
    tips = [alt.Tooltip("value:Q", title=row.factor, format=DIGITS), alt.Tooltip("loss:Q", title=NATS, format=".4f")]

    def of(table: Any) -> alt.Chart:
        own = table[table["factor"] == row.factor].drop(columns="factor")
        return marks.inline(records(own)).encode(x=x, y=y)

    curve = of(shapes.curves)
    layers: list[Any] = [
        curve.mark_area(style="band").encode(y=alt.Y("low:Q"), y2="high:Q"),
        of(points).mark_point(filled=True, size=30, color=GREY).encode(tooltip=tips, opacity=marks.fading(0.55, 0.1)),
        curve.mark_line(style="front", strokeWidth=2.2).encode(tooltip=tips),
    ]
    if len(forest.dependence):
        layers.append(of(forest.dependence).mark_line(style="zero", strokeWidth=1.2))
    if row.where == "inside":
        at = [{"value": row.low, "end": row.high, "best": row.best, "loss": domain[0]}]
        base = marks.inline(at).encode(y=y)
        layers += [
            base.mark_rule(style="front", strokeWidth=4).encode(x=x, x2="end:Q"),
            base.mark_point(style="front", filled=True, size=60, opacity=1).encode(x=alt.X("best:Q", scale=scale)),
        ]
    return Panel(alt.layer(*layers), 230, title=row.factor)
