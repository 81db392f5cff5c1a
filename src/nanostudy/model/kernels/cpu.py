"""The operations in C++ (native/), built by this machine's compiler and called through ctypes: for CPUs."""

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

from nanostudy.atomic import cache_folder, cache_of_code, safe_to_execute
from nanostudy.device import compiler, cpu_flags
from nanostudy.errors import KernelsUnavailable, error_line
from nanostudy.model.ops import EPSILON, DropoutKeys, Ops
from nanostudy.model.optim import EPSILON as ADAM_EPSILON

SOURCE = Path(__file__).with_name("native") / "ops.cpp"
OPTIONS = ("-std=c++20", "-O3", "-fPIC", "-fno-math-errno", "-fno-trapping-math")
BUILD_SECONDS = 300  # the compiler's time limit
GIVEN = "NANOSTUDY_KERNELS"  # the environment of a study's workers: the library that the study loaded, and no other
NAMES = {torch.float32: "fp32", torch.bfloat16: "bf16"}
LEAST_SHARED = 32768  # elements; waking other threads for fewer costs more than it saves

# The arguments of each function in ops.cpp: (pointers, sizes); then a real number and the number of threads follow.
SIGNATURES = {
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


@cache
def native_ops(dtype: torch.dtype) -> Ops:
    """For CPU tensors, activations in this dtype. Raises KernelsUnavailable."""
    if dtype not in NAMES:
        raise KernelsUnavailable(f"there are none for {dtype} on a CPU")
    return _Kernels(ctypes.CDLL(str(library_path())), dtype)


# --- calling


class _DropoutKeys(ctypes.Structure):
    _fields_ = [(name, ctypes.c_void_p) for name in DropoutKeys._fields]


class _Op(ctypes.Structure):
    _fields_ = [("name", ctypes.c_char_p), ("fp32", ctypes.c_void_p), ("bf16", ctypes.c_void_p)]


class _Kernels(Ops):
    """The functions of ops.cpp, as far as this machine has them, for activations in one dtype. Gradients are fp32 where several
    micro-batches were added up."""

    def __init__(self, library: ctypes.CDLL, dtype: torch.dtype) -> None:
        self.by_dtype: dict[torch.dtype, dict[str, Callable[..., None]]] = {one: {} for one in NAMES}
        for op in (_Op * len(SIGNATURES)).in_dll(library, "ops"):
            pointers, sizes = SIGNATURES[op.name.decode()]
            types: list[Any] = [*[ctypes.c_void_p] * pointers, *[ctypes.c_int64] * sizes, ctypes.c_float, ctypes.c_int]
            for one, name in NAMES.items():
                if address := getattr(op, name):
                    self.by_dtype[one][op.name.decode()] = ctypes.CFUNCTYPE(None, *types)(address)
        self.functions = self.by_dtype[dtype]
        if "attention" in self.functions:
            self.attention, self.attention_backward = self._attention, self._attention_backward

    def call(
        self,
        name: str,
        tensors: list[Tensor | DropoutKeys | None],
        sizes: list[int],
        elements: int,
        number: float = 0.0,
        dtype: torch.dtype | None = None,
    ) -> None:
        """`elements` is the amount of work. A tensor that the function writes to must be contiguous."""
        held = [_contiguous(tensor) for tensor in tensors]  # until the call returns
        threads = 1 if elements < LEAST_SHARED else torch.get_num_threads()
        functions = self.by_dtype[dtype] if dtype else self.functions
        functions[name](*(_pointer(tensor) for tensor in held), *sizes, number, threads)

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
        D = F // (parts * heads)
        y_XZHTD = x_ZTF.new_empty(parts, Z, heads, T, D)
        self.call("split_heads", [x_ZTF, y_XZHTD], [Z, T, parts, heads, D], x_ZTF.numel())
        return y_XZHTD

    def merge_heads(self, y_XZHTD: Tensor) -> Tensor:
        X, Z, H, T, D = y_XZHTD.shape
        x_ZTF = y_XZHTD.new_empty(Z, T, X * H * D)
        self.call("merge_heads", [y_XZHTD, x_ZTF], [Z, T, X, H, D], x_ZTF.numel())
        return x_ZTF

    def attend(
        self, scores_ZHQK: Tensor, drop: DropoutKeys | None, scale: float, context: int
    ) -> tuple[Tensor, Tensor]:
        weights_ZHQK = _new(scores_ZHQK)
        dropped_ZHQK = _new(scores_ZHQK) if drop else weights_ZHQK
        tensors, sizes = [scores_ZHQK, drop, weights_ZHQK, dropped_ZHQK], [*scores_ZHQK.shape, context]
        self.call("attend", tensors, sizes, scores_ZHQK.numel(), scale)
        return weights_ZHQK, dropped_ZHQK

    def attend_backward(
        self, d_dropped_ZHQK: Tensor, weights_ZHQK: Tensor, drop: DropoutKeys | None, scale: float, context: int
    ) -> Tensor:
        d_scores_ZHQK = _new(weights_ZHQK)
        tensors, sizes = [d_dropped_ZHQK, weights_ZHQK, drop, d_scores_ZHQK], [*weights_ZHQK.shape, context]
        self.call("attend_backward", tensors, sizes, weights_ZHQK.numel(), scale)
        return d_scores_ZHQK

    def _attention(
        self, qkv_ZTF: Tensor, drop: DropoutKeys | None, heads: int, trains: bool
    ) -> tuple[Tensor, Tensor | None]:
        Z, T, D = *qkv_ZTF.shape[:2], qkv_ZTF.shape[2] // (3 * heads)
        y_ZTE = qkv_ZTF.new_empty(Z, T, heads * D)
        lse_ZHT = qkv_ZTF.new_empty(Z, heads, T, dtype=torch.float32) if trains else None
        tensors = [qkv_ZTF, drop, y_ZTE, lse_ZHT]
        self.call("attention", tensors, [Z, heads, T, D], qkv_ZTF.numel(), 1 / math.sqrt(D))
        return y_ZTE, lse_ZHT

    def _attention_backward(
        self, d_y_ZTE: Tensor, qkv_ZTF: Tensor, y_ZTE: Tensor, lse_ZHT: Tensor, drop: DropoutKeys | None
    ) -> Tensor:
        (Z, heads, T), D = lse_ZHT.shape, d_y_ZTE.shape[2] // lse_ZHT.shape[1]
        d_qkv_ZTF = _new(qkv_ZTF)
        tensors = [d_y_ZTE, qkv_ZTF, lse_ZHT, drop, d_qkv_ZTF]
        self.call("attention_backward", tensors, [Z, heads, T, D], qkv_ZTF.numel(), 1 / math.sqrt(D))
        return d_qkv_ZTF

    def cross_entropy(self, logits_ZTV: Tensor, targets_ZT: Tensor) -> Tensor:
        losses_ZT = logits_ZTV.new_empty(targets_ZT.shape, dtype=torch.float32)
        sizes = [targets_ZT.numel(), logits_ZTV.shape[2]]
        self.call("cross_entropy", [logits_ZTV, targets_ZT, losses_ZT], sizes, logits_ZTV.numel())
        return losses_ZT

    def cross_entropy_backward(self, d_losses_ZT: Tensor, logits_ZTV: Tensor, targets_ZT: Tensor) -> Tensor:
        d_logits_ZTV = _new(logits_ZTV)
        tensors: list[Tensor | DropoutKeys | None] = [d_losses_ZT, logits_ZTV, targets_ZT, d_logits_ZTV]
        sizes = [targets_ZT.numel(), logits_ZTV.shape[2]]
        self.call("cross_entropy_backward", tensors, sizes, logits_ZTV.numel())
        return d_logits_ZTV

    def gelu(self, x: Tensor, trains: bool) -> tuple[Tensor, Tensor]:
        """(GELU of x, its derivative)"""
        if not trains:  # without the derivative PyTorch's is faster
            return super().gelu(x, trains)
        x = x.contiguous()
        y, slope = _new(x), _new(x)
        self.call("gelu", [x, y, slope], [x.numel()], x.numel())
        return y, slope

    def gelu_backward(self, d_y: Tensor, kept: Tensor) -> Tensor:
        return d_y * kept

    def norms(self, rows_MP: Tensor) -> Tensor:
        M, columns = rows_MP.shape
        sums_M = rows_MP.new_empty(M, dtype=torch.float32)
        self.call("squares", [rows_MP, sums_M], [M, columns, columns], rows_MP.numel(), dtype=rows_MP.dtype)
        return sums_M.sqrt_()

    def adamw_kernel(
        self, params_MP: Tensor, grads_MP: Tensor, exp_avg_MP: Tensor, exp_avg_sq_MP: Tensor, *numbers_M1: Tensor
    ) -> None:
        M, columns = params_MP.shape
        rows = [params_MP, grads_MP, exp_avg_MP, exp_avg_sq_MP]  # slices of longer rows, written in place
        sizes = [M, columns, params_MP.stride(0), grads_MP.stride(0)]
        held = [number_M1.contiguous() for number_M1 in numbers_M1]
        pointers = [tensor.data_ptr() for tensor in (*rows, *held)]
        self.by_dtype[grads_MP.dtype]["adamw_kernel"](*pointers, *sizes, ADAM_EPSILON, torch.get_num_threads())


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


# --- building


@cache
def library_path() -> Path:
    """The library: the one that was given, one in the cache, or one built now. Loading it works. Raises KernelsUnavailable."""
    if given := os.environ.get(GIVEN):
        return _given(Path(given))
    if sys.platform == "win32":  # GCC misaligns vectors on its stack there, and Visual C++ lacks them
        raise KernelsUnavailable("they are not built on Windows")
    command = compiler()
    if command is None:
        raise KernelsUnavailable("no C++ compiler was found")
    problems = []
    for options in _option_sets():
        try:
            name = f"ops-{_fingerprint(command, options)}"
            path = _cached(name) or _build(command, options, cache_of_code("kernels"), name)
            ctypes.CDLL(str(path))
            return path
        except (OSError, subprocess.SubprocessError) as problem:
            problems.append(error_line(problem))
    raise KernelsUnavailable(f"{command} did not build them: {problems[-1]}")


def _given(path: Path) -> Path:
    try:
        if _is_whole(path):
            ctypes.CDLL(str(path))
            return path
    except OSError as problem:
        raise KernelsUnavailable(f"the study's library cannot be loaded: {problem}") from None
    raise KernelsUnavailable(f"the study's library {path} is damaged, or others can write to it")


def _option_sets() -> Iterator[tuple[str, ...]]:
    """Options to try, best first: with threads if this process has an OpenMP runtime to link to, then without."""
    arm = platform.machine().lower() in ("arm64", "aarch64")
    vectors = ("-mcpu=native",) if arm else ("-march=native", "-mprefer-vector-width=512")
    if runtime := openmp_runtime():
        yield (*vectors, "-fopenmp", "-Wl,--no-as-needed", runtime)
    yield (*vectors, "-fopenmp-simd")


def openmp_runtime() -> str | None:
    """The OpenMP runtime that PyTorch loaded into this process, without which kernels use one thread. A second one would compete with it for the cores."""
    with contextlib.suppress(OSError):
        return _runtime_in(Path("/proc/self/maps").read_text(encoding="utf-8"))
    return None


def _runtime_in(maps: str) -> str | None:
    """PyTorch's own, or one that it shares; never another wheel's (scikit-learn.libs), which no other process may have."""
    found = re.findall(r" (/.*/libgomp[^/]*\.so[^/\n]*)$", maps, re.MULTILINE)  # a path may hold spaces
    folders = {path: Path(path).parent.name for path in found}
    return next((p for p, name in folders.items() if not name.endswith(".libs") or name.startswith("torch")), None)


def _fingerprint(command: str, options: tuple[str, ...]) -> str:
    """A hash of everything that decides the build: source, options, compiler, instruction sets, PyTorch."""
    version = subprocess.run([command, "--version"], capture_output=True, text=True, timeout=BUILD_SECONDS).stdout
    sources = (file.read_text(encoding="utf-8") for file in sorted(SOURCE.parent.glob("*.[ch]*")))
    parts = (*sources, *OPTIONS, *options, version, *sorted(cpu_flags()), torch.__version__)
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:16]


def _cached(name: str) -> Path | None:
    return next((path for path in cache_folder().glob(f"kernels*/{name}-*.so") if _is_whole(path)), None)


def _is_whole(path: Path) -> bool:
    """Whether it is a build of this user's or the administrator's, and its content still matches the checksum in its name:
    loading half a library would end the process.
    """
    return safe_to_execute(path.parent) and safe_to_execute(path) and path.stem.rpartition("-")[2] == _checksum(path)


def _checksum(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()[:16]


def _build(command: str, options: tuple[str, ...], folder: Path, name: str) -> Path:
    with tempfile.TemporaryDirectory(dir=folder) as temporary:
        library = Path(temporary) / f"{name}.so"
        build = [command, *OPTIONS, "-shared", str(SOURCE), *options, "-o", str(library)]
        subprocess.run(build, check=True, capture_output=True, text=True, errors="replace", timeout=BUILD_SECONDS)
        ctypes.CDLL(str(library))
        library.chmod(0o700)
        path = folder / f"{name}-{_checksum(library)}.so"
        os.replace(library, path)
    return path
