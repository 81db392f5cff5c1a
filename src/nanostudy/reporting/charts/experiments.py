"""Figures of the experiments side by side: ranking, parts, parallel coordinates, what their samples are like."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import altair as alt
import numpy as np
import pandas as pd

from nanostudy.analysis.frames import Results, known, levels
from nanostudy.analysis.sample_quality import SHARES
from nanostudy.measures import MEASURES
from nanostudy.reporting.charts import marks
from nanostudy.reporting.charts.figure import GREY, INK, Figure, Panel, each, plain_value, records
from nanostudy.reporting.data import names_by_loss, spread, telling
from nanostudy.reporting.phrases import number
from nanostudy.study.names import SHORT, label
from nanostudy.text import counted, listed, value_text

MOST_RANKED = 30
MOST_LABELS = 12  # of an axis of parallel coordinates
MOST_LINES = 256  # of parallel coordinates
KINDS = ["lowest", "indistinguishable (95%)", "higher"]
QUALITIES = {  # what is measured of samples: a plot's title, its axis
    "words_real": ("real words", "words that exist in the text, %"),
    "speakers_real": ("real speakers", "speakers that exist in the text, %"),
    "dialogue_well_formed": ("well-formed dialogue", "speeches that are well formed, %"),
    "longest_copied": ("longest copied passage", "longest passage copied, characters"),
}


def ranking_figure(results: Results, ranking: pd.DataFrame) -> Figure | None:
    """Settings by their mean validation loss with its interval, the best first; every seed's own loss beside it."""
    if len(ranking) < 2:
        return None
    ranking = ranking.assign(i=ranking["name"].map(marks.places(results)), cell=ranking["name"].map(results.cells()))
    rows, replicated = ranked_cells(results, ranking)
    if rows.empty:
        return None
    top = rows.head(MOST_RANKED).copy()
    top["kind"] = np.where(top["tied"].astype(bool), KINDS[1], KINDS[2])
    top.loc[top.index[0], "kind"] = KINDS[0]
    colours = alt.Scale(domain=KINDS, range=[INK, INK, GREY])
    shapes = alt.Scale(domain=KINDS, range=["diamond", "circle", "circle"])
    labels = alt.Y("label:N", sort=list(top["label"]), title=None, axis=alt.Axis(grid=True))
    picked = "cell" if replicated else "i"
    base = marks.inline(records(top[["label", "mean", "low", "high", "n", "kind", picked]])).encode(
        y=labels,
        color=alt.Color("kind:N", scale=colours, legend=None),
        tooltip=[
            alt.Tooltip("label:N", title="settings" if replicated else "experiment"),
            alt.Tooltip("mean:Q", title="mean" if replicated else MEASURES["val_loss"].title, format=".4f"),
            alt.Tooltip("low:Q", title="from", format=".4f"),
            alt.Tooltip("high:Q", title="to", format=".4f"),
            alt.Tooltip("n:Q", title="seeds"),
        ],
    )
    layers = []
    if replicated:
        single = ranking.assign(label=ranking["name"].map(rows.attrs["labels"]))
        single = single[single["label"].isin(top["label"])][["label", "value", "name", "i"]]
        ticks = marks.inline(records(single)).mark_tick(thickness=1.5, size=9, opacity=0.8)
        layers.append(ticks.encode(y=labels, x="value:Q"))
    if with_intervals := rows["low"].notna().any():
        layers.append(base.mark_rule(strokeWidth=2).encode(x=marks.x_of("val_loss", "low"), x2="high:Q"))
    x, shape = marks.x_of("val_loss", "mean", scale=marks.FREE), alt.Shape("kind:N", scale=shapes, legend=None)
    layers.append(base.mark_point(filled=True, size=70, opacity=1).encode(x=x, shape=shape))
    what = "settings" if replicated else "experiments"
    tied = max(0, int(rows["tied"].astype(bool).sum()) - 1)
    return Figure(
        "ranking",
        "Ranking by validation loss",
        (Panel(alt.layer(*layers), 20 * len(top), brief=_brief(results, rows, replicated)),),
        _ranking_caption(len(rows), int((ranking["diverged"] > 0).sum()), replicated, bool(with_intervals)),
        f"{len(rows):,} {what}, from {number(rows['mean'].min())} to {number(rows['mean'].max())} nats per token. "
        f"Lowest: {rows['label'].iloc[0]}. Others that are indistinguishable from it: {tied:,}.",
    )


