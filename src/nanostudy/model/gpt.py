"""A stack of M GPTs: initial weights, views of the parameter buffer, and one forward pass.

Letters in names: M members, B sequences, T positions, E width, H heads, D width of a head (E = H * D),
V vocabulary, F features, P parameters of one member, L layers; N stands for B * T. A member is a row of a buffer (M, P), and its
tensors are views of that row.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import repeat

import numpy as np
import torch
from torch import Tensor

from nanostudy.model.config import GPTConfig, count_parameters, parameter_table
from nanostudy.model.layers import Embed, Gelu, Linear, ResidualNorm, attention
from nanostudy.model.ops import REFERENCE, DropoutKeys, Ops
from nanostudy.model.randomness import Purpose, generator


def initial_parameters(config: GPTConfig, seeds: Sequence[int]) -> Tensor:
    """Fresh weights, fp32 (M, P), on the CPU. A member's row depends on its seed and the configuration only."""
    table = parameter_table(config)
    rows = np.empty((len(seeds), count_parameters(config).total), dtype=np.float32)
    for row, seed in zip(rows, seeds, strict=True):
        draw, start = generator(seed, Purpose.INIT), 0
        for p in table:
            values = row[start : start + p.numel]
            if p.std is None:
                values.fill(p.fill)
            else:
                draw.standard_normal(dtype=np.float32, out=values)
                values *= np.float32(p.std)
            start += p.numel
    return torch.from_numpy(rows)


def named_views(buffer_MP: Tensor, config: GPTConfig) -> dict[str, Tensor]:
    """The table's tensors, (M, *size) each, as views of the buffer's rows."""
    table = parameter_table(config)
    columns = buffer_MP.split([p.numel for p in table], dim=1)
    return {p.name: column.unflatten(1, p.size) for p, column in zip(table, columns, strict=True)}


def working_copies(params_MP: Tensor, config: GPTConfig, dtype: torch.dtype) -> dict[str, Tensor]:
    """The table's tensors, (M, *size) each, in the dtype of the products: contiguous copies, or views if the dtype is fp32.

    On a GPU, where each copy is a launch, they are views of one copy of all parameters.
    """
    if params_MP.device.type != "cpu":
        return named_views(params_MP.to(dtype), config)
    return {name: view.to(dtype) for name, view in named_views(params_MP, config).items()}


def dropouts(keys_MB: Tensor, rate_M: Tensor, config: GPTConfig, ops: Ops = REFERENCE) -> list[DropoutKeys]:
    """Those of one forward pass in its order, from one key per member and sequence, int64 (M, B), and rates, fp32 (M,)."""
    *words, scale_Z = ops.dropout_words(keys_MB, rate_M, 1 + 3 * config.n_layer)
    return [DropoutKeys(low, high, threshold, scale_Z) for low, high, threshold in zip(*words, strict=True)]


