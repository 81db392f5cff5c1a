"""Tables of results, the published study's and this project's own results.csv, as Results.

Text in a table is data: names must be names of experiments, numbers numbers, and the rest is kept as plain text or ignored.
Raises UsageError, with file and line, at what cannot be read; what is missing or odd becomes a note.
"""

from __future__ import annotations

import hashlib
import io
import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import pandas as pd

from nanostudy.analysis.frames import Results, experiments_frame
from nanostudy.errors import UsageError
from nanostudy.measures import stored
from nanostudy.result import Status
from nanostudy.settings import FIELDS, Experiment, check_value
from nanostudy.study.grid import IN_PUBLISHED_NAME, LONGEST_NAME
from nanostudy.text import counted, listed

LOSSES = ("train_loss", "val_loss")
PUBLISHED = {"train_loss": "Train Loss", "val_loss": "Val Loss", "gap": "Loss Gap", "parameters": "Total Params"}
COUNTS = ("id", "parameters", "updates", "best_step", "tokens", "seconds")  # thousands separators may stand in them
NUMBERS = (*dict.fromkeys((*COUNTS, "gap", *stored())),)
TEXTS = ("part", "status", "reason")
HEADINGS = {  # the letters and digits of a heading, and the column's name here
    **{name.replace("_", ""): name for name in (*FIELDS, *NUMBERS, *TEXTS)},
    **{heading.replace(" ", "").lower(): name for name, heading in PUBLISHED.items()},
    **{"experiment": "name", "name": "name", "step": "updates", "params": "parameters", "configpath": "config_path"},
    **{"trainingloss": "train_loss", "validationloss": "val_loss", "totalparameters": "parameters"},
}
SEPARATORS = (",", ";", "\t")
NO_NUMBER = ("", "-", "na", "n/a", "#n/a", "null", "none", "<na>")
NOT_FINITE = {"nan": math.nan, "inf": math.inf, "+inf": math.inf, "-inf": -math.inf, "infinity": math.inf}
DECIMAL = re.compile(r"[+-]?(?=\.?\d)\d*\.?(\d*)(?:[eE]([+-]?\d{1,9}))?", re.ASCII)  # groups: fraction, exponent
THOUSANDS = r"[+-]?\d{1,3}(?:[,\u0020\u00a0\u202f'_]\d{3})+(?:\.\d*)?"  # 800,000.0; or with spaces, apostrophes
OTHERS = "|".join(sorted((name for name in FIELDS if name not in (*IN_PUBLISHED_NAME, "seed")), key=len, reverse=True))
NAME = re.compile(
    r"b(?P<block_size>\d+)_L(?P<n_layer>\d+)_H(?P<n_head>\d+)_E(?P<n_embd>\d+)_BS(?P<batch_size>\d+)_MI(?P<max_iters>\d+)"
    r"_D(?P<dropout>\d+(?:\.\d+)?(?:e-?\d+)?)_s(?P<seed>\d+)(?P<others>(?:_.*)?)",
    re.ASCII,
)
HASH = re.compile(r"_[0-9a-f]{8}")  # at the end of a name that would be too long, or was taken
MOST_NAMED = 3  # in a note


class _Row(NamedTuple):
    place: str  # "results.csv, line 2"
    record: dict[str, Any]  # as experiments_frame takes it
    half_units: dict[str, float]  # half a unit of the last digit: how far rounding may have moved a number


def read_tables(paths: Sequence[Path]) -> Results:
    """The tables as one. An experiment that several rows agree on is there once; one that they contradict each other on
    has no result: it counts as failed, with both results as the reason and in the notes.
    """
    rows: list[_Row] = []
    notes: list[str] = []
    checksums = {str(path): _read(path, rows, notes) for path in paths}
    rows = _merged(rows, notes)
    _number_experiments(rows, notes)
    # the folder says more where the file is called as every such table is
    titles = [(path.name.lower() == "results.csv" and path.resolve().parent.name) or path.stem for path in paths]
    titles = list(dict.fromkeys(titles))
    return Results(
        " + ".join(titles) if len(titles) <= MOST_NAMED else counted(len(titles), "table"),
        experiments_frame([row.record for row in rows]),
        provenance={"paths": list(checksums), "checksums": checksums},
        notes=tuple(notes),
    )


# --- one table


