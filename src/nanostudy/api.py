"""The Python interface: what the commands do, as short calls."""

from __future__ import annotations

import contextlib
import os
import shutil
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from nanostudy.analysis.results import read_results
from nanostudy.analysis.table_columns import Stated
from nanostudy.analysis.table_files import stem_of
from nanostudy.atomic import sole_owner, whole_folder
from nanostudy.data.corpus import Corpus
from nanostudy.data.corpus import load_corpus as read_corpus
from nanostudy.data.tokenizer import Tokenizer
from nanostudy.device import memory_errors
from nanostudy.errors import Interrupted, NanostudyError, UsageError
from nanostudy.interop import runs
from nanostudy.interop.runs import Conversion
from nanostudy.model.config import GPTConfig
from nanostudy.model.config import count_parameters as count
from nanostudy.model.ranks import joined
from nanostudy.notice import notify
from nanostudy.reporting.notebook import NotebookAnalysis
from nanostudy.result import Status
from nanostudy.run import Run as Run
from nanostudy.run import complete, has_begun
from nanostudy.run import load as load
from nanostudy.settings import (
    BESIDE,
    PLAN_OPTIONS,
    RUN_OPTIONS,
    SETTINGS,
    TRACKING,
    TRAIN_OPTIONS,
    Experiment,
    Resources,
    Where,
    names_of,
)
from nanostudy.settings_files import experiment_and_resources, read_settings, resume_command
from nanostudy.signals import stop_requests
from nanostudy.study.definition import (
    Study,
    definitions,
    folder_of,
    has_study,
    keep_of,
    read_study,
    study_of,
    with_assignments,
)
from nanostudy.study.execute import Execution
from nanostudy.study.folder import Design, StudyFolder, design, open_study, rebuild, run_faults
from nanostudy.study.forecast import Plan, forecast
from nanostudy.study.grid import Entry, select
from nanostudy.study.hardware import parse_machines
from nanostudy.study.listing import Rows
from nanostudy.study.merge import merge
from nanostudy.study.pool import Pool, make_pool, shapes_of
from nanostudy.study.progress import Listener
from nanostudy.study.store import FILE, Store
from nanostudy.tracking import check_installed, tracking
from nanostudy.training import run_folder
from nanostudy.training.events import Evaluated, Event, Stopped
from nanostudy.training.inputs import Inputs
from nanostudy.training.machine import Machine, resolve
from nanostudy.training.recorder import Recorder
from nanostudy.training.train import train as train_stack
from nanostudy.training.trial import Shape, settled
from nanostudy.validation import canonical, takes, usage_errors
from nanostudy.version import VERSION
from nanostudy.view import StudyView, TrainingView

if TYPE_CHECKING:
    from nanostudy.reporting.table_import import Imported
    from nanostudy.reporting.write import Published

DRIVE = Path("/content/drive")  # where Colab mounts Google Drive
KAGGLE = Path("/kaggle/working")  # what Kaggle keeps of a saved version, as its output


# --- experiments and their training


@usage_errors
def preset(name: str | Path, **changes: Any) -> Experiment:
    """The experiment of a preset, a settings file or a run folder, with these settings changed. Raises UsageError."""
    return _experiment(name, changes)[0]


def _experiment(
    source: Experiment | Mapping[str, Any] | str | Path, changes: Mapping[str, Any]
) -> tuple[Experiment, dict[str, Any]]:
    """With what a settings file may name beside it: resources and a tracker."""
    if isinstance(source, Experiment):
        settings = source.as_dict()
    else:
        settings = dict(source) if isinstance(source, Mapping) else read_settings(str(source))
    given = {
        canonical(name) if isinstance(name, str) else name: value for name, value in {**settings, **changes}.items()
    }
    return experiment_and_resources(given)[0], {name: given[name] for name in BESIDE if name in given}


@usage_errors
def load_corpus(name: str | Path, tokenizer: str | Tokenizer = "char") -> Corpus:
    """A text with its tokenizer and its two splits, by the name or path that `corpus=` takes. Raises UsageError, NanostudyError."""
    return read_corpus(str(name), tokenizer)


@usage_errors
def count_parameters(experiment: Experiment | Mapping[str, Any] | str) -> int:
    """The parameters of its model, with its corpus's vocabulary. Raises UsageError, NanostudyError."""
    experiment = _experiment(experiment, {})[0]
    corpus = read_corpus(experiment.corpus, experiment.tokenizer)
    return count(GPTConfig.of(experiment, corpus.tokenizer.vocab_size)).total


