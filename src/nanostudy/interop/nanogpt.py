"""nanoGPT's ckpt.pt, read and written: weights, AdamW's state, settings.

P: the parameters of one model, in the order of the parameter table.
"""

from __future__ import annotations

import hashlib
import io
import pickle
import re
import reprlib
import warnings
import zipfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from nanostudy.atomic import replace_atomically
from nanostudy.errors import NanostudyError, UsageError
from nanostudy.model.config import GPTConfig, Parameter, parameter_table
from nanostudy.model.gpt import named_views
from nanostudy.model.optim import EPSILON, learning_rate
from nanostudy.reading import read_file
from nanostudy.text import listed
from nanostudy.training.weights import Weights

NOT_EVALUATED = 1e9  # nanoGPT's best_val_loss before its first evaluation
PREFIXES = ("_orig_mod.", "module.")  # left by torch.compile and by data-parallel training
EMBEDDING, HEAD = "transformer.wte.weight", "lm_head.weight"
MASK = re.compile(r"transformer\.h\.\d+\.attn\.(masked_)?bias")  # a buffer of older versions, not a parameter
SIZES = ("n_layer", "n_head", "n_embd", "block_size", "vocab_size")
OWN_ARGS = (*SIZES, "bias", "dropout")
# Names that forks give to what nanoGPT's model does, too. Any other of their model_args makes another model, unless it is off.
AS_IN_NANOGPT: dict[str, str | bool] = {
    **{"activation": "gelu", "act": "gelu", "norm": "layernorm", "norm_type": "layernorm", "norm_placement": "pre"},
    **{"pos_emb": "learned", "position_embedding": "learned", "flash": True, "tie_weights": True},
}
LARGEST_COUNT = 2**53
LARGEST_FILE = 2**37  # bytes
NUMPY_CODES = ("b1", *(f"{kind}{size}" for kind in "iu" for size in (1, 2, 4, 8)), "f2", "f4", "f8")


@dataclass(frozen=True)
class Moments:
    """AdamW's state after `updates` of its updates."""

    exp_avg_P: Tensor  # fp32
    exp_avg_sq_P: Tensor  # fp32
    updates: int


@dataclass(frozen=True)
class Checkpoint:
    sha256: str  # of the file
    shape: GPTConfig
    params_1P: Tensor  # fp32
    moments: Moments | None
    iter_num: int
    best_val_loss: float | None  # an estimate, in nats per token
    config: dict[str, Any]
    notes: tuple[str, ...]  # what could not be read as it is


# --- reading


def read_checkpoint(path: Path) -> Checkpoint:
    """Runs nothing that the file may carry. Raises UsageError, NanostudyError."""
    try:
        data = read_file(path, LARGEST_FILE)
    except FileNotFoundError:
        raise UsageError(f"There is no file {path}.") from None
    except OSError as problem:
        raise NanostudyError(f"{path} could not be read: {problem.strerror}.") from None
    content = _load(path, data)
    config, model_args = content.get("config"), content["model_args"]
    tensors = _weights(path, content["model"], len(data))
    tied = HEAD not in tensors or EMBEDDING not in tensors or torch.equal(tensors[HEAD], tensors[EMBEDDING])
    shape = _shape(path, model_args, tensors, tied)
    table = parameter_table(shape)
    if sum(p.numel for p in table) > len(data):  # tensors may be larger than what is stored of them
        raise UsageError(f"{path} is too small to hold a model of the sizes that its model_args say.")
    params_P, notes = _params(path, table, tensors, tied), _foreign_args(path, model_args)
    if any(tensors[p.nanogpt_key].dtype != torch.float32 for p in table):
        notes.append("the checkpoint's weights were not all in fp32; they are now")
    try:
        moments = _moments(content.get("optimizer"), table)
    except _Unusable as problem:
        moments = None
        notes.append(f"the optimizer's state was left out: {problem}")
    return Checkpoint(
        hashlib.sha256(data).hexdigest(),
        shape,
        params_P[None],
        moments,
        _count(path, content, "iter_num"),
        _loss(content.get("best_val_loss")),
        {**(config if isinstance(config, dict) else {}), **model_args},
        tuple(notes),
    )


