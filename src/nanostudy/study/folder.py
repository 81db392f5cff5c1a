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
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from nanostudy.atomic import write_atomically
from nanostudy.data.corpus import load_corpus
from nanostudy.errors import NanostudyError, UsageError
from nanostudy.model.config import count_parameters
from nanostudy.result import Status
from nanostudy.study.definition import DEFINITION as DEFINITION
from nanostudy.study.definition import Study, as_before, study_yaml
from nanostudy.study.definition import definitions as definitions
from nanostudy.study.grid import Entry, changed_settings, extend, requested
from nanostudy.study.lease import Lease, hold
from nanostudy.study.listing import as_csv, records
from nanostudy.study.plan import shape_of
from nanostudy.study.store import FILE, Store
from nanostudy.text import listed
from nanostudy.training import run_folder
from nanostudy.training.inputs import Inputs

STACKS, RESULTS_FILE = "stacks", "results.csv"
AT_ONCE = 10_000  # new experiments per commit


def entries_of(studies: Sequence[Study]) -> tuple[list[Entry], list[str]]:
    """All experiments of the definitions, with their ids, and messages about the impossible ones that were skipped."""
    entries: list[Entry] = []
    skipped: dict[str, None] = {}
    for study in studies:
        entries, impossible = extend(entries, study)
        skipped |= dict.fromkeys(impossible)
    return entries, list(skipped)


@dataclass
class StudyFolder:
    """An open study, in the one process that writes it."""

    path: Path
    study: Study  # its last definition
    entries: list[Entry]
    skipped: list[str]
    inputs: Inputs
    store: Store
    lease: Lease

    def run(self, name: str) -> Path:
        return self.path / name

    def write_results(self) -> None:
        write_atomically(self.path / RESULTS_FILE, as_csv(records(self.store.rows())))


@dataclass(frozen=True)
class Design:
    """A folder's study as it will be. Nothing is written yet."""

    path: Path
    before: list[Study]  # the folder's definitions
    study: Study
    entries: list[Entry]
    skipped: list[str]
    inputs: Inputs

    @property
    def requested(self) -> list[Entry]:
        return requested(self.entries, self.study)

    @property
    def studies(self) -> list[Study]:
        return self.before if self.before and self.study == self.before[-1] else [*self.before, self.study]


def design(path: Path, study: Study | None = None) -> Design:
    """The folder's study: begun or extended by `study`, or unchanged if that is None. Raises UsageError where they do not fit."""
    before = definitions(path)
    if study is None and not before:
        raise UsageError(f"There is no study in {path}: it has no {DEFINITION}.")
    now = as_before(settled(study, before), before) if study else before[-1]
    changed = changed_settings(before, now)
    if changed:
        raise UsageError(
            f"The study in {path} began with other settings ({changed}). Choose another folder with --out, "
            "or make an axis of the setting; nothing was changed."
        )
    inputs = Inputs()
    draft = Design(path, before, now, [], [], inputs)
    entries, skipped = entries_of(draft.studies)
    for entry in entries:
        inputs.corpus(entry.experiment)  # raises where a window does not fit
    inputs.check_prompts("prompts", now.prompts)
    return replace(draft, entries=entries, skipped=skipped)


@contextlib.contextmanager
def open_study(path: Path, study: Study | Design | None = None) -> Iterator[StudyFolder]:
    """Writes the design, or the design of this study, and holds the folder's lease.

    Raises NanostudyError and changes nothing where another process holds the lease, or where the experiments changed.
    """
    plan = study if isinstance(study, Design) else design(path, study)
    if not plan.before:
        _check_unused(path)
    with hold(path) as lease, contextlib.ExitStack() as stack:
        if definitions(path) != plan.before:
            raise NanostudyError(f"The study in {path} was changed by another process meanwhile. Run again.")
        store = stack.enter_context(Store.open(path / FILE))
        folder = StudyFolder(path, plan.study, plan.entries, plan.skipped, plan.inputs, store, lease)
        identities = _identities(folder)
        if len(plan.studies) > len(plan.before):
            write_atomically(path / DEFINITION, "".join(study_yaml(one) for one in plan.studies))
        _register(folder, identities)
        yield folder