@takes(SETTINGS[name] for name in TRAIN_OPTIONS)
@usage_errors
def train(
    experiment: Experiment | Mapping[str, Any] | str | Path,
    out: str | Path | None = None,
    *,
    settings: Mapping[str, Any] | None = None,
    resources: Resources | None = None,
    listen: Callable[[Event], None] | None = None,
    **options: Any,
) -> Run:
    """Trains one experiment in the folder `out` (default: runs/ and its name) and returns the trained run.

    It may be given as settings, or by the name of a preset or a settings file; `settings` changes some: {"lr": 0.002}.
    Goes on where an earlier call with the same experiment and folder stopped, and only loads a finished one. `listen`
    is called with every event; by default progress is shown. The options are those of settings.Where; `resources` gives
    several at once. Raises UsageError, NanostudyError (Interrupted, with everything saved, on Ctrl-C).

    Called by each of the ranks that torchrun started, it trains on all of them together and returns the same run. The first
    rank reads the folder, writes it and listens. One rank reports what goes wrong, and the others raise ReportedElsewhere.
    """
    experiment, beside = _experiment(experiment, settings or {})
    named = {name: value for name, value in beside.items() if resources is None or name in TRACKING}
    folder = Path(out) if out is not None else Path("runs") / experiment.name
    with joined() as ranks, contextlib.ExitStack() as stack:
        where = Where.of(TRAIN_OPTIONS, resources, {**named, **options})
        ranks.share(experiment.sequences_per_update)
        ranks.of_first(lambda: check_installed(where.track))
        machine = resolve(where.resources, ranks)
        inputs, begun = ranks.of_first(lambda: (Inputs.of(experiment), has_begun(folder)))
        job, corpus = inputs.job(experiment.name, experiment, begun), inputs.corpus(experiment)
        inputs.check_prompts("sample_prompt", [experiment.sample_prompt])
        ranks.agree(_decisive(experiment, corpus, machine))
        recorder = Recorder(folder, experiment, job.identity, corpus, machine)
        if ranks.first:
            stack.enter_context(sole_owner(folder))
        requested = {**asdict(where.resources), **{name: value for name in TRACKING if (value := getattr(where, name))}}
        doing = _nothing
        if ranks.of_first(lambda: recorder.claim(requested)) in ("new", "unfinished"):
            with memory_errors():
                machine = recorder.machine = settled(where.resources, machine, [Shape.of(experiment, corpus)], ranks)
            ranks.agree({"compiled": machine.compiled})
            stopped = stack.enter_context(stop_requests())
            stack.enter_context(memory_errors())
            hear, tick, doing = stack.enter_context(_listening(recorder, listen, where, ranks.first))
            path = folder / run_folder.CHECKPOINT
            options = {"save_every": where.save_every, "stop": lambda: tick() or stopped(), "moments": True}
            for event in train_stack([job], corpus, machine, path, **options, ranks=ranks):
                hear(event)
                if isinstance(event, Stopped):
                    raise Interrupted(
                        f"Stopped after {event.step} updates. All of it is saved; go on with: {resume_command(folder)}"
                    )
        run = ranks.of_first(lambda: complete(folder, machine, doing).on(torch.device("cpu")))
        return run.on(machine.device)


def _nothing(*_: Any) -> None:
    pass


def _decisive(experiment: Experiment, corpus: Corpus, machine: Machine) -> dict[str, object]:
    """What all ranks must have alike: what decides the result, and its bits."""
    settings = {name: getattr(experiment, name) for name in (*names_of("shape"), *names_of("number"))}
    return {"nanostudy": VERSION, **machine.conditions, "the corpus's SHA-256": corpus.sha256, **settings}


@contextlib.contextmanager
def _listening(
    recorder: Recorder, listen: Callable[[Event], None] | None, where: Where, first: bool
) -> Iterator[tuple[Callable[..., None], ...]]:
    """What calls, at the first rank, the run folder's recorder, then the view or `listen`, then the tracker; and the view's tick
    and doing.
    """
    if not first:
        yield _nothing, _nothing, _nothing
        return
    with TrainingView(recorder) if listen is None else contextlib.nullcontext(listen) as view:
        say = getattr(view, "say", None) or (lambda text: print(text, file=sys.stderr))
        with tracking(where, say) as tracked:

            def hear(event: Event) -> None:
                recorder.record(event)
                view(event)
                if tracked:
                    tracked.hear(event, recorder)

            yield hear, getattr(view, "tick", _nothing), getattr(view, "doing", _nothing)


