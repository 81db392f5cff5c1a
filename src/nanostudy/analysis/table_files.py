"""Tables of results as people keep them: CSV, TSV, JSON, JSON lines, and what nanoGPT's train.py prints. Every cell is a text.

Raises UsageError, with file and line, at what cannot be read. Nothing of a file is executed.
"""

from __future__ import annotations

import csv
import gzip
import hashlib
import io
import json
import re
import zlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from nanostudy.errors import UsageError
from nanostudy.reading import read_file
from nanostudy.validation import letters

JSONS, LOGS = (".json", ".jsonl", ".ndjson"), (".log", ".txt", ".out")
SUFFIXES = (".csv", ".tsv", *JSONS, *LOGS, ".gz")
SEPARATORS = (",", ";", "\t")
LARGEST = 2**26  # bytes of a file, packed or not
MOST_ROWS, MOST_COLUMNS = 100_000, 2_000
NAMES = {"name", "run_name", "exp_name", "experiment", "label"}
USUAL_STEMS = re.compile(r"(loss_?)?(log|history|curve|metrics|output|out|train|training|results?|summary|evaluations)")

CONFIG = re.compile(
    r"(?:config|params?|cfg|hparams?|hyperparameters|args|settings|hp)\s*(?:[/.:]|(?<=params)_|(?<=cfg)_)\s*", re.I
)
METRICS = re.compile(r"(?:summary|metrics?|user_attrs|system_attrs|results?)\s*(?:[/.:]|(?<=attrs)_)\s*", re.I)
LOSS_LINE = re.compile(
    r"[ \t]*step[ \t]+([\d,]{1,15})[ \t]*:[ \t]*train loss[ \t]+([^\s,]+),?[ \t]+val(?:idation)? loss[ \t]+(\S+)", re.I
)
PARAMETERS = re.compile(r"number of parameters:\s*([\d.]+)\s*M\b")
SAVING = re.compile(r"saving checkpoint to (\S+)")
OVERRIDDEN = re.compile(r"^(?:Overriding:\s*)?([A-Za-z_]\w{0,40})\s*=\s*([^#=][^#]{0,200}?)\s*(?:#.*)?$")


@dataclass(frozen=True, eq=False)
class Column:
    heading: str
    cells: Sequence[str]

    @property
    def configured(self) -> bool:
        """Whether config/, params_ or the like stand before it."""
        return CONFIG.match(self.heading) is not None

    @cached_property
    def key(self) -> str:
        """What headings are compared by."""
        return letters(bare(self.heading))


@dataclass(frozen=True, eq=False)
class Table:
    """`rows` have a cell per heading."""

    label: str  # in messages
    checksums: Mapping[str, str]  # of files, by their paths
    header: list[str]
    at: list[tuple[Path, str]]  # where each row stands: a file, and "line 2"
    rows: list[list[str]]
    curves: Mapping[int, list[dict[str, str]]] = field(default_factory=dict)  # of a row: a mapping per evaluation

    @property
    def where(self) -> str:
        """In errors: the file's path."""
        return next(iter(self.checksums)) if len(self.checksums) == 1 else self.label

    @cached_property
    def columns(self) -> list[Column]:
        return [Column(heading, [row[place] for row in self.rows]) for place, heading in enumerate(self.header)]


def bare(heading: str) -> str:
    """Without config/, params_, metrics/ and the like before it."""
    return CONFIG.sub("", heading, count=1) if CONFIG.match(heading) else METRICS.sub("", heading, count=1)


def stem_of(path: Path) -> str:
    """What a file is about: its folder says more where it is called as every such file is."""
    stem = path.name.split(".")[0]
    return path.resolve().parent.name if USUAL_STEMS.fullmatch(stem.lower()) else stem


def label_of(path: Path) -> str:
    return str(Path(*path.parts[-2:])) if USUAL_STEMS.fullmatch(path.name.split(".")[0].lower()) else path.name


def is_log(path: Path) -> bool:
    """Whether it is read as what train.py prints."""
    return _suffix(path) in LOGS


def _suffix(path: Path) -> str:
    return Path(path.name.lower().removesuffix(".gz")).suffix


