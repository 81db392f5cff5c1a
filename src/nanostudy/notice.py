"""A notice when a study ends: the terminal's bell, the desktop's message, or a command of the person's own."""

from __future__ import annotations

import shlex
import shutil
import subprocess
import sys

PATIENCE = 10.0  # seconds that it may take


def notify(how: str, message: str) -> str | None:
    """`how`: bell, desktop, or a command, which gets the message as its last word. Returns why it could not be given."""
    if how == "bell":
        print("\a", end="", file=sys.__stderr__, flush=True)
        return None
    try:
        command = _desktop() if how == "desktop" else shlex.split(how)
        if not command:
            return "this desktop has no command for messages (notify-send, osascript)"
        subprocess.run([*command, message], check=True, timeout=PATIENCE, stdin=subprocess.DEVNULL, capture_output=True)
    except (OSError, ValueError, subprocess.SubprocessError) as problem:
        return f"{how}: {problem}"
    return None


def _desktop() -> list[str]:
    if shutil.which("notify-send"):
        return ["notify-send", "nanostudy"]
    if shutil.which("osascript"):
        script = 'on run words\ndisplay notification (item 1 of words) with title "nanostudy"\nend run'
        return ["osascript", "-e", script]
    return []
