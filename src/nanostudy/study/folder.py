"""A study's folder: its definition, its store and its run folders.

study.yaml       the study as it began and each extension, one YAML document each: the ids and names follow from it
study.sqlite     what happened (store.py); can be rebuilt from the rest
results.csv      one row per experiment
NAME/            the run folder of an experiment
stacks/ID/       checkpoints of what is training
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from nanostudy.atomic import explain_writing, remove_leftovers, set_aside, temporary_beside, write_atomically
from nanostudy.data.corpus import load_corpus
from nanostudy.errors import DamagedRun, NanostudyError, UsageError
from nanostudy.model.config import count_parameters
from nanostudy.result import Result, Status
from nanostudy.settings_files import PATHS
from nanostudy.study.definition import (
    DEFINITION,
    Study,
    as_before,
    command,
    definitions,
    paths_in,
    relocated,
    study_yaml,
)
from nanostudy.study.grid import Entry, changed_settings, extend, requested, safe
from nanostudy.study.lease import Lease, hold
from nanostudy.study.listing import as_csv, records
from nanostudy.study.plan import shape_of
from nanostudy.study.store import FILE, Store
from nanostudy.text import listed
from nanostudy.training import run_folder
from nanostudy.training.inputs import Inputs
from nanostudy.training.recorder import Recorder
from nanostudy.training.weights import all_faults

STACKS, RESULTS_FILE = "stacks", "results.csv"
AT_ONCE = 10_000  # new experiments per commit


def entries_of(studies: Sequence[Study], *paths: Path) -> tuple[list[Entry], list[str]]:
    """All experiments of the definitions, with their ids, and messages about the impossible ones that were skipped.

    Their names are those that they have in these folders, if an older nanostudy began them.
    """
    entries, skipped = _entries(studies, older=False)
    values = [value for name in PATHS for value in paths_in(studies, name)]
    if any(safe(value) != safe(value, older=True) for value in values):
        before, _ = _entries(studies, older=True)
        names = {old.name for old, new in zip(before, entries, strict=True) if old.name != new.name}
        if any(names & _names_in(path) for path in paths):
            entries = before
    return entries, skipped


def _entries(studies: Sequence[Study], older: bool) -> tuple[list[Entry], list[str]]:
    entries: list[Entry] = []
    skipped: dict[str, None] = {}
    for study in studies:
        entries, impossible = extend(entries, study, older)
        skipped |= dict.fromkeys(impossible)
    return entries, list(skipped)


def _names_in(path: Path) -> set[str]:
    """Of what lies in the folder and what its store knows."""
    names = set(os.listdir(path)) if path.is_dir() else set()
    with contextlib.suppress(NanostudyError), Store.read(path / FILE) as store:
        names |= set(store.identities())
    return names


@dataclass(frozen=True)
class Design:
    """A folder's study as it will be. Nothing is written yet."""

    path: Path
    written: Sequence[Study]  # the definitions that the folder has
    studies: Sequence[Study]  # those that it will have, with the paths of what was moved
    entries: list[Entry]
    skipped: list[str]
    inputs: Inputs
    notes: tuple[str, ...] = ()  # on the text that another stands in for

    @property
    def study(self) -> Study:
        """The last definition."""
        return self.studies[-1]

    @property
    def requested(self) -> list[Entry]:
        return requested(self.entries, self.study)


@dataclass
class StudyFolder:
    """An open study, in the one process that writes it."""

    design: Design
    store: Store
    lease: Lease
    notes: list[str]  # what was damaged and set aside, and what stands in for a text

    @property
    def path(self) -> Path:
        return self.design.path

    def run(self, name: str) -> Path:
        return self.path / name

    def write_results(self) -> None:
        write_atomically(self.path / RESULTS_FILE, as_csv(records(self.store.rows())))


