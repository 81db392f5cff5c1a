"""Randomness as a function of (seed, purpose, step, index of the sequence in the global batch).

`words` is the only source: word n of a seed's stream for a purpose, by the counter-based generator Philox4x64-10
(Salmon et al., SC 2011) in numpy's implementation, whose streams are frozen. Nothing here keeps a state, so nothing depends on
who else draws, how often, or from where a run was resumed. `keep_mask` spreads a sequence's word over its
activations, on whatever device they are.
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
    """A generator for draws of any kind; each index has a stream of its own, 2**128 words from the next."""
    return np.random.Generator(np.random.Philox(key=[seed, purpose], counter=[0, 0, index, 0]))


def words(seed: int, purpose: Purpose, first: int, count: int) -> np.ndarray:
    """Words first .. first + count - 1 of the stream, uint64."""
    skip = first % 4  # the generator makes four words at a time
    stream = np.random.Philox(key=[seed, purpose], counter=[first // 4, 0, 0, 0])
    return stream.random_raw(skip + count)[skip:]


def offsets(seed: int, step: int, sequences: range, per_update: int, choices: int) -> np.ndarray:
    """Where each of the step's sequences starts in the training split: int64, uniform over 0 .. choices - 1.

    `sequences` are places in the step's global batch of `per_update`. Taking 64 random bits modulo the number of
    choices favours no start by more than choices / 2**64.
    """
    drawn = words(seed, Purpose.DATA, step * per_update + sequences.start, len(sequences))
    return (drawn % np.uint64(choices)).astype(np.int64)


def dropout_keys(seeds: Sequence[int], steps: Sequence[int], sequences: range, per_update: int) -> Tensor:
    """One 64-bit key a member and sequence, int64 (M, B)."""
    rows = [
        words(seed, Purpose.DROPOUT, step * per_update + sequences.start, len(sequences)).view(np.int64)
        for seed, step in zip(seeds, steps, strict=True)
    ]
    return torch.from_numpy(np.stack(rows))


def keep_mask(keys_MB: Tensor, rate_M: Tensor, site: int, size: int) -> Tensor:
    """False where an activation is dropped: bool (M, B, size), for the site-th dropout of the model.

    A byte an activation: one below the threshold drops it. A byte alone would round the rate to a multiple of 1/256, so the threshold
    is rounded up or down sequence by sequence, by a coin of the right bias: every activation is dropped with the
    member's exact rate.
    """
    key_MB = _mix64(keys_MB + _wrapped(site * 0x9E3779B97F4A7C15))
    low_MB, high_MB = key_MB.to(torch.int32), (key_MB >> 32).to(torch.int32)
    bytes_MBN = _bytes(low_MB, high_MB, size)
    coin_MB = ((_mix64(key_MB) >> 40) & 0xFFFFFF).float() / 2**24
    threshold_MB = (rate_M[:, None] * 256 + coin_MB).floor().to(torch.uint8)
    return bytes_MBN >= threshold_MB[..., None]


def _mix64(x: Tensor) -> Tensor:
    """The finaliser of SplitMix64 (Steele et al., OOPSLA 2014) on int64, whose products wrap."""
    x = (x ^ ((x >> 30) & 0x3FFFFFFFF)) * _wrapped(0xBF58476D1CE4E5B9)
    x = (x ^ ((x >> 27) & 0x1FFFFFFFFF)) * _wrapped(0x94D049BB133111EB)
    return x ^ ((x >> 31) & 0x1FFFFFFFF)


def _wrapped(constant: int) -> int:
    """The int64 of the same 64 bits."""
    return (constant + 2**63) % 2**64 - 2**63


def _bytes(low_MB: Tensor, high_MB: Tensor, size: int) -> Tensor:
    """`size` random bytes a key: a counter, mixed twice, half of the key going in before each round.

    The rounds are those of the "lowbias32" integer hash (Wellons, 2018). Its shifts are logical, and those of int32 are
    arithmetic: hence the masks. In place, because on a CPU this is bound by memory.
    """
    count = -(-size // 4)
    word_N = torch.arange(count, dtype=torch.int32, device=low_MB.device) * -0x61C88647
    x_MBN = word_N + low_MB[..., None]
    x_MBN ^= (x_MBN >> 16).bitwise_and_(0xFFFF)
    x_MBN *= 0x7FEB352D
    x_MBN += high_MB[..., None]
    x_MBN ^= (x_MBN >> 15).bitwise_and_(0x1FFFF)
    x_MBN *= -0x7B935975
    x_MBN ^= (x_MBN >> 16).bitwise_and_(0xFFFF)
    return x_MBN.view(torch.uint8)[..., :size]
