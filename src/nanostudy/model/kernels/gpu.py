"""The operations as Triton kernels (triton_kernels.py): for NVIDIA GPUs of compute capability 8.0 and newer.

A kernel is compiled at its first call for a width, a vocabulary and a dtype, within about a second, and stays on disk for later
processes. The number of members, sequences and positions compiles nothing.
"""

from __future__ import annotations

import math
import os
from functools import cache
from typing import Any

import torch
from torch import Tensor

from nanostudy.atomic import cache_of_code
from nanostudy.errors import KernelsUnavailable, error_line
from nanostudy.model.ops import EPSILON, REFERENCE, DropoutKeys, Ops
from nanostudy.model.optim import EPSILON as ADAM_EPSILON

LEAST_CAPABILITY = (8, 0)
TILE = 2048  # elements that one program holds at a time
POSITIONS = 64  # of a sequence, over which one program sums the gradients of LayerNorm's gain and bias
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
    own = _Triton(triton_kernels)
    return REFERENCE._replace(**{name: getattr(own, name) for name in Ops._fields if hasattr(own, name)})


class _Triton:
    """The operations that have a kernel. Heads are split only by REFERENCE's attention, which a whole one replaces."""

    def __init__(self, kernels: Any) -> None:
        self.kernels = kernels

    def residual_norm(
        self, x_ZTE: Tensor | None, y_ZTE: Tensor, drop: DropoutKeys | None, gain_ME: Tensor, bias_ME: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        (Z, T, E), y_ZTE, gain_ME = y_ZTE.shape, y_ZTE.contiguous(), gain_ME.contiguous()
        total_ZTE, norm_ZTE = torch.empty_like(y_ZTE), torch.empty_like(y_ZTE)
        x = y_ZTE if x_ZTE is None else x_ZTE.contiguous()
        bias = gain_ME if bias_ME is None else bias_ME.contiguous()
        rows, columns = _tile(E)
        self.kernels.residual_norm[(_blocks(Z * T, rows),)](
            *(x, y_ZTE, *_words(drop, gain_ME), gain_ME, bias, total_ZTE, norm_ZTE, Z * T, T, Z // len(gain_ME)),
            *(EPSILON, x_ZTE is not None, bias_ME is not None, drop is not None, E, columns, rows),
        )
        return total_ZTE, norm_ZTE

    def residual_norm_backward(
        self, d_sum_ZTE: Tensor, d_norm_ZTE: Tensor, sum_ZTE: Tensor, drop: DropoutKeys | None, gain_ME: Tensor
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        Z, T, E = sum_ZTE.shape
        d_sum_ZTE, d_norm_ZTE, gain_ME = d_sum_ZTE.contiguous(), d_norm_ZTE.contiguous(), gain_ME.contiguous()
        d_x_ZTE, parts = torch.empty_like(sum_ZTE), _blocks(T, POSITIONS)
        d_y_ZTE = d_x_ZTE if drop is None else torch.empty_like(sum_ZTE)
        d_gain, d_bias = sum_ZTE.new_empty(2, Z * parts, E, dtype=torch.float32)
        rows, columns = _tile(E)
        self.kernels.residual_norm_backward[(parts, Z)](
            *(d_sum_ZTE, d_norm_ZTE, sum_ZTE, *_words(drop, gain_ME), gain_ME, d_x_ZTE, d_y_ZTE, d_gain, d_bias, T),
            *(Z // len(gain_ME), EPSILON, drop is not None, E, columns, min(rows, POSITIONS), POSITIONS),
        )
        return d_x_ZTE, d_y_ZTE, d_gain, d_bias

    def attention(
        self, qkv_ZTF: Tensor, drop: DropoutKeys | None, heads: int, trains: bool
    ) -> tuple[Tensor, Tensor | None]:
        (Z, T, F), qkv_ZTF = qkv_ZTF.shape, qkv_ZTF.contiguous()
        y_ZTE = qkv_ZTF.new_empty(Z, T, F // 3)
        lse_ZHT = qkv_ZTF.new_empty(Z, heads, T, dtype=torch.float32)
        block, how = _attention_block(qkv_ZTF.dtype, F // 3 // heads)
        self.kernels.attention[(_blocks(T, block), Z * heads)](
            *(qkv_ZTF, y_ZTE, lse_ZHT, *_words(drop, lse_ZHT), *_heads(y_ZTE, lse_ZHT, drop), block, block), **how
        )
        return y_ZTE, lse_ZHT if trains else None

    def attention_backward(
        self, d_y_ZTE: Tensor, qkv_ZTF: Tensor, y_ZTE: Tensor, lse_ZHT: Tensor, drop: DropoutKeys | None
    ) -> Tensor:
        d_y_ZTE, qkv_ZTF = d_y_ZTE.contiguous(), qkv_ZTF.contiguous()
        d_qkv_ZTF = torch.empty_like(qkv_ZTF)
        arguments = (qkv_ZTF, y_ZTE, d_y_ZTE, lse_ZHT, d_qkv_ZTF, *_words(drop, lse_ZHT))
        (Z, H, T), E = lse_ZHT.shape, d_y_ZTE.shape[2]
        block, how = _attention_block(qkv_ZTF.dtype, E // H)
        # half as many queries at a time beside two sums: more would not fit into registers
        for kernel, queries in (
            (self.kernels.attention_backward_kv, max(16, block // 2)),
            (self.kernels.attention_backward_q, block),
        ):
            kernel[(_blocks(T, block), Z * H)](*arguments, *_heads(y_ZTE, lse_ZHT, drop), queries, block, **how)
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

    def norms(self, rows_MP: Tensor) -> Tensor:
        M, columns = rows_MP.shape
        parts = _blocks(columns, SQUARES_BLOCK)
        sums, norms_M = rows_MP.new_empty(M, parts, dtype=torch.float32), rows_MP.new_empty(M, dtype=torch.float32)
        self.kernels.squares[(parts, M)](rows_MP, sums, columns, rows_MP.stride(0), SQUARES_BLOCK)
        self.kernels.roots[(M,)](sums, norms_M, parts, TILE)
        return norms_M

    def adamw_kernel(
        self, params_MP: Tensor, grads_MP: Tensor, exp_avg_MP: Tensor, exp_avg_sq_MP: Tensor, *numbers_M1: Tensor
    ) -> None:
        M, columns = params_MP.shape  # slices of longer rows, written in place
        self.kernels.adamw[(_blocks(columns, TILE), M)](
            *(params_MP, grads_MP, exp_avg_MP, exp_avg_sq_MP, *(number_M1.contiguous() for number_M1 in numbers_M1)),
            *(columns, params_MP.stride(0), grads_MP.stride(0), ADAM_EPSILON, TILE),
        )


def _blocks(size: int, block: int) -> int:
    return -(-size // block)


def _tile(width: int, most: int | None = None) -> tuple[int, int]:
    """(rows, columns) of a block: powers of two, at most so many columns."""
    columns = 1 << max(4, (width - 1).bit_length())
    columns = columns if most is None else min(columns, most)
    return max(1, TILE // columns), columns


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
