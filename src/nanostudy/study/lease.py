"""One process works in a study's folder at a time: a lock for the processes of one machine, a lease for those of others.

Locks may say nothing between machines that mount one drive, so the holder writes a file there and renews it. What counts is
whether the file changes while another process looks, not what any clock says.
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

from nanostudy.atomic import sole_owner, write_atomically
from nanostudy.errors import NanostudyError

FILE = ".owner"
RENEWED_EVERY = 10.0  # seconds
WATCHED_FOR = 30.0  # seconds; a drive may take a while to show what another machine wrote


class Lease:
    """This process's hold on a folder, renewed by a thread of its own."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.path = folder, folder / FILE
        self.content = {"host": platform.node(), "pid": os.getpid(), "token": secrets.token_hex(8)}
        self.taken_by: str | None = None  # another machine, for which this process looked dead: a laptop that slept
        self._ended = threading.Event()

    def check(self) -> None:
        """Raises NanostudyError where another machine took the folder over."""
        if self.taken_by:
            raise NanostudyError(
                f"{self.taken_by} took {self.folder} over while this process was silent. It goes on there."
            )

    @contextlib.contextmanager
    def renewed(self) -> Iterator[None]:
        """The file is there during the block."""
        self._write(0)
        thread = threading.Thread(target=self._renew, daemon=True)
        thread.start()
        try:
            yield
        finally:
            self._ended.set()
            thread.join()
            if self.taken_by is None:
                with contextlib.suppress(OSError):
                    self.path.unlink(missing_ok=True)

    def _renew(self) -> None:
        renewals = 0
        while not self._ended.wait(RENEWED_EVERY):
            current, renewals = read_lease(self.path), renewals + 1
            if current and current.get("token") != self.content["token"]:
                self.taken_by = str(current.get("host"))
                return
            self._write(renewals)

    def _write(self, renewals: int) -> None:
        # a drive that does not answer is noticed by writes that matter more
        with contextlib.suppress(OSError, NanostudyError):
            # as a file of its own, whatever lies there: a link may lead to anything
            write_atomically(self.path, json.dumps({**self.content, "renewals": renewals}))


@contextlib.contextmanager
def hold(folder: Path, watched_for: float = WATCHED_FOR) -> Iterator[Lease]:
    """Holds the folder, and makes it where it is missing. Raises NanostudyError where another process, here or elsewhere, holds it."""
    with sole_owner(folder) as locked:
        lease = Lease(folder)
        before = read_lease(lease.path)
        if before and not (locked and before.get("host") == lease.content["host"]):
            _watch(lease, before, watched_for)
        with lease.renewed():
            yield lease


def _watch(lease: Lease, before: dict[str, Any], seconds: float) -> None:
    host = before.get("host")
    print(f"{lease.folder} was in use on {host}; watching for {seconds:.0f} s whether it still is", file=sys.stderr)
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        time.sleep(min(1.0, seconds / 10))
        if read_lease(lease.path) not in (before, None):
            raise NanostudyError(
                f"A process on {host} is working in {lease.folder}. Wait for it, or choose another folder with --out."
            )


def read_lease(path: Path) -> dict[str, Any] | None:
    """None where there is none, or none that can be read."""
    with contextlib.suppress(OSError, ValueError):
        if path.is_symlink() or not path.is_file():
            return None
        content = json.loads(path.read_text(encoding="utf-8"))
        return content if isinstance(content, dict) else None
    return None
