"""Numbers, effects and amounts as a report words them. Minus signs are minus signs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from nanostudy.analysis.frames import known
from nanostudy.analysis.sample_quality import SHARES
from nanostudy.analysis.text_error import Estimate
from nanostudy.measures import MEASURES, NATS
from nanostudy.text import digits, duration, value_text

ENOUGH = 20  # of which a share is given in percent
MAGNITUDES = ((1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k"))


def number(value: float, decimals: int = 4) -> str:
    return f"{value:.{decimals}f}".replace("-", "−")


def signed(value: float, decimals: int = 3) -> str:
    text = f"{value:+.{decimals}f}"
    return "0" if float(text) == 0 else text.replace("-", "−")


def interval(value: float, low: float, high: float, decimals: int = 3) -> str:
    """−0.210 (−0.231 to −0.190)."""
    if not (known(low) and known(high)):
        return f"{signed(value, decimals)} (no interval)"
    return f"{signed(value, decimals)} ({signed(low, decimals)} to {signed(high, decimals)})"


def share_text(quality: Any, share: str) -> str:
    """46% (33% to 59%, n = 62); of few, 0 of 2 (0% to 66%). A row of the analysis's quality; `share` is a column of it."""
    value, n, low, high = quality[share], int(quality[SHARES[share]]), quality[f"{share}_low"], quality[f"{share}_high"]
    if n >= ENOUGH:
        return f"{value:.0%} ({low:.0%} to {high:.0%}, n = {n:,})"
    return f"{round(value * n)} of {n} ({low:.0%} to {high:.0%})"


def interval_text(estimate: Estimate, text: Callable[[float, int], str] = number, decimals: int = 4) -> str:
    """ " (95% interval 2.09 to 2.12 over seeds and texts like this one)"; empty where there is none."""
    if not estimate.has_interval:
        return ""
    low, high = text(estimate.low, decimals), text(estimate.high, decimals)
    return f" (95% interval {low} to {high} over {estimate.about})"


def ends(low: float, high: float, text: Callable[[float, int], str] = number) -> str:
    return f"{text(low, 4)} to {text(high, 4)}" if known(low) and known(high) else "not known"


def short(value: float) -> str:
    """804 k, 3.18 M, 1.2 P."""
    for size, letter in MAGNITUDES:
        if abs(value) >= 0.9995 * size:
            return f"{value / size:.3g} {letter}"
    return digits(value)


def amount(value: Any, name: str) -> str:
    """A measured value with its decimals or three digits; a loss without its unit: 2.3130, 3.18 M, 460 TFLOP, 12 min 34 s."""
    measure = MEASURES[name]
    if not known(value):
        return "not known"
    if measure.unit == "seconds":
        return duration(float(value))
    if measure.unit == NATS or measure.decimals is not None:
        return number(float(value), 4 if measure.decimals is None else measure.decimals)
    return f"{short(float(value))}{'FLOP' if name == 'flops' else ''}"


def in_words(cell: str) -> str:
    """n_layer 2, n_embd 128, of "n_layer=2, n_embd=128"."""
    return cell.replace("=", " ")


def rounded(value: Any) -> str:
    """A setting's value, as what a search drew or a curve gives, in three digits."""
    return value_text(float(f"{value:.3g}") if isinstance(value, float) else value)


def change(setting: str, reference: Any, level: Any) -> str:
    """n_embd 128 → 256."""
    return f"{setting} {value_text(reference)} → {value_text(level)}"


def are(count: int, one: str = "is", several: str = "are") -> str:
    """The verb of so many."""
    return one if count == 1 else several


def term_text(row: Any, several: bool = False) -> str:
    """n_embd 128 → 256, or a pair of settings; where a pair has `several` effects, with the levels that it is of."""
    if row.order == 1 and known(row.reference):
        return change(row.factor_a, row.reference, row.level)
    return f"{row.term}, {row.level}" if several and known(row.level) else str(row.term)
