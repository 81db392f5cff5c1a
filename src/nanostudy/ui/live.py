"""Studies and runs as they are now: read from their stores and folders, and never written.

A place is what one page of the ui shows: a study's folder, or a run's. Its state is plain values.
"""

from __future__ import annotations

import contextlib
import json
import os
import time
from collections.abc import Iterable, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from statistics import fmean
from typing import Any

from nanostudy.errors import NanostudyError, UsageError
from nanostudy.measures import MEASURES
from nanostudy.result import Result, Status, finite
from nanostudy.settings import FIELDS
from nanostudy.study.definition import definitions, folder_of, has_study
from nanostudy.study.listing import QUIET
from nanostudy.study.names import label
from nanostudy.study.store import FILE, Store
from nanostudy.text import value_text
from nanostudy.training.run_folder import read_metadata, read_result, read_rows

FOLDERS = ("studies", "runs")  # where commands put what they make
EVERY = 1.0  # seconds between two looks at a store
SHARE = 20  # reading takes at most 1 / 20 of the time
MOST_CURVES = 256  # experiments whose curves are drawn
MOST_POINTS = 100  # of the curve of an experiment's batches
MOST_EVENTS = 8  # notes on what became of stacks
WEIGHTS = "best.safetensors"
NO_FACTORS = ("seed", "log_interval", "sample_prompt", "sample_tokens")  # settings that change no result

State = dict[str, Any]


class Places:
    """The studies and runs that these folders are, or hold, by number: a page names no path. Raises UsageError at what is neither.

    Of no folders, those in the current folder's studies/ and runs/; new ones are found as they appear. A study that is to
    `begin` need not be there yet.
    """

    def __init__(self, folders: Sequence[Path] = (), begin: Path | None = None) -> None:
        for folder in folders:
            if not _inside(folder):
                raise UsageError(f"{folder} is no study's folder and no run's, and holds none.")
        self.folders = [*folders] if folders or begin else [Path(name) for name in FOLDERS]
        self.places = [Place(1, begin)] if begin else []
        self.find()

    def find(self) -> list[Place]:
        there = {place.path for place in self.places}
        new = (path for folder in self.folders for path in _inside(folder) if path not in there)
        self.places += [Place(number, path) for number, path in enumerate(dict.fromkeys(new), len(self.places) + 1)]
        return self.places

    def __getitem__(self, number: int) -> Place:
        """Raises NanostudyError where there is none."""
        if not 1 <= number <= len(self.places):
            raise NanostudyError(f"There is no study or run {number} here.")
        return self.places[number - 1]


def _inside(folder: Path) -> list[Path]:
    there = folder if folder.exists() else folder_of(str(folder))
    if _is_place(there):
        return [there]
    with contextlib.suppress(OSError):
        return sorted(path for path in there.iterdir() if _is_place(path))
    return []


def _is_place(path: Path) -> bool:
    return has_study(path) or (path / "run.json").is_file()


