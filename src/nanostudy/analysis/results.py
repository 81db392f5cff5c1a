"""Where results come from: study folders, run folders and tables, mixed. Reads; writes nothing."""

from __future__ import annotations

import json
import shlex
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pandas as pd

from nanostudy.analysis.frames import (
    AT_CONTEXT,
    EVALUATIONS,
    MACHINE,
    OURS,
    SAMPLES,
    SETTINGS,
    TRAINING,
    CorpusFacts,
    Results,
    experiments_frame,
    joined,
    rows_frame,
)
from nanostudy.analysis.table_columns import NOTHING_STATED, Stated
from nanostudy.analysis.table_files import SUFFIXES
from nanostudy.analysis.tables import read_tables
from nanostudy.data.tokenizer import Tokenizer
from nanostudy.errors import NanostudyError, UsageError
from nanostudy.model.config import GPTConfig, flops_per_token
from nanostudy.result import Result, Status
from nanostudy.settings import Experiment
from nanostudy.study.definition import Study, definitions, folder_of, has_study, read_study, study_names, study_yaml
from nanostudy.study.grid import Entry, options_for
from nanostudy.study.notes import Note, read_notes
from nanostudy.study.store import FILE, Store
from nanostudy.text import counted, listed
from nanostudy.training.run_folder import decisive, faults, read_metadata, read_result, read_rows
from nanostudy.training.samples import SAMPLES as SAMPLES_FILE
from nanostudy.training.samples import read_samples

RUN_JSON, TABLE = "run.json", "training.csv"
SOFTWARE = ("platform", "python", "torch")
KERNELS = ("compiled", "tiles")


def read_results(paths: Sequence[Path | str], stated: Stated = NOTHING_STATED) -> Results:
    """Study folders and run folders as one, and with them the tables that they wrote; of another folder, the tables in it. `stated`
    says which of other tables' columns is what. Other tables stand beside them, or beside the first source where there are only
    such: their authors had other programs, evaluations and settings, so that their losses do not add up.

    Raises UsageError at what is none of these, NanostudyError at damage.
    """
    if not paths:
        raise UsageError("Name at least one study folder, run folder or table of results.")
    places = list(dict.fromkeys(place for path in paths for place in _places(Path(path))))
    tables = [path for path in places if path.suffix.lower() in SUFFIXES]
    found = [path for path in tables if path not in map(Path, paths)]  # in a folder, which may hold other files, too
    pieces = read_tables(tables, stated, found) if tables else []
    for path in (path for path in places if path not in tables):
        if has_study(path):
            pieces.append(read_study_folder(path))
        elif read_metadata(path) is not None:
            pieces.append(read_run_folder(path))
        else:
            there = "holds neither a study nor a run nor a table" if path.is_dir() else "is not there"
            raise UsageError(f"{path} {there}. Name study folders, run folders or tables ({', '.join(SUFFIXES)}).")
    ours = [piece for piece in pieces if set(piece.experiments["source"]) == {OURS}] or [_answering(pieces)]
    others = tuple(piece for piece in pieces if all(piece is not one for one in ours))
    whole = joined(ours)
    titles = listed([one.title for one in others], 3)
    beside = [
        f"{titles} {'stands' if len(others) == 1 else 'stand'} beside {whole.title}, of which the answer is alone."
    ]
    notes = (*_incomparable(whole.experiments), *whole.notes, *(note for one in others for note in one.notes))
    return replace(whole, notes=(*beside[: len(others)], *notes), others=others)


def _answering(pieces: Sequence[Results]) -> Results:
    """The first of other people's whose settings are known; where there is none, the first that is not empty."""
    told = (piece for piece in pieces if piece.factors or piece.experiments[list(SETTINGS)].notna().any(axis=None))
    return next(told, next((piece for piece in pieces if len(piece.experiments)), pieces[0]))


