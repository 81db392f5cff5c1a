"""Settings, levels, effects and amounts as the page words them. Minus signs are minus signs."""

from __future__ import annotations

import math
from typing import Any

import pandas as pd

from nanostudy.text import digits, duration

QUANTITIES = {  # measure: what it is called, its unit
    "val_loss": ("validation loss", "nats per token"),
    "train_loss": ("training loss", "nats per token"),
    "best_val_loss": ("lowest validation loss", "nats per token"),
    "gap": ("loss gap", "nats per token"),
    "seconds": ("time", "seconds"),
    "parameters": ("parameters", "parameters"),
    "flops": ("arithmetic", "floating-point operations"),
    "tokens": ("tokens", "tokens"),
}
MAGNITUDES = ((1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k"))


def quantity(measure: str) -> tuple[str, str]:
    return QUANTITIES.get(measure, (measure.replace("_", " "), ""))


def setting_text(name: str) -> str:
    """Settings keep their names: that is how they are typed."""
    return name


def level_text(level: Any) -> str:
    """2,000, 0.1, 3e-4, yes."""
    if level is None or (isinstance(level, float) and math.isnan(level)) or level is pd.NA:
        return "none"
    if isinstance(level, bool) or type(level).__name__ == "bool":
        return "yes" if level else "no"
    if isinstance(level, str):
        return level
    value = float(level)
    return f"{value:,.0f}" if value.is_integer() and abs(value) < 1e15 else f"{value:.6g}"


def term_text(row: Any, several: bool = False) -> str:
    """n_embd 128 → 256, or a pair of settings; where a pair has `several` effects, with the levels that it is of."""
    if row.order == 1 and not _missing(row.reference):
        return f"{setting_text(row.factor_a)} {level_text(row.reference)} → {level_text(row.level)}"
    return f"{row.term}, {row.level}" if several and not _missing(row.level) else str(row.term)


def _missing(value: Any) -> bool:
    return value is None or value is pd.NA or (isinstance(value, float) and math.isnan(value))


def nats(value: float, decimals: int = 4) -> str:
    """A loss or a difference without its sign."""
    return f"{value:.{decimals}f}".replace("-", "−")


def signed(value: float, decimals: int = 3) -> str:
    text = f"{value:+.{decimals}f}"
    return "0" if float(text) == 0 else text.replace("-", "−")


def interval(value: float, low: float, high: float, decimals: int = 3) -> str:
    """−0.210 (−0.231 to −0.190)."""
    if _missing(low) or _missing(high):
        return f"{signed(value, decimals)} (no interval)"
    return f"{signed(value, decimals)} ({signed(low, decimals)} to {signed(high, decimals)})"


def amount(value: Any, measure: str) -> str:
    """With its unit, short: 3.18 M parameters, 12 min 34 s."""
    if _missing(value):
        return "unknown"
    if measure == "seconds":
        return duration(float(value))
    if measure.endswith("loss") or measure == "gap":
        return f"{nats(float(value))} nats per token"
    return f"{short(float(value))} {quantity(measure)[1]}".strip()


def short(value: float) -> str:
    """804 k, 3.18 M, 1.2 P."""
    for size, letter in MAGNITUDES:
        if abs(value) >= 0.9995 * size:
            return f"{value / size:.3g} {letter}"
    return digits(value)


def listed(words: list[str]) -> str:
    """a, b and c."""
    return " and ".join([", ".join(words[:-1]), words[-1]]) if len(words) > 1 else "".join(words)
