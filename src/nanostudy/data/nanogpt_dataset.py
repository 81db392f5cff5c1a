"""nanoGPT's dataset folders: train.bin and val.bin with token ids of two bytes each, and meta.pkl with their characters."""

from __future__ import annotations

import io
import os
import pickle
import pickletools
import reprlib
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from nanostudy.atomic import write_atomically
from nanostudy.data.tokenizer import Tokenizer
from nanostudy.errors import NanostudyError, UsageError
from nanostudy.reading import read_file

TRAIN, VAL, META = "train.bin", "val.bin", "meta.pkl"
ID = np.dtype("<u2")
LARGEST_META = 2**22  # bytes; 65,536 characters take a third of it
LARGEST_NUMBER = 2**31
LARGEST_SPLIT = 2**31


class Dataset(NamedTuple):
    """A folder's two texts. Bytes that are not UTF-8 become surrogates."""

    train: str
    val: str
    tokenizer: Tokenizer


class _Plain(pickle.Unpickler):
    """Reads numbers, texts, lists and dictionaries. It refuses a pickle that names anything else, as code would have to."""

    def find_class(self, module: str, name: str) -> Any:
        raise UsageError(f"names {module}.{name}, and only plain numbers and texts are read")


def read_meta(path: Path) -> Tokenizer:
    """That of a meta.pkl, read without running code. Raises UsageError, NanostudyError."""
    content = _bytes(path, LARGEST_META)
    try:
        _check_cost(content)
        meta = _Plain(io.BytesIO(content)).load()
        if not isinstance(meta, dict):
            raise UsageError("holds no dictionary")
        return _tokenizer(meta)
    except UsageError as problem:
        raise UsageError(f"{path} {problem}. It must be as nanoGPT's prepare.py for characters writes it.") from None
    except Exception:  # a damaged pickle may raise anything
        raise UsageError(f"{path} is damaged or is no pickle.") from None


def _check_cost(content: bytes) -> None:
    """Refuses what could make reading take without end: keys that are built of each other, and chosen to be alike."""
    for opcode, argument, _ in pickletools.genops(content):
        if opcode.name in ("GLOBAL", "INST", "STACK_GLOBAL"):
            return  # refused by name when it is read
        if "TUPLE" in opcode.name or opcode.name.endswith("SET"):
            raise UsageError("holds tuples or sets")
        if isinstance(argument, int) and abs(argument) >= LARGEST_NUMBER:
            raise UsageError("holds numbers that are no ids")


def _bytes(path: Path, most: int) -> bytes:
    try:
        return read_file(path, most)
    except OSError as problem:
        raise NanostudyError(f"{path} could not be read: {problem.strerror}.") from None


def _tokenizer(meta: dict[Any, Any]) -> Tokenizer:
    itos, stoi = meta.get("itos"), meta.get("stoi")
    if isinstance(itos, list | tuple):
        itos = dict(enumerate(itos))
    if itos is None and isinstance(stoi, dict):
        itos = {i: s for s, i in stoi.items()}
    if not isinstance(itos, dict) or set(itos) != set(range(len(itos))) or not itos:
        raise UsageError("has no itos, one text for each id from 0 on")
    tokens = [itos[i] for i in range(len(itos))]
    odd = next((t for t in tokens if not isinstance(t, str) or len(t) != 1 or "\ud800" <= t <= "\udfff"), None)
    if odd is not None or len(set(tokens)) != len(tokens):
        what = "the same character twice" if odd is None else reprlib.repr(odd)
        raise UsageError(f"has tokens that are not one character each ({what})")
    if stoi is not None and stoi != {token: i for i, token in enumerate(tokens)}:
        raise UsageError("has an itos and a stoi that do not belong together")
    if meta.get("vocab_size", len(tokens)) != len(tokens):
        raise UsageError(f"has vocab_size {reprlib.repr(meta['vocab_size'])} and {len(tokens)} tokens")
    return Tokenizer("byte") if meta.get("tokenizer") == "byte" else Tokenizer("char", "".join(tokens))


def write_meta(path: Path, tokenizer: Tokenizer) -> None:
    """Writes meta.pkl as nanoGPT's prepare.py does. Bytes become the characters with the same numbers (Latin-1)."""
    characters = tokenizer.characters if tokenizer.kind == "char" else bytes(range(256)).decode("latin-1")
    meta = {
        "vocab_size": len(characters),
        "itos": dict(enumerate(characters)),
        "stoi": {character: i for i, character in enumerate(characters)},
    }
    write_atomically(path, pickle.dumps({**meta, "tokenizer": tokenizer.kind}, protocol=4))


def is_dataset(folder: Path) -> bool:
    return os.path.isfile(folder / TRAIN)  # a name too long is none


def read_dataset(folder: Path) -> Dataset:
    """Raises UsageError where the folder is no dataset, or the meaning of its tokens is unknown."""
    missing = [name for name in (TRAIN, VAL) if not (folder / name).is_file()]
    if missing:
        raise UsageError(f"The folder {folder} is no corpus: it has no {' and no '.join(missing)}.")
    if not (folder / META).is_file():
        raise UsageError(
            f"{folder} has no {META}, so the meaning of its ids is unknown (most likely they are GPT-2's tokens). nanostudy's "
            "tokens are characters or bytes: train on the text itself, with corpus=path/to/text.txt and tokenizer=byte."
        )
    tokenizer = read_meta(folder / META)
    return Dataset(_text(folder / TRAIN, tokenizer), _text(folder / VAL, tokenizer), tokenizer)


def _text(path: Path, tokenizer: Tokenizer) -> str:
    raw, size = _bytes(path, LARGEST_SPLIT), tokenizer.vocab_size
    if len(raw) % ID.itemsize:
        raise UsageError(f"{path} is cut short: its tokens are two bytes each, and it has {len(raw):,} bytes.")
    ids = np.frombuffer(raw, ID)
    if len(ids) and ids.max() >= size:
        raise UsageError(f"{path} holds the token {ids.max()}, and {META} beside it has {size} tokens.")
    return tokenizer.decode(ids, errors="surrogateescape")


def write_dataset(folder: Path, train: np.ndarray, val: np.ndarray, tokenizer: Tokenizer) -> list[Path]:
    """Writes the files atomically into an existing folder and returns their paths. Raises UsageError, NanostudyError."""
    if tokenizer.vocab_size > 2**16:
        raise UsageError(f"{tokenizer.vocab_size:,} different characters do not fit into tokens of two bytes.")
    write_atomically(folder / TRAIN, train.astype(ID).tobytes())
    write_atomically(folder / VAL, val.astype(ID).tobytes())
    write_meta(folder / META, tokenizer)
    return [folder / name for name in (TRAIN, VAL, META)]
