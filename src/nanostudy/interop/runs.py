"""Between run folders and nanoGPT's checkpoints, both ways."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from nanostudy.atomic import appearing, check_free, write_atomically
from nanostudy.data.corpus import Corpus, Tokenizer, load_corpus
from nanostudy.data.nanogpt_dataset import META, Table, is_dataset, read_meta, write_meta
from nanostudy.data.texts import NAMES, find_text
from nanostudy.errors import NanostudyError, UsageError
from nanostudy.interop import recipe
from nanostudy.interop.nanogpt import Checkpoint, Moments, read_checkpoint, write_checkpoint
from nanostudy.interop.nanogpt_config import DEFAULTS, SHAKESPEARE, SHARED, translate
from nanostudy.model.engine import State
from nanostudy.model.gpt import GPTConfig
from nanostudy.settings import FIELDS, RESOURCE_NAMES, Experiment, Resources, check_names, from_settings
from nanostudy.settings_files import IMPORTED
from nanostudy.training import stack as checkpoint
from nanostudy.training.machine import Machine
from nanostudy.training.recorder import Recorder
from nanostudy.training.run_folder import CHECKPOINT, OPTIMIZER, read_metadata, settings_yaml
from nanostudy.training.stack import Slot, Stack
from nanostudy.training.tensors import load_tensors
from nanostudy.training.weights import Weights, load_weights, save_weights

CKPT, RESUME = "ckpt.pt", "resume.py"
GPT2_TOKENS = 50257


@dataclass(frozen=True)
class Trained:
    """A model with what is known of its training."""

    weights: Weights
    which: str  # best or last
    metadata: dict[str, Any]  # run.json; empty for a weights file
    moments: Moments | None = None

    @property
    def best_val_loss(self) -> float | None:
        return (self.metadata.get("best") or {}).get("val_loss")


def read_trained(run: Path, which: str) -> Trained:
    """A run folder, finished or not, or a weights file. Raises NanostudyError."""
    metadata = (read_metadata(run) if run.is_dir() else None) or {}
    if metadata.get("status") == "unfinished":
        return _unfinished(run, which, metadata)
    weights = load_weights(run, which)
    if not metadata:
        return Trained(weights, run.stem if run.is_file() else which, {})
    return Trained(weights, which, metadata, _kept_moments(run, metadata, weights))


def _kept_moments(run: Path, metadata: Mapping[str, Any], weights: Weights) -> Moments | None:
    """AdamW's state, if it is that of these weights."""
    made = metadata.get("updates", 0) + metadata.get("skipped_updates", 0)
    if not (run / OPTIMIZER).is_file() or metadata["status"] != "finished" or weights.step != made:
        return None
    tensors, about = load_tensors(run / OPTIMIZER)
    exp_avg, exp_avg_sq = tensors.get("exp_avg"), tensors.get("exp_avg_sq")
    if about.get("kind") != "optimizer" or about.get("identity") != metadata["identity"]:
        raise NanostudyError(f"{run / OPTIMIZER} belongs to another run. Restore it, or delete it to go without.")
    size = weights.params[0].shape
    if exp_avg is None or exp_avg_sq is None or exp_avg.shape != size or exp_avg_sq.shape != size:
        raise NanostudyError(f"{run / OPTIMIZER} does not fit the weights. Restore it, or delete it to go without.")
    return Moments(exp_avg, exp_avg_sq, int(about["updates"]))


def _unfinished(run: Path, which: str, metadata: dict[str, Any]) -> Trained:
    path = run / CHECKPOINT
    if which not in ("best", "last"):
        raise UsageError(f"There are no {which!r} weights: best or last.")
    if not checkpoint.exists(path):
        raise NanostudyError(f"The training of {run} has saved nothing yet. Go on with `nanostudy train {run}`.")
    _, identities = checkpoint.members(path)
    stack, _, _ = checkpoint.load(path, identities)
    slot, state = stack.slots[0], stack.state
    experiment, tokenizer = from_settings(metadata["settings"]), Tokenizer(**metadata["corpus"]["tokenizer"])
    shape = GPTConfig.of(experiment, tokenizer.vocab_size)
    best = which == "best" and slot.best_step >= 0
    row, step = (stack.best, slot.best_step) if best else (state.params, slot.step)
    moments = None
    if step == slot.step:
        moments = Moments(state.exp_avg[0], state.exp_avg_sq[0], int(state.updates[0]))
    known = {"best": {"val_loss": slot.best_val_loss}} if slot.best_step >= 0 else {}
    return Trained(Weights(row, experiment, shape, tokenizer, step), which, {**metadata, **known}, moments)


