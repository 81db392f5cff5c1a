"""A study's results as records, CSV, JSON, and lines for a terminal. Nothing here needs torch."""

from __future__ import annotations

import csv
import io
import itertools
import json
import os
import shlex
from collections.abc import Iterable, Iterator, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from nanostudy.measures import MEASURES
from nanostudy.result import Result, Status
from nanostudy.settings import FIELDS
from nanostudy.study.store import Store
from nanostudy.text import csv_cell, duration, listed

Record = Mapping[str, Any]

BEST = 5  # experiments in the short status
MOST_FAILED = 10
MOST_LOST = 3
QUIET = 120.0  # seconds without progress after which a study may have ended


def records(rows: Sequence[Result]) -> Iterator[dict[str, Any]]:
    """One record per experiment, with the settings in which the experiments differ. Losses are in nats per token."""
    differing: dict[str, set[str]] = {name: set() for name in FIELDS}
    for row in rows:  # settings are parsed twice and not kept: there may be a million
        each = json.loads(row.settings)
        for name, values in differing.items():
            if len(values) < 2:
                values.add(str(each.get(name)))
    varying = [name for name, values in differing.items() if len(values) > 1]
    tested = any(row.test_loss is not None for row in rows)
    for row in rows:
        yield row.to_record(varying, tested)


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


def as_lines(table: Sequence[Mapping[str, str]]) -> list[str]:
    """An aligned table with a line of column names; numbers are to the right."""
    if not table:
        return []
    cells = [list(table[0]), *(list(row.values()) for row in table)]
    columns = list(zip(*cells, strict=True))
    right = [all(cell[:1].isdigit() or cell[:1] in "-~" for cell in column[1:]) for column in columns]
    widths = [max(map(len, column)) for column in columns]
    aligned = [
        [cell.rjust(w) if r else cell.ljust(w) for cell, w, r in zip(row, widths, right, strict=True)] for row in cells
    ]
    return ["  ".join(row).rstrip() for row in aligned]


def of_results(rows: Sequence[Result], with_status: bool = False) -> list[dict[str, str]]:
    """Losses in nats per token."""
    measures = [measure for measure in MEASURES.values() if measure.brief]
    return [
        {
            "": str(row.id),
            "experiment": row.name,
            **{measure.heading or measure.title: measure.text(row[measure.name]) for measure in measures},
            **({"status": row.status} if with_status else {}),
        }
        for row in rows
    ]


def best_lines(rows: Sequence[Result]) -> list[str]:
    """The finished experiments with the lowest validation losses; those whose settings diverged with another seed are named."""
    finished = [(row.val_loss, row.id, row) for row in rows if row.status == "finished" and row.val_loss is not None]
    best = [row for _, _, row in sorted(finished)[:BEST]]
    if not best:
        return []
    lost = {_without_seed(row) for row in rows if row.status == Status.DIVERGED}
    survivors = [row.name for row in best if _without_seed(row) in lost]
    notes = [f"Settings that diverged with another seed: {listed(survivors)}"] if survivors else []
    return ["", "best by validation loss (nats per token)", *as_lines(of_results(best)), *notes]


def _without_seed(row: Result) -> str:
    return json.dumps({name: value for name, value in json.loads(row.settings).items() if name != "seed"})


def failure_lines(rows: Sequence[Result], path: Path, most: int | None = None) -> list[str]:
    """Diverged and failed experiments with their reasons, and how to try again."""
    lines = []
    for status in (Status.DIVERGED, Status.FAILED):
        unsuccessful = [row for row in rows if row.status == status]
        lines += [f"{status:8} {row.name}: {row.reason}" for row in unsuccessful[:most]]
        lines += (
            [f"         and {len(unsuccessful) - most:,} more {status}"] if most and len(unsuccessful) > most else []
        )
    if any(row.status == "failed" for row in rows):
        lines.append(f"\nTry what failed again with: nanostudy study retry {shlex.quote(str(path))}")
    return ["", *lines] if lines else []


def again_command(path: Path, name: str) -> str:
    return f"nanostudy study retry {shlex.quote(str(path))} {shlex.quote(name)}"


def lost_lines(statuses: Mapping[str, Status], path: Path) -> list[str]:
    """Experiments with a result whose run folders are gone, and how to train them again."""
    ended = [name for name, status in statuses.items() if status.has_result]
    lost = [name for name in ended if not os.path.lexists(path / name / "run.json")]
    if not lost:
        return []
    command = again_command(path, lost[0]) if len(lost) == 1 else f"nanostudy study retry {shlex.quote(str(path))}"
    return ["", f"Without a run folder in {path}: {listed(lost, MOST_LOST)}. Train again with: {command}"]


def status_lines(store: Store, path: Path, every: bool = False) -> list[str]:
    """How far a study is, with its best experiments, or with all of them (`every`)."""
    counts = store.counts()
    others = [f"{counts[status]:,} {status}" for status in Status if counts[status] and status != "finished"]
    lines = [", ".join([f"{counts[Status.FINISHED]:,} of {sum(counts.values()):,} experiments finished", *others])]
    progress = store.progress()
    if progress and progress[2]:
        lines += _progress_lines(*progress, path)
    lines += failure_lines([*store.rows(status="diverged"), *store.rows(status="failed")], path, MOST_FAILED)
    lines += lost_lines(store.statuses(), path)
    if every:
        return [*lines, "", *as_lines(of_results(store.rows(), with_status=True))]
    return [*lines, *best_lines([*store.best(BEST), *store.rows(status=Status.DIVERGED)])]


def _progress_lines(recorded: str, left: float | None, workers: Sequence[Mapping[str, Any]], path: Path) -> list[str]:
    age = max(0.0, (datetime.now(UTC) - datetime.fromisoformat(recorded)).total_seconds())
    if age > QUIET:
        command = f"nanostudy study run {shlex.quote(str(path))}"
        return [f"\nIt recorded no progress for {duration(age)}. If it no longer runs, go on with: {command}"]
    remaining = "not known yet" if left is None else f"about {duration(max(0.0, left - age))}"
    doing = [
        {"": f"worker {w['worker']}", " ": str(w["doing"]), "  ": f"{w['tokens_per_second']:,} tokens/s"}
        for w in workers
    ]
    return ["", f"time left  {remaining}", *as_lines(doing)[1:]]
