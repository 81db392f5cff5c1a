"""Figures of what settings do: effects with their intervals, interactions, the half-normal plot, shares of variance."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import altair as alt
import numpy as np
import pandas as pd

from nanostudy.analysis.effects import Effects
from nanostudy.reporting.charts.figure import BLUE, GREY, VERMILLION, Figure, Panel, each, records
from nanostudy.reporting.phrases import interval, level_text, quantity, setting_text, term_text

MOST_TERMS = 24  # that the effects plot shows; the table has the rest
MOST_INTERACTIONS = 6  # plots
LOWERS, RAISES, UNCLEAR = "lowers it", "raises it", "cannot be told from zero"
DIRECTIONS = alt.Scale(domain=[LOWERS, RAISES, UNCLEAR], range=[BLUE, VERMILLION, GREY])
DIRECTION_SHAPES = alt.Scale(domain=[LOWERS, RAISES, UNCLEAR], range=["circle", "circle", "diamond"])


def effects_figure(effects: Effects, measure: str = "val_loss") -> Figure | str:
    """Every effect as a point with its 95% interval, the largest first."""
    table = effects.table
    if table.empty:
        return effects.explanation or "There are too few results to estimate effects."
    told, unit = quantity(measure)
    rows = worded(drawn_terms(table))
    rows["direction"] = [direction(row) for row in each(rows)]
    rows["told"] = [interval(row.effect, row.low, row.high) for row in each(rows)]
    columns = ["what", "effect", "low", "high", "direction", "told"]
    base = alt.Chart(alt.InlineData(values=records(rows[columns]))).encode(
        y=alt.Y("what:N", sort=list(dict.fromkeys(rows["what"])), title=None, axis=alt.Axis(grid=True)),
        color=alt.Color("direction:N", scale=DIRECTIONS, legend=alt.Legend(title=f"the {told}")),
        tooltip=[
            alt.Tooltip("what:N", title="change"),
            alt.Tooltip("told:N", title=f"{told}, {unit}"),
        ],
    )
    title = f"change of {told}, {unit}"
    point = base.mark_point(filled=True, size=85, opacity=1).encode(
        x=alt.X("effect:Q", title=title),
        shape=alt.Shape("direction:N", scale=DIRECTION_SHAPES, legend=alt.Legend(title=f"the {told}")),
    )
    rule = base.mark_rule(strokeWidth=2.2).encode(x=alt.X("low:Q", title=title), x2="high:Q")
    layers = [zero("x"), *([rule] if rows["low"].notna().any() else []), point]
    left = len(table) - len(rows)
    more = f" The {left} smallest are in the table of effects only." if left else ""
    bars = (
        "Bars are 95% intervals; where one covers zero, the effect cannot be told from none."
        if len(layers) == 3
        else ""
    )
    caption = (
        f"What changing a setting does to the {told}, averaged over all others; for a pair (×), by how much one setting's "
        f"change depends on the other. {bars}{more}"
    )
    figure_id = "effects" if measure == "val_loss" else f"effects-on-{measure.replace('_', '-')}"
    panel = Panel(alt.layer(*layers), 22 * len(rows))
    return Figure(figure_id, f"Effects on the {told}", (panel,), caption, _effects_in_words(rows, told, unit))


def drawn_terms(table: pd.DataFrame) -> pd.DataFrame:
    """The largest effects, the largest first."""
    order = table["effect"].abs().sort_values(ascending=False, kind="stable").index
    return table.loc[order].dropna(subset=["effect"]).head(MOST_TERMS).copy()


def worded(table: pd.DataFrame) -> pd.DataFrame:
    """With a column `what` that says what changes."""
    several = table["term"].duplicated(keep=False)  # pairs with more than two levels
    return table.assign(what=[term_text(row, more) for row, more in zip(each(table), several, strict=True)])


def direction(row: Any) -> str:
    if not bool(row.clear):
        return UNCLEAR
    return LOWERS if row.effect < 0 else RAISES


def _effects_in_words(rows: pd.DataFrame, told: str, unit: str) -> str:
    clear = rows[rows["clear"].astype(bool)]
    shown = "; ".join(f"{row.what}: {row.told}" for row in each(clear.head(6)))
    known = f"Those whose interval excludes zero, largest first: {shown}." if shown else "No interval excludes zero."
    return f"Dots with intervals, one for each of {len(rows)} effects on the {told}, in {unit}. {known}"


def zero(channel: str) -> alt.Chart:
    return alt.Chart(alt.InlineData(values=[{"zero": 0}])).mark_rule(style="zero").encode(**{channel: "zero:Q"})


def interactions_figure(pairs: Sequence[tuple[str, str, pd.DataFrame]]) -> Figure | str:
    """Means by two settings; `pairs` come with their cell means, the most important first."""
    pairs = [(a, b, means) for a, b, means in pairs[:MOST_INTERACTIONS] if means["mean"].notna().sum() > 2]
    if not pairs:
        return "Interactions need at least two settings that vary together, with finished experiments."
    ends = pd.concat([means[["low", "mean", "high"]] for _, _, means in pairs]).stack().dropna()
    room = 0.05 * (np.ptp(ends.to_numpy(float)) or 1.0)
    domain = [float(v) for v in (ends.to_numpy(float).min() - room, ends.to_numpy(float).max() + room)]
    panels = tuple(_interaction(a, b, means, domain) for a, b, means in pairs)
    caption = (
        "Mean validation loss at each combination of two settings. Parallel lines: the two add up. Lines that are not: one "
        "setting's effect depends on the other. Bars are 95% intervals of the means, where there are several experiments."
    )
    return Figure(
        "interactions", "How settings act together", panels, caption, _interactions_in_words(pairs), columns=3
    )


def _interaction(a: str, b: str, means: pd.DataFrame, domain: list[float]) -> Panel:
    rows = means.dropna(subset=["mean"]).copy()
    at, by = sorted(set(rows["level_a"]), key=_order), sorted(set(rows["level_b"]), key=_order)
    rows["a"], rows["b"] = rows["level_a"].map(level_text), rows["level_b"].map(level_text)
    legend = alt.Legend(
        title=setting_text(b), titleOrient="top", symbolType="circle", symbolSize=70, columns=3, columnPadding=8
    )
    columns = ["a", "b", "mean", "low", "high", "n"]
    base = alt.Chart(alt.InlineData(values=records(rows[columns]))).encode(
        x=alt.X("a:O", sort=[level_text(v) for v in at], title=setting_text(a), axis=alt.Axis(labelAngle=0)),
        color=alt.Color("b:N", sort=[level_text(v) for v in by], legend=legend),
        tooltip=[
            alt.Tooltip("a:N", title=setting_text(a)),
            alt.Tooltip("b:N", title=setting_text(b)),
            alt.Tooltip("mean:Q", title="mean, nats per token", format=".4f"),
            alt.Tooltip("n:Q", title="experiments"),
        ],
    )
    y = alt.Y("mean:Q", title="validation loss, nats per token", scale=alt.Scale(zero=False, domain=domain, nice=False))
    whisker = base.mark_rule(strokeWidth=1.2, opacity=0.6).encode(y=alt.Y("low:Q"), y2="high:Q")
    known = [whisker] if rows["low"].notna().any() else []
    chart = alt.layer(
        *known, base.mark_line(strokeWidth=2.2).encode(y=y), base.mark_point(filled=True, size=60).encode(y=y)
    )
    return Panel(chart, 210, title=f"{setting_text(a)} × {setting_text(b)}")


def _order(level: Any) -> tuple[int, float, str]:
    if isinstance(level, str) or level is None:
        return (1, 0.0, str(level))
    return (0, float(level), "")


def _interactions_in_words(pairs: Sequence[tuple[str, str, pd.DataFrame]]) -> str:
    told = []
    for a, b, means in pairs:
        known = means.dropna(subset=["mean"])
        best = known.sort_values("mean", kind="stable").iloc[0]
        where = f"{setting_text(a)} {level_text(best['level_a'])} with {setting_text(b)} {level_text(best['level_b'])}"
        told.append(f"{setting_text(a)} and {setting_text(b)}: lowest, {best['mean']:.4f}, at {where}")
    return f"Lines of mean validation loss in {len(pairs)} plots. {'; '.join(told)}."


def half_normal_figure(effects: Effects) -> Figure | None:
    """Absolute effects against half-normal quantiles, where the noise was estimated from the effects themselves."""
    table = effects.half_normal
    if table is None or table.empty:
        return None
    rows = table.copy()
    rows["size"] = rows["effect"].abs()
    margins = {"margin of error": "margin", "simultaneous margin": "simultaneous"}
    found = [(told, float(table.attrs.get(key, math.nan))) for told, key in margins.items()]
    known = [(told, value) for told, value in found if not math.isnan(value)]
    outside = rows[rows["size"] > (min(value for _, value in known) if known else math.inf)]
    rows["label"] = ["" for _ in rows.index]
    for place in _apart(outside["size"], 0.06 * rows["size"].max()):
        rows.loc[place, "label"] = str(rows.loc[place, "term"])
    base = alt.Chart(alt.InlineData(values=records(rows[["term", "size", "quantile", "label"]]))).encode(
        x=alt.X("quantile:Q", title="half-normal quantile, standard deviations"),
        y=alt.Y("size:Q", title="size of the effect, nats per token"),
    )
    point = base.mark_point(filled=True, size=60, opacity=1).encode(
        tooltip=[
            alt.Tooltip("term:N", title="effect of"),
            alt.Tooltip("size:Q", title="size, nats per token", format=".4f"),
        ]
    )
    label = base.mark_text(align="right", dx=-8, dy=-2).encode(text="label:N")
    lines = alt.Chart(alt.InlineData(values=[{"size": value, "told": told} for told, value in known])).encode(
        y="size:Q"
    )
    highest = alt.Chart(
        alt.InlineData(values=[{"size": max((v for _, v in known), default=0.0), "told": "margins of error"}])
    )
    names = highest.mark_text(style="quiet-words", align="right", baseline="bottom", dy=-4).encode(
        x=alt.value("width"), y="size:Q", text="told:N"
    )
    layers = [*([lines.mark_rule(style="zero"), names] if known else []), point, label]
    caption = (
        "Were nothing but noise at work, the points would lie on a straight line through the origin. Above the lower dashed "
        "line an effect is clear on its own, above the upper one among all of them."
    )
    named = [str(term) for term in outside["term"]][::-1]
    told = f"Above the margin of error: {', '.join(named)}." if named else "None is above the margin of error."
    alternative = f"{len(rows)} effects by size against half-normal quantiles. {told}"
    return Figure(
        "half-normal", "Which effects stand out of the noise", (Panel(alt.layer(*layers), 340),), caption, alternative
    )


def _apart(sizes: pd.Series, distance: float) -> list[Any]:
    """From the largest on, those that are so far from the last chosen that labels do not meet."""
    chosen: list[Any] = []
    for place, size in sizes.sort_values(ascending=False).items():
        if not chosen or sizes[chosen[-1]] - size >= distance:
            chosen.append(place)
    return chosen


def variance_figure(effects: Effects) -> Figure | str:
    """Shares of the variance between experiments."""
    table = effects.table
    rows = table.dropna(subset=["share"]).drop_duplicates("term") if not table.empty else table
    if rows.empty:
        return "Shares of variance need effects, and there are none."
    rows = rows.sort_values("share", ascending=False, kind="stable").head(12)
    rows = rows.assign(percent=100 * rows["share"], told=[f"{100 * share:.1f}%" for share in rows["share"]])
    terms = list(rows["term"])
    base = alt.Chart(alt.InlineData(values=records(rows[["term", "percent", "told"]]))).encode(
        y=alt.Y("term:N", sort=terms, title=None),
        x=alt.X("percent:Q", title="share of the variance of validation loss, %", axis=alt.Axis(grid=True)),
        tooltip=[alt.Tooltip("term:N", title="effect of"), alt.Tooltip("told:N", title="share of variance")],
    )
    words = base.mark_text(align="left", dx=5).encode(text="told:N")
    bars = base.mark_bar(cornerRadiusEnd=2, height={"band": 0.66})
    shown = ", ".join(f"{row.term} {row.told}" for row in each(rows.head(6)))
    return Figure(
        "variance",
        "Share of the variance that each explains",
        (Panel(alt.layer(bars, words), 22 * len(rows)),),
        "How much of the differences in validation loss between experiments goes with each setting and pair of settings.",
        f"Bars. {shown}.",
    )
