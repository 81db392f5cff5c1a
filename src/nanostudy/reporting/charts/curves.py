"""Figures of losses over time and against cost: curves, loss gaps, Pareto fronts.

Each takes what is analysed and gives a figure, or the sentence that says why there is none.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import altair as alt
import numpy as np
import pandas as pd

from nanostudy.analysis.frames import Results
from nanostudy.reporting.charts.charts import (
    COLOUR,
    TIP,
    fading,
    group_colour,
    magnitudes,
    parameters,
    shared,
    zero_line,
)
from nanostudy.reporting.charts.figure import LOSS, Figure, Panel, records
from nanostudy.reporting.phrases import listed, nats, quantity, signed

NO_CURVES = "Curves need evaluations over time: these results have none (a table holds only how each experiment ended)."
ALONG = {"parameters": "parameters", "flops": "arithmetic, floating-point operations", "seconds": "time, seconds"}


# --- curves


def curves_figure(results: Results, curves: Sequence[Mapping[str, Any]], colour: str) -> Figure | str:
    """Validation and training loss against updates, a line an experiment; the entropy floor where it is known."""
    if not curves:
        return NO_CURVES
    floors = {facts.name: facts.entropy for facts in results.corpora.values() if facts.entropy is not None}
    low, high, top = _loss_ends(curves, [*floors.values()])
    settings = {**parameters(colour), "top": top}
    panels = tuple(
        Panel(_curve(column, title, (low, high), floors), 330, title=title)
        for column, title in (("val_loss", "validation"), ("train_loss", "training"))
    )
    caption = (
        "Loss against updates, a line an experiment: on the left over the whole validation split, on the right over as much "
        "of the training split."
    )
    if floors:
        caption += f" Dashed: the entropy of the validation text ({_floors(floors)}), below which no model can get."
    steps = max(row["step"] for row in curves)
    ends = [row["val_loss"] for row in _last_of(curves).values() if row["val_loss"] is not None]
    alternative = (
        f"Lines for {len({row['i'] for row in curves})} experiments over at most {steps:,.0f} updates. Validation losses end "
        f"between {nats(min(ends))} and {nats(max(ends))} nats per token."
    )
    return Figure(
        "curves",
        "Training and validation curves",
        panels,
        caption,
        alternative,
        columns=2,
        parameters=settings,
        tables=("experiments", "curves"),
    )


def _floors(floors: Mapping[str, float]) -> str:
    return listed([f"{name} {nats(value)} nats per token" for name, value in floors.items()])


def _last_of(curves: Sequence[Mapping[str, Any]]) -> dict[int, Mapping[str, Any]]:
    return {row["i"]: row for row in curves}


def tops(results: Results, curves: Sequence[Mapping[str, Any]]) -> tuple[float, float]:
    """Of the axis of loss: after the first fall, and of the whole."""
    floors = [facts.entropy for facts in results.corpora.values() if facts.entropy is not None]
    _, high, top = _loss_ends(curves, floors)
    return top, high


def _loss_ends(curves: Sequence[Mapping[str, Any]], floors: Sequence[float]) -> tuple[float, float, float]:
    """(under everything, over everything, over what is left after the first fall)."""
    values = [row[key] for row in curves for key in ("val_loss", "train_loss") if row[key] is not None]
    late = [row[key] for row in curves if row["step"] > 0 for key in ("val_loss", "train_loss") if row[key] is not None]
    low, high = min([*values, *floors]), float(np.quantile(values, 0.999))
    top = float(np.quantile(late or values, 0.985))
    room = 0.03 * (top - low or 1.0)
    return low - room, high + room, min(high, top) + room


def _curve_base() -> alt.Chart:
    joined = alt.LookupData(data=alt.NamedData(name="experiments"), key="i")
    return (
        alt.Chart(alt.NamedData(name="curves"))
        .transform_lookup(lookup="i", from_=joined, as_="e")
        .transform_calculate(
            group=f"isValid(datum.e[{COLOUR}]) ? datum.e[{COLOUR}] : 'not known'",
            name="datum.e.name",
            gap="datum.val_loss - datum.train_loss",
        )
    )


def _curve(column: str, title: str, ends: tuple[float, float], floors: Mapping[str, float]) -> Any:
    scale = alt.Scale(domainMin=ends[0], domainMax=alt.ExprRef("top"), zero=False, nice=False)
    y = alt.Y(f"{column}:Q", title=f"{title} loss, nats per token", scale=scale, axis=alt.Axis(grid=True))
    lines = (
        _curve_base()
        .transform_filter(f"datum.{column} <= top")  # drawing programs take long to clip
        .mark_line(strokeWidth=1.5)
        .encode(
            x=alt.X(
                "step:Q",
                title="updates",
                axis=alt.Axis(format=",d", tickCount=6),
                scale=alt.Scale(domainMin=0, nice=False),
            ),
            y=y,
            detail="i:N",
            color=group_colour("stroke"),
            strokeOpacity=fading(0.75, 0.08),
            tooltip=[
                *TIP,
                alt.Tooltip("step:Q", title="update", format=",d"),
                alt.Tooltip(f"{column}:Q", format=".4f"),
            ],
        )
    )
    values = [{"floor": value, "told": f"entropy of {name}"} for name, value in floors.items()]
    if not values:
        return alt.layer(lines)
    floor = alt.Chart(alt.InlineData(values=values)).encode(y="floor:Q")
    words = floor.mark_text(style="quiet-words", align="left", baseline="bottom", dy=-4).encode(
        x=alt.value(6), text="told:N"
    )
    return alt.layer(lines, floor.mark_rule(style="zero"), words)


# --- the gap


def gap_figure(results: Results, curves: Sequence[Mapping[str, Any]], colour: str) -> Figure | str:
    """Validation less training loss: at the end against the loss, and over time."""
    known = results.finished.dropna(subset=["gap"])
    if known.empty:
        return "The loss gap needs finished experiments with a training loss."
    points = (
        shared("point", filled=True, size=60)
        .transform_filter("isValid(datum.gap) && isValid(datum.val_loss) && datum.status == 'finished'")
        .encode(
            x=alt.X("val_loss:Q", title=LOSS, scale=alt.Scale(zero=False)),
            y=alt.Y("gap:Q", title="loss gap, nats per token", scale=alt.Scale(zero=False)),
            color=group_colour(),
            opacity=fading(0.85, 0.12),
            tooltip=[*TIP, alt.Tooltip("val_loss:Q", format=".4f"), alt.Tooltip("gap:Q", format=".4f")],
        )
    )
    panels = [Panel(alt.layer(zero_line("y"), points), 300, title="at the end, against the validation loss")]
    if curves:
        lines = (
            _curve_base()
            .transform_filter("isValid(datum.gap)")
            .mark_line(strokeWidth=1.5)
            .encode(
                x=alt.X(
                    "step:Q",
                    title="updates",
                    axis=alt.Axis(format=",d", tickCount=6),
                    scale=alt.Scale(domainMin=0, nice=False),
                ),
                y=alt.Y("gap:Q", title="loss gap, nats per token"),
                detail="i:N",
                color=group_colour("stroke"),
                strokeOpacity=fading(0.7, 0.08),
                tooltip=[*TIP, alt.Tooltip("step:Q", title="update", format=",d"), alt.Tooltip("gap:Q", format=".4f")],
            )
        )
        panels.append(Panel(alt.layer(zero_line("y"), lines), 300, title="over the training"))
    smallest, largest = known["gap"].idxmin(), known["gap"].idxmax()
    alternative = (
        f"Gaps at the end run from {signed(known['gap'].min(), 4)} ({smallest}) to {signed(known['gap'].max(), 4)} ({largest}) "
        f"nats per token; the median is {signed(known['gap'].median(), 4)}."
    )
    return Figure(
        "gap",
        "Loss gap: how well each generalises",
        tuple(panels),
        "Validation less training loss. Large: the model knows its training text better than new text.",
        alternative,
        columns=2,
        parameters=parameters(colour),
        tables=("experiments", "curves") if curves else ("experiments",),
    )


# --- fronts


def pareto_figure(results: Results, fronts: Mapping[str, pd.DataFrame], colour: str) -> Figure | str:
    """Loss against what it costs; `fronts` by cost, from the cheapest to the best model."""
    shown = {cost: table for cost, table in fronts.items() if table["cost"].gt(0).any()}
    if not shown:
        return "Fronts need finished experiments with their parameters, arithmetic or time."
    panels = tuple(_front(cost, table) for cost, table in shown.items())
    told = [
        f"against {quantity(cost)[0]}, {listed([str(n) for n in table[table['on_front']]['name']][:6])}"
        for cost, table in shown.items()
    ]
    missing = [quantity(cost)[0] for cost in fronts if cost not in shown]
    caption = (
        "The line joins the experiments on the front: no other has both a lower loss and a lower cost. Axes of cost are "
        "logarithmic. Time is each experiment's own, and means little across machines or stacks of different sizes."
    )
    if missing:
        caption += f" Not known here: {listed(missing)}."
    return Figure(
        "pareto",
        "What a lower loss costs",
        panels,
        caption,
        f"Scatter plots of validation loss with their fronts: {'; '.join(told)}.",
        columns=len(panels),
        parameters=parameters(colour),
        tables=("experiments",),
    )


def _front(cost: str, table: pd.DataFrame) -> Panel:
    x = alt.X(f"{cost}:Q", title=ALONG[cost], scale=alt.Scale(type="log", nice=False, padding=14), axis=magnitudes())
    y = alt.Y("val_loss:Q", title=LOSS, scale=alt.Scale(zero=False))
    points = (
        shared("point", filled=True, size=55)
        .transform_filter(f"datum.{cost} > 0 && isValid(datum.val_loss) && datum.status == 'finished'")
        .encode(
            x=x,
            y=y,
            color=group_colour(),
            opacity=fading(0.85, 0.12),
            tooltip=[
                *TIP,
                alt.Tooltip("val_loss:Q", format=".4f"),
                alt.Tooltip(f"{cost}:Q", title=ALONG[cost], format=","),
            ],
        )
    )
    front = table[table["on_front"]].sort_values("cost")
    rows = records(front.rename(columns={"cost": cost})[["name", cost, "val_loss"]])
    base = alt.Chart(alt.InlineData(values=rows)).encode(x=x, y=y)
    line = base.mark_line(style="front", interpolate="step-after")
    ring = base.mark_point(style="front", size=130, filled=False)
    return Panel(alt.layer(line, points, ring), 290, title=f"against {quantity(cost)[0]}")
