"""What belongs to notebooks: a place in a cell that is rewritten as a training goes, and the folder that outlasts a session."""

from __future__ import annotations

import html
import os
import shutil
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from nanostudy.atomic import whole_folder

MOST_LINES = 24  # that a cell shows: the first few, and the last
FIRST_LINES = 8
REFRESH = 0.5  # seconds between two pictures of a cell
BAR = "width:24em;vertical-align:middle"
COLOURS = {"yellow": "#b26a00", "red": "#c62828"}

DRIVE = Path("/content/drive")  # where Colab mounts Google Drive
KAGGLE = Path("/kaggle/working")  # what Kaggle keeps of a saved version, as its output


def in_notebook() -> bool:
    """Whether what this process shows goes to a notebook's cell."""
    shell = sys.modules.get("IPython")
    return shell is not None and getattr(shell.get_ipython(), "kernel", None) is not None


class Cell:
    """One output of a cell: lines, a bar, and lines about what is under way. It is rewritten, so that a notebook stays small."""

    def __init__(self) -> None:
        self.lines: list[tuple[str, str]] = []
        self.status: Sequence[str] = ()
        self.share: float | None = None
        self.shown_at = 0.0
        self.handle: Any = None

    def say(self, text: str, style: str = "") -> None:
        self.lines.append((text, style))
        self.draw()

    def progress(self, share: float, *status: str) -> None:
        self.share, self.status = share, status
        if time.monotonic() - self.shown_at >= REFRESH:
            self.draw()

    def close(self) -> None:
        """Takes the bar away; the lines stay."""
        self.share, self.status = None, ()
        self.draw()

    def draw(self) -> None:
        from IPython.display import display

        self.shown_at = time.monotonic()
        content = {"text/html": self.as_html(), "text/plain": "\n".join(text for text, _ in self.kept())}
        if self.handle is None:
            self.handle = display(content, raw=True, display_id=True)
        else:
            self.handle.update(content, raw=True)

    def kept(self) -> list[tuple[str, str]]:
        left_out = len(self.lines) - MOST_LINES
        if left_out <= 0:
            return self.lines
        told = (f"... {left_out:,} lines ...", "")
        return [*self.lines[:FIRST_LINES], told, *self.lines[FIRST_LINES + left_out :]]

    def as_html(self) -> str:
        lines = [_line(text, style) for text, style in self.kept()]
        if self.share is not None:
            bar = f'<progress max="1" value="{self.share:.4f}" style="{BAR}"></progress>'
            lines += [f"{bar} {html.escape(self.status[0]) if self.status else ''}"]
            lines += [html.escape(text) for text in self.status[1:]]
        return f'<pre style="line-height:1.35;margin:0">{chr(10).join(lines)}</pre>'


def _line(text: str, style: str) -> str:
    colour = next((value for name, value in COLOURS.items() if name in style), None)
    return f'<span style="color:{colour}">{html.escape(text)}</span>' if colour else html.escape(text)


def workspace(earlier: str | Path | None = None) -> Path:
    """The folder whose files outlast this session: `nanostudy` on the mounted Google Drive on Colab, in the output on Kaggle, and here elsewhere.

    Colab asks for the Drive the first time. `earlier` is a folder that an earlier session left, such as a Kaggle output that was
    added as an input: what is not in the workspace yet is copied from it.
    """
    if "google.colab" in sys.modules:
        from google.colab import drive

        if not (DRIVE / "MyDrive").is_dir():
            drive.mount(str(DRIVE))
        place = DRIVE / "MyDrive" / "nanostudy"
    elif "KAGGLE_KERNEL_RUN_TYPE" in os.environ:
        place = KAGGLE / "nanostudy"
    else:
        place = Path("nanostudy-work")
    place.mkdir(parents=True, exist_ok=True)
    for entry in sorted(Path(earlier).iterdir()) if earlier else []:
        if entry.is_dir() and not (place / entry.name).exists():
            with whole_folder(place / entry.name) as folder:
                shutil.copytree(entry, folder, dirs_exist_ok=True)
    return place
