"""Who works in a study's folder: a lock for the processes of one machine, and a sign in the folder for the others.

Between machines that mount one drive, locks may say nothing; so the owner leaves a sign there and renews it. What counts is
whether the sign changes while one looks, not what any clock says.
"""

from __future__ import annotations

import contextlib
import json
import os
import platform
import secrets
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from nanostudy.atomic import sole_owner
from nanostudy.errors import NanostudyError

SIGN = ".owner"
RENEWED_EVERY = 10.0  # seconds
WATCHED_FOR = 30.0  # seconds; a drive may take a while to show what another machine wrote


class Owner:
    """The sign of the process that has the folder, renewed by a thread of its own."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.path = folder, folder / SIGN
        self.sign = {"host": platform.node(), "pid": os.getpid(), "token": secrets.token_hex(8)}
        self.taken_by: str | None = None  # another machine, that took this process for dead: a laptop that slept
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._renew, daemon=True)

    def check(self) -> None:
        """Raises NanostudyError where another machine took the folder over."""
        if self.taken_by:
            raise NanostudyError(
                f"{self.taken_by} took {self.folder} over while this process was silent. It goes on there."
            )

    def begin(self) -> None:
        self._write(0)
        self._thread.start()

    def end(self) -> None:
        self._ended.set()
        self._thread.join()
        if self.taken_by is None:
            with contextlib.suppress(OSError):
                self.path.unlink(missing_ok=True)

    def _renew(self) -> None:
        renewals = 0
        while not self._ended.wait(RENEWED_EVERY):
            there, renewals = read_sign(self.path), renewals + 1
            if there and there.get("token") != self.sign["token"]:
                self.taken_by = str(there.get("host"))
                return
            self._write(renewals)

    def _write(self, renewals: int) -> None:
        with contextlib.suppress(OSError):  # a drive that does not answer is found out by what matters more
            self.path.write_text(json.dumps({**self.sign, "renewals": renewals}), encoding="utf-8")


@contextlib.contextmanager
def owner(folder: Path, watched_for: float = WATCHED_FOR) -> Iterator[Owner]:
    """Holds the folder, which is made where it is not there. Raises NanostudyError where another process has it, here or elsewhere."""
    with sole_owner(folder) as locked:
        here = Owner(folder)
        before = read_sign(here.path)
        if before and not (locked and before.get("host") == here.sign["host"]):
            _watch(here, before, watched_for)
        here.begin()
        try:
            yield here
        finally:
            here.end()


def _watch(here: Owner, before: dict[str, Any], seconds: float) -> None:
    host = before.get("host")
    print(f"{here.folder} was in use on {host}; watching for {seconds:.0f} s whether it still is", file=sys.stderr)
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        time.sleep(min(1.0, seconds / 10))
        if read_sign(here.path) not in (before, None):
            raise NanostudyError(
                f"A process on {host} is working in {here.folder}. Wait for it, or choose another folder with --out."
            )


def read_sign(path: Path) -> dict[str, Any] | None:
    """None where there is none that can be read."""
    with contextlib.suppress(OSError, ValueError):
        sign = json.loads(path.read_text(encoding="utf-8"))
        return sign if isinstance(sign, dict) else None
    return None
