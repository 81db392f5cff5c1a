"""Compiled operations for a device: C++ on a CPU (cpu.py), Triton on a GPU (gpu.py).

A machine builds them once and keeps them in the user's cache. They are optional: ops.Ops computes the same, more slowly.
"""

from __future__ import annotations

import os

import torch

from nanostudy.errors import KernelsUnavailable
from nanostudy.model.kernels.cpu import native_ops
from nanostudy.model.kernels.gpu import triton_ops
from nanostudy.model.ops import Ops

WITHOUT = "NANOSTUDY_WITHOUT_KERNELS"  # the environment of processes that must do without: why


def compiled_ops(device: torch.device, dtype: torch.dtype) -> Ops:
    """The operations for activations in this dtype. Raises KernelsUnavailable."""
    if reason := os.environ.get(WITHOUT):
        raise KernelsUnavailable(reason)
    if device.type == "cpu":
        return native_ops(dtype)
    if device.type == "cuda":
        return triton_ops(device)
    raise KernelsUnavailable(f"there are none for {device.type}")
