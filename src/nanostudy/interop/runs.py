"""A trained run, taken to nanoGPT or Hugging Face; and nanoGPT's checkpoint, made a run folder."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from nanostudy.atomic import check_free, whole_folder, write_atomically
from nanostudy.data.corpus import Corpus, load_corpus
from nanostudy.data.nanogpt_dataset import META, read_meta, write_meta
from nanostudy.data.texts import find_text
from nanostudy.data.tokenizer import Tokenizer
from nanostudy.errors import NanostudyError, UsageError
from nanostudy.interop.huggingface import write_huggingface
from nanostudy.interop.nanogpt import Checkpoint, Moments, read_checkpoint, write_checkpoint
from nanostudy.interop.nanogpt_config import (
    DEFAULTS,
    SHARED,
    config_text,
    dataset_folders,
    dataset_name,
    differences,
    find_corpus,
    train_settings,
    translate,
)
from nanostudy.model.config import GPTConfig
from nanostudy.model.engine import State
from nanostudy.settings import FIELDS, RESOURCE_NAMES, Experiment, Resources, from_settings
from nanostudy.settings_files import IMPORTED, experiment_and_resources, resume_command
from nanostudy.training import stack as checkpoint
from nanostudy.training.machine import Machine
from nanostudy.training.recorder import Recorder
from nanostudy.training.run_folder import CHECKPOINT, OPTIMIZER, read_metadata
from nanostudy.training.stack import Slot, Stack
from nanostudy.training.tensors import load_tensors
from nanostudy.training.weights import Weights, load_weights, save_weights
from nanostudy.validation import check_names

CKPT, RESUME = "ckpt.pt", "resume.py"
GPT2_TOKENS = 50257


@dataclass(frozen=True)
class Conversion:
    """The folder that was written, and notes for a person."""

    folder: Path
    notes: tuple[str, ...]
    dataset: str | None = None  # in nanoGPT's data/: where it looks for the text and meta.pkl


@dataclass(frozen=True)
class Trained:
    """A model, and what run.json and optimizer.safetensors say of its training."""

    weights: Weights
    which: str  # best or last
    metadata: dict[str, Any]  # run.json; empty for a weights file
    moments: Moments | None = None


def read_trained(run: Path, which: str) -> Trained:
    """A run folder, finished or not, or a weights file. Raises NanostudyError."""
    metadata = (read_metadata(run) if run.is_dir() else None) or {}
    if metadata.get("status") == "unfinished":
        return _unfinished(run, which, metadata)
    weights = load_weights(run, which)
    if not metadata:
        return Trained(weights, run.stem if run.is_file() else which, {})
    return Trained(weights, which, metadata, _saved_moments(run, metadata, weights))


def _saved_moments(run: Path, metadata: Mapping[str, Any], weights: Weights) -> Moments | None:
    """AdamW's state, if it is that of these weights."""
    updates = metadata.get("updates", 0) + metadata.get("skipped_updates", 0)
    if not (run / OPTIMIZER).is_file() or metadata["status"] != "finished" or weights.step != updates:
        return None
    tensors, about = load_tensors(run / OPTIMIZER)
    if about.get("kind") != "optimizer" or about.get("identity") != metadata["identity"]:
        raise NanostudyError(f"{run / OPTIMIZER} belongs to another run. Restore it, or delete it to go without.")
    first, second = tensors.get("exp_avg"), tensors.get("exp_avg_sq")
    size = weights.params[0].shape
    if first is None or second is None or first.shape != size or second.shape != size:
        raise NanostudyError(f"{run / OPTIMIZER} does not fit the weights. Restore it, or delete it to go without.")
    return Moments(first, second, int(about["updates"]))


def _unfinished(run: Path, which: str, metadata: dict[str, Any]) -> Trained:
    path = run / CHECKPOINT
    if which not in ("best", "last"):
        raise UsageError(f"There are no {which!r} weights: best or last.")
    if not checkpoint.exists(path):
        raise NanostudyError(f"The training of {run} has saved nothing yet. Go on with: {resume_command(run)}")
    _, identities = checkpoint.members(path)
    stack, _, _ = checkpoint.load(path, identities)
    slot, state = stack.slots[0], stack.state
    experiment, tokenizer = from_settings(metadata["settings"]), Tokenizer(**metadata["corpus"]["tokenizer"])
    best = which == "best" and slot.best_step >= 0
    params_1P, step = (stack.best, slot.best_step) if best else (state.params, slot.step)
    moments = None
    if step == slot.step:
        moments = Moments(state.exp_avg[0], state.exp_avg_sq[0], int(state.updates[0]))
    if slot.best_step >= 0:
        metadata = {**metadata, "best": {"val_loss": slot.best_val_loss}}
    shape = GPTConfig.of(experiment, tokenizer.vocab_size)
    return Trained(Weights(params_1P, experiment, shape, tokenizer, step), which, metadata, moments)


