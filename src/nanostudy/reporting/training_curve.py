"""The figures, each once: a chart object serves the PNG and, with its tooltips, an interactive page."""

from __future__ import annotations

import math
import subprocess
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from nanostudy.analysis.curves import Row, best, binned, finite

if TYPE_CHECKING:
    import altair as alt

WIDTH, HEIGHT, PANEL_HEIGHT = 820, 310, 54  # of the plots, pixels at scale 1
MOST_POINTS = 2000  # of a line; longer ones are drawn as means
LOSS = "cross entropy, nats per token"
INK, RATES = "#333333", "#009E73"
EXACT = ("train_loss", "val_loss")  # columns of evaluations.csv

# A column's name in the legend, colour, width of line and size of points; the last is drawn first. Colours are Okabe &
# Ito's, which colour-blind readers can tell apart, the batches' a tint of the training's. Where validation covers
# training, the wider line shows.
LINES = {
    "val_loss": ("validation, whole split", "#D55E00", 2.0, 32),
    "train_loss": ("training, fixed windows", "#0072B2", 3.2, 72),
    "loss": ("training batches", "#B9D7EA", 1.2, 0),
}


# What the drawing process runs: a Vega-Lite specification in, a PNG out.
DRAW = """
import sys, vl_convert
spec, (version, scale) = sys.stdin.buffer.read().decode(), sys.argv[1:]
sys.stdout.buffer.write(vl_convert.vegalite_to_png(spec, vl_version=version, scale=float(scale)))
"""


class DrawingFailed(Exception):
    """The chart could not be made a picture here."""


class NothingToDraw(ValueError):
    """No row has a loss that a chart could show."""


def training_curve(
    evaluations: Sequence[Row],
    training: Sequence[Row],
    title: str,
    subtitle: Sequence[str] = (),
    *,
    entropy: float | None = None,
    grad_clip: float = 0.0,
) -> alt.VConcatChart:
    """Losses against updates, the learning rate and the gradient norm below them.

    Takes the rows of a run folder's two tables. `entropy` is the validation text's, in nats per token. Raises
    NothingToDraw.
    """
    import altair as alt

    last = max([1, *(int(row["step"]) for row in (*evaluations, *training))])
    evaluations = [row for row in finite(evaluations, *EXACT) if all(row[column] > 0 for column in EXACT)]
    training = [row for row in finite(training, "loss", "grad_norm") if row["loss"] > 0]
    if not evaluations and not training:
        raise NothingToDraw
    rows, size = binned(training, MOST_POINTS)
    mean = f", means of {size} rows" if size > 1 else ""
    panels = [_losses(alt, evaluations, rows, mean, last, entropy, labelled=not rows)]
    if rows:
        panels += [_learning_rate(alt, rows, last), _gradient_norm(alt, rows, mean, last, grad_clip)]
    heading = alt.Title(title, subtitle=list(subtitle), fontSize=17, color="#111111", offset=10)
    return (
        alt.vconcat(*panels, spacing=14, title=heading)
        .configure(font="Roboto, Helvetica, Arial, sans-serif", background="white", padding=14)
        .configure_view(stroke=None)
        .configure_axis(labelColor=INK, titleColor=INK, labelFontSize=12, titleFontSize=13, titleFontWeight="normal")
        .configure_axisX(gridColor="#EAEAEA", domainColor="#999999", tickColor="#999999")
        .configure_axisY(gridColor="#EAEAEA", domain=False, ticks=False, labelPadding=6, minExtent=38, maxExtent=38)
        .configure_legend(labelFontSize=12.5, labelColor=INK, symbolStrokeWidth=3, symbolSize=260, symbolOpacity=1)
        .configure_title(
            anchor="start", frame="group", subtitleFontSize=12.5, subtitleColor="#555555", subtitlePadding=5
        )
    )


def png(chart: alt.TopLevelMixin, scale: float = 2.0) -> bytes:
    """The chart as a picture, with `scale` pixels for each of its own. Raises DrawingFailed.

    Drawn by a process of its own: the engine inside asks for far more address space than it uses, and where a cluster
    limits that it takes its process down.
    """
    import altair

    version = ".".join(altair.SCHEMA_VERSION.split(".")[:2])
    command = [sys.executable, "-c", DRAW, version, str(scale)]
    drawn = subprocess.run(command, input=chart.to_json().encode(), capture_output=True, check=False)
    if drawn.returncode:
        said = drawn.stderr.decode(errors="replace").strip().splitlines()
        raise DrawingFailed(said[-1] if said else f"the drawing process ended with {drawn.returncode}")
    return drawn.stdout


# --- panels


def _losses(
    alt: Any, evaluations: list[Row], rows: list[Row], mean: str, last: int, entropy: float | None, *, labelled: bool
) -> Any:
    low, high = _loss_domain(evaluations, rows, entropy)
    axis = alt.Axis(values=log_ticks(low, high), format=".4~g")
    y = alt.Y("loss:Q", title=LOSS, axis=axis, scale=alt.Scale(type="log", domain=[low, high], nice=False))
    x = _updates(alt, last, labelled)
    tables = {"val_loss": evaluations, "train_loss": evaluations, "loss": rows}
    shown = {column: LINES[column] for column in LINES if tables[column]}
    names = {column: name + (mean if column == "loss" else "") for column, (name, *_) in shown.items()}
    place = {"orient": "top", "direction": "horizontal", "columnPadding": 22}
    legend = alt.Legend(title=None, symbolType="stroke", labelLimit=0, **place)
    scale = alt.Scale(domain=[*names.values()], range=[colour for _, colour, *_ in shown.values()])
    colour = alt.Color("what:N", scale=scale, legend=legend)
    tooltip = [
        alt.Tooltip("what:N", title="loss"),
        alt.Tooltip("step:Q", title="update", format=",d"),
        alt.Tooltip("loss:Q", title="nats per token", format=".4f"),
    ]
    layers = []
    for column, (_, _, width, size) in reversed(shown.items()):
        values = [{"step": row["step"], "loss": row[column], "what": names[column]} for row in tables[column]]
        base = _chart(alt, values).encode(x=x, y=y, color=colour)
        layers.append(base.mark_line(strokeWidth=width, clip=True))
        if size:
            layers.append(base.mark_point(size=size, filled=True, opacity=1).encode(tooltip=tooltip))
    if entropy:
        layers += _entropy_line(alt, x, y, last, entropy)
    if evaluations:
        layers += _best_mark(alt, x, y, evaluations, last, math.log(high / low))
    return alt.layer(*layers).properties(width=WIDTH, height=HEIGHT)


