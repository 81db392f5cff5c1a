"""Machines that a study could run on, from a description, and how fast they would be: measured here, or assumed.

What is assumed of a GPU is in this file alone: its published peak and memory, and one model of how much of that a study
gets. No part of it was measured, so a time that stands on it says so.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from nanostudy.data.corpus import Corpus
from nanostudy.errors import UsageError
from nanostudy.model.gpt import flops_per_token
from nanostudy.settings import Experiment
from nanostudy.study.plan import Pace, cost, shape_of, update_flops
from nanostudy.training.train import EVALUATION_TOKENS


@dataclass(frozen=True)
class Gpu:
    """As its maker publishes it: dense products in `precision` with sums in fp32, and memory."""

    name: str
    peak: float  # floating-point operations per second
    memory: int  # bytes
    precision: str  # what a study would take there

    def is_called(self, device_name: str) -> bool:
        """Whether a driver's name of a device, such as NVIDIA A100-SXM4-80GB, is of this kind."""
        return re.search(rf"\b{self.name}\b(?!.*Laptop)", device_name) is not None


GPUS = {
    name: Gpu(name, peak * 1e12, memory * 10**9, precision)
    for name, peak, memory, precision in (
        ("T4", 65, 16, "fp16"),
        ("V100", 125, 16, "fp16"),
        ("RTX 3090", 71, 24, "bf16"),
        ("RTX 4090", 165, 24, "bf16"),
        ("A10", 125, 24, "bf16"),
        ("L4", 121, 24, "bf16"),
        ("A100", 312, 80, "bf16"),
        ("H100", 989, 80, "bf16"),
        ("H200", 989, 141, "bf16"),
        ("B200", 2250, 180, "bf16"),
    )
}
# The model of how much a study gets. A step starts kernels one after another, however many members there are; the arithmetic of
# narrow models keeps a GPU's product units waiting for memory.
SHARE = 0.1  # of the published peak
KERNELS = 60  # that a step starts for each layer, and as many apart from the layers; an evaluation or a token: a third
LAUNCH = 8e-6  # seconds each
GPU_START = 15.0  # seconds from a worker's start to its first step: its libraries, and kernels compiled or loaded
CORE_START = 4.0  # likewise on a CPU

GRAMMAR = "8xH200, 2xA100 40GB (GPUs), 64 cores, 16x8 cores 32GiB (16 machines of 8 cores and 32 GiB each)"
UNITS = {"gib": 2**30, "gb": 10**9}
MOST = 1_000_000  # workers


@dataclass(frozen=True)
class Machines:
    """What a description says."""

    text: str
    gpu: Gpu | None  # None: a worker a core
    workers: int
    memory: float | None  # bytes of one worker; None: not said

    @property
    def device(self) -> str:
        return "cuda" if self.gpu else "cpu"


def parse_machines(text: str) -> Machines:
    """`[COUNTx]GPU [MEMORY]` or `[MACHINESx]CORES cores [MEMORY]`, the memory of one GPU or one machine. Raises UsageError."""
    form = r"(?:(\d+)\s*[x×]\s*)?(\S.*?)(?:[\s,]+(\d+(?:\.\d+)?)\s*(gib|gb))?"
    read = re.fullmatch(form, text.strip(), re.IGNORECASE)
    if not read:
        raise UsageError(f"--plan-for {text!r} is not understood. For example: {GRAMMAR}.")
    count, what = int(read[1] or 1), read[2]
    memory = None if read[3] is None else float(read[3]) * UNITS[read[4].lower()]
    cores = re.fullmatch(r"(\d+)\s*cores?", what, re.IGNORECASE)
    gpu = next((gpu for name, gpu in GPUS.items() if _plain(name) == _plain(what)), None)
    if not cores and not gpu:
        raise UsageError(
            f"--plan-for {text!r}: {what!r} is no GPU that is known here ({', '.join(GPUS)}) and no number of cores. "
            f"For example: {GRAMMAR}."
        )
    each = int(cores[1]) if cores else 1
    if not 0 < count * each <= MOST:
        raise UsageError(f"--plan-for {text!r}: {count * each:,} workers; from 1 to {MOST:,} can be planned for.")
    if gpu:
        return Machines(text, gpu, count, gpu.memory if memory is None else memory)
    return Machines(text, None, count * each, None if memory is None else memory / each)


def _plain(name: str) -> str:
    return re.sub(r"[\s_-]", "", name).lower()


@dataclass(frozen=True)
class MeasuredSpeed:
    """A worker like those that were calibrated, at the width that its stacks were calibrated with."""

    pace: Pace
    start: float

    def update(self, experiment: Experiment, corpus: Corpus) -> tuple[float, float]:
        size = update_flops(experiment, corpus)
        return 0.0, size / self.pace.training_rate(size)

    def evaluations(self, experiment: Experiment, corpus: Corpus) -> float:
        rate = self.pace.evaluation_rate(update_flops(experiment, corpus))
        return cost(experiment, corpus).evaluation_flops / rate

    def token(self, experiment: Experiment, corpus: Corpus) -> tuple[float, float]:
        rate = self.pace.evaluation_rate(update_flops(experiment, corpus))
        return _launches(experiment) / 3 * LAUNCH, flops_per_token(shape_of(experiment, corpus)) / 3 / rate


@dataclass(frozen=True)
class AssumedSpeed:
    """A GPU that nobody measured."""

    gpu: Gpu
    start: float = GPU_START

    def update(self, experiment: Experiment, corpus: Corpus) -> tuple[float, float]:
        fixed = experiment.gradient_accumulation_steps * _launches(experiment) * LAUNCH
        return fixed, update_flops(experiment, corpus) / (SHARE * self.gpu.peak)

    def evaluations(self, experiment: Experiment, corpus: Corpus) -> float:
        flops, a_token = cost(experiment, corpus).evaluation_flops, flops_per_token(shape_of(experiment, corpus)) / 3
        batches = flops / a_token / EVALUATION_TOKENS
        return batches * _launches(experiment) / 3 * LAUNCH + flops / (SHARE * self.gpu.peak)

    def token(self, experiment: Experiment, corpus: Corpus) -> tuple[float, float]:
        a_token = flops_per_token(shape_of(experiment, corpus)) / 3
        return _launches(experiment) / 3 * LAUNCH, a_token / (SHARE * self.gpu.peak)

    def __str__(self) -> str:
        return (
            f"assumed, not measured: {SHARE:.0%} of the {self.gpu.peak / 1e12:,.0f} TFLOP/s in {self.gpu.precision} that are "
            f"published for {self.gpu.name}, and {LAUNCH * 1e6:.0f} µs for each of a step's {KERNELS} kernels a layer; "
            "it may well take half or twice as long"
        )


def _launches(experiment: Experiment) -> int:
    """Kernels of a step forward, backward and of the optimizer."""
    return KERNELS * (1 + experiment.n_layer)
