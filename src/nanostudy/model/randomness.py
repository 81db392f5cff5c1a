"""Randomness as a function of (seed, purpose, step, index of the sequence in the global batch).

`words` is the only source: word n of a seed's stream for a purpose, by the counter-based generator Philox4x64-10
(Salmon et al., SC 2011) in numpy's implementation, whose streams are frozen. Nothing here keeps a state, so nothing depends on
who else draws, how often, or from where a run was resumed. `dropout_words` and `keep_mask` spread a sequence's word over its
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


def dropout_words(keys_MB: Tensor, rate_M: Tensor, sites: int) -> tuple[Tensor, Tensor, Tensor]:
    """What the masks of the model's `sites` dropouts are spread from: two words and a threshold a sequence, int32 (sites, M, B).

    An activation gets a random byte; one below the threshold drops it. A byte alone would round the rate to a multiple of 1/256, so
    the threshold is rounded up or down sequence by sequence, by a coin of the right bias: every activation is dropped
    with the member's exact rate.
    """
    site_S = torch.tensor([_wrapped(site * 0x9E3779B97F4A7C15) for site in range(sites)], device=keys_MB.device)
    key_SMB = _mix64(keys_MB + site_S[:, None, None])
    coin_SMB = ((_mix64(key_SMB) >> 40) & 0xFFFFFF).float() / 2**24
    threshold_SMB = (rate_M[:, None] * 256 + coin_SMB).floor()
    return key_SMB.to(torch.int32), (key_SMB >> 32).to(torch.int32), threshold_SMB.to(torch.int32)


def keep_mask(
    low_Z: Tensor, high_Z: Tensor, threshold_Z: Tensor, size: Sequence[int], strides: Sequence[int], start: int = 0
) -> Tensor:
    """False where an activation is dropped: bool (Z, *size), for sequences of one dropout and some of their activations.

    Activations are numbered: the one at `index` is number start + the sum of index * strides. The last stride is 1.
    """
    key = [word.view(-1, *(1 for _ in size)) for word in (low_Z, high_Z, threshold_Z)]
    fours = [stride // 4 for stride in strides[:-1]]
    if not torch.compiler.is_compiling() and [4 * four for four in fours] == list(strides[:-1]) and start % 4 == 0:
        # a word has the bytes of four activations, and operation by operation this is bound by memory
        word_N = _numbers([*size[:-1], -(-size[-1] // 4)], [*fours, 1], start // 4, low_Z.device)
        bytes_ZN = _mixed(word_N, key[0], key[1]).view(torch.uint8)[..., : size[-1]]
        return bytes_ZN >= key[2].to(torch.uint8)
    number_N = _numbers(size, strides, start, low_Z.device)
    # written so that it vectorises
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
    """A random word a number: the counter, mixed twice, half of the key going in before each round.

    The rounds are those of the "lowbias32" integer hash (Wellons, 2018). Its shifts are logical, and those of int32 are
    arithmetic: hence the masks. In place, because operation by operation it is bound by memory.
    """
    x = number_N * -0x61C88647 + low
    x ^= (x >> 16).bitwise_and_(0xFFFF)
    x *= 0x7FEB352D
    x += high
    x ^= (x >> 15).bitwise_and_(0x1FFFF)
    x *= -0x7B935975
    x ^= (x >> 16).bitwise_and_(0xFFFF)
    return x