def design(
    path: Path, study: Study | None = None, merged: Sequence[Study] = (), sources: Sequence[Path] = ()
) -> Design:
    """The folder's study: begun or extended by `study`, made of the `merged` definitions of the folders `sources`, whose experiments
    keep their names, or else unchanged. Raises UsageError where they do not fit.
    """
    written = definitions(path)
    studies, note = merged or written, None
    if study is None and not studies:
        raise UsageError(f"There is no study in {path}: it has no {DEFINITION}.")
    if study:
        studies = relocated(studies, study)
    _check_paths(path, studies)
    if study:
        study, note = settled(study, studies)
        study = as_before(study, studies)
        if changed := changed_settings(studies, study):
            raise UsageError(
                f"The study in {path} began with other settings ({changed}). Choose another folder with --out, "
                "or make an axis of the setting; nothing was changed."
            )
        studies = studies if study in studies[-1:] else [*studies, study]
    inputs = Inputs()
    entries, skipped = entries_of(studies, path, *sources)
    for entry in entries:
        inputs.corpus(entry.experiment)  # raises where a window does not fit
    inputs.check_prompts("prompts", studies[-1].prompts)
    return Design(path, written, studies, entries, skipped, inputs, (note,) if note else ())


def _check_paths(path: Path, studies: Sequence[Study]) -> None:
    """Raises UsageError where a text or weights that the folder's experiments were made from are not there."""
    for setting in PATHS:
        lost = next((value for value in paths_in(studies, setting) if not os.path.exists(value)), None)
        if lost:
            raise UsageError(
                f"The study in {path} needs {setting}={lost}, which is neither at {Path(lost).absolute()} nor in {path} or a "
                f"folder above it. Say where it is: {command('run', path)} {setting}=PATH"
            )


@contextlib.contextmanager
def open_study(plan: Design) -> Iterator[StudyFolder]:
    """Writes the design and holds the folder's lease.

    Raises NanostudyError and changes nothing where another process holds the lease, or where the experiments changed.
    """
    path = plan.path
    if not plan.written:
        check_unused(path, "--out")
    with hold(path) as lease, contextlib.ExitStack() as stack:
        if definitions(path) != plan.written:
            raise NanostudyError(f"The study in {path} was changed by another process meanwhile. Run again.")
        for place in (path, *path.glob("*/"), *path.glob(f"{STACKS}/*/")):
            remove_leftovers(place)
        store = stack.enter_context(Store.open(path / FILE))
        folder = StudyFolder(plan, store, lease, [*plan.notes])
        identities = _identities(folder)
        if plan.studies != plan.written:
            write_atomically(path / DEFINITION, "".join(study_yaml(one) for one in plan.studies))
        _register(folder, identities)
        there = set(os.listdir(path))  # read once: most experiments of a large study have no run folder yet
        for name, status in store.statuses().items():
            if status is Status.WAITING and name in there:
                take(folder, name)
        yield folder


def check_unused(path: Path, option: str) -> None:
    """Raises NanostudyError where a new study would begin among other files; those of one that was killed at once are its own."""
    try:
        names = sorted(os.listdir(path)) if path.exists() else []
    except OSError as problem:
        raise NanostudyError(f"{path} cannot be used as a study's folder: {problem.strerror}.") from None
    others = [name for name in names if not name.startswith((".", FILE))]
    if others:
        raise NanostudyError(
            f"{path} holds other files ({listed(others, 3)}) and no study. Choose another folder with {option}; nothing was changed."
        )


def settled(study: Study, before: Sequence[Study] = ()) -> tuple[Study, str | None]:
    """The study with the corpus that `auto` stands for, the folder's or else the one that this machine has; and a note where that
    is not the one meant.
    """
    if study.settings.get("corpus") != "auto":
        return study, None
    existing, note = before[0].settings.get("corpus") if before else None, None
    if not existing:
        corpus = load_corpus("auto")
        existing, note = corpus.name, corpus.note
    return replace(study, settings={**study.settings, "corpus": existing}), note


def _identities(folder: StudyFolder) -> dict[str, str]:
    """Identities by name. Raises NanostudyError where the folder's experiments changed."""
    inputs = folder.design.inputs
    identities = {entry.name: inputs.identity(entry.experiment) for entry in folder.design.entries}
    first: dict[str, str] = {}
    for name, identity in identities.items():
        if first.setdefault(identity, name) != name:
            raise UsageError(
                f"duplicate experiments: {first[identity]} and {name} read the same text from the same first weights."
            )
    changed = [name for name, identity in folder.store.identities().items() if identities.get(name) != identity]
    if changed:
        raise NanostudyError(
            f"{len(changed)} experiments of {folder.path}, such as {changed[0]}, are no longer what they were: the text, the first "
            "weights or nanostudy itself changed since. Go on with those, or begin in another folder with --out."
        )
    return identities


