"""The longest passage that a text has in common with a much longer one, for many texts at once."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import lru_cache

import numpy as np

BASE = np.uint64(0x9E3779B97F4A7C15)  # odd, so that it has an inverse modulo 2^64
INVERSE = np.uint64(pow(int(BASE), -1, 2**64))

Windows = Callable[[int], np.ndarray]


def longest_copied(texts: Sequence[str], source: str) -> list[int]:
    """Of each text, the length in characters of its longest substring that occurs in `source`.

    Whether a passage of some length occurs is monotone in the length, so that is found by doubling and bisection. Passages
    of one length are compared by their polynomial hashes modulo 2^64 (Karp & Rabin, 1987), all of `source` at once, and
    what the hashes claim is looked up in `source`: the answer is exact.
    """

    @lru_cache(maxsize=64)  # lengths that many texts ask for
    def known(length: int) -> np.ndarray:
        return np.sort(of_source(length))

    of_source = _hashes(source)
    return [_longest(text, _hashes(text), source, known) for text in texts]


def _longest(text: str, windows: Windows, source: str, known: Windows) -> int:
    most = min(len(text), len(source))

    def copied(length: int) -> bool:
        asked, there = windows(length), known(length)
        places = np.searchsorted(there, asked).clip(max=len(there) - 1)
        claimed = np.flatnonzero(there[places] == asked)
        return any(text[start : start + length] in source for start in map(int, claimed))

    low, high = 0, 1  # a passage of `low` characters occurs
    while high <= most and copied(high):
        low, high = high, 2 * high
    high = min(high, most + 1)  # none of `high` does
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if copied(middle) else (low, middle)
    return low


def _hashes(text: str) -> Windows:
    """A function of a length, giving the hash of the passage of that length at every place."""
    # s[i] is the sum of c[j] B^j over j < i, so (s[i+n] - s[i]) B^-i depends on the n characters from i on alone
    codes = np.frombuffer(text.encode("utf-32-le", "surrogatepass"), dtype=np.uint32).astype(np.uint64) + np.uint64(1)
    sums = np.concatenate([np.zeros(1, np.uint64), np.cumsum(codes * _powers(BASE, len(codes)))])
    back = _powers(INVERSE, len(codes))

    def windows(length: int) -> np.ndarray:
        count = len(codes) - length + 1
        return (sums[length:] - sums[:count]) * back[:count]

    return windows


def _powers(base: np.uint64, count: int) -> np.ndarray:
    powers = np.full(count, base, dtype=np.uint64)
    powers[:1] = 1
    return np.cumprod(powers)
