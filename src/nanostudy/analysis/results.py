"""Where results come from: study folders, run folders and tables, mixed. Reads; writes nothing."""

from __future__ import annotations

import json
import re
import shlex
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pandas as pd

from nanostudy.analysis.frames import (
    AT_CONTEXT,
    EVALUATIONS,
    TRAINING,
    CorpusFacts,
    experiments_frame,
    joined,
)
from nanostudy.analysis.frames import Results as Results
from nanostudy.analysis.tables import read_tables
from nanostudy.errors import NanostudyError, UsageError
from nanostudy.model.config import GPTConfig, flops_per_token
from nanostudy.settings import Experiment, from_settings
from nanostudy.study.definition import (
    Study,
    definitions,
    folder_of,
    has_study,
    read_study,
    study_names,
    study_yaml,
)
from nanostudy.study.store import FILE, Row, Store
from nanostudy.text import counted
from nanostudy.training.run_folder import read_metadata, read_rows

MACHINE = ("device", "device_name", "precision", "threads", "platform", "python", "torch")  # of what provenance lists
STATUSES = {"unfinished": "running"}  # a run folder's word, and the study's for the same
DONE = ("finished", "diverged")
OPENING = "--- "  # of the line above each sample, which names its prompt


def read_results(paths: Sequence[Path | str]) -> Results:
    """Study folders, run folders and .csv files as one. Raises UsageError at what is none of these, NanostudyError at damage."""
    if not paths:
        raise UsageError("Name at least one study folder, run folder or results.csv.")
    places = list(dict.fromkeys(_there(Path(path)) for path in paths))
    tables = [path for path in places if path.suffix.lower() == ".csv"]
    pieces = [read_tables(tables)] if tables else []
    for path in (path for path in places if path not in tables):
        if has_study(path):
            pieces.append(read_study_folder(path))
        elif read_metadata(path) is not None:
            pieces.append(read_run_folder(path))
        else:
            there = "holds neither a study nor a run" if path.is_dir() else "is not there"
            raise UsageError(f"{path} {there}. Name study folders, run folders or tables (.csv).")
    whole = joined(pieces)
    return replace(whole, notes=(*_incomparable(whole.experiments), *whole.notes))


def _there(path: Path) -> Path:
    """The default folder where a study is named."""
    default = folder_of(str(path))
    return default if not path.exists() and has_study(default) else path


# --- a study's folder


def read_study_folder(path: Path) -> Results:
    """Everything that the store and the run folders know, while it runs too."""
    studies = definitions(path)
    with Store.read(path / FILE) as store:
        rows, machines = store.rows(), store.environments()
        curves = {row.name: store.evaluations(row.name) for row in rows if row.step or row.val_loss is not None}
    texts = _texts(path, rows)
    records = [_record(row, path, machines, texts.get(_text_key(row.experiment))) for row in rows]
    evaluations = [{"name": name, **point} for name, curve in curves.items() for point in curve]
    begun = [(row.name, path / row.name) for row in rows if row.name in curves]
    title = studies[-1].name or path.name
    return Results(
        title,
        experiments_frame(records),
        _frame(evaluations, EVALUATIONS),
        _training(begun),
        _samples([row.name for row in rows if row.sampled], path, studies),
        corpora={facts.sha256: facts for facts, _ in texts.values()},
        provenance=_provenance(path, title, studies, rows, machines, texts),
        notes=tuple(_unfinished(Counter(row.status for row in rows), title)),
    )


Found = tuple[CorpusFacts, dict[str, Any]]  # a text, and the run.json that tells of it


def _text_key(experiment: Experiment) -> tuple[str, str, str | None]:
    return experiment.corpus, experiment.tokenizer, experiment.init_from


def _texts(path: Path, rows: Sequence[Row]) -> dict[tuple[str, str, str | None], Found]:
    """Of each text that experiments name, what the first run folder tells."""
    found: dict[tuple[str, str, str | None], Found] = {}
    for row in rows:
        key = _text_key(row.experiment)
        if key not in found and (row.step or row.status in DONE):
            metadata = read_metadata(path / row.name)
            if metadata is not None:
                found[key] = _facts(metadata["corpus"]), metadata
    return found


def _facts(corpus: Mapping[str, Any]) -> CorpusFacts:
    """From a run.json's part about the text."""
    val = corpus["val"]
    known = val["entropy_nats_per_character"]
    entropy = None if known is None else known * val["characters"] / val["tokens"]
    kind, sizes = corpus["tokenizer"]["kind"], (corpus["train"]["tokens"], val["tokens"])
    return CorpusFacts(corpus["name"], corpus["sha256"], corpus["requested"], kind, *sizes, entropy)


