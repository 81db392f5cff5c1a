"""Kills a command once at each of its operations on files, lets it go on, and compares what comes out. Run by study/test_kills.py.

    LD_PRELOAD=shim.so python kills.py COMMAND SOURCE WORK STRIDE FIRST

SOURCE holds study.yaml and a finished study. Every STRIDE-th operation from FIRST on is tried, before it and in its midst by turns.
"""

from __future__ import annotations

import ctypes
import json
import os
import shutil
import signal
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from damage import RESOURCES, Listener, losses

from nanostudy import api
from nanostudy.atomic import LEFTOVER
from nanostudy.reporting import write
from nanostudy.reporting.charts.figure import Drawn
from nanostudy.study.check import check
from nanostudy.study.export import export_published
from nanostudy.study.folder import rebuild
from nanostudy.study.merge import merge
from nanostudy.study.store import FILE

shim = ctypes.CDLL(None)
shim.kills_watch.argtypes = [ctypes.c_char_p, ctypes.c_long, ctypes.c_int]
shim.kills_count.restype = ctypes.c_long
PATIENCE = 120  # seconds of one command


def run(source: Path, place: Path) -> None:
    api.run_study(
        source / "study.yaml", place, executor="inline", resources=RESOURCES, listener=Listener(), save_every=0.0
    )


COMMANDS: dict[str, tuple[bool, Callable[[Path, Path], Any]]] = {  # whether it begins with a copy of the finished study
    "run": (False, run),
    "merge": (False, lambda source, place: merge([source / "study"], place)),
    "rebuild": (True, lambda source, place: rebuild(place)),
    "report": (True, lambda source, place: api.report(place)),
    "export": (True, lambda source, place: export_published(place, place / "published")),
}


def image(place: Path) -> dict[str, Any]:
    """What must not depend on a kill: names, results, weights; and nothing is left of the killed process."""
    files = [path for path in place.rglob("*") if path.is_file()]
    kept = [path for path in files if not path.name.startswith((".lock", ".owner", f"{FILE}.old"))]
    return {
        "files": sorted(str(path.relative_to(place)) for path in kept),
        "weights": {
            str(path.relative_to(place)): path.read_bytes() for path in kept if path.name.startswith(("best.", "last."))
        },
        "samples": {str(path.relative_to(place)): path.read_bytes() for path in kept if path.name.startswith("sample")},
        "losses": losses(place),
        "whole": [finding.problem for finding in check(place).findings],
        "left": [path.name for path in place.rglob("*") if LEFTOVER.fullmatch(path.name)],
    }


def child(do: Callable[[], Any], place: Path, at: int, torn: bool, report: Path) -> tuple[int, str]:
    """(operations, how it ended)"""
    pid = os.fork()
    if pid == 0:
        signal.alarm(PATIENCE)
        end = "done"
        shim.kills_watch(str(place).encode(), at, int(torn))
        try:
            do()
        except BaseException:
            end = traceback.format_exc()
        count = shim.kills_count()
        shim.kills_watch(b"", -1, 0)
        report.write_text(json.dumps([count, end]))
        os._exit(0)
    report.unlink(missing_ok=True)
    _, status = os.waitpid(pid, 0)
    if report.exists():
        count, end = json.loads(report.read_text())
        return count, end
    return -1, f"killed by signal {os.WTERMSIG(status)}"


def main() -> None:
    command, stride, first = sys.argv[1], int(sys.argv[4]), int(sys.argv[5])
    source, work = (Path(path).resolve() for path in sys.argv[2:4])
    torch.set_num_threads(1)
    write.draw = lambda figures, tables: Drawn({}, "", {})  # its process takes seconds, and writes nothing here
    copied, do = COMMANDS[command]
    work.mkdir(parents=True, exist_ok=True)
    place, report = work / "study", work / "report.json"

    def fresh() -> None:
        shutil.rmtree(place, ignore_errors=True)
        if copied:
            shutil.copytree(source / "study", place)

    fresh()
    operations, end = child(lambda: do(source, place), place, -1, False, report)
    assert end == "done", end
    assert operations > 0, "the shim saw nothing"
    reference, wrong, tried = image(place), [], 0
    for at in range(first, operations, stride):
        fresh()
        torn = at // stride % 2 == 1
        _, killed = child(lambda: do(source, place), place, at, torn, report)
        _, end = child(lambda: do(source, place), place, -1, False, report)
        tried += 1
        try:
            after = image(place)
            differing = [key for key in reference if reference[key] != after[key]]
        except Exception as problem:
            differing = [f"{type(problem).__name__}: {problem}"]
        if end != "done" or differing or killed != f"killed by signal {signal.SIGKILL}":
            wrong.append({"at": at, "torn": torn, "killed": killed[-600:], "then": end[-600:], "differing": differing})
    print(json.dumps({"operations": operations, "tried": tried, "wrong": wrong}))


if __name__ == "__main__":
    main()
