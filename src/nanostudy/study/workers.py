"""Where tasks are performed: in this process, or in worker processes; cluster/ adds a third backend.

A backend starts tasks and hands on their reports. Asking for the next report answers a Saving report: what came before it is
on disk by then.

A worker process runs main() of this module. It reads tasks from its standard input and writes reports to its standard output; a
message is its length in 8 bytes, then a pickle. It ends when its input does, so a study that was killed leaves no worker behind.
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
from collections.abc import Callable, Generator, Mapping, Sequence
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, Protocol

from nanostudy.settings import Resources
from nanostudy.study.tasks import Broken, Done, Prepared, Report, Task, perform
from nanostudy.text import duration, value_text
from nanostudy.training.events import Saving

if TYPE_CHECKING:
    from nanostudy.training.machine import Machine

MEMORY_SHARE = 0.8  # how much of the free memory all workers together may use
PROCESS_MEMORY = 2**28  # bytes of a worker without any stack: measured 242 MiB
BEAT = 5.0  # seconds between a worker's signs of life, which it gives between micro-batches and batches of evaluations
NOBODY = -1  # the worker of reports about the backend itself
HUNG = 900.0  # seconds without one after which a worker is ended: kernels of a GPU may be compiled in between

Process = subprocess.Popen[bytes]


class Backend(Protocol):
    """Workers are numbered from 0."""

    stop: Callable[[], bool]  # once true, trainings save and end, and a task that starts later ends at once

    def idle(self) -> list[int]:
        """The workers without a task. Called only while there is something to do."""

    def start(self, worker: int, task: Task) -> None: ...

    def next(self, timeout: float) -> tuple[int, Report] | None:
        """The next report and its worker; None if none comes in time. Done and Broken make the worker idle again.

        Noted and Broken may come from a worker without a task: they are about the backend itself, and a worker that did not start.
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
            self.running.close()  # releases the lock of the stack's folder
        self.running = None


class Workers:
    """One process for each of these resources: one per core on a CPU, else one per device.

    A process that died or hangs is replaced when its next task starts. Workers have the conditions of `machine`, the study's own,
    once that is set: its kernels come to them by this environment, and one that still has others is Broken.
    """

    def __init__(self, resources: Sequence[Resources], machine: Machine | None, environment: Mapping[str, str]) -> None:
        self.resources, self.machine, self.environment = resources, machine, environment
        self.processes: dict[int, Process] = {}
        # of busy workers: the seconds for which next() waited since each was last heard
        self.silent: dict[int, float] = {}
        self.memory_kills = _memory_kills()
        self.arrived: queue.Queue[tuple[int, Process, Report | None]] = queue.Queue()  # None: a sign of life
        self.unanswered: list[tuple[int, Process]] = []
        self.stop: Callable[[], bool] = lambda: False
        self.stopping = False

    def idle(self) -> list[int]:
        return [worker for worker in range(len(self.resources)) if worker not in self.silent]

    def start(self, worker: int, task: Task) -> None:
        process = self.processes.get(worker)
        if process is None or process.poll() is not None:
            self._spawn(worker)
        self.silent[worker] = 0.0
        self._send(worker, ("task", pickle.dumps((task, self.resources[worker]), protocol=pickle.HIGHEST_PROTOCOL)))

    def next(self, timeout: float) -> tuple[int, Report] | None:
        for worker, process in self.unanswered:
            if self.processes[worker] is process:
                self._send(worker, ("answer", None))
        self.unanswered.clear()
        if self.stop() and not self.stopping:
            self.stopping = True
            for worker in self.processes:
                self._send(worker, ("stop", None))
        if self.arrived.empty() and (hung := self._hung()):  # though others report all the time
            return hung
        begun = time.monotonic()
        while (left := begun + timeout - time.monotonic()) > 0:
            try:
                worker, process, report = self._hear(left)
            except queue.Empty:
                return self._hung()
            if self.processes[worker] is not process or worker not in self.silent:
                continue  # the end of a process that had no task, or was replaced
            self.silent[worker] = 0.0
            if report is None:
                continue
            if isinstance(report, Prepared) and (differing := self._differing(report.machine)):
                report = Broken("error", differing)
            if isinstance(report, Saving):
                self.unanswered.append((worker, process))
            if isinstance(report, Done | Broken):
                del self.silent[worker]
            if isinstance(report, Broken):  # its device may be out of order, or its memory fragmented
                process.kill()
                process.wait()
            return worker, report
        return None

    def _differing(self, machine: Machine) -> str | None:
        """In words, the worker's conditions that are not the study's, and why. Its threads and its GPU may be its own."""
        if self.machine is None:
            return None
        here, there = self.machine.conditions, machine.conditions
        names = [name for name in here if name not in ("device_name", "threads") and here[name] != there[name]]
        if not names:
            return None
        differing = ", ".join(f"{name} {value_text(there[name])} instead of {value_text(here[name])}" for name in names)
        return f"it would train under other conditions than the study: {'; '.join((differing, *machine.notes))}"

    def _hear(self, timeout: float) -> tuple[int, Process, Report | None]:
        """What arrives next. Raises queue.Empty where nothing does in time."""
        begun = time.monotonic()
        try:
            return self.arrived.get(timeout=timeout)
        finally:
            for worker in self.silent:
                self.silent[worker] += time.monotonic() - begun

    def _hung(self) -> tuple[int, Report] | None:
        """Ends a worker that gives no sign of life."""
        for worker, seconds in self.silent.items():
            if seconds >= HUNG:
                del self.silent[worker]
                self.processes[worker].kill()  # and no wait: what hangs in the system's hands may not end
                return worker, Broken("died", f"its process gave no sign of life for {duration(HUNG)} and was ended")
        return None

    def close(self) -> None:
        for process in self.processes.values():
            process.kill()
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(timeout=10)
        self.processes.clear()
        self.silent.clear()

    def _spawn(self, worker: int) -> None:
        threads = str(self.resources[worker].threads or 1)
        # -P, and the package last: files of the current folder are not taken for modules of the library
        code = f"import sys; sys.path.append({str(Path(__file__).parents[2])!r}); import nanostudy.study.workers as w; w.main()"
        process = subprocess.Popen(
            [sys.executable, "-P", "-c", code],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env={**os.environ, **self.environment, "OMP_NUM_THREADS": threads},
            # Ctrl-C is for the study, which asks its workers to stop
            start_new_session=True,
            creationflags=getattr(subprocess, "CREATE_NEW_PROCESS_GROUP", 0),
        )
        self.processes[worker] = process
        threading.Thread(target=self._listen, args=(worker, process), daemon=True).start()
        if self.stopping:
            self._send(worker, ("stop", None))

    def _listen(self, worker: int, process: Process) -> None:
        assert process.stdout
        try:
            while True:
                self.arrived.put((worker, process, receive(process.stdout)))
        except Exception:  # its end, or no report: in any case nothing more can be read
            process.kill()
            broken = Broken("died", f"its process ended ({self._ending(process.wait())})")
            self.arrived.put((worker, process, broken))

    def _ending(self, code: int) -> str:
        if code >= 0:
            return f"exit code {code}"
        if code == -signal.SIGKILL:
            kills, self.memory_kills = self.memory_kills, _memory_kills()
            if self.memory_kills is not None and self.memory_kills > (kills or 0):
                return "the system killed it because memory ran out; fewer --workers or a smaller batch_size need less"
        try:
            return f"killed by {signal.Signals(-code).name}"
        except ValueError:
            return f"killed by signal {-code}"

    def _send(self, worker: int, message: tuple[str, object]) -> None:
        process = self.processes.get(worker)
        if process and process.stdin:
            with contextlib.suppress(OSError):  # it died, and its listener reports that
                send(process.stdin, message)