class _NumpyType:
    """Stands in for numpy.dtype while a checkpoint is read: the type of a plain number, and no other."""

    def __init__(self, code: str, *_: Any) -> None:
        if code not in NUMPY_CODES:
            raise ValueError(code)
        self.code = code

    def __setstate__(self, state: Sequence[Any]) -> None:
        self.code = {"<": "<", ">": ">", "|": ""}[state[1]] + self.code


def _numpy_scalar(kind: _NumpyType, content: bytes) -> Any:
    return np.frombuffer(content, kind.code)[0].item()


PLAIN_NUMBERS: list[Any] = [
    (_NumpyType, "numpy.dtype"),
    (_numpy_scalar, "numpy.core.multiarray.scalar"),
    (_numpy_scalar, "numpy._core.multiarray.scalar"),
]


def _load(path: Path, data: bytes) -> dict[str, Any]:
    if data[:2] == b"PK":
        _check_parts(path, data)
    try:
        with warnings.catch_warnings(action="ignore"), torch.serialization.safe_globals(PLAIN_NUMBERS):
            # the warnings are about pickles, meant for those who wrote them
            content = torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
    except Exception as problem:  # a damaged file can raise anything
        name = re.search(r"(?:GLOBAL|global|function|class|call) ([\w.]+\.[\w.]+)", str(problem))
        if name and isinstance(problem, pickle.UnpicklingError):
            raise NanostudyError(
                f"{path} carries code: it asks for {name[1]}. Nothing of it was run. A checkpoint of nanoGPT's holds "
                "tensors, numbers and texts alone; if this one is yours, save it again without that."
            ) from None
        raise NanostudyError(f"{path} is damaged or is no checkpoint of PyTorch's.") from None
    for key, kind in {"model": dict, "model_args": dict, "iter_num": int}.items():
        if not isinstance(content, dict) or not isinstance(content.get(key), kind):
            raise UsageError(f"{path} is no checkpoint of nanoGPT's train.py: it has no {key!r}.")
    return content


def _check_parts(path: Path, data: bytes) -> None:
    """torch.save writes an archive of files as they are; compressed ones may be a thousand times as large in memory."""
    try:
        parts = zipfile.ZipFile(io.BytesIO(data)).infolist()
    except (zipfile.BadZipFile, ValueError, OSError, NotImplementedError):
        raise NanostudyError(f"{path} is damaged or is no checkpoint of PyTorch's.") from None
    size = sum(part.file_size for part in parts)
    if size > len(data) or any(part.compress_type != zipfile.ZIP_STORED for part in parts):
        raise UsageError(
            f"{path} has {len(data):,} bytes and takes {size:,} when it is read: it was compressed after torch.save. Unpack it, "
            "or save it again."
        )


def _foreign_args(path: Path, model_args: Mapping[Any, Any]) -> list[str]:
    """A note on a fork's model_args that are off or say what nanoGPT does. Raises UsageError at any other."""
    foreign = {str(name): value for name, value in model_args.items() if name not in OWN_ARGS}
    texts = {name: f"{name:.40}={reprlib.repr(value)}" for name, value in foreign.items()}
    other = [
        texts[name]
        for name, value in foreign.items()
        if value is not None and value is not False and not _same(value, AS_IN_NANOGPT.get(name))
    ]
    if other:
        raise UsageError(
            f"{path}: its model_args have {listed(other, most=5)}, and nanoGPT's model does not: here its weights would compute "
            "something else. If that changes nothing in the model, take it out of model_args and save the checkpoint again."
        )
    return (
        [f"model_args has {listed(list(texts.values()), most=5)}, which is what nanoGPT's model does"]
        if foreign
        else []
    )


