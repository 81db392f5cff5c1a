"""The store of a study, `study.sqlite`: its experiments, how far each is, and their results.

One process writes while any number read. It can be rebuilt from the run folders. Times of day are for people; nothing
depends on the clock.
"""

from __future__ import annotations

import contextlib
import difflib
import itertools
import json
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nanostudy.errors import NanostudyError, UsageError
from nanostudy.measures import final, stored
from nanostudy.result import Result, Status, finite
from nanostudy.study import database, schema
from nanostudy.study.database import Database, digest
from nanostudy.study.definition import command
from nanostudy.text import printable

if TYPE_CHECKING:
    from nanostudy.study.grid import Entry

FILE = "study.sqlite"  # in the study's folder
EVALUATION = ("step", "tokens", "seconds", "train_loss", "val_loss")
LONGEST_NAME = 250  # bytes
COLUMNS = (  # of the table of experiments, besides the measures
    *("id", "name", "part", "identity", "settings", "status", "reason", "stack", "step", "skipped", "context_losses"),
    *("environment", "members", "sampled", "finished_at"),
)


RESULT = tuple(column for column in COLUMNS if column not in ("environment", "sampled"))  # have a checksum in a result


@dataclass(frozen=True)
class StackRow:
    id: int
    members: tuple[str, ...]
    width: int


