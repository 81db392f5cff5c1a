"""What this computer has, before any choice: devices, instruction sets, cores, memory, a compiler."""

from __future__ import annotations

import contextlib
import ctypes
import os
import platform
import re
import shutil
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import torch

from nanostudy.errors import OutOfMemory


def available_cores() -> int:
    """Cores that this process may use: those it is bound to, at most as many as its container's quota."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    quota, _, period = _control_group("cpu.max").partition(" ")
    return max(1, min(cores, int(quota) // int(period))) if quota.isdigit() and period.isdigit() else cores


def _control_group(name: str) -> str:
    """A value of this process's control group on Linux, as seen inside a container; empty where it has none."""
    with contextlib.suppress(OSError):
        return Path("/sys/fs/cgroup", name).read_text(encoding="ascii").strip()
    return ""


def device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    name = _processor("model name") if device.type == "cpu" else ""
    return name or platform.processor() or platform.machine()


def _processor(*fields: str) -> str:
    """What Linux reports of the processor in the first of these fields; empty elsewhere."""
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text(errors="replace").splitlines():
            if line.startswith(fields):
                return line.split(":", 1)[1].strip()
    return ""


def cuda_problem(device: torch.device) -> str | None:
    """Why the GPU cannot be used, or None. Checks PyTorch's list of architectures, then runs a kernel."""
    capability = torch.cuda.get_device_capability(device)
    if not has_kernels(capability, torch.cuda.get_arch_list()):
        return (
            f"the installed PyTorch {torch.__version__} has no kernels for {torch.cuda.get_device_name(device)} "
            f"(compute capability {capability[0]}.{capability[1]})"
        )
    try:
        torch.ones(8, device=device).sum().item()
    except RuntimeError as problem:
        return f"{torch.cuda.get_device_name(device)} does not work: {str(problem).splitlines()[0]}"
    return None


def has_kernels(capability: tuple[int, int], arch_list: list[str]) -> bool:
    """Whether code for these architectures runs: sm_XY on its major version from XY on, compute_XY on everything from XY on."""
    built = re.findall(r"(sm|compute)_(\d*)(\d)", " ".join(arch_list))
    versions = [(kind, (int(major or 0), int(minor))) for kind, major, minor in built]
    return any(v <= capability and (kind == "compute" or v[0] == capability[0]) for kind, v in versions)


def has_native_bf16(device: torch.device) -> bool:
    """Whether the device has instructions for bf16 products. Emulation does not count."""
    if device.type == "cuda":
        return torch.cuda.get_device_capability(device) >= (8, 0)
    if device.type == "mps":
        return False
    return bool(cpu_flags() & {"avx512_bf16", "amx_bf16", "bf16"})


def cpu_flags() -> set[str]:
    """Instruction sets of the CPU under Linux's names; elsewhere those that PyTorch detects."""
    if Path("/proc/cpuinfo").is_file():
        return set(_processor("flags", "Features").split())
    flags = {"avx512_bf16": "_is_avx512_bf16_supported", "amx_bf16": "_is_amx_tile_supported"}
    return {flag for flag, probe in flags.items() if getattr(torch.cpu, probe, bool)()}


def total_memory(device: torch.device) -> int | None:
    """Bytes, or None where the system does not report them."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    if hasattr(os, "sysconf") and "SC_PHYS_PAGES" in os.sysconf_names:
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return None


def available_memory(device: torch.device) -> int | None:
    """Bytes that are free now, or None where the system does not report them."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    limits = []
    with contextlib.suppress(OSError):
        lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
        limits = [int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable")]
    limit, used = _control_group("memory.max"), re.search(r"^anon (\d+)$", _control_group("memory.stat"), re.M)
    if limit.isdigit() and used:
        limits.append(int(limit) - int(used[1]))
    return min(limits) if limits else total_memory(device)


def memory_kills() -> int | None:
    """How many processes the system has ended because memory ran out, since it started; None where it does not count them."""
    counts = re.findall(r"^oom_kill (\d+)$", _control_group("memory.events"), re.M)
    with contextlib.suppress(OSError):
        counts += re.findall(r"^oom_kill (\d+)$", Path("/proc/vmstat").read_text(encoding="ascii"), re.M)
    return sum(map(int, counts)) if counts else None


def compiler() -> str | None:
    """The path of a C++ compiler, if one is on the PATH."""
    return next((path for name in ("c++", "g++", "clang++", "cl") if (path := shutil.which(name))), None)


def product_rate(device: torch.device, dtype: torch.dtype, seconds: float = 0.4) -> float:
    """Measured rate of a matrix product of 1024 x 1024 (4096 on a GPU), in floating-point operations per second."""
    n = 1024 if device.type == "cpu" else 4096
    a, b = (torch.randn(n, n, device=device).to(dtype) for _ in range(2))

    def run(count: int) -> float:
        start = time.perf_counter()
        for _ in range(count):
            c = a @ b
        c.flatten()[0].item()  # waits for the device
        return time.perf_counter() - start

    run(2)
    once = run(2) / 2
    count = max(2, int(seconds / max(once, 1e-6)))
    return 2 * n**3 * count / run(count)


def keep_freed_memory() -> None:
    """Makes glibc keep freed blocks. By default it returns large ones to the system at once, and page faults then take a third of
    every training step (measured: docs/log.md). Other systems keep freed blocks anyway.
    """
    if sys.platform != "linux" or platform.libc_ver()[0] != "glibc":
        return
    m_trim_threshold, m_top_pad, m_mmap_max = -1, -2, -4
    mallopt = ctypes.CDLL(None).mallopt
    mallopt(m_mmap_max, 0)
    mallopt(m_trim_threshold, 2**31 - 1)
    mallopt(m_top_pad, 2**26)


# cuBLAS takes its workspace when it is first used, after PyTorch may have taken everything
OUT_OF_MEMORY = ("out of memory", "can't allocate memory", "CUBLAS_STATUS_ALLOC_FAILED")
MEMORY_ADVICE = (
    "Memory ran out. Lower batch_size (and raise gradient_accumulation_steps by as much: the result stays the same up "
    "to rounding), or block_size, n_embd or n_layer. The last checkpoint is whole."
)


@contextlib.contextmanager
def memory_errors(advice: str = MEMORY_ADVICE) -> Iterator[None]:
    """Turns every kind of out-of-memory error into OutOfMemory, which says what to lower."""
    try:
        yield
    except (MemoryError, RuntimeError) as problem:
        if is_lack_of_memory(problem):
            raise OutOfMemory(advice) from None
        raise


def is_lack_of_memory(problem: Exception) -> bool:
    return isinstance(problem, MemoryError) or any(sign in str(problem) for sign in OUT_OF_MEMORY)
