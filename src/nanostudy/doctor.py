"""What a machine offers to a training, measured where it can be."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from nanostudy.atomic import cache_folder
from nanostudy.data.texts import locate_shakespeare
from nanostudy.device import (
    available_cores,
    compiler,
    cpu_flags,
    cuda_problem,
    device_name,
    has_native_bf16,
    product_rate,
    total_memory,
)
from nanostudy.settings import Resources
from nanostudy.training.machine import DTYPES, resolve

_CPU = torch.device("cpu")
_FLAGS_THAT_MATTER = ("avx2", "avx512f", "avx512_bf16", "amx_bf16", "asimd", "bf16", "sve")


def examine() -> Iterator[tuple[str, str]]:
    """(what, finding) pairs, one after another as they are measured; about two seconds per device."""
    yield "torch", torch.__version__
    yield "processor", f"{device_name(_CPU)}, {available_cores()} cores"
    flags = [flag for flag in _FLAGS_THAT_MATTER if flag in cpu_flags()]
    yield "instructions", ", ".join(flags) or "none that matter here"
    yield "memory", _gigabytes(_CPU)
    for index in range(torch.cuda.device_count() if torch.cuda.is_available() else 0):
        device = torch.device("cuda", index)
        yield f"GPU {index}", f"{device_name(device)}, {_gigabytes(device)}, {cuda_problem(device) or 'usable'}"
    if torch.backends.mps.is_available():
        yield "GPU", "Apple (mps)"
    yield "C++ compiler", compiler() or "none (nothing needs one)"
    machine = resolve(Resources())
    for precision in ("fp32", "bf16", "fp16"):
        if precision == "fp16" and machine.device.type == "cpu":
            continue
        native = precision != "bf16" or has_native_bf16(machine.device)
        rate = product_rate(machine.device, DTYPES[precision])
        yield f"products in {precision}", f"{rate / 1e9:,.0f} GFLOP/s{'' if native else ' (emulated)'}"
    missing = f"not here; `nanostudy corpus fetch shakespeare` puts it into {cache_folder()}"
    yield "shakespeare", str(locate_shakespeare() or missing)
    yield "training would use", f"{machine.device}, {machine.precision}, {machine.threads} threads"
    places = {"cpu": "no usable GPU was found", "cuda": "a CUDA GPU works", "mps": "an Apple GPU works"}
    bf16 = machine.precision == "bf16"
    why = "this device has bf16 instructions" if bf16 else f"{machine.precision} is what this device does well"
    yield "because", "; ".join([places[machine.device.type], why, *machine.notes])


def _gigabytes(device: torch.device) -> str:
    total = total_memory(device)
    return "unknown" if total is None else f"{total / 2**30:.0f} GiB"
