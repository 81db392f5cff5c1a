"""A study's results as records, CSV, JSON, and lines for a terminal. Nothing here needs torch."""

from __future__ import annotations

import csv
import io
import itertools
import json
import os
import shutil
import textwrap
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any

from nanostudy.errors import NanostudyError
from nanostudy.measures import MEASURES, Measure
from nanostudy.result import Result, Status
from nanostudy.settings import FIELDS
from nanostudy.study.definition import command, definitions
from nanostudy.study.names import SHORT, label, varying, word
from nanostudy.study.notes import STAR, Note, read_notes
from nanostudy.study.store import Store
from nanostudy.text import csv_cell, duration, listed, printable

Record = Mapping[str, Any]

BEST = 5  # experiments in the short status
MOST_FAILED = 10
MOST_ROWS = 60  # of a notebook's table
MOST_LOST = 3
SHORTEST_NAME = 12  # characters of a name that still tell something
LEFT_OUT = (("parameters",), ("parameters", "gap"), ("parameters", "gap", "train_loss"))  # of a table that is too wide
QUIET = 120.0  # seconds without progress after which a study may have ended


def records(rows: Sequence[Result]) -> Iterator[dict[str, Any]]:
    """One record per experiment, with the settings in which the experiments differ. Losses are in nats per token."""
    differing: dict[str, set[str]] = {name: set() for name in FIELDS}
    for row in rows:  # settings are parsed twice and not kept: there may be a million
        each = json.loads(row.settings)
        for name, values in differing.items():
            if len(values) < 2:
                values.add(str(each.get(name)))
    settings = [name for name, values in differing.items() if len(values) > 1]
    tested = any(row.test_loss is not None for row in rows)
    for row in rows:
        yield row.to_record(settings, tested)


class Rows(list[Result]):
    """Results, which a notebook displays as a table."""

    def _repr_html_(self) -> str:
        import pandas as pd

        return str(pd.DataFrame(records(self)).to_html(index=False, na_rep="", max_rows=MOST_ROWS))


def as_csv(table: Iterable[Record]) -> str:
    """Begins with a line of column names; unknown values are empty."""
    text, rows = io.StringIO(), iter(table)
    first = next(rows, {})
    writer = csv.DictWriter(text, list(first), lineterminator="\n")
    writer.writeheader()
    for row in itertools.chain([first] if first else [], rows):
        writer.writerow({key: csv_cell(value) for key, value in row.items()})
    return text.getvalue()


def as_json(content: Any) -> str:
    return json.dumps(content, indent=1)


def as_lines(table: Sequence[Mapping[str, str]], width: int | None = None, cut: str = "") -> list[str]:
    """An aligned table with a line of column names; numbers are to the right. The column `cut` is cut where it is wider than this."""
    if not table:
        return []
    if width is not None and cut in table[0]:
        excess = max(map(len, as_lines(table))) - width
        room = max(SHORTEST_NAME, max(len(row[cut]) for row in table) - max(0, excess))
        table = [{**row, cut: shortened(row[cut], room)} for row in table]
    cells = [list(table[0]), *(list(row.values()) for row in table)]
    columns = list(zip(*cells, strict=True))
    right = [all(cell[:1].isdigit() or cell[:1] in f"-~{STAR}" for cell in column[1:]) for column in columns]
    widths = [max(map(len, column)) for column in columns]
    aligned = [
        [cell.rjust(w) if r else cell.ljust(w) for cell, w, r in zip(row, widths, right, strict=True)] for row in cells
    ]
    return ["  ".join(row).rstrip() for row in aligned]


def fitted(table: Sequence[Mapping[str, str]], superfluous: Sequence[str], cut: str) -> list[str]:
    """As as_lines, in the terminal: without the first of these columns as far as there is no room, and `cut` is cut at last."""
    width, numbers = shutil.get_terminal_size().columns, range(len(superfluous) + 1)
    kept = [[{key: cell for key, cell in row.items() if key not in superfluous[:n]} for row in table] for n in numbers]
    return _first_that_fits([*map(as_lines, kept[:-1]), as_lines(kept[-1], width, cut)], width)


