"""A worker process: reads tasks from its standard input, writes reports to its standard output.

Started as `python -m nanostudy.study.worker`. A message is its length in 8 bytes and a pickle; both ends are processes
of one study, started by it; a task is a pickle within. After a Saving report it waits until the report was answered. It ends when
its input does: a study that was killed leaves no worker behind.
"""

from __future__ import annotations

import os
import pickle
import queue
import signal
import sys
import threading
from typing import IO, Any


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
    signal.signal(signal.SIGTERM, signal.SIG_IGN)  # a cluster sends it to all at once, and the study asks to stop
    reports = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # whatever a library prints is no report
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
    from nanostudy.study.tasks import perform
    from nanostudy.training.events import Saving

    try:
        while True:
            task, resources = pickle.loads(tasks.get())  # not in the other thread: it imports
            for report in perform(task, resources, stop.is_set):
                send(reports, report)
                if isinstance(report, Saving):
                    answers.get()
    except OSError:  # nobody reads any more
        os._exit(0)


if __name__ == "__main__":
    main()
