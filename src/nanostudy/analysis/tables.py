"""Tables of results, other people's and this project's own, as Results: what each row says of an experiment.

Text in a table is data: numbers are numbers, and the rest is kept as plain text or ignored. Raises UsageError, with file and
line, at what cannot be read; what is missing or odd becomes a note.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

from nanostudy.analysis.frames import EVALUATIONS, OURS, Results, experiments_frame, rows_frame
from nanostudy.analysis.table_cells import (
    LOSSES,
    NUMBERS,
    STATUSES,
    Number,
    factor_values,
    named_settings,
    number,
    one_line,
    setting_value,
    status_of,
)
from nanostudy.analysis.table_columns import (
    NOTHING_STATED,
    PUBLISHED,
    Reading,
    Stated,
    described,
    read_columns,
)
from nanostudy.analysis.table_curves import Note, as_curves, of_chart
from nanostudy.analysis.table_files import Table, is_log, label_of, read_table_file, stem_of
from nanostudy.errors import UsageError
from nanostudy.interop.nanogpt_config import SEED
from nanostudy.result import Status
from nanostudy.settings import FIELDS
from nanostudy.text import counted, listed
from nanostudy.validation import letters

TEXTS = ("part", "status", "reason", "source", "study")
MOST_NAMED = 3  # in a note
REPEATED = "rows that repeat another one: {:,}. Each experiment counts once."
LONGEST_NAME = 120  # characters


class Row(NamedTuple):
    record: dict[str, Any]  # as experiments_frame takes it
    half_units: dict[str, float]  # half a unit of the last digit: how far rounding may have moved a number
    curve: list[dict[str, float]]
    tabled: bool  # a table of experiments has it, and not a curve alone
    logged: bool = False  # it is from a log of train.py

    @property
    def key(self) -> tuple[Any, ...]:
        """Of its experiment: its name and all that was set."""
        about = {*NUMBERS, *TEXTS, "name"}
        return (self.record["name"], *sorted((k, str(v)) for k, v in self.record.items() if k not in about))


@dataclass
class Source:
    """Tables of one group: their rows are experiments of one program."""

    headings: set[frozenset[str]]
    rows: list[Row]
    checksums: dict[str, str]  # of files, by their paths

    @property
    def title(self) -> str:
        titles = list(dict.fromkeys(stem_of(Path(path)) for path in self.checksums))
        folders = {Path(path).parent.name for path in self.checksums}
        many = folders.pop() if len(folders) == 1 else ""
        return " + ".join(titles) if len(titles) <= MOST_NAMED else many or counted(len(titles), "table")


def read_tables(
    paths: Sequence[Path], stated: Stated = NOTHING_STATED, perhaps: Collection[Path] = ()
) -> list[Results]:
    """A Results per source. Tables with the same columns, and tables that agree on an experiment, are parts of one; those that
    contradict each other on one are two. Files of one experiment each are one table. What is no table is refused, but for
    those that `perhaps` are none.
    """
    notes: list[Note] = []
    sources: list[Source] = []
    tables: list[Table] = []
    for path in paths:
        try:
            table = read_table_file(path)
            if path in perhaps:
                read_columns(table, stated)
        except UsageError as problem:
            if path not in perhaps or (path == paths[-1] and not tables):
                raise
            notes.append(Note("", f"Left out, for it is no table of results: {problem}"))
        else:
            tables.append(as_curves(of_chart(table), stated, notes))
    for table in _singles_together(tables):
        reading = read_columns(table, stated)
        _into(sources, table, _distinct(table, _rows(table, reading, notes), notes), notes)
    results = []
    for source in sources:
        _seed_of_logs(source, notes)
        _name_apart(source.rows)
        _number_experiments(source.rows, notes)
        _note_what_is_missing(source, notes)
        records = [{"source": source.title, "study": source.title, **row.record} for row in source.rows]
        points = ({"name": row.record["name"], **point} for row in source.rows for point in row.curve)
        results.append(
            Results(
                source.title,
                experiments_frame(records),
                rows_frame(points, EVALUATIONS),
                provenance={"paths": list(source.checksums), "checksums": source.checksums},
            )
        )
    return [replace(results[0], notes=_sentences(notes)), *results[1:]]


# --- files of one experiment each


def _singles_together(tables: Sequence[Table]) -> list[Table]:
    singles = [table for table in tables if len(table.rows) == 1 and (table.curves or "name" in table.header[:1])]
    if len(singles) < 2:
        return list(tables)
    header = list(dict.fromkeys(heading for table in singles for heading in table.header))
    cells = [dict(zip(table.header, table.rows[0], strict=True)) for table in singles]
    whole = Table(
        f"{len(singles)} files of one experiment each",
        {path: checksum for table in singles for path, checksum in table.checksums.items()},
        header,
        [table.at[0] for table in singles],
        [[row.get(heading, "") for heading in header] for row in cells],
        {place: table.curves[0] for place, table in enumerate(singles) if table.curves},
    )
    return [whole, *(table for table in tables if table not in singles)]


# --- one table


def _rows(table: Table, reading: Reading, notes: list[Note]) -> list[Row]:
    """The table's rows. Adds notes."""
    _without_words(reading)
    factors = {name: factor_values(one.cells, reading.decimal_comma) for name, one in reading.factors.items()}
    rows = []
    for i, (path, line) in enumerate(table.at):
        varied = {name: values[i] for name, values in factors.items() if values[i] is not None}
        try:
            rows.append(_row(table, i, reading, varied, notes))
        except UsageError as problem:
            raise UsageError(f"{path}, {line}: {problem}") from None
    _note(table, reading, rows, notes)
    return rows


