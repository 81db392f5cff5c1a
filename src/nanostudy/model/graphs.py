"""CUDA graphs: what a function does on a GPU, recorded once and replayed with one call of the driver."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor


def record(function: Callable[[], tuple[Tensor, ...]]) -> Callable[[], tuple[Tensor, ...]]:
    """What replays it, on the same memory; its results are overwritten by the next replay. Recording computes nothing.

    The function must have run before, which compiles kernels, and must neither wait for the device nor copy from the host.
    """
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = function()

    def replay() -> tuple[Tensor, ...]:
        graph.replay()
        return results

    return replay