def _places(path: Path) -> list[Path]:
    """The default folder where a study is named; the tables in a folder that is no study's and no run's."""
    default = folder_of(str(path))
    if not path.exists() and has_study(default):
        return [default]
    if not path.is_dir() or has_study(path) or (path / RUN_JSON).exists():
        return [path]
    return sorted(file for file in path.iterdir() if _is_table(file)) or [path]


def _is_table(file: Path) -> bool:
    return file.suffix.lower() in SUFFIXES and not file.name.startswith(".") and file.is_file()


# --- a study's folder


def read_study_folder(path: Path) -> Results:
    """Everything that the store and the run folders hold, while the study runs, too."""
    studies, notes = definitions(path), defaultdict(Note, read_notes(path))
    with Store.read(path / FILE) as store:
        results = store.rows()
        curves = {one.name: store.evaluations(one.name) for one in results if one.step or one.val_loss is not None}
    problems = {one.name: problem for one in results if (problem := run_problems(path / one.name, one.status))}
    texts = _texts(path, [one for one in results if RUN_JSON not in problems.get(one.name, ())])
    title = studies[-1].name or path.name
    records = [
        {
            "study": title,
            **_record(one, path / one.name, texts.get(_text_key(one.experiment)), problems.get(one.name, {})),
            **{"star": notes[one.name].star or None, "note": notes[one.name].text or None},
        }
        for one in results
    ]
    evaluations = ({"name": name, **point} for name, curve in curves.items() for point in curve)
    prompts = [study.prompts for study in reversed(studies)]
    samples = _samples([(one, path / one.name) for one in results if one.sampled], prompts, problems)
    return Results(
        title,
        experiments_frame(records),
        rows_frame(evaluations, EVALUATIONS),
        _training([(name, path / name) for name in curves if TABLE not in problems.get(name, ())]),
        samples,
        corpora={facts.sha256: facts for facts, _ in texts.values()},
        provenance=_provenance(path, title, studies, results, texts),
        notes=(*_unfinished(results, title), *_mixed(results), *_damaged(path, problems)),
    )


def run_problems(folder: Path, status: Status | None = None) -> dict[str, str]:
    """What is wrong with a run folder, by file. Weights are not looked at: nothing here depends on them. `status` is the store's."""
    try:
        metadata = read_metadata(folder)
        if metadata is None:
            return {RUN_JSON: f"{folder} is not there."} if status and status.has_result else {}
        if metadata["status"] != "unfinished":
            return faults(folder, metadata, weights=False)
        read_rows(folder / TABLE)
    except NanostudyError as problem:
        return {TABLE if TABLE in str(problem) else RUN_JSON: str(problem)}
    return {}


def _damaged(path: Path, problems: Mapping[str, Mapping[str, str]]) -> list[str]:
    if not problems:
        return []
    first = next(text for problem in problems.values() for text in problem.values())
    more = len(problems) - 1
    others = f" So {'is' if more == 1 else 'are'} {counted(more, 'more run folder')}." if more else ""
    check = f"`nanostudy study check {shlex.quote(str(path))}` says more."
    return [f"{first}{others} What depends on it is left out; {check}"]


CorpusRecord = tuple[CorpusFacts, dict[str, Any]]  # a text, and a run.json that describes it
TextKey = tuple[str | None, ...]


def _text_key(experiment: Experiment) -> TextKey:
    return experiment.corpus, experiment.tokenizer, experiment.split, experiment.init_from


def _texts(path: Path, results: Sequence[Result]) -> dict[TextKey, CorpusRecord]:
    """Each text that the experiments read, from the first run folder of one that did."""
    texts: dict[TextKey, CorpusRecord] = {}
    for one in results:
        key = _text_key(one.experiment)
        if key not in texts and (one.step or one.status.has_result):
            metadata = read_metadata(path / one.name)
            if metadata is not None:
                texts[key] = _facts(metadata["corpus"]), metadata
    return texts


