"""Figures of what settings do: effects with their intervals, of one and of several sources, interactions, half-normal plot, variance."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import altair as alt
import numpy as np
import pandas as pd

from nanostudy.analysis.effects import Effects
from nanostudy.analysis.frames import levels
from nanostudy.analysis.sources import Sources
from nanostudy.measures import MEASURES, NATS
from nanostudy.reporting.charts import marks
from nanostudy.reporting.charts.figure import GREY, INK, Figure, Panel, each, plain_value, records
from nanostudy.reporting.phrases import change, interval, term_text
from nanostudy.text import value_text

MOST_TERMS = 24  # that the effects plot shows; the table has the rest
MOST_BARS = 12  # of shares of variance
MOST_INTERACTIONS = 6  # plots
MOST_LABELS = 5  # in the half-normal plot
MOST_CHANGES = 16  # of several sources
SHAPES = ["circle", "square", "diamond", "triangle-up", "cross", "triangle-down"]
KINDS = ["differs from zero", "indistinguishable from zero (95%)"]


# --- effects


def effects_figure(effects: Effects, name: str = "val_loss", most: int = MOST_TERMS) -> Figure | None:
    """Every effect on a measure as a point with its 95% interval, the largest first; of many, `most` in a figure of its own."""
    table = effects.table
    if table.empty or not table["effect"].abs().max() > 1e-9:  # what rounding leaves is no effect
        return None
    measure = MEASURES[name]
    largest = table.dropna(subset=["effect"]).sort_values("effect", key=abs, ascending=False, kind="stable")
    rows = worded(largest.head(most))
    rows["kind"] = np.where(rows["clear"].astype(bool), *KINDS)
    alone = rows["order"] == 1
    rows["column"] = rows["factor_a"].where(alone, None)
    for end, level in (("from", "reference"), ("to", "level")):
        rows[end] = [plain_value(v) if own else None for v, own in zip(rows[level], alone, strict=True)]
    rows["text"] = [interval(row.effect, row.low, row.high) for row in each(rows)]
    base = marks.inline(
        records(rows[["what", "effect", "low", "high", "kind", "text", "column", "from", "to"]])
    ).encode(
        y=alt.Y("what:N", sort=list(dict.fromkeys(rows["what"])), title=None, axis=alt.Axis(grid=True)),
        color=alt.Color("kind:N", scale=alt.Scale(domain=KINDS, range=[INK, GREY]), legend=None),
        tooltip=[alt.Tooltip("what:N", title="change"), alt.Tooltip("text:N", title=measure.axis)],
    )
    shape = alt.Shape("kind:N", scale=alt.Scale(domain=KINDS, range=["circle", "diamond"]), legend=None)
    chart = _effects(base, rows, f"change of {measure.axis}", 85, shape)
    left = len(table) - len(rows)
    caption = (
        f"What changing a setting does to the {measure.title}, averaged over all others; for a pair (×), by how much one "
        "setting's change depends on the other."
    )
    if rows["low"].notna().any():
        unknown = ", or without an interval" if rows["low"].isna().any() else ""
        caption += f" Bars are 95% intervals; grey: indistinguishable from no change{unknown}."
    caption += f" The {left} smallest are in the table of effects only." if left else ""
    few = most < min(len(table), MOST_TERMS)
    return Figure(
        "largest-effects" if few else "effects" if name == "val_loss" else f"effects-on-{name.replace('_', '-')}",
        f"{'The largest effects' if few else 'Effects'} on the {measure.title}",
        (Panel(chart, 22 * len(rows), meta={"changes": name}),),
        caption,
        f"Dots with intervals, one for each of {len(rows)} effects on the {measure.axis}. {_clear_effects(rows)}",
    )


def _effects(base: alt.Chart, rows: pd.DataFrame, title: str, size: int, shape: alt.Shape) -> Any:
    """Columns effect, low and high about a line at zero; the intervals only where any is known."""
    rule = base.mark_rule(strokeWidth=2.2).encode(x=alt.X("low:Q", title=title), x2="high:Q")
    point = base.mark_point(filled=True, size=size, opacity=1).encode(x=alt.X("effect:Q", title=title), shape=shape)
    return alt.layer(marks.zero_line("x"), *([rule] if rows["low"].notna().any() else []), point)


def worded(table: pd.DataFrame) -> pd.DataFrame:
    """With a column `what` that says what changes."""
    several = table["term"].duplicated(keep=False)  # pairs with more than two levels
    return table.assign(what=[term_text(row, more) for row, more in zip(each(table), several, strict=True)])


def _clear_effects(rows: pd.DataFrame) -> str:
    lines = [f"{row.what}: {row.text}" for row in each(rows[rows["clear"].astype(bool)].head(6))]
    if not lines:
        return "No interval excludes zero."
    return f"Those whose interval excludes zero, largest first: {'; '.join(lines)}."


# --- the same effects in several sources


def change_of(row: Any) -> str:
    return change(row.factor, row.reference, row.level)


def sources_figure(sources: Sources) -> Figure:
    """A point with its interval per source, side by side for each change of a setting."""
    rows = sources.effects.assign(
        what=[change_of(row) for row in each(sources.effects)],
        text=[interval(row.effect, row.low, row.high) for row in each(sources.effects)],
    )
    sizes = rows["effect"].abs().groupby(rows["what"]).max()
    largest = sizes.sort_values(ascending=False, kind="stable")
    shown = list(largest.index[:MOST_CHANGES])
    rows = rows[rows["what"].isin(shown)]
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
    chart = _effects(base, rows, f"change of {measure.axis}", 70, shape)
    left = f" The {len(largest) - len(shown)} smallest are in the table only." if len(largest) > len(shown) else ""
    within = " Tokens are those of each source's tokenizer, so sizes compare within a tokenizer alone."
    units = "" if sources.one_unit else within
    return Figure(
        "sources",
        "The same effect in each source",
        (Panel(chart, (10 + 14 * len(names)) * len(shown)),),
        f"What the same change of a setting does to the {measure.title} in each source, by its own experiments alone. Bars are 95% "
        f"intervals.{left}{units}",
        f"Dots with intervals: {len(shown)} changes of a setting in {len(names)} sources.",
    )


# --- interactions


def interactions_figure(pairs: Sequence[tuple[str, str, pd.DataFrame]]) -> Figure | None:
    """Means by two settings; `pairs` come with their cell means, the most important first."""
    pairs = [(a, b, means.dropna(subset=["mean"])) for a, b, means in pairs[:MOST_INTERACTIONS]]
    pairs = [(a, b, means) for a, b, means in pairs if len(means) > 2]
    if not pairs:
        return None
    ends = pd.concat([means[["low", "mean", "high"]] for _, _, means in pairs]).stack().dropna().to_numpy(float)
    domain = marks.domain(ends)
    return Figure(
        "interactions",
        "How settings act together",
        tuple(_interaction(a, b, means, domain) for a, b, means in pairs),
        "Mean validation loss at each combination of two settings. Parallel lines: the two add up. Lines that are not: one "
        "setting's effect depends on the other. Bars are 95% intervals of each mean's distance from the mean of all.",
        f"Lines of mean validation loss in {len(pairs)} plots. {'; '.join(_lowest(*pair) for pair in pairs)}.",
        columns=3,
    )


def _interaction(a: str, b: str, means: pd.DataFrame, domain: list[float]) -> Panel:
    at, by = ([value_text(v) for v in levels(means[f"level_{k}"])] for k in "ab")
    rows = means.assign(a=means["level_a"].map(value_text), b=means["level_b"].map(value_text))
    legend = alt.Legend(title=b, titleOrient="top", symbolType="circle", symbolSize=70, columns=4, columnPadding=8)
    # shades, as colours are for what a reader colours by
    base = marks.inline(records(rows[["a", "b", "mean", "low", "high", "n"]])).encode(
        x=alt.X("a:O", sort=at, title=a, axis=alt.Axis(labelAngle=0)),
        color=alt.Color("b:O", sort=by, legend=legend),
        tooltip=[
            alt.Tooltip("a:N", title=a),
            alt.Tooltip("b:N", title=b),
            alt.Tooltip("mean:Q", title=f"mean, {NATS}", format=".4f"),
            alt.Tooltip("n:Q", title="experiments"),
        ],
    )
    y = marks.y_of("val_loss", "mean", scale=alt.Scale(zero=False, domain=domain, nice=False))
    whisker = base.mark_rule(strokeWidth=1.2, opacity=0.6).encode(y=alt.Y("low:Q"), y2="high:Q")
    lines = [base.mark_line(strokeWidth=2.2).encode(y=y), base.mark_point(filled=True, size=60).encode(y=y)]
    return Panel(
        alt.layer(*([whisker] if rows["low"].notna().any() else []), *lines),
        210,
        title=f"{a} × {b}",
        meta={"means": [a, b]},
    )


def _lowest(a: str, b: str, means: pd.DataFrame) -> str:
    best = means.sort_values("mean", kind="stable").iloc[0]
    where = f"{a} {value_text(best['level_a'])} with {b} {value_text(best['level_b'])}"
    return f"{a} and {b}: lowest, {best['mean']:.4f}, at {where}"


# --- the noise, and shares of variance


def half_normal_figure(effects: Effects) -> Figure | None:
    """Absolute effects of all orders against half-normal quantiles."""
    table = effects.half_normal
    if table is None or table.empty:
        return None
    rows = table.assign(size=table["effect"].abs(), label="")
    rows = rows.sort_values("size", ignore_index=True)
    apart = (
        rows["size"].diff().fillna(0) > 0.06 * rows["size"].max()
    )  # a label lies left of its point, where smaller ones may be
    rows["label"] = rows["term"].where(apart & (rows.index >= len(rows) - MOST_LABELS), "")
    largest = rows.iloc[::-1].head(MOST_LABELS)
    base = marks.inline(records(rows[["term", "size", "quantile", "label"]])).encode(
        x=alt.X("quantile:Q", title="half-normal quantile, standard deviations"),
        y=alt.Y("size:Q", title=f"size of the effect, {NATS}"),
    )
    tooltip = [alt.Tooltip("term:N", title="effect of"), alt.Tooltip("size:Q", title=f"size, {NATS}", format=".4f")]
    layers: list[Any] = [
        base.mark_point(filled=True, size=60, opacity=1).encode(tooltip=tooltip),
        base.mark_text(align="right", dx=-8, dy=-2).encode(text="label:N"),
    ]
    return Figure(
        "half-normal",
        "Which effects stand out of the noise",
        (Panel(alt.layer(*layers), 340),),
        "Were nothing but noise at work, the points would lie on a straight line through the origin. Effects of all orders, "
        "interactions of three and more settings among them; those far above the line through the small ones stand out.",
        f"{len(rows)} effects by size against half-normal quantiles. The largest: {', '.join(map(str, largest['term']))}.",
    )


def variance_figure(effects: Effects) -> Figure | None:
    """Shares of the variance between experiments."""
    if effects.table.empty or effects.table["share"].isna().all():
        return None
    rows = effects.table.dropna(subset=["share"]).drop_duplicates("term")
    rows = rows.sort_values("share", ascending=False, kind="stable").head(MOST_BARS)
    rows = rows.assign(percent=100 * rows["share"], text=[f"{100 * share:.1f}%" for share in rows["share"]])
    end = 1.35 * float(rows["percent"].max()) or 1.0  # room for the words
    base = marks.inline(records(rows[["term", "percent", "text"]])).encode(
        y=alt.Y("term:N", sort=list(rows["term"]), title=None),
        x=alt.X(
            "percent:Q",
            title="share of the variance of validation loss, %",
            axis=alt.Axis(grid=True, values=list(range(0, 101, 20)) if end > 100 else alt.Undefined),
            scale=alt.Scale(domainMax=end),
        ),
        tooltip=[alt.Tooltip("term:N", title="effect of"), alt.Tooltip("text:N", title="share of variance")],
    )
    words = base.mark_text(align="left", dx=5).encode(text="text:N")
    bars = base.mark_bar(cornerRadiusEnd=2, height={"band": 0.66})
    return Figure(
        "variance",
        "Share of the variance that each explains",
        (Panel(alt.layer(bars, words), 22 * len(rows)),),
        "How much of the differences in validation loss between experiments goes with each setting and pair of settings.",
        f"Bars. {', '.join(f'{row.term} {row.text}' for row in each(rows.head(6)))}.",
    )