def _register(folder: StudyFolder, identities: Mapping[str, str]) -> None:
    """Adds new experiments to the store; none is running any more."""
    existing = folder.store.identities()
    new, inputs = [e for e in folder.design.entries if e.name not in existing], folder.design.inputs
    for start in range(0, len(new), AT_ONCE):  # a commit holds its writes in memory
        batch = new[start : start + AT_ONCE]
        shapes = (shape_of(entry.experiment, inputs.corpus(entry.experiment)) for entry in batch)
        counts = [count_parameters(shape).total for shape in shapes]
        folder.store.add(batch, [identities[entry.name] for entry in batch], counts)
        folder.store.commit()
    folder.store.end_session()
    folder.store.commit()


def take(folder: StudyFolder, name: str) -> None:
    """Adopts the result of a run folder. What is damaged is set aside, with a note, so that the experiment can be trained again."""
    run = folder.run(name)
    try:
        if not os.path.lexists(run / "run.json") and any(file in run_folder.FILES for file in os.listdir(run)):
            raise DamagedRun(f"{run} has lost its run.json.")
        adopt(folder, name)
    except (DamagedRun, NotADirectoryError) as problem:
        aside = set_aside(run / "run.json" if _is_unreadable(run) else run)
        folder.notes.append(f"{problem} It is now {aside.relative_to(folder.path)}, and {name} is trained again.")


def _is_unreadable(run: Path) -> bool:
    """Whether its run.json is there and damaged."""
    try:
        run_folder.read_metadata(run)
    except DamagedRun:
        return (run / "run.json").exists()
    return False


def adopt(folder: StudyFolder, name: str, before: Result | None = None) -> bool:
    """Copies a result from its run folder to a store that lacks it: after a kill between the two, in a rebuild or a merge.

    `before` is what another store recorded of it. Raises DamagedRun where its files do not agree; they alone decide.
    """
    run, store = folder.run(name), folder.store
    metadata, result = run_folder.read_metadata(run), run_folder.read_result(run)
    if metadata is None or result is None or not result.status.has_result:
        return False
    row = store.row(name)
    if result.identity != row.identity or result.parameters != row.parameters:
        raise DamagedRun(f"{run} holds another experiment than {name}.")
    problems = all_faults(run, metadata)
    if decisive := run_folder.decisive(problems):
        raise DamagedRun(" ".join(decisive))
    folder.notes += problems.values()
    sampled, first_recorded = (run / "sample.txt").is_file(), before.finished_at if before else None
    result = replace(result, name=name, sampled=sampled, finished_at=first_recorded)
    store.adopted(result, run_folder.read_rows(run / "evaluations.csv"))
    store.commit()
    return True


def run_faults(run: Path, keep: str) -> dict[str, str]:
    """As all_faults, and what is missing of weights where a study keeps `all`; empty where there is no finished run."""
    try:
        metadata = run_folder.read_metadata(run)
        if metadata is None or metadata["status"] == "unfinished":
            return {}
        return {**missing_weights(run, metadata, keep), **all_faults(run, metadata)}
    except NanostudyError as problem:
        return {"run.json": str(problem)}


def missing_weights(run: Path, metadata: Mapping[str, Any], keep: str) -> dict[str, str]:
    """Files that run.json recorded and that are not there, in a study that keeps all."""
    recorded = (metadata.get("checksums") or {}) if keep == "all" else ()
    return {name: f"{run / name} is not there." for name in recorded if not os.path.lexists(run / name)}


def restore_tables(folder: StudyFolder, name: str, recorder: Recorder) -> list[str]:
    """Before a training goes on: sets damaged tables aside, and writes evaluations back that the store has. Returns notes."""
    notes = []
    for table in run_folder.COLUMNS:
        try:
            run_folder.read_rows(folder.run(name) / table)
        except DamagedRun as problem:
            notes.append(f"{problem} It is now {set_aside(folder.run(name) / table).name}; going on without it.")
    recorder.restore(folder.store.evaluations(name))
    return notes