def _vocabulary(corpus: Mapping[str, Any]) -> int:
    return len(corpus["tokenizer"]["characters"]) if corpus["tokenizer"]["kind"] == "char" else 256


def _record(row: Row, path: Path, machines: Mapping[int, Mapping[str, Any]], text: Found | None) -> dict[str, Any]:
    machine = machines.get(row.environment or -1, {})
    folder = path / row.name
    return {
        "id": row.id,
        "name": row.name,
        "part": row.part,
        "status": row.status,
        "reason": row.reason,
        "identity": row.identity,
        **_settings(row.experiment, text),
        "train_loss": row.train_loss,
        "val_loss": row.val_loss,
        "best_step": row.best_step,
        "best_val_loss": row.best_val_loss,
        "parameters": row.parameters,
        "updates": row.updates if row.updates is not None else row.step,
        **_spent(row.experiment, row.tokens, text),
        "seconds": row.seconds,
        **{key: machine.get(key) for key in ("device", "device_name", "precision", "threads")},
        "members": row.members,
        **{f"{AT_CONTEXT}{context}": loss for context, loss in row.context_losses.items()},
        "folder": str(folder) if folder.is_dir() else None,
    }


def _settings(experiment: Experiment, text: Found | None) -> dict[str, Any]:
    """As they count: the text that was read instead of what was asked for; none, which is a value, as a word."""
    told = {name: "none" if value is None else value for name, value in experiment.as_dict().items()}
    if text:
        told |= {"corpus": text[0].name, "tokenizer": text[0].tokenizer, "corpus_sha256": text[0].sha256}
    return {"source": "nanostudy", **told}


def _spent(experiment: Experiment, tokens: float | None, text: Found | None) -> dict[str, Any]:
    if text is None or tokens is None:
        return {"tokens": tokens}
    per_token = flops_per_token(GPTConfig.of(experiment, _vocabulary(text[1]["corpus"])))
    return {"tokens": tokens, "epochs": tokens / text[0].train_tokens, "flops": per_token * tokens}


def _unfinished(counts: Mapping[str, int], title: str) -> list[str]:
    total, done = sum(counts.values()), counts.get("finished", 0)
    if not total:
        return [f"{title} has no experiments."]
    if done == total:
        return []
    others = ", ".join(f"{counts[s]:,} {s}" for s in ("diverged", "failed", "running", "waiting") if counts.get(s))
    return [f"{done:,} of the {counted(total, 'experiment')} of {title} finished ({others}): the others are left out."]


def _provenance(
    path: Path,
    title: str,
    studies: Sequence[Study],
    rows: Sequence[Row],
    machines: Mapping[int, Mapping[str, Any]],
    texts: Mapping[Any, Found],
) -> dict[str, Any]:
    definition = "".join(study_yaml(study) for study in studies)
    shipped = title in study_names() and study_yaml(read_study(title)) == definition
    run = [row for row in rows if row.status in DONE]
    parts = dict.fromkeys(row.part for row in run)
    some = "".join(f" --part {part}" for part in parts) if len(parts) < len({row.part for row in rows}) else ""
    return {
        "command": f"nanostudy study run {shlex.quote(title if shipped else f'{title}.yaml')}{some}",
        "definition": definition,
        "machines": _machines([machines[row.environment or -1] for row in run if row.environment in machines]),
        "versions": _versions([metadata for _, metadata in texts.values()]),
        "checksums": {facts.name: facts.sha256 for facts, _ in texts.values()},
        "paths": [str(path)],
    }


