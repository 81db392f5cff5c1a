"""The far end of a cluster: does one task at a time in a thread of its own, and gives its reports to whoever pulls.

A Saving report is answered by the next pull. A stack trains in its folder where this machine sees it. Elsewhere it trains in a
folder of this machine, and what it saved goes to the address that was named, or travels back in parts.
"""

from __future__ import annotations

import contextlib
import os
import platform
import queue
import tempfile
import threading
import time
import uuid
import warnings
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # nothing here imports torch before the number of its threads is set
    from nanostudy.data.corpus import Corpus
    from nanostudy.settings import Resources
    from nanostudy.study.tasks import Report, Task, TrainStack

PART = 2**24  # bytes of a checkpoint that travel at once
PULL = 0.5  # seconds that a pull waits for something to tell
SENDING_SHARE = 20  # sending checkpoints takes at most one part in so many of the time
TOKEN = ".token"  # in a stack's folder: whoever reads there what the driver wrote sees the driver's folder


@dataclass(frozen=True)
class Unseen:
    """The stack's folder is not here: its checkpoint should be taken, if there is one, and then `begin` be called."""


@dataclass(frozen=True)
class Part:
    """Of a checkpoint of `size` bytes, those from `offset` on."""

    data: bytes
    offset: int
    size: int


@dataclass(frozen=True)
class Kept:
    """A checkpoint lies whole at this address."""

    address: str


@dataclass(frozen=True)
class Facts:
    """What the planner must know of a machine."""

    device: str  # its kind
    device_name: str
    precision: str
    memory: int | None  # bytes of its device that are free
    notes: tuple[str, ...]


def facts(resources: Resources) -> Facts:
    """Of this machine. Raises UsageError where it has not what is asked."""
    from nanostudy.device import available_memory
    from nanostudy.training.machine import resolve

    machine = resolve(resources)
    memory = available_memory(machine.device)
    return Facts(machine.device.type, machine.device_name, machine.precision, memory, machine.notes)


