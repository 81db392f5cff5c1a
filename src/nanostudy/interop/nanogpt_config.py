"""nanoGPT's settings: what train.py takes where nothing is said, and what each of them is here."""

from __future__ import annotations

import ast
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from nanostudy.data.nanogpt_dataset import is_dataset
from nanostudy.errors import UsageError
from nanostudy.interop.literals import Code, Value, read_assignments
from nanostudy.settings import IN_FILES, check_names

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
    "eval_iters": (200, "an evaluation reads the whole validation split"),
    "always_save_checkpoint": (True, "the best and the last weights are both kept"),
    "wandb_log": (False, "losses are written to the run folder; True is track=wandb"),
    "wandb_project": ("owt", "with track=wandb, WANDB_PROJECT names another project than nanostudy"),
    "wandb_run_name": ("gpt2", "with track=wandb, a run is named as the experiment is"),
    "backend": ("nccl", "processes that train together use NCCL on GPUs, gloo on CPUs"),
}
DEFAULTS: dict[str, Value] = {**SHARED, **TRANSLATED, **{name: value for name, (value, _) in NO_COUNTERPART.items()}}
SEED = 1337  # train.py's, which no setting changes
PRECISIONS = {"float32": "fp32", "bfloat16": "bf16", "float16": "fp16"}
SHAKESPEARE = "shakespeare_char"  # the dataset that nanoGPT prepares from the text known here as shakespeare


class Unused(NamedTuple):
    """A setting without a counterpart: what it was, and why it changes nothing here."""

    name: str
    value: str
    reason: str


@dataclass(frozen=True)
class Translation:
    settings: dict[str, Any]  # of an experiment and of resources
    out: Path | None  # the run folder that out_dir names
    unused: tuple[Unused, ...]


def read_config(path: Path, overrides: Mapping[str, str] | None = None) -> Translation:
    """A configuration for nanoGPT's train.py with settings from a command line, its defaults beneath. Nothing of it is executed.

    Raises UsageError at code, at a setting whose value is code, and at a dataset that is not there.
    """
    asked = {name: _literal(name, text) for name, text in (overrides or {}).items()}
    check_names(asked, (*IN_FILES, *DEFAULTS))
    given = {**read_assignments(path, DEFAULTS), **asked}
    for name, value in given.items():
        if isinstance(value, Code) and (name in IN_FILES or name in TRANSLATED):
            raise UsageError(
                f"{path}, line {value.line}: {name} = {value.text:.60} is code. A configuration is read and never "
                f"executed: write the value itself, or give it as {name}=VALUE in the command."
            )
    translation = translate({**SHARED, **given})
    if "corpus" in given:
        return translation
    folders = (Path(), path.parent, path.parent.parent)
    corpus = find_corpus(str(given.get("dataset", DEFAULTS["dataset"])), folders)
    return Translation({**translation.settings, "corpus": corpus}, translation.out, translation.unused)


def _literal(name: str, text: str) -> Value:
    """As nanoGPT reads its command line; settings that it does not know are read as everywhere here."""
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
        if name == "wandb_log" and value is True:
            settings.setdefault("track", "wandb")
        elif name in NO_COUNTERPART:
            unused.append(Unused(name, _shown(value), NO_COUNTERPART[name][1]))
        elif name not in IN_FILES and name not in TRANSLATED:
            unused.append(Unused(name, _shown(value), "it is no setting of nanoGPT's or nanostudy's"))
        elif name not in TRANSLATED or name == "device":
            settings[name] = value
    if "compile" in given:  # a resource here, with values of its own
        settings["compile"] = "auto" if given["compile"] is True else given["compile"] or "no"
    if "dtype" in given:
        settings["precision"] = _precision(given["dtype"])
    if given.get("eval_only") is True:
        settings["max_iters"] = 0
    settings.update(_first_weights(given.get("init_from")))
    out = given.get("out_dir")
    return Translation(settings, Path(str(out)) if out else None, tuple(unused))


def _shown(value: Value | Code) -> str:
    return f"{value.text} (code, not executed)" if isinstance(value, Code) else repr(value)


def _precision(dtype: object) -> str:
    if dtype not in PRECISIONS:
        raise UsageError(f"dtype={dtype!r} is not known: {', '.join(PRECISIONS)}.")
    return PRECISIONS[str(dtype)]


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


def find_corpus(dataset: str, near: Sequence[Path]) -> str:
    """The first data/DATASET among these folders, or shakespeare for the dataset made of it. Raises UsageError."""
    places = [folder / "data" / dataset for folder in near]
    found = next((place for place in places if is_dataset(place)), None)
    if found:
        return str(found)
    if dataset == SHAKESPEARE:
        return "shakespeare"
    looked = ", ".join(dict.fromkeys(str(place) for place in places))
    raise UsageError(
        f"The dataset {dataset!r} is not there: no train.bin in {looked}. Prepare it there, or name a text or a folder with "
        "corpus=PATH."
    )
