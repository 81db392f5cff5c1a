"""An experiment: one configuration with its seed. Every setting is declared here, once."""

from __future__ import annotations

import dataclasses
import difflib
import hashlib
import json
import math
import sys
import typing
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any, Literal

from nanostudy import version
from nanostudy.errors import UsageError

# data: what is read. shape: decides the sizes of tensors; members of a stack share it. number: may differ
# between members. record: what is written down; it changes no weight and is no part of the identity.
Kind = Literal["data", "shape", "number", "record"]


def setting(default: Any, kind: Kind, meaning: str, *, low: float | None = None, high: float | None = None) -> Any:
    """A dataclass field that knows its kind, its meaning with its unit, and its range (both ends included)."""
    return dataclasses.field(default=default, metadata={"kind": kind, "meaning": meaning, "low": low, "high": high})


@dataclass(frozen=True, kw_only=True)
class Experiment:
    """Settings under nanoGPT's names. Frozen, and checked when made: a bad value raises UsageError."""

    corpus: str = setting(
        "shakespeare", "data", "shakespeare, playhouse, auto, a UTF-8 text, or a nanoGPT dataset folder"
    )
    tokenizer: str = setting("char", "data", "char (one token per character) or byte (one token per UTF-8 byte)")
    init_from: str | None = setting(None, "data", "a run whose weights to start from; none: fresh weights")

    n_layer: int = setting(4, "shape", "transformer blocks", low=1)
    n_head: int = setting(4, "shape", "attention heads per block", low=1)
    n_embd: int = setting(128, "shape", "width of the residual stream", low=1)
    block_size: int = setting(64, "shape", "context length, in tokens", low=1)
    bias: bool = setting(False, "shape", "biases in linear layers and LayerNorms")
    tie_embeddings: bool = setting(True, "shape", "the head shares the token embedding's weights")
    batch_size: int = setting(12, "shape", "sequences per micro-batch", low=1)
    gradient_accumulation_steps: int = setting(1, "shape", "micro-batches per update", low=1)

    seed: int = setting(1, "number", "all randomness is a function of it", low=0, high=2**63 - 1)
    dropout: float = setting(0.0, "number", "probability of dropping an activation", low=0.0, high=0.99)
    max_iters: int = setting(2000, "number", "updates", low=0)
    learning_rate: float = setting(1e-3, "number", "peak learning rate", low=0.0)
    decay_lr: bool = setting(True, "number", "warm-up and cosine decay; false: constant learning rate")
    warmup_iters: int = setting(100, "number", "updates of linear warm-up", low=0)
    lr_decay_iters: int | None = setting(None, "number", "update at which the decay ends; none: max_iters", low=0)
    min_lr: float | None = setting(None, "number", "learning rate after the decay; none: learning_rate / 10", low=0.0)
    weight_decay: float = setting(0.1, "number", "AdamW's decay of matrices and embeddings", low=0.0)
    beta1: float = setting(0.9, "number", "AdamW's first-moment decay", low=0.0, high=0.99999999)
    beta2: float = setting(0.99, "number", "AdamW's second-moment decay", low=0.0, high=0.99999999)
    grad_clip: float = setting(1.0, "number", "largest gradient norm; 0: no clipping", low=0.0)
    eval_interval: int = setting(250, "number", "updates between evaluations", low=1)

    log_interval: int = setting(10, "record", "updates between rows of the training log", low=1)
    sample_prompt: str | None = setting(None, "record", "what the sample at the end goes on from; none: a new line")
    sample_tokens: int = setting(500, "record", "length of that sample, in tokens", low=0)

    def __post_init__(self) -> None:
        for name, (base, _, low, high) in _RULES.items():
            value = getattr(self, name)
            if type(value) is not base or (base in (int, float) and not low <= value <= high):
                object.__setattr__(self, name, _checked(name, value))
        if self.n_embd % self.n_head:
            raise UsageError(
                f"n_embd={self.n_embd} is not divisible by n_head={self.n_head}: every head has n_embd / n_head "
                f"channels. Nearest widths that fit: {_neighbours(self.n_embd, self.n_head)}."
            )
        check_tokenizer(self.tokenizer)
        if not self.corpus:
            raise UsageError("corpus is empty: name a corpus, or the path of a UTF-8 text.")

    @property
    def name(self) -> str:
        """The published study's pattern, for example b64_L4_H4_E128_BS8_MI1000_D10_s1."""
        return (
            f"b{self.block_size}_L{self.n_layer}_H{self.n_head}_E{self.n_embd}_BS{self.batch_size}"
            f"_MI{self.max_iters}_D{100 * self.dropout:.6g}_s{self.seed}"
        )

    @property
    def shape(self) -> tuple[Any, ...]:
        """What members of one stack have in common."""
        return tuple(getattr(self, name) for name in names_of("shape"))

    @property
    def sequences_per_update(self) -> int:
        return self.batch_size * self.gradient_accumulation_steps

    @property
    def tokens_per_update(self) -> int:
        return self.sequences_per_update * self.block_size

    def identity(self, corpus_sha256: str, tokenizer: str, init_sha256: str | None) -> str:
        """16 hex digits over what decides the result: settings, text, tokenizer, first weights, numerics version.

        Names and paths do not count, what they stand for does: the text's and the first weights' checksums.
        """
        settings = {name: getattr(self, name) for name in (*names_of("shape"), *names_of("number"))}
        parts = {
            "settings": settings,
            "corpus": corpus_sha256,
            "tokenizer": tokenizer,
            "init": init_sha256,
            "numerics": version.NUMERICS,
        }
        return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:16]

    def as_dict(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in FIELDS}


