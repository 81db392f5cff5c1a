"""Machines that a study could run on, parsed from a description, and their speed: measured here, or assumed.

Every assumption about GPUs is in this file: published peaks and memories, and one model of how much of them a study
gets. None of it was measured, and every time that depends on it says so.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass

from nanostudy.data.corpus import Corpus
from nanostudy.errors import UsageError
from nanostudy.model.config import flops_per_token
from nanostudy.settings import Experiment
from nanostudy.study.plan import Pace, cost, rate_at, shape_of, update_flops
from nanostudy.training.evaluation import evaluation_tokens
from nanostudy.training.updates import sequences_at_once


@dataclass(frozen=True)
class Gpu:
    """The maker's figures: dense products in `precision` with sums in fp32, and memory."""

    name: str
    peak: float  # floating-point operations per second
    memory: int  # bytes
    precision: str  # what a study would use there

    @property
    def launches(self) -> tuple[int, float]:
        """Kernels of a step for each layer, and seconds for each."""
        return RECORDED if self.precision == "bf16" else SINGLE

    def is_called(self, device_name: str) -> bool:
        """Whether a driver's name for a device, such as NVIDIA A100-SXM4-80GB, means this GPU."""
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
# The model of how much a study gets: a step starts kernels one after another, however many members there are, and narrow
# models keep a GPU's product units waiting for memory.
SHARE = 0.1  # what a study gets of the published peak
# Kernels of a step for each layer, and once more for the rest (an evaluation or a token has a third), and seconds for each: as
# they are recorded and replayed, and where they are started one by one, on GPUs without compiled kernels.
RECORDED, SINGLE = (24, 4e-6), (60, 8e-6)
GPU_START = 15.0  # seconds from a worker's start to its first step: its libraries, and kernels compiled or loaded
CORE_START = 4.0  # likewise on a CPU

GRAMMAR = "8xH200, 2xA100 40GB (GPUs), 64 cores, 16x8 cores 32GiB (16 machines of 8 cores and 32 GiB each)"
UNITS = {"gib": 2**30, "gb": 10**9}
MOST = 1_000_000  # workers


@dataclass(frozen=True)
class Machines:
    """A parsed description."""

    text: str
    gpu: Gpu | None  # None: one worker per core
    workers: int
    memory: float | None  # bytes of one worker; None: not given


def parse_machines(text: str) -> Machines:
    """Parses `[COUNTx]GPU [MEMORY]` or `[MACHINESx]CORES cores [MEMORY]`, with the memory of one GPU or machine. Raises UsageError."""
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
            f"--plan-for {text!r}: {what!r} is neither a known GPU ({', '.join(GPUS)}) nor a number of cores. "
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
class Speed:
    """How many seconds a worker needs: at the pace measured on this machine, or at an assumed one."""

    pace: Pace
    start: float  # from the worker's start to its first step
    launch: float = 0.0  # per layer of an update, for its kernels; a measured pace contains it

    @staticmethod
    def assumed(gpu: Gpu) -> Speed:
        """The speed of a GPU that was not measured."""
        rate = ((1.0, SHARE * gpu.peak),)
        return Speed(Pace(rate, rate), GPU_START, math.prod(gpu.launches))

    def update(self, experiment: Experiment, corpus: Corpus) -> tuple[float, float]:
        """One step of a stack: a fixed part, and what each member adds."""
        size = update_flops(experiment, corpus)
        at_once = sequences_at_once(experiment, corpus.tokenizer.vocab_size, "cuda")
        fixed = -(-experiment.sequences_per_update // at_once) * (1 + experiment.n_layer) * self.launch
        return fixed, size / rate_at(size, self.pace.training)

    def evaluations(self, experiment: Experiment, corpus: Corpus) -> float:
        """All evaluations of one experiment, and its final scores."""
        flops, per_token = cost(experiment, corpus).evaluation_flops, flops_per_token(shape_of(experiment, corpus)) / 3
        batches = flops / per_token / evaluation_tokens(corpus.tokenizer.vocab_size, "cuda")
        rate = rate_at(update_flops(experiment, corpus), self.pace.evaluation)
        return batches * (1 + experiment.n_layer) / 3 * self.launch + flops / rate

    def token(self, experiment: Experiment, corpus: Corpus) -> tuple[float, float]:
        """One token that models of this shape write together: a fixed part, and what each model adds."""
        rate = rate_at(update_flops(experiment, corpus), self.pace.evaluation)
        launch = self.launch or math.prod(SINGLE)
        return (1 + experiment.n_layer) / 3 * launch, flops_per_token(shape_of(experiment, corpus)) / 3 / rate


def assumption(gpu: Gpu) -> str:
    """In words, what Speed.assumed takes for granted."""
    kernels, seconds = gpu.launches
    return (
        f"assumed, not measured: {SHARE:.0%} of the {gpu.peak / 1e12:,.0f} TFLOP/s in {gpu.precision} published for {gpu.name}, "
        f"and {seconds * 1e6:.0f} µs for each of a step's {kernels} kernels per layer; half or twice that time is well possible"
    )