def read_table_file(path: Path) -> Table:
    try:
        raw = read_file(path, LARGEST)
    except OSError as problem:
        raise UsageError(f"{path} cannot be read ({problem.strerror}).") from None
    checksum = hashlib.sha256(raw).hexdigest()
    if raw.startswith(b"\x1f\x8b"):
        raw = _unpacked(path, raw)
    if raw.startswith(b"PK\x03\x04"):
        raise UsageError(f"{path}, line 1, is a spreadsheet or an archive, not text. Save the table in it as CSV.")
    text = _decoded(path, raw)
    suffix = _suffix(path)
    curves: dict[int, list[dict[str, str]]] = {}
    unit = "experiment" if suffix == ".json" else "line"
    if suffix in JSONS:
        header, numbered = _of_records(path, _records(path, text, suffix == ".json"))
    elif suffix in LOGS:
        header, numbered, curves = _of_log(path, text)
    else:
        header, numbered = _cells(path, text)
    if len(numbered) > MOST_ROWS or len(header) > MOST_COLUMNS:
        raise UsageError(
            f"{path} has {len(numbered):,} rows and {len(header):,} columns; {MOST_ROWS:,} and {MOST_COLUMNS:,} at most are read."
        )
    at = [(path, f"{unit} {number:,}") for number, _ in numbered]
    rows = [[*row, *[""] * (len(header) - len(row))] for _, row in numbered]
    return Table(label_of(path), {str(path): checksum}, header, at, rows, curves)


def _unpacked(path: Path, raw: bytes) -> bytes:
    try:
        with gzip.open(io.BytesIO(raw)) as file:
            content = file.read(LARGEST + 1)
    except (OSError, EOFError, zlib.error):
        raise UsageError(f"{path} is damaged: it cannot be unpacked.") from None
    if len(content) > LARGEST:
        raise UsageError(f"{path} has more than {LARGEST:,} bytes when it is unpacked.")
    return content


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


Numbered = list[tuple[int, list[str]]]  # rows with their lines


# --- CSV


def _cells(path: Path, text: str) -> tuple[list[str], Numbered]:
    """(the first line's headings, a row of texts per other line that is not blank)."""
    if text.lower().startswith("sep="):  # for spreadsheets
        text = "\n" + text.partition("\n")[2]
    first = next(filter(str.strip, text.split("\n")), "")
    separator = max(SEPARATORS, key=first.count)
    reader = csv.reader(io.StringIO(text), delimiter=separator, skipinitialspace=True, strict=True)
    numbered, line = [], 1
    try:
        for row in reader:
            cells = [_cell(cell) for cell in row]
            if any(cells):
                numbered.append((line, cells))
            line = reader.line_num + 1
    except csv.Error as problem:
        why = "a quotation mark is never closed, or stands within a cell" if "limit" not in str(problem) else problem
        raise UsageError(f"{path}, line {line} is no line of a table: {why}.") from None
    if not numbered:
        raise UsageError(f"{path} is empty: it has no line of column names, such as Experiment, Val Loss.")
    header = numbered[0][1]
    for line, row in numbered[1:]:
        count = max(place for place, cell in enumerate(row, start=1) if cell)
        if count > len(header):
            why = "A comma inside a number or a text needs quotation marks around it."
            raise UsageError(f"{path}, line {line}: it has {count} cells under {len(header)} column names. {why}")
        other = next((mark for mark in SEPARATORS if mark != separator and mark in row[0]), None)
        if count == 1 and len(header) > 2 and other:
            marks = (repr(other), repr(separator))
            raise UsageError(
                f"{path}, line {line}: its cells are separated by {marks[0]}, those of the first line by {marks[1]}."
            )
    return header, [(line, row[: len(header)]) for line, row in numbered[1:]]


def _cell(text: str) -> str:
    return re.sub(r"^'(?=[=+@-])", "", text.strip())  # as text.csv_cell wrote it


# --- JSON


def _records(path: Path, text: str, whole: bool) -> list[tuple[int, Mapping[str, Any]]]:
    """The experiments of a JSON file, or of one per line, each with its line (of a whole file: its number)."""
    documents = [(1, text)] if whole else [(n, line) for n, line in enumerate(text.split("\n"), 1) if line.strip()]
    found: list[tuple[int, Mapping[str, Any]]] = []
    for line, document in documents:
        try:
            value = json.loads(document)
        except (ValueError, RecursionError) as problem:
            at = line + (getattr(problem, "lineno", 1) - 1)
            why = getattr(problem, "msg", None) or "too deep or too large"
            raise UsageError(f"{path}, line {at} is no JSON: {why}.") from None
        experiments = _experiments(value)
        if experiments is None:
            raise UsageError(f"{path}, line {line} holds no experiment: name settings and results in an object.")
        found += [(line + place, one) for place, one in enumerate(experiments)]
    return found