def _read(path: Path, rows: list[_Row], notes: list[str]) -> str:
    """Adds the table's rows and notes, and returns its checksum."""
    try:
        raw = path.read_bytes()
    except OSError as problem:
        raise UsageError(f"{path} cannot be read ({problem.strerror}).") from None
    header, cells = _cells(path, _decoded(path, raw))
    columns = _columns(path, header)
    own = {"status", "val_loss", "id"} <= set(columns)  # written by this project: its losses are exact
    label = str(Path(*path.parts[-2:])) if path.name.lower() == "results.csv" else path.name
    losses = cells[[columns[name] for name in (*LOSSES, "gap") if name in columns]]
    decimal_comma = any(re.fullmatch(r"[+-]?\d*,\d+", text) for text in losses.to_numpy().ravel())
    new = []
    for line, row in zip(cells.index, cells.to_numpy().tolist(), strict=True):
        try:
            if any(row[len(header) :]):
                count = max(place for place, cell in enumerate(row, start=1) if cell)
                why = "A comma inside a number or a text needs quotation marks around it."
                raise UsageError(f"it has {count} cells under {len(header)} column names. {why}")
            texts = {name: row[place] for name, place in columns.items()}
            new.append(_row(path, f"{label}, line {line}", texts, own, decimal_comma, notes))
        except UsageError as problem:
            raise UsageError(f"{path}, line {line}: {problem}") from None
    rows += new
    if missing := [heading for column, heading in PUBLISHED.items() if column not in columns]:
        notes.append(f"{label} has no column {' and no '.join(missing)}: analyses that need it leave its rows out.")
    if unread := [repr(_one_line(heading)) for place, heading in enumerate(header) if place not in columns.values()]:
        notes.append(f"{label}: not read: {listed(unread, MOST_NAMED)}.")
    if not own and any("parameters" in row.record for row in new):
        notes.append(
            f"{label}: its parameters are as the table says; nanoGPT counts without position embeddings, and the published "
            "tables round to 10,000."
        )
    if not new:
        notes.append(f"{label} holds no experiments.")
    if without := [row.record["name"] for row in new if row.record["status"] != "finished"]:
        notes.append(
            f"{label}: {counted(len(without), 'experiment')} of {len(new):,} without a result (diverged, or not finished): "
            f"{listed(without, MOST_NAMED)}."
        )
    return hashlib.sha256(raw).hexdigest()


def _decoded(path: Path, raw: bytes) -> str:
    """As its first bytes say (spreadsheets write UTF-16), else UTF-8."""
    try:
        text = raw.decode("utf-16" if raw.startswith((b"\xff\xfe", b"\xfe\xff")) else "utf-8-sig")
    except UnicodeDecodeError as problem:
        line, what = raw.count(b"\n", 0, problem.start) + 1, f"is not UTF-8 text (byte {problem.start})."
        raise UsageError(f"{path}, line {line} {what} Save it as CSV in UTF-8.") from None
    if "\0" in text:
        line = text.count("\n", 0, text.index("\0")) + 1
        raise UsageError(f"{path}, line {line} holds a zero byte: it is not a table in text form. Save it as CSV.")
    return text.replace("\r\n", "\n").replace("\r", "\n")


def _cells(path: Path, text: str) -> tuple[list[str], pd.DataFrame]:
    """(the first line's headings, a row of texts per other line that is not blank), by their lines."""
    lines = text.split("\n")
    if lines[0].lower().startswith("sep="):  # for spreadsheets
        lines[0] = ""
    first = next(filter(str.strip, lines), "")
    separator = max(SEPARATORS, key=first.count)
    widest = max(line.count(separator) for line in lines) + 1  # at least: separators inside quotation marks count, too
    try:
        table = pd.read_csv(
            io.StringIO("\n".join(lines)),
            sep=separator,
            names=list(range(widest)),
            index_col=False,
            dtype=object,
            keep_default_na=False,
            skip_blank_lines=False,
            skipinitialspace=True,
        )
    except pd.errors.ParserError as problem:  # it counts rows from 0
        row = re.search(r"row (\d+)", str(problem))
        where = f"{path}, line {int(row[1]) + 1}" if row else str(path)
        raise UsageError(f"{where} is no line of a table: a quotation mark is never closed.") from None
    within = table.map(lambda cell: cell.count("\n")).sum(axis=1).cumsum().shift(fill_value=0)
    table.index = pd.Index(range(1, len(table) + 1)) + within.to_numpy()
    table = table.map(lambda cell: re.sub(r"^'(?=[=+@-])", "", cell.strip()))  # as text.csv_cell wrote it
    table = table[(table != "").any(axis=1)]
    if table.empty:
        raise UsageError(f"{path} is empty: it has no line of column names, such as Experiment, Val Loss.")
    return list(table.iloc[0, : first.count(separator) + 1]), table.iloc[1:]


