"""Trackers: what a training tells, also for TensorBoard, Weights & Biases or MLflow, where their package is installed.

Trackers have a thread of their own, so that they delay no training, and where one fails tracking ends: one note, no more. Results are in
the run folder as ever. Nothing here needs a network unless the person's own settings of the tracker name a server.

tensorboard   event files in `tensorboard` in the run folder
wandb         offline runs in `wandb` in the run folder, or online where WANDB_MODE or `wandb login` says so
mlflow        the store that MLFLOW_TRACKING_URI names, or mlflow.db beside the run folder
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib.util
import json
import logging
import os
import queue
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from nanostudy.atomic import write_atomically
from nanostudy.errors import NanostudyError, UsageError
from nanostudy.result import Status
from nanostudy.training.events import Evaluated, Event, Finished, Logged, Started, Stopped
from nanostudy.training.recorder import Recorder
from nanostudy.training.run_folder import read_metadata

PROJECT = "nanostudy"  # where the tracker knows projects and the person names none
PATIENCE = 60.0  # seconds without a sign of life after which a tracker is left behind at the end
BATCH = ("loss", "learning_rate", "grad_norm", "tokens_per_second")  # of Logged
ENDS = {"finished": "FINISHED", "diverged": "FAILED", "stopped": "KILLED"}  # a training's, and MLflow's words


@dataclass(frozen=True)
class Subject:
    """What is tracked: one experiment's training."""

    name: str
    folder: Path  # of the run
    identity: str
    settings: Mapping[str, Any]
    step: int  # updates that stand from earlier sittings


class Tracker(Protocol):
    def log(self, step: int, values: Mapping[str, float]) -> None: ...

    def end(self, status: str, figures: Mapping[str, float]) -> None:
        """`status`: finished, diverged or stopped. `figures`: the final ones, where it finished."""


class TensorBoard:
    def __init__(self, subject: Subject) -> None:
        from torch.utils.tensorboard import SummaryWriter

        # what an earlier sitting wrote after its last checkpoint is told again
        purge = subject.step + 1 if subject.step else None
        self.writer: Any = SummaryWriter(str(subject.folder / "tensorboard"), purge_step=purge)
        self.settings = {name: _plain(value) for name, value in subject.settings.items()}
        rows = "\n".join(f"| {name} | {value} |" for name, value in self.settings.items())
        self.writer.add_text("settings", f"| setting | value |\n|---|---|\n{rows}", subject.step)

    def log(self, step: int, values: Mapping[str, float]) -> None:
        for name, value in values.items():
            self.writer.add_scalar(name, value, step)

    def end(self, status: str, figures: Mapping[str, float]) -> None:
        from torch.utils.tensorboard.summary import hparams

        for name, value in figures.items():
            self.writer.add_scalar(name, value, int(figures["final/updates"]))
        if figures:  # the table in which TensorBoard compares runs
            for summary in hparams(self.settings, dict(figures)):
                self.writer.file_writer.add_summary(summary)
        self.writer.close()


class WandB:
    def __init__(self, subject: Subject) -> None:
        import wandb

        mode = os.environ.get("WANDB_MODE") or ("online" if wandb.login(prompt=False) else "offline")
        self.run: Any = wandb.init(
            project=os.environ.get("WANDB_PROJECT", PROJECT),
            name=subject.name,
            id=_id(subject),
            dir=str(subject.folder),
            config=dict(subject.settings),
            mode=mode,
            resume="allow" if mode == "online" else None,
            reinit="create_new",  # a study's experiments train side by side
            settings=wandb.Settings(console="off", silent=True),
        )

    def log(self, step: int, values: Mapping[str, float]) -> None:
        self.run.log(dict(values), step=step)

    def end(self, status: str, figures: Mapping[str, float]) -> None:
        self.run.summary.update({**figures, "status": status})
        self.run.finish(exit_code=0 if status == "finished" else 1)


class MLflow:
    def __init__(self, subject: Subject) -> None:
        from mlflow import MlflowClient
        from mlflow.entities import Metric, Param, RunTag

        for library in ("mlflow", "alembic"):  # that tell every table they make
            logging.getLogger(library).setLevel(logging.WARNING)
        store = f"sqlite:///{(subject.folder.parent / 'mlflow.db').resolve().as_posix()}"
        self.client: Any = MlflowClient(tracking_uri=os.environ.get("MLFLOW_TRACKING_URI") or store)
        self.metric: Any = Metric
        project = os.environ.get("MLFLOW_EXPERIMENT_NAME", PROJECT)
        known = self.client.get_experiment_by_name(project)
        place = known.experiment_id if known else self.client.create_experiment(project)
        tag = _id(subject)
        found = self.client.search_runs([place], f"tags.nanostudy = '{tag}'", max_results=1)
        if found:
            self.id = found[0].info.run_id
            self.client.update_run(self.id, status="RUNNING")
        else:
            made = self.client.create_run(place, run_name=subject.name, tags={"nanostudy": tag})
            self.id = made.info.run_id
            params = [Param(name, str(value)[:500]) for name, value in subject.settings.items()]
            tags = [RunTag("identity", subject.identity), RunTag("folder", str(subject.folder.resolve()))]
            self.client.log_batch(self.id, params=params, tags=tags)
        # rows that are told again after a resume are the same: MLflow would keep both
        self.told = {name: self._last(name) for name in ("batch/loss", "exact/val_loss")} if found else {}

    def _last(self, name: str) -> int:
        return max((metric.step for metric in self.client.get_metric_history(self.id, name)), default=-1)

    def log(self, step: int, values: Mapping[str, float]) -> None:
        if step > max([-1, *(last for name, last in self.told.items() if name in values)]):
            now = int(time.time() * 1000)
            self.client.log_batch(
                self.id, metrics=[self.metric(name, value, now, step) for name, value in values.items()]
            )

    def end(self, status: str, figures: Mapping[str, float]) -> None:
        if figures:
            self.told = {}
            self.log(int(figures["final/updates"]), figures)
        self.client.set_terminated(self.id, ENDS[status])