def _machines(machines: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Each kind once, with how many experiments ran on it."""
    counts = Counter(json.dumps({key: machine.get(key) for key in MACHINE}) for machine in machines)
    return [{**json.loads(kind), "experiments": count} for kind, count in counts.items()]


def _versions(metadata: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    found = ({key: m[key] for key in ("nanostudy", "numerics_version") if key in m} for m in metadata)
    return [dict(one) for one in dict.fromkeys(tuple(version.items()) for version in found)]


# --- a run's folder


def read_run_folder(path: Path) -> Results:
    """One training as a Results of one experiment, by the name of its folder."""
    metadata = read_metadata(path)
    if metadata is None:
        raise NanostudyError(f"{path} holds no run.json. Name a folder that `nanostudy train` wrote.")
    name, experiment = path.resolve().name, from_settings(metadata["settings"])
    curve, text = read_rows(path / "evaluations.csv"), (_facts(metadata["corpus"]), metadata)
    last = curve[-1] if curve else {}
    best = metadata.get("best") or min(curve, key=lambda row: row["val_loss"], default={})
    sittings = metadata.get("sittings") or [{}]
    status = STATUSES.get(metadata["status"], metadata["status"])
    record = {
        "id": 1,
        "name": name,
        "status": status,
        "reason": metadata.get("diverged"),
        "identity": metadata["identity"],
        **_settings(experiment, text),
        **{measure: last.get(measure) for measure in ("train_loss", "val_loss")},
        "best_step": best.get("step"),
        "best_val_loss": best.get("val_loss"),
        "parameters": metadata["parameters"]["total"],
        "updates": metadata.get("updates", last.get("step")),
        **_spent(experiment, metadata.get("tokens", last.get("tokens")), text),
        "seconds": metadata.get("seconds", last.get("seconds")),
        **{key: metadata["machine"].get(key) for key in ("device", "device_name", "precision", "threads")},
        "members": sittings[-1].get("members", 1),
        **{f"{AT_CONTEXT}{context}": loss for context, loss in (metadata.get("context_losses") or {}).items()},
        "folder": str(path),
    }
    sample = _text_of(path / "sample.txt")
    sampled = [] if sample is None else _parted(name, sample, []) or [(name, experiment.sample_prompt or "", sample)]
    return Results(
        name,
        experiments_frame([record]),
        _frame([{"name": name, **row} for row in curve], EVALUATIONS),
        _training([(name, path)]),
        pd.DataFrame(sampled, columns=["name", "prompt", "text"], dtype=object),
        corpora={text[0].sha256: text[0]},
        provenance={
            "command": f"nanostudy train {shlex.quote(str(path / 'settings.yaml'))}",
            "machines": _machines([metadata["machine"]]),
            "versions": _versions([metadata]),
            "checksums": {text[0].name: text[0].sha256},
            "paths": [str(path)],
        },
        notes=() if status == "finished" else (f"{name} has not finished ({status}): it is left out of comparisons.",),
    )


# --- tables and samples


def _frame(rows: Sequence[Mapping[str, Any]], columns: Sequence[str]) -> pd.DataFrame:
    """Numbers as float64, but `name`."""
    table = pd.DataFrame({key: pd.Series([row[key] for row in rows], dtype=object) for key in columns})
    return table.astype({key: float for key in columns if key != "name"})


def _training(folders: Sequence[tuple[str, Path]]) -> pd.DataFrame:
    rows = [{"name": name, **row} for name, folder in folders for row in read_rows(folder / "training.csv")]
    return _frame(rows, TRAINING)


def _samples(names: Sequence[str], path: Path, studies: Sequence[Study]) -> pd.DataFrame:
    rows: list[tuple[str, str, str]] = []
    for name in names:
        text = _text_of(path / name / "sample.txt")
        if text is not None:
            rows += _parted(name, text, [study.prompts for study in reversed(studies)])
    return pd.DataFrame(rows, columns=["name", "prompt", "text"], dtype=object)


def _parted(name: str, text: str, asked: Sequence[Sequence[str | None]]) -> list[tuple[str, str, str]]:
    """A study's file, taken apart at the lines that name the prompts; the models may write such lines themselves."""
    for prompts in asked:
        pattern = "\n\n".join(
            f"{re.escape(OPENING + (prompt or 'no prompt'))}\n({re.escape(prompt or '')}.*?)" for prompt in prompts
        )
        found = re.fullmatch(f"{pattern}\n?", text, re.DOTALL)
        if found:
            return [(name, prompt or "", piece) for prompt, piece in zip(prompts, found.groups(), strict=True)]
    pieces = re.split(rf"^{re.escape(OPENING)}(.*)\n", text, flags=re.MULTILINE)
    if pieces[0].strip():
        return []
    named = zip(pieces[1::2], pieces[2::2], strict=True)
    return [(name, "" if prompt == "no prompt" else prompt, piece.rstrip("\n")) for prompt, piece in named]


def _text_of(path: Path) -> str | None:
    return path.read_text(encoding="utf-8", errors="replace") if path.is_file() else None


def _incomparable(experiments: pd.DataFrame) -> list[str]:
    """What makes losses mean different things."""
    texts = {sha for sha in experiments["corpus_sha256"] if isinstance(sha, str)}
    kinds = {kind for kind in experiments["tokenizer"] if isinstance(kind, str)}
    told = []
    if len(texts) > 1:
        told.append(f"The experiments read {len(texts)} different texts: a loss on one says nothing about another.")
    if len(kinds) > 1:
        told.append("The experiments have different tokenizers, so that a nat per token means different things.")
    return told