# --- from a run


def export_run(source: Path, to: str, out: Path | None, which: str | None, overwrite: bool) -> Conversion:
    """A run or weights file to "nanogpt" or "huggingface": in `out`, by default a folder of that name inside the run.

    Raises UsageError, NanostudyError.
    """
    trained = read_trained(source, which or ("last" if to == "nanogpt" else "best"))
    out = out or (source if source.is_dir() else source.parent) / to
    w, best = trained.weights, (trained.metadata.get("best") or {}).get("step")
    notes = [f"{trained.which} weights, after {w.step:,} updates"]
    if trained.which == "last" and best not in (None, w.step):
        notes.append(f"the best, after {best:,}, leave with --which best")
    if to == "huggingface":
        write_huggingface(w, trained.which, trained.metadata, out, overwrite)
        return Conversion(out, tuple(notes))
    write_nanogpt(trained, out, overwrite)
    if trained.moments is None:
        notes.append(
            "NOTE: there is no optimizer state for these weights, so AdamW starts afresh where nanoGPT resumes: with averages of "
            "zero, the learning rate of this update, and a less certain step for the first few hundred"
        )
    if w.tokenizer.kind == "byte":
        notes.append("NOTE: nanoGPT shows bytes as Latin-1 characters: only ASCII reads as it is")
    return Conversion(out, tuple(notes), dataset_name(w.experiment))


def write_nanogpt(trained: Trained, out: Path, overwrite: bool = False) -> None:
    """ckpt.pt, meta.pkl, and a configuration with which train.py goes on. Raises UsageError, NanostudyError."""
    e, name = trained.weights.experiment, out.resolve().name
    with whole_folder(out, overwrite) as folder:
        write_ckpt(trained, folder / CKPT, name)
        write_meta(folder / META, trained.weights.tokenizer)
        title = f"Goes on where nanostudy stopped, in nanoGPT's folder: python train.py {RESUME}, with their paths, and --out_dir=."
        settings = {**train_settings(e, name), "init_from": "resume"}
        write_atomically(folder / RESUME, config_text(title, differences(replace(e, init_from=None)), settings))


def write_ckpt(trained: Trained, path: Path, out_dir: str) -> None:
    config = {**DEFAULTS, **train_settings(trained.weights.experiment, out_dir)}
    best_val_loss = (trained.metadata.get("best") or {}).get("val_loss")
    write_checkpoint(path, trained.weights, config, trained.moments, best_val_loss)


# --- from nanoGPT


@dataclass(frozen=True)
class Imported:
    """nanoGPT's checkpoint, and all that a run of it needs."""

    source: Path
    checkpoint: Checkpoint
    tokenizer: Tokenizer
    experiment: Experiment
    resources: Resources
    corpus: Corpus | None  # None where the text is missing: the model can be sampled from, and no more
    notes: tuple[str, ...]


def read_nanogpt(
    source: Path, target: Path, meta: Path | None, characters: str | None, settings: Mapping[str, Any]
) -> Imported:
    """`meta` is a meta.pkl, `characters` a corpus whose different characters are the tokens. Raises UsageError, NanostudyError."""
    check_free(target)
    ckpt = read_checkpoint(source)
    dataset = ckpt.config.get("dataset")
    tokenizer = _tokenizer(meta, characters, (source.parent, *dataset_folders(dataset, source)))
    requested = settings.get("corpus") or find_corpus(dataset, source)
    try:
        corpus = load_corpus(str(requested), tokenizer or "char") if requested else None
    except NanostudyError:
        if "corpus" in settings or not tokenizer:
            raise
        corpus = None
    if corpus:
        tokenizer = corpus.tokenizer
    hint = ""
    if ckpt.shape.vocab_size >= GPT2_TOKENS:
        hint = " These are GPT-2's tokens, most likely: nanostudy's tokens are characters or bytes, and it cannot read them."
    if tokenizer is None:
        raise UsageError(
            f"What the {ckpt.shape.vocab_size} tokens of {source} stand for is not known: there is no {META} beside it or in "
            f"data/{dataset}. Name one with --meta, or a text with exactly its characters with --characters.{hint}"
        )
    if tokenizer.vocab_size != ckpt.shape.vocab_size:
        raise UsageError(
            f"{source} knows {ckpt.shape.vocab_size} tokens, and what was found or given to read them has {tokenizer.vocab_size}. Name the "
            f"{META} that it was trained with, with --meta.{hint}"
        )
    experiment, resources, notes = _experiment(ckpt, target, tokenizer, corpus, settings)
    return Imported(source, ckpt, tokenizer, experiment, resources, corpus, notes)