class Store:
    """Store.open(path) writes, Store.read(path) reads. Writes stay in memory until commit() succeeds."""

    def __init__(self, db: Database) -> None:
        self._db = db
        self._ids: dict[str, int] = {}
        self._last_stack = 0
        columns = {name for (name,) in db.fetch("SELECT name FROM pragma_table_info('experiments')")}
        self._measures = [name for name in stored() if name in columns]  # an older file may lack the newest
        self._checksum = "row_sha256" if "row_sha256" in columns else "NULL"
        self._curve_checksum = "curve_sha256" if "curve_sha256" in columns else "NULL"
        if db.writes:
            self._ids = dict(db.fetch("SELECT name, id FROM experiments"))
            self._last_stack = db.fetch("SELECT coalesce(max(id), 0) FROM stacks")[0][0]

    @staticmethod
    def open(path: Path) -> Store:
        """For the one process that writes (lease.py keeps others out). Creates or migrates the file."""
        return Store(Database(path, schema.migrate, schema.strangers))

    @staticmethod
    def read(path: Path) -> Store:
        """For any other process, at any time. Raises NanostudyError where there is no store."""
        if not os.path.isfile(path):
            raise NanostudyError(
                f"There is no study in {path.parent}: {path.name} is not there. If it was lost, "
                f"`{command('rebuild', path.parent)}` makes it again from the run folders."
            )
        db = Database(path, strangers=schema.strangers)
        try:
            schema.check(db.fetch, path)
            return Store(db)
        except BaseException:
            db.close()
            raise

    def commit(self) -> None:
        """Stores all writes since the last commit in one transaction. After a NanostudyError the next commit tries them again."""
        self._db.commit()

    def discard(self) -> None:
        """Forgets all writes since the last commit."""
        self._db.discard()

    def close(self) -> None:
        self._db.close()

    def __enter__(self) -> Store:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        with contextlib.suppress(*[NanostudyError] * (kind is not None)):  # the first error is the one to report
            self.close()

    # --- writing

    def add(self, entries: Sequence[Entry], identities: Sequence[str], parameters: Sequence[int]) -> None:
        """Adds waiting experiments. One that exists with the same id, name and identity stays as it is."""
        for entry, identity, count in zip(entries, identities, parameters, strict=True):
            settings = json.dumps(entry.experiment.as_dict())
            self._db.write(
                "INSERT INTO experiments (id, name, part, identity, settings, parameters) SELECT ?, ?, ?, ?, ?, ? "
                "WHERE NOT EXISTS (SELECT 1 FROM experiments WHERE id = ? AND name = ? AND identity = ?)",
                *(entry.id, entry.name, entry.part, identity, settings, int(count)),
                *(entry.id, entry.name, identity),
            )
            self._ids[entry.name] = entry.id

    def started(
        self, name: str, step: int, evaluated_at: int, members: int, stack: int | None, machine: Mapping[str, Any]
    ) -> None:
        """Deletes the evaluations after `evaluated_at` (-1: all), since the training repeats them."""
        id, where = self._id(name), json.dumps(dict(machine), sort_keys=True)
        self._db.write("INSERT OR IGNORE INTO environments (machine) VALUES (?)", where)
        self._db.write(
            "UPDATE experiments SET status = 'running', reason = NULL, step = ?, stack = ?, members = ?, "
            "environment = (SELECT id FROM environments WHERE machine = ?) WHERE id = ?",
            *(step, stack, members, where, id),
        )
        self._db.write("DELETE FROM evaluations WHERE experiment = ? AND step > ?", id, evaluated_at)
        self._summarise(id)

    def evaluated(self, name: str, step: int, tokens: int, seconds: float, train_loss: float, val_loss: float) -> None:
        id = self._id(name)
        self._db.write(
            "INSERT OR REPLACE INTO evaluations VALUES (?, ?, ?, ?, ?, ?)",
            *(id, step, tokens, seconds, finite(train_loss), finite(val_loss)),
        )
        self._summarise(id)
        self.progressed(name, step)

    def _summarise(self, id: int) -> None:
        """Copies the last and the best evaluation into the experiment's row, so that `status` reads no curves."""
        last, best = "ORDER BY step DESC LIMIT 1", "AND val_loss IS NOT NULL ORDER BY val_loss, step LIMIT 1"
        curve = "FROM evaluations WHERE experiment = experiments.id"
        self._db.write(
            "UPDATE experiments SET "
            f"(tokens, seconds, train_loss, val_loss) = (SELECT tokens, seconds, train_loss, val_loss {curve} {last}), "
            f"(best_step, best_val_loss) = (SELECT step, val_loss {curve} {best}) WHERE id = ?",
            id,
        )

    def progressed(self, name: str, step: int) -> None:
        self._db.write("UPDATE experiments SET step = ? WHERE id = ?", step, self._id(name))

    def finished(self, result: Result) -> None:
        """Records a result, which never changes again. Its evaluations must be recorded before."""
        id, contexts = self._id(result.name), {str(k): finite(v) for k, v in result.context_losses.items()}
        values = {name: finite(result.measures[name]) for name in final() if name in result.measures}
        self._db.write(
            "UPDATE experiments SET status = ?, reason = ?, skipped = ?, step = ?, context_losses = ?, finished_at = ?, "
            "(best_step, best_val_loss) = (SELECT step, val_loss FROM evaluations WHERE experiment = ? AND step = ?)"
            f"{''.join(f', {name} = ?' for name in values)} WHERE id = ?",
            *(str(result.status), result.reason, result.skipped, result.step, json.dumps(contexts)),
            *(result.finished_at or _now(), id, result.best_step, *values.values(), id),
        )
        row = ", ".join(f"'{column}', {column}" for column in (*RESULT, *self._measures))
        machine = "(SELECT machine FROM environments WHERE environments.id = environment)"
        point = ", ".join(f"'{column}', {column}" for column in EVALUATION)
        curve = f"SELECT digest({point}) AS point FROM evaluations WHERE experiment = ? ORDER BY step"
        self._db.write(
            f"UPDATE experiments SET row_sha256 = digest({row}, 'machine', {machine}), "
            f"curve_sha256 = digest('curve', (SELECT group_concat(point) FROM ({curve}))) WHERE id = ?",
            *(id, id),
        )

    def add_curve(self, name: str, curve: Iterable[Mapping[str, Any]]) -> None:
        """The evaluations that a run folder or another store has."""
        for point in curve:
            self.evaluated(name, *(point[key] for key in EVALUATION))

    def adopted(self, result: Result, curve: Iterable[Mapping[str, Any]]) -> None:
        """Records a result that a run folder or another store has, with its curve."""
        self.started(result.name, 0, -1, result.members or 1, None, result.machine)
        self.add_curve(result.name, curve)
        self.finished(result)
        self.sampled([result.name] if result.sampled else [])

    def failed(self, name: str, reason: str) -> None:
        self._db.write("UPDATE experiments SET status = 'failed', reason = ? WHERE id = ?", reason, self._id(name))

    def sampled(self, names: Iterable[str]) -> None:
        for name in names:
            self._db.write("UPDATE experiments SET sampled = 1 WHERE id = ?", self._id(name))

    def requeue(self, names: Iterable[str]) -> None:
        """Makes the failed experiments among these wait again."""
        update = "UPDATE experiments SET status = 'waiting', reason = NULL WHERE id = ? AND status = 'failed'"
        for name in names:
            self._db.write(update, self._id(name))

    def end_session(self) -> None:
        """Makes running experiments wait, since nothing trains now."""
        self._db.write("UPDATE experiments SET status = 'waiting' WHERE status = 'running'")

    def note(
        self, kind: str, detail: str, *, experiment: str | None = None, stack: int | None = None, at: str | None = None
    ) -> None:
        id = None if experiment is None else self._id(experiment)
        insert = "INSERT INTO events (at, experiment, stack, kind, detail) VALUES (?, ?, ?, ?, ?)"
        self._db.write(insert, at or _now(), id, stack, kind, detail)

    def add_stacks(self, stacks: Iterable[tuple[Sequence[str], int]]) -> list[StackRow]:
        """Opens a stack, with an id of its own, for each (members, width)."""
        rows = [StackRow(self._last_stack + i, tuple(m), w) for i, (m, w) in enumerate(stacks, start=1)]
        for row in rows:
            insert = "INSERT INTO stacks (id, members, width) VALUES (?, ?, ?)"
            self._db.write(insert, row.id, json.dumps(row.members), row.width)
        self._last_stack += len(rows)
        return rows

    def close_stack(self, id: int) -> None:
        self._db.write("UPDATE stacks SET state = 'closed' WHERE id = ?", id)

    def set_progress(self, seconds_left: float | None, workers: Sequence[Mapping[str, Any]]) -> None:
        rows = json.dumps([dict(worker) for worker in workers])
        self._db.write("INSERT OR REPLACE INTO progress VALUES (1, ?, ?, ?)", _now(), seconds_left, rows)

    def _id(self, name: str) -> int:
        """From memory, so that no write waits for the disk."""
        if name not in self._ids:
            raise _unknown(name, self._ids)
        return self._ids[name]

    # --- reading

    def rows(
        self, status: str | None = None, names: Sequence[str] | None = None, damaged: list[str] | None = None
    ) -> list[Result]:
        """In the order of ids. Unknown names are left out.

        Raises NanostudyError at a damaged row; where there is a list `damaged`, it gets those names instead.
        """
        conditions: dict[str, Any] = {}  # only those that are given, so that SQLite uses an index
        if status is not None:
            conditions["status = ?"] = status
        if names is not None:  # one value for any number of names
            conditions["name IN (SELECT value FROM json_each(?))"] = json.dumps(list(names))
        where = f"WHERE {' AND '.join(conditions)} " if conditions else ""
        return self._rows(f"{where}ORDER BY id", *conditions.values(), damaged=damaged)

    def row(self, name: str) -> Result:
        """By its name or its number. Raises UsageError, with the nearest names, where there is no such experiment."""
        results = self._rows(f"WHERE {'id' if name.isdecimal() else 'name'} = ?", name)
        if not results:
            raise _unknown(name, self.identities())
        return results[0]

    def best(self, n: int) -> list[Result]:
        """The finished experiments with the lowest validation losses."""
        return self._rows("WHERE status = 'finished' AND val_loss IS NOT NULL ORDER BY val_loss, id LIMIT ?", n)

    def _rows(self, which: str, *values: Any, damaged: list[str] | None = None) -> list[Result]:
        columns = (*COLUMNS, *self._measures)
        rows = self._db.fetch(f"SELECT {', '.join((*columns, self._checksum))} FROM experiments {which}", *values)
        machines = dict(self._db.fetch("SELECT id, machine FROM environments")) if rows else {}
        results = []
        for *cells, checksum in rows:
            named: dict[str, Any] = dict(zip(columns, cells, strict=True))
            try:
                results.append(_result(named, machines.get(named["environment"], "{}"), checksum))
            except (AttributeError, KeyError, TypeError, ValueError, RecursionError):
                if damaged is None:
                    row = f"holds a damaged row, of experiment {printable(str(named['id']))}"
                    raise NanostudyError(database.damaged(self._db.path, row)) from None
                damaged.append(printable(str(named["name"])))
        return results

    def statuses(self) -> dict[str, Status]:
        """By name, in the order of ids."""
        rows = self._db.fetch("SELECT name, status FROM experiments ORDER BY id")
        return {name: Status(status) for name, status in rows}

    def results(self, *, sampled: bool) -> dict[str, int | None]:
        """Each experiment that has a result, and samples or none, by name, with the last stack that it trained in."""
        with_result = "status IN ('finished', 'diverged')"
        select = f"SELECT name, stack FROM experiments WHERE {with_result} AND sampled = ? ORDER BY id"
        return dict(self._db.fetch(select, sampled))

    def begun(self) -> tuple[int, int, int]:
        """Of the experiments that wait and have begun: how many, and their least and most updates."""
        select = (
            "SELECT count(*), min(step), max(step) FROM experiments WHERE status IN ('waiting', 'running') AND step > 0"
        )
        number, least, most = self._db.fetch(select)[0]
        return number, least or 0, most or 0

    def counts(self) -> dict[Status, int]:
        """How many experiments have each status."""
        counts = dict(self._db.fetch("SELECT status, count(*) FROM experiments GROUP BY status"))
        return {status: counts.get(status, 0) for status in Status}

    def identities(self) -> dict[str, str]:
        return dict(self._db.fetch("SELECT name, identity FROM experiments ORDER BY id"))

    def evaluations(self, name: str) -> list[dict[str, Any]]:
        """The curve, by step. A loss that was not finite is None."""
        ids = self._db.fetch(f"SELECT id, {self._curve_checksum} FROM experiments WHERE name = ?", name)
        if not ids:
            raise _unknown(name, self.identities())
        select = f"SELECT {', '.join(EVALUATION)} FROM evaluations WHERE experiment = ? ORDER BY step"
        points = [dict(zip(EVALUATION, row, strict=True)) for row in self._db.fetch(select, ids[0][0])]
        curve = ",".join(digest(*itertools.chain(*point.items())) for point in points) or None
        numbers = all(value is None or type(value) in (int, float) for point in points for value in point.values())
        if ids[0][1] not in (None, digest("curve", curve)) or not numbers:
            raise NanostudyError(database.damaged(self._db.path, f"holds a damaged curve, of {name}"))
        return points

    def events(self, limit: int | None = None) -> list[dict[str, Any]]:
        """The last `limit` events, oldest first."""
        keys = ("id", "at", "experiment", "stack", "kind", "detail")
        rows = self._db.fetch(
            "SELECT e.id, at, name, e.stack, kind, detail FROM events e LEFT JOIN experiments x ON x.id = experiment "
            "ORDER BY e.id DESC LIMIT ?",
            -1 if limit is None else limit,
        )
        return [dict(zip(keys, row, strict=True)) for row in reversed(rows)]

    def version(self) -> tuple[int, ...]:
        """Changes with every commit, of whatever process, and where the file is replaced."""
        return (
            os.stat(self._db.path).st_ino,
            *self._db.fetch("SELECT * FROM pragma_data_version, pragma_user_version")[0],
        )

    def open_stacks(self) -> list[StackRow]:
        """Raises NanostudyError where one has members that the study has not."""
        stacks = []
        for id, members, width in self._db.fetch(
            "SELECT id, members, width FROM stacks WHERE state = 'open' ORDER BY id"
        ):
            try:
                stacks.append(StackRow(int(id), tuple(json.loads(members)), int(width)))
                whole = stacks[-1].width > 0 and all(name in self._ids for name in stacks[-1].members)
            except (TypeError, ValueError, RecursionError):
                whole = False
            if self._db.writes and not whole:
                raise NanostudyError(database.damaged(self._db.path, f"holds a damaged stack, {printable(str(id))}"))
        return stacks

    def progress(self) -> tuple[str, float | None, list[dict[str, Any]]] | None:
        """When it was recorded (UTC), the seconds left then, and what each worker did; None where that cannot be read."""
        for at, left, recorded in self._db.fetch("SELECT updated_at, seconds_left, workers FROM progress"):
            with contextlib.suppress(AttributeError, KeyError, TypeError, ValueError, OverflowError, RecursionError):
                workers = [
                    {
                        "worker": int(worker["worker"]),
                        **{key: printable(worker.get(key, "")) for key in ("doing", "phase")},
                        "tokens_per_second": int(worker["tokens_per_second"]),
                        "members": [
                            {
                                "name": printable(member["name"]),
                                "step": int(member["step"]),
                                **{key: _number(member[key]) for key in ("loss", "learning_rate")},
                                "losses": [(int(at), _number(loss)) for at, loss in member.get("losses", ())],
                            }
                            for member in worker.get("members", ())
                        ],
                    }
                    for worker in json.loads(recorded)
                ]
                datetime.fromisoformat(at)
                return at, None if left is None else float(left), workers
        return None