# --- to nanoGPT


def write_nanogpt(trained: Trained, out: Path, overwrite: bool = False) -> None:
    """ckpt.pt, meta.pkl, and a configuration with which train.py goes on. Raises UsageError, NanostudyError."""
    e = trained.weights.experiment
    with appearing(out, overwrite) as folder:
        write_ckpt(trained, folder / CKPT, out.resolve().name)
        write_meta(folder / META, Table(**trained.weights.tokenizer.as_dict()))
        title = f"Goes on where nanostudy stopped, in nanoGPT's folder: python train.py {RESUME}, with their paths, and --out_dir=."
        settings = {**recipe.values(e, out.resolve().name), "init_from": "resume"}
        comments = recipe.differences(replace(e, init_from=None))
        write_atomically(folder / RESUME, recipe.config_text(title, comments, settings))


def write_ckpt(trained: Trained, path: Path, out_dir: str) -> None:
    w = trained.weights
    config = {**DEFAULTS, **recipe.values(w.experiment, out_dir)}
    write_checkpoint(path, w.params, w.shape, w.experiment, config, w.step, trained.moments, trained.best_val_loss)


# --- from nanoGPT


@dataclass(frozen=True)
class Arrival:
    """A checkpoint of nanoGPT's with all that is needed to make a run of it."""

    source: Path
    checkpoint: Checkpoint
    table: Table
    experiment: Experiment
    resources: Resources
    corpus: Corpus | None  # None where the text is not at hand: a model to sample from, and no more
    notes: tuple[str, ...]


def read_arrival(
    source: Path, target: Path, meta: Path | None, characters: str | None, settings: Mapping[str, Any]
) -> Arrival:
    """`meta` is a meta.pkl, `characters` a corpus whose different characters are the tokens. Raises UsageError, NanostudyError."""
    check_free(target)
    ckpt = read_checkpoint(source)
    near = (Path(), source.parent, source.parent.parent)
    name = ckpt.config.get("dataset")
    named = [folder / "data" / name for folder in near] if isinstance(name, str) else []
    table = _table(meta, characters, (source.parent, *named))
    requested = settings.get("corpus") or next((str(place) for place in named if is_dataset(place)), None)
    if requested is None and name == SHAKESPEARE:
        requested = "shakespeare"
    try:
        corpus = load_corpus(str(requested), Tokenizer(*table) if table else "char") if requested else None
    except NanostudyError:
        if "corpus" in settings or not table:
            raise
        corpus = None
    if corpus:
        table = Table(**corpus.tokenizer.as_dict())
    if table is None:
        raise UsageError(
            f"What the {ckpt.shape.vocab_size} tokens of {source} stand for is not known: there is no {META} beside it or in "
            f"data/{name}. Name one with --meta, or a text with exactly its characters with --characters.{_bpe(ckpt)}"
        )
    size = len(table.characters) or 256
    if size != ckpt.shape.vocab_size:
        raise UsageError(
            f"{source} knows {ckpt.shape.vocab_size} tokens, and what was found or given to read them has {size}. Name the "
            f"{META} that it was trained with, with --meta.{_bpe(ckpt)}"
        )
    experiment, resources, notes = _experiment(ckpt, target, table, corpus, settings)
    return Arrival(source, ckpt, table, experiment, resources, corpus, notes)


def _bpe(ckpt: Checkpoint) -> str:
    if ckpt.shape.vocab_size < GPT2_TOKENS:
        return ""
    return (
        " These are GPT-2's tokens, most likely: nanostudy's tokens are characters or bytes, and it cannot read them."
    )


def _table(meta: Path | None, characters: str | None, folders: Sequence[Path]) -> Table | None:
    if meta and characters:
        raise UsageError("--meta and --characters both say what the tokens stand for. Give one.")
    if meta:
        return read_meta(meta)
    if characters:
        text = find_text(characters)
        return text.table or Table(**Tokenizer.of("char", text.content).as_dict())
    found = next((folder / META for folder in folders if (folder / META).is_file()), None)
    return read_meta(found) if found else None


