"""Trackers: a training's losses and rates in TensorBoard, Weights & Biases or MLflow, where their package is installed.

A tracker runs in a thread of its own, so that it delays no training. Where it fails, tracking ends with one note; the run folder
has the results either way. No network is needed, unless the user's own settings of the tracker name a server.

tensorboard   event files in `tensorboard` in the run folder
wandb         offline runs in `wandb` in the run folder; online ones with WANDB_MODE or after `wandb login`
mlflow        the store that MLFLOW_TRACKING_URI names, or mlflow.db beside the run folder
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib.util
import logging
import os
import queue
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from nanostudy.errors import NanostudyError, UsageError
from nanostudy.result import Status
from nanostudy.settings import Where
from nanostudy.training.events import Evaluated, Event, Finished, Logged, Started, Stopped
from nanostudy.training.recorder import Recorder
from nanostudy.training.run_folder import read_metadata, write_metadata

PROJECT = "nanostudy"  # for trackers with projects, where the user names none
PATIENCE = 60.0  # seconds without progress after which the end no longer waits for a tracker
BATCH = ("loss", "learning_rate", "grad_norm", "tokens_per_second")  # of Logged
ENDS = {"finished": "FINISHED", "diverged": "FAILED", "stopped": "KILLED"}  # our words, and MLflow's


@dataclass(frozen=True)
class Subject:
    """The training of one experiment, as a tracker knows it."""

    name: str
    folder: Path  # of the run
    identity: str
    settings: Mapping[str, Any]
    step: int  # updates of earlier sessions
    project: str | None = None  # that a person named
    title: str | None = None  # in place of the experiment's name


class Tracker(Protocol):
    def log(self, step: int, values: Mapping[str, float]) -> None: ...

    def end(self, status: str, figures: Mapping[str, float]) -> None:
        """`status`: finished, diverged or stopped. `figures`: the final ones; none where it stopped."""


class TensorBoard:
    def __init__(self, subject: Subject) -> None:
        from torch.utils.tensorboard import SummaryWriter

        # the training repeats what an earlier session wrote after its last checkpoint, or all of it
        purge = subject.step + 1 if subject.step else 0
        self.writer: Any = SummaryWriter(str(subject.folder / "tensorboard"), purge_step=purge)
        plain = (bool, int, float, str)
        self.settings = {k: value if isinstance(value, plain) else str(value) for k, value in subject.settings.items()}
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
            project=subject.project or os.environ.get("WANDB_PROJECT", PROJECT),
            name=subject.title or subject.name,
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

        for library in ("mlflow", "alembic"):  # which log every table that they create
            logging.getLogger(library).setLevel(logging.WARNING)
        store = f"sqlite:///{(subject.folder.parent / 'mlflow.db').resolve().as_posix()}"
        self.client: Any = MlflowClient(tracking_uri=os.environ.get("MLFLOW_TRACKING_URI") or store)
        self.metric: Any = Metric
        project = subject.project or os.environ.get("MLFLOW_EXPERIMENT_NAME", PROJECT)
        existing = self.client.get_experiment_by_name(project)
        place = existing.experiment_id if existing else self.client.create_experiment(project)
        tag = _id(subject)
        earlier = self.client.search_runs([place], f"tags.nanostudy = '{tag}'", max_results=1)
        run = (
            earlier[0]
            if earlier
            else self.client.create_run(place, run_name=subject.title or subject.name, tags={"nanostudy": tag})
        )
        self.id = run.info.run_id
        if earlier:
            self.client.update_run(self.id, status="RUNNING")
        else:
            params = [Param(name, str(value)[:500]) for name, value in subject.settings.items()]
            tags = [RunTag("identity", subject.identity), RunTag("folder", str(subject.folder.resolve()))]
            self.client.log_batch(self.id, params=params, tags=tags)
        # a resumed training repeats rows, and MLflow would keep both
        self.logged = {name: self._last(name) for name in ("batch/loss", "exact/val_loss")} if earlier else {}

    def _last(self, name: str) -> int:
        return max((metric.step for metric in self.client.get_metric_history(self.id, name)), default=-1)

    def log(self, step: int, values: Mapping[str, float]) -> None:
        if step > max([-1, *(last for name, last in self.logged.items() if name in values)]):
            now = int(time.time() * 1000)
            self.client.log_batch(
                self.id, metrics=[self.metric(name, value, now, step) for name, value in values.items()]
            )

    def end(self, status: str, figures: Mapping[str, float]) -> None:
        if figures:
            self.logged = {}
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
    """Hands the events of trainings, one or many side by side, to a tracker. It raises nothing, whatever the tracker does."""

    def __init__(self, where: Where, say: Callable[[str], None]) -> None:
        assert where.track
        self.track, self.where, self.say = where.track, where, say
        self.subjects: dict[str, Subject] = {}  # in training
        self.losses: dict[str, dict[str, float]] = {}  # of their last evaluations
        self.queue: queue.SimpleQueue[tuple[Subject, str, tuple[Any, ...]] | None] = queue.SimpleQueue()
        self.handled = 0
        self.problem: tuple[Subject, str] | None = None  # in whose training tracking ended early, and why
        self.noted = False
        self.thread = threading.Thread(target=self._follow, daemon=True)
        self.thread.start()

    def hear(self, event: Event, recorder: Recorder) -> None:
        """Takes an event of the recorder's training, after the run folder has recorded it."""
        name, r = event.name, recorder
        if isinstance(event, Started):
            about = (r.identity, r.experiment.as_dict(), event.step, self.where.track_project, self.where.track_name)
            self.subjects[name] = Subject(name, r.folder, *about)
            self._send(name, "begin")
        elif isinstance(event, Logged):
            values = {column: getattr(event, column) for column in BATCH}
            self._send(name, "log", event.step, _named("batch", values))
        elif isinstance(event, Evaluated):
            self.losses[name] = {"train_loss": event.train_loss, "val_loss": event.val_loss}
            values = {"tokens": event.tokens, "seconds": event.seconds, **self.losses[name]}
            self._send(name, "log", event.step, _named("exact", values))
        elif isinstance(event, Finished):
            result = event.result
            losses = self.losses.get(name, {}) if result.status is Status.FINISHED else {}
            scored = {f"val_loss_at_{context}": loss for context, loss in result.context_losses.items()}
            figures = {**result.measures, **losses, **scored}
            self._end(name, str(result.status), _named("final", figures))
        elif isinstance(event, Stopped):
            self._end(name, "stopped", {})
        self._note()

    def close(self) -> None:
        """Waits until the tracker has handled everything, as long as it makes progress."""
        for name in list(self.subjects):
            self._end(name, "stopped", {})
        self.queue.put(None)
        handled, since = self.handled, time.monotonic()
        while self.thread.is_alive() and time.monotonic() - since < PATIENCE:
            self.thread.join(0.1)
            if self.handled != handled:
                handled, since = self.handled, time.monotonic()
        self._note()
        if self.thread.is_alive():
            self.say(f"tracking with {self.track} was left behind: it made no progress for {PATIENCE:.0f} seconds")

    def _send(self, name: str, what: str, *values: Any) -> None:
        """`what`: begin, or a method of Tracker with its values."""
        if name in self.subjects and self.problem is None:
            self.queue.put((self.subjects[name], what, values))

    def _end(self, name: str, status: str, figures: Mapping[str, float]) -> None:
        self._send(name, "end", status, figures)
        self.subjects.pop(name, None)

    def _note(self) -> None:
        """Reports the problem once, to the user and in run.json; not from the tracker's thread, which does not own the run folder."""
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
                write_metadata(subject.folder, metadata)

    def _follow(self) -> None:
        """The trackers' thread: runs until all trainings ended, or the first failure."""
        trackers: dict[str, Tracker] = {}
        for subject, what, values in iter(self.queue.get, None):
            try:
                if what == "begin":
                    trackers[subject.name] = TRACKERS[self.track](subject)
                else:
                    getattr(trackers[subject.name], what)(*values)
                if what == "end":
                    del trackers[subject.name]
            except BaseException as problem:  # SystemExit, too: it is the tracker's, not ours
                lines = str(problem).strip().splitlines()
                self.problem = (subject, f"{type(problem).__name__}{f': {lines[0]}' if lines else ''}")
                return
            self.handled += 1


@contextlib.contextmanager
def tracking(where: Where, say: Callable[[str], None]) -> Iterator[Tracking | None]:
    """Yields None where nothing is tracked."""
    if where.track is None:
        yield None
        return
    tracker = Tracking(where, say)
    try:
        yield tracker
    finally:
        tracker.close()


def _named(group: str, values: Mapping[str, float | None]) -> dict[str, float]:
    return {f"{group}/{name}": float(value) for name, value in values.items() if value is not None}


def _id(subject: Subject) -> str:
    """Identifies a training in its folder: the same after a resume, another in another folder."""
    return hashlib.sha256(f"{subject.identity} {subject.folder.resolve()}".encode()).hexdigest()[:16]
