"""A GPT's configuration, the table of its parameters, their number, and the operations per token."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

from nanostudy.settings import Experiment


@dataclass(frozen=True)
class GPTConfig:
    """Everything that decides the sizes of a GPT's tensors."""

    n_layer: int
    n_head: int
    n_embd: int
    block_size: int
    vocab_size: int
    bias: bool
    tie_embeddings: bool

    @staticmethod
    def of(experiment: Experiment, vocab_size: int) -> GPTConfig:
        e = experiment
        return GPTConfig(e.n_layer, e.n_head, e.n_embd, e.block_size, vocab_size, e.bias, e.tie_embeddings)


class Parameter(NamedTuple):
    """A row of the table. Its initial values are normal with this `std`; with None all are `fill`."""

    name: str
    size: tuple[int, ...]
    std: float | None
    fill: float
    decayed: bool
    nanogpt_key: str

    @property
    def numel(self) -> int:
        return math.prod(self.size)


@lru_cache
def parameter_table(config: GPTConfig) -> tuple[Parameter, ...]:
    """Every parameter of one member, in the order of a row of the buffer: those with weight decay first.

    Initialisation is GPT-2's (Radford et al., 2019): normal with std 0.02, projections into the residual stream
    scaled by 1/sqrt(2 n_layer). Matrices are (out, in), as in nanoGPT and torch.nn.Linear.
    """
    E, std, projection_std = config.n_embd, 0.02, 0.02 / math.sqrt(2 * config.n_layer)
    rows: list[Parameter] = []

    def matrix(name: str, size: tuple[int, ...], key: str, std: float = std) -> None:
        rows.append(Parameter(name, size, std, 0.0, True, key))

    def vector(name: str, size: int, key: str, fill: float = 0.0) -> None:
        if config.bias or fill:  # gains exist with and without biases
            rows.append(Parameter(name, (size,), None, fill, False, key))

    def linear(name: str, out: int, into: int, key: str, std: float = std) -> None:
        matrix(f"{name}.weight", (out, into), f"{key}.weight", std)
        vector(f"{name}.bias", out, f"{key}.bias")

    def layer_norm(name: str, key: str) -> None:
        vector(f"{name}.gain", E, f"{key}.weight", 1.0)
        vector(f"{name}.bias", E, f"{key}.bias")

    matrix("token_embedding", (config.vocab_size, E), "transformer.wte.weight")
    matrix("position_embedding", (config.block_size, E), "transformer.wpe.weight")
    for layer in range(config.n_layer):
        here, there = f"layer{layer}", f"transformer.h.{layer}"
        layer_norm(f"{here}.norm1", f"{there}.ln_1")
        linear(f"{here}.qkv", 3 * E, E, f"{there}.attn.c_attn")
        linear(f"{here}.attention_out", E, E, f"{there}.attn.c_proj", projection_std)
        layer_norm(f"{here}.norm2", f"{there}.ln_2")
        linear(f"{here}.mlp_in", 4 * E, E, f"{there}.mlp.c_fc")
        linear(f"{here}.mlp_out", E, 4 * E, f"{there}.mlp.c_proj", projection_std)
    layer_norm("norm", "transformer.ln_f")
    if not config.tie_embeddings:
        matrix("head", (config.vocab_size, E), "lm_head.weight")
    return tuple(sorted(rows, key=lambda row: not row.decayed))


@dataclass(frozen=True)
class ParameterCount:
    total: int
    decayed: int
    without_positions: int  # nanoGPT's count


@lru_cache
def count_parameters(config: GPTConfig) -> ParameterCount:
    table = parameter_table(config)
    total = sum(row.numel for row in table)
    positions = config.block_size * config.n_embd
    return ParameterCount(total, sum(row.numel for row in table if row.decayed), total - positions)


def flops_per_token(config: GPTConfig) -> int:
    """Floating-point operations of a forward and backward pass (Chowdhery et al., 2022, appendix B). A third is the forward pass."""
    return 6 * count_parameters(config).without_positions + 12 * config.n_layer * config.n_embd * config.block_size
