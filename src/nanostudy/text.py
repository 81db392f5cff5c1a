"""Numbers, durations and texts as a person reads them, and as Markdown leaves them alone."""

from __future__ import annotations

import re
import shutil
import textwrap
from collections.abc import Sequence
from typing import Any

CODE = r"(?<!`)`[^`|]+`(?!`)"  # without a bar, which would end the cell of a table within code, too
MARKS = r"[\\`*\[\]<>|#&~$]|(?<![^\W_])_|_(?![^\W_])"  # what Markdown or HTML would take for its own


def duration(seconds: float) -> str:
    """2.5 s, 12 min 34 s, 3 h 05 min."""
    if seconds < 59.95:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest:02d} s" if minutes < 60 else f"{minutes // 60:,} h {minutes % 60:02d} min"


def digits(value: float) -> str:
    """Three digits at least: 0.0123, 12.3, 1,235."""
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def counted(number: int, noun: str) -> str:
    """1 layer, 4 layers."""
    return f"{number:,} {noun}{'' if number == 1 else 's'}"


def listed(words: Sequence[str], most: int | None = None, conjunction: str = "and") -> str:
    """a, b and c; with `most` = 2: a, b and 1 more."""
    shown = list(words) if most is None or len(words) <= most else [*words[:most], f"{len(words) - most:,} more"]
    return f" {conjunction} ".join([", ".join(shown[:-1]), shown[-1]]) if len(shown) > 1 else "".join(shown)


def printable(text: str) -> str:
    """A text from elsewhere as a terminal may show it: its control characters, and so its escape sequences, do nothing."""
    return "".join(c if c.isprintable() or c == "\n" else "\ufffd" for c in text)


def csv_cell(value: Any) -> Any:
    """A text that a spreadsheet would take for a formula gets an apostrophe before it, as OWASP's "CSV Injection" advises."""
    return f"'{value}" if isinstance(value, str) and value[:1] in ("=", "+", "-", "@", "\t", "\r") else value


def value_text(value: Any) -> str:
    """A setting's value as a settings file has it: 128, 0.1, 0.0003, true, none."""
    if value is None or type(value).__name__ == "NAType" or value != value:
        return "none"
    if isinstance(value, bool) or type(value).__name__ == "bool":  # NumPy's, too
        return "true" if value else "false"
    text = f"{value:.6g}" if isinstance(value, float) else str(value)
    return text if not isinstance(value, float) or float(text) == value else str(value)


def brief_value(value: Any) -> str:
    """A setting's value in a sentence: what a search drew, in three digits."""
    return f"{value:.3g}" if isinstance(value, float) and len(value_text(value)) > 6 else value_text(value)


def ranges(numbers: Sequence[int]) -> str:
    """1-4 7 9-10."""
    runs: list[list[int]] = []
    for number in sorted(numbers):
        if runs and number == runs[-1][-1] + 1:
            runs[-1].append(number)
        else:
            runs.append([number])
    return " ".join(str(run[0]) if len(run) == 1 else f"{run[0]}-{run[-1]}" for run in runs)


def beside(rows: Sequence[tuple[str, ...]]) -> list[str]:
    """Columns; the last one is wrapped where the terminal ends."""
    widths = [max(map(len, column)) + 2 for column in list(zip(*rows, strict=True))[:-1]]
    indent, lines = sum(widths), list[str]()
    width = max(indent + 20, shutil.get_terminal_size().columns)
    for *cells, text in rows:
        start = "".join(cell.ljust(w) for cell, w in zip(cells, widths, strict=True))
        lines += textwrap.wrap(text, width, initial_indent=start, subsequent_indent=" " * indent) or [start.rstrip()]
    return lines


def table(header: Sequence[str], rows: Sequence[Sequence[Any]]) -> list[str]:
    """Lines of Markdown."""
    lines = [f"| {' | '.join(plain(cell) for cell in row)} |" for row in (header, *rows)]
    return [lines[0], "|---" * len(header) + "|", *lines[1:]]


def plain(value: Any) -> str:
    """A value in words, on one line that Markdown and HTML leave as it is, but for code between backticks."""
    if isinstance(value, bool):
        return "yes" if value else "no"
    text = f"{value:,}" if isinstance(value, int) else str(value)
    return re.sub(f"({CODE})|{MARKS}", lambda found: found[1] or f"\\{found[0]}", " ".join(text.split()))
