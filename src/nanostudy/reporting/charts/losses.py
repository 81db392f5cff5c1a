"""Figures of losses over time and against cost: curves, loss gaps, Pareto fronts, scaling."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import altair as alt
import numpy as np
import pandas as pd

from nanostudy.analysis.frames import CorpusFacts, Results
from nanostudy.analysis.scaling import PowerLaw, Refusal
from nanostudy.measures import MEASURES
from nanostudy.reporting.charts import marks
from nanostudy.reporting.charts.figure import COLOUR, GREY, Figure, Panel, each, records
from nanostudy.reporting.phrases import in_words, number, signed
from nanostudy.text import listed

MOST_NAMED = 6  # settings on a front, in words

Row = Mapping[str, Any]


# --- curves


def curves_figure(
    corpora: Iterable[CorpusFacts], curves: Sequence[Row], batches: Sequence[Row], colour: str
) -> Figure | None:
    """Losses against updates from the first on, one line per experiment; the entropy of the text where it is known."""
    if not curves:
        return None
    floors = {facts.name: facts.entropy for facts in corpora if facts.entropy is not None}
    high = _highest(curves)
    training = ("batches", "loss", "training batches") if batches else ("curves", "train_loss", "training split")
    caption = (
        f"Loss against updates, one line per experiment: on the left evaluations of the validation split, on the right the "
        f"{'loss of training batches, with dropout' if batches else 'same of the training split'}. The axes are logarithmic."
    )
    if floors:
        lines = listed([f"{name} {number(value)} nats per token" for name, value in floors.items()])
        caption += f" No model can get below the entropy of the validation text ({lines})."
    last = {row["i"]: row["val_loss"] for row in curves if row["val_loss"] is not None}.values()
    return Figure(
        "curves",
        "Training and validation curves",
        (_curve("curves", "val_loss", "validation split", high, floors), _curve(*training, high, {})),
        caption,
        f"Lines for {len({row['i'] for row in curves})} experiments over at most {max(row['step'] for row in curves):,.0f} "
        f"updates. Validation losses end between {number(min(last))} and {number(max(last))} nats per token.",
        columns=2,
        parameters=marks.parameters(colour) | ({"floor": False} if floors else {}),
    )


def _highest(curves: Sequence[Row]) -> float:
    """Over the first evaluations: where a training diverges, its line leaves the plot."""
    first = [row["val_loss"] for row in curves if row["step"] == 0]
    return 1.05 * max(first or [float(np.quantile([row["val_loss"] for row in curves], 0.999))])


def _lines(table: str, column: str, title: str, condition: str, opacity: float) -> alt.Chart:
    """One line per experiment of one of the page's tables."""
    joined = alt.LookupData(data=alt.NamedData(name="experiments"), key="i")
    chart = (
        alt.Chart(alt.NamedData(name=table))
        .transform_lookup(lookup="i", from_=joined, as_="e")
        .transform_calculate(group=f"isValid(datum.e[{COLOUR}]) ? datum.e[{COLOUR}] : 'not known'", name="datum.e.name")
        .transform_calculate(setting=marks.SETTING)
        .transform_filter(condition)
    )
    tooltip = [*marks.WHO, marks.UPDATE, alt.Tooltip(f"{column}:Q", title=title, format=".4f")]
    return marks.lines(chart, marks.group_colour("stroke"), opacity, 0.08).encode(
        x=marks.updates_axis(), tooltip=tooltip
    )


def _curve(table: str, column: str, title: str, high: float, floors: Mapping[str, float]) -> Panel:
    axis = MEASURES["val_loss" if column == "val_loss" else "train_loss"].axis
    y = alt.Y(
        f"{column}:Q",
        title=axis,
        scale=alt.Scale(type="log", nice=False, padding=6),
        axis=alt.Axis(grid=True, format=".3~g", tickCount=6),
    )
    lines = _lines(table, column, axis, f"datum.{column} > 0 && datum.{column} <= {high:.4f}", 0.75).encode(y=y)
    chart = alt.layer(lines)
    if floors:
        rows = [{"floor": value, "label": f"entropy of {text}"} for text, value in floors.items()]
        base = marks.inline(rows).transform_filter("floor").encode(y="floor:Q")
        label = base.mark_text(style="quiet-words", align="left", baseline="bottom", dy=-4)
        chart = alt.layer(lines, base.mark_rule(style="zero"), label.encode(x=alt.value(6), text="label:N"))
    return Panel(chart, 330, title, marks.line_meta(table, "step", column, {"step": "update", column: axis}))


# --- the gap


