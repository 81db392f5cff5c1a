"""The sources of texts: built in, on disk, or downloaded once; always checked."""

from __future__ import annotations

import codecs
import hashlib
import http.client
import os
import shlex
import urllib.request
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from nanostudy.atomic import cache_folder, write_atomically
from nanostudy.data.nanogpt_dataset import is_dataset, read_dataset
from nanostudy.data.playhouse import write_plays
from nanostudy.data.tokenizer import Tokenizer
from nanostudy.errors import NanostudyError, UsageError
from nanostudy.reading import read_file

LARGEST_TEXT = 2**30  # bytes; a text is read whole, and its tokens take several times as much memory
TRAIN_SHARE = 0.9  # nanoGPT's split: the first 90% of the characters train

SHAKESPEARE_FILE = "tinyshakespeare.txt"
SHAKESPEARE_URL = "https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt"
SHAKESPEARE_SHA256 = "86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed"

NAMES = {
    "shakespeare": "tiny Shakespeare, 1,115,394 characters, downloaded once (1.1 MB)",
    "playhouse": "plays from a seeded grammar, built in; the entropy of the text is known exactly",
    "auto": "shakespeare where it is available, else playhouse",
}
CHOICES = (
    f"Corpora: {', '.join(NAMES)}; or the path of a UTF-8 text or of a folder with train.bin, val.bin and meta.pkl."
)


@dataclass(frozen=True)
class Text:
    name: str
    content: str
    sha256: str  # of the content's bytes; for a dataset with its own split or tokenizer, of those as well
    nats: np.ndarray | None = None  # float64, the true surprisal of each character
    note: str | None = None
    cut: int | None = None  # the number of training characters, if the text has its own split
    tokenizer: Tokenizer | None = None  # if it comes as tokens


def find_text(requested: str, tokenizer: str = "char") -> Text:
    """A named text, or the file or dataset folder at a path. Raises UsageError, NanostudyError.

    A file is UTF-8 and read as Python reads text: every line end is a new line. For tokenizer="byte" it may be anything and
    stays as it is; bytes that are not UTF-8 become surrogates.
    """
    if requested == "playhouse":
        return _playhouse()
    if requested == "shakespeare":
        return _shakespeare()
    if requested == "auto":
        try:
            return _shakespeare()
        except NanostudyError as problem:
            note = f"Shakespeare is not available, so this trains on playhouse instead. {problem}"
            return replace(_playhouse(), note=note)
    path = Path(requested)
    return _dataset(path) if os.path.isdir(path) else _read(path, tokenizer)


def cuts_of(text: Text, split: str | None = None) -> list[int]:
    """Where its parts begin, and the end: in characters. Raises UsageError where a dataset has a split of its own."""
    size = len(text.content)
    if split is None:
        return [0, int(size * TRAIN_SHARE) if text.cut is None else text.cut, size]
    if text.cut is not None:
        raise UsageError(
            f"split={split}: {text.name} is a dataset with a split of its own, train.bin and val.bin, and has no test part. "
            "Leave split out, or train on the text itself."
        )
    train, val, *_ = map(float, split.split("/"))
    test = [int(size * (train + val))] if split.count("/") == 2 else []
    return [0, int(size * train), *test, size]


def split_checksum(text: Text, cuts: list[int]) -> str:
    """The text's, and of the cuts as well where they are not its own: another split is another experiment."""
    if cuts == cuts_of(text):
        return text.sha256
    return hashlib.sha256(f"{text.sha256} {cuts}".encode()).hexdigest()


def locate_shakespeare() -> Path | None:
    """The file in the folder NANOSTUDY_CORPORA or in the cache, or None."""
    folders = [Path(os.environ["NANOSTUDY_CORPORA"])] if os.environ.get("NANOSTUDY_CORPORA") else []
    return next((f / SHAKESPEARE_FILE for f in (*folders, cache_folder()) if (f / SHAKESPEARE_FILE).is_file()), None)


