"""Merges folders of one study: what each has finished is checked, copied and reported.

What counts is study.yaml and the run folders. A source's store is not read, so a lost store loses nothing.
"""

from __future__ import annotations

import os
from collections import ChainMap
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from nanostudy import version
from nanostudy.atomic import explain_writing, set_aside, whole_folder
from nanostudy.data.texts import NAMES
from nanostudy.errors import DamagedRun, NanostudyError, UsageError
from nanostudy.result import Result
from nanostudy.settings import names_of
from nanostudy.settings_files import PATHS
from nanostudy.study.definition import DEFINITION, Study, definitions, keep_of
from nanostudy.study.folder import StudyFolder, adopt, check_unused, design, entries_of, missing_weights, open_study
from nanostudy.study.grid import CELL_SETTINGS, DEFAULTS, Entry, extend
from nanostudy.study.notes import merge_notes
from nanostudy.text import counted, listed, value_text
from nanostudy.training import run_folder
from nanostudy.training.inputs import Inputs
from nanostudy.training.weights import all_faults, load_weights

MOST_NAMED = 3


@dataclass(frozen=True)
class FinishedRun:
    """A run folder with a result, its run.json, and what is damaged of it although the result counts."""

    path: Path
    metadata: Mapping[str, Any]
    faults: Mapping[str, str] = field(default_factory=dict)


def merge(sources: Sequence[Path], into: Path) -> list[str]:
    """Copies the results that `into` lacks. Returns lines that say what came from where, what is damaged and what is missing.

    A result counts where its files agree with each other and with their checksums. Of a source, files with a run folder's names
    are copied; links and everything else stay there, since a source may come from anybody.
    Nothing is written where the folders do not agree. Results that `into` has are kept; of two results of one
    experiment, the first is. Raises UsageError, NanostudyError; after a kill or a full disk, the same call completes it.
    """
    sources = _checked(sources, into)
    studies = merged_definitions(sources, into)
    entries, _ = entries_of(studies, into, *sources)
    results_of: dict[Path, dict[str, FinishedRun]] = {}
    lines: list[str] = []
    for path in (into, *sources):
        results_of[path], problems = _results(path, entries)
        lines += (f"{'damaged' if path == into else 'not taken'}: {problem}" for problem in problems)
    check_identities(results_of.values(), entries)
    kept = ChainMap(*results_of.values())  # of several results, the first
    before = results_of.pop(into)
    with open_study(design(into, merged=studies, sources=sources)) as folder:
        for row in folder.store.rows():
            if row.name not in kept or (row.name not in before and not _fits(row, kept[row.name])):
                continue
            if row.name not in before:
                _copy(kept[row.name], folder)
            if not row.status.has_result:
                adopt(folder, row.name)
        folder.write_results()
        lines += [*folder.notes, *merge_notes(sources, into)]
        if before:
            lines.append(f"{into}: {counted(len(before), 'result')} there already, kept")
        for source, results in results_of.items():
            lines += _source_lines(source, results, kept, entries)
        return lines + _summary(folder)


def _checked(sources: Iterable[Path], into: Path) -> list[Path]:
    """The sources other than `into`, each once. Raises UsageError."""
    kept: dict[Path, Path] = {}
    target = into.resolve()
    for source in sources:
        if not definitions(source):
            raise UsageError(f"There is no study in {source}: it has no {DEFINITION}. Nothing was copied.")
        real = source.resolve()
        if real == target:
            continue
        if target.is_relative_to(real) or real.is_relative_to(target):
            raise UsageError(f"{source} and {into} lie one inside the other. Choose another folder with --into.")
        kept.setdefault(real, source)
    if not kept:
        raise UsageError(f"There is nothing to merge: name other folders of the study than {into}.")
    if not definitions(into):
        check_unused(into, "--into")
    return list(kept.values())


def _results(path: Path, entries: Iterable[Entry]) -> tuple[dict[str, FinishedRun], list[str]]:
    """The folder's results by name, and messages about run folders that do not count."""
    results, problems = {}, []
    keep = keep_of(path)
    for entry in entries:
        run = path / entry.name
        try:
            if run.is_symlink():
                raise DamagedRun(f"{run} is a link.")
            metadata = run_folder.read_metadata(run)
            if metadata and metadata["status"] != "unfinished":
                links = {name: f"{run / name} is a link." for name in run_folder.FILES if (run / name).is_symlink()}
                faults = all_faults(run, metadata) | links
                if decisive := run_folder.decisive(faults):
                    raise DamagedRun(" ".join(decisive))
                faults |= missing_weights(run, metadata, keep)
                results[entry.name] = FinishedRun(run, metadata, faults)
        except NanostudyError as problem:
            problems.append(str(problem))
    return results, problems


def _fits(row: Result, run: FinishedRun) -> bool:
    """Whether the store has no result of it yet, or one with these losses, whose run folder was lost."""
    final = run.metadata.get("final") or {}
    losses = final.get("train_loss"), final.get("val_loss")
    return not row.status.has_result or (row.train_loss, row.val_loss) == losses