TRACKERS: dict[str, Callable[[Subject], Tracker]] = {"tensorboard": TensorBoard, "wandb": WandB, "mlflow": MLflow}


def check_installed(track: str | None) -> None:
    """Raises UsageError where the tracker's package is not installed."""
    if track and importlib.util.find_spec(track) is None:
        raise UsageError(
            f"track={track} needs the package {track}, which is not installed: pip install {track}. Nothing was started; "
            "track=none trains without."
        )


class Tracking:
    """Hears trainings, one or many side by side, and hands them on. It raises nothing, whatever becomes of the tracker."""

    def __init__(self, track: str, say: Callable[[str], None]) -> None:
        self.track, self.say = track, say
        self.subjects: dict[str, Subject] = {}  # under way
        self.losses: dict[str, dict[str, float]] = {}  # of their last evaluations
        self.told: queue.SimpleQueue[tuple[Subject | None, str, Any, Any]] = queue.SimpleQueue()
        self.handled = 0
        self.problem: tuple[Subject, str] | None = None  # why it ended early, and in whose training
        self.noted = False
        self.thread = threading.Thread(target=self._follow, daemon=True)
        self.thread.start()

    def hear(self, event: Event, recorder: Recorder) -> None:
        """An event of the recorder's training, after the run folder has it."""
        name, r = event.name, recorder
        if isinstance(event, Started):
            self.subjects[name] = Subject(name, r.folder, r.identity, r.experiment.as_dict(), event.step)
            self._tell(name, "begin")
        elif isinstance(event, Logged):
            values = {column: getattr(event, column) for column in BATCH}
            self._tell(name, "log", event.step, _named("batch", values))
        elif isinstance(event, Evaluated):
            self.losses[name] = {"train_loss": event.train_loss, "val_loss": event.val_loss}
            values = {"tokens": event.tokens, "seconds": event.seconds, **self.losses[name]}
            self._tell(name, "log", event.step, _named("exact", values))
        elif isinstance(event, Finished):
            result = event.result
            losses = self.losses.get(name, {}) if result.status is Status.FINISHED else {}
            scored = {f"val_loss_at_{context}": loss for context, loss in result.context_losses.items()}
            figures = {**result.measures, **losses, **scored}
            self._tell(name, "end", str(result.status), _named("final", figures))
            self.subjects.pop(name, None)
        elif isinstance(event, Stopped):
            self._tell(name, "end", "stopped", {})
            self.subjects.pop(name, None)
        self._note()

    def close(self) -> None:
        """Waits for what was told, as long as the tracker gets on with it."""
        for name in list(self.subjects):
            self._tell(name, "end", "stopped", {})
        self.told.put((None, "", None, None))
        handled, since = self.handled, time.monotonic()
        while self.thread.is_alive() and time.monotonic() - since < PATIENCE:
            self.thread.join(0.1)
            if self.handled != handled:
                handled, since = self.handled, time.monotonic()
        self._note()
        if self.thread.is_alive():
            self.say(f"tracking with {self.track} was left behind: it did not get on for {PATIENCE:.0f} seconds")

    def _tell(self, name: str, kind: str, first: Any = None, second: Any = None) -> None:
        if name in self.subjects and self.problem is None:
            self.told.put((self.subjects[name], kind, first, second))

    def _note(self) -> None:
        """Once, to the person and in run.json. Not by the tracker's thread: another one writes the run folder."""
        if self.problem is None or self.noted:
            return
        self.noted = True
        subject, reason = self.problem
        text = f"tracking with {self.track} ended early, and the training went on: {reason}"
        self.say(text)
        with contextlib.suppress(NanostudyError):
            metadata = read_metadata(subject.folder)
            if metadata:
                metadata["notes"] = [*metadata.get("notes", []), text]
                write_atomically(subject.folder / "run.json", json.dumps(metadata, indent=1) + "\n")

    def _follow(self) -> None:
        """The trackers' thread, until the end of all trainings or the first failure."""
        trackers: dict[str, Tracker] = {}
        while True:
            subject, kind, first, second = self.told.get()
            if subject is None:
                return
            try:
                if kind == "begin":
                    trackers[subject.name] = TRACKERS[self.track](subject)
                elif kind == "log":
                    trackers[subject.name].log(first, second)
                else:
                    trackers.pop(subject.name).end(first, second)
            except BaseException as problem:  # an exit, too: it is the tracker's
                said = str(problem).strip().splitlines()
                self.problem = (subject, f"{type(problem).__name__}{f': {said[0]}' if said else ''}")
                return
            self.handled += 1


@contextlib.contextmanager
def tracking(track: str | None, say: Callable[[str], None]) -> Iterator[Tracking | None]:
    """None where nothing is tracked."""
    if track is None:
        yield None
        return
    made = Tracking(track, say)
    try:
        yield made
    finally:
        made.close()


def _named(group: str, values: Mapping[str, float | None]) -> dict[str, float]:
    return {f"{group}/{name}": float(value) for name, value in values.items() if value is not None}


def _id(subject: Subject) -> str:
    """Of this training in its folder: a resumed one is the same, one elsewhere another."""
    return hashlib.sha256(f"{subject.identity} {subject.folder.resolve()}".encode()).hexdigest()[:16]


def _plain(value: Any) -> Any:
    return value if isinstance(value, bool | int | float | str) else str(value)
