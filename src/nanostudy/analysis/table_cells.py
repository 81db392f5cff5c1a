"""The cells of a table: numbers as people and programs write them, settings' and factors' values, what became of a run."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import Any, NamedTuple

from nanostudy.analysis.table_columns import LOGARITHMS, one_line
from nanostudy.errors import UsageError
from nanostudy.measures import stored
from nanostudy.result import Status
from nanostudy.settings import check_value

LOSSES = ("train_loss", "val_loss")
COUNTS = ("id", "parameters", "updates", "best_step", "tokens", "seconds")  # thousands separators may stand in them
NUMBERS = (*dict.fromkeys((*COUNTS, "gap", *stored())),)
FINISHED = "finished complete completed done success succeeded ok terminated converged"
FAILED = "failed crash crashed error killed pruned stopped cancelled canceled preempted aborted oom"
STATUSES: dict[str, Status] = {  # in other programs' words
    **dict.fromkeys(FINISHED.split(), Status.FINISHED),
    **dict.fromkeys(FAILED.split(), Status.FAILED),
    **dict.fromkeys(("pending", "queued", "waiting"), Status.WAITING),
    "running": Status.RUNNING,
    "diverged": Status.DIVERGED,
}
NO_NUMBER = ("", "-", "na", "n/a", "#n/a", "null", "none", "<na>")
NOT_FINITE = {
    **{"nan": math.nan, "inf": math.inf, "+inf": math.inf, "-inf": -math.inf},
    **{"infinity": math.inf, "-infinity": -math.inf},
}
DECIMAL = re.compile(r"[+-]?(?=\.?\d)\d*\.?(\d*)(?:[eE]([+-]?\d{1,9}))?", re.ASCII)  # groups: fraction, exponent
THOUSANDS = r"[+-]?\d{1,3}(?:[,\u0020\u00a0\u202f'_]\d{3})+(?:\.\d*)?"  # 800,000.0; or with spaces, apostrophes
LETTERED = {"k": "e3", "m": "e6", "b": "e9"}  # 10.7M
DURATION = re.compile(r"(?:(\d{1,6}) days? ?)?(\d{1,6}):(\d{1,2}):(\d{1,2}(?:\.\d+)?)")  # as Optuna and clocks write it
MILLIONS = 1000  # a number of parameters below it is one of millions
EARLY = 0.95  # of max_iters: a run that ended before did not finish
LONGEST_TEXT = 80  # characters of a factor's value


class Number(NamedTuple):
    value: float  # NaN where none is given
    unit: float  # of the last digit; 0 where it is unknown
    text: str  # empty where none is given


def number(text: str, decimal_comma: bool = False, about: str = "", unit: str = "") -> Number:
    """A cell's; `about` is the measure, `unit` the loss's where it is none in nats. Raises UsageError where it is none."""
    word = text.lower()
    if word in NO_NUMBER or word in NOT_FINITE:
        return Number(NOT_FINITE.get(word, math.nan), 0.0, "" if word in NO_NUMBER else text)
    plain = text.translate(str.maketrans(".,", ",.")) if decimal_comma else text
    if about in COUNTS:
        if re.fullmatch(THOUSANDS, plain):
            plain = re.sub(r"[,\u0020\u00a0\u202f'_]", "", plain)
        elif match := DURATION.fullmatch(plain):
            days, hours, minutes, seconds = (float(part or 0) for part in match.groups())
            return Number(86400 * days + 3600 * hours + 60 * minutes + seconds, 0.0, text)
        elif plain[-1:].lower() in LETTERED and DECIMAL.fullmatch(plain[:-1]):
            plain = plain[:-1] + LETTERED[plain[-1].lower()]
    match = DECIMAL.fullmatch(plain)
    if not match:
        raise UsageError(f"{one_line(text)[:60]!r} is no number.")
    value, half = float(plain), float(f"1e{int(match[2] or 0) - len(match[1])}")
    if about == "parameters" and 0 < value < MILLIONS:
        return Number(value * 1e6, half * 1e6, text)
    if about in ("val_loss", "best_val_loss") and unit:
        return _in_nats(value, half, text, unit)
    return Number(value, half, text)


def _in_nats(value: float, half: float, text: str, unit: str) -> Number:
    """Of bits per byte, or of a perplexity."""
    if LOGARITHMS[unit] != "perplexity":
        return Number(value * math.log(2), half * math.log(2), text)
    return Number(math.log(value), half / value, text) if value > 0 else Number(math.nan, 0.0, text)


@lru_cache(maxsize=4096)
def setting_value(name: str, text: str, lenient: bool = False) -> Any:
    """A setting's value as data frames hold it: `none` as a word, None where the cell is empty. Raises UsageError at what is
    no value of it, but where it is `lenient`.
    """
    if not text:
        return None
    try:
        value = check_value(name, one_line(text) if name in ("corpus", "init_from") else _whole(text))
    except UsageError:
        if not lenient:
            raise
        return None
    return "none" if value is None else value


def _whole(text: str) -> str:
    """A whole number that a table wrote with a fraction."""
    return text[:-2] if re.fullmatch(r"\d+\.0", text) else text


def factor_values(cells: Sequence[str], decimal_comma: bool) -> list[Any]:
    """Numbers where all are numbers, truths where all are, else texts; None where a cell is empty."""
    there = {cell for cell in cells if cell.lower() not in NO_NUMBER or cell.lower() == "none"}
    if there and {cell.lower() for cell in there} <= {"true", "false"}:
        return [cell.lower() == "true" if cell in there else None for cell in cells]
    try:
        numbers = {cell: number(cell, decimal_comma).value for cell in there}
    except UsageError:
        return [one_line(cell)[:LONGEST_TEXT] or None for cell in cells]
    if not all(map(math.isfinite, numbers.values())):
        return [one_line(cell)[:LONGEST_TEXT] or None for cell in cells]
    return [
        None if cell not in there else int(n) if (n := numbers[cell]).is_integer() and abs(n) < 1e15 else n
        for cell in cells
    ]


def status_of(record: Mapping[str, Any], numbers: Mapping[str, Number]) -> tuple[str, str | None]:
    """(status, reason): as a column says, else by the validation loss, or the training loss where there is no other."""
    word = str(record.get("status") or "").strip()
    status = STATUSES.get(word.lower())
    if word.lower() in list(Status) and record.get("source") == "nanostudy":
        return word.lower(), record.get("reason")
    if status not in (None, Status.FINISHED):
        return str(status), record.get("reason") or f"the table says {word}"
    loss = numbers["val_loss" if numbers["val_loss"].text else "train_loss"]
    if not loss.text:
        return "waiting", "the table gives no loss: it diverged, or did not finish"
    if not math.isfinite(loss.value):
        return "diverged", f"the table says {loss.text}"
    planned, made, interval = (record.get(key) or 0 for key in ("max_iters", "updates", "eval_interval"))
    if status is None and planned and made and made < min(EARLY * planned, planned - interval):
        return "failed", f"it stopped after {made:,.0f} of {planned:,} updates"
    return "finished", record.get("reason")
