"""What charts share: axes and tooltips of measures, points of the document's experiments and how a reader colours and picks them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import altair as alt
import numpy as np

from nanostudy.analysis.frames import Results, levels
from nanostudy.measures import MEASURES
from nanostudy.reporting.charts.figure import COLOUR

MOST_COLOURS = 12  # values that colours tell apart
FADED = "length(chosen) && indexof(chosen, datum.i) < 0"  # where a reader picked experiments, the others step back
GROUP = f"isValid(datum[{COLOUR}]) ? datum[{COLOUR}] : 'not known'"
SETTING = f"{COLOUR} + ' ' + datum.group"  # names the setting: dropout 0.2
WHO = [alt.Tooltip("name:N", title="experiment"), alt.Tooltip("setting:N", title="setting")]


def varying(results: Results) -> list[str]:
    """The settings that vary among the finished experiments."""
    return [name for name in results.factors if len(levels(results.finished[name])) > 1]


def colourings(results: Results, strongest: Sequence[str] = ()) -> list[str]:
    """The columns that can colour points and curves: settings first, those with the strongest effects before others."""
    table = results.experiments
    settings = dict.fromkeys(name for name in (*strongest, *results.factors) if name in results.factors)
    settings = {name: None for name in settings if len(levels(table[name])) <= MOST_COLOURS}
    constant = {*results.factors} - {*varying(results)}
    ordered = sorted(settings, key=lambda name: name in constant)
    others = [name for name in ("part", "status", "device", "precision") if table[name].nunique(dropna=True) > 1]
    seeds = ["seed"] if 1 < table["seed"].nunique(dropna=True) <= MOST_COLOURS else []
    names = [] if len(table) > MOST_COLOURS else ["name"]
    return [*ordered, *others, *seeds, *names] or ["status"]


def places(results: Results) -> dict[str, int]:
    """Where each experiment stands in the page's table, by name."""
    return {str(name): i for i, name in enumerate(results.experiments.index)}


def parameters(colour: str) -> dict[str, Any]:
    return {COLOUR: colour, "chosen": [], "hovered": -1}


def inline(rows: Sequence[Mapping[str, Any]]) -> alt.Chart:
    """The page filters rows with the place `i` of an experiment, or with the `cell` of several."""
    return alt.Chart(alt.InlineData(values=rows))


def points(condition: str, size: int = 55, opacity: float = 0.85) -> alt.Chart:
    """A point for each finished experiment of the page's table that meets the condition."""
    return (
        alt.Chart(alt.NamedData(name="experiments"))
        .transform_calculate(group=GROUP)
        .transform_calculate(setting=SETTING)
        .transform_filter(f"{condition} && datum.status == 'finished'")
        .mark_point(filled=True, size=size)
        .encode(color=group_colour(), opacity=fading(opacity, 0.1))
    )


def group_colour(symbol: str = "circle") -> alt.Color:
    legend = alt.Legend(title=None, symbolType=symbol, symbolSize=80, symbolStrokeWidth=2.5)
    return alt.Color("group:N", scale=alt.Scale(domain=alt.ExprRef("groups")), legend=legend)


def lines(chart: alt.Chart, colour: alt.Color, strong: float, faint: float) -> alt.Chart:
    """One for each experiment; the one at the pointer is wide."""
    width = alt.condition("datum.i === hovered", alt.value(4), alt.value(1.5))
    return chart.mark_line().encode(detail="i:N", color=colour, strokeOpacity=fading(strong, faint), strokeWidth=width)


def with_halo(base: alt.Chart, column: str, **words: Any) -> list[alt.Chart]:
    """Texts that can be read over lines."""
    halo: dict[str, Any] = {"style": "halo"}
    return [base.mark_text(**words, **style).encode(text=f"{column}:N") for style in (halo, {})]


def fading(strong: float, faint: float) -> Any:
    return alt.condition(FADED, alt.value(faint), alt.value(strong))


def line_meta(table: str, x: str, y: str, says: Mapping[str, str]) -> dict[str, Any]:
    """Where the page's script finds the line that is nearest to the pointer, and which columns it names."""
    return {"lines": {"table": table, "x": x, "y": y, "says": list(says.items())}}


def x_of(name: str, field: str = "", **settings: Any) -> alt.X:
    """The axis of a measure, with its unit."""
    return alt.X(f"{field or name}:Q", title=MEASURES[name].axis, **settings)


def y_of(name: str, field: str = "", **settings: Any) -> alt.Y:
    return alt.Y(f"{field or name}:Q", title=MEASURES[name].axis, **settings)


def tip(name: str, field: str = "") -> alt.Tooltip:
    measure = MEASURES[name]
    digits = "," if measure.decimals is None else f".{measure.decimals}f"
    return alt.Tooltip(f"{field or name}:Q", title=measure.axis, format=digits)


def updates_axis() -> alt.X:
    axis = alt.Axis(format=",d", tickCount=6)
    return alt.X("step:Q", title="updates", axis=axis, scale=alt.Scale(domainMin=0, nice=False))


UPDATE = alt.Tooltip("step:Q", title="update", format=",d")
FREE = alt.Scale(zero=False)  # an axis that need not begin at zero
MAGNITUDES = alt.Axis(format="~s", tickCount=5)


def logarithmic(padding: int = 14) -> alt.Scale:
    return alt.Scale(type="log", nice=False, padding=padding)


def width(low: float, high: float) -> float:
    """Of a range of values; one that rounding alone makes counts as a tenth of the values, as no axis can be narrower."""
    largest = max(abs(low), abs(high))
    return high - low if high - low > 1e-6 * largest else largest / 10 or 1.0


def domain(values: np.ndarray) -> list[float]:
    """Of an axis that holds these, with a little room."""
    low, high = float(values.min()), float(values.max())
    room = 0.05 * width(low, high)
    return [low - room, high + room]


def zero_line(channel: str) -> alt.Chart:
    return inline([{"zero": 0}]).mark_rule(style="zero").encode(**{channel: "zero:Q"})
