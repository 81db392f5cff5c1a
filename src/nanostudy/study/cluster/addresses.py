"""Files at addresses that fsspec knows: file:///..., s3://..., and what else a package is installed for. Raises whatever that raises."""

from __future__ import annotations

from pathlib import Path

from fsspec.core import url_to_fs


def make_folder(address: str) -> None:
    files, place = url_to_fs(address)
    files.makedirs(place, exist_ok=True)


def put(path: Path, address: str) -> None:
    files, place = url_to_fs(address)
    files.makedirs(place.rpartition("/")[0], exist_ok=True)
    files.put_file(str(path), place)


def fetch(address: str, path: Path) -> None:
    """Raises FileNotFoundError where there is nothing."""
    files, place = url_to_fs(address)
    files.get_file(place, str(path))


def remove_others(address: str) -> None:
    """What lies beside it: checkpoints before it, and those of which nobody heard."""
    files, place = url_to_fs(address)
    for other in files.ls(place.rpartition("/")[0], detail=False):
        if other.rpartition("/")[2] != place.rpartition("/")[2]:
            files.rm_file(other)


def remove_folder(address: str) -> None:
    files, place = url_to_fs(address)
    if files.exists(place):
        files.rm(place, recursive=True)
