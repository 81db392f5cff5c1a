"""The reference operations traced by PyTorch's compiler, one kernel each: for GPUs."""

from __future__ import annotations

import os
from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import Tensor

from nanostudy.atomic import cache_of_code
from nanostudy.errors import KernelsUnavailable, error_line
from nanostudy.model.ops import REFERENCE, DropoutKeys, Ops


@cache
def traced_ops(device: torch.device, dtype: torch.dtype) -> Ops:
    """REFERENCE, compiled. PyTorch compiles an operation at its first call and keeps the kernel on disk for later processes.

    One kernel serves every size of the leading dimension (`adamw_kernel`: of both dimensions). Any other new size compiles
    another kernel. Earlier calls never change the kernel of a later one, so results do not depend on them. Raises
    KernelsUnavailable where the compiler fails on small tensors.
    """
    if "TORCHINDUCTOR_CACHE_DIR" not in os.environ:
        try:
            os.environ["TORCHINDUCTOR_CACHE_DIR"] = str(cache_of_code("kernels") / "traced")
        except OSError as problem:
            raise KernelsUnavailable(f"they cannot be kept: {problem}") from None
    torch._dynamo.config.recompile_limit = torch._dynamo.config.accumulated_recompile_limit = 10**6
    ops = Ops(
        **{name: _Traced(op, 2 if name == "adamw_kernel" else 1) for name, op in REFERENCE._asdict().items() if op}
    )
    try:
        _call_each(ops, device, dtype)
    except Exception as problem:  # whatever a missing or unsuitable compiler raises
        raise KernelsUnavailable(f"PyTorch's compiler does not work here: {error_line(problem)}") from None
    return ops


def _call_each(ops: Ops, device: torch.device, dtype: torch.dtype) -> None:
    """Calls every operation once: two sequences of one member, two positions, one head of width four."""
    word = torch.zeros(2, dtype=torch.int32, device=device)
    drop = DropoutKeys(word, word, word, torch.ones(2, device=device))
    x, gain = torch.zeros(2, 2, 4, dtype=dtype, device=device), torch.ones(1, 4, dtype=dtype, device=device)
    scores = torch.zeros(2, 1, 2, 2, dtype=dtype, device=device)
    targets, losses = torch.zeros(2, 2, dtype=torch.int64, device=device), torch.zeros(2, 2, device=device)
    rows = [torch.zeros(2, 4, device=device) for _ in range(4)]
    column = torch.ones(2, 1, device=device)
    ops.residual_norm(x, x, drop, gain, None)
    ops.residual_norm_backward(x, x, x, drop, gain)
    ops.merge_heads(ops.split_heads(x, 1, 1))
    ops.attend_backward(scores, ops.attend(scores, drop, 1.0, 2)[0], drop, 1.0, 2)
    ops.cross_entropy(x, targets)
    ops.cross_entropy_backward(losses, x, targets)
    ops.gelu_backward(x, ops.gelu(x, True)[1])
    ops.norms(rows[0])
    ops.adamw_kernel(*rows, column, column > 0, *(column,) * 5)


class _Traced:
    """An operation whose first `free` dimensions may change without another kernel."""

    def __init__(self, op: Callable[..., Any], free: int) -> None:
        self.kernel = torch.compile(op, fullgraph=True, dynamic=False)
        self.free = free
        self.compiled: set[tuple[Any, ...]] = set()

    def __call__(self, *arguments: Any) -> Any:
        # layers.py has the backward passes, so whether a tensor requires a gradient must not make another kernel
        arguments = tuple(a.detach() if isinstance(a, Tensor) else a for a in arguments)
        key = tuple(_kind(argument, self.free) for argument in arguments)
        if key in self.compiled:
            return self.kernel(*arguments)
        for tensor in _tensors(arguments):
            for dimension in range(min(self.free, tensor.dim())):
                torch._dynamo.maybe_mark_dynamic(tensor, dimension)
        result = self.kernel(*arguments)
        self.compiled.add(key)
        return result


def _kind(argument: Any, free: int) -> Any:
    """What a kernel is specialised for. A free dimension of size 1 is a kind of its own: it broadcasts."""
    if isinstance(argument, Tensor):
        ones = tuple(size == 1 for size in argument.shape[:free])
        return argument.dtype, argument.shape[free:], ones, argument.is_contiguous()
    return argument if not isinstance(argument, DropoutKeys) else True


def _tensors(arguments: tuple[Any, ...]) -> list[Tensor]:
    flat = (part for a in arguments for part in (a if isinstance(a, DropoutKeys) else (a,)))
    return [part for part in flat if isinstance(part, Tensor)]
