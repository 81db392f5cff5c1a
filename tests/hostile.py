"""Studies from people who mean harm: texts that try to run as script, and a folder whose files try to do anything else."""

from __future__ import annotations

import contextlib
import json
import os
import sqlite3
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pandas as pd
from synthetic import synthetic

from nanostudy.analysis.frames import Results

FACTORS = {"n_embd": [128, 256], "n_head": [4, 8], "dropout": [0.1, 0.2]}
EFFECTS = {"n_embd": -0.2, "dropout": 0.05, "n_embd x dropout": -0.03}
HOSTILE = "</script><script>window.stolen = 1</script><img src=x onerror='window.stolen = 2'> & `code` \u2028"


def hostile() -> Results:
    results = synthetic(FACTORS, EFFECTS, seeds=(1, 2), noise=0.01, diverged=[3], waiting=[4], curves=True)
    table = results.experiments.copy()
    table.loc[table["status"] == "diverged", "reason"] = HOSTILE
    first = table.index[0]
    table = table.rename(index={first: f"{first} {HOSTILE}"})
    rename = {first: f"{first} {HOSTILE}"}
    curves = results.evaluations.assign(name=results.evaluations["name"].replace(rename))
    finished = table.index[table["status"] == "finished"]
    texts = [(name, "ROMEO:", f"ROMEO:\n{HOSTILE} said {name}") for name in finished]
    samples = pd.DataFrame(texts, columns=["name", "prompt", "text"])
    return replace(results, title=f"study {HOSTILE}", experiments=table, evaluations=curves, samples=samples)


# --- a study's folder: each changes a finished one, whose run folder `run` is one of an experiment

ESCAPE = "\x1b]0;owned\x07\x1b[2J"
ENDLESS = "WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n) SELECT i FROM n"


def _sql(study: Path, *statements: str) -> None:
    """Writes to the store as any program may that first drops its triggers."""
    with contextlib.closing(sqlite3.connect(study / "study.sqlite", isolation_level=None)) as db:
        for (trigger,) in db.execute("SELECT name FROM sqlite_master WHERE type = 'trigger'").fetchall():
            db.execute(f"DROP TRIGGER {trigger}")
        for statement in statements:
            db.execute(statement)


def _named(name: str) -> Callable[[Path, Path], None]:
    escaped = name.replace("'", "''")
    return lambda study, run: _sql(study, f"UPDATE experiments SET row_sha256 = NULL, name = '{escaped}' WHERE id = 1")


def _linked(file: str, target: str) -> Callable[[Path, Path], None]:
    def link(study: Path, run: Path) -> None:
        (run / file).unlink(missing_ok=True)
        (run / file).symlink_to(target)

    return link


def _large(file: str) -> Callable[[Path, Path], None]:
    def large(study: Path, run: Path) -> None:
        with open(run / file, "wb") as sparse:
            sparse.truncate(2**40)

    return large


def _pipe(file: str) -> Callable[[Path, Path], None]:
    def pipe(study: Path, run: Path) -> None:
        (run / file).unlink(missing_ok=True)
        os.mkfifo(run / file)

    return pipe


def _metadata(change: Callable[[dict], object]) -> Callable[[Path, Path], None]:
    """A run.json with another content, and a checksum that is right for it."""
    from nanostudy.training.run_folder import write_metadata

    def write(study: Path, run: Path) -> None:
        content = json.loads((run / "run.json").read_text())
        content.pop("sha256")
        change(content)
        write_metadata(run, content)

    return write


def _view(study: Path, run: Path) -> None:
    _sql(
        study,
        "ALTER TABLE experiments RENAME TO real",
        f"CREATE VIEW experiments AS SELECT real.* FROM real, ({ENDLESS})",
    )


def _linked_run(study: Path, run: Path) -> None:
    run.rename(study.with_name("elsewhere"))
    run.symlink_to(study.with_name("elsewhere"))


def _linked_store(study: Path, run: Path) -> None:
    (study / "study.sqlite").unlink()
    (study / "study.sqlite").symlink_to(study.with_name("outside.sqlite"))


FOLDERS: dict[str, Callable[[Path, Path], None]] = {
    "a store that is a link to nothing": _linked_store,
    "a lock that is a link to nothing": lambda study, run: (
        (study / ".lock").unlink(missing_ok=True),
        (study / ".lock").symlink_to(study.with_name("outside.lock")),
    )[1],
    "a link to a secret": _linked("sample.txt", "../../secret.txt"),
    "a report that is a link to a secret": _linked("report.md", "../../secret.txt"),
    "weights without an end": _linked("last.safetensors", "/dev/zero"),
    "a table without an end": _linked("training.csv", "/dev/zero"),
    "run.json without an end": _linked("run.json", "/dev/zero"),
    "a run folder that is a link": _linked_run,
    "evaluations from a pipe": _pipe("evaluations.csv"),
    "samples from a pipe": _pipe("samples.json"),
    "a picture from a pipe": _pipe("curve.png"),
    "weights of a terabyte": _large("best.safetensors"),
    "a table of a terabyte": _large("evaluations.csv"),
    "samples of a terabyte": _large("samples.json"),
    "a file that no run has": lambda study, run: (run / "run.sh").write_text("rm -rf ~"),
    "a name that leaves the folder": _named("../../../outside"),
    "an absolute name": _named("/tmp/outside"),
    "a name with a line of code": _named("x\nimport os; os.system('true')  # "),
    "a name with an escape sequence": _named(f"x{ESCAPE}"),
    "a name that is a formula": _named("=HYPERLINK(1)"),
    "a part that leaves the folder": lambda study, run: _sql(
        study, "UPDATE experiments SET row_sha256 = NULL, part = '../../../outside'"
    ),
    "a reason with an escape sequence": lambda study, run: _sql(
        study,
        f"UPDATE experiments SET row_sha256 = NULL, status = 'failed', reason = '{ESCAPE}{HOSTILE.replace(chr(39), '')}' WHERE id = 1",
    ),
    "an endless view": _view,
    "an endless trigger": lambda study, run: _sql(
        study,
        f"CREATE TRIGGER results_stay BEFORE UPDATE ON experiments BEGIN INSERT INTO events SELECT i, 0, 0, 0, 0, 0 FROM ({ENDLESS}); END",
    ),
    "settings that are none": lambda study, run: _sql(
        study, "UPDATE experiments SET row_sha256 = NULL, settings = '[]' WHERE id = 1"
    ),
    "a loss that is a text": lambda study, run: _sql(
        study, "UPDATE experiments SET row_sha256 = NULL, val_loss = '=1+1' WHERE id = 1"
    ),
    "losses that are lists": _metadata(lambda m: m.update(final=[1], best={"val_loss": []})),
    "parameters without number": _metadata(lambda m: m.update(parameters={"total": 10**30})),
    "sessions that are texts": _metadata(lambda m: m.update(sittings=["x"])),
    "notes with an escape sequence": _metadata(lambda m: m.update(notes=[ESCAPE])),
    "a machine with an escape sequence": _metadata(lambda m: m["machine"].update(device_name=ESCAPE)),
    "settings with an escape sequence": _metadata(lambda m: m["settings"].update(corpus=f"{ESCAPE}.txt")),
}
