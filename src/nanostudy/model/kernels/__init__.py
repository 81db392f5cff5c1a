"""The pieces of fused.py as kernels: on a CPU from native/ by the machine's C++ compiler, on a GPU by PyTorch's.

They are built once a machine and kept in the user's cache. Nothing here is needed: where they cannot be had, REFERENCE does the
same more slowly.
"""

from __future__ import annotations

import contextlib
import ctypes
import hashlib
import math
import os
import platform
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from nanostudy.atomic import cache_folder
from nanostudy.device import compiler, cpu_flags
from nanostudy.model.ops import EPSILON, REFERENCE, DropoutKeys, Ops
from nanostudy.model.optim import EPSILON as ADAM_EPSILON

SOURCE = Path(__file__).with_name("native") / "ops.cpp"
OPTIONS = ("-std=c++20", "-O3", "-fPIC", "-fno-math-errno", "-fno-trapping-math")
SECONDS = 300  # that the compiler may take
NAMES = {torch.float32: "fp32", torch.bfloat16: "bf16"}
ALONE = 32768  # elements: fewer are not worth waking other threads

# What the functions of ops.cpp take: so many pointers and whole numbers, then a real number and the threads.
TAKEN = {
    "residual_norm": (7, 4),
    "residual_norm_backward": (9, 4),
    "split_heads": (2, 5),
    "merge_heads": (2, 5),
    "attend": (4, 5),
    "attend_backward": (4, 5),
    "attention": (4, 4),
    "attention_backward": (5, 4),
    "cross_entropy": (3, 2),
    "cross_entropy_backward": (4, 2),
    "gelu": (3, 1),
    "squares": (2, 3),
    "adamw_kernel": (11, 4),
}


class NotBuilt(Exception):
    """The kernels cannot be had here. The message says why."""


@cache
def ops(device: torch.device, dtype: torch.dtype) -> Ops:
    """For this device, activations in this dtype. Raises NotBuilt."""
    if device.type == "cpu":
        return native(dtype)
    if device.type == "cuda":
        return traced(device, dtype)
    raise NotBuilt(f"there are none for {device.type}")


# --- on a CPU


def threaded() -> bool:
    """Whether kernels on a CPU share their work among threads."""
    return _openmp() is not None


@cache
def native(dtype: torch.dtype) -> Ops:
    """For CPU tensors, activations in this dtype. Raises NotBuilt."""
    if dtype not in NAMES:
        raise NotBuilt(f"there are none for {dtype} on a CPU")
    library = _library()
    functions, wide = _Functions(library, NAMES[dtype]), _Functions(library, NAMES[torch.float32])
    # gradients are in fp32 where several micro-batches were added up
    either = {dtype: functions, torch.float32: wide}

    def norms(rows_MP: Tensor) -> Tensor:
        return either[rows_MP.dtype].norms(rows_MP)

    def adamw_kernel(params_MP: Tensor, grads_MP: Tensor, *rest: Tensor) -> None:
        either[grads_MP.dtype].adamw_kernel(params_MP, grads_MP, *rest)

    own = {name: getattr(functions, name) for name in Ops._fields if name in functions.known}
    return Ops(**own | {"gelu_backward": torch.mul, "norms": norms, "adamw_kernel": adamw_kernel})


class _DropoutKeys(ctypes.Structure):
    _fields_ = [(name, ctypes.c_void_p) for name in DropoutKeys._fields]


class _Entry(ctypes.Structure):
    _fields_ = [("name", ctypes.c_char_p), ("fp32", ctypes.c_void_p), ("bf16", ctypes.c_void_p)]


