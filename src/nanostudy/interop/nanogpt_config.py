"""nanoGPT's configurations, read and written: train.py's defaults, and what each setting is here."""

from __future__ import annotations

import ast
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path, PurePath
from typing import Any, NamedTuple

from nanostudy.data.nanogpt_dataset import is_dataset
from nanostudy.errors import UsageError
from nanostudy.interop.assignments import Assignments
from nanostudy.interop.literals import Code, Value
from nanostudy.settings import IN_FILES, Experiment
from nanostudy.validation import check_names

# Settings of the same name and meaning, with train.py's defaults.
SHARED: dict[str, Value] = {
    "eval_interval": 2000,
    "log_interval": 1,
    "gradient_accumulation_steps": 40,
    "batch_size": 12,
    "block_size": 1024,
    "n_layer": 12,
    "n_head": 12,
    "n_embd": 768,
    "dropout": 0.0,
    "bias": False,
    "learning_rate": 6e-4,
    "max_iters": 600000,
    "weight_decay": 1e-1,
    "beta1": 0.9,
    "beta2": 0.95,
    "grad_clip": 1.0,
    "decay_lr": True,
    "warmup_iters": 2000,
    "lr_decay_iters": 600000,
    "min_lr": 6e-5,
}
# Settings that are something else here.
TRANSLATED: dict[str, Value] = {
    "dataset": "openwebtext",
    "out_dir": "out",
    "device": "cuda",
    "dtype": "bfloat16",
    "compile": True,
    "init_from": "scratch",
    "eval_only": False,
}
NO_COUNTERPART: dict[str, tuple[Value, str]] = {
    "eval_iters": (200, "an evaluation reads the whole validation split, or fixed windows with eval_tokens"),
    "always_save_checkpoint": (True, "the best and the last weights are both kept"),
    "wandb_log": (False, "losses are written to the run folder; True is track=wandb"),
    "wandb_project": ("owt", "there is no tracker; with wandb_log=True it is track_project"),
    "wandb_run_name": ("gpt2", "there is no tracker; with wandb_log=True it is track_name"),
    "backend": ("nccl", "processes that train together use NCCL on GPUs, gloo on CPUs"),
}
WANDB = {"wandb_project": "track_project", "wandb_run_name": "track_name"}
DEFAULTS: dict[str, Value] = {**SHARED, **TRANSLATED, **{name: value for name, (value, _) in NO_COUNTERPART.items()}}
SEED = 1337  # train.py's, which no setting changes
PRECISIONS = {"float32": "fp32", "bfloat16": "bf16", "float16": "fp16"}
SHAKESPEARE = "shakespeare_char"  # the dataset that nanoGPT prepares from the corpus shakespeare


class Unused(NamedTuple):
    """A setting without a counterpart: its value, and why it changes nothing here."""

    name: str
    value: str
    reason: str


@dataclass(frozen=True)
class Translation:
    settings: dict[str, Any]  # of an experiment and of resources
    out: Path | None  # the run folder: out_dir
    unused: tuple[Unused, ...]
    notes: tuple[str, ...] = ()  # what else a person may want to know of how it was read


# --- reading


