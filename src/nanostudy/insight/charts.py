"""Figures of the experiments themselves: ranking, curves, gaps, fronts, parts, parallel coordinates, scaling, samples.

Each takes what is analysed and gives a figure, or the sentence that says why there is none.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import altair as alt
import numpy as np
import pandas as pd

from nanostudy.insight.figure import LOSS, Figure, Panel, records
from nanostudy.insight.frames import Results, levels
from nanostudy.insight.phrases import level_text, listed, nats, quantity
from nanostudy.words import counted

MOST_RANKED = 30
COLOUR = "colour"  # the page's parameter: the column that colours
FADED = "length(chosen) && indexof(chosen, datum.i) < 0"  # where experiments are chosen, the others step back


def colourings(results: Results) -> list[str]:
    """The columns by which curves can be coloured, the first one first."""
    table = results.experiments
    others = [name for name in ("part", "status", "device", "precision") if table[name].nunique(dropna=True) > 1]
    seeds = ["seed"] if 1 < table["seed"].nunique(dropna=True) <= 12 else []
    named = [] if len(table) > 12 else ["name"]
    return [*results.factors, *others, *seeds, *named] or ["status"]


def parameters(results: Results, first: str | None = None) -> dict[str, Any]:
    return {COLOUR: first or colourings(results)[0], "chosen": []}


def shared(mark: str, **settings: Any) -> alt.Chart:
    """A chart of the page's experiments, with the group that colours them."""
    chart = alt.Chart(alt.NamedData(name="experiments")).transform_calculate(group=GROUP)
    return getattr(chart, f"mark_{mark}")(**settings)


GROUP = f"isValid(datum[{COLOUR}]) ? datum[{COLOUR}] : 'not known'"
TIP = [alt.Tooltip("name:N", title="experiment"), alt.Tooltip("group:N", title="colour")]


def group_colour() -> alt.Color:
    return alt.Color("group:N", legend=alt.Legend(title=None, symbolType="circle", symbolSize=80))


def fading(strong: float, faint: float) -> Any:
    return alt.condition(FADED, alt.value(faint), alt.value(strong))


# --- ranking


def ranking_figure(ranking: pd.DataFrame, measure: str = "val_loss") -> Figure | str:
    if ranking.empty:
        return "No experiment has finished, so there is nothing to rank."
    rows = ranking.head(MOST_RANKED).reset_index(names="place")
    told, unit = quantity(measure)
    rows["what"] = np.where(rows["tied"].astype(bool), "cannot be told from the first", "behind the first")
    rows.loc[0, "what"] = "first"
    order = list(rows["name"])
    base = alt.Chart(alt.InlineData(values=records(rows[["place", "name", "value", "low", "high", "what"]]))).encode(
        y=alt.Y("name:N", sort=order, title=None, axis=alt.Axis(labelLimit=300, grid=True)),
        color=alt.Color(
            "what:N",
            scale=alt.Scale(
                domain=["first", "cannot be told from the first", "behind the first"],
                range=["#D55E00", "#0072B2", "#8E9199"],
            ),
            legend=alt.Legend(title=None, symbolType="circle"),
        ),
        tooltip=[
            alt.Tooltip("place:Q", title="place"),
            alt.Tooltip("name:N", title="experiment"),
            alt.Tooltip("value:Q", title=f"{told}, {unit}", format=".4f"),
            alt.Tooltip("low:Q", title="from", format=".4f"),
            alt.Tooltip("high:Q", title="to", format=".4f"),
        ],
    )
    x = alt.X("value:Q", title=f"{told}, {unit}", scale=alt.Scale(zero=False))
    rule = [base.mark_rule(strokeWidth=2).encode(x=alt.X("low:Q", title=f"{told}, {unit}"), x2="high:Q")]
    known = rule if rows["low"].notna().any() else []
    chart = alt.layer(*known, base.mark_point(filled=True, size=70, opacity=1).encode(x=x))
    tied, best = int(ranking["tied"].astype(bool).sum()), ranking.iloc[0]
    shown = f"the best {len(rows)} of {len(ranking):,}" if len(rows) < len(ranking) else f"all {len(ranking):,}"
    caption = f"By {told}: {shown}, with 95% intervals. {ranking.attrs.get('basis', '')}".strip()
    spread = f"from {nats(ranking['value'].min())} to {nats(ranking['value'].max())} {unit}"
    alternative = f"{counted(len(ranking), 'experiment')} {spread}. First is {best['name']}. Not to be told from it at 95%: {max(0, tied - 1)}."
    name = "ranking" if measure == "val_loss" else f"ranking-by-{measure}"
    return Figure(name, f"Ranking by {told}", (Panel(chart, 20, stepped=True),), caption, alternative)


def zero_line(channel: str) -> alt.Chart:
    return alt.Chart(alt.InlineData(values=[{"zero": 0}])).mark_rule(style="zero").encode(**{channel: "zero:Q"})


def magnitudes() -> alt.Axis:
    return alt.Axis(format="~s", tickCount=5)


# --- parts, settings and text


