"""Where tasks are performed: in this process, in worker processes, or on a cluster (cluster/). A backend starts a task and
assignments on its reports.

All answer a Saving report when the next one is asked for: what came before is on disk by then.
"""

from __future__ import annotations

import contextlib
import os
import pickle
import queue
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Generator, Sequence
from pathlib import Path
from typing import Protocol

from nanostudy.settings import Resources
from nanostudy.study.tasks import Broken, Done, Report, Task, perform
from nanostudy.study.worker import receive, send
from nanostudy.training.events import Saving

MEMORY_SHARE = 0.8  # of what is free, for all workers together
PROCESS_MEMORY = 2**28  # bytes that a worker takes before it has any stack: measured 242 MiB

Process = subprocess.Popen[bytes]


class Backend(Protocol):
    """Workers are numbered from 0."""

    stop: Callable[[], bool]  # once it says so, trainings save and end, and what is started after that ends at once

    def idle(self) -> list[int]:
        """The workers that have nothing to do. Asked where there is something to do."""

    def start(self, worker: int, task: Task) -> None: ...

    def next(self, timeout: float) -> tuple[int, Report] | None:
        """The next report and whose it is; None if none comes in time. Done and Broken make the worker idle again.

        A Noted report may be of no worker that has anything to do: it is the backend's own.
        """

    def close(self) -> None:
        """Ends what still runs, without saving."""


class Inline:
    """One task at a time, in this process: the debugger's choice."""

    def __init__(self, resources: Resources) -> None:
        self.resources = resources
        self.running: Generator[Report, None, None] | None = None
        self.stop: Callable[[], bool] = lambda: False

    def idle(self) -> list[int]:
        return [] if self.running else [0]

    def start(self, worker: int, task: Task) -> None:
        self.running = perform(task, self.resources, self.stop)

    def next(self, timeout: float) -> tuple[int, Report] | None:
        if self.running is None:
            return None
        report = next(self.running)
        if isinstance(report, Done | Broken):
            self.running = None
        return 0, report

    def close(self) -> None:
        if self.running:
            self.running.close()  # and with it the lock of a folder
        self.running = None


class Workers:
    """One process each of these resources: a core each on a CPU, a device each otherwise.

    A process that dies is replaced when its next task starts.
    """

    def __init__(self, resources: Sequence[Resources]) -> None:
        self.resources = resources
        self.processes: dict[int, Process] = {}
        self.busy: set[int] = set()
        self.arrived: queue.Queue[tuple[int, Process, Report]] = queue.Queue()
        self.unanswered: list[tuple[int, Process]] = []
        self.stop: Callable[[], bool] = lambda: False
        self.stopping = False

    def idle(self) -> list[int]:
        return [worker for worker in range(len(self.resources)) if worker not in self.busy]

    def start(self, worker: int, task: Task) -> None:
        process = self.processes.get(worker)
        if process is None or process.poll() is not None:
            self._spawn(worker)
        self.busy.add(worker)
        self._tell(worker, ("task", pickle.dumps((task, self.resources[worker]), protocol=pickle.HIGHEST_PROTOCOL)))

    def next(self, timeout: float) -> tuple[int, Report] | None:
        for worker, process in self.unanswered:
            if self.processes[worker] is process:
                self._tell(worker, ("answer", None))
        self.unanswered.clear()
        if self.stop() and not self.stopping:
            self.stopping = True
            for worker in self.processes:
                self._tell(worker, ("stop", None))
        end = time.monotonic() + timeout
        while (left := end - time.monotonic()) > 0:
            try:
                worker, process, report = self.arrived.get(timeout=left)
            except queue.Empty:
                return None
            if self.processes[worker] is not process or worker not in self.busy:
                continue  # the end of a process that had nothing to do, or was replaced
            if isinstance(report, Saving):
                self.unanswered.append((worker, process))
            if isinstance(report, Done | Broken):
                self.busy.discard(worker)
            if isinstance(report, Broken):  # its device may be out of order, or its memory in pieces
                process.kill()
                process.wait()
            return worker, report
        return None

    def close(self) -> None:
        for process in self.processes.values():
            process.kill()
            process.wait()
        self.processes.clear()
        self.busy.clear()

    def _spawn(self, worker: int) -> None:
        threads = str(self.resources[worker].threads or 1)
        # -P, and the package last: files of the current folder are not taken for modules of the library
        code = f"import sys; sys.path.append({str(Path(__file__).parents[2])!r}); import nanostudy.study.worker as w; w.main()"
        process = subprocess.Popen(
            [sys.executable, "-P", "-c", code],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env={**os.environ, "OMP_NUM_THREADS": threads},
            # Ctrl-C is for the study, which asks its workers to stop
            start_new_session=True,
            creationflags=getattr(subprocess, "CREATE_NEW_PROCESS_GROUP", 0),
        )
        self.processes[worker] = process
        threading.Thread(target=self._listen, args=(worker, process), daemon=True).start()
        if self.stopping:
            self._tell(worker, ("stop", None))

    def _listen(self, worker: int, process: Process) -> None:
        assert process.stdout
        try:
            while True:
                self.arrived.put((worker, process, receive(process.stdout)))
        except Exception:  # its end, or what is no report: whatever it was, nothing more can be read
            process.kill()
            broken = Broken("died", f"its process ended ({_ending(process.wait())})")
            self.arrived.put((worker, process, broken))

    def _tell(self, worker: int, message: tuple[str, object]) -> None:
        process = self.processes.get(worker)
        if process and process.stdin:
            with contextlib.suppress(OSError):  # it died: its listener tells
                send(process.stdin, message)


def _ending(code: int) -> str:
    if code >= 0:
        return f"exit code {code}"
    try:
        return f"killed by {signal.Signals(-code).name}"
    except ValueError:
        return f"killed by signal {-code}"
