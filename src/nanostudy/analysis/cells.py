"""The cells of a table that people and spreadsheets write: separators, numbers, names of experiments."""

from __future__ import annotations

import csv
import io
import math
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from decimal import Decimal, InvalidOperation
from typing import Any

from nanostudy.errors import UsageError
from nanostudy.settings import FIELDS, Experiment, check_value
from nanostudy.study.grid import IN_PUBLISHED_NAME, LONGEST_NAME

SEPARATORS = (",", ";", "\t")
NO_NUMBER = ("", "-", "na", "n/a", "#n/a", "null", "none", "<na>")
NOT_FINITE = {"nan": math.nan, "inf": math.inf, "+inf": math.inf, "-inf": -math.inf, "infinity": math.inf}
ROUND = r"[+-]?(?:\d+\.?\d*|\.\d+)(?:[eE][+-]?\d+)?"
THOUSANDS = r"[+-]?\d{1,3}(?:[,\u0020\u00a0\u202f'_]\d{3})+(?:\.\d*)?"  # 800,000.0, or spaces, apostrophes

_OTHERS = "|".join(sorted((name for name in FIELDS if name not in (*IN_PUBLISHED_NAME, "seed")), key=len, reverse=True))
_NAME = re.compile(
    r"b(?P<block_size>\d+)_L(?P<n_layer>\d+)_H(?P<n_head>\d+)_E(?P<n_embd>\d+)_BS(?P<batch_size>\d+)_MI(?P<max_iters>\d+)"
    r"_D(?P<dropout>\d+(?:\.\d+)?(?:e-?\d+)?)_s(?P<seed>\d+)(?P<others>(?:_.*)?)",
    re.ASCII,
)
_HASH = re.compile(r"_[0-9a-f]{8}")  # at the end of a name that would be too long, or was taken


@dataclass(frozen=True)
class Number:
    value: float  # NaN where none is given
    unit: float  # of the last digit; 0 where that is not known
    text: str

    @property
    def given(self) -> bool:
        return self.text.lower() not in NO_NUMBER


def rows_of(name: str, raw: bytes) -> Iterator[tuple[int, list[str]]]:
    """(line, cells) of each line that is not blank, cells without spaces around them. The first are the column names:
    they decide which of `SEPARATORS` it is. Raises UsageError.
    """
    text = _decoded(name, raw).replace("\r\n", "\n").replace("\r", "\n")
    first = next((line for line in text.split("\n") if line.strip() and not line.lower().startswith("sep=")), "")
    separator = max(SEPARATORS, key=lambda mark: (first.count(mark), -SEPARATORS.index(mark)))
    reader = csv.reader(io.StringIO(text), delimiter=separator, skipinitialspace=True, strict=True)
    try:
        for cells in reader:
            if any(cell.strip() for cell in cells) and not cells[0].lower().startswith("sep="):
                yield reader.line_num, [cell.strip() for cell in cells]
    except csv.Error as problem:
        raise UsageError(f"{name}, line {reader.line_num} is no line of a table: {problem}.") from None


def _decoded(name: str, raw: bytes) -> str:
    """As its first bytes say (spreadsheets write UTF-16), else UTF-8."""
    encoding = "utf-16" if raw.startswith((b"\xff\xfe", b"\xfe\xff")) else "utf-8-sig"
    try:
        text = raw.decode(encoding)
    except UnicodeDecodeError as problem:
        line = raw[: problem.start].count(b"\n") + 1
        raise UsageError(
            f"{name}, line {line} is not UTF-8 text (byte {problem.start}). Save it as CSV in UTF-8."
        ) from None
    if "\0" in text:
        line = text[: text.index("\0")].count("\n") + 1
        raise UsageError(f"{name}, line {line} holds a zero byte: it is not a table in text form. Save it as CSV.")
    return text


def has_decimal_comma(losses: Iterable[str]) -> bool:
    """Whether a table writes decimals with a comma: its losses, which no thousands separator fits, decide."""
    return any(re.fullmatch(r"[+-]?\d*,\d+", text) for text in losses)


def number(text: str, decimal_comma: bool, count: bool = False) -> Number:
    """Raises UsageError. `count`: thousands separators may stand in it."""
    word = text.lower()
    if word in NO_NUMBER:
        return Number(math.nan, 0.0, text)
    if word in NOT_FINITE:
        return Number(NOT_FINITE[word], 0.0, text)
    plain = text
    if decimal_comma:
        plain = plain.replace(".", "\0").replace(",", ".").replace("\0", ",")
    if count and re.fullmatch(THOUSANDS, plain):
        plain = re.sub(r"[,\u0020\u00a0\u202f'_]", "", plain)
    try:
        if not re.fullmatch(ROUND, plain, re.ASCII):
            raise InvalidOperation
        exact = Decimal(plain)
        value, exponent = float(exact), exact.as_tuple().exponent
    except (InvalidOperation, OverflowError):
        raise UsageError(f"{text_of(text)[:60]!r} is no number.") from None
    return Number(value, 10.0**exponent if isinstance(exponent, int) else 0.0, text)


def setting_value(name: str, text: str) -> Any:
    """A setting's value as data frames hold it: `none` as a word, None where the cell is empty. Raises UsageError."""
    if not text:
        return None
    value = check_value(name, text_of(text) if name in ("corpus", "init_from") else text)
    return "none" if value is None else value


def named_settings(name: str) -> tuple[dict[str, Any], bool]:
    """(the settings that an experiment's name tells, whether one at its end was lost because the name was too long).

    Raises UsageError where it is no such name, or names an impossible experiment.
    """
    cut = len(name) >= LONGEST_NAME and _HASH.fullmatch(name[-9:]) is not None
    found = _NAME.fullmatch(name[:-9] if cut else name)
    pieces = re.split(rf"_(?=(?:{_OTHERS})[=-])", found["others"]) if found else []
    if cut:
        pieces = pieces[:-1]
    elif pieces:  # texts may end in anything, other values in no hash
        pieces[-1] = (
            pieces[-1]
            if pieces[-1].startswith(("corpus", "init_from"))
            else re.sub(f"{_HASH.pattern}$", "", pieces[-1])
        )
    if not found or "".join(pieces[:1]) or not all(re.fullmatch(r"[A-Za-z0-9._=+-]+", piece) for piece in pieces[1:]):
        example = "b64_L4_H4_E128_BS8_MI1000_D10_s1, or that and _learning_rate=0.004"
        raise UsageError(f"{text_of(name)[:60]!r} is not the name of an experiment, such as {example}.")
    texts = {key: found[key] for key in (*IN_PUBLISHED_NAME, "seed")}
    texts["dropout"] = str(float(texts["dropout"]) / 100)
    experiment = Experiment(**texts)  # type: ignore[arg-type]  # it reads text as the setting's type
    others = (re.fullmatch(rf"({_OTHERS})[=-](.*)", piece) for piece in pieces[1:])
    told = {key: getattr(experiment, key) for key in texts}
    return told | {one[1]: setting_value(one[1], one[2] or "none") for one in others if one}, cut


def text_of(cell: str) -> str:
    """One line without control characters."""
    return " ".join("".join(c if c.isprintable() else " " for c in cell).split())