def _without_words(reading: Reading) -> None:
    """A measure whose column holds anything but numbers is not read; a loss must be read."""
    for name in [name for name in reading.roles if name in NUMBERS and name not in LOSSES]:
        try:
            for text in set(reading.roles[name].cells):
                number(text, reading.decimal_comma, name)
        except UsageError as problem:
            del reading.roles[name]
            reading.unread[name] = str(problem).rstrip(".")


def _note(table: Table, reading: Reading, rows: Sequence[Row], notes: list[Note]) -> None:
    plain = {letters(title) for title in PUBLISHED.values()} | {"experiment", "configpath"}
    if not reading.own and not {letters(heading) for heading in table.header} <= plain:
        notes.append(Note("", described(table, reading)))
    if not reading.own and any("parameters" in row.record for row in rows):
        text = "parameters are as the table says; nanoGPT counts without position embeddings, and the published tables round to 10,000."
        notes.append(Note(table.label, text))
    if not rows:
        notes.append(Note(table.label, "no experiments."))
    if without := [row.record["name"] for row in rows if row.record["status"] != "finished"]:
        text = f"{counted(len(without), 'experiment')} of {len(rows):,} without a result (diverged, or not finished): "
        notes.append(Note(table.label, f"{text}{listed(without, MOST_NAMED)}."))


def _row(table: Table, i: int, reading: Reading, varied: Mapping[str, Any], notes: list[Note]) -> Row:
    """Of the table's i-th row; `varied` are the factors' values."""
    path, line = table.at[i]
    place = f"{label_of(path)}, {line}"
    texts = {name: column.cells[i] for name, column in reading.roles.items()}
    name = _name(texts, i)
    settings, cut = named_settings(name)
    if cut:
        notes.append(Note(place, "the name was cut short, so the setting at its end is unknown."))
    failed = STATUSES.get(texts.get("status", "").lower()) is Status.FAILED  # such a row may hold anything
    given = {
        key: value for key in texts if key in FIELDS and (value := setting_value(key, texts[key], failed)) is not None
    }
    for key, value in given.items():
        if key in settings and settings[key] != value and key not in ("corpus", "init_from"):
            raise UsageError(f"its name says {key}={settings[key]}, the column {key} {value}.")
    numbers = {key: number(texts.get(key, ""), reading.decimal_comma, key, reading.unit) for key in NUMBERS}
    record: dict[str, Any] = {"name": name, **({"source": OURS} if reading.own else {})}
    record |= _part(path)
    record |= {key: one_line(texts[key])[:LONGEST_NAME] or None for key in TEXTS if texts.get(key)}
    record |= {**settings, **given, **varied}
    record |= {key: one.value for key, one in numbers.items() if math.isfinite(one.value)}
    if all(loss in record for loss in LOSSES):
        record.pop("gap", None)  # it follows from them
        if note := _contradicting_gap(numbers):
            notes.append(Note(place, note))
    record["status"], record["reason"] = status_of(record, numbers)
    if reading.own and record["status"] == "finished":
        record["updates"] = record.get("updates", record.get("max_iters"))
    curve = [
        {key: number(text, reading.decimal_comma, key, reading.unit).value for key, text in point.items()}
        for point in table.curves.get(i, [])
    ]
    return Row(record, {key: one.unit / 2 for key, one in numbers.items()}, curve, i not in table.curves, is_log(path))


