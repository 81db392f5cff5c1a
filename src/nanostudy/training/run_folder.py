"""The files of a run folder: what they are, how they are read, and whether they agree."""

from __future__ import annotations

import csv
import errno
import hashlib
import io
import itertools
import json
import math
import os
import stat
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nanostudy import version
from nanostudy.atomic import explain_writing, write_atomically
from nanostudy.errors import DamagedRun, NanostudyError
from nanostudy.result import Result, Status, finite
from nanostudy.training.window_losses import WINDOW_LOSSES


@dataclass(frozen=True)
class RunFile:
    """A file that a run folder may hold. docs/files.md says what is in each."""

    name: str
    most: int | None = 2**26  # bytes that it may have; None: as many as a model of this size needs
    has_checksum: bool = False  # in run.json, once the training has ended
    decisive: bool = False  # a result whose file is damaged does not count
    required: bool = False  # a finished run without it is damaged
    travels: bool = True  # a merge copies it


CHECKPOINT = "checkpoint.safetensors"
OPTIMIZER = "optimizer.safetensors"
FILES = {
    file.name: file
    for file in (
        RunFile("run.json", decisive=True, required=True),
        RunFile("settings.yaml"),
        RunFile("evaluations.csv", 2**28, has_checksum=True, decisive=True, required=True),
        RunFile("training.csv", 2**28, has_checksum=True, required=True),
        RunFile(WINDOW_LOSSES, 2**28, has_checksum=True),
        RunFile("best.safetensors", None, has_checksum=True, decisive=True),  # a study may delete weights
        RunFile("last.safetensors", None, has_checksum=True, decisive=True),
        RunFile(OPTIMIZER, None, has_checksum=True),
        RunFile("imported.safetensors", None),
        RunFile("samples.json"),
        RunFile("sample.txt"),
        RunFile("report.md"),
        RunFile("curve.png"),
        RunFile("curve.svg"),
        RunFile(CHECKPOINT, None, travels=False),
        RunFile("checkpoint.before.safetensors", None, travels=False),
    )
}
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


# --- run.json


def read_metadata(folder: Path) -> dict[str, Any] | None:
    """run.json, or None where there is none. Raises DamagedRun, and NanostudyError where it is of another version or out of reach."""
    path = folder / "run.json"
    try:
        os.lstat(path)
        metadata = json.loads(read_bounded(path, FILES["run.json"].most))
        written = metadata["format_version"]
    except (FileNotFoundError, NotADirectoryError):
        return None
    except OSError as problem:
        raise NanostudyError(f"{folder} cannot be read: {problem.strerror or problem}.") from problem
    except (ValueError, KeyError, TypeError, RecursionError):
        raise DamagedRun(f"{path} is damaged. Restore it, or choose another folder with --out.") from None
    if written != version.FORMAT:
        raise NanostudyError(
            f"{folder} was written by nanostudy {metadata.get('nanostudy')} (format version {written}); this one reads "
            f"version {version.FORMAT}. Use that version, or choose another folder with --out."
        )
    checksum = metadata.pop("sha256", None)  # older versions wrote none
    if not _is_whole(metadata) or checksum not in (None, _checksum(metadata)):
        raise DamagedRun(f"{path} is damaged. Restore it, or choose another folder with --out.")
    return metadata


def write_metadata(folder: Path, metadata: Mapping[str, Any]) -> None:
    """Writes run.json, with a checksum of itself at its end."""
    content = json.loads(json.dumps(metadata))  # as it will be read: keys are texts
    content["sha256"] = _checksum(content)
    write_atomically(folder / "run.json", json.dumps(content, indent=1) + "\n")


def _checksum(metadata: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(metadata, sort_keys=True).encode()).hexdigest()


