"""Folders of one study become one: what each has finished is copied, checked and reported.

What counts is study.yaml and the run folders. A source's store is not read, so that a lost one loses nothing.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from nanostudy.atomic import explain_writing, write_atomically
from nanostudy.errors import NanostudyError, UsageError
from nanostudy.study.compatibility import Result, check_identities, one_study
from nanostudy.study.definition import study_yaml
from nanostudy.study.folder import (
    DEFINITION,
    StudyFolder,
    adopt,
    definitions,
    entries_of,
    open_study,
)
from nanostudy.study.grid import Entry
from nanostudy.study.lease import owner
from nanostudy.study.store import RESULTS
from nanostudy.text import counted
from nanostudy.training import run_folder
from nanostudy.training.weights import load_weights

COMING, GOING = ".merging", ".replaced"  # how the names of folders end that are on their way in or out
MOST_NAMED = 3


def merge(sources: Sequence[Path], into: Path) -> list[str]:
    """Copies the results that `into` lacks from folders of the same study, and tells in lines what came and what is missing.

    Nothing is written where the folders do not agree. What `into` has already is kept; of two results for the same
    experiment the first is. Raises UsageError, NanostudyError; after a kill or a full disk, the same call completes it.
    """
    sources = _checked(sources, into)
    studies = one_study(sources, into)
    entries, _ = entries_of(studies)
    before, _ = _results(into, entries, strict=True)
    found: dict[Path, dict[str, Result]] = {}
    lines = []
    for source in sources:
        found[source], damaged = _results(source, entries, strict=False)
        lines += damaged
    check_identities([before, *found.values()], entries)

    first = dict(before)
    for results in found.values():
        first = {**results, **first}
    with owner(into):
        _clean(into)
        if studies != definitions(into):
            write_atomically(into / DEFINITION, "".join(study_yaml(study) for study in studies))
    with open_study(into) as folder:
        for row in folder.store.rows():
            if row.name in first and row.name not in before:
                _copy(first[row.name].path, folder.run(row.name))
            if row.name in first and row.status not in RESULTS:
                adopt(folder, row.name)
        folder.write_results()
        if before:
            lines.append(f"{into}: {counted(len(before), 'result')} there already, kept")
        for source, results in found.items():
            lines.append(_came(source, results, first))
            lines += _twice(source, results, first, entries)
        return lines + _summary(folder)


# --- what there is


def _checked(sources: Iterable[Path], into: Path) -> list[Path]:
    """The sources other than `into`, each once. Raises UsageError."""
    kept: dict[Path, Path] = {}
    whole = into.resolve()
    for source in sources:
        if not definitions(source):
            raise UsageError(f"There is no study in {source}: it has no {DEFINITION}. Nothing was copied.")
        real = source.resolve()
        if real == whole:
            continue
        if whole.is_relative_to(real) or real.is_relative_to(whole):
            raise UsageError(f"{source} and {into} lie one inside the other. Choose another folder with --into.")
        kept.setdefault(real, source)
    if not kept:
        raise UsageError(f"There is nothing to merge: name other folders of the study than {into}.")
    try:
        others = [] if definitions(into) else [p.name for p in into.iterdir() if not p.name.startswith(".")]
    except FileNotFoundError:
        others = []
    except OSError as problem:
        raise NanostudyError(f"{into} cannot be used as a study's folder: {problem.strerror}.") from None
    if others:
        raise NanostudyError(
            f"{into} holds other files ({', '.join(sorted(others)[:MOST_NAMED])}) and no study. "
            "Choose another folder with --into; nothing was changed."
        )
    return list(kept.values())


def _results(path: Path, entries: Iterable[Entry], strict: bool) -> tuple[dict[str, Result], list[str]]:
    """The results that the folder's run folders hold, by name; and, in words, which cannot be read (strict: raises)."""
    found, problems = {}, []
    for entry in entries:
        try:
            metadata = run_folder.read_metadata(path / entry.name)
        except NanostudyError as problem:
            if strict:
                raise
            problems.append(f"not taken: {problem}")
            continue
        if metadata and metadata["status"] in RESULTS:
            found[entry.name] = Result(path / entry.name, metadata)
    return found, problems


# --- copying