def rebuild(path: Path, again: Collection[str] = ()) -> tuple[int, int, list[str]]:
    """Makes the store again from study.yaml, the run folders, and what can be read of the old store, which stays beside it.

    A result counts where its run folder is whole, or else where the old store has it; `again` names experiments whose results
    shall not. Returns the numbers of experiments and of results, and notes. A kill leaves the old store in place.
    """
    plan = design(path)
    with hold(path) as lease:
        remove_leftovers(path)
        known, events, notes = _old_store(path)
        new = temporary_beside(path / FILE)
        with Store.open(new) as store:
            folder = StudyFolder(plan, store, lease, notes)
            _register(folder, _identities(folder))
            for entry in plan.entries:
                if entry.name not in again:
                    _rebuild_one(folder, entry.name, *known.get(entry.name, (None, [])))
                elif os.path.lexists(folder.run(entry.name)):
                    notes.append(f"{entry.name}: its folder is now {set_aside(folder.run(entry.name)).name}.")
            for event in events:
                if event["experiment"] is None or event["experiment"] in known:
                    store.note(event["kind"], event["detail"], experiment=event["experiment"], at=event["at"])
            store.commit()
            folder.write_results()
            counts = store.counts()
        if os.path.lexists(path / FILE):
            notes.append(f"The store that was there is now {_keep_old(path)}.")
        os.replace(new, path / FILE)
    return sum(counts.values()), sum(counts[status] for status in Status if status.has_result), notes


Curve = list[dict[str, Any]]


def _old_store(path: Path) -> tuple[dict[str, tuple[Result, Curve]], list[dict[str, Any]], list[str]]:
    """What can be read of the store: its rows, its events, and notes."""
    if not os.path.lexists(path / FILE):
        return {}, [], []
    try:
        with Store.read(path / FILE) as old:
            damaged: list[str] = []
            rows = old.rows(damaged=damaged)
            known = {row.name: (row, old.evaluations(row.name)) for row in rows}
            notes = [f"{name}: its row in {FILE} is damaged, and not used." for name in damaged]
            return known, old.events(), notes
    except NanostudyError as problem:
        return {}, [], [f"Nothing of the old store is used: {problem}"]


def _rebuild_one(folder: StudyFolder, name: str, before: Result | None, curve: Curve) -> None:
    """`before` and `curve`: what the old store had of it."""
    run, store = folder.run(name), folder.store
    if before and before.identity != store.row(name).identity:
        before = None
    problem = f"{run} is not there."
    if os.path.lexists(run / "run.json"):
        try:
            if adopt(folder, name, before):
                if before and before.status.has_result and before.val_loss != (now := store.row(name)).val_loss:
                    folder.notes.append(
                        f"{name}: val_loss {now.val_loss} from its run folder; the store had {before.val_loss}."
                    )
                return
        except DamagedRun as damage:
            problem = str(damage)
    if before and before.status.has_result:
        store.adopted(before, curve)
        folder.notes.append(
            f"{problem} The old store's result of {name} is kept; {command('retry', folder.path, name)} trains it again."
        )
    elif os.path.lexists(run):
        take(folder, name)
    if before and before.status is Status.FAILED:
        store.failed(name, before.reason or "")


def _keep_old(path: Path) -> str:
    """Gives the old store a further name, `study.sqlite.old` or the first such one that is free, and a journal that it left."""
    names = (f"{FILE}.old{end}" for end in ("", *(f".{n}" for n in range(2, 1000))))
    kept = next(place for place in map(path.joinpath, names) if not os.path.lexists(place))
    journal = path / f"{FILE}-journal"
    try:
        try:
            os.link(path / FILE, kept, follow_symlinks=False)
        except OSError:  # no links on this file system, or it is a folder
            os.replace(path / FILE, kept)
        if journal.exists():  # of a commit that a kill broke off: the new store must not take it for its own
            os.replace(journal, f"{kept}-journal")
    except OSError as problem:
        raise NanostudyError(explain_writing(path / FILE, problem)) from problem
    return kept.name