def _is_whole(metadata: Any) -> bool:
    """Whether what other code reads of run.json has the types that it expects."""
    try:
        corpus, counts = metadata["corpus"], [metadata["parameters"]["total"]]
        texts = [
            metadata["identity"],
            *(corpus[key] for key in ("requested", "name", "sha256")),
            corpus["tokenizer"]["kind"],
        ]
        texts += [metadata[key] for key in ("nanostudy", "name", "diverged") if metadata.get(key) is not None]
        texts += metadata.get("notes") or []
        if corpus["tokenizer"]["kind"] == "char":
            texts.append(corpus["tokenizer"]["characters"])
        counts += [corpus[split][unit] for split in ("train", "val") for unit in ("tokens", "characters")]
        numbers = [corpus[split]["entropy_nats_per_character"] for split in ("train", "val")]
        numbers += [metadata.get(key) for key in ("updates", "skipped_updates", "tokens", "seconds")]
        numbers += [value for key in ("initial", "final", "best") for value in (metadata.get(key) or {}).values()]
        numbers += [(int(context), loss)[1] for context, loss in (metadata.get("context_losses") or {}).items()]
        mappings = [metadata["settings"], metadata["machine"], *(metadata.get("sittings") or [])]
        mappings += [metadata.get("checksums") or {}]
        known = (*(status for status in Status if status.has_result), "unfinished")
        return (
            metadata["status"] in known
            and all(isinstance(text, str) for text in texts)
            and all(isinstance(mapping, dict) for mapping in mappings)
            and all(isinstance(count, int) and 0 < count < 2**53 for count in counts)
            and all(number is None or (type(number) in (int, float) and abs(number) < 2**53) for number in numbers)
        )
    except (AttributeError, KeyError, TypeError, ValueError):
        return False


def read_result(folder: Path) -> Result | None:
    """The run's result so far, under the folder's name, or None where there is no run. Raises NanostudyError."""
    metadata = read_metadata(folder)
    if metadata is None:
        return None
    try:
        return Result.from_run(folder.resolve().name, metadata, read_rows(folder / "evaluations.csv"))
    except (KeyError, TypeError, ValueError):  # a cell of the table, or a rare key of run.json
        raise DamagedRun(
            f"{folder / 'run.json'} is damaged. Restore it, or choose another folder with --out."
        ) from None


# --- whether the files of a result agree


def faults(folder: Path, metadata: Mapping[str, Any], weights: bool = True) -> dict[str, str]:
    """What is wrong with the files of a result, by their names: missing, altered since run.json recorded them, or contradicting it.

    Older folders have fewer checksums, and `weights` leaves out those of tensors, which take long: what is there is compared.
    Raises NanostudyError where a file is out of reach.
    """
    problems: dict[str, str] = {}
    checksums = metadata.get("checksums") or {}
    for file in FILES.values():
        path = folder / file.name
        if not os.path.lexists(path):
            if file.required or (file.name in checksums and file.most is not None):  # weights may be deleted
                problems[file.name] = f"{path} is not there."
        elif file.has_checksum and file.name in checksums and (weights or file.most is not None):
            try:
                if checksum_of(path, largest(file, metadata)) != checksums[file.name]:
                    problems[file.name] = f"{path} is not what run.json recorded: it was cut or altered since."
            except ValueError as problem:
                problems[file.name] = f"{path} is damaged: {problem}."
            except OSError as problem:
                raise NanostudyError(f"{path} cannot be read: {problem.strerror or problem}.") from problem
    if "evaluations.csv" not in problems and (contradiction := _contradiction(folder / "evaluations.csv", metadata)):
        problems["evaluations.csv"] = f"{folder / 'evaluations.csv'} contradicts run.json: {contradiction}."
    if "training.csv" not in problems:
        try:
            read_rows(folder / "training.csv", whole=True)
        except DamagedRun as problem:
            problems["training.csv"] = str(problem)
    return problems


def decisive(problems: Mapping[str, str]) -> list[str]:
    """The problems for which a result does not count."""
    return [text for name, text in problems.items() if name in FILES and FILES[name].decisive]


def _contradiction(path: Path, metadata: Mapping[str, Any]) -> str | None:
    """How evaluations.csv differs from the evaluations in run.json, which holds the first, the last and the best of them."""
    try:
        rows = read_rows(path, whole=True)
    except DamagedRun as problem:
        return str(problem).removesuffix(".")
    if any(later["step"] <= row["step"] for row, later in itertools.pairwise(rows)):
        return "its steps do not rise"
    recorded = {name: metadata.get(name) for name in ("initial", "final", "best")}
    best = min(
        (row for row in rows if finite(row["val_loss"]) is not None), key=lambda row: row["val_loss"], default=None
    )
    there = {"initial": rows[0] if rows else None, "final": rows[-1] if rows else None, "best": best}
    if metadata["status"] != Status.FINISHED:
        del recorded["final"]
        recorded = {name: row for name, row in recorded.items() if row}
    for name, row in recorded.items():
        theirs = there[name]
        if row is None or theirs is None:
            return f"run.json has no {name} evaluation" if theirs else "it has no rows"
        for key in ("step", "tokens", "val_loss", "train_loss"):
            if finite(theirs[key]) != row.get(key):
                return f"its {name} {key} is {theirs[key]}, and {row.get(key)} there"
    for split in ("train", "val"):  # a character is a fixed share of a token
        ratios = [row[f"{split}_bits_per_character"] / row[f"{split}_loss"] for row in rows if row[f"{split}_loss"]]
        ratios = [ratio for ratio in ratios if math.isfinite(ratio)]
        if ratios and max(ratios) - min(ratios) > 1e-9 * max(ratios):
            return f"a {split} loss does not fit its bits per character"
    return None


