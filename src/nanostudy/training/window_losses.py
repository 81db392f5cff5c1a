"""The losses of single windows at a run's end: window_losses.safetensors, from which the error of a finite text follows.

Its tensors are fp32, one mean loss a window, in nats per token and in the order of the text:

train, val, test   of the last evaluation, whose windows are as long as the context; test only where the text has such a part
val_at_32, ...     of the validation split in windows of a fixed length, shorter than the context

Needs NumPy alone, so that an analysis reads it without PyTorch.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load, save

from nanostudy import version
from nanostudy.atomic import write_atomically
from nanostudy.errors import NanostudyError
from nanostudy.reading import read_file

WINDOW_LOSSES = "window_losses.safetensors"
LARGEST = 2**30  # bytes of such a file: 250 million windows


@dataclass(frozen=True)
class Windows:
    """The windows that one evaluation read."""

    losses: np.ndarray  # fp32 (W,): each window's mean, in nats per token
    context: int  # targets of a window
    last: int  # targets of the last one, which the end of the text may cut short

    @staticmethod
    def of(sums: np.ndarray, targets: np.ndarray, context: int) -> Windows:
        """From each window's sum of losses and number of targets."""
        return Windows((sums / targets).astype(np.float32), context, int(targets[-1]))

    @property
    def targets(self) -> np.ndarray:
        """Of each window, float64 (W,)."""
        counts = np.full(len(self.losses), float(self.context))
        counts[-1] = self.last
        return counts

    @property
    def mean(self) -> float:
        """The loss over all targets, up to rounding what the evaluation said."""
        return float(np.average(self.losses.astype(np.float64), weights=self.targets))


def name_at(context: int) -> str:
    return f"val_at_{context}"


def write_window_losses(folder: Path, windows: Mapping[str, Windows], identity: str) -> None:
    """Raises NanostudyError."""
    about = {name: {"context": one.context, "last": one.last} for name, one in windows.items()}
    header: dict[str, Any] = {"format_version": version.FORMAT, "identity": identity, "windows": about}
    losses = {name: np.ascontiguousarray(one.losses) for name, one in windows.items()}
    header["sha256"] = _checksum(losses, header)
    write_atomically(folder / WINDOW_LOSSES, save(losses, {"nanostudy": json.dumps(header)}))


def read_window_losses(folder: Path) -> dict[str, Windows]:
    """By name; empty where the folder has none, as older runs and unfinished ones. Raises NanostudyError where they are damaged."""
    path = folder / WINDOW_LOSSES
    try:
        if not path.exists():
            return {}
        data = read_file(path, LARGEST)
        losses = load(data)
        described = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])["__metadata__"]
        header = json.loads(described["nanostudy"])
        whole = header.pop("sha256") == _checksum(losses, header) and header["format_version"] == version.FORMAT
        windows = {name: Windows(losses[name], **about) for name, about in header["windows"].items()}
    except OSError as problem:
        raise NanostudyError(f"{path} could not be read: {problem}.") from problem
    except (SafetensorError, ValueError, KeyError, TypeError) as problem:
        raise NanostudyError(f"{path} is damaged ({problem}). Restore or delete it.") from None
    if not whole:
        raise NanostudyError(f"{path} is damaged or of another version. Restore or delete it.")
    return windows


def _checksum(losses: Mapping[str, np.ndarray], header: Mapping[str, Any]) -> str:
    digest = hashlib.sha256(json.dumps(header, sort_keys=True).encode())
    for name in sorted(losses):
        digest.update(f"{name} {losses[name].dtype} {losses[name].shape}".encode())
        digest.update(losses[name].tobytes())
    return digest.hexdigest()