def fetch_shakespeare() -> Path:
    """The path of the file, downloaded into the cache if necessary. Raises NanostudyError."""
    existing = locate_shakespeare()
    if existing:
        return existing
    target = cache_folder() / SHAKESPEARE_FILE
    by_hand = f"Put the file at {target}, or name its folder in NANOSTUDY_CORPORA (as {SHAKESPEARE_FILE})."
    try:
        with urllib.request.urlopen(SHAKESPEARE_URL, timeout=30) as response:
            content = response.read()
    except (OSError, http.client.HTTPException) as problem:
        raise NanostudyError(
            f"Tiny Shakespeare could not be downloaded from {SHAKESPEARE_URL} ({problem}). {by_hand}"
        ) from None
    if hashlib.sha256(content).hexdigest() != SHAKESPEARE_SHA256:
        raise NanostudyError(f"What {SHAKESPEARE_URL} sent is not tiny Shakespeare (wrong checksum). {by_hand}")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
    except OSError as problem:
        raise NanostudyError(
            f"The cache {target.parent} cannot be made: {problem.strerror}. Name another in NANOSTUDY_CACHE."
        ) from None
    write_atomically(target, content)
    return target


def _shakespeare() -> Text:
    path = fetch_shakespeare()
    text = _read(path)
    if text.sha256 != SHAKESPEARE_SHA256:
        raise NanostudyError(
            f"{path} is not tiny Shakespeare: its SHA-256 is {text.sha256}, not {SHAKESPEARE_SHA256}. "
            f"Delete it and run `nanostudy corpus fetch shakespeare`, or train on it as a text of your own with "
            f"corpus={shlex.quote(str(path))}."
        )
    return Text("shakespeare", text.content, text.sha256)


def _playhouse() -> Text:
    content, nats = write_plays()
    return Text("playhouse", content, hashlib.sha256(content.encode()).hexdigest(), nats)


def _dataset(folder: Path) -> Text:
    """A dataset with a text's default split and tokenizer has that text's checksum: training on either is the same experiment."""
    if not is_dataset(folder):
        raise UsageError(f"The folder {str(folder)!r} is no corpus: it has no train.bin. {CHOICES}")
    train, val, tokenizer = read_dataset(folder)
    content, cut = train + val, len(train)
    digest = hashlib.sha256(content.encode(errors="surrogateescape"))
    if tokenizer != Tokenizer.of(tokenizer.kind, content) or cut != int(len(content) * TRAIN_SHARE):
        digest.update(f" {cut} {tokenizer.kind} ".encode() + tokenizer.characters.encode(errors="surrogatepass"))
    return Text(folder.resolve().name, content, digest.hexdigest(), cut=cut, tokenizer=tokenizer)


def _read(path: Path, tokenizer: str = "char") -> Text:
    try:
        raw = read_file(path, LARGEST_TEXT)
        if tokenizer == "byte":
            return Text(path.name, raw.decode(errors="surrogateescape"), hashlib.sha256(raw).hexdigest())
        content = raw.decode("utf-8-sig")
    except UnicodeDecodeError as problem:
        raise UsageError(
            f"{path} is not UTF-8 text (byte {problem.start}). Save it as UTF-8, for example with an editor or iconv, or train "
            "on its bytes with tokenizer=byte."
        ) from None
    except OSError as problem:
        looked = "" if path.is_absolute() else f", neither beside a file that names it nor in {Path.cwd()}"
        raise UsageError(
            f"There is no corpus and no file {str(path)!r} to read ({problem.strerror}){looked}. {CHOICES}"
        ) from None
    changes, ends = ["its byte order mark is left out"] if raw.startswith(codecs.BOM_UTF8) else [], content.count("\r")
    if ends:
        content = content.replace("\r\n", "\n").replace("\r", "\n")
        changes.append(f"{ends:,} line ends with a carriage return are read as new lines")
    if not changes:
        return Text(path.name, content, hashlib.sha256(raw).hexdigest())
    note = f"{path.name}: {' and '.join(changes)}; tokenizer=byte keeps every byte."
    return Text(path.name, content, hashlib.sha256(content.encode()).hexdigest(), note=note)