def _experiments(value: Any) -> list[Mapping[str, Any]] | None:
    """Of a list of objects, of objects by name, of columns, or of one object; None where there are none."""
    if isinstance(value, list):
        return value if value and all(isinstance(one, dict) for one in value) else None
    if not isinstance(value, dict) or not value:
        return None
    within = list(value.values())
    lists = [one for one in within if isinstance(one, list) and one and all(isinstance(row, dict) for row in one)]
    if lists:
        return max(lists, key=len)
    if all(isinstance(one, dict) and one for one in within):
        places = set(within[0])
        if all(set(one) == places for one in within) and all(map(str.isdigit, places)):  # as pandas writes it
            return [{name: column[place] for name, column in value.items()} for place in within[0]]
        if all(not isinstance(cell, (dict, list)) for one in within for cell in one.values()):
            return [{"name": name, **one} for name, one in value.items()] if len(value) > 1 else within
    return [value]


def _of_records(path: Path, records: Sequence[tuple[int, Mapping[str, Any]]]) -> tuple[list[str], Numbered]:
    if not records:
        raise UsageError(f"{path} is empty: it holds no experiments.")
    flat = [(line, dict(_flat(one))) for line, one in records]
    if len(flat) == 1 and not NAMES & flat[0][1].keys():  # it has its file's name
        flat = [(flat[0][0], {"name": stem_of(path), **flat[0][1]})]
    header = list(dict.fromkeys(key for _, one in flat for key in one))
    return header, [(line, [one.get(key, "") for key in header]) for line, one in flat]


def _flat(record: Mapping[str, Any], prefix: str = "", depth: int = 0) -> Iterable[tuple[str, str]]:
    """Objects within objects as config/lr. Lists are left out: a cell is one value."""
    for key, value in record.items():
        name = f"{prefix}{key}"
        if isinstance(value, dict) and depth < 8:
            yield from _flat(value, f"{name}/", depth + 1)
        elif not isinstance(value, (dict, list)):
            yield name, ("" if value is None else str(value).lower() if isinstance(value, bool) else str(value)).strip()


# --- what nanoGPT's train.py prints


def _of_log(path: Path, text: str) -> tuple[list[str], Numbered, dict[int, list[dict[str, str]]]]:
    """(headings, a row per training, its evaluations). Settings are those that the log shows; a training begins at step 0."""
    runs: list[_LoggedRun] = []
    before: dict[str, str] = {}  # settings of the run whose first evaluation is still to come
    for line, content in enumerate(text.split("\n"), start=1):
        if match := LOSS_LINE.match(content):
            step = match[1].replace(",", "")
            if not runs or step == "0":
                runs.append(_LoggedRun(before))
            else:  # what was resumed goes on from an earlier step
                runs[-1].settings |= before
                runs[-1].points = [point for point in runs[-1].points if int(point["step"]) < int(step)]
            before = {}
            runs[-1].points.append({"step": step, "train_loss": match[2], "val_loss": match[3]})
            runs[-1].line = line
        elif match := PARAMETERS.search(content):
            before["parameters"] = f"{float(match[1]):.2f}e6"
        elif match := OVERRIDDEN.match(content):
            before[match[1]] = match[2].strip("'\"")
        elif runs and (match := SAVING.match(content)):
            runs[-1].settings.setdefault("out_dir", match[1])
    if not runs:
        example = "`step 250: train loss 2.4012, val loss 2.4120`"
        raise UsageError(f"{path} is no log of nanoGPT's train.py: it has no line such as {example}.")
    names = [stem_of(path)]
    if len(runs) > 1:
        folders = [Path(run.settings.get("out_dir", "")).name for run in runs]
        distinct = len({*folders, ""}) > len(runs)
        names = folders if distinct else [f"{names[0]} {number}" for number in range(1, len(runs) + 1)]
    rows = [{"name": name, **run.row()} for name, run in zip(names, runs, strict=True)]
    header = list(dict.fromkeys(heading for row in rows for heading in row))
    numbered = [(run.line, [row.get(heading, "") for heading in header]) for run, row in zip(runs, rows, strict=True)]
    return header, numbered, {place: run.points for place, run in enumerate(runs)}


@dataclass
class _LoggedRun:
    settings: dict[str, str]
    points: list[dict[str, str]] = field(default_factory=list)  # evaluations
    line: int = 1  # of the last evaluation

    def row(self) -> dict[str, str]:
        steps = [int(point["step"]) for point in self.points]
        interval = {"eval_interval": str(steps[-1] - steps[-2])} if len(steps) > 1 else {}  # it may end between two
        return {**interval, **self.settings, **self.points[-1]}