def _ranking_caption(count: int, lost: int, replicated: bool, with_intervals: bool) -> str:
    if count == 1:
        shown = "The one choice of settings"
    else:
        shown = f"The best {MOST_RANKED} of {count:,}" if count > MOST_RANKED else f"All {count:,}"
        shown += " settings" if replicated else " experiments"
    caption = f"{shown} by validation loss{', with 95% intervals' if with_intervals else ''}."
    caption += f" Left out: {counted(lost, 'experiment')} whose settings diverged with another seed." if lost else ""
    if count > 1:
        alike = "indistinguishable from it (95%)" if with_intervals else "not known to be higher"
        caption += f" Diamond: the lowest; black: {alike}; grey: higher."
    return f"{caption} Ticks are the seeds." if replicated else caption


def _brief(results: Results, rows: pd.DataFrame, replicated: bool) -> dict[str, str]:
    """Labels, each with its settings as a name has them."""
    settings = marks.varying(results) if replicated else telling(results)
    table = results.experiments.loc[list(rows["name"]), list(settings)]
    return {
        text: label({str(k): v for k, v in row.items()}, settings)
        for text, row in zip(rows["label"], table.to_dict("records"), strict=True)
    }


def ranked_cells(results: Results, ranking: pd.DataFrame) -> tuple[pd.DataFrame, bool]:
    """label, mean, low, high, n, tied by settings, the lowest mean first, and whether any have several seeds. Settings that diverged
    with a seed are left out.

    Labels are names where each stands alone; attrs["labels"] maps names to them.
    """
    replicated = bool((ranking["n"] > 1).any())
    names = [str(name) for name in ranking["name"]]
    labels = dict(zip(names, names, strict=True))
    if replicated:
        labels = {name: text or "all" for name, text in settings_texts(results, names).items()}
    rows = ranking[ranking["diverged"] == 0]
    rows = rows.assign(label=rows["name"].map(labels)).drop_duplicates("label").sort_values("mean", kind="stable")
    rows.attrs["labels"] = labels
    return rows, replicated


def settings_texts(results: Results, names: Sequence[str]) -> dict[str, str]:
    """Of each experiment what varies: n_embd 128, dropout 0.1."""
    settings = marks.varying(results)
    rows = results.experiments.loc[list(names), settings].itertuples(index=False, name=None)
    texts = (", ".join(f"{key} {value_text(value)}" for key, value in zip(settings, row, strict=True)) for row in rows)
    return dict(zip(names, texts, strict=True))


def parts_figure(means: pd.DataFrame, colour: str) -> Figure | None:
    """Each experiment in its part, with the part's mean."""
    if len(means) < 2:
        return None
    order = list(means["part"])
    dots = (
        marks.points("isValid(datum.val_loss)", 45, 0.7)
        .transform_calculate(jitter="((datum.i * 7919) % 101) / 50.5 - 1")
        .encode(
            y=alt.Y("part:N", sort=order, title=None),
            yOffset=alt.YOffset("jitter:Q", scale=alt.Scale(domain=[-1.6, 1.6])),
            x=marks.x_of("val_loss", scale=marks.FREE, axis=alt.Axis(grid=True)),
            tooltip=[*marks.WHO, marks.tip("val_loss")],
        )
    )
    base = marks.inline(records(means)).encode(y=alt.Y("part:N", sort=order))
    bar = base.transform_filter("isValid(datum.low)").mark_rule(style="front", strokeWidth=2.4)
    bar = bar.encode(x="low:Q", x2="high:Q")
    mean = base.mark_point(style="mean", shape="diamond", filled=True, size=130, opacity=1).encode(x="mean:Q")
    lines = [f"{row.part}: mean {number(row.mean)}, best {number(row.best)}, n = {row.n}" for row in each(means)]
    return Figure(
        "parts",
        "The parts compared",
        (Panel(alt.layer(dots, bar, mean), 58 * len(means)),),
        "Dots are experiments, diamonds the means over each part's settings, with 95% intervals of the noise between seeds where it is "
        "known. Parts with other settings have other means: a difference need not be that of what names them.",
        f"Validation loss by part. {'; '.join(lines)}.",
        parameters=marks.parameters(colour),
    )


