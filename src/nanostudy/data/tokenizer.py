"""Tokenizers: text to token ids and back, by characters or by bytes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from nanostudy.errors import UsageError
from nanostudy.settings import check_value


@dataclass(frozen=True)
class Tokenizer:
    """`characters` are in order of their ids; empty for bytes."""

    kind: str
    characters: str = ""

    @staticmethod
    def of(kind: str, text: str) -> Tokenizer:
        check_value("tokenizer", kind)
        return Tokenizer(kind, "".join(sorted(set(text))) if kind == "char" else "")

    @property
    def vocab_size(self) -> int:
        return len(self.characters) if self.kind == "char" else 256

    def encode(self, text: str) -> np.ndarray:
        """Token ids, int64. Raises UsageError at a character that the tokenizer does not know."""
        if self.kind == "byte":
            return np.frombuffer(text.encode(errors="surrogateescape"), dtype=np.uint8).astype(np.int64)
        alphabet, points = _points(self.characters), _points(text)
        order = np.argsort(alphabet)  # a nanoGPT dataset may have any order
        ids = order[np.searchsorted(alphabet, points, sorter=order).clip(max=len(alphabet) - 1)]
        wrong = np.flatnonzero(alphabet[ids] != points)
        if len(wrong):
            raise UsageError(
                f"The model does not know the character {text[wrong[0]]!r} (at position {wrong[0]}). "
                f"It knows: {''.join(c if c.isprintable() else repr(c)[1:-1] for c in self.characters)}"
            )
        return ids.astype(np.int64)

    def decode(self, ids: Sequence[int] | np.ndarray, errors: str = "replace") -> str:
        """`errors` is what becomes of bytes that are not UTF-8, as in bytes.decode."""
        ids = np.asarray(ids, dtype=np.int64)
        if self.kind == "byte":
            return ids.astype(np.uint8).tobytes().decode(errors=errors)
        return _points(self.characters)[ids].tobytes().decode("utf-32-le", "surrogatepass")

    @property
    def opening(self) -> str:
        """The default prompt: a new line, or the first character where the tokenizer has no new line."""
        return "\n" if self.kind == "byte" or "\n" in self.characters else self.characters[0]

    def as_dict(self) -> dict[str, str]:
        return {"kind": self.kind, "characters": self.characters}


def _points(text: str) -> np.ndarray:
    """The code points of its characters, uint32."""
    return np.frombuffer(text.encode("utf-32-le", "surrogatepass"), dtype=np.uint32)
