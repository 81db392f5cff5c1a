"""Figures of losses over time and against cost: curves, loss gaps, Pareto fronts, scaling."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import altair as alt
import numpy as np
import pandas as pd

from nanostudy.analysis.frames import Results
from nanostudy.measures import MEASURES
from nanostudy.reporting.charts import marks
from nanostudy.reporting.charts.figure import GREY, Figure, Panel, each, records
from nanostudy.reporting.phrases import number, signed
from nanostudy.text import listed

MOST_NAMED = 6  # settings on a front, in words

Row = Mapping[str, Any]


# --- curves


def curves_figure(results: Results, curves: Sequence[Row], colour: str) -> Figure | None:
    """Validation and training loss against updates, one line per experiment; the entropy floor where it is known."""
    if not curves:
        return None
    floors = {facts.name: facts.entropy for facts in results.corpora.values() if facts.entropy is not None}
    low, high, top = _loss_ends(curves, [*floors.values()])
    caption = (
        "Loss against updates, one line per experiment: on the left over the whole validation split, on the right over as much "
        "of the training split."
    )
    if floors:
        lines = listed([f"{name} {number(value)} nats per token" for name, value in floors.items()])
        caption += f" Dashed: the entropy of the validation text ({lines}), below which no model can get."
    last = {row["i"]: row["val_loss"] for row in curves if row["val_loss"] is not None}.values()
    return Figure(
        "curves",
        "Training and validation curves",
        tuple(Panel(_curve(name, low, floors), 330, title=MEASURES[name].title) for name in ("val_loss", "train_loss")),
        caption,
        f"Lines for {len({row['i'] for row in curves})} experiments over at most {max(row['step'] for row in curves):,.0f} "
        f"updates. Validation losses end between {number(min(last))} and {number(max(last))} nats per token.",
        columns=2,
        parameters={**marks.parameters(colour), "top": top},
        tables=("experiments", "curves"),
        whole=high,
    )


def _loss_ends(curves: Sequence[Row], floors: Sequence[float]) -> tuple[float, float, float]:
    """(under everything, over everything, over what is left after the first fall)."""
    values = [row[key] for row in curves for key in ("val_loss", "train_loss") if row[key] is not None]
    late = [row[key] for row in curves if row["step"] > 0 for key in ("val_loss", "train_loss") if row[key] is not None]
    low, high = min([*values, *floors]), float(np.quantile(values, 0.999))
    top = float(np.quantile(late or values, 0.985))
    room = 0.03 * marks.width(low, top)
    return low - room, high + room, min(high, top) + room


def _lines(condition: str, opacity: float) -> alt.Chart:
    """One line per experiment of the page's table of curves."""
    joined = alt.LookupData(data=alt.NamedData(name="experiments"), key="i")
    return (
        alt.Chart(alt.NamedData(name="curves"))
        .transform_lookup(lookup="i", from_=joined, as_="e")
        .transform_calculate(
            group=f"isValid(datum.e[{marks.COLOUR}]) ? datum.e[{marks.COLOUR}] : 'not known'",
            name="datum.e.name",
            gap="datum.val_loss - datum.train_loss",
        )
        .transform_filter(condition)
        .mark_line(strokeWidth=1.5)
        .encode(
            x=marks.updates_axis(),
            detail="i:N",
            color=marks.group_colour("stroke"),
            strokeOpacity=marks.fading(opacity, 0.08),
        )
    )


def _curve(name: str, low: float, floors: Mapping[str, float]) -> Any:
    scale = alt.Scale(domainMin=low, domainMax=alt.ExprRef("top"), zero=False, nice=False)
    lines = _lines(f"datum.{name} <= top", 0.75).encode(  # drawing programs take long to clip
        y=marks.y_of(name, scale=scale, axis=alt.Axis(grid=True)),
        tooltip=[*marks.WHO, marks.UPDATE, marks.tip(name)],
    )
    if not floors:
        return alt.layer(lines)
    rows = [{"floor": value, "label": f"entropy of {text}"} for text, value in floors.items()]
    floor = marks.inline(rows).encode(y="floor:Q")
    label = floor.mark_text(style="quiet-words", align="left", baseline="bottom", dy=-4)
    return alt.layer(lines, floor.mark_rule(style="zero"), label.encode(x=alt.value(6), text="label:N"))


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
        lines = _lines("isValid(datum.gap)", 0.7).encode(
            y=marks.y_of("gap"), tooltip=[*marks.WHO, marks.UPDATE, marks.tip("gap")]
        )
        panels.append(Panel(alt.layer(marks.zero_line("y"), lines), 300, title="over the training"))
    return Figure(
        "gap",
        "Loss gap: how well each generalises",
        tuple(panels),
        "Validation less training loss. Large: the model knows its training text better than new text.",
        f"Gaps at the end run from {signed(gaps.min(), 4)} ({gaps.idxmin()}) to {signed(gaps.max(), 4)} ({gaps.idxmax()}) "
        f"nats per token; the median is {signed(gaps.median(), 4)}.",
        columns=2,
        parameters=marks.parameters(colour),
        tables=("experiments", "curves") if curves else ("experiments",),
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
        tables=("experiments",),
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
    rings = [
        front.mark_point(style="front", size=130, filled=False),
        near.mark_point(color=GREY, size=130, filled=False),
    ]
    return Panel(alt.layer(line, points, *rings), 290, title=f"against {MEASURES[cost].title}")


def front_label(row: Any) -> str:
    """The settings of a row of a front, or the name of their only experiment."""
    return str(row.cell).replace("=", " ") if row.n > 1 and row.cell else str(row.name)


def scaling_figure(results: Results, fits: Mapping[str, Any], colour: str) -> Figure | None:
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
        tables=("experiments",),
    )


def _power_law(against: str, fit: Any) -> Panel:
    x = marks.x_of(against, scale=marks.logarithmic(), axis=marks.MAGNITUDES)
    y = marks.y_of("val_loss", scale=marks.logarithmic(12), axis=alt.Axis(format=".2f"))
    layers: list[Any] = [
        marks.points(f"datum.{against} > 0 && datum.val_loss > 0", 50, 0.8).encode(x=x, y=y, tooltip=marks.WHO)
    ]
    curve = getattr(fit, "curve", None)
    if curve is not None:
        base = marks.inline(records(curve.rename(columns={"x": against, "y": "val_loss"})))
        band = base.mark_area(style="band").encode(x=x, y=alt.Y("low:Q"), y2="high:Q")
        layers = [band, *layers, base.mark_line(style="front").encode(x=x, y=y)]
    return Panel(alt.layer(*layers), 290, title=f"against {MEASURES[against].title}")


def fit_text(fit: Any) -> str:
    """A fit's formula and exponent, or the refusal's reason."""
    if not hasattr(fit, "exponent"):
        return f"no power law is fitted. {fit.reason}"
    low, high = number(fit.low, 3), number(fit.high, 3)
    return f"{fit.formula}; exponent {number(fit.exponent, 3)} ({low} to {high}), n = {fit.n}."