@dataclass
class Cache:
    """Keys and values of the first `length` positions, (L, M, B, H, T, D) each; T is block_size.

    With `at`, int64 (1,), the next token's position is there, on the device, and all T positions are read, those after it masked:
    the same operations at every position, so that they can be recorded.
    """

    keys: Tensor
    values: Tensor
    length: int = 0
    at: Tensor | None = None

    @staticmethod
    def empty(config: GPTConfig, members: int, batch: int, like: Tensor) -> Cache:
        size = (config.n_layer, members, batch, config.n_head, config.block_size, config.n_embd // config.n_head)
        return Cache(like.new_zeros(size), like.new_zeros(size))

    def extend(self, layer: int, key_MBHTD: Tensor, value_MBHTD: Tensor) -> tuple[Tensor, Tensor]:
        """Writes one layer's new positions and returns all so far. `forward` advances `length` after the last layer."""
        if self.at is not None:
            for all_LMBHTD, new_MBHTD in ((self.keys, key_MBHTD), (self.values, value_MBHTD)):
                all_LMBHTD[layer].index_copy_(3, self.at, new_MBHTD)
            return self.keys[layer], self.values[layer]
        end = self.length + key_MBHTD.shape[3]
        self.keys[layer, :, :, :, self.length : end] = key_MBHTD
        self.values[layer, :, :, :, self.length : end] = value_MBHTD
        return self.keys[layer, :, :, :, :end], self.values[layer, :, :, :, :end]


def forward(
    p: Mapping[str, Tensor],
    tokens_MBT: Tensor,
    config: GPTConfig,
    dropout: Sequence[DropoutKeys] | None = None,
    cache: Cache | None = None,
    heads: Sequence[int] | None = None,
    ops: Ops = REFERENCE,
    into: Mapping[str, Tensor] | None = None,
) -> Tensor:
    """Logits (M, B, T, V) of the next token at every position, in the parameters' dtype.

    With a cache, the tokens continue those read before: any number at first, then one at a time. `heads`: each member's, where
    they are not the configuration's; their number decides no size of a tensor. With `into` (see engine) the backward pass writes
    gradients there.
    """
    M, B, T = tokens_MBT.shape
    start = cache.length if cache else 0
    if start + T > config.block_size or (start and T > 1):
        raise ValueError(f"cannot read {T} tokens after {start} with block_size {config.block_size}")
    drops = iter(dropout or repeat(None))

    def linear(x_MBTI: Tensor, name: str) -> Tensor:
        weight, bias = name if name in p else f"{name}.weight", f"{name}.bias"
        to = (into[weight], into.get(bias)) if into else None
        return Linear.apply(x_MBTI.flatten(1, 2), p[weight], p.get(bias), ops, to).unflatten(1, (B, T))

    def residual_norm(x_MBTE: Tensor | None, y_MBTE: Tensor, name: str) -> tuple[Tensor, Tensor]:
        gain, bias = f"{name}.gain", f"{name}.bias"
        to = (into[gain], into.get(bias)) if into else None
        return ResidualNorm.apply(x_MBTE, y_MBTE, p[gain], p.get(bias), next(drops), ops, to)

    positions_MTE = p["position_embedding"]
    if cache and cache.at is not None:
        positions_MTE = positions_MTE.index_select(1, cache.at)
    elif config.block_size > T:
        positions_MTE = positions_MTE[:, start : start + T]
    both = (into["token_embedding"], into["position_embedding"]) if into else None
    y_MBTE = Embed.apply(p["token_embedding"], positions_MTE, tokens_MBT, ops, both, config.tie_embeddings)
    x_MBTE: Tensor | None = None
    for layer in range(config.n_layer):
        here = f"layer{layer}"
        x_MBTE, h_MBTE = residual_norm(x_MBTE, y_MBTE, f"{here}.norm1")
        qkv_MBTF, drop = linear(h_MBTE, f"{here}.qkv"), next(drops)
        if cache:
            h_MBTE = _attend_cached(qkv_MBTF, cache, layer, config, ops)
        else:
            h_MBTE = attention(qkv_MBTF, drop, heads or [config.n_head] * M, ops)
        y_MBTE = linear(h_MBTE, f"{here}.attention_out")
        x_MBTE, h_MBTE = residual_norm(x_MBTE, y_MBTE, f"{here}.norm2")
        h_MBTF = Gelu.apply(linear(h_MBTE, f"{here}.mlp_in"), ops)
        y_MBTE = linear(h_MBTF, f"{here}.mlp_out")
    if cache and cache.at is None:
        cache.length += T
    _, h_MBTE = residual_norm(x_MBTE, y_MBTE, "norm")
    return linear(h_MBTE, "token_embedding" if config.tie_embeddings else "head")


def _attend_cached(qkv_MBTF: Tensor, cache: Cache, layer: int, config: GPTConfig, ops: Ops) -> Tensor:
    """As Attention, from new positions to cached ones as well. It has no backward pass."""
    M, B = qkv_MBTF.shape[:2]
    q_MBHTD, k_MBHTD, v_MBHTD = qkv_MBTF.unflatten(3, (3, config.n_head, -1)).permute(3, 0, 1, 4, 2, 5).unbind(0)
    k_MBHTD, v_MBHTD = cache.extend(layer, k_MBHTD, v_MBHTD)
    q, k, v = (t.reshape(M * B * config.n_head, t.shape[3], -1) for t in (q_MBHTD, k_MBHTD, v_MBHTD))
    scores_ZHQK = torch.bmm(q, k.transpose(1, 2)).unflatten(0, (M * B, config.n_head))
    if cache.at is not None:
        future_K = torch.arange(k.shape[1], device=k.device) > cache.at
        scores_ZHQK = scores_ZHQK.masked_fill(future_K, -math.inf)
    weights_ZHQK, _ = ops.attend(scores_ZHQK, None, 1 / math.sqrt(q.shape[-1]), config.block_size)
    y_MBHTD = torch.bmm(weights_ZHQK.flatten(0, 1), v).unflatten(0, (M, B, config.n_head))
    return y_MBHTD.transpose(2, 3).flatten(3)
