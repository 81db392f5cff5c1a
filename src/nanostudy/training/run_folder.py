"""The run folder: what one experiment leaves behind, written from the trainer's events.

settings.yaml        trains the same run again
run.json             versions, device, corpus, times, losses
training.csv         a row every log_interval updates
evaluations.csv      a row an evaluation
best.safetensors     weights at the lowest validation loss; with settings and tokenizer, so that sampling needs no more
last.safetensors     weights after the last update
optimizer.safetensors    AdamW's state after it, where it was kept: what going on in nanoGPT needs
checkpoint.safetensors   while unfinished: what a resume needs
"""

from __future__ import annotations

import csv
import io
import json
import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from nanostudy import version
from nanostudy.atomic import explain_writing, save_tensors, write_atomically
from nanostudy.data.corpus import Corpus
from nanostudy.data.texts import NAMES
from nanostudy.errors import NanostudyError
from nanostudy.model.gpt import GPTConfig, count_parameters
from nanostudy.settings import Experiment
from nanostudy.training.events import Evaluated, Event, Finished, Logged, Saving, Started, Stopped
from nanostudy.training.machine import Machine
from nanostudy.training.weights import Weights, save_weights

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
        written, known = metadata["format_version"], version.FORMAT
        texts, mappings = ("identity", "status"), ("settings", "corpus", "machine", "parameters")
        whole = all(isinstance(metadata.get(key), str) for key in texts)
        whole &= all(isinstance(metadata.get(key), dict) for key in mappings)
    except (OSError, ValueError, KeyError, TypeError):
        written = known = whole = False
    if written == known and not whole:
        raise NanostudyError(f"{path} is damaged. Restore it, or choose another folder with --out.")
    if written != known:
        raise NanostudyError(
            f"{folder} was written by nanostudy {metadata.get('nanostudy')} (format version {written}); this one reads "
            f"version {version.FORMAT}. Use that version, or choose another folder with --out."
        )
    return metadata


class Recorder:
    """Writes one run folder. The folder belongs to this process (files.sole_owner)."""

    def __init__(self, folder: Path, experiment: Experiment, identity: str, corpus: Corpus, machine: Machine) -> None:
        self.folder, self.experiment, self.identity = folder, experiment, identity
        self.corpus, self.machine = corpus, machine
        self.shape = GPTConfig.of(experiment, corpus.tokenizer.vocab_size)
        # told, and not written yet: rows by step
        self.rows: dict[str, dict[int, tuple[object, ...]]] = {table: {} for table in COLUMNS}
        # tables in which rows that could not be written may have left a part of themselves
        self.unsure: set[str] = set()

    def claim(self, resources: Mapping[str, Any], **about: Any) -> str:
        """Prepares the folder: "new", "unfinished" (it can go on), "finished" or "diverged" (results, which are never changed).

        A new folder's run.json gets what is told `about` the run. Raises NanostudyError where the folder holds another experiment.
        """
        before = read_metadata(self.folder)
        if before is None:
            others = [path.name for path in self.folder.iterdir() if not path.name.startswith(".")]
            if others:
                raise NanostudyError(
                    f"{self.folder} holds other files ({', '.join(sorted(others)[:3])}) and no run. "
                    "Choose another folder with --out; nothing was changed."
                )
            self._write_metadata(**{"status": "unfinished", "notes": list(self.machine.notes), **about})
        elif before["identity"] != self.identity:
            changed = _changes(before["settings"], self.experiment.as_dict())
            raise NanostudyError(
                f"{self.folder} holds another run ({changed or 'on another text or from other weights'}). "
                "Choose another folder with --out; nothing was changed."
            )
        else:
            for leftover in self.folder.glob(".*.tmp"):  # of a process that was killed while it wrote
                leftover.unlink(missing_ok=True)
        if not (self.folder / "settings.yaml").exists():
            settings = {**self.experiment.as_dict(), **resources}
            if (
                settings["corpus"] not in NAMES and Path(settings["corpus"]).exists()
            ):  # so that it is found from any folder
                settings["corpus"] = str(Path(settings["corpus"]).resolve())
            write_atomically(self.folder / "settings.yaml", settings_yaml(settings))
        return before["status"] if before else "new"

    def record(self, event: Event) -> None:
        """Takes what a run folder keeps; other events pass. Rows are on disk after an evaluation, and before a checkpoint."""
        if isinstance(event, Started):
            for rows in self.rows.values():
                rows.clear()
            keep_rows(self.folder / "training.csv", TRAINING_COLUMNS, event.step)
            keep_rows(self.folder / "evaluations.csv", EVALUATION_COLUMNS, event.evaluated_at)
            for stale in ("sample.txt", "report.md", "curve.png"):
                (self.folder / stale).unlink(missing_ok=True)
            before = read_metadata(self.folder) or {}
            kept = [sitting for sitting in before.get("sittings", []) if sitting["after_update"] < event.step]
            sitting = {"after_update": event.step, "members": event.members, **self.machine.as_dict()}
            notes = [*before.get("notes", []), *(n for n in event.notes if n not in before.get("notes", []))]
            self._write_metadata(sittings=[*kept, sitting], notes=notes)
        elif isinstance(event, Logged):
            row = (event.step, event.loss, event.learning_rate, event.grad_norm, round(event.tokens_per_second, 1))
            self.rows["training.csv"][event.step] = row
        elif isinstance(event, Evaluated):
            bits = (
                self.corpus.train.bits_per_character(event.train_loss),
                self.corpus.val.bits_per_character(event.val_loss),
            )
            start = (event.step, event.tokens, round(event.seconds, 2), event.train_loss, event.val_loss)
            self.rows["evaluations.csv"][event.step] = (*start, *bits)
        if isinstance(event, Evaluated | Saving | Stopped | Finished):
            self._write_rows()
        if isinstance(event, Finished):
            self._finish(event)

    def _write_rows(self) -> None:
        for table, rows in self.rows.items():
            path = self.folder / table
            if rows:
                if table in self.unsure:
                    keep_rows(path, COLUMNS[table], min(rows) - 1)
                self.unsure.add(table)
                append_rows(path, list(rows.values()))
                self.unsure.discard(table)
                rows.clear()

    def _finish(self, event: Finished) -> None:
        evaluations = read_rows(self.folder / "evaluations.csv")
        for name, row, step in (
            ("last", event.last_weights, event.updates + event.skipped),
            ("best", event.best_weights, event.best_step),
        ):
            weights = Weights(row, self.experiment, self.shape, self.corpus.tokenizer)
            about = {"step": step, "identity": self.identity}
            about["corpus"] = {"name": self.corpus.name, "sha256": self.corpus.sha256}
            save_weights(self.folder / f"{name}.safetensors", weights, about)
        if event.moments is not None and not event.diverged:
            exp_avg, exp_avg_sq = event.moments
            about = {"kind": "optimizer", "identity": self.identity, "updates": event.updates}
            save_tensors(self.folder / OPTIMIZER, {"exp_avg": exp_avg, "exp_avg_sq": exp_avg_sq}, about)
        best = next((row for row in evaluations if row["step"] == event.best_step), None)
        self._write_metadata(
            status="diverged" if event.diverged else "finished",
            diverged=event.diverged,
            updates=event.updates,
            skipped_updates=event.skipped,
            tokens=event.tokens,
            seconds=round(event.seconds, 2),
            initial=_finite(evaluations[0]) if evaluations else None,
            final=_finite(evaluations[-1]) if evaluations and not event.diverged else None,
            best=best,
            context_losses=event.context_losses,
        )

    def _write_metadata(self, **changes: Any) -> None:
        count = count_parameters(self.shape)
        metadata = read_metadata(self.folder) or {
            "format_version": version.FORMAT,
            "nanostudy": version.VERSION,
            "numerics_version": version.NUMERICS,
            "name": self.experiment.name,
            "identity": self.identity,
            "settings": self.experiment.as_dict(),
            "corpus": self.corpus.as_dict(),
            "parameters": {"total": count.total, "without_positions": count.without_positions},
        }
        machine = {key: value for key, value in self.machine.as_dict().items() if key != "notes"}
        metadata = {**metadata, "machine": machine, **changes}
        write_atomically(self.folder / "run.json", json.dumps(metadata, indent=1) + "\n")


