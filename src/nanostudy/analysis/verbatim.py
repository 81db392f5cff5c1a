"""The longest passage that a text has in common with a much longer one, for many texts at once."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import lru_cache

import numpy as np

BASE = np.uint64(0x9E3779B97F4A7C15)  # odd, so that it has an inverse modulo 2^64
INVERSE = np.uint64(pow(int(BASE), -1, 2**64))
LIKELY = 8  # characters that a text has in common with a long one, or about so many

Windows = Callable[[int], np.ndarray]


def longest_copied(texts: Sequence[str], source: str) -> list[int]:
    """Of each text, the length in characters of its longest substring that occurs in `source`.

    Whether a passage of some length occurs is monotone in the length, so that is found by doubling and bisection. Passages
    of one length are compared by their polynomial hashes modulo 2^64 (Karp & Rabin, 1987), all of `source` at once. Hashes
    miss nothing, and what they claim is looked up in `source`: the answer is exact.
    """

    @lru_cache(maxsize=24)  # lengths that many texts ask for; 8 bytes a character each
    def known(length: int) -> np.ndarray:
        return np.sort(of_source(length))

    def longest(text: str) -> int:
        windows, most = _hashes(text), min(len(text), len(source))

        def copied(length: int, sure: bool) -> bool:
            asked, there = windows(length), known(length)
            order = np.argsort(asked)  # ascending, they are found faster
            places = np.searchsorted(there, asked[order]).clip(max=len(there) - 1)
            claimed = order[there[places] == asked[order]]
            if not sure:
                return len(claimed) > 0
            return any(text[start : start + length] in source for start in map(int, claimed))

        length = _largest(most, lambda length: copied(length, sure=False))
        if length == 0 or copied(length, sure=True):
            return length
        return _largest(most, lambda length: copied(length, sure=True))  # two passages of one hash

    of_source = _hashes(source)
    return [longest(text) for text in texts]


def _largest(most: int, holds: Callable[[int], bool]) -> int:
    """The largest number up to `most` that holds, where all below it do too; 0 always does."""
    low, high = 0, LIKELY
    while high <= most and holds(high):
        low, high = high, 2 * high
    high = min(high, most + 1)
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if holds(middle) else (low, middle)
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
