"""A stack of M GPTs: one table of parameters, one forward pass.

Letters in names: M members, B sequences, T positions, E width, H heads, D width of a head (E = H * D),
V vocabulary, P parameters of one member, L layers; N stands for B * T. A member is a row of a buffer (M, P);
tensors are views of rows.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from nanostudy.gpt.experiment import Experiment
from nanostudy.gpt.randomness import Purpose, generator, keep_mask


@dataclass(frozen=True)
class Shape:
    """What decides the tensors' sizes."""

    n_layer: int
    n_head: int
    n_embd: int
    block_size: int
    vocab_size: int
    bias: bool
    tie_embeddings: bool

    @staticmethod
    def of(experiment: Experiment, vocab_size: int) -> Shape:
        e = experiment
        return Shape(e.n_layer, e.n_head, e.n_embd, e.block_size, vocab_size, e.bias, e.tie_embeddings)


class Parameter(NamedTuple):
    """A row of the table. `std` is of the initial normal distribution; None means filled with `fill`."""

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
def parameter_table(shape: Shape) -> tuple[Parameter, ...]:
    """Every parameter of one member in the order in which a row holds them: decayed ones first.

    Initialisation is GPT-2's (Radford et al., 2019): normal with std 0.02, projections into the residual stream
    scaled by 1/sqrt(2 n_layer). Matrices are (out, in), as in nanoGPT and torch.nn.Linear.
    """
    E, std, projection_std = shape.n_embd, 0.02, 0.02 / math.sqrt(2 * shape.n_layer)
    rows: list[Parameter] = []

    def matrix(name: str, size: tuple[int, ...], key: str, std: float = std) -> None:
        rows.append(Parameter(name, size, std, 0.0, True, key))

    def vector(name: str, size: int, key: str, fill: float = 0.0) -> None:
        if shape.bias or fill:  # gains are there with and without biases
            rows.append(Parameter(name, (size,), None, fill, False, key))

    def linear(name: str, out: int, into: int, key: str, std: float = std) -> None:
        matrix(f"{name}.weight", (out, into), f"{key}.weight", std)
        vector(f"{name}.bias", out, f"{key}.bias")

    def layer_norm(name: str, key: str) -> None:
        vector(f"{name}.gain", E, f"{key}.weight", 1.0)
        vector(f"{name}.bias", E, f"{key}.bias")

    matrix("token_embedding", (shape.vocab_size, E), "transformer.wte.weight")
    matrix("position_embedding", (shape.block_size, E), "transformer.wpe.weight")
    for layer in range(shape.n_layer):
        here, there = f"layer{layer}", f"transformer.h.{layer}"
        layer_norm(f"{here}.norm1", f"{there}.ln_1")
        linear(f"{here}.qkv", 3 * E, E, f"{there}.attn.c_attn")
        linear(f"{here}.attention_out", E, E, f"{there}.attn.c_proj", projection_std)
        layer_norm(f"{here}.norm2", f"{there}.ln_2")
        linear(f"{here}.mlp_in", 4 * E, E, f"{there}.mlp.c_fc")
        linear(f"{here}.mlp_out", E, 4 * E, f"{there}.mlp.c_proj", projection_std)
    layer_norm("norm", "transformer.ln_f")
    if not shape.tie_embeddings:
        matrix("head", (shape.vocab_size, E), "lm_head.weight")
    return tuple(sorted(rows, key=lambda row: not row.decayed))


@dataclass(frozen=True)
class ParameterCount:
    total: int
    decayed: int
    without_positions: int  # as nanoGPT counts


def count_parameters(shape: Shape) -> ParameterCount:
    table = parameter_table(shape)
    total = sum(row.numel for row in table)
    positions = shape.block_size * shape.n_embd
    return ParameterCount(total, sum(row.numel for row in table if row.decayed), total - positions)


def flops_per_token(shape: Shape) -> int:
    """Floating-point operations of a forward and backward pass (Chowdhery et al., 2022, appendix B); forward: a third."""
    return 6 * count_parameters(shape).without_positions + 12 * shape.n_layer * shape.n_embd * shape.block_size


