"""Figures of how the loss falls with size and tokens, and of what the samples are like."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import altair as alt
import pandas as pd

from nanostudy.analysis.frames import Results
from nanostudy.reporting.charts.charts import TIP, fading, group_colour, magnitudes, parameters, shared
from nanostudy.reporting.charts.figure import LOSS, Figure, Panel, records
from nanostudy.reporting.phrases import nats, quantity
from nanostudy.text import counted


def scaling_figure(results: Results, fits: Mapping[str, Any], colour: str) -> Figure | str:
    """Loss against parameters and tokens on logarithmic axes, with the power law where one is supported."""
    panels, told = [], []
    for against, fit in fits.items():
        known = results.finished.dropna(subset=[against])
        if known[against].nunique() < 2:
            continue
        scale = alt.Scale(type="log", nice=False, padding=14)
        x = alt.X(f"{against}:Q", title=quantity(against)[0], scale=scale, axis=magnitudes())
        y = alt.Y(
            "val_loss:Q", title=LOSS, scale=alt.Scale(type="log", nice=False, padding=12), axis=alt.Axis(format=".2f")
        )
        points = (
            shared("point", filled=True, size=50)
            .transform_filter(f"datum.{against} > 0 && datum.val_loss > 0 && datum.status == 'finished'")
            .encode(x=x, y=y, color=group_colour(), opacity=fading(0.8, 0.1), tooltip=TIP)
        )
        curve = getattr(fit, "curve", None)
        layers: list[Any] = [points]
        if curve is not None:
            rows = records(curve.rename(columns={"x": against, "y": "val_loss"}))
            base = alt.Chart(alt.InlineData(values=rows))
            layers = [
                base.mark_area(style="band").encode(x=x, y=alt.Y("low:Q"), y2="high:Q"),
                points,
                base.mark_line(style="front").encode(x=x, y=y),
            ]
        told.append(f"against {against}: {fit_text(fit)}")
        panels.append(Panel(alt.layer(*layers), 290, title=f"against {quantity(against)[0]}"))
    if not panels:
        return "Scaling needs finished experiments of different sizes or lengths."
    caption = (
        "Both axes are logarithmic: a power law is a straight line. It is drawn only where the points support one."
    )
    return Figure(
        "scaling",
        "Scaling",
        tuple(panels),
        caption,
        f"Validation loss {'; '.join(told)}",
        columns=2,
        parameters=parameters(colour),
        tables=("experiments",),
    )


def fit_text(fit: Any) -> str:
    """A fit's formula and exponent, or the refusal's reason."""
    if hasattr(fit, "exponent"):
        return (
            f"{fit.formula}; exponent {nats(fit.exponent, 3)} ({nats(fit.low, 3)} to {nats(fit.high, 3)}), n = {fit.n}."
        )
    return f"no power law is fitted. {fit.reason}"


def quality_figure(results: Results, quality: pd.DataFrame, measures: Mapping[str, tuple[str, str]]) -> Figure | str:
    """What was measured of the samples, against validation loss. `measures`: column to title and axis title."""
    if quality.empty:
        return "There are no samples to measure: a table holds none, and a run writes its own when it has finished."
    columns = ["name", "val_loss"]
    place = {name: i for i, name in enumerate(results.experiments.index)}
    panels = []
    for column, (title, axis) in measures.items():
        known = quality[[column]].dropna().join(results.finished[["val_loss"]], how="inner").reset_index(names="name")
        if len(known) < 2:
            continue
        known["i"] = known["name"].map(place)
        known[column] = known[column] * (100 if axis.endswith("%") else 1)
        chart = (
            alt.Chart(alt.InlineData(values=records(known[["i", *columns, column]], 4)))
            .mark_point(filled=True, size=50)
            .encode(
                x=alt.X("val_loss:Q", title=LOSS, scale=alt.Scale(zero=False)),
                y=alt.Y(f"{column}:Q", title=axis, scale=alt.Scale(zero=False)),
                opacity=fading(0.8, 0.1),
                tooltip=[
                    alt.Tooltip("name:N", title="experiment"),
                    alt.Tooltip(f"{column}:Q", title=axis, format=".3~f"),
                ],
            )
        )
        panels.append(Panel(chart, 220, title=title))
    if not panels:
        return "Sample quality against loss needs samples of at least two finished experiments."
    median = "; ".join(
        f"{title}, median {quality[column].median():.0%}"
        if axis.endswith("%")
        else f"{title}, median {quality[column].median():.0f}"
        for column, (title, axis) in measures.items()
        if quality[column].notna().any()
    )
    return Figure(
        "quality",
        "What the samples are like, against loss",
        tuple(panels),
        "Each dot is an experiment's samples, measured; to the left are the lower losses.",
        f"Of {counted(len(quality), 'experiment')}: {median}.",
        columns=2,
        parameters={"chosen": []},
    )