# --- studies


def _drafted(
    source: str | Path | Study | Mapping[str, Any],
    out: str | Path | None,
    settings: Mapping[str, Any] | None,
    parts: Sequence[str],
    only: str | None,
) -> tuple[Design, list[Entry]]:
    """The study's design, and the experiments chosen from it; nothing is written. Raises UsageError."""
    study = study_of(source) if isinstance(source, Mapping) else source
    name = study.name if isinstance(study, Study) else str(study)
    path = Path(out) if out is not None else folder_of(name)
    if not isinstance(study, Study):
        existing = definitions(Path(name))
        if existing and not settings and path == Path(name):
            draft = design(path)
            return draft, select(draft.entries, parts, only)
        study = existing[-1] if existing else read_study(name)
    draft = design(path, with_assignments(study, settings or {}))
    return draft, select(draft.requested, parts, only)


@takes(SETTINGS[name] for name in RUN_OPTIONS)
@usage_errors
def run_study(
    source: str | Path | Study | Mapping[str, Any],
    out: str | Path | None = None,
    *,
    settings: Mapping[str, Any] | None = None,
    parts: Sequence[str] = (),
    only: str | None = None,
    resources: Resources | None = None,
    listener: Listener | None = None,
    **options: Any,
) -> Rows:
    """Runs a study in the folder `out` (default: studies/ and its name) to its end and returns the chosen experiments' rows.

    The study is a name, a file, a folder, or a mapping with what a study file has. Goes on where an earlier call stopped.
    `settings` are changes, {"dropout": [0.1, 0.2], "max_iters": 500}; `parts` and `only` choose experiments. The options are those
    of settings.Where; `resources` gives several at once. Raises UsageError, NanostudyError (Interrupted, with everything saved, on
    Ctrl-C).
    """
    where = Where.of(RUN_OPTIONS, resources, options)
    check_installed(where.track)
    draft, chosen = _drafted(source, out, settings, parts, only)
    pool = make_pool(where, len(chosen), shapes_of(chosen, draft.inputs))
    with contextlib.closing(pool.backend), open_study(draft) as folder:
        return _execute(folder, chosen, pool, where, listener)


@takes(SETTINGS[name] for name in RUN_OPTIONS)
@usage_errors
def retry_study(
    path: str | Path,
    names: Sequence[str] = (),
    *,
    resources: Resources | None = None,
    listener: Listener | None = None,
    **options: Any,
) -> Rows:
    """Runs again those experiments of a study's folder that failed, or whose run folders are lost or damaged; or those of
    them that are named. Damaged run folders are set aside. Options as for run_study.
    """
    where = Where.of(RUN_OPTIONS, resources, options)
    check_installed(where.track)
    path = Path(path)
    with Store.read(path / FILE) as store:
        names = [store.row(name).name for name in names]  # raises at an unknown one
        rows = [row for row in store.rows() if not names or row.name in names]
    failed = {row.name for row in rows if row.status is Status.FAILED}
    keep = keep_of(path)
    lost = {
        row.name
        for row in rows
        if row.status.has_result
        and (run_faults(path / row.name, keep) or not os.path.lexists(path / row.name / "run.json"))
    }
    if not failed | lost:
        which = " under these names" if names else ""
        raise UsageError(f"No experiment of {path} has failed{which}, and no result has lost its run folder.")
    notes = rebuild(path, lost)[2] if lost else []
    with open_study(design(path)) as folder:
        folder.notes += notes
        chosen = [entry for entry in folder.design.entries if entry.name in failed | lost]
        pool = make_pool(where, len(chosen), shapes_of(chosen, folder.design.inputs))
        with contextlib.closing(pool.backend):
            folder.store.requeue(failed)
            return _execute(folder, chosen, pool, where, listener)


