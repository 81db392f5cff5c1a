"""Every kind of file in a study's folder, harmed in every way, and every command after it: what is said, and what comes out."""

from __future__ import annotations

import contextlib
import io
import os
import random
import shutil
import signal
import sqlite3
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nanostudy import api
from nanostudy.analysis.analysis import Analysis
from nanostudy.analysis.results import read_results
from nanostudy.errors import NanostudyError
from nanostudy.reporting.document import Document
from nanostudy.reporting.markdown import markdown
from nanostudy.reporting.sections import document
from nanostudy.reporting.write import results_csv
from nanostudy.settings import Resources
from nanostudy.study.check import check
from nanostudy.study.export import export_published
from nanostudy.study.folder import rebuild
from nanostudy.study.listing import status_lines
from nanostudy.study.merge import merge
from nanostudy.study.store import FILE, Store

RESOURCES = Resources(device="cpu", precision="fp32", compile="no", threads=1)
NOWHERE = Path("/nowhere")  # nothing may write there
LONGEST = 60  # seconds of one command
STUDY_FILES = ("study.yaml", "study.sqlite", "results.csv")
RUN_FILES = (
    *("run.json", "settings.yaml", "evaluations.csv", "training.csv", "window_losses.safetensors"),
    *("best.safetensors", "last.safetensors", "samples.json", "sample.txt"),
)


class Listener:
    def __init__(self) -> None:
        self.lines: list[str] = []

    def say(self, text: str, style: str = "") -> None:
        self.lines.append(text)

    def show(self, snapshot: object) -> None: ...


# --- commands: each returns its words, and its results


def losses(path: Path) -> list[tuple[Any, ...]]:
    columns = "name, status, train_loss, val_loss, best_step, best_val_loss, updates, tokens, context_losses"
    with contextlib.closing(sqlite3.connect(f"file:{path / FILE}?mode=ro", uri=True)) as db:
        curves = db.execute("SELECT experiment, step, train_loss, val_loss FROM evaluations ORDER BY 1, 2").fetchall()
        return [*db.execute(f"SELECT {columns} FROM experiments ORDER BY id").fetchall(), *curves]


def run(path: Path) -> tuple[Any, Any]:
    listener = Listener()
    rows = api.run_study(path, path, executor="inline", resources=RESOURCES, listener=listener)
    return [line for line in listener.lines if "finished" not in line], [[row.val_loss for row in rows], losses(path)]


def report_of(*paths: Path) -> tuple[Any, Any]:
    results = read_results(paths)
    page: Document = document(Analysis(results))
    return results.notes, [results_csv(results), markdown(page, {}), results.training.to_csv()]


def status(path: Path) -> tuple[Any, Any]:
    with Store.read(path / FILE) as store:
        lines = status_lines(store, path, True)
        return [line for line in lines if "Without a run folder" in line], lines


def rebuilt(path: Path) -> tuple[Any, Any]:
    _, _, notes = rebuild(path)
    return notes, losses(path)


def merged(path: Path) -> tuple[Any, Any]:
    into = path.with_name("into")
    shutil.rmtree(into, ignore_errors=True)
    lines = merge([path], into)
    weights = sorted((file.relative_to(into), file.read_bytes()) for file in into.glob("*/*.safetensors"))
    return lines, [losses(into), weights]


def exported(path: Path) -> tuple[Any, Any]:
    to = path.with_name("to")
    shutil.rmtree(to, ignore_errors=True)
    lines = export_published(path, to)
    ignored = (".pt",)  # PyTorch writes other bytes each time
    return lines, sorted(
        (file.relative_to(to), file.read_bytes())
        for file in to.rglob("*")
        if file.is_file() and file.suffix not in ignored
    )


def checked(path: Path) -> tuple[Any, Any]:
    result = check(path)
    return [finding.problem for finding in result.findings], result.whole


def first_run(path: Path) -> Path:
    return sorted(path.glob("b*s1*"))[0]


COMMANDS: dict[str, Callable[[Path], tuple[Any, Any]]] = {
    "status": status,
    "report": lambda path: report_of(path),
    "report RUN": lambda path: report_of(first_run(path)),
    "sample": lambda path: ((), api.load(first_run(path)).sample("the", 1, 8, 1)),
    "run": run,
    "rebuild": rebuilt,
    "merge": merged,
    "export": exported,
    "check": checked,
}


# --- harms


