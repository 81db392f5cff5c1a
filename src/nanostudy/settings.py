"""Every setting, once: of an experiment, of the machine, of a command, and of sampling.

Imports nothing but the standard library: model and training read their settings here, and `nanostudy --help` does too.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from nanostudy import version
from nanostudy.errors import UsageError
from nanostudy.validation import TEXT, Kind, check, check_names, setting, settings_of

CORPORA = ("shakespeare", "playhouse", "auto")  # names; any other corpus is a path
PRECISIONS = ("fp32", "bf16", "fp16")
LARGEST_MODEL = 10**10  # parameters
LARGEST_BATCH = 2**30  # tokens of a micro-batch


# --- experiments


def split_text(shares: Any) -> str:
    """0.8/0.1/0.1 from a list of shares, or a text that separates them by / or commas. Raises ValueError."""
    parts = re.split("[/,]", shares.strip(" []")) if isinstance(shares, str) else shares
    numbers = [float(part) for part in parts]
    if not (2 <= len(numbers) <= 3 and all(number > 0 for number in numbers) and math.isclose(sum(numbers), 1)):
        raise ValueError
    return "/".join(f"{number:.12g}" for number in numbers)


@dataclass(frozen=True, kw_only=True)
class Experiment:
    """Settings under nanoGPT's names. Frozen, and checked when made: a bad value raises UsageError."""

    corpus: str = setting(
        "shakespeare",
        "data",
        "shakespeare, playhouse, auto, a UTF-8 text, or a nanoGPT dataset folder",
        pattern=TEXT.replace("*", "+"),
    )
    tokenizer: str = setting(
        "char", "data", "char (one token per character) or byte (one token per UTF-8 byte)", pattern="char|byte"
    )
    split: str | None = setting(
        None,
        "data",
        "shares of the text for training, validation and, where there are three, a held-out test, such as "
        "[0.8, 0.1, 0.1]; none: nanoGPT's 90/10, or a dataset's own",
        form=split_text,
    )
    init_from: str | None = setting(None, "data", "a run whose weights to start from; none: fresh weights")

    n_layer: int = setting(4, "shape", "transformer blocks", low=1, high=10_000)
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
    eval_tokens: int | None = setting(
        None,
        "number",
        "tokens of each split that evaluations before the last read, in fixed windows; none: the whole validation split",
        low=1,
    )

    log_interval: int = setting(10, "record", "updates between rows of the training log", low=1)
    sample_prompt: str | None = setting(None, "record", "what the sample at the end goes on from; none: a new line")
    sample_tokens: int = setting(500, "record", "length of that sample, in tokens", low=0, high=10**6)

    def __post_init__(self) -> None:
        check(self)
        if self.n_embd % self.n_head:
            raise UsageError(
                f"n_embd={self.n_embd} is not divisible by n_head={self.n_head}: every head has n_embd / n_head "
                f"channels. Nearest widths that fit: {_neighbours(self.n_embd, self.n_head)}."
            )
        least = self.n_embd * (12 * self.n_layer * self.n_embd + self.block_size)
        if least > LARGEST_MODEL:
            raise UsageError(
                f"n_layer={self.n_layer}, n_embd={self.n_embd} and block_size={self.block_size} make a model of more than "
                f"{least:,} parameters, and {LARGEST_MODEL:,} is the most."
            )
        if self.batch_size * self.block_size > LARGEST_BATCH:
            raise UsageError(
                f"batch_size={self.batch_size} and block_size={self.block_size} make a micro-batch of "
                f"{self.batch_size * self.block_size:,} tokens, and {LARGEST_BATCH:,} is the most."
            )

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
    def oddities(self) -> list[str]:
        """What is allowed and seldom meant, in words."""
        least, notes = self.min_lr, []
        if self.decay_lr and 0 < self.max_iters < self.warmup_iters:
            notes.append(
                f"warmup_iters={self.warmup_iters} is more than max_iters={self.max_iters}: the learning rate never reaches its peak"
            )
        if self.decay_lr and least is not None and least > self.learning_rate:
            notes.append(
                f"min_lr={least:g} is above learning_rate={self.learning_rate:g}: the learning rate rises to it instead of decaying"
            )
        return notes

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
        if self.eval_tokens is None:  # identities are older than this setting
            del settings["eval_tokens"]
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


FIELDS = settings_of(Experiment)


@functools.cache
def names_of(kind: Kind) -> tuple[str, ...]:
    """The experiment's settings of one kind, in order of declaration."""
    return tuple(name for name, setting in FIELDS.items() if setting.kind == kind)


def from_settings(settings: Mapping[str, Any]) -> Experiment:
    """An experiment from names and values (numbers may be text). Unknown names are refused with the nearest one."""
    check_names(settings, FIELDS)
    return Experiment(**settings)