def _same(value: object, nanogpt: object) -> bool:
    return type(value) is type(nanogpt) and value == nanogpt


def _count(path: Path, values: Mapping[str, Any], name: str) -> int:
    value = values.get(name)
    if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value < LARGEST_COUNT:
        raise UsageError(f"{path}: {name} is {reprlib.repr(value)}, and must be a whole number.")
    return value


def _loss(value: Any) -> float | None:
    if isinstance(value, Tensor) and value.numel() == 1:
        value = value.item()
    return float(value) if isinstance(value, int | float) and value < NOT_EVALUATED else None


def _weights(path: Path, model: Mapping[Any, Any], size: int) -> dict[str, Tensor]:
    """By their names without prefixes; masks are left out."""
    tensors: dict[str, Tensor] = {}
    for name, tensor in model.items():
        key = str(name)
        while key.startswith(PREFIXES):
            key = key[key.index(".") + 1 :]
        if not isinstance(tensor, Tensor) or not tensor.is_floating_point() or tensor.layout != torch.strided:
            raise UsageError(f"{path}: {name!s:.80} in its model is no plain tensor of floating-point numbers.")
        if tensor.numel() > size:  # expanded from fewer numbers, it would fill the memory
            raise UsageError(f"{path}: {name!s:.80} in its model is larger than the file.")
        if key in tensors:
            raise UsageError(f"{path}: its model has {key} twice.")
        if not MASK.fullmatch(key):
            tensors[key] = tensor
    return tensors


def _shape(path: Path, model_args: Mapping[str, Any], tensors: Mapping[str, Tensor], tied: bool) -> GPTConfig:
    sizes = {name: _count(path, model_args, name) for name in SIZES}
    layers = {key.split(".")[2] for key in tensors if key.startswith("transformer.h.")}
    if len(layers) != sizes["n_layer"]:
        raise UsageError(f"{path}: n_layer is {sizes['n_layer']}, and the weights are those of {len(layers)} layers.")
    if not all(sizes.values()) or sizes["n_embd"] % sizes["n_head"]:
        raise UsageError(f"{path}: no model has the sizes {', '.join(f'{k}={v}' for k, v in sizes.items())}.")
    bias = model_args.get("bias", True)  # older versions always had biases
    if not isinstance(bias, bool):
        raise UsageError(f"{path}: bias is {reprlib.repr(bias)}, and must be true or false.")
    return GPTConfig(**sizes, bias=bias, tie_embeddings=tied)


def _params(path: Path, table: Sequence[Parameter], tensors: Mapping[str, Tensor], tied: bool) -> Tensor:
    for p in table:
        if p.nanogpt_key not in tensors:
            raise UsageError(f"{path} is not whole: its model has no {p.nanogpt_key}.")
        size = tuple(tensors[p.nanogpt_key].shape)
        if size != p.size:
            raise UsageError(f"{path}: {p.nanogpt_key} has the shape {size}, and its model_args say {p.size}.")
    unknown = sorted(tensors.keys() - {p.nanogpt_key for p in table} - ({HEAD} if tied else set()))
    if unknown:
        raise UsageError(f"{path}: {unknown[0]:.80} is no weight of nanoGPT's model. nanostudy has no place for it.")
    return torch.cat([tensors[p.nanogpt_key].reshape(-1).float() for p in table])


class _Unusable(Exception):
    """The state of an optimizer that cannot be taken over."""


