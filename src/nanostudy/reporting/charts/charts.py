"""Figures of the experiments themselves: ranking, curves, gaps, fronts, parts, parallel coordinates, scaling, samples.

Each takes what is analysed and gives a figure, or the sentence that says why there is none.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import altair as alt
import numpy as np
import pandas as pd

from nanostudy.analysis.frames import Results, levels
from nanostudy.reporting.charts.figure import BLUE, GREY, LOSS, VERMILLION, Figure, Panel, each, records
from nanostudy.reporting.page_data import spread
from nanostudy.reporting.phrases import level_text, listed, nats

MOST_RANKED = 30
MOST_LINES = 256  # of parallel coordinates
COLOUR = "colour"  # the page's parameter: the column that colours
FADED = "length(chosen) && indexof(chosen, datum.i) < 0"  # where experiments are chosen, the others step back


def colourings(results: Results, strongest: Sequence[str] = ()) -> list[str]:
    """The columns by which points and curves can be coloured: settings first, those with the strongest effects before others."""
    table = results.experiments
    order = [name for name in strongest if name in results.factors]
    settings = [*order, *(name for name in results.factors if name not in order)]
    at_work = [name for name in settings if len(levels(results.finished[name])) > 1]
    settings = [*at_work, *(name for name in settings if name not in at_work)]
    others = [name for name in ("part", "status", "device", "precision") if table[name].nunique(dropna=True) > 1]
    seeds = ["seed"] if 1 < table["seed"].nunique(dropna=True) <= 12 else []
    named = [] if len(table) > 12 else ["name"]
    return [*settings, *others, *seeds, *named] or ["status"]


def parameters(colour: str) -> dict[str, Any]:
    return {COLOUR: colour, "chosen": []}


def shared(mark: str, **settings: Any) -> alt.Chart:
    """A chart of the page's experiments, with the group that colours them."""
    chart = alt.Chart(alt.NamedData(name="experiments")).transform_calculate(group=GROUP)
    return getattr(chart, f"mark_{mark}")(**settings)


GROUP = f"isValid(datum[{COLOUR}]) ? datum[{COLOUR}] : 'not known'"
TIP = [alt.Tooltip("name:N", title="experiment"), alt.Tooltip("group:N", title="colour")]


def group_colour(symbol: str = "circle") -> alt.Color:
    return alt.Color("group:N", legend=alt.Legend(title=None, symbolType=symbol, symbolSize=80, symbolStrokeWidth=2.5))


def fading(strong: float, faint: float) -> Any:
    return alt.condition(FADED, alt.value(faint), alt.value(strong))


# --- ranking


def ranking_figure(results: Results, ranking: pd.DataFrame) -> Figure | str:
    """Settings by their mean validation loss with its interval, the best first; every seed's own loss beside it."""
    if ranking.empty:
        return "No experiment has finished, so there is nothing to rank."
    rows, replicated = ranked_cells(results, ranking)
    shown = rows.head(MOST_RANKED).copy()
    kinds = ["lowest", "cannot be told from the lowest", "higher"]
    shown["what"] = np.where(shown["tied"].astype(bool), kinds[1], kinds[2])
    shown.loc[shown.index[0], "what"] = kinds[0]
    columns = ["label", "mean", "low", "high", "n", "what"]
    base = alt.Chart(alt.InlineData(values=records(shown[columns]))).encode(
        y=alt.Y("label:N", sort=list(shown["label"]), title=None, axis=alt.Axis(grid=True)),
        color=alt.Color(
            "what:N",
            scale=alt.Scale(domain=kinds, range=[VERMILLION, BLUE, GREY]),
            legend=alt.Legend(title=None, symbolType="circle"),
        ),
        tooltip=[
            alt.Tooltip("label:N", title="settings" if replicated else "experiment"),
            alt.Tooltip("mean:Q", title="mean" if replicated else "validation loss", format=".4f"),
            alt.Tooltip("low:Q", title="from", format=".4f"),
            alt.Tooltip("high:Q", title="to", format=".4f"),
            alt.Tooltip("n:Q", title="seeds"),
        ],
    )
    x = alt.X("mean:Q", title=LOSS, scale=alt.Scale(zero=False))
    rule = base.mark_rule(strokeWidth=2).encode(x=alt.X("low:Q", title=LOSS), x2="high:Q")
    layers = [
        *([rule] if shown["low"].notna().any() else []),
        base.mark_point(filled=True, size=70, opacity=1).encode(x=x),
    ]
    if replicated:
        single = ranking.assign(label=ranking["name"].map(rows.attrs["labels"]))
        single = single[single["label"].isin(list(shown["label"]))][["label", "value", "name"]]
        seeds = alt.Chart(alt.InlineData(values=records(single)))
        tick: dict[str, Any] = {"thickness": 1.5, "size": 9, "opacity": 0.8}
        layers.insert(0, seeds.mark_tick(**tick).encode(y=alt.Y("label:N", sort=list(shown["label"])), x="value:Q"))
    what = "settings" if replicated else "experiments"
    count = f"the best {len(shown)} of {len(rows):,} {what}" if len(shown) < len(rows) else f"all {len(rows):,} {what}"
    bars = ", with 95% intervals" if rows["low"].notna().any() else ""
    ticks = " Ticks are the seeds." if replicated else ""
    caption = f"{count[:1].upper()}{count[1:]} by validation loss{bars}.{ticks}"
    spread = f"from {nats(rows['mean'].min())} to {nats(rows['mean'].max())} nats per token"
    tied = max(0, int(rows["tied"].astype(bool).sum()) - 1)
    alternative = f"{len(rows):,} {what}, {spread}. Lowest: {rows['label'].iloc[0]}. Others that cannot be told from it: {tied:,}."
    return Figure(
        "ranking", "Ranking by validation loss", (Panel(layered(*layers), 20 * len(shown)),), caption, alternative
    )