# --- copying


def _copy(run: FinishedRun, folder: StudyFolder) -> None:
    """The run folder's own files or nothing; it replaces one without a result. Raises NanostudyError."""
    target = folder.run(run.path.name)
    if folder.store.row(run.path.name).status.has_result and os.path.lexists(target):
        folder.notes.append(
            f"{target} was damaged: it is now {set_aside(target).name}, and that of {run.path.parent} is there."
        )
    if os.path.lexists(target):
        names = os.listdir(target) if target.is_dir() else [target.name]
        others = sorted(name for name in names if not name.startswith("."))
        if any(name not in run_folder.FILES for name in others) and not (target / "run.json").exists():
            raise NanostudyError(
                f"{target} holds other files ({listed(others, MOST_NAMED)}) and no run. "
                "Move it away and merge again; what was copied before is kept."
            )
    with whole_folder(target, replace=True) as place:
        run_folder.write_metadata(place, run.metadata)  # what was read and checked
        for file in run_folder.FILES.values():
            source = run.path / file.name
            wanted = file.travels and file.name not in (*run.faults, "run.json")
            if wanted and os.path.lexists(source):
                problem = _copy_file(source, place / file.name, run.metadata)
                if problem:
                    folder.notes.append(f"not taken: {source}: {problem}.")
    folder.notes += (f"not taken: {text}" for text in run.faults.values())


def _copy_file(source: Path, target: Path, metadata: Mapping[str, Any]) -> str | None:
    """Returns why a file that the result can do without is not copied. Raises NanostudyError."""
    file, checksum = run_folder.FILES[source.name], (metadata.get("checksums") or {}).get(source.name)
    problem: str | None = None
    try:
        copied = run_folder.copy_bounded(source, target, run_folder.largest(file, metadata))
        if checksum not in (None, copied):
            problem = "it changed while it was read"
    except ValueError as other:
        problem = str(other)
    except OSError as other:
        if isinstance(other, FileNotFoundError) and not source.exists():
            return None  # the study runs, and just deleted weights that it does not keep
        raise NanostudyError(explain_writing(target, other)) from other
    if problem:
        target.unlink(missing_ok=True)
        if file.decisive:
            raise NanostudyError(f"{source}: {problem}. Merge again; what was copied before is kept.")
    return problem


# --- the report


def _source_lines(
    source: Path, results: Mapping[str, FinishedRun], kept: Mapping[str, FinishedRun], entries: Iterable[Entry]
) -> list[str]:
    """How many results were taken, then one line for each that differs from the one that is kept."""
    others = [entry.name for entry in entries if entry.name in results and kept[entry.name] is not results[entry.name]]
    rest = f", {len(others)} had from elsewhere" if others else ""
    differences = {name: _difference(kept[name], results[name]) for name in others}
    return [
        f"{source}: {counted(len(results) - len(others), 'result')} taken{rest}",
        *(f"{name}: finished twice, {what} in {source}" for name, what in differences.items() if what),
    ]


def _difference(kept: FinishedRun, other: FinishedRun) -> str | None:
    states = [each.metadata["status"] for each in (kept, other)]
    if "diverged" in states:
        return None if states[0] == states[1] else f"{states[0]} kept, {states[1]}"
    one, two = ((each.metadata.get("final") or {}) for each in (kept, other))
    for key, label in (("val_loss", "val"), ("train_loss", "train")):
        a, b = one.get(key), two.get(key)
        if a != b:
            change = f" ({b - a:+.1e})" if a is not None and b is not None else ""
            return f"{label} {_loss(a)} kept, {_loss(b)}{change}"
    try:
        weights = {load_weights(each.path, "last").sha256 for each in (kept, other)}
    except NanostudyError:  # not kept, or damaged: they cannot be compared
        return None
    return f"val {_loss(one.get('val_loss'))} in both, other weights" if len(weights) > 1 else None


def _loss(value: float | None) -> str:
    return "unknown" if value is None else f"{value:.4f}"


def _summary(folder: StudyFolder) -> list[str]:
    rows, lines = folder.store.rows(), []
    for part in dict.fromkeys(row.part for row in rows):
        own = [row for row in rows if row.part == part]
        missing = [row.name for row in own if not row.status.has_result]
        names = f"; missing {listed(missing, MOST_NAMED)}" if missing else ""
        lines.append(f"part {part}: {len(own) - len(missing)} of {len(own)}{names}")
    waiting = sum(not row.status.has_result for row in rows)
    state = f"{counted(waiting, 'experiment')} still waiting" if waiting else "complete"
    return [*lines, f"{folder.path}: {len(rows) - waiting} of {counted(len(rows), 'experiment')}, {state}"]


# --- whether the folders are of one study


