"""A configuration that trains an experiment with nanoGPT, and what nanoGPT does otherwise."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import PurePath

from nanostudy.interop.literals import Value
from nanostudy.interop.nanogpt_config import SHAKESPEARE, SHARED
from nanostudy.settings import Experiment


def values(experiment: Experiment, out_dir: str) -> dict[str, Value]:
    """Every setting of train.py's that this experiment decides."""
    e = experiment
    resolved = {
        "lr_decay_iters": e.max_iters if e.lr_decay_iters is None else e.lr_decay_iters,
        "min_lr": e.learning_rate / 10 if e.min_lr is None else e.min_lr,
    }
    return {
        "out_dir": out_dir,
        "dataset": dataset(e),
        "always_save_checkpoint": True,
        **{name: resolved.get(name, getattr(e, name)) for name in SHARED},
        "compile": False,
    }


def config_text(title: str, comments: Sequence[str], settings: Mapping[str, Value]) -> str:
    """Of a configuration for nanoGPT's train.py, which runs it as Python. ASCII, since it is read in the system's encoding."""
    head = "".join(f"# {comment}\n" for comment in (title, *comments))
    return head + "\n" + "".join(f"{name} = {value!a}\n" for name, value in settings.items())


def dataset(experiment: Experiment) -> str:
    """The folder under nanoGPT's data/ that holds the text as train.bin, val.bin and meta.pkl."""
    if nanogpt_has_text(experiment):
        return SHAKESPEARE
    file = re.split(r"[\\/]", experiment.corpus.rstrip("\\/"))[-1]
    stem = re.sub(r"[^A-Za-z0-9_-]+", "_", PurePath(file).stem).strip("_") or "text"
    return stem if experiment.tokenizer == "char" else f"{stem}_{experiment.tokenizer}"


def nanogpt_has_text(experiment: Experiment) -> bool:
    return (experiment.corpus, experiment.tokenizer) == ("shakespeare", "char")


def differences(experiment: Experiment) -> list[str]:
    """What nanoGPT does otherwise, as comments."""
    e = experiment
    comments = [
        f"seed {e.seed} has no counterpart: train.py always seeds with 1337.",
        f"max_iters: train.py makes one update more than it says, {e.max_iters + 1}. Its evaluation and checkpoint of "
        f"iteration {e.max_iters},",
        "after as many updates, is the one to compare, if eval_interval divides it: train.py makes no other at the end.",
        "Its losses are means over 200 random batches (eval_iters); here they are exact.",
    ]
    if not nanogpt_has_text(e):
        comments.append(
            f"data/{dataset(e)} must hold train.bin, val.bin and meta.pkl of the text {e.corpus!a}, a {e.tokenizer} a "
            "token, split as they were here."
        )
    if not e.tie_embeddings:
        comments.append("tie_embeddings false has no counterpart: nanoGPT's head shares the token embedding's weights.")
    if e.init_from is not None:
        comments.append(f"init_from {e.init_from!a} has no counterpart: this starts from fresh weights.")
    if e.decay_lr and e.warmup_iters == (e.max_iters if e.lr_decay_iters is None else e.lr_decay_iters) <= e.max_iters:
        comments.append(
            f"warmup_iters = lr_decay_iters: train.py divides zero by zero at iteration {e.warmup_iters} and stops "
            "before it evaluates there."
        )
    return comments
