"""Tables of results, the published study's and this project's own results.csv, as Results.

Text in a table is data: names must be names of experiments, numbers numbers, and the rest is kept as plain text or left
alone. Raises UsageError, with file and line, at what cannot be read; what is merely missing or odd becomes a note.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from nanostudy.analysis.cells import (
    Number,
    has_decimal_comma,
    named_settings,
    number,
    rows_of,
    setting_value,
    text_of,
)
from nanostudy.analysis.frames import Results, experiments_frame
from nanostudy.errors import UsageError
from nanostudy.settings import FIELDS
from nanostudy.text import counted

MEASURES = ("train_loss", "val_loss")
PUBLISHED = {"train_loss": "Train Loss", "val_loss": "Val Loss", "gap": "Loss Gap", "parameters": "Total Params"}
NUMBERS = ("id", *PUBLISHED, "updates", "best_step", "best_val_loss", "tokens", "seconds")
COUNTS = ("id", "parameters", "updates", "best_step", "tokens", "seconds")
TEXTS = ("part", "status", "reason")
STATUSES = ("waiting", "running", "finished", "diverged", "failed")
COLUMNS = {  # by the letters and digits of their heading
    **{name.replace("_", ""): name for name in (*FIELDS, *NUMBERS, *TEXTS)},
    **{heading.replace(" ", "").lower(): name for name, heading in PUBLISHED.items()},
    **{"experiment": "name", "name": "name", "step": "updates", "params": "parameters", "configpath": "config_path"},
    **{"trainingloss": "train_loss", "validationloss": "val_loss", "totalparameters": "parameters"},
}
SHOWN = 3  # of what a note lists


@dataclass
class _Row:
    place: str  # "results.csv, line 2"
    record: dict[str, Any]  # as experiments_frame takes it
    half_units: dict[str, float]  # of the losses' last digits: how far rounding may have moved them

    @property
    def name(self) -> str:
        return str(self.record["name"])

    @property
    def outcome(self) -> str:
        losses = (f"{PUBLISHED[measure]} {self.record.get(measure)}" for measure in MEASURES)
        return f"{self.record['status']}, {', '.join(losses)} ({self.place})"


@dataclass
class _Table:
    path: Path
    sha256: str
    own: bool  # written by this project: its losses are exact, its count of parameters whole
    rows: list[_Row] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    @property
    def label(self) -> str:
        """With the folder where the file is called as every such table is."""
        return str(Path(*self.path.parts[-2:])) if self.path.name.lower() == "results.csv" else self.path.name


def read_tables(paths: Sequence[Path]) -> Results:
    """The tables as one. An experiment that several rows agree on is there once; one that they contradict each other on
    has no result: it counts as failed, with both results as the reason and in the notes.
    """
    tables = [_read(path) for path in paths]
    rows, notes = _merged([row for table in tables for row in table.rows])
    _number(rows, notes)
    titles = list(dict.fromkeys(_title(table.path) for table in tables))
    files = {str(table.path): table.sha256 for table in tables}
    return Results(
        " + ".join(titles) if len(titles) <= SHOWN else counted(len(titles), "table"),
        experiments_frame([row.record for row in rows]),
        provenance={"paths": list(files), "checksums": files},
        notes=(*(note for table in tables for note in table.notes), *notes),
    )


def _title(path: Path) -> str:
    """The folder says more where the file is called as every such table is."""
    parent = path.resolve().parent.name
    return parent if path.name.lower() == "results.csv" and parent else path.stem


# --- one table


def _read(path: Path) -> _Table:
    raw = _bytes(path)
    lines = rows_of(str(path), raw)
    try:
        _, header = next(lines)
    except StopIteration:
        raise UsageError(f"{path} is empty: it has no line of column names, such as Experiment, Val Loss.") from None
    columns = _columns(path, header)
    table = _Table(path, hashlib.sha256(raw).hexdigest(), own={"status", "val_loss", "id"} <= set(columns))
    cells = list(_cells(path, lines, columns, len(header)))
    decimal_comma = has_decimal_comma([texts[m] for _, texts in cells for m in ("gap", *MEASURES) if m in texts])
    for line, texts in cells:
        table.rows.append(_row(table, line, texts, decimal_comma))
    table.notes += _told_of_columns(table, columns, header)
    table.notes += _told_of_rows(table)
    return table


def _bytes(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as problem:
        raise UsageError(f"{path} cannot be read ({problem.strerror}).") from None


def _columns(path: Path, header: Sequence[str]) -> dict[str, int]:
    """What each known column holds, and where it stands."""
    found: dict[str, int] = {}
    for place, heading in enumerate(header):
        name = COLUMNS.get("".join(c for c in heading.casefold() if c.isalnum()))
        if name in found:
            raise UsageError(f"{path}: the columns {header[found[name]]!r} and {heading!r} both hold {name}.")
        if name is not None:
            found[name] = place
    if "name" not in found:
        told = ", ".join(repr(text_of(heading)[:40]) for heading in header[:8])
        raise UsageError(
            f"{path} has no column Experiment (or name) in its first line, which is {told}. "
            f"The published format begins: Experiment, {', '.join(PUBLISHED.values())}."
        )
    return found


def _cells(
    path: Path, lines: Iterator[tuple[int, list[str]]], columns: Mapping[str, int], width: int
) -> Iterator[tuple[int, dict[str, str]]]:
    for line, cells in lines:
        if len(cells) > width and any(cells[width:]):
            raise UsageError(
                f"{path}, line {line} has {len(cells)} cells under {width} column names. A comma inside a number or a "
                "text needs quotation marks around it."
            )
        yield line, {name: cells[at] for name, at in columns.items() if at < len(cells)}


def _row(table: _Table, line: int, texts: Mapping[str, str], decimal_comma: bool) -> _Row:
    place = f"{table.label}, line {line}"
    try:
        name = texts.get("name", "")
        settings, left_out = named_settings(name)
        if left_out:
            table.notes.append(f"{place}: the name was cut short, so the setting at its end is not known.")
        columns = {key: setting_value(key, text) for key, text in texts.items() if key in FIELDS}
        told = {key: value for key, value in columns.items() if value is not None}
        for key, value in told.items():
            if key in settings and settings[key] != value and key not in ("corpus", "init_from"):
                raise UsageError(f"its name says {key}={settings[key]}, the column {key} {value}.")
        figures = {key: number(texts.get(key, ""), decimal_comma, count=key in COUNTS) for key in NUMBERS}
    except UsageError as problem:
        raise UsageError(f"{table.path}, line {line}: {problem}") from None
    record: dict[str, Any] = {"name": name, "source": "nanostudy" if table.own else "table", "part": _part(table.path)}
    record |= {key: text_of(texts[key]) or None for key in TEXTS if key in texts}
    record |= {**settings, **told}
    record |= {key: figure.value for key, figure in figures.items() if math.isfinite(figure.value)}
    if all(measure in record for measure in MEASURES):
        record.pop("gap", None)  # it follows from them
    record |= dict(zip(("status", "reason"), _status(record, figures), strict=True))
    if table.own and record["status"] == "finished":
        record["updates"] = record.get("updates", record.get("max_iters"))
    units = {key: figure.unit / 2 for key, figure in figures.items()}
    _check_gap(table, place, figures)
    return _Row(place, record, units)


def _part(path: Path) -> str | None:
    """As the published study names its folders."""
    parent = path.resolve().parent.name
    return parent.removeprefix("nanoGPT_results_") if parent.startswith("nanoGPT_results_") else None


def _status(record: Mapping[str, Any], figures: Mapping[str, Number]) -> tuple[str, str | None]:
    """(status, reason): as a column says, else from the validation loss, or the training loss where there is no other."""
    known = str(record.get("status") or "").lower()
    if known in STATUSES:
        return known, record.get("reason")
    loss = figures["val_loss"] if figures["val_loss"].given else figures["train_loss"]
    if not loss.given:
        return "waiting", "the table has no loss of it: it diverged, or did not finish"
    if not math.isfinite(loss.value):
        return "diverged", f"the table says {loss.text}"
    return "finished", record.get("reason")


def _check_gap(table: _Table, place: str, figures: Mapping[str, Number]) -> None:
    train, val, gap = (figures[name] for name in (*MEASURES, "gap"))
    if not all(math.isfinite(figure.value) for figure in (train, val, gap)):
        return
    if abs(val.value - train.value - gap.value) > (train.unit + val.unit + gap.unit) / 2 * (1 + 1e-6):
        table.notes.append(
            f"{place}: Loss Gap {gap.text} contradicts its own losses, {val.text} - {train.text} = "
            f"{val.value - train.value:.4f}. The gap here is the difference of the losses."
        )


# --- what is told of a table


def _told_of_columns(table: _Table, columns: Mapping[str, int], header: Sequence[str]) -> list[str]:
    name, told = table.label, []
    missing = [heading for column, heading in PUBLISHED.items() if column not in columns]
    if missing:
        told.append(f"{name} has no column {' and no '.join(missing)}: analyses that need it leave its rows out.")
    unread = [repr(text_of(heading)) for place, heading in enumerate(header) if place not in columns.values()]
    if unread:
        told.append(f"{name}: not read: {_some(unread)}.")
    if not table.own and any("parameters" in row.record for row in table.rows):
        told.append(
            f"{name}: its parameters are as the table says; nanoGPT counts without position embeddings, and the "
            "published tables round to 10,000."
        )
    return told


def _told_of_rows(table: _Table) -> list[str]:
    if not table.rows:
        return [f"{table.label} holds no experiments."]
    without = [row.name for row in table.rows if row.record["status"] != "finished"]
    if not without:
        return []
    return [
        f"{table.label}: {counted(len(without), 'experiment')} of {len(table.rows):,} without a result "
        f"(diverged, or not finished): {_some(without)}."
    ]


def _some(texts: Sequence[str]) -> str:
    return ", ".join(texts[:SHOWN]) + (f" and {len(texts) - SHOWN:,} more" if len(texts) > SHOWN else "")


# --- several


def _merged(rows: Sequence[_Row]) -> tuple[list[_Row], list[str]]:
    by_name: dict[str, list[_Row]] = {}
    for row in rows:
        by_name.setdefault(row.name, []).append(row)
    kept, notes, again = [], [], 0
    for same in by_name.values():
        done = [row for row in same if row.record["status"] in ("finished", "diverged")] or same
        finest = min(done, key=lambda row: row.half_units["val_loss"] or math.inf)
        if all(_agree(row, finest) for row in done):
            again += len(same) - 1
            known = [{key: value for key, value in row.record.items() if value is not None} for row in same]
            record = {key: value for one in known for key, value in one.items()} | finest.record
            kept.append(_Row(finest.place, record, finest.half_units))
            continue
        told = "; ".join(row.outcome for row in done)
        notes.append(f"{same[0].name} has contradicting results, none of which counts: {told}.")
        settings = {key: value for key, value in same[0].record.items() if key in (*FIELDS, "name", "part", "id")}
        record = {**settings, "source": "table", "status": "failed", "reason": f"contradicting results: {told}"}
        kept.append(_Row(same[0].place, record, {}))
    if again:
        notes.append(f"{counted(again, 'row')} told again what another one tells: each experiment counts once.")
    return kept, notes


def _agree(one: _Row, other: _Row) -> bool:
    """Whether both may be roundings of the same result."""
    if one.record["status"] != other.record["status"]:
        return False
    for measure in MEASURES:
        if measure in one.record and measure in other.record:
            apart = abs(one.record[measure] - other.record[measure])
            if apart > max(one.half_units[measure], other.half_units[measure]) * (1 + 1e-6):
                return False
    return True


def _number(rows: Sequence[_Row], notes: list[str]) -> None:
    """The tables' ids where every experiment has one of its own, else the order of the rows, from 1."""
    ids = [row.record.get("id") for row in rows]
    if len({id for id in ids if id is not None and id == int(id)}) == len(ids):
        for row in rows:
            row.record["id"] = int(row.record["id"])
        return
    if any(id is not None for id in ids):
        notes.append("The tables' ids are not unique together: the experiments are numbered in order of the rows.")
    for place, row in enumerate(rows, start=1):
        row.record["id"] = place