def _experiment(
    ckpt: Checkpoint, target: Path, table: Table, corpus: Corpus | None, settings: Mapping[str, Any]
) -> tuple[Experiment, Resources, tuple[str, ...]]:
    """The checkpoint's settings, with those that a person gave; and what to tell."""
    check_names(settings, (*FIELDS, *RESOURCE_NAMES))
    config = {name: ckpt.config[name] for name in SHARED if isinstance(ckpt.config.get(name), bool | int | float)}
    shape = {name: value for name, value in asdict(ckpt.shape).items() if name in FIELDS}
    fixed = {**shape, "tokenizer": table.kind, "init_from": str(target / IMPORTED)}
    asked = config.get("max_iters")
    taken = {**SHARED, **config, "max_iters": max(asked if isinstance(asked, int) else 0, ckpt.iter_num)}
    of_machine = {name: value for name, value in settings.items() if name in RESOURCE_NAMES}
    chosen = {name: value for name, value in settings.items() if name in FIELDS}
    e = from_settings(
        {**translate(taken).settings, **fixed, "corpus": corpus.requested if corpus else "auto", **chosen}
    )
    for name, value in fixed.items():
        if getattr(e, name) != value:
            raise UsageError(
                f"{name}={getattr(e, name)}: the checkpoint has {name}={value}, and that cannot be changed."
            )
    if e.max_iters < ckpt.iter_num:
        raise UsageError(f"max_iters={e.max_iters}: the checkpoint has made {ckpt.iter_num} updates already.")
    notes = list(ckpt.notes)
    if ckpt.moments is None and e.max_iters > ckpt.iter_num:
        if "max_iters" in settings:
            raise UsageError(
                f"max_iters={e.max_iters}: the checkpoint has no usable state of its optimizer, so its training cannot go on"
                f"{''.join(f' ({note})' for note in ckpt.notes)}. Convert it without max_iters, and start a new training from "
                "its weights with init_from."
            )
        notes.append("no usable state of the optimizer, so this training cannot go on; another can start from it")
        e = replace(e, max_iters=ckpt.iter_num)
    return e, Resources(**of_machine), tuple(notes)


def write_run(arrival: Arrival, target: Path, machine: Machine) -> None:
    """A run folder with the weights and, where the text is at hand, all that going on needs. Nothing is evaluated yet."""
    ckpt, e, corpus = arrival.checkpoint, arrival.experiment, arrival.corpus
    tokenizer = Tokenizer(*arrival.table)
    weights = Weights(ckpt.params, e, ckpt.shape, tokenizer, ckpt.iter_num)
    with appearing(target) as folder:
        if corpus is None:
            for which in ("best", "last"):
                save_weights(folder / f"{which}.safetensors", weights, {"step": ckpt.iter_num})
            return
        corpus.check_window(e.block_size)
        begun = replace(weights, goes_on=f"nanoGPT {ckpt.sha256}")
        identity = e.identity(corpus.sha256, corpus.tokenizer.kind, begun.sha256)
        recorder = Recorder(folder, e, identity, corpus, machine)
        recorder.claim(asdict(arrival.resources), notes=[*machine.notes, _origin(arrival), *arrival.notes])
        settings = {**e.as_dict(), **asdict(arrival.resources), "init_from": IMPORTED}
        if e.corpus not in NAMES and Path(e.corpus).exists():
            settings["corpus"] = str(Path(e.corpus).resolve())
        write_atomically(folder / "settings.yaml", settings_yaml(settings))
        save_weights(folder / IMPORTED, begun, {"step": ckpt.iter_num, "goes_on": begun.goes_on})
        about = {"step": ckpt.iter_num, "identity": identity, "corpus": {"name": corpus.name, "sha256": corpus.sha256}}
        for which in ("best", "last"):
            save_weights(folder / f"{which}.safetensors", weights, about)
        stack = _stack(ckpt, e.name)
        checkpoint.save(stack, folder / CHECKPOINT, {e.name: identity}, machine.as_dict())


def _stack(ckpt: Checkpoint, name: str) -> Stack:
    state = State.fresh(ckpt.params)
    state.updates.fill_(ckpt.iter_num)
    if ckpt.moments:
        state.exp_avg[0], state.exp_avg_sq[0] = ckpt.moments.exp_avg, ckpt.moments.exp_avg_sq
        state.updates.fill_(ckpt.moments.updates)
    return Stack([Slot(name, step=ckpt.iter_num)], [], state, ckpt.params.clone())


def _origin(arrival: Arrival) -> str:
    ckpt = arrival.checkpoint
    loss = (
        ""
        if ckpt.best_val_loss is None
        else f"; nanoGPT's estimate of its validation loss was {ckpt.best_val_loss:.4f}"
    )
    return (
        f"the first {ckpt.iter_num:,} updates were made by nanoGPT ({arrival.source.name}, SHA-256 {ckpt.sha256[:16]}...), "
        f"with its batches and random numbers{loss}"
    )
