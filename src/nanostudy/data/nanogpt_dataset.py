"""nanoGPT's dataset folders: train.bin and val.bin, token ids of two bytes each, and meta.pkl, what they stand for."""

from __future__ import annotations

import io
import pickle
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from nanostudy.atomic import write_atomically
from nanostudy.errors import NanostudyError, UsageError
from nanostudy.settings import check_value

TRAIN, VAL, META = "train.bin", "val.bin", "meta.pkl"
ID = np.dtype("<u2")
LARGEST_META = 2**26  # bytes


class Table(NamedTuple):
    """What token ids stand for: characters in order of their ids, or (none named) bytes."""

    kind: str
    characters: str = ""


class Dataset(NamedTuple):
    """A folder's texts. What is no UTF-8 in a split of bytes is kept as surrogates."""

    train: str
    val: str
    table: Table


class _Plain(pickle.Unpickler):
    """Reads numbers, texts, lists and dictionaries. A pickle that names anything else, as one with code in it must, is refused."""

    def find_class(self, module: str, name: str) -> Any:
        raise UsageError(f"names {module}.{name}, and only plain numbers and texts are read")


def read_meta(path: Path) -> Table:
    """The table of a meta.pkl, whose pickle can name and run nothing. Raises UsageError, NanostudyError."""
    try:
        if path.stat().st_size > LARGEST_META:
            raise UsageError(f"is larger than {LARGEST_META:,} bytes")
        meta = _Plain(io.BytesIO(path.read_bytes())).load()
        if not isinstance(meta, dict):
            raise UsageError("holds no dictionary")
        return _table(meta)
    except UsageError as problem:
        raise UsageError(f"{path} {problem}. It must be as nanoGPT's prepare.py for characters writes it.") from None
    except OSError as problem:
        raise NanostudyError(f"{path} could not be read: {problem.strerror}.") from None
    except Exception:  # what a damaged pickle raises is anything
        raise UsageError(f"{path} is damaged or is no pickle.") from None


def _table(meta: dict[Any, Any]) -> Table:
    itos, stoi = meta.get("itos"), meta.get("stoi")
    if isinstance(itos, list | tuple):
        itos = dict(enumerate(itos))
    if itos is None and isinstance(stoi, dict):
        itos = {i: s for s, i in stoi.items()}
    if not isinstance(itos, dict) or set(itos) != set(range(len(itos))) or not itos:
        raise UsageError("has no itos, one text for each id from 0 on")
    pieces = [itos[i] for i in range(len(itos))]
    odd = next((p for p in pieces if not isinstance(p, str) or len(p) != 1 or "\ud800" <= p <= "\udfff"), None)
    if odd is not None or len(set(pieces)) != len(pieces):
        what = "the same character twice" if odd is None else f"{odd!r:.40}"
        raise UsageError(f"has tokens that are not one character each ({what})")
    if stoi is not None and stoi != {piece: i for i, piece in enumerate(pieces)}:
        raise UsageError("has an itos and a stoi that do not belong together")
    if meta.get("vocab_size", len(pieces)) != len(pieces):
        raise UsageError(f"has vocab_size {meta['vocab_size']!r:.40} and {len(pieces)} tokens")
    if meta.get("tokenizer") == "byte":
        return Table("byte")
    return Table("char", "".join(pieces))


def write_meta(path: Path, table: Table) -> None:
    """As nanoGPT's prepare.py writes it. Bytes stand there as the characters with their numbers (Latin-1)."""
    characters = table.characters if table.kind == "char" else bytes(range(256)).decode("latin-1")
    meta = {
        "vocab_size": len(characters),
        "itos": dict(enumerate(characters)),
        "stoi": {character: i for i, character in enumerate(characters)},
    }
    write_atomically(path, pickle.dumps({**meta, "tokenizer": table.kind}, protocol=4))


def is_dataset(folder: Path) -> bool:
    return (folder / TRAIN).is_file()


def read_dataset(folder: Path) -> Dataset:
    """Raises UsageError where the folder is none, or its tokens stand for nothing that is known."""
    missing = [name for name in (TRAIN, VAL) if not (folder / name).is_file()]
    if missing:
        raise UsageError(f"The folder {folder} is no corpus: it has no {' and no '.join(missing)}.")
    if not (folder / META).is_file():
        raise UsageError(
            f"{folder} has no {META}, so what its tokens stand for is not known (GPT-2's tokens, most likely). nanostudy's "
            "tokens are characters or bytes: train on the text itself, with corpus=path/to/text.txt and tokenizer=byte."
        )
    table = read_meta(folder / META)
    return Dataset(_text(folder / TRAIN, table), _text(folder / VAL, table), table)


def _text(path: Path, table: Table) -> str:
    try:
        raw = path.read_bytes()
    except OSError as problem:
        raise NanostudyError(f"{path} could not be read: {problem.strerror}.") from None
    size = len(table.characters) or 256
    if len(raw) % ID.itemsize:
        raise UsageError(f"{path} is cut short: its tokens are two bytes each, and it has {len(raw):,} bytes.")
    ids = np.frombuffer(raw, ID)
    if len(ids) and ids.max() >= size:
        raise UsageError(f"{path} holds the token {ids.max()}, and {META} beside it has {size} tokens.")
    if table.kind == "byte":
        return ids.astype(np.uint8).tobytes().decode(errors="surrogateescape")
    known = np.frombuffer(table.characters.encode("utf-32-le", "surrogatepass"), np.uint32)
    return known[ids].tobytes().decode("utf-32-le", "surrogatepass")


def write_dataset(folder: Path, train: np.ndarray, val: np.ndarray, table: Table) -> list[Path]:
    """Each file atomically, into a folder that is there; returns their paths. Raises UsageError, NanostudyError."""
    check_value("tokenizer", table.kind)
    if len(table.characters) > 2**16:
        raise UsageError(f"{len(table.characters):,} different characters do not fit into tokens of two bytes.")
    write_atomically(folder / TRAIN, train.astype(ID).tobytes())
    write_atomically(folder / VAL, val.astype(ID).tobytes())
    write_meta(folder / META, table)
    return [folder / name for name in (TRAIN, VAL, META)]
