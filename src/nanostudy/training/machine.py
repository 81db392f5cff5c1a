"""Turns requested resources into a machine: device, precision, threads and kernels. Every fallback gets a note."""

from __future__ import annotations

import platform
from dataclasses import dataclass, field, replace

import torch

from nanostudy.device import available_cores, cuda_problem, device_name, has_native_bf16, keep_freed_memory
from nanostudy.errors import KernelsUnavailable, UsageError
from nanostudy.model import kernels
from nanostudy.model.kernels.cpu import openmp_runtime
from nanostudy.model.ops import REFERENCE, Ops
from nanostudy.model.ranks import ALONE, Ranks
from nanostudy.settings import PRECISIONS, Resources

DTYPES = dict(zip(PRECISIONS, (torch.float32, torch.bfloat16, torch.float16), strict=True))


@dataclass(frozen=True)
class Machine:
    """The resources that a run gets."""

    device: torch.device
    device_name: str
    precision: str
    threads: int
    notes: tuple[str, ...]  # fallbacks and choices that a person may want to know about
    compiled: bool = False  # the operations between matrix products are compiled kernels
    ranks: int = 1  # processes that train together
    tiles: bool = False  # attention is one kernel, for the CPU's matrix unit or its vector instructions for bf16
    # of the process that resolved it: a cluster's driver may be another
    host: str = field(default_factory=platform.node)
    system: str = field(default_factory=platform.platform)

    @property
    def dtype(self) -> torch.dtype:
        return DTYPES[self.precision]

    @property
    def ops(self) -> Ops:
        return kernels.compiled_ops(self.device, self.dtype) if self.compiled else REFERENCE

    @property
    def conditions(self) -> dict[str, object]:
        """Where these are equal, the same computation gives the same bits, on any of several equal GPUs."""
        facts = self.as_dict()
        return {
            key: facts[key] for key in ("device_name", "precision", "threads", "ranks", "compiled", "tiles", "torch")
        }

    def as_dict(self) -> dict[str, object]:
        """The machine as run.json records it."""
        return {
            "device": str(self.device),
            "device_name": self.device_name,
            "precision": self.precision,
            "threads": self.threads,
            "ranks": self.ranks,
            "compiled": self.compiled,
            "tiles": self.tiles,
            "notes": list(self.notes),
            "host": self.host,
            "platform": self.system,
            "python": platform.python_version(),
            "torch": torch.__version__,
        }


def resolve(resources: Resources, ranks: Ranks = ALONE) -> Machine:
    """Chooses the device, precision and kernels, with notes that say why, and sets the number of threads. Raises UsageError.

    The ranks of one machine share its cores and GPUs.
    """
    device, notes = (
        _choose_device(resources.device) if ranks.count == 1 else _choose_device_of_rank(resources.device, ranks)
    )
    precision, why = _choose_precision(resources.precision, device)
    threads = resources.threads or max(1, available_cores() // ranks.local_count)
    if torch.get_num_threads() != threads:
        torch.set_num_threads(threads)
    if device.type == "cpu":
        keep_freed_memory()
    if device.type == "cuda":  # sums of products in fp32, as on a CPU
        products = torch.backends.cuda.matmul
        products.allow_bf16_reduced_precision_reduction = products.allow_fp16_reduced_precision_reduction = False
    compiled, how = _choose_kernels(resources.compile, device, DTYPES[precision])
    machine = Machine(device, device_name(device), precision, threads, (*notes, *why, *how), compiled, ranks.count)
    return replace(machine, tiles=device.type == "cpu" and machine.ops.attention is not None)


def _choose_device(requested: str) -> tuple[torch.device, tuple[str, ...]]:
    if requested == "auto" and torch.cuda.is_available():
        problem = cuda_problem(torch.device("cuda", 0))
        return (torch.device("cpu"), (f"training on the CPU: {problem}",)) if problem else (torch.device("cuda", 0), ())
    if requested == "auto":
        return torch.device("mps" if torch.backends.mps.is_available() else "cpu"), ()
    device = torch.device(requested)
    if device.type == "mps" and not torch.backends.mps.is_available():
        raise UsageError("device=mps: this PyTorch sees no Apple GPU. Use device=auto or device=cpu.")
    if device.type != "cuda":
        return device, ()
    if not torch.cuda.is_available():
        raise UsageError(
            f"device={requested}: this PyTorch (torch {torch.__version__}) sees no CUDA GPU. Use device=auto or device=cpu, "
            "or install a PyTorch with CUDA and a driver that fits it."
        )
    device = torch.device("cuda", device.index or 0)
    if device.index >= torch.cuda.device_count():
        raise UsageError(
            f"device={requested}: this machine has {torch.cuda.device_count()} CUDA GPU(s), counted from 0."
        )
    problem = cuda_problem(device)
    if problem:
        raise UsageError(
            f"device={requested}: {problem}. Use device=cpu, or install a PyTorch that has kernels for it."
        )
    return device, ()


def _choose_device_of_rank(requested: str, ranks: Ranks) -> tuple[torch.device, tuple[str, ...]]:
    """One GPU per rank, or the CPU."""
    if requested == "mps" or ":" in requested:
        raise UsageError(
            f"device={requested} is one device, and there are {ranks.count} ranks. Use device=cuda or device=cpu."
        )
    if requested == "auto":
        device, notes = _choose_device("auto")
        if device.type == "mps":
            notes = ("training on the CPU: several ranks cannot share an Apple GPU",)
        if device.type != "cuda":
            return torch.device("cpu"), notes
    if requested == "cpu":
        return torch.device("cpu"), ()
    if ranks.local_count > torch.cuda.device_count() > 0:
        raise UsageError(
            f"{ranks.local_count} ranks on this machine need as many GPUs, and it has {torch.cuda.device_count()}. Start fewer "
            "with --nproc-per-node, or use device=cpu."
        )
    device, notes = _choose_device(f"cuda:{ranks.local_rank}")
    torch.cuda.set_device(device)  # the one that NCCL uses
    return device, notes


def _choose_precision(requested: str, device: torch.device) -> tuple[str, tuple[str, ...]]:
    native = has_native_bf16(device)
    if requested == "auto":
        if native:
            return "bf16", ()
        if device.type == "cuda" and torch.cuda.get_device_capability(device) >= (7, 0):
            return "fp16", ("precision fp16 with loss scaling: this GPU has no native bf16",)
        return "fp32", ("precision fp32: this device has no native bf16",)
    if requested == "bf16" and not native:
        return requested, ("bf16 is emulated on this device: expect it to be slower than fp32",)
    if requested == "fp16" and device.type == "cpu":
        return requested, ("fp16 on a CPU is for testing: expect it to be slow",)
    return requested, ()


def _choose_kernels(requested: str, device: torch.device, dtype: torch.dtype) -> tuple[bool, tuple[str, ...]]:
    if requested == "no":
        return False, ()
    try:
        kernels.compiled_ops(device, dtype)
    except KernelsUnavailable as problem:
        return False, (without_kernels(requested, problem),)
    if device.type == "cpu" and torch.get_num_threads() > 1 and openmp_runtime() is None:
        return True, ("compiled kernels use one thread: PyTorch brought no OpenMP runtime",)
    return True, ()


def without_kernels(requested: str, reason: object) -> str:
    """The note of a machine that does without. Raises UsageError where compile=yes was requested."""
    if requested == "yes":
        raise UsageError(f"compile=yes: {reason}. With compile=auto it trains without, more slowly.") from None
    return f"kernels are not compiled, so this is slower than it could be: {reason}"