@lru_cache(maxsize=64)
def _part(path: Path) -> dict[str, str]:
    """Of the file's folder, where it is called as the published study's parts are."""
    parent = path.resolve().parent.name
    return {"part": parent.removeprefix("nanoGPT_results_")} if parent.startswith("nanoGPT_results_") else {}


def _name(texts: Mapping[str, str], index: int) -> str:
    """The row's, of a path its last part; where there is none, its id or its place in the table."""
    name = one_line(texts.get("name", "")).rstrip("/\\")
    name = re.split(r"[/\\]", name)[-1][:LONGEST_NAME] if re.match(r"(/|\.{1,2}/|[A-Za-z]:\\)", name) else name
    if re.fullmatch(r"\d{1,9}(\.0)?", name) or not name:
        return f"experiment {(name or texts.get('id', '') or str(index + 1)).removesuffix('.0')}"
    return name[:LONGEST_NAME] if len(name) <= LONGEST_NAME or not name.startswith("b") else name


def _contradicting_gap(numbers: Mapping[str, Number]) -> str:
    train, val, gap = (numbers[loss] for loss in (*LOSSES, "gap"))
    if not abs(val.value - train.value - gap.value) > (train.unit + val.unit + gap.unit) / 2 * (1 + 1e-6):
        return ""
    return (
        f"Loss Gap {gap.text} contradicts its own losses, {val.text} - {train.text} = {val.value - train.value:.4f}. "
        "The gap here is the difference of the losses."
    )


# --- several rows, several tables


def _distinct(table: Table, rows: Sequence[Row], notes: list[Note]) -> list[Row]:
    """Rows that say again what another one of the table says, or what became of it in a second try, as one."""
    kept: dict[tuple[Any, ...], list[Row]] = {}
    for row in rows:
        same = kept.setdefault(row.key, [])
        again = (
            i for i, one in enumerate(same) if row.record == one.record or ("seed" in row.record and _agree(row, one))
        )
        if (i := next(again, None)) is None:
            same.append(row)
        else:
            same[i] = _united(same[i], row)
    distinct = [row for same in kept.values() for row in same]
    if len(distinct) < len(rows):
        notes.append(Note(table.label, REPEATED.format(len(rows) - len(distinct))))
    return distinct


def _agree(one: Row, other: Row) -> bool:
    """Whether both may be roundings of the same result, or one has none yet."""
    ended = [row.record["status"] in ("finished", "diverged") for row in (one, other)]
    if not all(ended):
        return True
    return one.record["status"] == other.record["status"] and all(
        abs(one.record[loss] - other.record[loss]) <= max(one.half_units[loss], other.half_units[loss]) * (1 + 1e-6)
        for loss in LOSSES
        if loss in one.record and loss in other.record
    )


def _into(sources: list[Source], table: Table, rows: list[Row], notes: list[Note]) -> None:
    """Adds the table's rows to the source that they are of, or as a new one."""
    headings = frozenset(letters(heading) for heading in table.header)
    for source in sources:
        at = _places(rows, source.rows)
        pairs = [(i, row) for i, row in zip(at, rows, strict=True) if i is not None]
        against = [row for i, row in pairs if not _agree(row, source.rows[i])]
        if against:
            text = (
                f"{source.title} and {table.label} contradict each other on {counted(len(against), 'experiment')}, such as "
                f"{against[0].record['name']}: they are read as two sources."
            )
            notes.append(Note("", text))
        elif pairs or headings in source.headings:
            if repeated := sum(row.tabled == source.rows[i].tabled for i, row in pairs):
                notes.append(Note(table.label, REPEATED.format(repeated)))
            for i, row in pairs:
                source.rows[i] = _united(source.rows[i], row)
            source.rows += [row for i, row in zip(at, rows, strict=True) if i is None]
            source.headings.add(headings)
            source.checksums |= table.checksums
            return
    sources.append(Source({headings}, rows, dict(table.checksums)))