FIELDS: dict[str, dataclasses.Field[Any]] = {field.name: field for field in dataclasses.fields(Experiment)}


def _rule(name: str, hint: Any) -> tuple[Any, bool, float, float]:
    """A setting's type, whether it may be none, and its finite range: looked up for every value of a million experiments."""
    kinds, given = typing.get_args(hint) or (hint,), FIELDS[name].metadata
    base = next(kind for kind in kinds if kind is not type(None))
    most = math.inf if base is int else sys.float_info.max
    low, high = (-most if given["low"] is None else given["low"]), (most if given["high"] is None else given["high"])
    return base, type(None) in kinds, low, high


_RULES = {name: _rule(name, hint) for name, hint in typing.get_type_hints(Experiment).items()}


@cache
def names_of(kind: Kind) -> tuple[str, ...]:
    """The settings of one kind, in order of declaration."""
    return tuple(name for name, field in FIELDS.items() if field.metadata["kind"] == kind)


def from_settings(settings: Mapping[str, Any]) -> Experiment:
    """An experiment from names and values (numbers may be text). Unknown names are refused with the nearest one."""
    check_names(settings, FIELDS)
    return Experiment(**settings)


def check_names(names: Iterable[str], known: Iterable[str]) -> None:
    """Raises UsageError at the first name that is not known, with the nearest known one."""
    known = list(known)
    for name in names:
        if name not in known:
            near = difflib.get_close_matches(str(name), known, n=1, cutoff=0.5)
            hint = f" Did you mean {near[0]}?" if near else f" Known settings: {', '.join(known)}."
            raise UsageError(f"There is no setting {name!r}.{hint}")


def check_tokenizer(kind: str) -> None:
    if kind not in ("char", "byte"):
        raise UsageError(f"tokenizer={kind!r} is not known: char or byte.")


def _checked(name: str, value: Any) -> Any:
    """The value in its declared type and range, or UsageError. Text is read as the type; 1e3 is no whole number's way."""
    base, optional, *_ = _RULES[name]
    field = FIELDS[name]
    if optional and (value is None or (isinstance(value, str) and value.lower() in ("none", "null", ""))):
        return None
    try:
        value = _read(value, base)
    except (TypeError, ValueError, OverflowError):
        kinds = {int: "a whole number", float: "a number", bool: "true or false", str: "text"}
        also = " or none" if optional else ""
        raise UsageError(f"{name}={value!r} must be {kinds[base]}{also} ({field.metadata['meaning']}).") from None
    low, high = field.metadata["low"], field.metadata["high"]
    if (low is not None and value < low) or (high is not None and value > high):
        bound = f"at least {low:g}" if high is None else f"from {low:g} to {high:.12g}"
        raise UsageError(f"{name}={value} must be {bound} ({field.metadata['meaning']}).")
    return value


def _read(value: Any, base: type) -> Any:
    if base is str:
        if not isinstance(value, str):
            raise TypeError
        return value
    if base is bool:
        if isinstance(value, str):
            return {"true": True, "false": False}[value.lower()] if value.lower() in ("true", "false") else _fail()
        return value if isinstance(value, bool) else _fail()
    if isinstance(value, bool):
        raise TypeError
    if base is int:
        number = int(value) if isinstance(value, str) else value
        return int(number) if number == int(number) else _fail()
    number = float(value)
    return number if math.isfinite(number) else _fail()


def _fail() -> typing.NoReturn:
    raise ValueError


def _neighbours(width: int, heads: int) -> str:
    below = width // heads * heads
    return f"{below} or {below + heads}" if below else str(heads)