def _columns(path: Path, header: Sequence[str]) -> dict[str, int]:
    """Where each known column stands."""
    columns: dict[str, int] = {}
    for place, heading in enumerate(header):
        name = HEADINGS.get("".join(c for c in heading.casefold() if c.isalnum()))
        if name in columns:
            raise UsageError(f"{path}: the columns {header[columns[name]]!r} and {heading!r} both hold {name}.")
        if name is not None:
            columns[name] = place
    if "name" not in columns:
        raise UsageError(
            f"{path} has no column Experiment (or name) in its first line, which is "
            f"{', '.join(repr(_one_line(heading)[:40]) for heading in header[:8])}. "
            f"The published format begins: Experiment, {', '.join(PUBLISHED.values())}."
        )
    return columns


def _row(path: Path, place: str, texts: Mapping[str, str], own: bool, decimal_comma: bool, notes: list[str]) -> _Row:
    name, parent = texts["name"], path.resolve().parent.name
    settings, cut = _named_settings(name)
    if cut:
        notes.append(f"{place}: the name was cut short, so the setting at its end is unknown.")
    given = {key: value for key in texts if key in FIELDS and (value := _setting_value(key, texts[key])) is not None}
    for key, value in given.items():
        if key in settings and settings[key] != value and key not in ("corpus", "init_from"):
            raise UsageError(f"its name says {key}={settings[key]}, the column {key} {value}.")
    numbers = {key: _number(texts.get(key, ""), decimal_comma, count=key in COUNTS) for key in NUMBERS}
    record: dict[str, Any] = {"name": name, "source": "nanostudy" if own else "table"}
    if parent.startswith("nanoGPT_results_"):  # as the published study names its parts' folders
        record["part"] = parent.removeprefix("nanoGPT_results_")
    record |= {key: _one_line(texts[key]) or None for key in TEXTS if key in texts}
    record |= settings | given | {key: number.value for key, number in numbers.items() if math.isfinite(number.value)}
    if all(loss in record for loss in LOSSES):
        record.pop("gap", None)  # it follows from them
        train, val, gap = (numbers[loss] for loss in (*LOSSES, "gap"))
        if abs(val.value - train.value - gap.value) > (train.unit + val.unit + gap.unit) / 2 * (1 + 1e-6):
            notes.append(
                f"{place}: Loss Gap {gap.text} contradicts its own losses, {val.text} - {train.text} = "
                f"{val.value - train.value:.4f}. The gap here is the difference of the losses."
            )
    record["status"], record["reason"] = _status(record, numbers)
    if own and record["status"] == "finished":
        record["updates"] = record.get("updates", record.get("max_iters"))
    return _Row(place, record, {key: number.unit / 2 for key, number in numbers.items()})


def _status(record: Mapping[str, Any], numbers: Mapping[str, _Number]) -> tuple[str, str | None]:
    """(status, reason): as a column says, else by the validation loss, or the training loss where there is no other."""
    status = str(record.get("status") or "").lower()
    if status in list(Status):
        return status, record.get("reason")
    loss = numbers["val_loss" if numbers["val_loss"].text else "train_loss"]
    if not loss.text:
        return "waiting", "the table gives no loss: it diverged, or did not finish"
    if not math.isfinite(loss.value):
        return "diverged", f"the table says {loss.text}"
    return "finished", record.get("reason")


# --- several tables


def _merged(rows: Sequence[_Row], notes: list[str]) -> list[_Row]:
    by_name: dict[str, list[_Row]] = {}
    for row in rows:
        by_name.setdefault(row.record["name"], []).append(row)
    merged, repeated = [], 0
    for name, same in by_name.items():
        done = [row for row in same if row.record["status"] in ("finished", "diverged")] or same
        finest = min(done, key=lambda row: row.half_units["val_loss"] or math.inf)
        if all(_agree(row, finest) for row in done):
            repeated += len(same) - 1
            record = {key: value for row in same for key, value in row.record.items() if value is not None}
            merged.append(_Row(finest.place, record | finest.record, finest.half_units))
            continue
        outcomes = "; ".join(
            f"{row.record['status']}, {', '.join(f'{PUBLISHED[loss]} {row.record.get(loss)}' for loss in LOSSES)} ({row.place})"
            for row in done
        )
        notes.append(f"{name} has contradicting results, none of which counts: {outcomes}.")
        record = {key: value for key, value in same[0].record.items() if key in (*FIELDS, "name", "part", "id")}
        record |= {"source": "table", "status": "failed", "reason": f"contradicting results: {outcomes}"}
        merged.append(_Row(same[0].place, record, {}))
    if repeated:
        notes.append(f"Rows that repeat another one: {repeated:,}. Each experiment counts once.")
    return merged


