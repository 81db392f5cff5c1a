"""The files of a run folder, and how they are read.

settings.yaml            trains the same run again
run.json                 versions, device, corpus, times, losses
training.csv             one row every log_interval updates
evaluations.csv          one row per evaluation
window_losses.safetensors  the last evaluation's losses window by window (window_losses.py)
best.safetensors         weights at the lowest validation loss, with settings and tokenizer: all that sampling needs
last.safetensors         weights after the last update
optimizer.safetensors    AdamW's state after it, where it is kept, for going on in nanoGPT
checkpoint.safetensors   for a resume; only while the run is unfinished
samples.json, sample.txt what the model wrote (samples.py)
"""

from __future__ import annotations

import csv
import io
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from nanostudy import version
from nanostudy.atomic import explain_writing, write_atomically
from nanostudy.errors import NanostudyError
from nanostudy.result import Result

TRAINING_COLUMNS = ("step", "loss", "learning_rate", "grad_norm", "tokens_per_second")
EVALUATION_COLUMNS = (
    "step",
    "tokens",
    "seconds",
    "train_loss",
    "val_loss",
    "train_bits_per_character",
    "val_bits_per_character",
)
COLUMNS = {"training.csv": TRAINING_COLUMNS, "evaluations.csv": EVALUATION_COLUMNS}
CHECKPOINT = "checkpoint.safetensors"
OPTIMIZER = "optimizer.safetensors"


def read_metadata(folder: Path) -> dict[str, Any] | None:
    """run.json, or None where there is none. Raises NanostudyError where it is damaged or of another version."""
    path = folder / "run.json"
    try:
        if not path.is_file():
            return None
    except OSError as problem:
        raise NanostudyError(f"{folder} cannot be read: {problem.strerror}.") from None
    try:
        metadata = json.loads(path.read_text(encoding="utf-8"))
        written, ours = metadata["format_version"], version.FORMAT
        texts, mappings = ("identity", "status"), ("settings", "corpus", "machine", "parameters")
        whole = all(isinstance(metadata.get(key), str) for key in texts)
        whole &= all(isinstance(metadata.get(key), dict) for key in mappings)
    except (OSError, ValueError, KeyError, TypeError):
        written = ours = whole = False
    if written == ours and not whole:
        raise NanostudyError(f"{path} is damaged. Restore it, or choose another folder with --out.")
    if written != ours:
        raise NanostudyError(
            f"{folder} was written by nanostudy {metadata.get('nanostudy')} (format version {written}); this one reads "
            f"version {version.FORMAT}. Use that version, or choose another folder with --out."
        )
    return metadata


def read_result(folder: Path) -> Result | None:
    """The run's result so far, under the folder's name, or None where there is no run. Raises NanostudyError."""
    metadata = read_metadata(folder)
    if metadata is None:
        return None
    return Result.from_run(folder.resolve().name, metadata, read_rows(folder / "evaluations.csv"))


# --- tables


def append_rows(path: Path, rows: Sequence[tuple[object, ...]]) -> None:
    """The rows are on disk when it returns, so that a checkpoint after them may be written."""
    try:
        with open(path, "a", encoding="utf-8", newline="") as file:
            csv.writer(file, lineterminator="\n").writerows(rows)
            file.flush()
            os.fsync(file.fileno())
    except OSError as problem:
        raise NanostudyError(explain_writing(path, problem)) from problem


def keep_rows(path: Path, last_step: int) -> None:
    """Starts the table, or deletes the rows after the checkpoint, since the training repeats those updates."""
    columns = COLUMNS[path.name]
    kept = [",".join(columns)]
    if path.is_file():
        for line in _table(path).splitlines()[1:]:
            step = line.split(",")[0]
            if line.count(",") == len(columns) - 1 and step.isdigit() and int(step) <= last_step:
                kept.append(line)
    write_atomically(path, "\n".join(kept) + "\n")


def read_rows(path: Path) -> list[dict[str, float]]:
    """A table's rows, without a last line that a kill cut short."""
    if not path.is_file():
        return []
    rows = []
    for row in csv.DictReader(io.StringIO(_table(path))):
        try:
            rows.append({key: int(value) if key in ("step", "tokens") else float(value) for key, value in row.items()})
        except (TypeError, ValueError):
            break
    return rows


def _table(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as problem:
        raise NanostudyError(f"{path} is damaged or cannot be read ({problem}). Restore or delete it.") from None


# --- settings


def settings_yaml(settings: Mapping[str, Any]) -> str:
    """A flat mapping as YAML, which takes JSON's scalars."""
    return "".join(f"{key}: {_scalar(value)}\n" for key, value in settings.items())


def _scalar(value: Any) -> str:
    """YAML takes no raw control characters, and no surrogate pairs such as JSON escapes rare characters with."""
    text = json.dumps(value, ensure_ascii=False)
    return "".join(c if c.isprintable() else f"\\U{ord(c):08x}" for c in text)