def _neighbours(width: int, heads: int) -> str:
    below = width // heads * heads
    return f"{below} or {below + heads}" if below else str(heads)


# --- where and how the work is done


@dataclass(frozen=True, kw_only=True)
class Resources:
    """The machine to use. It changes how a result is computed, and is no part of an experiment's identity."""

    device: str = setting("auto", "option", "auto, cpu, cuda, cuda:N or mps", pattern=r"auto|cpu|cuda|cuda:\d+|mps")
    precision: str = setting(
        "auto",
        "option",
        "auto, fp32, bf16 or fp16: of products; weights stay fp32",
        pattern="|".join(("auto", *PRECISIONS)),
    )
    compile: str = setting(
        "auto", "option", "auto, yes or no: kernels built once by this machine's compiler", pattern="auto|yes|no"
    )
    threads: int | None = setting(
        None, "option", "CPU threads, of each worker in a study; none: the cores, shared out", low=1, high=9999
    )

    def __post_init__(self) -> None:
        check(self)


@dataclass(frozen=True, kw_only=True)
class Where(Resources):
    """Where a training or a study runs, and what follows it: the options that commands and Python share."""

    executor: str = setting(
        "workers",
        "option",
        "workers, inline or ray: processes of this machine, all in this process, or a Ray cluster",
        pattern="workers|inline|ray",
    )
    workers: int | None = setting(
        None,
        "option",
        "worker processes; none: one per core of a CPU or one per GPU, and no more than experiments",
        low=1,
    )
    address: str | None = setting(
        None, "option", "the Ray cluster: auto, HOST:PORT or ray://HOST:PORT; none: one of this machine alone"
    )
    checkpoints: str | None = setting(
        None, "option", "where Ray's nodes keep checkpoints: s3://..., file:///...; none: in the study's folder, here"
    )
    track: str | None = setting(
        None,
        "option",
        "tensorboard, wandb or mlflow: gets what is measured, too; none: the run folder alone",
        pattern="tensorboard|wandb|mlflow",
    )
    track_project: str | None = setting(
        None, "option", "the tracker's project; none: WANDB_PROJECT or MLFLOW_EXPERIMENT_NAME, or nanostudy"
    )
    track_name: str | None = setting(None, "option", "a training's name in the tracker; none: the experiment's")
    notify: str | None = setting(
        None, "option", "at the end: bell, desktop, or a command that gets the message as its last word; none: nothing"
    )
    save_every: float = setting(60.0, "option", "seconds between checkpoints; 0: after every update", low=0.0)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.executor != "ray" and (self.address or self.checkpoints):
            raise UsageError(
                f"{'--address' if self.address else '--checkpoints'} is for a cluster: add --executor ray."
            )
        if self.executor == "inline" and self.workers not in (None, 1):
            raise UsageError("inline is one worker; --executor workers takes several.")

    @property
    def resources(self) -> Resources:
        return Resources(**{name: getattr(self, name) for name in RESOURCE_NAMES})

    @classmethod
    def of(cls, names: Iterable[str], resources: Resources | None, options: Mapping[str, Any]) -> Where:
        """From a function's keywords, of which it takes these names. Raises UsageError."""
        check_names(options, names, FIELDS)
        return cls(**{**(dataclasses.asdict(resources) if resources else {}), **options})


RESOURCE_NAMES = tuple(settings_of(Resources))
TRACKING = ("track", "track_project", "track_name")
BESIDE = (*RESOURCE_NAMES, *TRACKING)  # in a settings file, and no part of the experiment
IN_FILES = (*FIELDS, *BESIDE)
TRAIN_OPTIONS = (*BESIDE, "save_every")
PLAN_OPTIONS = (*RESOURCE_NAMES, "executor", "workers", "address", "checkpoints")
# each experiment of a study has a name of its own
RUN_OPTIONS = tuple(name for name in settings_of(Where) if name != "track_name")


# --- sampling


@dataclass(frozen=True, kw_only=True)
class SamplingParams:
    """How the next token is drawn from the logits."""

    temperature: float = setting(0.8, "option", "divides the logits; 0: always the likeliest token", low=0.0)
    top_k: int | None = setting(200, "option", "only the k likeliest tokens; none (in the command 0): all", low=1)
    # Holtzman et al., 2020
    top_p: float | None = setting(
        None, "option", "only the likeliest tokens that together reach this probability", above=0.0, high=1.0
    )
    exact: bool = setting(
        False, "option", "past block_size: slide by one token at full cost, instead of re-reading the last half window"
    )

    def __post_init__(self) -> None:
        check(self)


SETTINGS = {**FIELDS, **settings_of(Where), **settings_of(SamplingParams)}


def check_value(name: str, value: Any) -> Any:
    """One setting's value in its type, by the setting's name. Raises UsageError."""
    return SETTINGS[name].read(value)