# --- reading files that may have come from elsewhere


def largest(file: RunFile, metadata: Mapping[str, Any]) -> int:
    """The most bytes that it may have: tensors are at most AdamW's state of so many parameters, with a header."""
    return 16 * int(metadata["parameters"]["total"]) + 2**26 if file.most is None else file.most


def read_bounded(path: Path, most: int | None) -> bytes:
    """A regular file's bytes. Raises OSError, and ValueError where it is another thing, or has more bytes."""
    content = io.BytesIO()
    _in_pieces(path, most, content.write)
    return content.getvalue()


def checksum_of(path: Path, most: int | None = None) -> str:
    """The SHA-256 of a regular file. Raises as read_bounded does."""
    digest = hashlib.sha256()
    _in_pieces(path, most, digest.update)
    return digest.hexdigest()


def copy_bounded(source: Path, target: Path, most: int | None) -> str:
    """Copies a regular file that is no link, and returns its SHA-256. Raises as read_bounded does."""
    digest = hashlib.sha256()
    if source.is_symlink():
        raise ValueError("it is a link")
    try:
        with open(target, "wb") as file:

            def piece(content: bytes) -> None:
                digest.update(content)
                file.write(content)

            _in_pieces(source, most, piece)
    except (OSError, ValueError):
        target.unlink(missing_ok=True)
        raise
    return digest.hexdigest()


def _in_pieces(path: Path, most: int | None, take: Callable[[bytes], object]) -> None:
    try:
        file = open(path, "rb", opener=_at_once)  # noqa: SIM115 (closed below)
    except OSError as problem:
        if problem.errno == errno.ELOOP or (problem.errno == errno.ENOENT and os.path.islink(path)):
            raise ValueError("it is a link to nothing") from None
        raise
    with file:
        kind = os.fstat(file.fileno())
        if not stat.S_ISREG(kind.st_mode):
            raise ValueError("it is no regular file")
        if most is not None and kind.st_size > most:
            raise ValueError(f"it has {kind.st_size:,} bytes, more than such a file can have")
        while piece := file.read(2**20):
            take(piece)


def _at_once(path: str, flags: int) -> int:
    """Opening a pipe must not wait for its writer."""
    return os.open(path, flags | getattr(os, "O_NONBLOCK", 0))


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


def read_rows(path: Path, whole: bool = False) -> list[dict[str, float]]:
    """A table's rows, up to the first line that is none: a kill may have cut the last. `whole` raises DamagedRun there.

    Raises DamagedRun where it is no text, NanostudyError where it is out of reach.
    """
    if not whole and not os.path.lexists(path):
        return []
    rows, columns = [], COLUMNS[path.name]
    lines = _table(path).split("\n")
    for number, line in enumerate(lines[1:-1], start=2):
        cells = line.split(",")
        try:
            if len(cells) != len(columns):
                raise ValueError
            named = zip(columns, cells, strict=True)
            rows.append({key: int(cell) if key in ("step", "tokens") else float(cell) for key, cell in named})
        except ValueError:
            if whole:
                raise DamagedRun(f"{path} is damaged: its line {number} is no row. Restore or delete it.") from None
            break
    if whole and (lines[0] != ",".join(columns) or lines[-1]):
        raise DamagedRun(f"{path} is damaged: its {'last' if lines[-1] else 'first'} line is no row.")
    return rows


def _table(path: Path) -> str:
    try:
        return read_bounded(path, FILES[path.name].most).decode()
    except ValueError as problem:
        raise DamagedRun(f"{path} is damaged ({problem}). Restore or delete it.") from None
    except OSError as problem:
        raise NanostudyError(f"{path} cannot be read: {problem.strerror or problem}.") from problem


# --- settings


def settings_yaml(settings: Mapping[str, Any]) -> str:
    """A flat mapping as YAML, which takes JSON's scalars."""
    return "".join(f"{key}: {_scalar(value)}\n" for key, value in settings.items())


def _scalar(value: Any) -> str:
    """YAML takes no raw control characters, and no surrogate pairs such as JSON escapes rare characters with."""
    text = json.dumps(value, ensure_ascii=False)
    return "".join(c if c.isprintable() else f"\\U{ord(c):08x}" for c in text)