def _clean(into: Path) -> None:
    """Removes what a merge that was killed left half-done."""
    for leftover in (*into.glob(f".*{COMING}"), *into.glob(f".*{GOING}")):
        shutil.rmtree(leftover, ignore_errors=True)


def _copy(source: Path, target: Path) -> None:
    """The run folder, whole or not at all; in the place of one without a result. Raises NanostudyError."""
    coming, going = (target.with_name(f".{target.name}{end}") for end in (COMING, GOING))
    try:
        if target.is_dir() and run_folder.read_metadata(target) is None:
            others = sorted(path.name for path in target.iterdir() if not path.name.startswith("."))
            if others:
                raise NanostudyError(
                    f"{target} holds other files ({', '.join(others[:MOST_NAMED])}) and no run. "
                    "Move it away and merge again; what was copied before is kept."
                )
        shutil.copytree(source, coming, ignore=shutil.ignore_patterns(".*"), copy_function=_copy_file)
        if target.exists():
            target.replace(going)
        coming.replace(target)
    except OSError as problem:
        if going.exists() and not target.exists():
            going.replace(target)
        raise NanostudyError(explain_writing(target, problem)) from problem
    finally:
        for leftover in (coming, going):
            shutil.rmtree(leftover, ignore_errors=True)


def _copy_file(source: str, target: str) -> None:
    try:
        shutil.copyfile(source, target)
        with open(target, "r+b") as file:
            os.fsync(file.fileno())
    except OSError as problem:
        if isinstance(problem, FileNotFoundError) and not os.path.exists(source):
            return  # the study runs, and just dropped weights that it does not keep
        # copytree would go on with the other files, and forget which error it was
        raise NanostudyError(explain_writing(Path(target), problem)) from problem


# --- what is told


def _came(source: Path, results: Mapping[str, Result], first: Mapping[str, Result]) -> str:
    taken = sum(first[name] is result for name, result in results.items())
    there = f", {len(results) - taken} had from elsewhere" if taken < len(results) else ""
    return f"{source}: {counted(taken, 'result')} taken{there}"


def _twice(
    source: Path, results: Mapping[str, Result], first: Mapping[str, Result], entries: Iterable[Entry]
) -> list[str]:
    """A line for every result of the source that differs from the one that is kept."""
    lines = []
    for name in [entry.name for entry in entries if entry.name in results]:
        kept, other = first[name], results[name]
        difference = None if kept is other else _difference(kept, other)
        if difference:
            lines.append(f"{name}: finished twice, {difference} in {source}")
    return lines


def _difference(kept: Result, other: Result) -> str | None:
    states = [each.metadata["status"] for each in (kept, other)]
    if "diverged" in states:
        return None if states[0] == states[1] else f"{states[0]} kept, {states[1]}"
    one, two = ((each.metadata.get("final") or {}) for each in (kept, other))
    for key, word in (("val_loss", "val"), ("train_loss", "train")):
        a, b = one.get(key), two.get(key)
        if a != b:
            apart = f" ({b - a:+.1e})" if a is not None and b is not None else ""
            return f"{word} {_loss(a)} kept, {_loss(b)}{apart}"
    try:
        weights = {load_weights(each.path, "last").sha256 for each in (kept, other)}
    except NanostudyError:  # not kept, or damaged: then they cannot be compared
        return None
    return f"val {_loss(one.get('val_loss'))} in both, other weights" if len(weights) > 1 else None


def _loss(value: float | None) -> str:
    return "unknown" if value is None else f"{value:.4f}"


def _summary(folder: StudyFolder) -> list[str]:
    rows = folder.store.rows()
    missing = [row for row in rows if row.status not in RESULTS]
    lines = []
    for part in dict.fromkeys(row.part for row in rows):
        own, lacks = (sum(row.part == part for row in some) for some in (rows, missing))
        names = [row.name for row in missing if row.part == part]
        more = f" and {lacks - MOST_NAMED} more" if lacks > MOST_NAMED else ""
        lines.append(
            f"part {part}: {own - lacks} of {own}"
            + (f"; missing {', '.join(names[:MOST_NAMED])}{more}" if lacks else "")
        )
    waiting = f"{counted(len(missing), 'experiment')} still waiting" if missing else "complete"
    return [*lines, f"{folder.path}: {len(rows) - len(missing)} of {counted(len(rows), 'experiment')}, {waiting}"]