def _entropy_line(alt: Any, x: Any, y: Any, last: int, entropy: float) -> list[Any]:
    data = [{"step": 0, "loss": entropy, "label": f"entropy of the validation text: {entropy:.4f}"}]
    text = {"align": "left", "baseline": "top", "dx": 4, "dy": 6, "fontSize": 12.5}
    return [_dashed(alt, x, y, "loss", entropy, last), *_label(_chart(alt, data).encode(x=x, y=y), text)]


def _dashed(alt: Any, x: Any, y: Any, column: str, value: float, last: int) -> Any:
    ends = [{"step": step, column: value} for step in (0, last)]
    return _chart(alt, ends).mark_line(strokeDash=[6, 4], strokeWidth=1.3, color=INK).encode(x=x, y=y)


def _best_mark(alt: Any, x: Any, y: Any, evaluations: list[Row], last: int, height: float) -> list[Any]:
    """A ring, and a label where there is room, over what the curve does there. `height`: of the axis, ln of losses."""
    row = best(evaluations)
    label = f"lowest: {row['val_loss']:.4f} at update {int(row['step']):,}"
    base = _chart(alt, [{"step": row["step"], "loss": row["val_loss"], "label": label}]).encode(x=x, y=y)
    leftwards = row["step"] > 0.7 * last
    side = 1 if leftwards else -1
    under = [r["val_loss"] for r in evaluations if 0 <= side * (row["step"] - r["step"]) < 0.3 * last]
    lift = HEIGHT * math.log(max(under) / row["val_loss"]) / height
    place = {"align": "right", "dx": 9} if leftwards else {"align": "left", "dx": 12}
    text = {**place, "dy": -20 - min(lift, 60), "fontSize": 12.5, "fontWeight": "bold"}
    return [base.mark_point(size=170, filled=False, strokeWidth=2, color=INK), *_label(base, text)]


def _label(base: Any, text: dict[str, Any]) -> list[Any]:
    """The text of a column `label`, with a halo."""
    halo = base.mark_text(**text, stroke="white", strokeWidth=4, strokeJoin="round")
    return [mark.encode(text="label:N") for mark in (halo, base.mark_text(**text, color=INK))]


def _learning_rate(alt: Any, rows: list[Row], last: int) -> Any:
    peak = max(row["learning_rate"] for row in rows) or 1.0
    label = "datum.value == 0 ? '0' : format(datum.value, '.2~e')"
    axis = alt.Axis(title=None, values=[0, peak / 2, peak], labelExpr=label)
    y = alt.Y("learning_rate:Q", axis=axis, scale=alt.Scale(domain=[0, peak * 1.05], nice=False))
    return _panel(alt, rows, last, y, "learning rate", labelled=False)


def _gradient_norm(alt: Any, rows: list[Row], mean: str, last: int, clip: float) -> Any:
    """With the bound as a line where that leaves the norms readable."""
    drawn = [row for row in rows if row["grad_norm"] > 0]
    norms = [row["grad_norm"] for row in drawn] or [1.0]
    bound = [clip] if min(norms) / 10 < clip < max(norms) * 10 else []
    low, high = min(*norms, *bound, math.inf) / 1.1, max(*norms, *bound, 0.0) * 1.1
    axis = alt.Axis(title=None, values=log_ticks(low, high, most=3), format=",.4~g")
    y = alt.Y("grad_norm:Q", axis=axis, scale=alt.Scale(type="log", domain=[low, high], nice=False))
    words = f"clipped to {clip:g}" if clip else "not clipped"
    title = f"gradient norm{mean} ({'dashed: ' if bound else ''}{words})"
    x = _updates(alt, last, labelled=True)
    under = [_dashed(alt, x, y, "grad_norm", value, last) for value in bound]
    return _panel(alt, drawn, last, y, title, labelled=True, under=under)


def _panel(
    alt: Any, rows: list[Row], last: int, y: Any, title: str, *, labelled: bool, under: Sequence[Any] = ()
) -> Any:
    line = _chart(alt, rows).mark_line(strokeWidth=1.4, color=RATES)
    heading = alt.Title(title, fontSize=12.5, fontWeight="normal", color=INK, offset=4)
    return alt.layer(*under, line.encode(x=_updates(alt, last, labelled), y=y)).properties(
        width=WIDTH, height=PANEL_HEIGHT, title=heading
    )


def _chart(alt: Any, values: Sequence[Row] | Sequence[dict[str, Any]]) -> Any:
    return alt.Chart(alt.InlineData(values=values))


# --- axes


def _updates(alt: Any, last: int, labelled: bool) -> Any:
    ticks = {"tickCount": 10} if last >= 10 else {"values": list(range(last + 1))}
    axis = alt.Axis(title="updates" if labelled else None, labels=labelled, ticks=labelled, format=",d", **ticks)
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