def _check_unused(path: Path) -> None:
    """Raises NanostudyError where a new study would begin among other files; those of one that was killed at once are its own."""
    try:
        names = sorted(os.listdir(path)) if path.exists() else []
    except OSError as problem:
        raise NanostudyError(f"{path} cannot be used as a study's folder: {problem.strerror}.") from None
    others = [name for name in names if not name.startswith((".", FILE))]
    if others:
        raise NanostudyError(
            f"{path} holds other files ({listed(others, 3)}) and no study. Choose another folder with --out; nothing was changed."
        )


def settled(study: Study, before: Sequence[Study] = ()) -> Study:
    """The study with the corpus that `auto` stands for: the folder's, or else the one that this machine has."""
    if study.settings.get("corpus") != "auto":
        return study
    existing = before[0].settings.get("corpus") if before else None
    return replace(study, settings={**study.settings, "corpus": existing or load_corpus("auto").name})


def _identities(folder: StudyFolder) -> dict[str, str]:
    """Identities by name. Raises NanostudyError where the folder's experiments changed."""
    identities = {entry.name: folder.inputs.identity(entry.experiment) for entry in folder.entries}
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
    """Adds new experiments to the store, and results of run folders that it lacks."""
    existing = folder.store.identities()
    new = [entry for entry in folder.entries if entry.name not in existing]
    for start in range(0, len(new), AT_ONCE):  # a commit holds its writes in memory
        batch = new[start : start + AT_ONCE]
        shapes = (shape_of(entry.experiment, folder.inputs.corpus(entry.experiment)) for entry in batch)
        counts = [count_parameters(shape).total for shape in shapes]
        folder.store.add(batch, [identities[entry.name] for entry in batch], counts)
        folder.store.commit()
    folder.store.end_session()
    folder.store.commit()
    existing_folders = set(os.listdir(folder.path))  # read once: most experiments of a large study have none yet
    for name, status in folder.store.statuses().items():
        if status is Status.WAITING and name in existing_folders and (folder.run(name) / "run.json").is_file():
            adopt(folder, name)


def adopt(folder: StudyFolder, name: str) -> bool:
    """Copies a result from its run folder to a store that lacks it: after a kill between the two, in a rebuild or a merge."""
    result, store = run_folder.read_result(folder.run(name)), folder.store
    if result is None or not result.status.has_result:
        return False
    if result.identity != store.row(name).identity:
        raise NanostudyError(
            f"{folder.run(name)} holds another experiment than {name}. Move it away; nothing was changed."
        )
    store.started(name, 0, -1, result.members or 1, None, result.machine)
    adopt_evaluations(folder, name)
    store.finished(replace(result, name=name))
    if (folder.run(name) / "sample.txt").is_file():
        store.sampled([name])
    store.commit()
    return True


def adopt_evaluations(folder: StudyFolder, name: str) -> None:
    """Copies the run folder's evaluations, which a store that was rebuilt may lack."""
    for point in run_folder.read_rows(folder.run(name) / "evaluations.csv"):
        losses = (point[key] for key in ("seconds", "train_loss", "val_loss"))
        folder.store.evaluated(name, int(point["step"]), int(point["tokens"]), *losses)


def rebuild(path: Path) -> tuple[int, int]:
    """Makes the store again from study.yaml and the run folders, and keeps the old one beside it.

    Returns the numbers of experiments and of results.
    """
    if not definitions(path):
        raise UsageError(f"There is no study in {path}: it has no {DEFINITION}.")
    with hold(path):
        for name in (FILE, f"{FILE}-journal"):
            if (path / name).exists():
                (path / name).replace(path / f"{name}.old")
    with open_study(path) as folder:
        counts = folder.store.counts()
        return sum(counts.values()), sum(counts[status] for status in Status if status.has_result)