def parallel_figure(results: Results) -> Figure | None:
    """One line per experiment through the levels of its settings to its loss."""
    table = results.finished
    axes = marks.varying(results)
    if not axes or len(table) < 2:
        return None
    loss = table["val_loss"].astype(float)
    low, high = float(loss.min()), float(loss.max())
    names = [*axes, MEASURES["val_loss"].title]
    heights, labels, bands = _heights(table, axes)
    heights[names[-1]] = (loss - low) / marks.width(low, high)
    labels += [{"axis": names[-1], "at": at, "level": number(low + at * (high - low), 3)} for at in (0, 0.5, 1)]
    drawn = spread(names_by_loss(results), MOST_LINES)
    place = marks.places(results)
    rows = [
        {"i": place[name], "axis": axis, "at": round(at, 4), "loss": float(loss[name])}
        for name in drawn
        for axis in names
        if known(at := float(heights[axis][name]))
    ]
    bands["val_loss"] = {"title": names[-1], "ends": [low, low + marks.width(low, high)]}
    meta = {"axes": bands, **marks.line_meta("", "axis", "at", {"loss": MEASURES["val_loss"].axis})}
    brief = {name: SHORT[name].rstrip("=") for name in axes if name in SHORT} | {names[-1]: "loss"}
    x = alt.X("axis:N", sort=names, title=None, axis=alt.Axis(orient="top", labelOverlap=False))
    y = alt.Y("at:Q", axis=None, scale=alt.Scale(domain=[-0.02, 1.02]))
    legend = alt.Legend(title=MEASURES["val_loss"].axis, titleLimit=0, gradientLength=160, format=".2f")
    colour = alt.Color("loss:Q", legend=legend)
    lines = marks.lines(marks.inline(rows), colour, min(0.85, 14 / len(drawn) + 0.35), 0.06).encode(x=x, y=y)
    words = marks.with_halo(marks.inline(labels).encode(x=x, y=y), "level", align="right", dx=-7, fontWeight="bold")
    best = table.loc[str(loss.idxmin())]
    through = listed([f"{axis} {value_text(best[axis])}" for axis in axes])
    some = f" {MOST_LINES} of {len(table):,} are drawn." if len(drawn) < len(table) else ""
    return Figure(
        "parallel",
        "Every experiment through its settings",
        (Panel(alt.layer(lines, *words), 380, meta=meta, brief=brief),),
        f"One line per experiment, from setting to setting to its validation loss; within a level, the better are lower.{some}",
        f"{len(table):,} lines. The best, at {number(low)} nats per token, goes through {through}.",
        parameters={"chosen": [], "hovered": -1},
    )


def _heights(
    table: pd.DataFrame, axes: list[str]
) -> tuple[dict[str, pd.Series], list[dict[str, Any]], dict[str, dict[str, Any]]]:
    """Where each line meets each axis, 0 to 1 (a band per level, the better lower within it), the levels' labels, and their bands."""
    heights, labels, bands = {}, [], {}
    for axis in axes:
        present = levels(table[axis])
        at = {level: (k + 0.5) / len(present) for k, level in enumerate(present)}
        named = {level: value_text(level) for level in present}
        if len(present) > MOST_LABELS:  # of a search: the lowest, the middle and the highest, in three digits
            few = (present[0], present[len(present) // 2], present[-1])
            named = {level: f"{level:.3g}" if isinstance(level, float) else value_text(level) for level in few}
        labels += [{"axis": axis, "at": at[level], "level": text} for level, text in named.items()]
        rank = table.groupby(axis)["val_loss"].rank(pct=True) - 0.5
        heights[axis] = table[axis].map(at).astype(float) + 0.62 / len(present) * rank
        levels_at = [(plain_value(level), round(y, 4)) for level, y in at.items()]
        bands[axis] = {"title": axis, "levels": levels_at, "half": round(0.31 / len(present), 4)}
    return heights, labels, bands


def quality_figure(results: Results, quality: pd.DataFrame) -> Figure | None:
    """What samples are like against validation loss."""
    panels, medians = [], []
    for column, (title, axis) in QUALITIES.items():
        interval = [f"{column}_low", f"{column}_high"] if column in SHARES else []
        rows = quality[[column, *interval]].dropna().join(results.finished[["val_loss"]], how="inner")
        rows = rows.reset_index(names="name")
        if len(rows) < 2:
            continue
        tips = {column: axis, **dict(zip(interval, ("from", "to"), strict=False))}
        medians.append(f"{title}, median {format(quality[column].median(), '.0%' if interval else '.0f')}")
        rows["i"] = rows["name"].map(marks.places(results))
        rows[[column, *interval]] *= 100 if interval else 1
        base = marks.inline(records(rows))
        dots = base.mark_point(filled=True, size=50).encode(
            x=marks.x_of("val_loss", scale=marks.FREE),
            y=alt.Y(f"{column}:Q", title=axis, scale=marks.FREE),
            opacity=marks.fading(0.8, 0.1),
            tooltip=[marks.WHO[0], *(alt.Tooltip(f"{c}:Q", title=t, format=".3~f") for c, t in tips.items())],
        )
        ends = {channel: f"{name}:Q" for channel, name in zip(("y", "y2"), interval, strict=False)}
        bars = [base.mark_rule(opacity=0.35).encode(x="val_loss:Q", **ends)] if interval else []
        panels.append(Panel(alt.layer(*bars, dots), 220, title=title))
    if not panels:
        return None
    return Figure(
        "quality",
        "What the samples are like, against loss",
        tuple(panels),
        "Each dot is an experiment's samples, measured, shares with their 95% intervals; to the left are the lower losses.",
        f"Of {counted(len(quality), 'experiment')}: {'; '.join(medians)}.",
        columns=2,
        parameters={"chosen": []},
    )
