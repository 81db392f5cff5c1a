"""The operations as Triton kernels (triton_kernels.py): for NVIDIA GPUs of compute capability 8.0 and newer.

A kernel is compiled at its first call for a width, a vocabulary and a dtype, within about a second, and stays on disk for later
processes. The number of members, sequences and positions compiles nothing.
"""

from __future__ import annotations

import math
import os
from dataclasses import fields
from functools import cache
from typing import Any

import torch
from torch import Tensor

from nanostudy.atomic import cache_of_code
from nanostudy.errors import KernelsUnavailable, error_line
from nanostudy.model.engine import LEAST_PIECE, LOSS_SCALE_GROWTH_INTERVAL, SMALLEST_LOSS_SCALE, State, sum_piece
from nanostudy.model.ops import EPSILON, DropoutKeys, Ops
from nanostudy.model.optim import EPSILON as ADAM_EPSILON
from nanostudy.model.optim import StepSettings

LEAST_CAPABILITY = (8, 0)
TILE = 2048  # elements that one program holds at a time
SUMMED = 128  # columns that a program sums
KEYS = 256  # of dropout, one program's
SQUARES_BLOCK = 16384


@cache
def triton_ops(device: torch.device) -> Ops:
    """For tensors on this GPU, in any dtype. Compiles nothing. Raises KernelsUnavailable."""
    capability = torch.cuda.get_device_capability(device)
    if capability < LEAST_CAPABILITY:
        raise KernelsUnavailable(f"they need compute capability 8.0, and this GPU has {'.'.join(map(str, capability))}")
    if "TRITON_CACHE_DIR" not in os.environ:
        try:
            os.environ["TRITON_CACHE_DIR"] = str(cache_of_code("kernels") / "triton")
        except OSError as problem:
            raise KernelsUnavailable(f"they cannot be kept: {problem}") from None
    return operations()


def operations() -> Ops:
    """Raises KernelsUnavailable where Triton is missing: it comes with PyTorch's builds for CUDA on Linux."""
    try:
        from nanostudy.model.kernels import triton_kernels
    except ImportError as problem:
        raise KernelsUnavailable(f"Triton is missing: {error_line(problem)}") from None
    return _Triton(triton_kernels)


