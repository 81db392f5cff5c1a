"""Whole commands, timed from outside, each with a limit of time, and the time that is left for all of them."""

from __future__ import annotations

import os
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

LONGEST = 3600.0  # seconds that one command may take


class Failed(Exception):
    """A command failed or ran out of time. The message says which, and why."""


def timed(
    command: Sequence[str], *, limit: float, folder: Path | None = None, environment: Mapping[str, str] | None = None
) -> tuple[float, str]:
    """(seconds, what it printed). `environment` is added to this process's. Raises Failed."""
    words = " ".join(command[1:])[:120]
    if limit <= 0:
        raise Failed(f"no time was left for: {words}")
    start = time.perf_counter()
    try:
        done = subprocess.run(
            command,
            cwd=folder,
            capture_output=True,
            text=True,
            env={**os.environ, **(environment or {})},
            timeout=limit,
        )
    except subprocess.TimeoutExpired:
        raise Failed(f"stopped after {limit:.0f} s: {words}") from None
    seconds = time.perf_counter() - start
    if done.returncode:
        lines = (done.stderr or done.stdout).strip().splitlines()
        raise Failed(f"exit code {done.returncode}: {words}: {' '.join(lines[-3:])[-300:]}")
    return seconds, done.stdout


class Budget:
    """Seconds for everything, and within them for the step at hand."""

    def __init__(self, seconds: float, now: Callable[[], float] = time.monotonic) -> None:
        self.now, self.end = now, now() + seconds
        self.end_of_step = self.end

    def begin(self, seconds: float) -> None:
        """A step begins, and may take so long."""
        self.end_of_step = min(self.end, self.now() + seconds)

    def left(self) -> float:
        """Seconds that a command may take now; none where this is not above 0."""
        return min(LONGEST, self.end_of_step - self.now())