def _moments(state: Any, table: Sequence[Parameter]) -> Moments | None:
    """nanoGPT gives its parameters to AdamW in two groups, decayed ones first, each in the model's order: the table's."""
    try:
        groups, by_index = state["param_groups"], state["state"]
        sizes = [len(group["params"]) for group in groups]
        indices = [index for group in groups for index in group["params"]]
        decayed = sum(p.decayed for p in table)
        if sizes != [decayed, len(table) - decayed]:
            raise _Unusable(f"its groups have {sizes} tensors, not {[decayed, len(table) - decayed]}")
        if not by_index:
            return None
        first, second = (
            _moment(name, [by_index[index][name] for index in indices], table) for name in ("exp_avg", "exp_avg_sq")
        )
        steps = {int(by_index[index]["step"]) for index in indices}
    except (KeyError, TypeError, ValueError, AttributeError, RuntimeError, OverflowError):
        raise _Unusable("it is not in the layout of nanoGPT's AdamW") from None
    if len(steps) != 1 or not 0 <= min(steps) < LARGEST_COUNT:
        raise _Unusable("its tensors have made different numbers of updates")
    return Moments(first, second, steps.pop())


def _moment(name: str, tensors: Sequence[Tensor], table: Sequence[Parameter]) -> Tensor:
    for p, tensor in zip(table, tensors, strict=True):
        if tuple(tensor.shape) != p.size or tensor.layout != torch.strided:
            raise _Unusable(f"{name} of {p.nanogpt_key} has the shape {tuple(tensor.shape)}, not {p.size}")
    return torch.cat([tensor.reshape(-1).float() for tensor in tensors])


# --- writing


def write_checkpoint(
    path: Path, w: Weights, config: Mapping[str, Any], moments: Moments | None, best_val_loss: float | None
) -> None:
    """Atomically. Without moments nanoGPT's AdamW starts afresh when it resumes: with averages of zero and its bias
    correction from the beginning. Raises UsageError where nanoGPT has no such model.
    """
    check_tied(w.config)
    tensors = _by_key(w.params, w.config)
    content = {
        "model": {**tensors, HEAD: tensors[EMBEDDING]},
        "optimizer": _optimizer(tensors, w, moments),
        "model_args": {**{name: getattr(w.config, name) for name in (*SIZES, "bias")}, "dropout": w.experiment.dropout},
        "iter_num": w.step,
        "best_val_loss": NOT_EVALUATED if best_val_loss is None else best_val_loss,
        "config": dict(config),
    }
    replace_atomically(path, lambda temporary: torch.save(content, temporary))


def check_tied(shape: GPTConfig) -> None:
    """Raises UsageError where the head has weights of its own."""
    if not shape.tie_embeddings:
        raise UsageError(
            "This model has tie_embeddings=false: a head with weights of its own. nanoGPT's model shares the head's weights "
            "with the token embedding and would load one of the two over the other without a word, so this is refused. "
            "--to huggingface keeps both."
        )


def _by_key(row_1P: Tensor, shape: GPTConfig) -> dict[str, Tensor]:
    views = named_views(row_1P, shape)
    return {p.nanogpt_key: views[p.name][0].detach().cpu().clone() for p in parameter_table(shape)}


def _optimizer(tensors: Mapping[str, Tensor], w: Weights, moments: Moments | None) -> dict[str, Any]:
    """The state of torch's own AdamW over these tensors, so that its layout is that of the PyTorch that writes it."""
    e = w.experiment
    groups = [
        {
            "params": [tensors[p.nanogpt_key] for p in parameter_table(w.config) if p.decayed is decayed],
            "weight_decay": e.weight_decay if decayed else 0.0,
        }
        for decayed in (True, False)
    ]
    optimizer = torch.optim.AdamW(groups, lr=learning_rate(e, w.step), betas=(e.beta1, e.beta2), eps=EPSILON)
    if moments:
        first, second = (_by_key(row_P[None], w.config) for row_P in (moments.exp_avg_P, moments.exp_avg_sq_P))
        for key, tensor in tensors.items():
            step = torch.tensor(float(moments.updates))
            optimizer.state[tensor] = {"step": step, "exp_avg": first[key], "exp_avg_sq": second[key]}
    return optimizer.state_dict()