def merged_definitions(sources: Sequence[Path], into: Path) -> list[Study]:
    """The definitions of the merged study: those of `into`, and what the longest of the others adds to them.

    Raises NanostudyError where the definitions of one folder do not begin with those of the other. Definitions that
    add no experiment, such as for other prompts, do not count.
    """
    known = {path: definitions(path) for path in (into, *sources)}
    adding = {path: _adding(studies) for path, studies in known.items()}
    longest = max((into, *sources), key=lambda path: len(adding[path]))
    for path, places in adding.items():
        for place, other in zip(places, adding[longest], strict=False):
            differences = _differences(known[path][place], known[longest][other], path, longest)
            if differences:
                raise NanostudyError(
                    f"{path} and {longest} are not parts of one study: {'; '.join(differences)}. Nothing was copied."
                )
    if not known[into]:
        return known[longest]
    new = adding[longest][len(adding[into]) :]
    further = known[longest][new[0] :] if new else []
    return known[into] + [_with_paths_of(known[into][0], study) for study in further]


def _with_paths_of(first: Study, study: Study) -> Study:
    """The study with the first one's paths of texts and weights: by another path, all experiments would be others."""
    paths = {name: first.settings[name] for name in PATHS if name in first.settings and name in study.settings}
    return replace(study, settings={**study.settings, **paths})


def _adding(studies: Sequence[Study]) -> list[int]:
    """The places of the definitions that added experiments."""
    entries: list[Entry] = []
    places = []
    for place, study in enumerate(studies):
        extended, _ = extend(entries, study)
        if len(extended) > len(entries):
            places.append(place)
        entries = extended
    return places


def _differences(a: Study, b: Study, path_a: Path, path_b: Path) -> list[str]:
    one, other = _deciding(a), _deciding(b)
    return [
        f"{what} {_value(one.get(what))} in {path_a}, {_value(other.get(what))} in {path_b}"
        for what in {**one, **other}
        if one.get(what) != other.get(what)
    ]


def _deciding(study: Study) -> dict[str, Any]:
    """What in a definition decides its experiments, their names and ids.

    A text or weights given by a path count only as such: paths differ between machines, and their checksums are in the identities.
    """
    fixed = {**DEFAULTS, **study.settings}
    settings = {name: fixed[name] for name in CELL_SETTINGS if name not in study.grid}
    for name in PATHS:
        if settings.get(name) is not None and settings[name] not in NAMES:
            settings[name] = "by a path"
    axes = {f"axis {name}": values for name, values in study.grid.items()}
    parts = {f"part {part}": tuple(own.items()) for part, own in study.parts.items()}
    order = {"order of axes": tuple(study.grid), "order of parts": tuple(study.parts)}  # ids follow from it
    seeds = "one per experiment" if study.seeds is None else study.seeds
    return {**settings, **axes, **parts, "seeds": seeds, "skip_impossible": study.skip_impossible, **order}


def _value(value: Any) -> str:
    return f"({', '.join(_value(each) for each in value)})" if isinstance(value, tuple) else value_text(value)


# --- whether results of one name are of one experiment


def check_identities(results_of: Collection[Mapping[str, FinishedRun]], entries: Iterable[Entry]) -> None:
    """Raises NanostudyError where two results of one name, or one and the experiment here, are not the same experiment."""
    inputs = Inputs()
    for entry in entries:
        runs = [results[entry.name] for results in results_of if entry.name in results]
        if not runs:
            continue
        first = runs[0]
        for other in runs[1:]:
            if other.metadata["identity"] != first.metadata["identity"]:
                what = _unlike(first.metadata, other.metadata)
                raise NanostudyError(
                    f"{first.path} and {other.path} are not the same experiment: {what}. Nothing was copied."
                )
        if inputs.identity(entry.experiment) != first.metadata["identity"]:
            text = inputs.corpus(entry.experiment).as_dict()
            here = {"settings": entry.experiment.as_dict(), "corpus": text, "numerics_version": version.NUMERICS}
            raise NanostudyError(
                f"{first.path} is not what {entry.name} is here: {_unlike(first.metadata, here)}. Nothing was copied."
            )


def _unlike(a: Mapping[str, Any], b: Mapping[str, Any]) -> str:
    """What differs between two runs, with both values."""
    compared = (*names_of("shape"), *names_of("number"))
    values = [(name, a["settings"].get(name), b["settings"].get(name)) for name in compared]
    one, other = a["corpus"], b["corpus"]
    values += [
        ("split", a["settings"].get("split"), b["settings"].get("split")),
        ("the text's SHA-256", one.get("sha256"), other.get("sha256")),
        ("the tokenizer", (one.get("tokenizer") or {}).get("kind"), (other.get("tokenizer") or {}).get("kind")),
        ("the numerics version", a.get("numerics_version"), b.get("numerics_version")),
    ]
    differing = [f"{what} {_value(one)} and {_value(other)}" for what, one, other in values if one != other]
    return ", ".join(differing) or "the first weights"