def _result(row: dict[str, Any], machine: str, checksum: str | None) -> Result:
    """From a row that may have come from anybody. Raises ValueError and the like where it is damaged, or holds what no study writes."""
    measures = {name: value for name, value in row.items() if name not in COLUMNS}
    if checksum is not None:
        cells = {column: row[column] for column in RESULT} | measures
        cells["machine"] = machine if row["environment"] else None
        if checksum != digest(*itertools.chain(*cells.items())):
            raise ValueError("the checksum is another")
    losses = {int(context): loss for context, loss in json.loads(row["context_losses"]).items()}
    numbers = (*measures.values(), *losses.values(), row["skipped"], row["stack"], row["members"])
    if not all(value is None or type(value) in (int, float) for value in numbers):
        raise ValueError("no number")
    named = is_file_name(row["name"]) and is_file_name(row["part"])
    if not named or not isinstance(json.loads(row["settings"]), dict):
        raise ValueError("no name, or no settings")
    return Result(
        **{key: row[key] for key in ("name", "part", "settings", "skipped", "stack", "members", "finished_at")},
        id=int(row["id"]),
        step=int(row["step"]),
        identity=str(row["identity"]),
        status=Status(row["status"]),
        reason=None if row["reason"] is None else printable(row["reason"]),
        sampled=bool(row["sampled"]),
        machine=dict(json.loads(machine)),
        context_losses=losses,
        measures=measures,
    )


def _number(value: Any) -> float | None:
    """Raises TypeError where it is something else."""
    return None if value is None else finite(float(value))


def is_file_name(name: Any) -> bool:
    """Whether it can name a run folder or a part: no path, nothing hidden, no control characters."""
    return (
        isinstance(name, str)
        and 0 < len(os.fsencode(name)) <= LONGEST_NAME
        and name.isprintable()
        and not name.startswith((".", "-", "=", "+", "@"))
        and not any(c in name for c in '/\\:*?"<>|')
    )


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")


def _unknown(name: str, existing: Iterable[str]) -> UsageError:
    near = difflib.get_close_matches(name, existing, n=3, cutoff=0.5)
    hint = f" Nearest: {', '.join(near)}." if near else ""
    return UsageError(f"The study has no experiment {name!r}.{hint}")