def _agree(one: _Row, other: _Row) -> bool:
    """Whether both may be roundings of the same result."""
    return one.record["status"] == other.record["status"] and all(
        abs(one.record[loss] - other.record[loss]) <= max(one.half_units[loss], other.half_units[loss]) * (1 + 1e-6)
        for loss in LOSSES
        if loss in one.record and loss in other.record
    )


def _number_experiments(rows: Sequence[_Row], notes: list[str]) -> None:
    """The tables' ids where every experiment has one of its own, else the order of the rows, from 1."""
    ids = {id for row in rows if (id := row.record.get("id", math.nan)).is_integer()}
    if len(ids) < len(rows) and any("id" in row.record for row in rows):
        notes.append("The tables' ids are not unique together: the experiments are numbered in order of the rows.")
    for place, row in enumerate(rows, start=1):
        row.record["id"] = int(row.record["id"]) if len(ids) == len(rows) else place


# --- cells


class _Number(NamedTuple):
    value: float  # NaN where none is given
    unit: float  # of the last digit; 0 where it is unknown
    text: str  # empty where none is given


def _number(text: str, decimal_comma: bool, count: bool) -> _Number:
    """Raises UsageError. `count`: thousands separators may stand in it."""
    word = text.lower()
    if word in NO_NUMBER or word in NOT_FINITE:
        return _Number(NOT_FINITE.get(word, math.nan), 0.0, "" if word in NO_NUMBER else text)
    plain = text.translate(str.maketrans(".,", ",.")) if decimal_comma else text
    if count and re.fullmatch(THOUSANDS, plain):
        plain = re.sub(r"[,\u0020\u00a0\u202f'_]", "", plain)
    match = DECIMAL.fullmatch(plain)
    if not match:
        raise UsageError(f"{_one_line(text)[:60]!r} is no number.")
    return _Number(float(plain), float(f"1e{int(match[2] or 0) - len(match[1])}"), text)


def _setting_value(name: str, text: str) -> Any:
    """A setting's value as data frames hold it: `none` as a word, None where the cell is empty. Raises UsageError."""
    if not text:
        return None
    value = check_value(name, _one_line(text) if name in ("corpus", "init_from") else text)
    return "none" if value is None else value


def _named_settings(name: str) -> tuple[dict[str, Any], bool]:
    """(the settings in an experiment's name, whether one at its end was lost because the name was too long).

    Raises UsageError where it is no such name, or names an impossible experiment.
    """
    cut = len(name) >= LONGEST_NAME and HASH.fullmatch(name[-9:]) is not None
    match = NAME.fullmatch(name[:-9] if cut else name)
    pieces = re.split(rf"_(?=(?:{OTHERS})[=-])", match["others"]) if match else []
    if cut:
        pieces = pieces[:-1]
    elif pieces and not pieces[-1].startswith(("corpus", "init_from")):  # these may end in anything, others in no hash
        pieces[-1] = re.sub(f"{HASH.pattern}$", "", pieces[-1])
    if not match or "".join(pieces[:1]) or not all(re.fullmatch(r"[A-Za-z0-9._=+-]+", piece) for piece in pieces[1:]):
        example = "b64_L4_H4_E128_BS8_MI1000_D10_s1, or that and _learning_rate=0.004"
        raise UsageError(f"{_one_line(name)[:60]!r} is not the name of an experiment, such as {example}.")
    texts = {key: match[key] for key in (*IN_PUBLISHED_NAME, "seed")}
    texts["dropout"] = str(float(texts["dropout"]) / 100)
    experiment = Experiment(**texts)  # type: ignore[arg-type]  # it reads text as the setting's type
    settings = {key: getattr(experiment, key) for key in texts}
    for piece in pieces[1:]:
        key, value = re.fullmatch(rf"({OTHERS})[=-](.*)", piece).groups()  # type: ignore[union-attr]  # they were split there
        settings[key] = _setting_value(key, value or "none")
    return settings, cut


def _one_line(cell: str) -> str:
    """Without control characters."""
    return " ".join("".join(c if c.isprintable() else " " for c in cell).split())
