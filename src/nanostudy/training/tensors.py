"""Files of tensors with a description and a checksum, in the safetensors format."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save_file

from nanostudy import version
from nanostudy.atomic import replace_atomically
from nanostudy.errors import NanostudyError

LARGEST_HEADER = 2**27  # bytes


def save_tensors(
    path: Path, tensors: Mapping[str, torch.Tensor], metadata: Mapping[str, Any], before: Path | None = None
) -> None:
    """Writes a safetensors file whose header holds the metadata, the format version and a checksum of everything."""
    contiguous = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    header = {**metadata, "format_version": version.FORMAT}
    header["sha256"] = _checksum(contiguous, header)
    write_safetensors(path, contiguous, {"nanostudy": json.dumps(header)}, before)


def write_safetensors(
    path: Path, tensors: dict[str, torch.Tensor], metadata: dict[str, str], before: Path | None = None
) -> None:
    """Writes atomically. The previous file is kept as `before`, if that is given. Raises NanostudyError."""

    def write(temporary: Path) -> None:
        try:
            save_file(tensors, temporary, metadata)
        except SafetensorError as problem:  # its text is the operating system's error
            raise OSError(str(problem)) from problem

    replace_atomically(path, write, before)


def load_tensors(path: Path) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """Tensors and metadata, on the CPU. Raises NanostudyError where the file is cut, altered, or of another version."""
    if not path.is_file():
        raise NanostudyError(f"There is no file {path}.")
    try:
        _check_size(path)
        data = path.read_bytes()  # not memory-mapped: Windows cannot replace a mapped file
        tensors = load(data)
        described = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")]).get("__metadata__", {})
        header = json.loads(described.get("nanostudy", "null"))
    except OSError as problem:
        raise NanostudyError(f"{path} could not be read: {problem}.") from problem
    except (SafetensorError, ValueError, KeyError, TypeError, AttributeError, IndexError, RecursionError) as problem:
        raise NanostudyError(f"{path} is damaged or is no safetensors file ({problem}).") from None
    if not isinstance(header, dict):
        raise NanostudyError(f"{path} was not written by nanostudy: its header has no nanostudy metadata.")
    if header.get("format_version") != version.FORMAT:
        raise NanostudyError(
            f"{path} has format version {header.get('format_version')}, and this nanostudy reads {version.FORMAT}. "
            "Use the version of nanostudy that wrote it (run.json names it)."
        )
    if header.pop("sha256", None) != _checksum(tensors, header):
        raise NanostudyError(f"{path} is damaged: its contents do not match their checksum.")
    return tensors, header


def _check_size(path: Path) -> None:
    """Before it is read: a file may be larger than any memory. Raises ValueError where its size is not the one that its header says."""
    with open(path, "rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if length > LARGEST_HEADER:
            raise ValueError("its header is too large")
        header = json.loads(file.read(length))
    ends = [int(about["data_offsets"][1]) for name, about in header.items() if name != "__metadata__"]
    if path.stat().st_size != 8 + length + max(ends, default=0):
        raise ValueError("its size is not the one that its header says")


def _checksum(tensors: Mapping[str, torch.Tensor], header: Mapping[str, Any]) -> str:
    digest = hashlib.sha256(json.dumps(header, sort_keys=True).encode())
    for name in sorted(tensors):
        tensor = tensors[name]
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()