def _facts(corpus: Mapping[str, Any]) -> CorpusFacts:
    """From a run.json's part about the text."""
    val = corpus["val"]
    known = val["entropy_nats_per_character"]
    entropy = None if known is None else known * val["characters"] / val["tokens"]
    kind, tokens = corpus["tokenizer"]["kind"], corpus["train"]["tokens"]
    characters = tuple(corpus[split]["characters"] for split in ("train", "val", "test") if split in corpus)
    return CorpusFacts(corpus["name"], corpus["sha256"], corpus["requested"], kind, tokens, entropy, characters)


def _record(result: Result, folder: Path, text: CorpusRecord | None, problems: Mapping[str, str]) -> dict[str, Any]:
    """A row of the data frame: a setting that is none, which is a value, as a word; the text that was read by its name."""
    settings = {name: "none" if value is None else value for name, value in result.experiment.as_dict().items()}
    measures = dict(result.measures)
    if measures["updates"] is None:
        measures["updates"] = result.step
    if text:
        facts, metadata = text
        settings |= {"corpus": facts.name, "tokenizer": facts.tokenizer, "corpus_sha256": facts.sha256}
        if result.tokens is not None:
            tokenizer = Tokenizer(facts.tokenizer, metadata["corpus"]["tokenizer"].get("characters", ""))
            per_token = flops_per_token(GPTConfig.of(result.experiment, tokenizer.vocab_size))
            measures |= {"epochs": result.tokens / facts.train_tokens, "flops": per_token * result.tokens}
    return {
        **{key: getattr(result, key) for key in ("id", "name", "part", "reason", "identity", "members")},
        "status": str(result.status),
        "source": OURS,
        **settings,
        **measures,
        **{key: result.machine.get(key) for key in MACHINE},
        **{f"{AT_CONTEXT}{context}": loss for context, loss in result.context_losses.items()},
        "folder": str(folder) if folder.is_dir() and RUN_JSON not in problems else None,
    }


def _unfinished(results: Sequence[Result], title: str) -> list[str]:
    if not results:
        return [f"{title} has no experiments."]
    counts = Counter(one.status for one in results)
    done = counts.pop(Status.FINISHED, 0)
    others = ", ".join(f"{counts[status]:,} {status}" for status in sorted(counts))
    every = counted(len(results), "experiment")
    return [f"{done:,} of the {every} of {title} finished ({others}): the others are left out."] if others else []


def _mixed(results: Sequence[Result]) -> list[str]:
    """Names the experiments that one kind of device trained under other conditions than most of its experiments."""
    by_device: dict[Any, list[Result]] = {}
    for one in results:
        if one.status.has_result and one.machine.get("compiled") is not None:
            by_device.setdefault(one.machine.get("device_name"), []).append(one)
    notes = []
    for device, alike in by_device.items():
        kinds = {one.name: tuple(one.machine.get(key) for key in ("precision", *KERNELS)) for one in alike}
        usual = Counter(kinds.values()).most_common(1)[0][0]
        others = [name for name, kind in kinds.items() if kind != usual]
        if others:
            how = " or ".join(sorted({_conditions(kinds[name]) for name in others}))
            notes.append(
                f"Conditions are mixed: on {device}, {len(others):,} of {counted(len(alike), 'experiment')} ({listed(others, 3)}) ran "
                f"in {how} and the others in {_conditions(usual)}, so a difference between them may be of rounding."
            )
    return notes


def _conditions(kind: tuple[Any, ...]) -> str:
    precision, compiled, tiles = kind
    kernels = "with compiled kernels" if compiled else "without compiled kernels"
    return f"{precision} {kernels}{', attention in one' if compiled and tiles else ''}"


def _provenance(
    path: Path, title: str, studies: Sequence[Study], results: Sequence[Result], texts: Mapping[Any, CorpusRecord]
) -> dict[str, Any]:
    definition = "".join(study_yaml(study) for study in studies)
    shipped = title in study_names() and study_yaml(read_study(title)) == definition
    done = [one for one in results if one.status.has_result]
    entries = [Entry(one.id, one.name, str(one.part), one.experiment) for one in results]
    chosen = options_for({one.id for one in done}, entries) if done else []
    return {
        "command": _command(title, "" if shipped else definition, chosen),
        "definition": definition,
        "machines": _machines(done),
        "versions": _versions([metadata for _, metadata in texts.values()]),
        "checksums": {facts.name: facts.sha256 for facts, _ in texts.values()},
        "paths": [str(path)],
    }


