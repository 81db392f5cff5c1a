"""The sublayers of a stack, each with its backward pass, made of the operations in ops.py. Letters as in gpt.py.

The backward passes are written by hand for three reasons: library attention keys its dropout by the place in the batch, not by
the experiment; computing a mask again in the backward pass is faster than storing it; and a weight's gradient comes out in the
weight's own layout. With `into` (see engine.py) gradients are written there, and the backward pass returns none.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from itertools import groupby, repeat
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function

from nanostudy.model.ops import REFERENCE, DropoutKeys, Ops

LEAST_QUERIES, MOST_BLOCKS = 64, 4  # attention splits a sequence into blocks of queries


class Embed(Function):
    """The sum of token and position embeddings, (M, B, T, E). With `adds` the first gradient is added to what `into` holds: that of
    a head which shares the weights.
    """

    @staticmethod
    def forward(
        ctx: Any,
        token_MVE: Tensor,
        position_MTE: Tensor,
        tokens_MBT: Tensor,
        ops: Ops,
        into: tuple[Tensor, Tensor] | None = None,
        adds: bool = False,
    ) -> Tensor:
        ctx.save_for_backward(tokens_MBT)
        ctx.vocabulary, ctx.ops, ctx.into, ctx.adds = token_MVE.shape[1], ops, into, adds
        return ops.embed(tokens_MBT, token_MVE, position_MTE)

    @staticmethod
    def backward(ctx: Any, d_y_MBTE: Tensor) -> tuple[Tensor | None, ...]:
        (tokens_MBT,), d_y_MNE = ctx.saved_tensors, d_y_MBTE.flatten(1, 2)
        one_hot_MVN = ctx.ops.one_hot(tokens_MBT, ctx.vocabulary, d_y_MNE.dtype).transpose(1, 2)
        if ctx.into is None:
            return torch.bmm(one_hot_MVN, d_y_MNE), d_y_MBTE.sum(1), *[None] * 4
        d_token_MVE, d_position_MTE = ctx.into
        if ctx.adds:
            d_token_MVE.baddbmm_(one_hot_MVN, d_y_MNE)
        else:
            torch.bmm(one_hot_MVN, d_y_MNE, out=d_token_MVE)
        B = d_y_MBTE.shape[1]
        ctx.ops.sums(d_y_MBTE.flatten(2).contiguous(), d_position_MTE.flatten(1)[:, None], B)
        return (None,) * 6


class Linear(Function):
    """y (M, N, O) = x (M, N, I) @ weight (M, O, I) transposed + bias (M, O)."""

    @staticmethod
    def forward(
        ctx: Any,
        x_MNI: Tensor,
        weight_MOI: Tensor,
        bias_MO: Tensor | None,
        ops: Ops = REFERENCE,
        into: tuple[Tensor, Tensor | None] | None = None,
    ) -> Tensor:
        ctx.save_for_backward(x_MNI, weight_MOI)
        ctx.has_bias, ctx.ops, ctx.into = bias_MO is not None, ops, into
        weight_MIO = weight_MOI.transpose(1, 2)
        if bias_MO is None:
            return torch.bmm(x_MNI, weight_MIO)
        if len(x_MNI) == 1 and not x_MNI.is_cpu:  # adds the bias within the product
            return torch.addmm(bias_MO[0], x_MNI[0], weight_MIO[0])[None]
        return torch.baddbmm(bias_MO[:, None], x_MNI, weight_MIO)

    @staticmethod
    def backward(ctx: Any, d_y_MNO: Tensor) -> tuple[Tensor | None, ...]:
        x_MNI, weight_MOI = ctx.saved_tensors
        d_x_MNI, d_y_MON = torch.bmm(d_y_MNO, weight_MOI), d_y_MNO.transpose(1, 2)
        if ctx.into is None:
            return d_x_MNI, torch.bmm(d_y_MON, x_MNI), d_y_MNO.sum(1) if ctx.has_bias else None, None, None
        d_weight_MOI, d_bias_MKO = ctx.into
        torch.bmm(d_y_MON, x_MNI, out=d_weight_MOI)
        if d_bias_MKO is not None:
            ctx.ops.sums(d_y_MNO, d_bias_MKO, -(-d_y_MNO.shape[1] // d_bias_MKO.shape[1]))
        return d_x_MNI, None, None, None, None


class ResidualNorm(Function):
    """(x + y with dropout, its LayerNorm), (M, B, T, E) each. x None stands for zeros; gain and bias are (M, E)."""

    @staticmethod
    def forward(
        ctx: Any,
        x_MBTE: Tensor | None,
        y_MBTE: Tensor,
        gain_ME: Tensor,
        bias_ME: Tensor | None,
        drop: DropoutKeys | None,
        ops: Ops,
        into: tuple[Tensor, Tensor | None] | None = None,
    ) -> tuple[Tensor, Tensor]:
        size, x_ZTE = y_MBTE.shape, None if x_MBTE is None else x_MBTE.flatten(0, 1)
        sum_ZTE, norm_ZTE = ops.residual_norm(x_ZTE, y_MBTE.flatten(0, 1), drop, gain_ME, bias_ME)
        ctx.save_for_backward(sum_ZTE, gain_ME)
        ctx.drop, ctx.ops, ctx.into = drop, ops, into
        ctx.has_x, ctx.has_bias = x_MBTE is not None, bias_ME is not None
        return sum_ZTE.view(size), norm_ZTE.view(size)

    @staticmethod
    def backward(ctx: Any, d_sum_MBTE: Tensor, d_norm_MBTE: Tensor) -> tuple[Tensor | None, ...]:
        (sum_ZTE, gain_ME), size, dtype = ctx.saved_tensors, d_sum_MBTE.shape, d_norm_MBTE.dtype
        d_x_ZTE, d_y_ZTE, d_gain_NE, d_bias_NE = ctx.ops.residual_norm_backward(
            *(d_sum_MBTE.flatten(0, 1), d_norm_MBTE.flatten(0, 1), sum_ZTE, ctx.drop, gain_ME),
            *([ctx.into] if ctx.into else []),
        )
        d_x_MBTE, d_y_MBTE = d_x_ZTE.view(size) if ctx.has_x else None, d_y_ZTE.view(size)
        if ctx.into:
            return d_x_MBTE, d_y_MBTE, *[None] * 5
        d_gain_ME = d_gain_NE.view(size[0], -1, size[3]).sum(1).to(dtype)
        d_bias_ME = d_bias_NE.view(size[0], -1, size[3]).sum(1).to(dtype) if ctx.has_bias else None
        return d_x_MBTE, d_y_MBTE, d_gain_ME, d_bias_ME, None, None, None


class Attention(Function):
    """Causal scaled dot-product attention (Vaswani et al., 2017) before the output projection: (M, B, T, E).

    Takes queries, keys and values of all heads beside each other, (M, B, T, 3 * E).
    """

    @staticmethod
    def forward(ctx: Any, qkv_MBTF: Tensor, drop: DropoutKeys | None, heads: int, ops: Ops) -> Tensor:
        qkv_ZTF = qkv_MBTF.flatten(0, 1)
        if ops.attention:
            y_ZTE, lse_ZHT = ops.attention(qkv_ZTF, drop, heads, ctx.needs_input_grad[0])
            ctx.save_for_backward(qkv_ZTF, y_ZTE, lse_ZHT)
        else:
            y_ZTE, kept = _attend_blocks(qkv_ZTF, drop, heads, ops)
            ctx.save_for_backward(*kept)
        ctx.drop, ctx.ops = drop, ops
        return y_ZTE.view(*qkv_MBTF.shape[:3], -1)

    @staticmethod
    def backward(ctx: Any, d_y_MBTE: Tensor) -> tuple[Tensor | None, ...]:
        d_y_ZTE = d_y_MBTE.flatten(0, 1)
        if ctx.ops.attention_backward:
            d_qkv_ZTF = ctx.ops.attention_backward(d_y_ZTE, *ctx.saved_tensors, ctx.drop)
        else:
            d_qkv_ZTF = _attend_blocks_backward(d_y_ZTE, ctx.saved_tensors, ctx.drop, ctx.ops)
        return d_qkv_ZTF.view(*d_y_MBTE.shape[:3], -1), None, None, None


def attention(qkv_MBTF: Tensor, drop: DropoutKeys | None, heads: Sequence[int], ops: Ops) -> Tensor:
    """Attention, (M, B, T, E), of members that may differ in their number of heads: neighbours with the same at once."""
    groups = [(number, len(list(same))) for number, same in groupby(heads)]
    if len(groups) == 1:
        return Attention.apply(qkv_MBTF, drop, heads[0], ops)
    sizes, B = [size for _, size in groups], qkv_MBTF.shape[1]
    words = zip(*(word_Z.split([size * B for size in sizes]) for word_Z in drop), strict=True) if drop else repeat(None)
    parts = [
        Attention.apply(part_MBTF, own and DropoutKeys(*own), number, ops)
        for part_MBTF, (number, _), own in zip(qkv_MBTF.split(sizes), groups, words, strict=False)
    ]
    return torch.cat(parts)


def _attend_blocks(
    qkv_ZTF: Tensor, drop: DropoutKeys | None, heads: int, ops: Ops
) -> tuple[Tensor, tuple[Tensor, ...]]:
    """(y (Z, T, E), tensors for the backward pass). Blocks of queries skip most of the future, which no query sees."""
    qkv_XZHTD = ops.split_heads(qkv_ZTF, 3, heads)
    q, k, v = qkv_XZHTD.flatten(1, 2)
    (Z, _, T, D), y, kept = qkv_XZHTD.shape[1:], torch.empty_like(q), []
    for first, last in _blocks(T):
        scores_ZHQK = torch.bmm(q[:, first:last], k[:, :last].transpose(1, 2)).unflatten(0, (Z, heads))
        weights_ZHQK, dropped_ZHQK = ops.attend(scores_ZHQK, drop, 1 / math.sqrt(D), T)
        torch.bmm(dropped_ZHQK.flatten(0, 1), v[:, :last], out=y[:, first:last])
        kept += [weights_ZHQK, dropped_ZHQK]
    return ops.merge_heads(y.view(1, Z, heads, T, D)), (q, k, v, *kept)


def _attend_blocks_backward(d_y_ZTE: Tensor, kept: tuple[Tensor, ...], drop: DropoutKeys | None, ops: Ops) -> Tensor:
    q, k, v, *rest = kept
    (Z, T, _), heads, D = d_y_ZTE.shape, rest[0].shape[1], q.shape[2]
    d_y = ops.split_heads(d_y_ZTE, 1, heads).view_as(q)
    d_qkv_XZHTD = q.new_empty(3, Z, heads, T, D)
    d_q, d_k, d_v = d_qkv_XZHTD.flatten(1, 2)
    for first, last in reversed(list(_blocks(T))):
        dropped, weights_ZHQK = rest.pop().flatten(0, 1), rest.pop()
        d_dropped = torch.bmm(d_y[:, first:last], v[:, :last].transpose(1, 2))
        d_dropped_ZHQK = d_dropped.view_as(weights_ZHQK)
        d_scores_ZHQK = ops.attend_backward(d_dropped_ZHQK, weights_ZHQK, drop, 1 / math.sqrt(D), T)
        d_scores = d_scores_ZHQK.flatten(0, 1)
        torch.bmm(d_scores, k[:, :last], out=d_q[:, first:last])
        for d, rows, by in ((d_k, d_scores, q), (d_v, dropped, d_y)):
            if last == T:
                torch.bmm(rows.transpose(1, 2), by[:, first:last], out=d)
            else:
                d[:, :last].baddbmm_(rows.transpose(1, 2), by[:, first:last])
    return ops.merge_heads(d_qkv_XZHTD)


def _blocks(T: int) -> Iterator[tuple[int, int]]:
    """(first, last + 1) of each block of queries."""
    size = max(LEAST_QUERIES, -(-T // MOST_BLOCKS))
    return ((first, min(first + size, T)) for first in range(0, T, size))


def seen_share(T: int) -> float:
    """The share of all T * T pairs of positions that attention computes, masked ones included."""
    return sum(last * (last - first) for first, last in _blocks(T)) / T**2


class Gelu(Function):
    """x times the normal distribution function at x (Hendrycks & Gimpel, 2016), (M, B, T, F)."""

    @staticmethod
    def forward(ctx: Any, x_MBTF: Tensor, ops: Ops) -> Tensor:
        y_ZTF, kept_ZTF = ops.gelu(x_MBTF.flatten(0, 1), ctx.needs_input_grad[0])
        ctx.save_for_backward(kept_ZTF)
        ctx.ops = ops
        return y_ZTF.view(x_MBTF.shape)

    @staticmethod
    def backward(ctx: Any, d_y_MBTF: Tensor) -> tuple[Tensor | None, ...]:
        d_x_ZTF = ctx.ops.gelu_backward(d_y_MBTF.flatten(0, 1), *ctx.saved_tensors)
        return d_x_ZTF.view(d_y_MBTF.shape), None