class _Functions:
    """The pieces of ops.cpp for one dtype: those that this machine can have."""

    def __init__(self, library: ctypes.CDLL, dtype: str) -> None:
        self.known = {}
        for entry in (_Entry * len(TAKEN)).in_dll(library, "ops"):
            name, address = entry.name.decode(), getattr(entry, dtype)
            pointers, numbers = TAKEN[name]
            types: list[Any] = (
                [ctypes.c_void_p] * pointers + [ctypes.c_int64] * numbers + [ctypes.c_float, ctypes.c_int]
            )
            if address:
                self.known[name] = ctypes.CFUNCTYPE(None, *types)(address)

    def call(
        self, name: str, tensors: list[Tensor | DropoutKeys | None], numbers: list[int], size: int, real: float
    ) -> None:
        """`size`: of the work, in elements. What is written to must be contiguous."""
        held = [_contiguous(tensor) for tensor in tensors]  # until the call is over
        threads = 1 if size < ALONE else torch.get_num_threads()
        self.known[name](*(_pointer(tensor) for tensor in held), *numbers, real, threads)

    def residual_norm(
        self, x_ZTE: Tensor | None, y_ZTE: Tensor, drop: DropoutKeys | None, gain_ME: Tensor, bias_ME: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        sum_ZTE, norm_ZTE = _new(y_ZTE), _new(y_ZTE)
        tensors = [x_ZTE, y_ZTE, drop, gain_ME, bias_ME, sum_ZTE, norm_ZTE]
        self.call("residual_norm", tensors, _sizes(gain_ME, y_ZTE), y_ZTE.numel(), EPSILON)
        return sum_ZTE, norm_ZTE

    def residual_norm_backward(
        self, d_sum_ZTE: Tensor, d_norm_ZTE: Tensor, sum_ZTE: Tensor, drop: DropoutKeys | None, gain_ME: Tensor
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        d_x_ZTE, d_y_ZTE = _new(sum_ZTE), _new(sum_ZTE)
        d_gain_ZE, d_bias_ZE = sum_ZTE.new_empty(2, len(sum_ZTE), sum_ZTE.shape[2], dtype=torch.float32)
        tensors = [d_sum_ZTE, d_norm_ZTE, sum_ZTE, drop, gain_ME, d_x_ZTE, d_y_ZTE, d_gain_ZE, d_bias_ZE]
        self.call("residual_norm_backward", tensors, _sizes(gain_ME, sum_ZTE), sum_ZTE.numel(), EPSILON)
        return d_x_ZTE, d_y_ZTE, d_gain_ZE, d_bias_ZE

    def split_heads(self, x_ZTF: Tensor, parts: int, heads: int) -> Tensor:
        Z, T, F = x_ZTF.shape
        sizes = (Z, T, parts, heads, F // (parts * heads))
        y_XZHTD = x_ZTF.new_empty(parts, Z, heads, T, sizes[4])
        self.call("split_heads", [x_ZTF, y_XZHTD], [*sizes], x_ZTF.numel(), 0.0)
        return y_XZHTD

    def merge_heads(self, y_XZHTD: Tensor) -> Tensor:
        X, Z, H, T, D = y_XZHTD.shape
        x_ZTF = y_XZHTD.new_empty(Z, T, X * H * D)
        self.call("merge_heads", [y_XZHTD, x_ZTF], [Z, T, X, H, D], x_ZTF.numel(), 0.0)
        return x_ZTF

    def attend(
        self, scores_ZHQK: Tensor, drop: DropoutKeys | None, scale: float, context: int
    ) -> tuple[Tensor, Tensor]:
        weights_ZHQK = _new(scores_ZHQK)
        dropped_ZHQK = _new(scores_ZHQK) if drop else weights_ZHQK
        tensors, numbers = [scores_ZHQK, drop, weights_ZHQK, dropped_ZHQK], [*scores_ZHQK.shape, context]
        self.call("attend", tensors, numbers, scores_ZHQK.numel(), scale)
        return weights_ZHQK, dropped_ZHQK

    def attend_backward(
        self, d_dropped_ZHQK: Tensor, weights_ZHQK: Tensor, drop: DropoutKeys | None, scale: float, context: int
    ) -> Tensor:
        d_scores_ZHQK = _new(weights_ZHQK)
        tensors, numbers = [d_dropped_ZHQK, weights_ZHQK, drop, d_scores_ZHQK], [*weights_ZHQK.shape, context]
        self.call("attend_backward", tensors, numbers, weights_ZHQK.numel(), scale)
        return d_scores_ZHQK

    def attention(
        self, qkv_ZTF: Tensor, drop: DropoutKeys | None, heads: int, trains: bool
    ) -> tuple[Tensor, Tensor | None]:
        Z, T, D = *qkv_ZTF.shape[:2], qkv_ZTF.shape[2] // (3 * heads)
        y_ZTE = qkv_ZTF.new_empty(Z, T, heads * D)
        lse_ZHT = qkv_ZTF.new_empty(Z, heads, T, dtype=torch.float32) if trains else None
        tensors = [qkv_ZTF, drop, y_ZTE, lse_ZHT]
        self.call("attention", tensors, [Z, heads, T, D], qkv_ZTF.numel(), 1 / math.sqrt(D))
        return y_ZTE, lse_ZHT

    def attention_backward(self, d_y_ZTE: Tensor, qkv_ZTF: Tensor, lse_ZHT: Tensor, drop: DropoutKeys | None) -> Tensor:
        (Z, heads, T), D = lse_ZHT.shape, d_y_ZTE.shape[2] // lse_ZHT.shape[1]
        d_qkv_ZTF = _new(qkv_ZTF)
        tensors = [d_y_ZTE, qkv_ZTF, lse_ZHT, drop, d_qkv_ZTF]
        self.call("attention_backward", tensors, [Z, heads, T, D], qkv_ZTF.numel(), 1 / math.sqrt(D))
        return d_qkv_ZTF

    def cross_entropy(self, logits_ZTV: Tensor, targets_ZT: Tensor) -> Tensor:
        losses_ZT = logits_ZTV.new_empty(targets_ZT.shape, dtype=torch.float32)
        numbers = [targets_ZT.numel(), logits_ZTV.shape[2]]
        self.call("cross_entropy", [logits_ZTV, targets_ZT, losses_ZT], numbers, logits_ZTV.numel(), 0.0)
        return losses_ZT

    def cross_entropy_backward(self, d_losses_ZT: Tensor, logits_ZTV: Tensor, targets_ZT: Tensor) -> Tensor:
        d_logits_ZTV = _new(logits_ZTV)
        tensors: list[Tensor | DropoutKeys | None] = [d_losses_ZT, logits_ZTV, targets_ZT, d_logits_ZTV]
        numbers = [targets_ZT.numel(), logits_ZTV.shape[2]]
        self.call("cross_entropy_backward", tensors, numbers, logits_ZTV.numel(), 0.0)
        return d_logits_ZTV

    def gelu(self, x: Tensor, trains: bool) -> tuple[Tensor, Tensor]:
        """(GELU of x, its derivative)"""
        if not trains:  # PyTorch's is faster where that is all
            return REFERENCE.gelu(x, trains)
        x = x.contiguous()
        y, slope = _new(x), _new(x)
        self.call("gelu", [x, y, slope], [x.numel()], x.numel(), 0.0)
        return y, slope

    def norms(self, rows_MP: Tensor) -> Tensor:
        M, columns = rows_MP.shape
        sums_M = rows_MP.new_empty(M, dtype=torch.float32)
        self.call("squares", [rows_MP, sums_M], [M, columns, columns], rows_MP.numel(), 0.0)
        return sums_M.sqrt_()

    def adamw_kernel(
        self, params_MP: Tensor, grads_MP: Tensor, exp_avg_MP: Tensor, exp_avg_sq_MP: Tensor, *numbers_M1: Tensor
    ) -> None:
        M, columns = params_MP.shape
        rows = [params_MP, grads_MP, exp_avg_MP, exp_avg_sq_MP]  # slices of longer rows, and written to as they are
        numbers = [M, columns, params_MP.stride(0), grads_MP.stride(0)]
        held = [number_M1.contiguous() for number_M1 in numbers_M1]
        pointers = [tensor.data_ptr() for tensor in (*rows, *held)]
        self.known["adamw_kernel"](*pointers, *numbers, ADAM_EPSILON, torch.get_num_threads())


def _new(like: Tensor) -> Tensor:
    return torch.empty_like(like, memory_format=torch.contiguous_format)


def _contiguous(argument: Tensor | DropoutKeys | None) -> Any:
    if isinstance(argument, DropoutKeys):
        return DropoutKeys(*(tensor.contiguous() for tensor in argument))
    return argument if argument is None else argument.contiguous()


def _pointer(argument: Tensor | DropoutKeys | None) -> Any:
    if isinstance(argument, DropoutKeys):
        return ctypes.byref(_DropoutKeys(*(tensor.data_ptr() for tensor in argument)))
    return None if argument is None else argument.data_ptr()


def _sizes(gain_ME: Tensor, x_ZTE: Tensor) -> list[int]:
    M, (Z, T, E) = len(gain_ME), x_ZTE.shape
    return [M, Z // M, T, E]


def _library() -> ctypes.CDLL:
    """The built library: from the cache, or built now. Raises NotBuilt."""
    if sys.platform == "win32":  # where GCC does not align vectors on the stack, and Visual C++ does not know them
        raise NotBuilt("they are not built on Windows")
    command = compiler()
    if command is None:
        raise NotBuilt("no C++ compiler was found")
    folder, problems = cache_folder() / "kernels", []
    for options in _ways(command):
        try:
            name = f"ops-{_fingerprint(command, options)}"
            return ctypes.CDLL(str(_kept(folder, name) or _build(command, options, folder, name)))
        except (OSError, subprocess.SubprocessError) as problem:
            problems.append(_said(problem))
    raise NotBuilt(f"{command} did not build them: {problems[-1]}")


def _ways(command: str) -> Iterator[tuple[str, ...]]:
    """Options to try, the best first: with threads, if the program's own OpenMP can be linked to, and without."""
    arm = platform.machine().lower() in ("arm64", "aarch64")
    vectors = ("-mcpu=native",) if arm else ("-march=native", "-mprefer-vector-width=512")
    runtime = _openmp()
    if runtime:
        yield (*vectors, "-fopenmp", "-Wl,--no-as-needed", runtime)
    yield (*vectors, "-fopenmp-simd")


def _openmp() -> str | None:
    """The OpenMP runtime that PyTorch brought into this process; a second one would compete with it for the cores."""
    with contextlib.suppress(OSError):  # folders may have spaces in their names
        maps = Path("/proc/self/maps").read_text(encoding="utf-8")
        found = re.search(r" (/.*/libgomp[^/]*\.so[^/\n]*)$", maps, re.MULTILINE)
        return found[1] if found else None
    return None


def _fingerprint(command: str, options: tuple[str, ...]) -> str:
    """Of all that decides what is built: the source, how, and for which machine."""
    version = subprocess.run([command, "--version"], capture_output=True, text=True, timeout=SECONDS).stdout
    sources = (file.read_text(encoding="utf-8") for file in sorted(SOURCE.parent.glob("*.[ch]*")))
    parts = (*sources, *OPTIONS, *options, version, *sorted(cpu_flags()), torch.__version__)
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:16]


def _kept(folder: Path, name: str) -> Path | None:
    """What was built before, if it still is what its name says: to load half a library would end the process."""
    return next((path for path in folder.glob(f"{name}-*.so") if path.stem == f"{name}-{_digest(path)}"), None)


def _digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()[:16]


def _build(command: str, options: tuple[str, ...], folder: Path, name: str) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder) as aside:
        made = Path(aside) / f"{name}.so"
        build = [command, *OPTIONS, "-shared", str(SOURCE), *options, "-o", str(made)]
        subprocess.run(build, check=True, capture_output=True, text=True, errors="replace", timeout=SECONDS)
        ctypes.CDLL(str(made))
        path = folder / f"{name}-{_digest(made)}.so"
        os.replace(made, path)
    return path


def _said(problem: Exception) -> str:
    lines = (getattr(problem, "stderr", None) or str(problem)).strip().splitlines()
    return next((line for line in lines if "error" in line.lower()), lines[-1] if lines else str(problem))


# --- on a GPU


@cache
def traced(device: torch.device, dtype: torch.dtype) -> Ops:
    """REFERENCE, each piece compiled by PyTorch when it first meets tensors of some size, and kept on disk for later processes.

    The first dimension of what a piece takes may change from call to call, for `adamw_kernel` the second too; another size of any other
    makes another kernel. What came before changes no kernel, so that results do not depend on it. Raises NotBuilt where
    one of them cannot be made for small tensors.
    """
    os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(cache_folder() / "kernels" / "traced"))
    torch._dynamo.config.recompile_limit = torch._dynamo.config.accumulated_recompile_limit = 10**6
    kernels = {
        name: _Traced(piece, 2 if name == "adamw_kernel" else 1) for name, piece in REFERENCE._asdict().items() if piece
    }
    found = Ops(**kernels)
    try:
        _try(found, device, dtype)
    except Exception as problem:  # of a compiler that may not be there, or not fit the rest
        raise NotBuilt(f"PyTorch's compiler does not work here: {_said(problem)}") from None
    return found


def _try(ops: Ops, device: torch.device, dtype: torch.dtype) -> None:
    """Calls every piece once: two sequences of one member, two positions, one head of width four."""
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
    def __init__(self, piece: Callable[..., Any], free: int) -> None:
        self.kernel = torch.compile(piece, fullgraph=True, dynamic=False)
        self.free = free  # leading dimensions
        self.known: set[tuple[Any, ...]] = set()

    def __call__(self, *arguments: Any) -> Any:
        # backward passes are written out in layers.py: whether a gradient is asked for must make no other kernel
        arguments = tuple(a.detach() if isinstance(a, Tensor) else a for a in arguments)
        key = tuple(_kind(argument, self.free) for argument in arguments)
        if key in self.known:
            return self.kernel(*arguments)
        for tensor in _tensors(arguments):
            for dimension in range(min(self.free, tensor.dim())):
                torch._dynamo.maybe_mark_dynamic(tensor, dimension)
        result = self.kernel(*arguments)
        self.known.add(key)
        return result


def _kind(argument: Any, free: int) -> Any:
    if isinstance(argument, Tensor):
        ones = tuple(size == 1 for size in argument.shape[:free])
        return argument.dtype, argument.shape[free:], ones, argument.is_contiguous()
    return argument if not isinstance(argument, DropoutKeys) else True


def _tensors(arguments: tuple[Any, ...]) -> list[Tensor]:
    flat = (part for a in arguments for part in (a if isinstance(a, DropoutKeys) else (a,)))
    return [part for part in flat if isinstance(part, Tensor)]