def gap_figure(results: Results, curves: Sequence[Row], colour: str) -> Figure | None:
    """Validation less training loss: at the end against the loss, and over time."""
    gaps = results.finished.dropna(subset=["gap"])["gap"]
    if len(gaps) < 2:
        return None
    ends = marks.points("isValid(datum.gap) && isValid(datum.val_loss)", 60).encode(
        x=marks.x_of("val_loss", scale=marks.FREE),
        y=marks.y_of("gap", scale=marks.FREE),
        tooltip=[*marks.WHO, marks.tip("val_loss"), marks.tip("gap")],
    )
    panels = [Panel(alt.layer(marks.zero_line("y"), ends), 300, title="at the end, against the validation loss")]
    if curves:
        axis = MEASURES["gap"].axis
        lines = _lines("curves", "gap", axis, "isValid(datum.gap)", 0.7).encode(y=marks.y_of("gap"))
        meta = marks.line_meta("curves", "step", "gap", {"step": "update", "gap": axis})
        panels.append(Panel(alt.layer(marks.zero_line("y"), lines), 300, "over the training", meta))
    return Figure(
        "gap",
        "Loss gap: how well each generalises",
        tuple(panels),
        "Validation less training loss. Large: the model knows its training text better than new text.",
        f"Gaps at the end run from {signed(gaps.min(), 4)} ({gaps.idxmin()}) to {signed(gaps.max(), 4)} ({gaps.idxmax()}) "
        f"nats per token; the median is {signed(gaps.median(), 4)}.",
        columns=2,
        parameters=marks.parameters(colour),
    )


# --- cost


def pareto_figure(fronts: Mapping[str, pd.DataFrame], colour: str) -> Figure | None:
    """Loss against what it costs; `fronts` by cost, from the cheapest to the best model."""
    fronts = {cost: table for cost, table in fronts.items() if len(table) > 1 and table["cost"].gt(0).any()}
    if not fronts:
        return None
    lines = [
        f"against {MEASURES[cost].title}, {listed([front_label(row) for row in each(table[table['on_front']])], MOST_NAMED)}"
        for cost, table in fronts.items()
    ]
    return Figure(
        "pareto",
        "What a lower loss costs",
        tuple(_front(cost, table) for cost, table in fronts.items()),
        "The line joins the settings on the front, by their means over seeds: no others have both a lower loss and a lower cost. "
        "Grey rings: settings that are indistinguishable from the front at their cost (each on its own, 95%). Axes of cost are "
        "logarithmic. Time is each experiment's own, and means little across machines or stacks of different sizes.",
        f"Scatter plots of validation loss with their fronts: {'; '.join(lines)}.",
        columns=len(fronts),
        parameters=marks.parameters(colour),
    )


def _front(cost: str, table: pd.DataFrame) -> Panel:
    x = marks.x_of(cost, scale=marks.logarithmic(), axis=marks.MAGNITUDES)
    y = marks.y_of("val_loss", scale=marks.FREE)
    points = marks.points(f"datum.{cost} > 0 && isValid(datum.val_loss)").encode(
        x=x, y=y, tooltip=[*marks.WHO, marks.tip("val_loss"), marks.tip(cost)]
    )
    ringed = table.sort_values("cost").rename(columns={"cost": cost})
    front, near = (
        marks.inline(records(ringed[ringed[which].astype(bool)][["name", cost, "val_loss"]])).encode(x=x, y=y)
        for which in ("on_front", "near_front")
    )
    line = front.mark_line(style="front", interpolate="step-after")
    rings = [front.mark_point(style="front", size=130, filled=False)]
    rings += [near.mark_point(color=GREY, size=130, filled=False)] if ringed["near_front"].any() else []
    return Panel(alt.layer(line, points, *rings), 290, title=f"against {MEASURES[cost].title}")


def front_label(row: Any) -> str:
    """The settings of a row of a front, or the name of their only experiment."""
    return in_words(row.cell) if row.n > 1 and row.cell else str(row.name)


def scaling_figure(results: Results, fits: Mapping[str, PowerLaw | Refusal], colour: str) -> Figure | None:
    """Loss against parameters and tokens on logarithmic axes, with the power law where one is supported."""
    fits = {x: fit for x, fit in fits.items() if results.finished[x].nunique() > 1}
    if not fits:
        return None
    return Figure(
        "scaling",
        "Scaling",
        tuple(_power_law(against, fit) for against, fit in fits.items()),
        "Both axes are logarithmic: a power law is a straight line. It is drawn only where the points support one.",
        f"Validation loss {'; '.join(f'against {against}: {fit_text(fit)}' for against, fit in fits.items())}",
        columns=2,
        parameters=marks.parameters(colour),
    )


def _power_law(against: str, fit: PowerLaw | Refusal) -> Panel:
    x = marks.x_of(against, scale=marks.logarithmic(), axis=marks.MAGNITUDES)
    y = marks.y_of("val_loss", scale=marks.logarithmic(12), axis=alt.Axis(format=".2f"))
    layers: list[Any] = [
        marks.points(f"datum.{against} > 0 && datum.val_loss > 0", 50, 0.8).encode(x=x, y=y, tooltip=marks.WHO)
    ]
    if isinstance(fit, PowerLaw):
        base = marks.inline(records(fit.curve.rename(columns={"x": against, "y": "val_loss"})))
        band = base.mark_area(style="band").encode(x=x, y=alt.Y("low:Q"), y2="high:Q")
        layers = [band, *layers, base.mark_line(style="front").encode(x=x, y=y)]
    return Panel(alt.layer(*layers), 290, title=f"against {MEASURES[against].title}")


def fit_text(fit: PowerLaw | Refusal) -> str:
    """A fit's formula and exponent, or the refusal's reason."""
    if isinstance(fit, Refusal):
        return f"no power law is fitted. {fit.reason}"
    low, high = number(fit.low, 3), number(fit.high, 3)
    return f"{fit.formula}; exponent {number(fit.exponent, 3)} ({low} to {high}), n = {fit.n}."
