"""Who works in a study's folder, told in the folder itself.

The folder's lock keeps a second process of the same machine out. Between machines that mount one drive, locks may say nothing, so
the owner also leaves a sign that it renews. What counts is whether the sign changes while one looks, not what any clock says.
"""

from __future__ import annotations

import contextlib
import json
import os
import platform
import secrets
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from nanostudy.gpt.errors import NanostudyError

RENEWED_EVERY = 10.0  # seconds
WATCHED_FOR = 30.0  # seconds; a drive may take a while to show what another machine wrote


class Owner:
    """The sign of the process that has the folder."""

    def __init__(self, folder: Path) -> None:
        self.path = folder / ".owner"
        self.sign = {"host": platform.node(), "pid": os.getpid(), "token": secrets.token_hex(8)}
        self.renewals, self.renewed = 0, -RENEWED_EVERY

    def renew(self) -> None:
        """Called often; writes seldom. A drive that does not answer is found out by what matters more."""
        if time.monotonic() - self.renewed >= RENEWED_EVERY:
            self.renewed, self.renewals = time.monotonic(), self.renewals + 1
            with contextlib.suppress(OSError):
                self.path.write_text(json.dumps({**self.sign, "renewals": self.renewals}), encoding="utf-8")


@contextlib.contextmanager
def owner(folder: Path, say: Callable[[str], None], watched_for: float = WATCHED_FOR) -> Iterator[Owner]:
    """For the process that holds the folder's lock. Raises NanostudyError where a process of another machine works in it."""
    here = Owner(folder)
    before = _read(here.path)
    if before and json.loads(before).get("host") != here.sign["host"]:
        host = json.loads(before).get("host")
        say(f"{folder} was in use on {host}; watching for {watched_for:.0f} s whether it still is")
        end = time.monotonic() + watched_for
        while time.monotonic() < end:
            time.sleep(min(1.0, watched_for / 10))
            if _read(here.path) not in (before, None):
                raise NanostudyError(
                    f"A process on {host} is working in {folder}. Wait for it, or choose another folder with --out."
                )
    here.renew()
    try:
        yield here
    finally:
        with contextlib.suppress(OSError):
            here.path.unlink(missing_ok=True)


def _read(path: Path) -> str | None:
    """The sign, or None where there is none that can be read."""
    with contextlib.suppress(OSError, ValueError):
        text = path.read_text(encoding="utf-8")
        return text if isinstance(json.loads(text), dict) else None
    return None
