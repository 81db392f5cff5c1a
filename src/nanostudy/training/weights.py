"""A trained model as one self-contained file: weights, settings and tokenizer."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from nanostudy.data.tokenizer import Tokenizer
from nanostudy.errors import NanostudyError, UsageError
from nanostudy.model.config import GPTConfig, parameter_table
from nanostudy.model.gpt import named_views
from nanostudy.settings import Experiment, from_settings
from nanostudy.training.run_folder import FILES, faults, largest
from nanostudy.training.tensors import load_tensors, save_tensors


@dataclass(frozen=True)
class Weights:
    """A trained model with all that sampling needs."""

    params: Tensor  # fp32 (1, P)
    experiment: Experiment
    config: GPTConfig
    tokenizer: Tokenizer
    step: int = 0  # updates so far
    goes_on: str | None = None  # the checksum of the checkpoint that an imported training continues from

    @property
    def sha256(self) -> str:
        digest = hashlib.sha256(self.params.numpy().tobytes())
        digest.update((self.goes_on or "").encode())
        return digest.hexdigest()


def save_weights(path: Path, weights: Weights, about: Mapping[str, Any]) -> None:
    """`about` is further metadata; it includes the step."""
    tensors = {name: view[0] for name, view in named_views(weights.params, weights.config).items()}
    settings, tokenizer = weights.experiment.as_dict(), weights.tokenizer.as_dict()
    save_tensors(path, tensors, {"kind": "weights", "settings": settings, "tokenizer": tokenizer, **about})


def load_weights(run: Path, which: str = "best") -> Weights:
    """The best or last weights of a run folder, or a weights file. Raises UsageError, NanostudyError."""
    path = run if os.path.isfile(run) else run / f"{which}.safetensors"
    if which not in ("best", "last"):
        raise UsageError(f"There are no {which!r} weights: best or last.")
    if not os.path.isfile(path) and not os.path.isfile(run / "run.json"):
        raise NanostudyError(f"There is no run folder {run}: no trained weights are there.")
    if not path.is_file():
        raise NanostudyError(
            f"{run} holds no weights {path.name}. Restore the file, or train again in another folder with --out."
        )
    tensors, metadata = load_tensors(path)
    if metadata.get("kind") != "weights":
        raise NanostudyError(f"{path} holds no weights of one model.")
    experiment, tokenizer = from_settings(metadata["settings"]), Tokenizer(**metadata["tokenizer"])
    config = GPTConfig.of(experiment, tokenizer.vocab_size)
    table = parameter_table(config)
    if {p.name: p.size for p in table} != {name: tuple(tensor.shape) for name, tensor in tensors.items()}:
        raise NanostudyError(f"{path} is damaged: its tensors are not those that its settings describe.")
    row = torch.cat([tensors[p.name].reshape(-1).float() for p in table])
    return Weights(row[None], experiment, config, tokenizer, metadata.get("step", 0), metadata.get("goes_on"))


def all_faults(folder: Path, metadata: Mapping[str, Any]) -> dict[str, str]:
    """As run_folder.faults, and for weights without a checksum in run.json, as older versions left them, the one that they hold."""
    problems = faults(folder, metadata)
    for which in ("best", "last"):
        file = FILES[f"{which}.safetensors"]
        path = folder / file.name
        if file.name in problems or file.name in (metadata.get("checksums") or {}) or not path.exists():
            continue
        try:
            if path.stat().st_size > largest(file, metadata):
                raise NanostudyError(f"{path} is larger than weights of this model can be.")
            _, about = load_tensors(path)
            step = (metadata.get("best") or {}).get("step") if which == "best" else None
            if about.get("identity") != metadata["identity"] or step not in (None, about.get("step")):
                raise NanostudyError(f"{path} belongs to another run, or to another update of this one.")
        except NanostudyError as problem:
            if isinstance(problem.__cause__, OSError):
                raise
            problems[file.name] = str(problem)
    return problems


def fitted(weights: Weights, experiment: Experiment) -> Tensor:
    """The row (P,) that another experiment starts from. A shorter context keeps the first positions, as nanoGPT crops them.

    Raises UsageError where other sizes differ.
    """
    if weights.goes_on:
        raise UsageError(
            f"init_from={experiment.init_from}: the training of these weights continues in their own folder. Name that folder, "
            "not the file, to start a new training from them."
        )
    theirs = weights.experiment
    for name in ("tokenizer", "n_layer", "n_head", "n_embd", "bias", "tie_embeddings"):
        have, want = getattr(theirs, name), getattr(experiment, name)
        if have != want:
            raise UsageError(
                f"init_from={experiment.init_from}: that run has {name}={have}, and this one {name}={want}."
            )
    if experiment.block_size > theirs.block_size:
        raise UsageError(
            f"init_from={experiment.init_from}: that run has {theirs.block_size} positions, and block_size="
            f"{experiment.block_size} needs more."
        )
    views = named_views(weights.params, weights.config)
    views["position_embedding"] = views["position_embedding"][:, : experiment.block_size]
    return torch.cat([view.flatten() for view in views.values()])