def _execute(folder: StudyFolder, chosen: Sequence[Entry], pool: Pool, where: Where, listener: Listener | None) -> Rows:
    with contextlib.ExitStack() as stack:
        if where.notify:
            stack.push(partial(_notify, where.notify, folder))
        listener = listener or stack.enter_context(StudyView(folder, chosen, pool))
        for note in folder.notes:
            listener.say(note, "yellow")
        stop = stack.enter_context(stop_requests())
        tracked = stack.enter_context(tracking(where, listener.say))
        stack.callback(_write_results, folder)
        Execution(
            folder, chosen, pool.backend, pool.capacity, where.resources, listener, stop, where.save_every, tracked
        ).run()
    return Rows(folder.store.rows(names=[entry.name for entry in chosen]))


def _notify(how: str, folder: StudyFolder, kind: type[BaseException] | None, problem: Any, _: Any) -> None:
    message = (
        f"{folder.design.study.name} {'has ended' if kind is None else f'was stopped ({problem or kind.__name__})'}"
    )
    with contextlib.suppress(NanostudyError):  # its drive may be gone
        counts = folder.store.counts()
        message += f": {counts[Status.FINISHED]:,} of {sum(counts.values()):,} experiments finished"
    if refused := notify(how, message):
        print(f"The notice could not be given: {refused}.", file=sys.stderr)


def _write_results(folder: StudyFolder) -> None:
    with contextlib.suppress(NanostudyError):
        folder.write_results()


@takes(SETTINGS[name] for name in PLAN_OPTIONS)
@usage_errors
def plan_study(
    source: str | Path | Study | Mapping[str, Any],
    out: str | Path | None = None,
    *,
    settings: Mapping[str, Any] | None = None,
    parts: Sequence[str] = (),
    only: str | None = None,
    resources: Resources | None = None,
    plan_for: str | None = None,
    **options: Any,
) -> Plan:
    """What run_study would do here, were no stack under way: runs nothing but a short calibration, and writes nothing.

    `plan_for` describes other machines, such as 8xH200 or 64 cores: the run there is simulated.
    """
    where = Where.of(PLAN_OPTIONS, resources, options)
    machines = None if plan_for is None else parse_machines(plan_for)
    return forecast(*_drafted(source, out, settings, parts, only), where, machines)


@usage_errors
def merge_study(sources: Sequence[str | Path], into: str | Path) -> list[str]:
    """Puts the results of several people's or machines' folders of one study together, and says what came from where."""
    return merge([Path(source) for source in sources], Path(into))


# --- results


@usage_errors
def analyze(*paths: str | Path, loss: str = "", name: str = "", factors: Sequence[str] = ()) -> NotebookAnalysis:
    """Studies' folders (or names), runs' folders and tables of results, together. Raises UsageError, NanostudyError.

    A table's columns are found by their usual names. `loss` and `name` say which column is the validation loss and which the
    experiment's name, `factors` which were varied.
    """
    return NotebookAnalysis(read_results(paths, Stated(loss, name, tuple(factors))))


@usage_errors
def report(*paths: str | Path, out: str | Path | None = None, **columns: Any) -> Path:
    """Writes the report of these results (page, Markdown, table, figures) and returns the page's path.

    In the folder `out`; by default `report` in the study or run that alone is named, and `report` here for several. A
    run's report.md and curve.png lie in the run's folder itself. `columns` are analyze's. Raises UsageError, NanostudyError.
    """
    return published(*paths, out=out, **columns).page


def published(*paths: str | Path, out: str | Path | None = None, **columns: Any) -> Published:
    """As `report`, and returns all that it wrote, and the answer."""
    from nanostudy.reporting.write import publish

    alone = _folder(Path(paths[0])) if len(paths) == 1 else None
    folder = Path(out) if out is not None else (alone or Path()) / "report"
    is_run = alone is not None and out is None and not has_study(alone)
    return publish(analyze(*paths, **columns), folder, alone if is_run else None)


@usage_errors
def import_study(*tables: str | Path, out: str | Path | None = None, **columns: Any) -> Imported:
    """Somebody's tables of results in this project's columns, and a study that trains their experiments here, in the folder `out`
    (default: imports/ and the first table's name). `columns` are analyze's. Raises UsageError, NanostudyError.
    """
    from nanostudy.reporting.table_import import import_results

    results = analyze(*tables, **columns).results
    return import_results(results, Path(out) if out is not None else Path("imports") / stem_of(Path(tables[0])))


def _folder(path: Path) -> Path | None:
    """The folder of the study or the run that this names."""
    folder = path if path.exists() else folder_of(str(path))
    return folder if has_study(folder) or (folder.is_dir() and run_folder.read_metadata(folder)) else None