def read_config(path: Path, overrides: Mapping[str, str] | None = None) -> Translation:
    """A configuration for nanoGPT's train.py, over its defaults and under a command line's settings. Nothing is executed.

    Raises UsageError at code, at a setting whose value is code, and at a dataset that does not exist.
    """
    requested = {name: _typed(name, text) for name, text in (overrides or {}).items()}
    check_names(requested, (*IN_FILES, *DEFAULTS))
    file = Assignments(_folders(path))
    given, notes = {**file.read(path, DEFAULTS), **requested}, [f"{other}, as {path} says" for other in file.files[1:]]
    for name in ("dtype", "device"):
        value = given.get(name)
        if isinstance(value, Code) and _chosen_by_machine(value):
            notes.append(f"{name} = {value.text}: what this machine has")
            del given[name]
    for name, value in given.items():
        if isinstance(value, Code) and (name in IN_FILES or name in TRANSLATED):
            raise UsageError(
                f"{path}, line {value.line}: {name} = {value.text:.60} is code. A configuration is read and never "
                f"executed: write the value itself, or give it as {name}=VALUE in the command."
            )
    translation = replace(translate({**SHARED, **given}), notes=tuple(notes))
    if "corpus" in given:
        return translation
    dataset = str(given.get("dataset", DEFAULTS["dataset"]))
    corpus = find_corpus(dataset, path)
    if corpus is None:
        places = dict.fromkeys(map(str, dataset_folders(dataset, path)))
        raise UsageError(
            f"The dataset {dataset!r} does not exist: no train.bin in {', '.join(places)}. Prepare it there, or name a text "
            "or a folder with corpus=PATH."
        )
    translation.settings["corpus"] = corpus
    return translation


def _chosen_by_machine(code: Code) -> bool:
    """Whether it is `'bfloat16' if torch.cuda.is_available() and ... else 'float16'`, or the like."""
    match ast.parse(code.text, mode="eval").body:
        case ast.IfExp(test, ast.Constant(str()), ast.Constant(str()) | ast.IfExp()):
            return "torch." in ast.unparse(test)
    return False


def _typed(name: str, text: str) -> Value:
    """A value of the command line: nanoGPT's settings are read as nanoGPT reads them, others where they are checked."""
    if name not in DEFAULTS:
        return text
    try:
        value = ast.literal_eval(text)
    except (ValueError, SyntaxError, RecursionError, MemoryError):
        return text
    return value if isinstance(value, bool | int | float | str) else text


def translate(given: Mapping[str, Value | Code]) -> Translation:
    """Everything but the dataset. Raises UsageError."""
    settings: dict[str, Any] = {"seed": SEED}
    unused = []
    for name, value in given.items():
        if isinstance(value, Code) and value.definition:
            continue
        text = f"{value.text} (code, not executed)" if isinstance(value, Code) else repr(value)
        if name == "wandb_log" and value is True:
            settings.setdefault("track", "wandb")
        elif name in WANDB and given.get("wandb_log") is True and isinstance(value, str):
            settings.setdefault(WANDB[name], value)
        elif name in NO_COUNTERPART:
            unused.append(Unused(name, text, NO_COUNTERPART[name][1]))
        elif name not in IN_FILES and name not in TRANSLATED:
            unused.append(Unused(name, text, "it is no setting of nanoGPT's or nanostudy's"))
        elif name not in TRANSLATED or name == "device":
            settings[name] = value
    if "compile" in given:  # a resource here, with values of its own
        settings["compile"] = "auto" if given["compile"] is True else given["compile"] or "no"
    if "dtype" in given:
        if given["dtype"] not in PRECISIONS:
            raise UsageError(f"dtype={given['dtype']!r} is not known: {', '.join(PRECISIONS)}.")
        settings["precision"] = PRECISIONS[str(given["dtype"])]
    if given.get("eval_only") is True:
        settings["max_iters"] = 0
    settings.update(_first_weights(given.get("init_from")))
    out = given.get("out_dir")
    return Translation(settings, Path(str(out)) if out else None, tuple(unused))


def _first_weights(init_from: object) -> dict[str, str]:
    if init_from in (None, "", "scratch"):
        return {}
    if init_from == "resume":
        raise UsageError(
            "init_from=resume: a checkpoint of nanoGPT's is converted first, with `nanostudy convert OUT_DIR/ckpt.pt --to "
            "RUN`; `nanostudy train RUN` then goes on. A run of nanostudy's goes on by itself: leave init_from out."
        )
    if str(init_from).startswith("gpt2"):
        raise UsageError(
            f"init_from={init_from}: OpenAI's weights read GPT-2's tokens, and nanostudy's tokens are characters or bytes."
        )
    return {"init_from": str(init_from)}


