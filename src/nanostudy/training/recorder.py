"""Records a training in its run folder, event by event."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from nanostudy import version
from nanostudy.atomic import remove_leftovers, write_atomically
from nanostudy.data.corpus import Corpus
from nanostudy.data.texts import NAMES
from nanostudy.errors import NanostudyError
from nanostudy.model.config import GPTConfig, count_parameters
from nanostudy.result import Status, finite
from nanostudy.settings import Experiment
from nanostudy.training.events import Evaluated, Event, Finished, Logged, Saving, Started, Stopped
from nanostudy.training.machine import Machine
from nanostudy.training.run_folder import (
    COLUMNS,
    FILES,
    OPTIMIZER,
    append_rows,
    checksum_of,
    keep_rows,
    read_metadata,
    read_rows,
    settings_yaml,
    write_metadata,
)
from nanostudy.training.tensors import save_tensors
from nanostudy.training.weights import Weights, save_weights
from nanostudy.training.window_losses import Windows, read_window_losses, write_window_losses


class Recorder:
    """Writes one run folder, which this process owns (atomic.sole_owner)."""

    def __init__(self, folder: Path, experiment: Experiment, identity: str, corpus: Corpus, machine: Machine) -> None:
        self.folder, self.experiment, self.identity = folder, experiment, identity
        self.corpus, self.machine = corpus, machine
        self.config = GPTConfig.of(experiment, corpus.tokenizer.vocab_size)
        # rows by step that are not written yet
        self.rows: dict[str, dict[int, tuple[Any, ...]]] = {table: {} for table in COLUMNS}
        # of the last evaluation, until they are written with those that follow it
        self.windows: dict[str, Windows] = {}
        # tables that a failed write may have left with a part of a row
        self.unsure: set[str] = set()

    def claim(self, settings: Mapping[str, Any], **about: Any) -> str:
        """Prepares the folder and returns its state: "new", "unfinished" (it can go on), "finished" or "diverged" (a result, which is
        never changed).

        A new folder gets a settings.yaml of the experiment's settings and these (resources, and what replaces the experiment's), and
        the fields in `about` in run.json. Raises NanostudyError where the folder holds another experiment.
        """
        before = read_metadata(self.folder)
        if before is None:
            others = [path.name for path in self.folder.iterdir() if not path.name.startswith(".")]
            if any(name.startswith("run.json.damaged") for name in others):  # a damaged one was set aside
                others = [name for name in others if name not in FILES and not name.startswith("run.json.damaged")]
            if others:
                raise NanostudyError(
                    f"{self.folder} holds other files ({', '.join(sorted(others)[:3])}) and no run. "
                    "Choose another folder with --out; nothing was changed."
                )
            self._write_metadata(**{"status": "unfinished", "notes": list(self.machine.notes), **about})
        elif before["identity"] != self.identity:
            there, now = before["settings"], self.experiment.as_dict()
            changed = ", ".join(f"{k} {there.get(k)} there, {now[k]} requested" for k in now if there.get(k) != now[k])
            same_text = before["corpus"].get("sha256") == self.corpus.sha256
            other = f"init_from={self.experiment.init_from} has other weights now" if same_text else "on another text"
            raise NanostudyError(
                f"{self.folder} holds another run ({changed or other}). Choose another folder with --out; nothing was changed."
            )
        remove_leftovers(self.folder)
        if not (self.folder / "settings.yaml").exists():
            settings = {**self.experiment.as_dict(), **settings}
            corpus = Path(settings["corpus"])
            if settings["corpus"] not in NAMES and corpus.exists():
                settings["corpus"] = str(corpus.resolve())  # so that the settings work from any folder
            write_atomically(self.folder / "settings.yaml", settings_yaml(settings))
        return before["status"] if before else "new"

    def record(self, event: Event) -> None:
        """Records what the run folder keeps of an event. Rows are on disk after an evaluation, and before a checkpoint."""
        if isinstance(event, Started):
            for rows in self.rows.values():
                rows.clear()
            self.windows.clear()
            keep_rows(self.folder / "training.csv", event.step)
            keep_rows(self.folder / "evaluations.csv", event.evaluated_at)
            for stale in ("sample.txt", "samples.json", "report.md", "curve.png", "curve.svg"):
                (self.folder / stale).unlink(missing_ok=True)
            before = read_metadata(self.folder) or {}
            kept = [session for session in before.get("sittings", []) if session["after_update"] < event.step]
            session = {"after_update": event.step, "members": event.members, **self.machine.as_dict()}
            notes = list(dict.fromkeys([*before.get("notes", []), *self.machine.notes, *event.notes]))
            self._write_metadata(sittings=[*kept, session], notes=notes)
        elif isinstance(event, Logged):
            row = (event.step, event.loss, event.learning_rate, event.grad_norm, round(event.tokens_per_second, 1))
            self.rows["training.csv"][event.step] = row
        elif isinstance(event, Evaluated):
            self.rows["evaluations.csv"][event.step] = self._evaluation(
                event.step, event.tokens, event.seconds, event.train_loss, event.val_loss
            )
            self.windows.update(event.windows)
        if isinstance(event, Saving | Stopped) and self.windows:
            write_window_losses(self.folder, self.windows, self.identity)
        if isinstance(event, Evaluated | Saving | Stopped | Finished):
            self._write_rows()
        if isinstance(event, Finished):
            self._finish(event)

    def _evaluation(
        self, step: int, tokens: int, seconds: float, train_loss: float, val_loss: float
    ) -> tuple[float, ...]:
        bits = self.corpus.train.bits_per_character(train_loss), self.corpus.val.bits_per_character(val_loss)
        return step, tokens, round(seconds, 2), train_loss, val_loss, *bits

    def restore(self, evaluations: Sequence[Mapping[str, float]]) -> None:
        """Writes back evaluations of an earlier session that evaluations.csv lacks or has otherwise. A loss of None was not finite."""
        path, changed = self.folder / "evaluations.csv", False
        rows = {row["step"]: row for row in read_rows(path)}
        for point in evaluations:
            losses = (math.nan if point[key] is None else point[key] for key in ("train_loss", "val_loss"))
            cells = self._evaluation(int(point["step"]), int(point["tokens"]), point["seconds"], *losses)
            row = dict(zip(COLUMNS[path.name], cells, strict=True))
            there = rows.get(row["step"], {})
            if any(finite(there.get(name)) != finite(cell) for name, cell in row.items() if name != "seconds"):
                rows[row["step"]], changed = row, True
        if changed:
            lines = [COLUMNS[path.name], *(rows[step].values() for step in sorted(rows))]
            write_atomically(path, "".join(",".join(map(str, line)) + "\n" for line in lines))

    def _write_rows(self) -> None:
        for table, rows in self.rows.items():
            path = self.folder / table
            if rows:
                if table in self.unsure:
                    keep_rows(path, min(rows) - 1)
                self.unsure.add(table)
                append_rows(path, list(rows.values()))
                self.unsure.discard(table)
                rows.clear()

    def _finish(self, event: Finished) -> None:
        result = event.result
        evaluations = read_rows(self.folder / "evaluations.csv")
        corpus = {"name": self.corpus.name, "sha256": self.corpus.sha256}
        last, best = (event.last_weights, result.step), (event.best_weights, result.best_step or 0)
        for name, (row, step) in {"last": last, "best": best}.items():
            weights = Weights(row, self.experiment, self.config, self.corpus.tokenizer)
            about = {"step": step, "identity": self.identity, "corpus": corpus}
            save_weights(self.folder / f"{name}.safetensors", weights, about)
        if result.status is Status.FINISHED:
            evaluated = self.windows or read_window_losses(self.folder)  # a resume did not evaluate again
            write_window_losses(self.folder, {**evaluated, **event.windows}, self.identity)
        if event.moments is not None and result.status is Status.FINISHED:
            exp_avg, exp_avg_sq = event.moments
            about = {"kind": "optimizer", "identity": self.identity, "updates": result.updates}
            save_tensors(self.folder / OPTIMIZER, {"exp_avg": exp_avg, "exp_avg_sq": exp_avg_sq}, about)
        paths = {name: self.folder / name for name, file in FILES.items() if file.has_checksum}
        self._write_metadata(
            **result.to_run(),
            checksums={name: checksum_of(path) for name, path in paths.items() if path.exists()},
            initial=_finite(evaluations[0]) if evaluations else None,
            final=_finite(evaluations[-1]) if evaluations and result.status is Status.FINISHED else None,
            best=next((row for row in evaluations if row["step"] == result.best_step), None),
        )

    def _write_metadata(self, **changes: Any) -> None:
        count = count_parameters(self.config)
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
        write_metadata(self.folder, metadata)


def _finite(row: Mapping[str, float]) -> dict[str, float | None]:
    """JSON has no NaN."""
    return {key: finite(value) for key, value in row.items()}