class Slot:
    """What an actor of the cluster is. All methods are called by one thread, in order."""

    def __init__(self, threads: int) -> None:
        os.environ["OMP_NUM_THREADS"] = str(threads)
        # arrays that processes share cannot be written, and nobody does
        warnings.filterwarnings("ignore", message="The given NumPy array is not writable")
        self.out: queue.Queue[Report | Unseen | Part | Kept] = queue.Queue()
        self.answers: queue.Queue[None] = queue.Queue()
        self.owing = False  # the last pull ended with what wants an answer
        self.stop = threading.Event()
        self.begun = threading.Event()
        self.path: Path | None = None  # of the checkpoint that is taken
        self.whole = True  # whether all of it arrived

    def where(self) -> str:
        """The id of its node."""
        import ray

        return ray.get_runtime_context().get_node_id()

    def start(
        self, task: Task, corpus: Corpus | None, resources: Resources, token: str, home: str | None, at: str | None
    ) -> None:
        """A corpus comes beside its task. `home`: an address for checkpoints; `at`: of the one to go on from."""
        if corpus is not None:
            task = replace(task, corpus=corpus)  # type: ignore[arg-type]
        self.begun.clear()
        threading.Thread(target=self._work, args=(task, resources, token, home, at), daemon=True).start()

    def take(self, part: Part) -> None:
        assert self.path
        with open(self.path, "ab") as file:
            file.write(part.data)

    def begin(self, size: int) -> None:
        """`size`: the bytes that should have arrived."""
        self.whole = size == (self.path.stat().st_size if self.path and self.path.exists() else 0)
        self.begun.set()

    def pull(self, stop: bool) -> list[Report | Unseen | Part | Kept]:
        """What there is to tell, with at most one part of a checkpoint; empty where nothing comes in time."""
        if stop:
            self.stop.set()
        if self.owing:
            self.answers.put(None)
        told: list[Report | Unseen | Part | Kept] = []
        with contextlib.suppress(queue.Empty):
            told.append(self.out.get(timeout=PULL))
            while not _wants_answer(told[-1]):
                told.append(self.out.get_nowait())
        self.owing = bool(told) and _wants_answer(told[-1])
        return told

    def _work(self, task: Task, resources: Resources, token: str, home: str | None, at: str | None) -> None:
        from nanostudy.study.tasks import Broken

        try:
            for report in self._reports(task, resources, token, home, at):
                self.out.put(report)
                if _wants_answer(report):
                    self.answers.get()
        except Exception as problem:  # of what is done here; perform() tells all others
            self.out.put(Broken("error", f"{type(problem).__name__}: {problem}"))

    def _reports(
        self, task: Task, resources: Resources, token: str, home: str | None, at: str | None
    ) -> Iterator[Report | Unseen | Part | Kept]:
        from nanostudy.study.cluster.addresses import fetch
        from nanostudy.study.tasks import Broken, Noted, TrainStack, perform

        if not isinstance(task, TrainStack) or (home is None and _seen(task.folder, token)):
            yield from perform(task, resources, self.stop.is_set)
            return
        with tempfile.TemporaryDirectory(prefix="nanostudy-") as folder:
            task = replace(task, folder=Path(folder))
            if home is None:
                self.path = task.path
                yield Unseen()
                self.begun.wait()
                if not self.whole:
                    yield Broken("lost", f"{platform.node()} did not get the whole checkpoint")
                    return
            elif at:
                try:
                    fetch(at, task.path)
                except FileNotFoundError:
                    yield Noted(f"There is no checkpoint at {at}; training from the beginning.")
                except Exception as problem:  # of whatever library the address needs
                    yield Broken("lost", f"{platform.node()} could not read {at}: {problem}")
                    return
            yield from self._away(task, resources, home)

    def _away(self, task: TrainStack, resources: Resources, home: str | None) -> Iterator[Report | Part | Kept]:
        """As perform(), and what was saved is sent, seldom enough to cost little."""
        from nanostudy.study.tasks import Broken, perform
        from nanostudy.training.events import Saving, Stopped

        saving = unsent = False
        sent = took = 0.0
        for report in perform(task, resources, self.stop.is_set):
            if isinstance(report, Saving):
                saving = True
            elif saving and not isinstance(report, Broken):  # what follows tells that it is saved
                saving, unsent = False, True
            if isinstance(report, Broken) and report.cause == "files":  # of this machine, and not of the study's folder
                report = replace(report, cause="lost", reason=f"{platform.node()}: {report.reason}")
            if unsent and (isinstance(report, Stopped | Broken) or time.monotonic() - sent >= SENDING_SHARE * took):
                start, unsent = time.monotonic(), False
                yield from _sent(task.path, home)
                sent = time.monotonic()
                took = sent - start
            yield report


def _wants_answer(report: object) -> bool:
    from nanostudy.training.events import Saving

    return isinstance(report, Saving | Part)


def _seen(folder: Path, token: str) -> bool:
    try:
        return (folder / TOKEN).read_text(encoding="ascii") == token
    except (OSError, UnicodeDecodeError):
        return False


def _sent(path: Path, home: str | None) -> Iterator[Report | Part | Kept]:
    from nanostudy.study.cluster.addresses import put
    from nanostudy.study.tasks import Noted

    if home is None:
        yield from parts(path)
        return
    address = f"{home}/{uuid.uuid4().hex}.safetensors"
    try:
        put(path, address)
    except Exception as problem:  # of whatever library the address needs: the next save tries again
        yield Noted(f"a checkpoint could not be kept at {home}: {problem}")
    else:
        yield Kept(address)


def parts(path: Path) -> Iterator[Part]:
    size = path.stat().st_size
    with open(path, "rb") as file:
        for offset in range(0, size, PART):
            yield Part(file.read(PART), offset, size)