def _memory_kills() -> int | None:
    from nanostudy.device import memory_kills  # imports PyTorch, which a worker process does later

    return memory_kills()


# --- the worker process


def send(stream: IO[bytes], message: Any) -> None:
    data = pickle.dumps(message, protocol=pickle.HIGHEST_PROTOCOL)
    stream.write(len(data).to_bytes(8, "little") + data)
    stream.flush()


def receive(stream: IO[bytes]) -> Any:
    """Raises EOFError at the end of the stream, or where a message was cut short."""
    head = stream.read(8)
    data = stream.read(int.from_bytes(head, "little"))
    if len(head) < 8 or len(data) < int.from_bytes(head, "little"):
        raise EOFError
    return pickle.loads(data)


def main() -> None:
    """Performs the tasks that come, until the input ends. After a Saving report it waits for the answer."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)  # batch systems send it to every process; the study then asks to stop
    reports = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # what a library prints is no report
    tasks: queue.Queue[bytes] = queue.Queue()
    answers: queue.Queue[None] = queue.Queue()
    stop = threading.Event()

    def listen() -> None:
        try:
            while True:
                kind, content = receive(sys.stdin.buffer)
                if kind == "task":
                    tasks.put(content)
                elif kind == "answer":
                    answers.put(None)
                else:
                    stop.set()
        except (EOFError, OSError):
            os._exit(0)  # files are replaced whole: there is nothing to finish

    threading.Thread(target=listen, daemon=True).start()
    alive_at = time.monotonic()

    def stop_requested() -> bool:
        """Asked between the parts of a task: the moment for a sign of life."""
        nonlocal alive_at
        if time.monotonic() - alive_at > BEAT:
            alive_at = time.monotonic()
            send(reports, None)
        return stop.is_set()

    try:
        while True:
            task, resources = pickle.loads(tasks.get())  # imports PyTorch, so not in the thread that listens
            for report in perform(task, resources, stop_requested):
                send(reports, report)
                if isinstance(report, Saving):
                    answers.get()
    except OSError:  # nobody reads any more
        os._exit(0)