def _tokenizer(meta: Path | None, characters: str | None, folders: Sequence[Path]) -> Tokenizer | None:
    if meta and characters:
        raise UsageError("--meta and --characters both say what the tokens stand for. Give one.")
    if characters:
        text = find_text(characters)
        return text.tokenizer or Tokenizer.of("char", text.content)
    meta = meta or next((folder / META for folder in folders if (folder / META).is_file()), None)
    return read_meta(meta) if meta else None


def _experiment(
    ckpt: Checkpoint, target: Path, tokenizer: Tokenizer, corpus: Corpus | None, settings: Mapping[str, Any]
) -> tuple[Experiment, Resources, tuple[str, ...]]:
    """The checkpoint's settings under those that a person gave; and notes."""
    check_names(settings, (*FIELDS, *RESOURCE_NAMES))
    config = {name: ckpt.config[name] for name in SHARED if isinstance(ckpt.config.get(name), bool | int | float)}
    planned = config.get("max_iters")
    config["max_iters"] = max(planned if isinstance(planned, int) else 0, ckpt.iter_num)
    shape = {name: value for name, value in asdict(ckpt.shape).items() if name in FIELDS}
    fixed = {**shape, "tokenizer": tokenizer.kind, "init_from": str(target / IMPORTED)}
    text = {"corpus": corpus.requested if corpus else "auto"}
    e, resources = experiment_and_resources({**translate({**SHARED, **config}).settings, **fixed, **text, **settings})
    for name, value in fixed.items():
        if getattr(e, name) != value:
            raise UsageError(
                f"{name}={getattr(e, name)}: the checkpoint has {name}={value}, and that cannot be changed."
            )
    if e.max_iters < ckpt.iter_num:
        raise UsageError(f"max_iters={e.max_iters}: the checkpoint has made {ckpt.iter_num} updates already.")
    if ckpt.moments or e.max_iters == ckpt.iter_num:
        return e, resources, ckpt.notes
    if "max_iters" in settings:
        raise UsageError(
            f"max_iters={e.max_iters}: the checkpoint has no usable state of its optimizer, so its training cannot go on"
            f"{''.join(f' ({note})' for note in ckpt.notes)}. Convert it without max_iters, and start a new training from "
            "its weights with init_from."
        )
    note = "no usable state of the optimizer, so this training cannot go on; another can start from it"
    return replace(e, max_iters=ckpt.iter_num), resources, (*ckpt.notes, note)


def write_run(imported: Imported, target: Path, machine: Machine) -> None:
    """A run folder with the weights and, if the text is there, all that going on needs. Nothing is evaluated yet."""
    ckpt, e, corpus = imported.checkpoint, imported.experiment, imported.corpus
    weights = Weights(ckpt.params_1P, e, ckpt.shape, imported.tokenizer, ckpt.iter_num)
    with whole_folder(target) as folder:
        about: dict[str, Any] = {"step": ckpt.iter_num}
        if corpus:
            corpus.check_window(e.block_size)
            begun = replace(weights, goes_on=f"nanoGPT {ckpt.sha256}")
            identity = e.identity(corpus.sha256, corpus.tokenizer.kind, begun.sha256)
            recorder = Recorder(folder, e, identity, corpus, machine)
            settings = {**asdict(imported.resources), "init_from": IMPORTED}
            recorder.claim(settings, notes=[*machine.notes, _origin(imported), *imported.notes])
            save_weights(folder / IMPORTED, begun, {**about, "goes_on": begun.goes_on})
            about |= {"identity": identity, "corpus": {"name": corpus.name, "sha256": corpus.sha256}}
            checkpoint.save(_stack(ckpt, e.name), folder / CHECKPOINT, {e.name: identity}, machine.as_dict())
        for which in ("best", "last"):
            save_weights(folder / f"{which}.safetensors", weights, about)


def _stack(ckpt: Checkpoint, name: str) -> Stack:
    state = State.fresh(ckpt.params_1P)
    state.updates.fill_(ckpt.iter_num)
    if ckpt.moments:
        state.exp_avg[0], state.exp_avg_sq[0] = ckpt.moments.exp_avg_P, ckpt.moments.exp_avg_sq_P
        state.updates.fill_(ckpt.moments.updates)
    return Stack([Slot(name, step=ckpt.iter_num)], [], state, ckpt.params_1P.clone())


def _origin(imported: Imported) -> str:
    ckpt, loss = imported.checkpoint, ""
    if ckpt.best_val_loss is not None:
        loss = f"; nanoGPT's estimate of its validation loss was {ckpt.best_val_loss:.4f}"
    return (
        f"the first {ckpt.iter_num:,} updates were made by nanoGPT ({imported.source.name}, SHA-256 {ckpt.sha256[:16]}...), "
        f"with its batches and random numbers{loss}"
    )