def ranked_cells(results: Results, ranking: pd.DataFrame) -> tuple[pd.DataFrame, bool]:
    """label, mean, low, high, n, tied by settings, the lowest mean first, and whether any have several seeds.

    Labels are names where each stands alone; attrs["labels"] maps names to them.
    """
    replicated = bool((ranking["n"] > 1).any())
    axes = [name for name in results.factors if len(levels(results.finished[name])) > 1]
    names = [str(name) for name in ranking["name"]]
    labels = dict(zip(names, names, strict=True))
    if replicated:
        table = results.experiments
        labels = {
            name: ", ".join(f"{axis} {level_text(table.loc[name][axis])}" for axis in axes) or "all" for name in names
        }
    rows = ranking.assign(label=ranking["name"].map(labels)).drop_duplicates("label").sort_values("mean", kind="stable")
    rows.attrs["labels"] = labels
    return rows, replicated


def layered(*charts: Any) -> Any:
    return alt.layer(*charts) if len(charts) > 1 else charts[0]


def zero_line(channel: str) -> alt.Chart:
    return alt.Chart(alt.InlineData(values=[{"zero": 0}])).mark_rule(style="zero").encode(**{channel: "zero:Q"})


def magnitudes() -> alt.Axis:
    return alt.Axis(format="~s", tickCount=5)


# --- parts, settings and text


def parts_figure(results: Results, means: pd.DataFrame, colour: str) -> Figure | str:
    """Each experiment in its part, with the part's mean."""
    if len(means) < 2:
        return "Comparing parts needs finished experiments in at least two of them."
    order = list(means["part"])
    dots = (
        shared("point", filled=True, size=45)
        .transform_filter("isValid(datum.val_loss) && datum.status == 'finished'")
        .encode(
            y=alt.Y("part:N", sort=order, title=None),
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
    mean = base.mark_point(style="mean", shape="diamond", filled=True, size=130, opacity=1).encode(x="mean:Q")
    shown = "; ".join(f"{row.part}: mean {nats(row.mean)}, best {nats(row.best)}, n = {row.n}" for row in each(means))
    return Figure(
        "parts",
        "The parts compared",
        (Panel(alt.layer(dots, bar, mean), 58 * len(means)),),
        "Dots are experiments, diamonds the parts' means with 95% intervals over their experiments.",
        f"Validation loss by part. {shown}.",
        parameters=parameters(colour),
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
        room = 0.62 / len(present)
        rank = table.groupby(factor)["val_loss"].rank(pct=True) - 0.5
        places[factor] = table[factor].map(at).astype(float) + room * rank
    loss = table["val_loss"]
    low, high = float(loss.min()), float(loss.max())
    places["validation loss"] = (loss - low) / ((high - low) or 1.0)
    labels += [{"axis": "validation loss", "at": at, "told": nats(low + at * (high - low), 3)} for at in (0, 0.5, 1)]
    names = [*axes, "validation loss"]
    drawn = spread([str(name) for name in table.sort_values("val_loss", kind="stable").index], MOST_LINES)
    place = {name: i for i, name in enumerate(results.experiments.index)}
    rows = [
        {"i": place[name], "axis": axis, "at": round(float(places[axis][name]), 4), "loss": round(float(loss[name]), 5)}
        for name in drawn
        for axis in names
        if places[axis][name] == places[axis][name]
    ]
    axis = alt.X(
        "axis:N",
        sort=names,
        title=None,
        axis=alt.Axis(orient="top"),
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
                legend=alt.Legend(title=LOSS, gradientLength=160, format=".2f"),
            ),
            strokeOpacity=alt.condition(FADED, alt.value(0.06), alt.value(min(0.85, 14 / len(drawn) + 0.25))),
        )
    )
    base = alt.Chart(alt.InlineData(values=labels)).encode(x=axis, y=y, text="told:N")
    place_of: dict[str, Any] = {"align": "right", "dx": -7, "fontWeight": "bold"}
    halo, words = base.mark_text(style="halo", **place_of), base.mark_text(**place_of)
    best = table.sort_values("val_loss", kind="stable").iloc[0]
    through = listed([f"{factor} {level_text(best[factor])}" for factor in axes])
    return Figure(
        "parallel",
        "Every experiment through its settings",
        (Panel(alt.layer(lines, halo, words), 380),),
        "A line an experiment, from setting to setting to its validation loss; within a level, the better are lower."
        + (f" {MOST_LINES} of {len(table):,} are drawn." if len(drawn) < len(table) else ""),
        f"{len(table):,} lines. The best, at {nats(low)} nats per token, goes through {through}.",
        parameters={"chosen": []},
    )
