"""What the machine could do at most: rates of matrix products, and of moving memory."""

from __future__ import annotations

import time
from collections.abc import Callable

import torch

from nanostudy.device import product_rate
from nanostudy.model.config import GPTConfig, flops_per_token
from nanostudy.training.machine import DTYPES, Machine


def best(run: Callable[[], object], seconds: float = 0.3) -> float:
    """Seconds of the fastest call."""
    run()
    fastest, end = float("inf"), time.perf_counter() + seconds
    while time.perf_counter() < end:
        start = time.perf_counter()
        run()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        fastest = min(fastest, time.perf_counter() - start)
    return fastest


def bandwidth(device: torch.device, size: int = 2**28) -> float:
    """Bytes a second of copying what no cache holds: read and written."""
    source = torch.ones(size // 4, device=device)
    target = torch.empty_like(source)
    return 2 * size / best(lambda: target.copy_(source))


def ceilings(machine: Machine) -> dict[str, float]:
    rates = {p: product_rate(machine.device, DTYPES[p]) for p in ("fp32", "bf16")}
    return {f"{p} products, FLOP/s": rate for p, rate in rates.items()} | {"memory, bytes/s": bandwidth(machine.device)}


def share_of_ceiling(shape: GPTConfig, tokens_per_second: float, rate: float) -> float:
    """Of the machine's rate of products: what the model's arithmetic at this speed amounts to."""
    return tokens_per_second * flops_per_token(shape) / rate