def _finite(row: Mapping[str, float]) -> dict[str, float | None]:
    """JSON has no NaN."""
    return {key: value if math.isfinite(value) else None for key, value in row.items()}


# --- tables


def append_rows(path: Path, rows: Sequence[tuple[object, ...]]) -> None:
    """On disk when it returns: a checkpoint that knows of them may follow."""
    try:
        with open(path, "a", encoding="utf-8", newline="") as file:
            csv.writer(file, lineterminator="\n").writerows(rows)
            file.flush()
            os.fsync(file.fileno())
    except OSError as problem:
        raise NanostudyError(explain_writing(path, problem)) from problem


def keep_rows(path: Path, columns: tuple[str, ...], last_step: int) -> None:
    """Starts the table, or drops what was written after the checkpoint: those updates are made again."""
    kept = [",".join(columns)]
    if path.is_file():
        for line in _table(path).splitlines()[1:]:
            step = line.split(",")[0]
            if line.count(",") == len(columns) - 1 and step.isdigit() and int(step) <= last_step:
                kept.append(line)
    write_atomically(path, "\n".join(kept) + "\n")


def read_rows(path: Path) -> list[dict[str, float]]:
    """A table's rows; a last line that a kill cut short is left out."""
    if not path.is_file():
        return []
    reader = csv.DictReader(io.StringIO(_table(path)))
    rows = []
    for row in reader:
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


# --- settings and weights


def settings_yaml(settings: Mapping[str, Any]) -> str:
    """A flat mapping as YAML; JSON's scalars are YAML's."""
    return "".join(f"{key}: {_scalar(value)}\n" for key, value in settings.items())


def _scalar(value: Any) -> str:
    """YAML takes no raw control characters, and does not join the pairs in which JSON escapes the rarer ones."""
    text = json.dumps(value, ensure_ascii=False)
    return "".join(c if c.isprintable() else f"\\U{ord(c):08x}" for c in text)


def _changes(before: Mapping[str, Any], now: Mapping[str, Any]) -> str:
    return ", ".join(f"{k} {before.get(k)} there, {now[k]} asked" for k in now if before.get(k) != now[k])
