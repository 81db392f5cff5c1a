"""Turns Ctrl-C, termination signals and a closed terminal into a request that a loop can check."""

from __future__ import annotations

import contextlib
import signal
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

AT_ONCE = 2.0  # seconds in which termination signals count as one: a batch system and torchrun may both send it
NAMES = ("SIGINT", "SIGTERM", "SIGHUP")  # Windows has no SIGHUP


@contextlib.contextmanager
def stop_requests() -> Iterator[Callable[[], bool]]:
    """Yields a function that returns whether a signal asked to stop. A second one interrupts at once.

    An ignored SIGHUP stays so, as under nohup.
    """
    requested = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield requested.is_set
        return
    first = 0.0

    def note(number: int, frame: Any) -> None:
        nonlocal first
        if requested.is_set() and (number == signal.SIGINT or time.monotonic() - first > AT_ONCE):
            raise KeyboardInterrupt
        if not requested.is_set():
            first = time.monotonic()
            requested.set()

    numbers = [getattr(signal, name) for name in NAMES if hasattr(signal, name)]
    before = {n: signal.getsignal(n) for n in numbers}
    for number, handler in before.items():
        if handler is not signal.SIG_IGN or number != getattr(signal, "SIGHUP", None):
            signal.signal(number, note)
    try:
        yield requested.is_set
    finally:
        for number, handler in before.items():
            signal.signal(number, handler if handler is not None else signal.SIG_DFL)