def _rewrite(change: Callable[[bytearray], object]) -> Callable[[Path, random.Random], None]:
    def harm(file: Path, draw: random.Random) -> None:
        content = bytearray(file.read_bytes())
        changed = change(content)
        file.write_bytes(content if changed is None else changed)

    return harm


def _flip(at: float) -> Callable[[Path, random.Random], None]:
    def harm(file: Path, draw: random.Random) -> None:
        content = bytearray(file.read_bytes())
        content[min(len(content) - 1, int(at * len(content)))] ^= 1 << draw.randrange(8)
        file.write_bytes(content)

    return harm


def _digit(content: bytearray) -> None:
    """Another digit, in the second half."""
    place = next((i for i in range(len(content) // 2, len(content)) if chr(content[i]).isdigit()), None)
    if place is not None:
        content[place] = 48 + (content[place] - 47) % 10


def _link(target: str) -> Callable[[Path, random.Random], None]:
    return lambda file, draw: (file.unlink(), file.symlink_to(target or file.name))[1]


HARMS: dict[str, Callable[[Path, random.Random], Any]] = {
    "removed": lambda file, draw: file.unlink(),
    "emptied": _rewrite(lambda content: b""),
    "cut in half": _rewrite(lambda content: content[: len(content) // 2]),
    "cut by a byte": _rewrite(lambda content: content[:-1]),
    "longer": _rewrite(lambda content: content + b"\xff\0more"),
    "zeros": _rewrite(lambda content: bytes(len(content))),
    "garbage": lambda file, draw: file.write_bytes(draw.randbytes(2000)),
    "flipped early": _flip(0.1),
    "flipped in the middle": _flip(0.5),
    "flipped late": _flip(0.9),
    "another digit": _rewrite(_digit),
    "a folder": lambda file, draw: (file.unlink(), file.mkdir()),
    "a link to nothing": _link(str(NOWHERE)),
    "a link to itself": _link(""),
    "a pipe": lambda file, draw: (file.unlink(), os.mkfifo(file)),
    "nested": lambda file, draw: file.write_bytes(b"[" * 200_000),
}


@dataclass(frozen=True)
class Outcome:
    kind: str  # same, told, noted, SILENT, TRACEBACK or HANG
    words: str = ""


class _Slow(BaseException):
    pass


def attempt(command: str, path: Path) -> tuple[str, Any, Any]:
    """(kind, words, results)"""

    def late(*_: object) -> None:
        raise _Slow

    before = signal.signal(signal.SIGALRM, late)
    signal.setitimer(signal.ITIMER_REAL, LONGEST)
    try:
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            return ("done", *COMMANDS[command](path))
    except NanostudyError as problem:
        return "told", str(problem), None
    except _Slow:
        return "HANG", "", None
    except BaseException as problem:
        places = [
            f"{Path(frame.filename).name}:{frame.lineno}" for frame in traceback.extract_tb(problem.__traceback__)
        ]
        return "TRACEBACK", f"{type(problem).__name__}: {str(problem)[:150]} at {' < '.join(places[:-5:-1])}", None
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def matrix(
    study: Path, work: Path, wanted: Callable[[str, str, str], bool] = lambda *_: True
) -> Iterator[tuple[str, str, str, Outcome]]:
    """(file, harm, command, outcome) for a copy of the study, harmed, in each combination that is wanted."""

    def fresh() -> Path:
        shutil.rmtree(work, ignore_errors=True)
        return Path(shutil.copytree(study, work / "study", symlinks=True))

    good = {}
    for command in COMMANDS:
        good[command] = attempt(command, fresh())
        assert good[command][0] == "done", (command, good[command])
    for file in (*STUDY_FILES, *RUN_FILES):
        for harm, do in HARMS.items():
            for command in COMMANDS:
                if not wanted(file, harm, command):
                    continue
                path = fresh()
                target = path / file if file in STUDY_FILES else first_run(path) / file
                do(target, random.Random(f"{file} {harm}"))
                kind, words, results = attempt(command, path)
                if os.path.lexists(NOWHERE):
                    NOWHERE.unlink()
                    kind, words = "SILENT", "wrote outside the folder"
                if kind == "done":
                    same, quiet = results == good[command][2], words == good[command][1]
                    if file == "study.yaml" and command == "report" and results[0] == good[command][2][0]:
                        quiet = False  # a person may edit the description and the like, which a report then has; the numbers are the same
                    kind = "noted" if not quiet else "same" if same else "SILENT"
                yield file, harm, command, Outcome(kind, str(words))