class Place:
    """A study's folder, or a run's. For one thread."""

    def __init__(self, number: int, path: Path) -> None:
        self.number, self.path = number, path
        self._store: Store | None = None
        self.version: tuple[int, ...] = ()  # of the state
        self._title = path.name
        self._state: State | None = None
        self._look_at = self._built_at = 0.0  # times of the monotonic clock
        self._inode = 0  # of the open store's file
        self._curves: dict[str, tuple[Any, Any]] = {}  # by experiment: what it was read from, and the curve

    # --- in the list

    def brief(self) -> State:
        """A line of the list; a problem is part of it."""
        about: State = {"number": self.number, "title": self.path.name, "path": str(self.path), "kind": "study"}
        about |= {"state": "waiting", "done": 0, "total": 0, "best": None}
        try:
            if has_study(self.path):
                about |= self._study_brief()
            elif result := read_result(self.path):
                done, state = int(result.status.has_result), self._run_state(result)
                about |= {"kind": "run", "state": state, "done": done, "total": 1, "best": result.best_val_loss}
        except NanostudyError as problem:
            about |= {"state": "unreadable", "problem": str(problem)}
        return about

    def _study_brief(self) -> State:
        store = self._open()
        counts, best = store.counts(), store.best(1)
        return {
            "title": self._title,
            "state": _study_state(counts, store.progress()),
            "done": sum(count for status, count in counts.items() if status.has_result),
            "total": sum(counts.values()),
            "best": best[0].val_loss if best else None,
        }

    # --- on its page

    def state(self) -> State:
        """As it is now, or was a second ago. Raises NanostudyError where it cannot be read."""
        now = time.monotonic()
        if self._state is not None and now < self._look_at:
            return self._state
        version = self._now()
        if self._state is None or version != self.version or now - self._built_at > QUIET:
            self.version = version
            self._state = self._study() if has_study(self.path) else self._run()
            self._built_at = now
        self._look_at = now + max(EVERY, SHARE * (time.monotonic() - now))
        return self._state

    def _now(self) -> tuple[int, ...]:
        """Changes when something was written."""
        if has_study(self.path):
            with contextlib.suppress(OSError):
                return self._open().version()
        moments = []
        for name in ("run.json", "training.csv", "evaluations.csv", WEIGHTS):
            with contextlib.suppress(OSError):
                moments.append(os.stat(self.path / name).st_mtime_ns)
        return tuple(moments)

    def _open(self) -> Store:
        """The store, opened again where another file took its place."""
        if self._store is not None:
            with contextlib.suppress(OSError):
                if os.stat(self.path / FILE).st_ino == self._inode:
                    return self._store
            self._store.close()
        self._store = None
        store = Store.read(self.path / FILE)
        self._store, self._inode = store, os.stat(self.path / FILE).st_ino
        self._title = definitions(self.path)[-1].name or self.path.name
        return store

    def _study(self) -> State:
        store = self._open()
        damaged: list[str] = []
        results, counts, progress = store.rows(damaged=damaged), store.counts(), store.progress()
        state = _study_state(counts, progress)
        at, left, workers = progress if progress and state == "running" else ("", None, [])
        members = {member["name"]: member for worker in workers for member in worker["members"]}
        notes = [event["detail"] for event in store.events(limit=MOST_EVENTS)]
        return {
            "kind": "study",
            "title": self._title,
            "path": str(self.path),
            "state": state,
            "counts": {str(status): count for status, count in counts.items()},
            "left": None if left is None else max(0.0, left - max(0.0, _age(at))),  # seconds from now
            "workers": [
                {key: value for key, value in worker.items() if key != "members"}
                for worker in sorted(workers, key=lambda one: one["worker"])
            ],
            "notes": [*notes, *(f"{name}: damaged" for name in damaged)],
            **self._experiments(results, members),
        }

    def _run(self) -> State:
        """Of one training, or of a study that has yet to begin."""
        metadata, result = read_metadata(self.path), read_result(self.path)
        return {
            "kind": "run" if result else "study",
            "title": self._title,
            "path": str(self.path),
            "state": self._run_state(result) if result else "waiting",
            "counts": {str(result.status): 1} if result else {},
            "left": None,
            "workers": [],
            "notes": (metadata or {}).get("notes") or [],
            **self._experiments([result] if result else [], {}),
        }

    def _run_state(self, result: Result) -> str:
        """finished, diverged, running where something was written lately, else unfinished."""
        if result.status.has_result:
            return str(result.status)
        return "running" if time.time() - max(self._now(), default=0) / 1e9 < QUIET else "unfinished"

    def _experiments(self, results: Sequence[Result], members: Mapping[str, Mapping[str, Any]]) -> State:
        """The rows have the columns of the report's table, and of what trains its `loss`, the last batches', and its `rate` of learning."""
        settings = [json.loads(result.settings) for result in results]
        differ = [name for name in FIELDS if len({str(one.get(name)) for one in settings}) > 1]
        factors = [name for name in differ if name not in NO_FACTORS]
        varying = [*factors, *(["seed"] if "seed" in differ else [])]
        rows = [
            {
                "i": i,
                "id": result.id,
                "name": result.name,
                "short": label(one, varying) if varying else result.name,
                "cell": label(one, factors) if factors else "",
                "part": result.part,
                "status": str(result.status),
                "reason": result.reason,
                **{name: _value(one.get(name)) for name in dict.fromkeys((*factors, "seed", "max_iters"))},
                "step": result.step,
                **{name: result[name] for name in MEASURES if name not in ("epochs", "flops")},
                "loss": None,
                "rate": None,
                "place": None,
                "weights": result.status.has_result and (self.folder(result.name) / WEIGHTS).is_file(),
            }
            for i, (result, one) in enumerate(zip(results, settings, strict=True))
        ]
        for row in rows:
            if member := members.get(row["name"]):
                row |= {"step": member["step"], "loss": member["loss"], "rate": member["learning_rate"]}
        finished = [row for row in rows if row["status"] == Status.FINISHED and row["val_loss"] is not None]
        for place, row in enumerate(sorted(finished, key=lambda row: row["val_loss"]), start=1):
            row["place"] = place
        drawn = sorted(
            enumerate(results),
            key=lambda one: (one[1].status is not Status.RUNNING, one[1].val_loss is None, one[1].val_loss or 0),
        )
        curves = {
            i: curve
            for i, one in drawn[:MOST_CURVES]
            if (one.step or one.name in members) and any((curve := self._curve(one, members.get(one.name))).values())
        }
        for row in rows:  # a run's folder alone, and a stack that has just begun
            if row["status"] == Status.RUNNING and row["loss"] is None and curves.get(row["i"], {}).get("batches"):
                row["loss"] = curves[row["i"]]["batches"][-1][1]
        return {"factors": factors, "settings": varying, "rows": rows, "curves": curves}

    def folder(self, name: str) -> Path:
        """The run folder of an experiment by its name, which the store checked."""
        return self.path / name if has_study(self.path) else self.path

    def _curve(self, result: Result, member: Mapping[str, Any] | None) -> dict[str, list[Any]]:
        """{batches: (step, loss), evaluations: (step, training loss, validation loss)}; read again only where something changed."""
        folder = self.folder(result.name)
        key = [result.status, result.step, result.val_loss]
        with contextlib.suppress(OSError):
            key.append(os.stat(folder / "training.csv").st_mtime_ns)
        tail = member["losses"] if member else ()
        if self._curves.get(result.name, (None,))[0] != key:
            self._curves[result.name] = key, self._read_curve(result, folder)
        batches, evaluations = self._curves[result.name][1]
        last = batches[-1][0] if batches else 0
        new = [(step, loss) for step, loss in tail if step > last and loss is not None]
        return {"batches": thinned([*batches, *new], MOST_POINTS), "evaluations": evaluations}

    def _read_curve(self, result: Result, folder: Path) -> tuple[list[Any], list[Any]]:
        logged: list[dict[str, float]] = []
        points: list[dict[str, Any]] = []
        with contextlib.suppress(NanostudyError):  # the report says what is damaged
            logged = read_rows(folder / "training.csv")
        with contextlib.suppress(NanostudyError):
            points = self._store.evaluations(result.name) if self._store else read_rows(folder / "evaluations.csv")
        batches = [(row["step"], row["loss"]) for row in logged if finite(row["loss"]) is not None]
        evaluations = [
            (point["step"], point["train_loss"], point["val_loss"])
            for point in points
            if finite(point["train_loss"]) is not None and finite(point["val_loss"]) is not None
        ]
        return thinned(batches, 2 * MOST_POINTS), evaluations[:: -(-len(evaluations) // MOST_POINTS) or 1]


def thinned(points: Sequence[tuple[float, float]], most: int) -> list[tuple[float, float]]:
    """At most so many, each the mean of neighbours."""
    size = -(-len(points) // most)
    if size <= 1:
        return list(points)
    groups = (points[start : start + size] for start in range(0, len(points), size))
    return [(group[-1][0], round(fmean(loss for _, loss in group), 4)) for group in groups]


def _value(value: Any) -> Any:
    """A setting's value as charts and filters take it: a number, or a text."""
    return value if isinstance(value, (int, float)) and not isinstance(value, bool) else value_text(value)


def _study_state(counts: Mapping[Status, int], progress: Any) -> str:
    """running, finished, stopped or waiting."""
    if progress and progress[2] and _age(progress[0]) < QUIET:
        return "running"
    if sum(counts.values()) and not any(count for status, count in counts.items() if status.is_undone):
        return "finished"
    return "stopped" if any(counts[status] for status in counts if status.has_result) else "waiting"


def _age(at: str) -> float:
    return (datetime.now(UTC) - datetime.fromisoformat(at)).total_seconds()


def changes(before: Mapping[str, Any], now: Mapping[str, Any]) -> State:
    """What is new in a state with as many rows: of its rows and curves those that changed, of the rest whole values."""
    new = {key: value for key, value in now.items() if key not in ("rows", "curves") and value != before[key]}
    rows = [row for row, old in zip(now["rows"], before["rows"], strict=True) if row != old]
    curves = {i: curve for i, curve in now["curves"].items() if curve != before["curves"].get(i)}
    return new | ({"rows": rows} if rows else {}) | ({"curves": curves} if curves else {})


def chosen(state: Mapping[str, Any], numbers: Iterable[int]) -> list[dict[str, Any]]:
    """The experiments of these numbers that have weights. Raises UsageError at any other."""
    rows = {row["id"]: row for row in state["rows"]}
    for number in numbers:
        if number not in rows:
            raise UsageError(f"There is no experiment {number} here.")
        if not rows[number]["weights"]:
            raise UsageError(f"Experiment {number} has no weights (yet).")
    return [rows[number] for number in numbers]