class _Triton(Ops):
    """The operations that have a kernel. Heads are split only by the reference's attention, which a whole one replaces."""

    def __init__(self, kernels: Any) -> None:
        self.kernels = kernels

    def windows(self, tokens: Tensor, starts_MB: Tensor, T: int) -> tuple[Tensor, Tensor]:
        starts_MB = starts_MB.contiguous()
        inputs_MBT, targets_MBT = (starts_MB.new_empty(*starts_MB.shape, T) for _ in range(2))
        size = inputs_MBT.numel()
        self.kernels.windows[(_blocks(size, TILE),)](tokens, starts_MB, inputs_MBT, targets_MBT, size, T, TILE)
        return inputs_MBT, targets_MBT

    def dropout_words(self, keys_MB: Tensor, rate_M: Tensor, sites: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        keys_MB = keys_MB.contiguous()
        Z = keys_MB.numel()
        low_SZ, high_SZ, threshold_SZ = keys_MB.new_empty(3, sites, Z, dtype=torch.int32)
        scale_Z = rate_M.new_empty(Z)
        self.kernels.dropout_words[(_blocks(Z, KEYS), sites)](
            *(keys_MB, rate_M, low_SZ, high_SZ, threshold_SZ, scale_Z, Z, keys_MB.shape[1], KEYS)
        )
        return low_SZ, high_SZ, threshold_SZ, scale_Z

    def embed(self, tokens_MBT: Tensor, token_MVE: Tensor, position_MTE: Tensor) -> Tensor:
        tokens_MBT, token_MVE, position_MTE = tokens_MBT.contiguous(), _rows(token_MVE), _rows(position_MTE)
        (M, B, T), E = tokens_MBT.shape, token_MVE.shape[2]
        y_MBTE = token_MVE.new_empty(M, B, T, E)
        rows, columns = _tile(E)
        self.kernels.embed[(_blocks(M * B * T, rows),)](
            *(tokens_MBT, token_MVE, position_MTE, y_MBTE, M * B * T, T, B),
            *(token_MVE.stride(0), position_MTE.stride(0), E, columns, rows),
        )
        return y_MBTE

    def one_hot(self, tokens_MBT: Tensor, vocabulary: int, dtype: torch.dtype) -> Tensor:
        tokens_MN = tokens_MBT.flatten(1).contiguous()
        y_MNV = tokens_MN.new_empty(*tokens_MN.shape, vocabulary, dtype=dtype)
        self.kernels.one_hot[(_blocks(y_MNV.numel(), TILE),)](tokens_MN, y_MNV, y_MNV.numel(), vocabulary, TILE)
        return y_MNV

    def residual_norm(
        self, x_ZTE: Tensor | None, y_ZTE: Tensor, drop: DropoutKeys | None, gain_ME: Tensor, bias_ME: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        (Z, T, E), y_ZTE = y_ZTE.shape, y_ZTE.contiguous()
        total_ZTE, norm_ZTE = torch.empty_like(y_ZTE), torch.empty_like(y_ZTE)
        x, bias = y_ZTE if x_ZTE is None else x_ZTE.contiguous(), gain_ME if bias_ME is None else bias_ME
        rows, columns = _tile(E)
        self.kernels.residual_norm[(_blocks(Z * T, rows),)](
            *(x, y_ZTE, *_words(drop, gain_ME), gain_ME, bias, total_ZTE, norm_ZTE, Z * T, T, Z // len(gain_ME)),
            *(gain_ME.stride(0), EPSILON, x_ZTE is not None, bias_ME is not None, drop is not None, E, columns, rows),
        )
        return total_ZTE, norm_ZTE

    def residual_norm_backward(
        self,
        d_sum_ZTE: Tensor,
        d_norm_ZTE: Tensor,
        sum_ZTE: Tensor,
        drop: DropoutKeys | None,
        gain_ME: Tensor,
        into: tuple[Tensor, Tensor | None] | None = None,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """With `into` the gradients of gain and bias go there, fp32 (M, K, E), each of a piece of a member's rows."""
        (Z, T, E), M = sum_ZTE.shape, len(gain_ME)
        d_sum_ZTE, d_norm_ZTE, piece = d_sum_ZTE.contiguous(), d_norm_ZTE.contiguous(), sum_piece(Z // M * T)
        d_x_ZTE, K = torch.empty_like(sum_ZTE), _blocks(Z // M * T, piece)
        d_y_ZTE = d_x_ZTE if drop is None else torch.empty_like(sum_ZTE)
        d_gain_MKE, d_bias_MKE = into or sum_ZTE.new_empty(2, M, K, E, dtype=torch.float32)
        has_bias, d_bias_MKE = d_bias_MKE is not None, d_gain_MKE if d_bias_MKE is None else d_bias_MKE
        rows, columns = _tile(E)
        self.kernels.residual_norm_backward[(K, M)](
            *(d_sum_ZTE, d_norm_ZTE, sum_ZTE, *_words(drop, gain_ME), gain_ME, d_x_ZTE, d_y_ZTE, d_gain_MKE),
            *(d_bias_MKE, Z // M * T, T, Z // M, piece, gain_ME.stride(0), d_gain_MKE.stride(0), d_gain_MKE.stride(1)),
            *(EPSILON, has_bias, drop is not None, E, columns, min(rows, LEAST_PIECE)),
        )
        return d_x_ZTE, d_y_ZTE, d_gain_MKE.flatten(0, 1), d_bias_MKE.flatten(0, 1)

    def sums(self, x_MRC: Tensor, into_MKC: Tensor, piece: int) -> None:
        """Of so many rows each, in order. Columns lie beside each other in memory."""
        (M, R, C), K = x_MRC.shape, into_MKC.shape[1]
        self.kernels.sums[(_blocks(C, SUMMED), K, M)](
            *(x_MRC, into_MKC, R, piece, C, *x_MRC.stride()[:2], *into_MKC.stride()[:2], SUMMED, TILE // SUMMED)
        )

    def attention(
        self, qkv_ZTF: Tensor, drop: DropoutKeys | None, heads: int, trains: bool
    ) -> tuple[Tensor, Tensor | None]:
        (Z, T, F), qkv_ZTF = qkv_ZTF.shape, qkv_ZTF.contiguous()
        y_ZTE = qkv_ZTF.new_empty(Z, T, F // 3)
        lse_ZHT = qkv_ZTF.new_empty(Z, heads, T, dtype=torch.float32)
        block, how = _attention_block(qkv_ZTF.dtype, F // 3 // heads)
        self.kernels.attention[(Z * heads, _blocks(T, block))](  # there may be 2**31 of the first alone
            *(qkv_ZTF, y_ZTE, lse_ZHT, *_words(drop, lse_ZHT), *_heads(y_ZTE, lse_ZHT, drop), block, block), **how
        )
        return y_ZTE, lse_ZHT if trains else None

    def attention_backward(
        self, d_y_ZTE: Tensor, qkv_ZTF: Tensor, y_ZTE: Tensor, lse_ZHT: Tensor, drop: DropoutKeys | None
    ) -> Tensor:
        d_y_ZTE, qkv_ZTF = d_y_ZTE.contiguous(), qkv_ZTF.contiguous()
        d_qkv_ZTF = torch.empty_like(qkv_ZTF)
        (Z, H, T), E = lse_ZHT.shape, d_y_ZTE.shape[2]
        block, how = _attention_block(qkv_ZTF.dtype, E // H)
        for of_keys, queries in ((True, max(16, block // 2)), (False, block)):
            # half as many queries at a time beside two sums: more would not fit into registers
            self.kernels.attention_backward[(Z * H, _blocks(T, block))](
                *(qkv_ZTF, y_ZTE, d_y_ZTE, lse_ZHT, d_qkv_ZTF, *_words(drop, lse_ZHT), *_heads(y_ZTE, lse_ZHT, drop)),
                *(of_keys, queries, block),
                **how,
            )
        return d_qkv_ZTF

    def cross_entropy(self, logits_ZTV: Tensor, targets_ZT: Tensor) -> Tensor:
        logits_ZTV, targets_ZT = logits_ZTV.contiguous(), targets_ZT.contiguous()
        losses_ZT = targets_ZT.new_empty(targets_ZT.shape, dtype=torch.float32)
        rows, columns = _tile(logits_ZTV.shape[2], TILE)
        self.kernels.cross_entropy[(_blocks(targets_ZT.numel(), rows),)](
            *(logits_ZTV, targets_ZT, losses_ZT, targets_ZT.numel(), logits_ZTV.shape[2], columns, rows)
        )
        return losses_ZT

    def cross_entropy_backward(self, d_losses_ZT: Tensor, logits_ZTV: Tensor, targets_ZT: Tensor) -> Tensor:
        d_losses_ZT, logits_ZTV, targets_ZT = d_losses_ZT.contiguous(), logits_ZTV.contiguous(), targets_ZT.contiguous()
        d_logits_ZTV = torch.empty_like(logits_ZTV)
        rows, columns = _tile(logits_ZTV.shape[2], TILE)
        self.kernels.cross_entropy_backward[(_blocks(targets_ZT.numel(), rows),)](
            *(d_losses_ZT, logits_ZTV, targets_ZT, d_logits_ZTV, targets_ZT.numel(), logits_ZTV.shape[2]),
            *(columns, rows),
        )
        return d_logits_ZTV

    def gelu(self, x: Tensor, trains: bool) -> tuple[Tensor, Tensor]:
        """(GELU of x, x)"""
        x = x.contiguous()
        y = torch.empty_like(x)
        self.kernels.gelu[(_blocks(x.numel(), TILE),)](x, y, x.numel(), TILE)
        return y, x

    def gelu_backward(self, d_y: Tensor, kept: Tensor) -> Tensor:
        d_y, d_x = d_y.contiguous(), torch.empty_like(kept)
        self.kernels.gelu_backward[(_blocks(d_x.numel(), TILE),)](d_y, kept, d_x, d_x.numel(), TILE)
        return d_x

    def means(self, losses_MBT: Tensor) -> Tensor:
        means_M, count = losses_MBT.new_empty(len(losses_MBT)), losses_MBT[0].numel()
        self.kernels.means[(len(means_M),)](losses_MBT.contiguous(), means_M, count, TILE)
        return means_M

    def update(
        self, state: State, loss_M: Tensor, grads_MP: Tensor, settings: StepSettings, decayed: int, scaled: bool
    ) -> Tensor:
        M, P = grads_MP.shape
        parts, norms_M = _blocks(P, SQUARES_BLOCK), grads_MP.new_empty(M, dtype=torch.float32)
        squares_MK, numbers_7M = (norms_M.new_empty(size) for size in ((M, parts), (7, M)))
        self.kernels.squares[(parts, M)](grads_MP, squares_MK, P, grads_MP.stride(0), SQUARES_BLOCK)
        self.kernels.step_sizes[(M,)](
            *(squares_MK, loss_M.contiguous(), state.loss_scale, state.good_steps, state.updates, state.diverged),
            *(getattr(settings, field.name).contiguous() for field in fields(settings)),
            *(norms_M, numbers_7M, parts, scaled, LOSS_SCALE_GROWTH_INTERVAL, SMALLEST_LOSS_SCALE, TILE),
        )
        self.kernels.adamw[(_blocks(P, TILE), M)](
            *(state.params, grads_MP, state.exp_avg, state.exp_avg_sq, numbers_7M, P, decayed),
            *(state.params.stride(0), grads_MP.stride(0), ADAM_EPSILON, TILE),
        )
        return norms_M


def _blocks(size: int, block: int) -> int:
    return -(-size // block)


def _tile(width: int, most: int | None = None) -> tuple[int, int]:
    """(rows, columns) of a block: powers of two, at most so many columns."""
    columns = 1 << max(4, (width - 1).bit_length())
    columns = columns if most is None else min(columns, most)
    return max(1, TILE // columns), columns


def _rows(x_MRE: Tensor) -> Tensor:
    """Rows of a member beside each other in memory, as in a buffer of parameters."""
    return x_MRE if x_MRE.stride()[1:] == (x_MRE.shape[2], 1) else x_MRE.contiguous()


def _words(drop: DropoutKeys | None, nothing: Tensor) -> tuple[Tensor, ...]:
    return (nothing,) * 4 if drop is None else tuple(word.contiguous() for word in drop)


def _heads(y_ZTE: Tensor, lse_ZHT: Tensor, drop: DropoutKeys | None) -> tuple[Any, ...]:
    """The last arguments of the kernels of attention, but the sizes of blocks."""
    (_, T, E), heads = y_ZTE.shape, lse_ZHT.shape[1]
    return T, 1 / math.sqrt(E // heads), drop is not None, E, heads, 1 << max(4, (E // heads - 1).bit_length())


def _attention_block(dtype: torch.dtype, width: int) -> tuple[int, dict[str, int]]:
    """(queries and keys that a program holds, how it is compiled): as many as registers and shared memory hold."""
    half = dtype != torch.float32
    if width > 128:
        return 16, {"num_warps": 4 if half else 8, "num_stages": 1}
    if width > 64:
        return (32 if half else 16), {"num_warps": 4, "num_stages": 2 if half else 1}
    return (64, {"num_warps": 4, "num_stages": 2}) if half else (32, {"num_warps": 8, "num_stages": 1})
