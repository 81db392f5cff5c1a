"""The figure of one training: losses, loss gap, learning rate and gradient norm against updates."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import altair as alt

from nanostudy.analysis.curves import Row, best, binned, finite, gap
from nanostudy.measures import MEASURES, NATS
from nanostudy.reporting.charts import marks
from nanostudy.reporting.charts.figure import BLUE, PALE, VERMILLION, Figure, Panel

HEIGHT, LOW_HEIGHT = 310, 60  # of the losses and of what lies below them, pixels at scale 1
MOST_POINTS = 2000  # of a line; longer ones are drawn as means
EXACT = ("train_loss", "val_loss")  # columns of evaluations.csv
AXIS = 46  # pixels that every vertical axis takes, so that all panels are as wide

# A column's name in the legend, colour, width of line and size of points; the last is drawn first. Where
# validation covers training, the wider line shows.
LINES: dict[str, tuple[str, str, float, int]] = {
    "val_loss": ("validation, whole split", VERMILLION, 2.0, 32),
    "train_loss": ("training, fixed windows", BLUE, 3.2, 72),
    "loss": ("training batches", PALE, 1.2, 0),
}


def training_figure(
    evaluations: Sequence[Row],
    training: Sequence[Row],
    caption: str = "",
    alternative: str = "",
    *,
    entropy: float | None = None,
    grad_clip: float = 0.0,
) -> Figure | None:
    """Takes the rows of a run folder's two tables; None without a loss to draw.

    `entropy` is the validation text's, in nats per token.
    """
    last = max([1, *(int(row["step"]) for row in (*evaluations, *training))])
    evaluations = [row for row in finite(evaluations, *EXACT) if all(row[column] > 0 for column in EXACT)]
    training = [row for row in finite(training, "loss", "grad_norm") if row["loss"] > 0]
    if not evaluations and not training:
        return None
    rows, size = binned(training, MOST_POINTS)
    mean = f", means of {size} rows" if size > 1 else ""
    with_gap = len(evaluations) > 1
    panels = [
        Panel(
            _losses(evaluations, rows, mean, last, entropy, labelled=not rows and not with_gap), HEIGHT, f"loss, {NATS}"
        )
    ]
    if with_gap:
        gaps = marks.inline([{"step": row["step"], "gap": round(gap(row), 5)} for row in evaluations])
        y = alt.Y("gap:Q", axis=_axis(tickCount=3))
        chart = alt.layer(marks.zero_line("y"), _line(gaps, _updates(last, not rows)).encode(y=y))
        panels.append(Panel(chart, LOW_HEIGHT, MEASURES["gap"].axis))
    if rows:
        panels += [_learning_rate(rows, _updates(last)), _gradient_norm(rows, mean, last, grad_clip)]
    return Figure("curve", "Training and validation curves", tuple(panels), caption, alternative)


def _losses(
    evaluations: list[Row], rows: list[Row], mean: str, last: int, entropy: float | None, *, labelled: bool
) -> Any:
    low, high = _loss_domain(evaluations, rows, entropy)
    scale = alt.Scale(type="log", domain=[low, high], nice=False)
    axis = _axis(values=log_ticks(low, high), format=".4~g")
    x, y = _updates(last, labelled), alt.Y("loss:Q", axis=axis, scale=scale)
    tables = {"val_loss": evaluations, "train_loss": evaluations, "loss": rows}
    lines = {column: LINES[column] for column in LINES if tables[column]}
    names = {column: name + (mean if column == "loss" else "") for column, (name, *_) in lines.items()}
    legend = alt.Legend(title=None, symbolType="stroke", symbolStrokeWidth=3, symbolSize=260, labelLimit=0)
    colours = alt.Scale(domain=[*names.values()], range=[colour for _, colour, *_ in lines.values()])
    tooltip = [alt.Tooltip("what:N", title="loss"), marks.UPDATE, alt.Tooltip("loss:Q", title=NATS, format=".4f")]
    layers: list[Any] = []
    for column, (_, _, width, points) in reversed(lines.items()):
        values = [{"step": row["step"], "loss": round(row[column], 5), "what": names[column]} for row in tables[column]]
        base = marks.inline(values).encode(x=x, y=y, color=alt.Color("what:N", scale=colours, legend=legend))
        layers.append(base.mark_line(strokeWidth=width, opacity=1 if points else 0.6, clip=True))
        if points:
            layers.append(base.mark_point(size=points, filled=True, opacity=1).encode(tooltip=tooltip))
    if entropy:
        label = [{"step": 0, "loss": entropy, "label": f"entropy of the validation text: {entropy:.4f}"}]
        words = {"align": "left", "baseline": "top", "dx": 4, "dy": 6}
        layers += [
            _dashed(y, "loss", entropy, last),
            *marks.with_halo(marks.inline(label).encode(x=x, y=y), "label", **words),
        ]
    if evaluations:
        layers += _best_mark(x, y, evaluations, last, math.log(high / low))
    return alt.layer(*layers)


def _dashed(y: Any, column: str, value: float, last: int) -> Any:
    ends = [{"step": step, column: value} for step in (0, last)]
    return marks.inline(ends).mark_line(style="zero").encode(x=alt.X("step:Q"), y=y)


def _best_mark(x: Any, y: Any, evaluations: list[Row], last: int, height: float) -> list[Any]:
    """A ring, and a label where there is room, over what the curve does there. `height`: of the axis, ln of losses."""
    row = best(evaluations)
    label = f"lowest: {row['val_loss']:.4f} at update {int(row['step']):,}"
    base = marks.inline([{"step": row["step"], "loss": row["val_loss"], "label": label}]).encode(x=x, y=y)
    leftwards = row["step"] > 0.7 * last
    side = 1 if leftwards else -1
    under = [r["val_loss"] for r in evaluations if 0 <= side * (row["step"] - r["step"]) < 0.3 * last]
    lift = HEIGHT * math.log(max(under) / row["val_loss"]) / height
    place = {"align": "right", "dx": 0} if leftwards else {"align": "left", "dx": 12}
    words = {**place, "dy": -20 - min(lift, 60), "fontWeight": "bold"}
    return [
        base.mark_point(style="front", size=170, filled=False, strokeWidth=2),
        *marks.with_halo(base, "label", **words),
    ]


# --- below the losses


def _learning_rate(rows: list[Row], x: alt.X) -> Panel:
    peak = max(row["learning_rate"] for row in rows) or 1.0
    label = "datum.value == 0 ? '0' : format(datum.value, '.2~e')"
    y = alt.Y(
        "learning_rate:Q",
        axis=_axis(values=[0, peak], labelExpr=label),
        scale=alt.Scale(domain=[0, peak * 1.05], nice=False),
    )
    return Panel(_line(_column(rows, "learning_rate"), x).encode(y=y), LOW_HEIGHT, "learning rate")


def _gradient_norm(rows: list[Row], mean: str, last: int, clip: float) -> Panel:
    """With the bound as a line where that leaves the norms readable."""
    rows = [row for row in rows if row["grad_norm"] > 0]
    norms = [row["grad_norm"] for row in rows] or [1.0]
    bound = [clip] if min(norms) / 10 < clip < max(norms) * 10 else []
    low, high = min(*norms, *bound, math.inf) / 1.1, max(*norms, *bound, 0.0) * 1.1
    axis = _axis(values=log_ticks(low, high, most=3), format=",.4~g")
    y = alt.Y("grad_norm:Q", axis=axis, scale=alt.Scale(type="log", domain=[low, high], nice=False))
    words = f"clipped to {clip:g}" if clip else "not clipped"
    dashed = [_dashed(y, "grad_norm", value, last) for value in bound]
    chart = alt.layer(*dashed, _line(_column(rows, "grad_norm"), _updates(last, labelled=True)).encode(y=y))
    return Panel(chart, LOW_HEIGHT, f"gradient norm{mean} ({'dashed: ' if bound else ''}{words})")


def _column(rows: list[Row], name: str) -> Any:
    return marks.inline([{"step": row["step"], name: float(f"{row[name]:.5g}")} for row in rows])


def _line(chart: Any, x: alt.X) -> Any:
    return chart.mark_line(style="front").encode(x=x)


# --- axes


def _axis(**settings: Any) -> alt.Axis:
    return alt.Axis(title=None, grid=True, minExtent=AXIS, maxExtent=AXIS, **settings)


def _updates(last: int, labelled: bool = False) -> alt.X:
    """Only the lowest panel is labelled."""
    ticks: dict[str, Any] = {"tickCount": 8} if last >= 10 else {"values": list(range(last + 1))}
    axis = alt.Axis(
        title="updates" if labelled else None, labels=labelled, ticks=labelled, grid=True, format=",d", **ticks
    )
    return alt.X("step:Q", axis=axis, scale=alt.Scale(domain=[0, last], nice=False))


def _loss_domain(evaluations: list[Row], rows: list[Row], entropy: float | None) -> tuple[float, float]:
    """From under the lowest line to over the first loss, with room for labels; batches may leave it at the edges."""
    exact = [row[column] for row in evaluations for column in EXACT]
    batches = sorted(row["loss"] for row in rows)
    high = max(exact or batches)
    high = max(high, min(batches[-1], 2 * high)) if batches else high
    low = min([*exact, *([entropy] if entropy else []), *batches[len(batches) // 100 :][:1]])
    if high / low < 1.02:
        low, high = low / 1.02, high * 1.02
    room = high / low
    return low / room ** (0.1 if entropy else 0.06), high * room**0.04


def log_ticks(low: float, high: float, most: int = 8) -> list[float]:
    """Round numbers within, for a logarithmic axis: evenly spaced over a short range, else 1-2-5 or the like."""
    if high / low < 3:
        unit = 10.0 ** math.floor(math.log10((high - low) / most))
        step = next(m * unit for m in (1, 2, 2.5, 5, 10, 20) if (high - low) / (m * unit) <= most)
        return [round(i * step, 12) for i in range(math.ceil(low / step), math.floor(high / step) + 1)]
    powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    ticks: list[float] = []
    for mantissas in ((1, 1.5, 2, 2.5, 3, 4, 5, 6, 8), (1, 1.5, 2, 3, 4, 6), (1, 2, 3, 5), (1, 2, 5), (1,)):
        finer, ticks = ticks, [m * 10.0**p for p in powers for m in mantissas if low <= m * 10.0**p <= high]
        if len(ticks) < 2:
            ticks = finer[:: math.ceil(len(finer) / most)]
        if len(ticks) <= most:
            return ticks
    return ticks[:: math.ceil(len(ticks) / most)]