def parts_figure(results: Results, means: pd.DataFrame) -> Figure | str:
    """Each experiment in its part, with the part's mean."""
    if len(means) < 2:
        return "Comparing parts needs finished experiments in at least two of them."
    order = list(means["part"])
    dots = (
        shared("point", filled=True, size=45)
        .transform_filter("isValid(datum.val_loss) && datum.status == 'finished'")
        .encode(
            y=alt.Y("part:N", sort=order, title=None, axis=alt.Axis(labelLimit=200)),
            yOffset=alt.YOffset("jitter:Q", scale=alt.Scale(domain=[-1.6, 1.6])),
            x=alt.X("val_loss:Q", title=LOSS, scale=alt.Scale(zero=False), axis=alt.Axis(grid=True)),
            color=group_colour(),
            opacity=fading(0.7, 0.1),
            tooltip=[*TIP, alt.Tooltip("val_loss:Q", format=".4f")],
        )
        .transform_calculate(jitter="((datum.i * 7919) % 101) / 50.5 - 1")
    )
    base = alt.Chart(alt.InlineData(values=records(means))).encode(y=alt.Y("part:N", sort=order))
    bar = base.mark_rule(style="front", strokeWidth=2.4).encode(x="low:Q", x2="high:Q")
    mean = base.mark_point(style="front", shape="diamond", filled=True, size=110).encode(x="mean:Q")
    shown = "; ".join(
        f"{row.part}: mean {nats(row.mean)}, best {nats(row.best)}, n = {row.n}" for row in means.itertuples()
    )
    return Figure(
        "parts",
        "The parts compared",
        (Panel(alt.layer(dots, bar, mean), 58, stepped=True),),
        "Dots are experiments, diamonds the parts' means with 95% intervals over their experiments.",
        f"Validation loss by part. {shown}.",
        parameters=parameters(results),
        tables=("experiments",),
    )


def parallel_figure(results: Results) -> Figure | str:
    """A line an experiment through the levels of its settings to its loss."""
    table = results.finished
    axes = [name for name in results.factors if len(levels(table[name])) > 1]
    if not axes or len(table) < 2:
        return "Parallel coordinates need at least two finished experiments and a setting that varies."
    places: dict[str, pd.Series] = {}
    labels = []
    for factor in axes:
        present = levels(table[factor])
        at = {level: (k + 0.5) / len(present) for k, level in enumerate(present)}
        labels += [{"axis": factor, "at": at[level], "told": level_text(level)} for level in present]
        spread = 0.62 / len(present)
        rank = table.groupby(factor)["val_loss"].rank(pct=True) - 0.5
        places[factor] = table[factor].map(at).astype(float) + spread * rank
    loss = table["val_loss"]
    low, high = float(loss.min()), float(loss.max())
    places["validation loss"] = (loss - low) / ((high - low) or 1.0)
    labels += [{"axis": "validation loss", "at": at, "told": nats(low + at * (high - low), 3)} for at in (0, 0.5, 1)]
    names = [*axes, "validation loss"]
    place = {name: i for i, name in enumerate(results.experiments.index)}
    rows = [
        {"i": place[name], "axis": axis, "at": round(float(places[axis][name]), 4), "loss": round(float(loss[name]), 5)}
        for name in table.index
        for axis in names
        if places[axis][name] == places[axis][name]
    ]
    axis = alt.X(
        "axis:N",
        sort=names,
        title=None,
        axis=alt.Axis(labelAngle=0, orient="top", domain=False, ticks=False, grid=True),
    )
    y = alt.Y("at:Q", axis=None, scale=alt.Scale(domain=[-0.02, 1.02]))
    lines = (
        alt.Chart(alt.InlineData(values=rows))
        .mark_line(strokeWidth=1.3)
        .encode(
            x=axis,
            y=y,
            detail="i:N",
            color=alt.Color(
                "loss:Q",
                scale=alt.Scale(scheme="cividis", reverse=True),
                legend=alt.Legend(title=LOSS, gradientLength=160, format=".2f"),
            ),
            strokeOpacity=alt.condition(FADED, alt.value(0.06), alt.value(min(0.85, 14 / len(table) + 0.25))),
        )
    )
    base = alt.Chart(alt.InlineData(values=labels)).encode(x=axis, y=y, text="told:N")
    words = base.mark_text(style="words", align="right", dx=-7, fontWeight="bold")
    best = table.loc[loss.idxmin()]
    through = listed([f"{factor} {level_text(best[factor])}" for factor in axes])
    return Figure(
        "parallel",
        "Every experiment through its settings",
        (Panel(alt.layer(lines, words), 380),),
        "A line an experiment, from setting to setting to its validation loss; within a level, the better are lower.",
        f"{len(table):,} lines. The best, at {nats(low)} nats a token, goes through {through}.",
        parameters={"chosen": []},
    )


def scaling_figure(results: Results, fits: Mapping[str, Any]) -> Figure | str:
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
        parameters=parameters(results),
        tables=("experiments",),
    )


def fit_text(fit: Any) -> str:
    """A fit's formula and exponent, or the refusal's reason."""
    if hasattr(fit, "exponent"):
        return (
            f"{fit.formula}; exponent {nats(fit.exponent, 3)} ({nats(fit.low, 3)} to {nats(fit.high, 3)}), n = {fit.n}."
        )
    return f"no power law is fitted: {fit.reason}"


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
