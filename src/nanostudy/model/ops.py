"""The operations between a stack's matrix products, in plain PyTorch, each with its backward pass: the reference for kernels/.

Letters as in gpt.py; Z stands for the sequences of all members, M * B, Q for queries and K for keys.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from nanostudy.model import randomness
from nanostudy.model.optim import adamw_kernel
from nanostudy.model.randomness import keep_mask

EPSILON = 1e-5  # of LayerNorm, as in nanoGPT


class DropoutKeys(NamedTuple):
    """The keys of one of the model's dropouts, int32 (Z,) each (see randomness.dropout_words), and its scale 1 / (1 - rate),
    fp32 (Z,)."""

    low: Tensor
    high: Tensor
    threshold: Tensor
    scale: Tensor


def _dropped(x: Tensor, drop: DropoutKeys | None, strides: tuple[int, ...], start: int = 0) -> Tensor:
    """In x's dtype."""
    if drop is None:
        return x
    kept = keep_mask(drop.low, drop.high, drop.threshold, x.shape[1:], strides, start)
    scale = drop.scale.view(-1, *(1 for _ in strides))
    return x * kept.to(x.dtype).mul_(scale.to(x.dtype))


def _each_sequence(row_ME: Tensor, Z: int) -> Tensor:
    """(Z, 1, E)"""
    return row_ME[:, None].expand(-1, Z // len(row_ME), -1).reshape(Z, 1, -1)


class Ops:
    """Every operation, here in PyTorch's steps: the reference. Subclasses (kernels/) put one fused kernel in the place of each, which
    keeps intermediate results in registers. They agree up to rounding, and in the dropout masks to the bit.

    Operations that may be None are there where a machine has a kernel for them: `attention` computes whole sequences at once,
    `update` is the end of engine.train_step, and with `sums` gradients are written in place.
    """

    attention: Callable[..., tuple[Tensor, Tensor | None]] | None = None
    attention_backward: Callable[..., Tensor] | None = None
    sums: Callable[..., None] | None = None
    update: Callable[..., Tensor] | None = None

    def windows(self, tokens: Tensor, starts_MB: Tensor, T: int) -> tuple[Tensor, Tensor]:
        """The T token ids from each start on, and those that follow them: int64 (M, B, T) each."""
        positions = torch.arange(T + 1, device=starts_MB.device)
        window_MBT = tokens[starts_MB[..., None] + positions].long()
        return window_MBT[..., :-1], window_MBT[..., 1:]

    def dropout_words(self, keys_MB: Tensor, rate_M: Tensor, sites: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """The fields of DropoutKeys; the words of all `sites` of a model, (S, Z) each."""
        low_SZ, high_SZ, threshold_SZ = (word.flatten(1) for word in randomness.dropout_words(keys_MB, rate_M, sites))
        return low_SZ, high_SZ, threshold_SZ, (1 / (1 - rate_M)).repeat_interleave(keys_MB.shape[1])

    def embed(self, tokens_MBT: Tensor, token_MVE: Tensor, position_MTE: Tensor) -> Tensor:
        """(M, B, T, E). The lookup is a batched product with one-hot rows, and so is its backward pass: deterministic on every
        device, and cheap beside the head."""
        one_hot_MNV = self.one_hot(tokens_MBT, token_MVE.shape[1], token_MVE.dtype)
        return torch.bmm(one_hot_MNV, token_MVE).unflatten(1, tokens_MBT.shape[1:]) + position_MTE[:, None]

    def one_hot(self, tokens_MBT: Tensor, vocabulary: int, dtype: torch.dtype) -> Tensor:
        """(M, N, V)"""
        ids_V = torch.arange(vocabulary, device=tokens_MBT.device)
        return (tokens_MBT.reshape(len(tokens_MBT), -1, 1) == ids_V).to(dtype)

    def residual_norm(
        self, x_ZTE: Tensor | None, y_ZTE: Tensor, drop: DropoutKeys | None, gain_ME: Tensor, bias_ME: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """(x + y with dropout, its LayerNorm): the end of one sublayer and the start of the next. x None stands for zeros."""
        E = y_ZTE.shape[2]
        kept_ZTE = _dropped(y_ZTE, drop, (E, 1))
        sum_ZTE = kept_ZTE if x_ZTE is None else x_ZTE + kept_ZTE
        # PyTorch's kernel applies one gain to all rows, and here each member has its own.
        normal_ZTE, _, rstd_ZT1 = torch.ops.aten.native_layer_norm(sum_ZTE, [E], None, None, EPSILON)
        # Where the variance overflows the kernel returns zeros, and a diverged member would look healthy.
        normal_ZTE = normal_ZTE.masked_fill(rstd_ZT1 <= 0, math.nan)
        gain_Z1E = _each_sequence(gain_ME, len(y_ZTE))
        if bias_ME is None:
            return sum_ZTE, normal_ZTE * gain_Z1E
        return sum_ZTE, torch.addcmul(_each_sequence(bias_ME, len(y_ZTE)), normal_ZTE, gain_Z1E)

    def residual_norm_backward(
        self, d_sum_ZTE: Tensor, d_norm_ZTE: Tensor, sum_ZTE: Tensor, drop: DropoutKeys | None, gain_ME: Tensor
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """(d x, d y, d gain, d bias); the last two per sequence or piece of one, in order: fp32 (N, E)."""
        E = sum_ZTE.shape[2]
        normal_ZTE, mean, rstd = torch.ops.aten.native_layer_norm(sum_ZTE, [E], None, None, EPSILON)
        d_gain_ZE = (d_norm_ZTE * normal_ZTE).sum(1, dtype=torch.float32)
        d_bias_ZE = d_norm_ZTE.sum(1, dtype=torch.float32)
        d_normal_ZTE = d_norm_ZTE * _each_sequence(gain_ME, len(sum_ZTE))
        through_ZTE, _, _ = torch.ops.aten.native_layer_norm_backward(
            d_normal_ZTE, sum_ZTE, [E], mean, rstd, None, None, [True, False, False]
        )
        d_x_ZTE = d_sum_ZTE + through_ZTE
        return d_x_ZTE, _dropped(d_x_ZTE, drop, (E, 1)), d_gain_ZE, d_bias_ZE

    def split_heads(self, x_ZTF: Tensor, parts: int, heads: int) -> Tensor:
        """(X, Z, H, T, D), contiguous: queries, keys and values (X = `parts` = 3) or one of them (1). F = X * H * D."""
        return x_ZTF.unflatten(2, (parts, heads, -1)).permute(2, 0, 3, 1, 4).contiguous()

    def merge_heads(self, y_XZHTD: Tensor) -> Tensor:
        """(Z, T, F): the inverse of `split_heads`."""
        return y_XZHTD.permute(1, 3, 0, 2, 4).flatten(2)

    def attend(
        self, scores_ZHQK: Tensor, drop: DropoutKeys | None, scale: float, context: int
    ) -> tuple[Tensor, Tensor]:
        """(attention weights, the same with dropout). The queries are the last Q of the K positions; none sees a later key.

        `context` is the sequence length that numbers the activations for the dropout mask.
        """
        Q, K = scores_ZHQK.shape[2:]
        key_K = torch.arange(K, device=scores_ZHQK.device)
        future_QK = key_K > key_K[K - Q :, None]
        weights_ZHQK = (scores_ZHQK * scale).masked_fill(future_QK, -math.inf).softmax(-1)
        return weights_ZHQK, _dropped(weights_ZHQK, drop, (context * context, context, 1), (K - Q) * context)

    def attend_backward(
        self, d_dropped_ZHQK: Tensor, weights_ZHQK: Tensor, drop: DropoutKeys | None, scale: float, context: int
    ) -> Tensor:
        """d scores."""
        Q, K = weights_ZHQK.shape[2:]
        d_weights_ZHQK = _dropped(d_dropped_ZHQK, drop, (context * context, context, 1), (K - Q) * context)
        return torch.ops.aten._softmax_backward_data(d_weights_ZHQK, weights_ZHQK, -1, weights_ZHQK.dtype) * scale

    def cross_entropy(self, logits_ZTV: Tensor, targets_ZT: Tensor) -> Tensor:
        """In nats per token, fp32 (Z, T); 0 where the target is -1."""
        logits_ZTV = logits_ZTV.float()
        hit_ZTV = torch.arange(logits_ZTV.shape[2], device=targets_ZT.device) == targets_ZT[..., None]
        losses_ZT = logits_ZTV.logsumexp(2) - torch.where(hit_ZTV, logits_ZTV, 0.0).sum(2)
        return torch.where(targets_ZT >= 0, losses_ZT, 0.0)

    def cross_entropy_backward(self, d_losses_ZT: Tensor, logits_ZTV: Tensor, targets_ZT: Tensor) -> Tensor:
        """d logits. Targets must not be -1."""
        hit_ZTV = torch.arange(logits_ZTV.shape[2], device=targets_ZT.device) == targets_ZT[..., None]
        d_logits_ZTV = logits_ZTV.float().softmax(2) - hit_ZTV.to(torch.float32)
        return (d_logits_ZTV * d_losses_ZT[..., None]).to(logits_ZTV.dtype)

    def gelu(self, x: Tensor, trains: bool) -> tuple[Tensor, Tensor]:
        """(GELU of x, the tensor that `gelu_backward` needs). Without `trains` the second may be anything."""
        return F.gelu(x), x

    def gelu_backward(self, d_y: Tensor, kept: Tensor) -> Tensor:
        return torch.ops.aten.gelu_backward(d_y, kept)

    def means(self, losses_MBT: Tensor) -> Tensor:
        return losses_MBT.mean((1, 2))

    def norms(self, rows_MP: Tensor) -> Tensor:
        """The Euclidean norm of each row, fp32 (M,)."""
        return torch.linalg.vector_norm(rows_MP, dim=1, dtype=torch.float32)

    def adamw_kernel(
        self, params_MP: Tensor, grads_MP: Tensor, exp_avg_MP: Tensor, exp_avg_sq_MP: Tensor, *numbers_M1: Tensor
    ) -> None:
        """As optim.adamw_kernel."""
        adamw_kernel(params_MP, grads_MP, exp_avg_MP, exp_avg_sq_MP, *numbers_M1)


REFERENCE = Ops()