def initial_parameters(shape: Shape, seeds: Sequence[int]) -> Tensor:
    """Fresh weights, fp32 (M, P), on the CPU. A member's row is a function of its seed and the shape alone."""
    table = parameter_table(shape)
    rows = np.empty((len(seeds), count_parameters(shape).total), dtype=np.float32)
    for row, seed in zip(rows, seeds, strict=True):
        draw, start = generator(seed, Purpose.INIT), 0
        for p in table:
            piece = row[start : start + p.numel]
            if p.std is None:
                piece.fill(p.fill)
            else:
                draw.standard_normal(dtype=np.float32, out=piece)
                piece *= np.float32(p.std)
            start += p.numel
    return torch.from_numpy(rows)


def named_views(buffer_MP: Tensor, shape: Shape) -> dict[str, Tensor]:
    """The table's tensors, (M, *size) each, as views of the buffer's rows."""
    table = parameter_table(shape)
    pieces = buffer_MP.split([p.numel for p in table], dim=1)
    return {p.name: piece.unflatten(1, p.size) for p, piece in zip(table, pieces, strict=True)}


@dataclass
class Dropout:
    """What the forward pass needs to drop: a key a member and sequence, int64 (M, B), and rates, fp32 (M,)."""

    keys_MB: Tensor
    rate_M: Tensor

    def kept(self, site: int, size: Sequence[int], dtype: torch.dtype) -> Tensor:
        """(M, B, *size): zero where dropped, one elsewhere."""
        return keep_mask(self.keys_MB, self.rate_M, site, math.prod(size)).to(dtype).unflatten(2, list(size))

    def scale(self, dtype: torch.dtype) -> Tensor:
        """1 / (1 - rate), (M, 1, 1, 1): what makes up for the dropped."""
        return (1 / (1 - self.rate_M)).to(dtype)[:, None, None, None]