# --- other programs


@usage_errors
def convert(
    source: str | Path,
    to: str | Path,
    *,
    out: str | Path | None = None,
    which: str | None = None,
    meta: str | Path | None = None,
    characters: str | Path | None = None,
    overwrite: bool = False,
    **settings: Any,
) -> Conversion:
    """A run to "nanogpt" or "huggingface" (in the folder `out`, by default one inside the run), or nanoGPT's ckpt.pt to a run.

    `which` weights leave: "best" or "last" (default: last for nanoGPT, which goes on from them, else best). For a ckpt.pt, `meta`
    is the meta.pkl or `characters` the corpus with its characters, where neither is found; `settings` change what it was
    trained with, such as max_iters. Raises UsageError, NanostudyError.
    """
    source = Path(source)
    if str(to) in ("nanogpt", "huggingface"):
        if source.suffix == ".pt":
            raise UsageError(f"Make a run of {source} first, with --to RUN; that is converted --to {to}.")
        if meta or characters or settings:
            raise UsageError(f"meta, characters and settings belong to a checkpoint of nanoGPT's, not to --to {to}.")
        return runs.export_run(source, str(to), Path(out) if out else None, which, overwrite)
    if source.is_dir() or source.suffix == ".safetensors":
        raise UsageError(f"A run is converted --to nanogpt or --to huggingface, not {str(to)!r}.")
    if out or which or overwrite:
        raise UsageError(
            "out, which and overwrite belong to --to nanogpt and --to huggingface; here --to names the new run."
        )
    text = None if characters is None else str(characters)
    return _arrive(source, Path(to), Path(meta) if meta else None, text, settings)


class _Evaluated(Exception):
    """The one evaluation that a conversion waits for is done."""


def _arrive(
    source: Path, target: Path, meta: Path | None, characters: str | None, settings: dict[str, Any]
) -> Conversion:
    imported = runs.read_nanogpt(source, target, meta, characters, settings)
    e, step = imported.experiment, imported.checkpoint.iter_num
    if not imported.checkpoint.params_1P.isfinite().all():
        raise NanostudyError(
            f"{source} has weights that are not finite (NaN or infinity): its training diverged, and nothing can go on from it. "
            "Take an earlier checkpoint."
        )
    runs.write_run(imported, target, resolve(imported.resources))
    notes = list(imported.notes)
    if imported.corpus is None:
        note = "NOTE: the text is not at hand (name it with corpus=), so there is no report, and no going on"
        return Conversion(target, (*notes, note))

    def listen(event: Event) -> None:
        if isinstance(event, Evaluated):
            notes.append(f"update {step:,}: train {event.train_loss:.4f}, val {event.val_loss:.4f} nats per token")
            if step < e.max_iters:
                raise _Evaluated

    with contextlib.suppress(_Evaluated):
        train(e, target, resources=imported.resources, listen=listen)
    if step < e.max_iters:
        notes.append(f"unfinished: {step:,} of {e.max_iters:,} updates; go on with {resume_command(target)}")
    return Conversion(target, tuple(notes))


# --- notebooks


@usage_errors
def workspace(earlier: str | Path | None = None) -> Path:
    """The folder whose files outlast this session: `nanostudy` on the mounted Google Drive on Colab, in the output on Kaggle, and here elsewhere.

    Colab asks for the Drive the first time. `earlier` is a folder that an earlier session left, such as a Kaggle output that was
    added as an input: what is not in the workspace yet is copied from it. Raises UsageError.
    """
    if earlier is not None and not os.path.isdir(earlier):
        raise UsageError(f"There is no folder {earlier}: name one that an earlier session left, or none.")
    if "google.colab" in sys.modules:
        from google.colab import drive

        if not (DRIVE / "MyDrive").is_dir():
            drive.mount(str(DRIVE))
        place = DRIVE / "MyDrive" / "nanostudy"
    elif "KAGGLE_KERNEL_RUN_TYPE" in os.environ:
        place = KAGGLE / "nanostudy"
    else:
        place = Path("nanostudy-work")
    place.mkdir(parents=True, exist_ok=True)
    for entry in [] if earlier is None else sorted(Path(earlier).iterdir()):
        if entry.is_dir() and not (place / entry.name).exists():
            with whole_folder(place / entry.name) as folder:
                shutil.copytree(entry, folder, dirs_exist_ok=True)
    return place