def dataset_folders(dataset: object, near: Path) -> list[Path]:
    """Where nanoGPT's dataset may lie, seen from a file of its checkout: data/DATASET, here or above the file."""
    return [folder / "data" / dataset for folder in _folders(near)] if isinstance(dataset, str) else []


def _folders(near: Path) -> tuple[Path, ...]:
    """Where nanoGPT's checkout may be, seen from one of its files."""
    return Path(), near.parent, near.parent.parent


def find_corpus(dataset: object, near: Path) -> str | None:
    """The first of these folders that holds a dataset, or shakespeare for the dataset made of it."""
    existing = next((folder for folder in dataset_folders(dataset, near) if is_dataset(folder)), None)
    return str(existing) if existing else "shakespeare" if dataset == SHAKESPEARE else None


# --- writing


def train_settings(experiment: Experiment, out_dir: str) -> dict[str, Value]:
    """Every setting of train.py's that this experiment decides."""
    e = experiment
    resolved = {"lr_decay_iters": _decay_end(e), "min_lr": e.learning_rate / 10 if e.min_lr is None else e.min_lr}
    return {
        "out_dir": out_dir,
        "dataset": dataset_name(e),
        "always_save_checkpoint": True,
        **{name: resolved.get(name, getattr(e, name)) for name in SHARED},
        "compile": False,
    }


def _decay_end(e: Experiment) -> int:
    return e.max_iters if e.lr_decay_iters is None else e.lr_decay_iters


def config_text(title: str, comments: Sequence[str], settings: Mapping[str, Value]) -> str:
    """A configuration that nanoGPT's train.py runs as Python. In ASCII, since it is read in the system's encoding."""
    head = "".join(f"# {comment}\n" for comment in (title, *comments))
    return head + "\n" + "".join(f"{name} = {value!a}\n" for name, value in settings.items())


def dataset_name(experiment: Experiment) -> str:
    """The folder in nanoGPT's data/ that holds the text as train.bin, val.bin and meta.pkl."""
    if _nanogpt_prepares(experiment):
        return SHAKESPEARE
    file = re.split(r"[\\/]", experiment.corpus.rstrip("\\/"))[-1]
    stem = re.sub(r"[^A-Za-z0-9_-]+", "_", PurePath(file).stem).strip("_") or "text"
    return stem if experiment.tokenizer == "char" else f"{stem}_{experiment.tokenizer}"


def _nanogpt_prepares(experiment: Experiment) -> bool:
    return (experiment.corpus, experiment.tokenizer, experiment.split) == ("shakespeare", "char", None)


def differences(experiment: Experiment) -> list[str]:
    """What nanoGPT does otherwise with these settings, as comments."""
    e = experiment
    comments = [
        f"seed {e.seed} has no counterpart: train.py always seeds with 1337.",
        f"max_iters: train.py makes one update more than it says, {e.max_iters + 1}. Its evaluation and checkpoint of "
        f"iteration {e.max_iters},",
        "after as many updates, is the one to compare, if eval_interval divides it: train.py makes no other at the end.",
        "Its losses are means over 200 random batches (eval_iters); here they are exact.",
    ]
    if not _nanogpt_prepares(e):
        comments.append(
            f"data/{dataset_name(e)} must hold train.bin, val.bin and meta.pkl of the text {e.corpus!a} (tokenizer "
            f"{e.tokenizer}), split as they were here{'' if e.split is None else f', {e.split}'}."
        )
    if not e.tie_embeddings:
        comments.append("tie_embeddings false has no counterpart: nanoGPT's head shares the token embedding's weights.")
    if e.init_from is not None:
        comments.append(f"init_from {e.init_from!a} has no counterpart: this starts from fresh weights.")
    if e.decay_lr and e.warmup_iters == _decay_end(e) <= e.max_iters:
        comments.append(
            f"warmup_iters = lr_decay_iters: train.py divides zero by zero at iteration {e.warmup_iters} and stops "
            "before it evaluates there."
        )
    return comments