@dataclass
class Cache:
    """Keys and values of the positions read so far, (L, M, B, H, T, D) each, of which `length` are filled."""

    keys: Tensor
    values: Tensor
    length: int = 0

    @staticmethod
    def empty(shape: Shape, members: int, batch: int, like: Tensor) -> Cache:
        size = (shape.n_layer, members, batch, shape.n_head, shape.block_size, shape.n_embd // shape.n_head)
        return Cache(like.new_empty(size), like.new_empty(size))

    def extend(self, layer: int, key_MBHTD: Tensor, value_MBHTD: Tensor) -> tuple[Tensor, Tensor]:
        """Writes a layer's new positions and returns all of them; `forward` moves `length` after the last layer."""
        end = self.length + key_MBHTD.shape[3]
        self.keys[layer, :, :, :, self.length : end] = key_MBHTD
        self.values[layer, :, :, :, self.length : end] = value_MBHTD
        return self.keys[layer, :, :, :, :end], self.values[layer, :, :, :, :end]


def forward(
    p: Mapping[str, Tensor],
    tokens_MBT: Tensor,
    shape: Shape,
    dropout: Dropout | None = None,
    cache: Cache | None = None,
) -> Tensor:
    """Logits (M, B, T, V) of the next token at every position, in the parameters' dtype.

    With a cache, the tokens follow those read before: either the first ones, or exactly one more.
    """
    M, B, T = tokens_MBT.shape
    start = cache.length if cache else 0
    if start + T > shape.block_size or (start and T > 1):
        raise ValueError(f"cannot read {T} tokens after {start} with block_size {shape.block_size}")
    site = iter(range(1 + 3 * shape.n_layer))

    def drop(x_MBTE: Tensor) -> Tensor:
        if dropout is None:
            return x_MBTE
        kept_MBTE = dropout.kept(next(site), x_MBTE.shape[2:], x_MBTE.dtype)
        return x_MBTE * kept_MBTE.mul_(dropout.scale(x_MBTE.dtype))

    # As a product with one-hot rows, looking up is one batched matrix product whose backward pass is another:
    # deterministic on every device, and small beside the head's.
    vocabulary = torch.arange(shape.vocab_size, device=tokens_MBT.device)
    one_hot_MNV = (tokens_MBT.reshape(M, B * T, 1) == vocabulary).to(p["token_embedding"].dtype)
    tokens_MBTE = torch.bmm(one_hot_MNV, p["token_embedding"]).unflatten(1, (B, T))
    positions_MTE = p["position_embedding"]
    if shape.block_size > T:
        positions_MTE = positions_MTE[:, start : start + T]
    x_MBTE = drop(tokens_MBTE + positions_MTE[:, None])

    for layer in range(shape.n_layer):
        here = f"layer{layer}"
        h_MBTE = _layer_norm(p, f"{here}.norm1", x_MBTE)
        h_MBTE = _attention(p, here, h_MBTE, shape, dropout, next(site) if dropout else 0, cache, layer)
        x_MBTE = x_MBTE + drop(_linear(p, f"{here}.attention_out", h_MBTE))
        h_MBTE = _layer_norm(p, f"{here}.norm2", x_MBTE)
        h_MBTE = F.gelu(_linear(p, f"{here}.mlp_in", h_MBTE))
        x_MBTE = x_MBTE + drop(_linear(p, f"{here}.mlp_out", h_MBTE))
    if cache:
        cache.length += T
    x_MBTE = _layer_norm(p, "norm", x_MBTE)
    head_MVE = p["token_embedding"] if shape.tie_embeddings else p["head"]
    return torch.bmm(x_MBTE.flatten(1, 2), head_MVE.transpose(1, 2)).unflatten(1, (B, T))


def _linear(p: Mapping[str, Tensor], name: str, x_MBTI: Tensor) -> Tensor:
    x_MNI, weight_MIO = x_MBTI.flatten(1, 2), p[f"{name}.weight"].transpose(1, 2)
    bias_MO = p.get(f"{name}.bias")
    y_MNO = torch.bmm(x_MNI, weight_MIO) if bias_MO is None else torch.baddbmm(bias_MO[:, None], x_MNI, weight_MIO)
    return y_MNO.unflatten(1, x_MBTI.shape[1:3])


def _layer_norm(p: Mapping[str, Tensor], name: str, x_MBTE: Tensor) -> Tensor:
    # The fused kernel normalises; its own gain is one for all rows, and here each member has another.
    normal_MBTE = F.layer_norm(x_MBTE, x_MBTE.shape[-1:], eps=1e-5)
    gain_M11E = p[f"{name}.gain"][:, None, None]
    bias_ME = p.get(f"{name}.bias")
    if bias_ME is None:
        return normal_MBTE * gain_M11E
    return torch.addcmul(bias_ME[:, None, None], normal_MBTE, gain_M11E)


def _attention(
    p: Mapping[str, Tensor],
    here: str,
    x_MBTE: Tensor,
    shape: Shape,
    dropout: Dropout | None,
    site: int,
    cache: Cache | None,
    layer: int,
) -> Tensor:
    """Causal scaled dot-product attention (Vaswani et al., 2017), before the output projection."""
    M, B, T, _ = x_MBTE.shape
    qkv_MBTXHD = _linear(p, f"{here}.qkv", x_MBTE).unflatten(3, (3, shape.n_head, -1))
    q_MBHTD, k_MBHTD, v_MBHTD = qkv_MBTXHD.permute(3, 0, 1, 4, 2, 5).unbind(0)
    if cache:
        k_MBHTD, v_MBHTD = cache.extend(layer, k_MBHTD, v_MBHTD)
    # Written out, for two reasons: the fused kernel would key its dropout by the place in the batch instead of by
    # the experiment, and its backward pass on a CPU in bf16 is several times slower than these products.
    if dropout:
        v_MBHTD = v_MBHTD * dropout.scale(x_MBTE.dtype)[..., None]
    q, k, v = (t.reshape(M * B * shape.n_head, t.shape[3], -1) for t in (q_MBHTD, k_MBHTD, v_MBHTD))
    scores = torch.baddbmm(_future(T, k.shape[1], q), q, k.transpose(1, 2), alpha=1 / math.sqrt(q.shape[-1]))
    weights = scores.softmax(-1)
    if dropout:  # the scale goes to the values, which are fewer
        weights = weights * dropout.kept(site, (shape.n_head, T, T), q.dtype).flatten(0, 2)
    y_MBHTD = torch.bmm(weights, v).unflatten(0, (M, B, shape.n_head))
    return y_MBHTD.transpose(2, 3).flatten(3)


def _future(queries: int, keys: int, like: Tensor) -> Tensor:
    """What is added to scores (queries, keys) so that no position sees those after it; the last query sees all keys."""
    return torch.full((queries, keys), -math.inf, dtype=like.dtype, device=like.device).triu_(1 + keys - queries)