def _first_that_fits(tables: Iterable[list[str]], width: int) -> list[str]:
    """Or else the last."""
    lines: list[str] = []
    for lines in tables:
        if max(map(len, lines), default=0) <= width:
            break
    return lines


@dataclass(frozen=True)
class Listing:
    """How a study's experiments are listed for a person: the settings that vary as columns, and notes."""

    path: Path
    varying: tuple[str, ...]
    notes: Mapping[str, Note]
    problem: str = ""  # why the definition or the notes could not be read

    @staticmethod
    def of(path: Path) -> Listing:
        names: tuple[str, ...] = ()
        try:
            names = varying(definitions(path))
            return Listing(path, names, read_notes(path))
        except NanostudyError as problem:  # results are listed all the same
            return Listing(path, names, {}, str(problem))

    def label(self, row: Result) -> str:
        return label(json.loads(row.settings), self.varying)

    def lines(self, rows: Sequence[Result], with_status: bool = False) -> list[str]:
        """A table that fits the terminal. Losses are in nats per token."""
        width, names = shutil.get_terminal_size().columns, self.varying
        measures = [measure for measure in MEASURES.values() if measure.brief]
        fewer = [[m for m in measures if m.name not in left_out] for left_out in ((), *LEFT_OUT)]
        tables = [(names, some, brief) for brief in (False, True) for some in fewer[: None if brief else 2] if names]
        tables += [((), some, True) for some in fewer]
        made = (as_lines(self._table(rows, *how, with_status), width, "experiment") for how in tables)
        lines = _first_that_fits(made, width)
        below = (self.notes.get(row.name, Note()).text for row in rows)
        wrap = partial(textwrap.wrap, width=width, initial_indent="    ", subsequent_indent="    ")
        return [
            *lines[:1],
            *(part for line, text in zip(lines[1:], below, strict=True) for part in (line, *wrap(printable(text)))),
        ]

    def _table(
        self, rows: Sequence[Result], names: Sequence[str], measures: Sequence[Measure], brief: bool, with_status: bool
    ) -> list[dict[str, str]]:
        table = []
        for row in rows:
            settings = json.loads(row.settings)
            heading = {name: SHORT.get(name, name).removesuffix("=") if brief else name for name in names}
            table.append(
                {
                    "": f"{STAR * self.notes.get(row.name, Note()).star}{row.id}",
                    **({} if names else {"experiment": label(settings, self.varying)}),
                    **{heading[name]: word(settings.get(name)) for name in names},
                    **{m.heading or m.title: m.text(row[m.name]) for m in measures},
                    **({"status": str(row.status)} if with_status else {}),
                }
            )
        return table


