"""The longest passage that a text has in common with a much longer one, for many texts at once."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Sequence
from functools import lru_cache

import numpy as np

BASE = np.uint64(0x9E3779B97F4A7C15)  # odd, so that it has an inverse modulo 2^64
INVERSE = np.uint64(pow(int(BASE), -1, 2**64))
START = 8  # characters, of the first length that is tried

Windows = Callable[[int], np.ndarray]


def longest_verbatim(texts: Sequence[str], source: str) -> list[int]:
    """The length in characters of each text's longest substring that occurs in `source`.

    Where a passage of some length occurs, shorter ones do, so the length is found by doubling and bisection. Passages of one length are
    compared by their polynomial hashes modulo 2^64 (Karp & Rabin, 1987), all of `source` at once. Equal passages have equal hashes, and
    passages of equal hashes are looked up in `source`: the answer is exact.
    """

    @lru_cache(maxsize=24)  # lengths that many texts need; 8 bytes per character each
    def sorted_hashes(length: int) -> np.ndarray:
        return np.sort(of_source(length))

    def longest(text: str) -> int:
        windows, most = _hashes(text), min(len(text), len(source))

        def occurs(length: int, exact: bool) -> bool:
            ours, theirs = windows(length), sorted_hashes(length)
            order = np.argsort(ours)  # ascending, they are found faster
            places = np.searchsorted(theirs, ours[order]).clip(max=len(theirs) - 1)
            starts = order[theirs[places] == ours[order]]
            if not exact:
                return len(starts) > 0
            return any(text[start : start + length] in source for start in map(int, starts))

        length = _largest(most, lambda length: occurs(length, exact=False))
        if length == 0 or occurs(length, exact=True):
            return length
        return _largest(most, lambda length: occurs(length, exact=True))  # different passages had one hash

    of_source = _hashes(source)
    return [longest(text) for text in texts]


def _largest(most: int, holds: Callable[[int], bool]) -> int:
    """The largest number up to `most` that holds, where all below it do, too; 0 always does."""
    low, high = 0, START
    while high <= most and holds(high):
        low, high = high, 2 * high
    return bisect_left(range(most + 1), True, low + 1, min(high, most + 1), key=lambda number: not holds(number)) - 1


def _hashes(text: str) -> Windows:
    """A function from a length to the hashes of the passages of that length, one per place."""
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
