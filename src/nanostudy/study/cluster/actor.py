"""A worker on a cluster: performs one task at a time in a thread of its own, and gives its reports to the driver, which pulls.

A Saving report is answered by the next pull. A stack trains in its folder where this machine sees it. Elsewhere it trains in a
folder of this machine, and a transport (checkpoints.py) loads and saves its checkpoint.
"""

from __future__ import annotations

import contextlib
import os
import platform
import queue
import tempfile
import threading
import time
import warnings
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from nanostudy.settings import Resources
from nanostudy.study.cluster.messages import Message, Part, Wanted, append_part, parts
from nanostudy.study.tasks import Broken, Task, TrainStack, perform
from nanostudy.study.workers import HUNG
from nanostudy.text import duration
from nanostudy.training.events import Saving, Stopped

if TYPE_CHECKING:  # nothing here imports torch before the number of its threads is set
    from nanostudy.data.corpus import Corpus
    from nanostudy.study.cluster.checkpoints import AtAddress

PULL = 0.5  # seconds that a pull waits for a report
SENDING_SHARE = 20  # sending checkpoints takes at most one part in so many of the time
TOKEN = ".token"  # a file in a stack's folder: whoever reads what the driver wrote there sees the driver's folder


class WorkerActor:
    """What Ray runs. Its methods are called by one thread, in order; load() and save() by the task's thread.

    It is a transport itself: a stack's checkpoint travels through the driver, in parts, where it is not kept at an address.
    """

    def __init__(self, threads: int) -> None:
        os.environ["OMP_NUM_THREADS"] = str(threads)
        # arrays that processes share are read-only, and nobody writes them
        warnings.filterwarnings("ignore", message="The given NumPy array is not writable")
        self.out: queue.Queue[Message] = queue.Queue()
        self.answers: queue.Queue[None] = queue.Queue()
        self.owing = False  # the last pull ended with a message that waits for an answer
        self.stop = threading.Event()
        self.alive_at = time.monotonic()  # the task's last sign of life
        self.path = Path()  # where take() puts the checkpoint that load() waits for
        self.loaded = threading.Event()

    def node(self) -> str:
        """The id of its node."""
        import ray

        return ray.get_runtime_context().get_node_id()

    def start(
        self, task: Task, corpus: Corpus | None, resources: Resources, token: str, transport: AtAddress | None
    ) -> None:
        """A corpus comes beside its task. Without a transport, checkpoints stay in the stack's folder or travel through the driver."""
        if corpus is not None:
            task = replace(task, corpus=corpus)  # type: ignore[arg-type]
        self.alive_at = time.monotonic()
        threading.Thread(target=self._work, args=(task, resources, token, transport), daemon=True).start()

    def take(self, part: Part) -> None:
        """Raises ValueError where a part before it is missing."""
        self.alive_at = time.monotonic()
        if part.size == 0 or append_part(self.path, part):
            self.loaded.set()

    def load(self, path: Path) -> Iterator[Message]:
        self.path = path
        self.loaded.clear()
        yield Wanted()
        self.loaded.wait()

    def save(self, path: Path) -> Iterator[Message]:
        yield from parts(path)

    def pull(self, stop: bool) -> list[Message]:
        """The messages so far, with at most one part of a checkpoint; empty where none comes in time."""
        if stop:
            self.stop.set()
        if self.owing:
            self.answers.put(None)
        messages: list[Message] = []
        with contextlib.suppress(queue.Empty):
            messages.append(self.out.get(timeout=PULL))
            while not isinstance(messages[-1], Saving | Part):
                messages.append(self.out.get_nowait())
        self.owing = bool(messages) and isinstance(messages[-1], Saving | Part)
        if messages:
            self.alive_at = time.monotonic()
        elif time.monotonic() - self.alive_at > HUNG:
            messages = [Broken("died", f"its worker gave no sign of life for {duration(HUNG)} and was ended")]
        return messages

    def stop_requested(self) -> bool:
        """Asked between the parts of a task."""
        self.alive_at = time.monotonic()
        return self.stop.is_set()

    def _work(self, task: Task, resources: Resources, token: str, transport: AtAddress | None) -> None:
        try:
            for message in self._messages(task, resources, token, transport):
                self.out.put(message)
                if isinstance(message, Saving | Part):
                    self.answers.get()
        except Exception as problem:  # a mistake in this module; perform() reports all others
            self.out.put(Broken("error", f"{type(problem).__name__}: {problem}"))

    def _messages(self, task: Task, resources: Resources, token: str, transport: AtAddress | None) -> Iterator[Message]:
        if not isinstance(task, TrainStack) or (transport is None and _sees(task.folder, token)):
            yield from perform(task, resources, self.stop_requested)
            return
        with tempfile.TemporaryDirectory(prefix="nanostudy-") as folder:
            task, carrier = replace(task, folder=Path(folder)), transport or self
            try:
                yield from carrier.load(task.path)
            except Exception as problem:  # the transport's library may raise anything
                yield Broken("lost", f"{platform.node()} could not load the stack's checkpoint: {problem}")
                return
            yield from self._train_away(task, resources, carrier)

    def _train_away(
        self, task: TrainStack, resources: Resources, carrier: AtAddress | WorkerActor
    ) -> Iterator[Message]:
        """As perform(), and sends what was saved, seldom enough to cost little."""
        saving = unsent = False
        sent_at = took = 0.0
        for report in perform(task, resources, self.stop_requested):
            if isinstance(report, Saving):
                saving = True
            elif saving and not isinstance(report, Broken):  # the report after it shows that the checkpoint is saved
                saving, unsent = False, True
            if isinstance(report, Broken) and report.cause == "files":  # files of this machine, not the study's folder
                report = replace(report, cause="lost", reason=f"{platform.node()}: {report.reason}")
            due = isinstance(report, Stopped | Broken) or time.monotonic() - sent_at >= SENDING_SHARE * took
            if unsent and due:
                start, unsent = time.monotonic(), False
                yield from carrier.save(task.path)
                sent_at = time.monotonic()
                took = sent_at - start
            yield report


def _sees(folder: Path, token: str) -> bool:
    try:
        return (folder / TOKEN).read_text(encoding="ascii") == token
    except (OSError, UnicodeDecodeError):
        return False