def _command(title: str, definition: str, options: Sequence[str]) -> str:
    """What a shell runs to train a study again; a definition that is not shipped becomes a file first."""
    file = f"{title}.yaml" if definition else title
    written = f"cat > {shlex.quote(file)} <<'END'\n{definition.strip()}\nEND\n" if definition else ""
    return f"{written}nanostudy study run {shlex.join([file, *options, '--out', f'{title}-again'])}"


def _machines(results: Sequence[Result]) -> list[dict[str, Any]]:
    """Each kind once, with how many experiments ran on it."""
    keys = (*MACHINE, *KERNELS, *SOFTWARE)
    kinds = (json.dumps({key: one.machine.get(key) for key in keys}) for one in results if one.machine)
    return [{**json.loads(kind), "experiments": count} for kind, count in Counter(kinds).items()]


def _versions(metadata: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    found = [{key: m[key] for key in ("nanostudy", "numerics_version") if key in m} for m in metadata]
    return [one for i, one in enumerate(found) if one not in found[:i]]


# --- a run's folder


def read_run_folder(path: Path) -> Results:
    """One training as a Results of one experiment, by the name of its folder."""
    metadata, result = read_metadata(path), read_result(path)
    if metadata is None or result is None:
        raise NanostudyError(f"{path} holds no run.json. Name a folder that `nanostudy train` wrote.")
    problems = run_problems(path, result.status)
    if damage := decisive(problems):
        raise NanostudyError(f"{' '.join(damage)} Restore the file, or train again in another folder with --out.")
    name, facts = result.name, _facts(metadata["corpus"])
    samples = _samples([(result, path)], [], {name: problems})
    unfinished = f"{name} has not finished ({result.status}): it is left out of comparisons."
    return Results(
        name,
        experiments_frame([{"study": name, **_record(result, path, (facts, metadata), problems)}]),
        rows_frame(({"name": name, **row} for row in read_rows(path / "evaluations.csv")), EVALUATIONS),
        _training([(name, path)] if TABLE not in problems else []),
        samples,
        corpora={facts.sha256: facts},
        provenance={
            "command": f"nanostudy train {shlex.quote(str(path / 'settings.yaml'))}",
            "machines": _machines([result]),
            "versions": _versions([metadata]),
            "checksums": {facts.name: facts.sha256},
            "paths": [str(path)],
        },
        notes=(*(() if result.status is Status.FINISHED else (unfinished,)), *problems.values()),
    )


# --- tables and samples


def _training(folders: Sequence[tuple[str, Path]]) -> pd.DataFrame:
    rows = ({"name": name, **row} for name, folder in folders for row in read_rows(folder / TABLE))
    return rows_frame(rows, TRAINING)


def _samples(
    folders: Sequence[tuple[Result, Path]], prompts: Sequence[Sequence[str | None]], problems: dict[str, dict[str, str]]
) -> pd.DataFrame:
    """Samples that cannot be read are left out, and added to the problems."""
    rows = []
    for result, folder in folders:
        try:
            samples = read_samples(folder, result.experiment.sample_prompt, prompts)
        except NanostudyError as problem:
            problems.setdefault(result.name, {})[SAMPLES_FILE] = str(problem)
            continue
        rows += [{"name": result.name, "prompt": one.prompt or "", "text": one.text} for one in samples]
    return rows_frame(rows, SAMPLES)


def _incomparable(experiments: pd.DataFrame) -> list[str]:
    """What makes losses mean different things."""
    notes = []
    if (texts := experiments["corpus_sha256"].nunique()) > 1:
        notes.append(f"The experiments read {texts} different texts: a loss on one says nothing about another.")
    if experiments["tokenizer"].nunique() > 1:
        notes.append("The experiments have different tokenizers, so that a nat per token means different things.")
    return notes
