"""Files that other people wrote, read whole: regular ones alone, and none that is larger than it should be."""

from __future__ import annotations

import errno
import os
import stat
from pathlib import Path

from nanostudy.errors import UsageError


def read_file(path: Path, most: int) -> bytes:
    """The file's bytes. Raises UsageError where it is no regular file (a pipe or a device may have no end) or larger than
    `most` bytes or than the memory; OSError where it cannot be read.
    """
    try:
        about = os.stat(path)
    except ValueError:  # a name with a NUL in it
        raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), str(path)) from None
    if stat.S_ISDIR(about.st_mode):
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(path))
    if not stat.S_ISREG(about.st_mode):
        raise UsageError(
            f"{path} is no regular file but a pipe or a device. Save what it gives in a file, and name that."
        )
    if about.st_size > most:
        raise UsageError(f"{path} has {about.st_size:,} bytes, and such a file may have {most:,} at most.")
    try:
        return path.read_bytes()
    except MemoryError:
        raise UsageError(
            f"{path} has {about.st_size:,} bytes, and they do not fit into this machine's memory."
        ) from None


def read_text(path: Path, most: int) -> str:
    """As read_file; the text is UTF-8, any line end is read as a new line, and a mark at the beginning is left out."""
    try:
        text = read_file(path, most).decode("utf-8-sig")
    except UnicodeDecodeError as problem:
        raise UsageError(f"{path} is not UTF-8 text (byte {problem.start}). Save it as UTF-8.") from None
    return text.replace("\r\n", "\n").replace("\r", "\n")