def _places(rows: Sequence[Row], there: Sequence[Row]) -> list[int | None]:
    """Where each row's experiment stands among those that are there: by its key, or, where one of the two says its name alone and
    no other has that name, by the name.
    """
    keys = {row.key: i for i, row in enumerate(there)}
    names = {row.record["name"]: i for i, row in enumerate(there)}
    times = Counter(row.record["name"] for row in there), Counter(row.record["name"] for row in rows)
    places: list[int | None] = []
    for row in rows:
        i = names.get(name := row.record["name"])
        bare = i is not None and 1 in (len(row.key), len(there[i].key)) and all(count[name] == 1 for count in times)
        places.append(keys.get(row.key, i if bare else None))
    return places


def _united(one: Row, other: Row) -> Row:
    """What both say of an experiment; where both have a result, with all digits."""
    done = [row for row in (one, other) if row.record["status"] in ("finished", "diverged")] or [one, other]
    finest = min(done, key=lambda row: row.half_units["val_loss"] or math.inf)
    record = {key: value for row in (other, one, finest) for key, value in row.record.items() if value is not None}
    record |= {key: finest.record.get(key) for key in ("status", "reason")}
    return finest._replace(
        record=record,
        curve=one.curve or other.curve,
        tabled=one.tabled or other.tabled,
        logged=one.logged or other.logged,
    )


def _seed_of_logs(source: Source, notes: list[Note]) -> None:
    """train.py has one seed, which its log does not name: unless trainings of equal settings differ, all of them have it."""
    rows = [row for row in source.rows if row.logged and "seed" not in row.record]
    first: dict[tuple[Any, ...], Row] = {}
    if not rows or not all(_agree(row, first.setdefault(row.key[1:], row)) for row in rows):
        return
    for row in rows:
        row.record["seed"] = SEED
    text = f"no log names a seed, so all trainings have that of train.py, {SEED}."
    notes.append(Note(source.title, text))


def _name_apart(rows: Sequence[Row]) -> None:
    """Experiments of one name get their seeds, or numbers, behind it."""
    times = Counter(row.record["name"] for row in rows)
    seeds = {(row.record["name"], row.record.get("seed")) for row in rows}
    told = Counter(name for name, seed in seeds if seed is not None)
    number: Counter[str] = Counter()
    for row in rows:
        name = row.record["name"]
        number[name] += 1
        if times[name] > 1 and told[name] == times[name]:
            row.record["name"] = f"{name} seed {row.record['seed']}"
        elif number[name] > 1:
            row.record["name"] = f"{name} ({number[name]})"


def _number_experiments(rows: Sequence[Row], notes: list[Note]) -> None:
    """The tables' ids where every experiment has one of its own, else the order of the rows, from 1."""
    ids = {id for row in rows if float(id := row.record.get("id", math.nan)).is_integer()}
    if len(ids) < len(rows) and any("id" in row.record for row in rows):
        text = "The tables' ids are not unique together: the experiments are numbered in order of the rows."
        notes.append(Note("", text))
    for place, row in enumerate(rows, start=1):
        row.record["id"] = int(row.record["id"]) if len(ids) == len(rows) else place


def _note_what_is_missing(source: Source, notes: list[Note]) -> None:
    """Measures that the published tables have, and no row of this source."""
    measures = [(name, title) for name, title in PUBLISHED.items() if name != "gap"]
    missing = [title for name, title in measures if all(name not in row.record for row in source.rows)]
    if missing and source.rows:
        notes.append(Note(source.title, f"no {' and no '.join(missing)}; analyses that need it leave these rows out."))


def _sentences(notes: Sequence[Note]) -> tuple[str, ...]:
    """What is said of several tables once."""
    about: dict[str, dict[str, None]] = {}
    for note in notes:
        about.setdefault(note.text, {})[note.about] = None
    return tuple(f"{listed(list(those), MOST_NAMED)}: {text}" if any(those) else text for text, those in about.items())
