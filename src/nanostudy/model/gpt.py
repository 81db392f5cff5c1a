"""A stack of M GPTs: one table of parameters, one forward pass.

Letters in names: M members, B sequences, T positions, E width, H heads, D width of a head (E = H * D),
V vocabulary, P parameters of one member, L layers; N stands for B * T. A member is a row of a buffer (M, P);
tensors are views of rows.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import repeat

import numpy as np
import torch
from torch import Tensor

from nanostudy.model.config import GPTConfig as GPTConfig
from nanostudy.model.config import count_parameters as count_parameters
from nanostudy.model.config import flops_per_token as flops_per_token
from nanostudy.model.config import parameter_table as parameter_table
from nanostudy.model.layers import Attention, Gelu, Linear, ResidualNorm
from nanostudy.model.ops import REFERENCE, DropoutKeys, Ops
from nanostudy.model.randomness import Purpose, dropout_words, generator


def initial_parameters(shape: GPTConfig, seeds: Sequence[int]) -> Tensor:
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


def named_views(buffer_MP: Tensor, shape: GPTConfig) -> dict[str, Tensor]:
    """The table's tensors, (M, *size) each, as views of the buffer's rows."""
    table = parameter_table(shape)
    ops = buffer_MP.split([p.numel for p in table], dim=1)
    return {p.name: piece.unflatten(1, p.size) for p, piece in zip(table, ops, strict=True)}


def working_copies(params_MP: Tensor, shape: GPTConfig, dtype: torch.dtype) -> dict[str, Tensor]:
    """The table's tensors, (M, *size) each, in the dtype of the products: contiguous, which bf16 products want, or views."""
    return {name: view.to(dtype) for name, view in named_views(params_MP, shape).items()}


class Dropout:
    """The dropouts of one forward pass, from a key a member and sequence, int64 (M, B), and rates, fp32 (M,)."""

    def __init__(self, keys_MB: Tensor, rate_M: Tensor, shape: GPTConfig) -> None:
        self.words = [word_SMB.flatten(1) for word_SMB in dropout_words(keys_MB, rate_M, 1 + 3 * shape.n_layer)]
        self.scale_Z = (1 / (1 - rate_M)).repeat_interleave(keys_MB.shape[1])

    def __iter__(self) -> Iterator[DropoutKeys]:
        """In the order in which the forward pass meets them."""
        return (
            DropoutKeys(low, high, threshold, self.scale_Z) for low, high, threshold in zip(*self.words, strict=True)
        )


@dataclass
class Cache:
    """Keys and values of the positions read so far, (L, M, B, H, T, D) each, of which `length` are filled."""

    keys: Tensor
    values: Tensor
    length: int = 0

    @staticmethod
    def empty(shape: GPTConfig, members: int, batch: int, like: Tensor) -> Cache:
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
    shape: GPTConfig,
    dropout: Dropout | None = None,
    cache: Cache | None = None,
    ops: Ops = REFERENCE,
) -> Tensor:
    """Logits (M, B, T, V) of the next token at every position, in the parameters' dtype.

    With a cache, the tokens follow those read before: either the first ones, or exactly one more.
    """
    M, B, T = tokens_MBT.shape
    start = cache.length if cache else 0
    if start + T > shape.block_size or (start and T > 1):
        raise ValueError(f"cannot read {T} tokens after {start} with block_size {shape.block_size}")

    # As a product with one-hot rows, looking up is one batched matrix product whose backward pass is another:
    # deterministic on every device, and small beside the head's.
    vocabulary = torch.arange(shape.vocab_size, device=tokens_MBT.device)
    one_hot_MNV = (tokens_MBT.reshape(M, B * T, 1) == vocabulary).to(p["token_embedding"].dtype)
    tokens_MBTE = torch.bmm(one_hot_MNV, p["token_embedding"]).unflatten(1, (B, T))
    positions_MTE = p["position_embedding"]
    if shape.block_size > T:
        positions_MTE = positions_MTE[:, start : start + T]
    y_MBTE = tokens_MBTE + positions_MTE[:, None]

    drops = iter(dropout or repeat(None))
    x_MBTE: Tensor | None = None
    for layer in range(shape.n_layer):
        here = f"layer{layer}"
        x_MBTE, h_MBTE = _residual_norm(p, f"{here}.norm1", x_MBTE, y_MBTE, next(drops), ops)
        qkv_MBTF, drop = _linear(p, f"{here}.qkv", h_MBTE), next(drops)
        if cache:
            h_MBTE = _attend_cached(qkv_MBTF, cache, layer, shape, ops)
        else:
            h_MBTE = Attention.apply(qkv_MBTF, drop, shape.n_head, ops)
        y_MBTE = _linear(p, f"{here}.attention_out", h_MBTE)
        x_MBTE, h_MBTE = _residual_norm(p, f"{here}.norm2", x_MBTE, y_MBTE, next(drops), ops)
        h_MBTF = Gelu.apply(_linear(p, f"{here}.mlp_in", h_MBTE), ops)
        y_MBTE = _linear(p, f"{here}.mlp_out", h_MBTF)
    if cache:
        cache.length += T
    _, h_MBTE = _residual_norm(p, "norm", x_MBTE, y_MBTE, next(drops), ops)
    head_MVE = p["token_embedding"] if shape.tie_embeddings else p["head"]
    return Linear.apply(h_MBTE.flatten(1, 2), head_MVE, None).unflatten(1, (B, T))


def _linear(p: Mapping[str, Tensor], name: str, x_MBTI: Tensor) -> Tensor:
    y_MNO = Linear.apply(x_MBTI.flatten(1, 2), p[f"{name}.weight"], p.get(f"{name}.bias"))
    return y_MNO.unflatten(1, x_MBTI.shape[1:3])


def _residual_norm(
    p: Mapping[str, Tensor],
    name: str,
    x_MBTE: Tensor | None,
    y_MBTE: Tensor,
    drop: DropoutKeys | None,
    ops: Ops,
) -> tuple[Tensor, Tensor]:
    return ResidualNorm.apply(x_MBTE, y_MBTE, p[f"{name}.gain"], p.get(f"{name}.bias"), drop, ops)


def _attend_cached(qkv_MBTF: Tensor, cache: Cache, layer: int, shape: GPTConfig, ops: Ops) -> Tensor:
    """As Attention, but of new positions to those in the cache too. Only for reading: it has no backward pass."""
    M, B = qkv_MBTF.shape[:2]
    q_MBHTD, k_MBHTD, v_MBHTD = qkv_MBTF.unflatten(3, (3, shape.n_head, -1)).permute(3, 0, 1, 4, 2, 5).unbind(0)
    k_MBHTD, v_MBHTD = cache.extend(layer, k_MBHTD, v_MBHTD)
    q, k, v = (t.reshape(M * B * shape.n_head, t.shape[3], -1) for t in (q_MBHTD, k_MBHTD, v_MBHTD))
    scores_ZHQK = torch.bmm(q, k.transpose(1, 2)).unflatten(0, (M * B, shape.n_head))
    weights_ZHQK, _ = ops.attend(scores_ZHQK, None, 1 / math.sqrt(q.shape[-1]), shape.block_size)
    y_MBHTD = torch.bmm(weights_ZHQK.flatten(0, 1), v).unflatten(0, (M, B, shape.n_head))
    return y_MBHTD.transpose(2, 3).flatten(3)
