"""Checks a study's folder: the definition, the store, and each run folder against the others, by checksum. Changes nothing."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from nanostudy.atomic import LEFTOVER
from nanostudy.errors import NanostudyError
from nanostudy.measures import stored
from nanostudy.result import Result
from nanostudy.study.definition import DEFINITION, command, definitions
from nanostudy.study.folder import RESULTS_FILE, STACKS, entries_of, run_faults
from nanostudy.study.listing import as_csv, records
from nanostudy.study.store import FILE, Store
from nanostudy.text import counted
from nanostudy.training import run_folder
from nanostudy.training import stack as checkpoint


@dataclass(frozen=True)
class Finding:
    """One thing in the folder that is not as it should be."""

    what: str  # study.yaml, study.sqlite, an experiment's name, ...
    problem: str
    mend: str  # the command that mends it


@dataclass(frozen=True)
class Checked:
    path: Path
    experiments: int
    results: int  # that the store has
    whole: int  # of these, with a run folder that is whole and says the same
    findings: list[Finding]

    def as_record(self) -> dict[str, Any]:
        return {**asdict(self), "path": str(self.path)}

    def as_lines(self) -> list[str]:
        lines = []
        for finding in self.findings:
            lines += [f"{finding.what}: {finding.problem}", f"    {finding.mend}"]
        state = "everything is whole" if not self.findings else f"{counted(len(self.findings), 'thing')} to mend"
        whole = f"{self.whole:,} of {counted(self.results, 'result')} whole, by checksum where there is one"
        return [*lines, f"{self.path}: {counted(self.experiments, 'experiment')}, {whole}; {state}"]


def check(path: Path) -> Checked:
    """Reads everything that the study's results depend on. A study that runs meanwhile may look unfinished, not damaged."""
    rebuild, findings = command("rebuild", path), []
    try:
        studies = definitions(path)
        if not studies:
            raise NanostudyError("it is not there")
        names = [entry.name for entry in entries_of(studies, path)[0]]
    except NanostudyError as problem:
        return Checked(path, 0, 0, 0, [Finding(DEFINITION, str(problem), "restore it from a copy")])
    rows: dict[str, Result] = {}
    curves: dict[str, list[dict[str, Any]]] = {}
    try:
        with Store.read(path / FILE) as store:
            damaged: list[str] = []
            rows = {row.name: row for row in store.rows(damaged=damaged)}
            findings += [Finding(FILE, f"the row of {name} is damaged", rebuild) for name in damaged]
            for name in rows:
                try:
                    curves[name] = store.evaluations(name)
                except NanostudyError:
                    findings.append(Finding(FILE, f"the curve of {name} is damaged", rebuild))
    except NanostudyError as problem:
        findings.append(Finding(FILE, str(problem), rebuild))
    damaged_rows = bool(findings)
    absent = [name for name in names if rows and name not in rows]
    if absent:
        findings.append(Finding(FILE, f"{counted(len(absent), 'experiment')} missing, such as {absent[0]}", rebuild))
    whole = 0
    for name in names:
        found = list(_check_run(path, studies[-1].keep, name, rows.get(name), curves.get(name)))
        findings += found
        whole += not found and name in rows and rows[name].status.has_result
    if rows and not damaged_rows and not _same_table(path, list(rows.values())):
        findings.append(Finding(RESULTS_FILE, f"it is missing, or not what {FILE} says", rebuild))
    findings += _leftovers(path)
    return Checked(path, len(names), sum(row.status.has_result for row in rows.values()), whole, findings)


def _check_run(
    path: Path, keep: str, name: str, row: Result | None, curve: list[dict[str, Any]] | None
) -> Iterator[Finding]:
    run, again = path / name, command("retry", path, name)
    go_on, rebuild = command("run", path), command("rebuild", path)
    done = row is not None and row.status.has_result
    try:
        metadata = run_folder.read_metadata(run)
        if metadata is None:
            if done:
                yield Finding(name, "its run folder is not there", again)
            return
        result = run_folder.read_result(run)
    except NanostudyError as problem:
        yield Finding(name, str(problem), again if done else f"{go_on} (it sets it aside and trains again)")
        return
    if result is None or not result.status.has_result:
        if done:
            yield Finding(name, f"{FILE} has a result of it, and its run folder is unfinished", again)
        return
    problems = run_faults(run, keep)
    for text in problems.values():
        yield Finding(name, text, again if done else go_on)
    if row is None or run_folder.decisive(problems):
        return
    if not done:
        yield Finding(name, f"it has a result that {FILE} lacks", go_on)
    elif differing := [
        key for key in stored() if key != "seconds" and row.measures.get(key) != result.measures.get(key)
    ]:
        key = differing[0]
        values = f"{row.measures.get(key)} there and {result.measures.get(key)} in its run folder"
        yield Finding(name, f"{FILE} says otherwise: {key} is {values}", rebuild)
    elif curve is not None and len(curve) != len(run_folder.read_rows(run / "evaluations.csv")):
        yield Finding(name, f"its curve in {FILE} has other points", rebuild)


def _same_table(path: Path, rows: list[Result]) -> bool:
    try:
        return run_folder.read_bounded(path / RESULTS_FILE, None).decode() == as_csv(records(rows))
    except (OSError, ValueError):
        return False


def _leftovers(path: Path) -> Iterator[Finding]:
    """Of killed processes, and checkpoints that cannot be read."""
    run = command("run", path)
    for place in sorted(path.glob(f"{STACKS}/*/")):
        file = place / run_folder.CHECKPOINT
        if checkpoint.exists(file):
            try:
                checkpoint.members(file)
            except NanostudyError as problem:
                yield Finding(f"{STACKS}/{place.name}", str(problem), f"{run} (trains those from the beginning)")
    places = [path, *path.glob("*/"), *path.glob(f"{STACKS}/*/")]
    left = [place / name for place in places for name in os.listdir(place) if LEFTOVER.fullmatch(name)]
    if left:
        files = f"{counted(len(left), 'temporary file')} of a process that was killed, or is writing now"
        yield Finding("leftovers", f"{files}, such as {left[0].relative_to(path)}", f"{run} (removes them)")