def shortened(text: str, width: int) -> str:
    """Cut in the middle, since names differ at their ends."""
    if len(text) <= width:
        return text
    end = max(0, (width - 1) // 2)
    return f"{text[: max(0, width - 1 - end)]}…{text[len(text) - end :]}"[: max(0, width)]


def best_lines(rows: Sequence[Result], listing: Listing) -> list[str]:
    """The finished experiments with the lowest validation losses; those whose settings diverged with another seed are named."""
    finished = [row for row in rows if row.status == "finished" and row.val_loss is not None]
    best = sorted(finished, key=lambda row: (row.val_loss, row.id))[:BEST]
    if not best:
        return []
    lost = {_without_seed(row) for row in rows if row.status == Status.DIVERGED}
    survivors = [listing.label(row) for row in best if _without_seed(row) in lost]
    notes = [f"Settings that diverged with another seed: {listed(survivors)}"] if survivors else []
    return ["", "best by validation loss (nats per token)", *listing.lines(best), *notes]


def _without_seed(row: Result) -> str:
    return json.dumps({name: value for name, value in json.loads(row.settings).items() if name != "seed"})


def failure_lines(rows: Sequence[Result], listing: Listing, most: int | None = None) -> list[str]:
    """Diverged and failed experiments with their reasons, and how to try again."""
    lines = []
    for status in (Status.DIVERGED, Status.FAILED):
        unsuccessful = [row for row in rows if row.status == status]
        lines += [f"{status:8} {row.id}  {listing.label(row)}: {row.reason}" for row in unsuccessful[:most]]
        if most and len(unsuccessful) > most:
            lines.append(f"         and {len(unsuccessful) - most:,} more {status}")
    if any(row.status == "failed" for row in rows):
        lines.append(f"\nTry what failed again with: {command('retry', listing.path)}")
    return ["", *lines] if lines else []


def lost_lines(statuses: Mapping[str, Status], path: Path) -> list[str]:
    """Experiments with a result whose run folders are gone, and how to train them again."""
    ended = [name for name, status in statuses.items() if status.has_result]
    lost = [name for name in ended if not os.path.lexists(path / name / "run.json")]
    if not lost:
        return []
    again = command("retry", path, *lost[: len(lost) == 1])
    return ["", f"Without a run folder in {path}: {listed(lost, MOST_LOST)}. Train again with: {again}"]


def status_lines(store: Store, path: Path, every: bool = False) -> list[str]:
    """How far a study is, with its best experiments, or with all of them (`every`)."""
    counts, listing = store.counts(), Listing.of(path)
    others = [f"{counts[status]:,} {status}" for status in Status if counts[status] and status != "finished"]
    lines = [", ".join([f"{counts[Status.FINISHED]:,} of {sum(counts.values()):,} experiments finished", *others])]
    progress = store.progress()
    if progress and progress[2]:
        lines += _progress_lines(*progress, store, path)
    elif any(counts[status] for status in Status if status.is_undone):
        lines += _kept_lines(store, path)
    failures = [*store.rows(status="diverged"), *store.rows(status="failed")]
    lines += failure_lines(failures, listing, MOST_FAILED)
    lines += lost_lines(store.statuses(), path)
    lines += ["", listing.problem] if listing.problem else []
    if every:
        return [*lines, "", *listing.lines(store.rows(), with_status=True)]
    lines += best_lines([*store.best(BEST), *store.rows(status=Status.DIVERGED)], listing)
    noted = store.rows(names=list(listing.notes))
    return [*lines, "", "stars and notes", *listing.lines(noted)] if noted else lines


def _kept_lines(store: Store, path: Path) -> list[str]:
    """What a study that does not run has kept of what it had begun."""
    number, least, most = store.begun()
    updates = f"{least:,}" if least == most else f"{least:,} to {most:,}"
    begun = f"{number:,} of those have begun; they go on from their last checkpoints, about update {updates}"
    return ["", *([begun] if number else []), f"It does not run now. Go on with: {command('run', path)}"]


def _progress_lines(
    recorded: str, left: float | None, workers: Sequence[Mapping[str, Any]], store: Store, path: Path
) -> list[str]:
    age = max(0.0, (datetime.now(UTC) - datetime.fromisoformat(recorded)).total_seconds())
    if age > QUIET:
        return [
            "",
            f"It recorded no progress for {duration(age)}; it may have been killed.",
            *_kept_lines(store, path)[1:],
        ]
    remaining = "not known yet" if left is None else f"about {duration(max(0.0, left - age))}"
    doing = [
        {
            "": f"worker {w['worker']}",
            " ": str(w["doing"]),
            "  ": w["phase"] if w["phase"] != "training" else _loss(w["members"]),
            "   ": f"{w['tokens_per_second']:,} tokens/s",
        }
        for w in workers
    ]
    return ["", f"time left  {remaining}", *as_lines(doing, shutil.get_terminal_size().columns, " ")[1:]]


def _loss(members: Sequence[Mapping[str, Any]]) -> str:
    """The mean of the members' last batches."""
    losses = [member["loss"] for member in members if member["loss"] is not None]
    return f"loss {sum(losses) / len(losses):.3f}" if losses else ""
