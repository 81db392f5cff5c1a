"""Randomness as a function of (seed, purpose, step, index of the sequence in the global batch).

All of it comes from the counter-based generator Philox4x64-10 (Salmon et al., SC 2011) in numpy's implementation, whose streams
are frozen. No generator keeps a state between calls, so no draw depends on other draws or on where a run was resumed.
`dropout_words` and `keep_mask` expand one word per sequence into the masks of its activations, on any device.
"""

from __future__ import annotations

from collections.abc import Sequence
from enum import IntEnum

import numpy as np
import torch
from torch import Tensor


class Purpose(IntEnum):
    INIT = 1
    DATA = 2
    DROPOUT = 3
    SAMPLING = 4


def generator(seed: int, purpose: Purpose, index: int = 0) -> np.random.Generator:
    """A generator for draws of any kind. Each index has its own stream, 2**128 words from the next."""
    return np.random.Generator(np.random.Philox(key=[seed, purpose], counter=[0, 0, index, 0]))


def words(seed: int, purpose: Purpose, first: int, count: int) -> np.ndarray:
    """Words `first` to `first + count - 1` of the stream of a seed and a purpose, uint64."""
    skip = first % 4  # the generator makes four words at a time
    stream = np.random.Philox(key=[seed, purpose], counter=[first // 4, 0, 0, 0])
    return stream.random_raw(skip + count)[skip:]


def offsets(seed: int, step: int, sequences: range, per_update: int, choices: int) -> np.ndarray:
    """Where each sequence of an update starts in the training split: int64, uniform over 0 .. choices - 1.

    `sequences` are places in the global batch of `per_update`. 64 random bits modulo the number of choices favour no start by
    more than choices / 2**64.
    """
    drawn = words(seed, Purpose.DATA, step * per_update + sequences.start, len(sequences))
    return (drawn % np.uint64(choices)).astype(np.int64)


def dropout_keys(seeds: Sequence[int], steps: Sequence[int], sequences: range, per_update: int) -> Tensor:
    """One 64-bit key per member and sequence, int64 (M, B)."""
    rows = [
        words(seed, Purpose.DROPOUT, step * per_update + sequences.start, len(sequences)).view(np.int64)
        for seed, step in zip(seeds, steps, strict=True)
    ]
    return torch.from_numpy(np.stack(rows))


def dropout_words(keys_MB: Tensor, rate_M: Tensor, sites: int) -> tuple[Tensor, Tensor, Tensor]:
    """The keys of the masks at the model's `sites` dropouts: two words and a threshold per sequence, int32 (sites, M, B) each.

    An activation gets a random byte, and is dropped if the byte is below the threshold. Bytes alone would round the rate to a
    multiple of 1/256, so a biased coin rounds each sequence's threshold up or down: every activation is dropped with exactly
    the member's rate.
    """
    site_S = torch.arange(sites, device=keys_MB.device) * _wrapped(0x9E3779B97F4A7C15)  # the product wraps
    key_SMB = _mix64(keys_MB + site_S[:, None, None])
    coin_SMB = ((_mix64(key_SMB) >> 40) & 0xFFFFFF).float() / 2**24
    threshold_SMB = (rate_M[:, None] * 256 + coin_SMB).floor()
    return key_SMB.to(torch.int32), (key_SMB >> 32).to(torch.int32), threshold_SMB.to(torch.int32)


def keep_mask(
    low_Z: Tensor, high_Z: Tensor, threshold_Z: Tensor, size: Sequence[int], strides: Sequence[int], start: int = 0
) -> Tensor:
    """False where an activation is dropped: bool (Z, *size), for one dropout and some of each sequence's activations.

    The activation at `index` has number start + sum(index * strides). The last stride is 1.
    """
    key = [word.view(-1, *(1 for _ in size)) for word in (low_Z, high_Z, threshold_Z)]
    fours = [stride // 4 for stride in strides[:-1]]
    if [4 * four for four in fours] == list(strides[:-1]) and start % 4 == 0:
        # one word has the bytes of four activations: unfused operations are bound by memory
        word_N = _numbers([*size[:-1], -(-size[-1] // 4)], [*fours, 1], start // 4, low_Z.device)
        bytes_ZN = _mixed(word_N, key[0], key[1]).view(torch.uint8)[..., : size[-1]]
        return bytes_ZN >= key[2].to(torch.uint8)
    number_N = _numbers(size, strides, start, low_Z.device)
    byte_ZN = (_mixed(number_N >> 2, key[0], key[1]) >> ((number_N & 3) * 8)) & 0xFF
    return byte_ZN >= key[2]


def _numbers(size: Sequence[int], strides: Sequence[int], start: int, device: torch.device) -> Tensor:
    number = torch.arange(size[-1], dtype=torch.int32, device=device) + start
    for i in reversed(range(len(size) - 1)):
        outer = torch.arange(size[i], dtype=torch.int32, device=device) * strides[i]
        number = outer.view(-1, *(1 for _ in size[i + 1 :])) + number
    return number


def _mix64(x: Tensor) -> Tensor:
    """The finaliser of SplitMix64 (Steele et al., OOPSLA 2014) on int64, whose products wrap."""
    x = (x ^ ((x >> 30) & 0x3FFFFFFFF)) * _wrapped(0xBF58476D1CE4E5B9)
    x = (x ^ ((x >> 27) & 0x1FFFFFFFFF)) * _wrapped(0x94D049BB133111EB)
    return x ^ ((x >> 31) & 0x1FFFFFFFF)


def _wrapped(constant: int) -> int:
    """The int64 of the same 64 bits."""
    return (constant + 2**63) % 2**64 - 2**63


def _mixed(number_N: Tensor, low: Tensor, high: Tensor) -> Tensor:
    """One random word per number: the counter, mixed in two rounds, with half of the key added before each.

    The rounds are those of the integer hash "lowbias32" (Wellons, 2018). The masks turn int32's arithmetic shifts into the
    logical ones that it needs. In place, because unfused operations are bound by memory.
    """
    x = number_N * -0x61C88647 + low
    x ^= (x >> 16).bitwise_and_(0xFFFF)
    x *= 0x7FEB352D
    x += high
    x ^= (x >> 15).bitwise_and_(0x1FFFF)
    x *= -0x7B935975
    x ^= (x >> 16).bitwise_and_(0xFFFF)
    return x
