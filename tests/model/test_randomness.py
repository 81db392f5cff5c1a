"""The generator against its published description, promise 2 as properties, and the statistics of dropout masks.

Statistical tests have fixed seeds, so they pass or fail for good; their bounds are 4.5 standard errors.
"""

import itertools
import math

import numpy as np
import pytest
import torch
from conftest import mask_of
from hypothesis import given, settings
from hypothesis import strategies as st

from nanostudy.model.randomness import Purpose, dropout_keys, generator, offsets, words

SIGMAS = 4.5
WORD = 2**64

seeds = st.integers(0, 2**63 - 1)
purposes = st.sampled_from(Purpose)


def philox4x64(counter, key):
    """One block of four words, by Salmon et al. (SC 2011), section 3.3: ten rounds, the key bumped between them."""
    (c0, c1, c2, c3), (k0, k1) = counter, key
    for _ in range(10):
        product0, product1 = 0xD2E7470EE14C6C93 * c0, 0xCA5A826395121157 * c2
        c0, c1, c2, c3 = product1 // WORD ^ c1 ^ k0, product1 % WORD, product0 // WORD ^ c3 ^ k1, product0 % WORD
        k0, k1 = (k0 + 0x9E3779B97F4A7C15) % WORD, (k1 + 0xBB67AE8584CAA73B) % WORD
    return c0, c1, c2, c3


def test_the_reference_gives_the_published_answers():
    """Known answers of Random123, the authors' own implementation (kat_vectors, philox4x64 10)."""
    ones = WORD - 1
    zeros_in = "16554d9eca36314c db20fe9d672d0fdc d7e772cee186176b 7e68b68aec7ba23b"
    ones_in = "87b092c3013fe90b 438c3c67be8d0224 9cc7d7c69cd777b6 a09caebf594f0ba0"
    assert " ".join(f"{word:016x}" for word in philox4x64((0,) * 4, (0,) * 2)) == zeros_in
    assert " ".join(f"{word:016x}" for word in philox4x64((ones,) * 4, (ones,) * 2)) == ones_in


@given(seeds, purposes, st.integers(0, 2**50), st.integers(0, 40))
@settings(deadline=None)
def test_words_are_philox(seed, purpose, first, count):
    """Word n is word n mod 4 of block n div 4; numpy counts blocks from 1."""
    expected = [philox4x64((n // 4 + 1, 0, 0, 0), (seed, purpose))[n % 4] for n in range(first, first + count)]
    assert words(seed, purpose, first, count).tolist() == expected


@given(seeds, purposes, st.integers(0, 2**50), st.integers(0, 30), st.integers(0, 30))
@settings(deadline=None)
def test_a_word_does_not_depend_on_where_reading_starts(seed, purpose, first, skipped, count):
    whole = words(seed, purpose, first, skipped + count)
    assert np.array_equal(words(seed, purpose, first + skipped, count), whole[skipped:])


def test_streams_do_not_meet():
    """Neighbouring seeds, every purpose, and the generators' indices, of which the first is the words' own stream."""
    streams = [words(seed, purpose, 0, 1000) for seed in (0, 1, 2, 2**63 - 1) for purpose in Purpose]
    streams += [generator(1, Purpose.SAMPLING, index).bit_generator.random_raw(1000) for index in (1, 2, 100)]
    assert len(set(np.concatenate(streams).tolist())) == 1000 * len(streams)
    assert np.array_equal(generator(1, Purpose.DATA).bit_generator.random_raw(9), words(1, Purpose.DATA, 0, 9))


# --- data order and dropout keys


@given(seeds, st.integers(0, 10**7), st.integers(1, 64), st.data(), st.integers(1, 2**40))
@settings(deadline=None)
def test_a_share_of_the_sequences_is_a_slice_of_all(seed, step, per_update, data, choices):
    """However the global batch is shared out among micro-batches or ranks."""
    start = data.draw(st.integers(0, per_update))
    share = range(start, data.draw(st.integers(start, per_update)))
    everything = range(per_update)
    all_offsets = offsets(seed, step, everything, per_update, choices)
    assert np.array_equal(offsets(seed, step, share, per_update, choices), all_offsets[share.start : share.stop])
    assert ((all_offsets >= 0) & (all_offsets < choices)).all()
    all_keys = dropout_keys([seed], [step], everything, per_update)
    assert torch.equal(dropout_keys([seed], [step], share, per_update), all_keys[:, share.start : share.stop])


@given(st.lists(st.tuples(seeds, st.integers(0, 10**6)), min_size=1, max_size=5), st.integers(1, 9))
@settings(deadline=None)
def test_dropout_keys_do_not_depend_on_the_neighbours(members, per_update):
    together = dropout_keys(*zip(*members, strict=True), range(per_update), per_update)
    for row, (seed, step) in zip(together, members, strict=True):
        assert torch.equal(row, dropout_keys([seed], [step], range(per_update), per_update)[0])


def test_steps_go_through_the_stream_without_gaps_or_repeats():
    """Step after step, the sequences' words follow one another; so no two of them share one."""
    one_after_another = [offsets(3, step, range(6), 6, WORD // 2) for step in range(50)]
    expected = [int(word) % (WORD // 2) for word in words(3, Purpose.DATA, 0, 300)]
    assert np.concatenate(one_after_another).tolist() == expected
    assert len(set(expected)) == 300


def test_offsets_are_uniform():
    """Chi-square over 100 starts, n = 100,000: 99 degrees of freedom, standard error sqrt(2 * 99)."""
    drawn = np.concatenate([offsets(4, step, range(100), 100, 100) for step in range(1000)])
    observed = np.bincount(drawn, minlength=100)
    assert len(observed) == 100
    assert abs(((observed - 1000) ** 2 / 1000).sum() - 99) < SIGMAS * math.sqrt(2 * 99)


# --- masks


def dropped(rate, sequences, size, *, seed=1, step=0, site=0):
    """True where dropped: (sequences, size)."""
    keys = dropout_keys([seed], [step], range(sequences), sequences)
    return ~mask_of(keys, torch.tensor([rate]), site, size)[0]


@pytest.mark.parametrize("rate", [0.0, 0.1, 0.2, 0.37, 0.5, 0.99])
def test_the_rate_is_exact(rate):
    """n = 20,000 sequences of 400. The bound tells the rate from both multiples of 1/256 beside it.

    The variance is that of the draws, and that of the sequences' thresholds, which are one of those two multiples.
    """
    sequences, size = 20_000, 400
    share = dropped(rate, sequences, size).float().mean().item()
    between = rate * 256 % 1
    variance = rate * (1 - rate) / (sequences * size) + between * (1 - between) / 256**2 / sequences
    bound = SIGMAS * math.sqrt(variance)
    assert abs(share - rate) <= bound
    assert between == 0 or bound < min(between, 1 - between) / 256


def test_every_place_is_dropped_at_the_rate():
    """n = 20,000 sequences, each of 64 places on its own."""
    share = dropped(0.1, 20_000, 64).float().mean(0)
    assert (share - 0.1).abs().max() < SIGMAS * math.sqrt(0.1 * 0.9 / 20_000)


def test_bytes_are_uniform():
    """Masks at the rates k / 256 are nested and differ where the byte is k - 1: that gives the bytes' histogram.

    Chi-square, n = 2**18: 254 cells (the rate goes up to 0.99, so the last holds three values).
    """
    n = 2**18
    totals = [int(dropped(k / 256, 64, n // 64).sum()) for k in range(254)]
    observed = np.diff([*totals, n])
    expected = np.full(254, n / 256)
    expected[-1] = 3 * n / 256
    assert observed.sum() == n
    chi_square = ((observed - expected) ** 2 / expected).sum()
    assert abs(chi_square - 253) < SIGMAS * math.sqrt(2 * 253)


def correlation(one, other):
    return torch.corrcoef(torch.stack([one.flatten(), other.flatten()]).double())[0, 1].item()


def test_neighbouring_places_are_independent():
    """Within a sequence, at distances that share a word, a row of attention or a power of two; n about 250,000."""
    mask = dropped(0.5, 64, 4096)
    for distance in (1, 2, 3, 4, 5, 7, 8, 16, 63, 64, 256, 1024, 2048):
        one, other = mask[:, distance:], mask[:, :-distance]
        assert abs(correlation(one, other)) < SIGMAS / math.sqrt(one.numel()), distance
    assert abs(correlation(mask[1:], mask[:-1])) < SIGMAS / math.sqrt(mask[1:].numel())


def test_sites_steps_and_seeds_are_independent():
    """n = 262,144 places a pair; the pairs are of neighbours, which a weak mixing would leave alike."""
    settings = [{}, *({"site": s} for s in (1, 2, 3, 18)), {"step": 1}, {"step": 2}, {"seed": 2}, {"seed": 3}]
    masks = [dropped(0.5, 64, 4096, **changed) for changed in settings]
    for (i, one), (j, other) in itertools.combinations(enumerate(masks), 2):
        assert abs(correlation(one, other)) < SIGMAS / math.sqrt(one.numel()), (settings[i], settings[j])


def test_sequences_have_masks_of_their_own():
    """StepSettings of 1,000 sequences spread as independent draws do: not fewer, not more alike. Chi-square, 999 degrees."""
    counts = dropped(0.5, 1000, 1024).sum(1).double()
    chi_square = ((counts - 512) ** 2 / 256).sum().item()
    assert abs(chi_square - 1000) < SIGMAS * math.sqrt(2 * 1000)
    assert len({row.numpy().tobytes() for row in dropped(0.5, 1000, 1024)}) == 1000


def test_every_bit_of_a_key_counts():
    """No two of 400,000 masks of 64 places are equal: with 32 bits of the key, 18 pairs would be; with 64, one in 10**8."""
    masks = np.packbits(dropped(0.5, 400_000, 64).numpy(), axis=1).view(np.uint64)
    assert len(np.unique(masks)) == len(masks)


@given(st.lists(st.tuples(seeds, st.floats(0, 0.99)), min_size=1, max_size=4), st.integers(0, 40), st.integers(1, 70))
@settings(deadline=None)
def test_a_mask_does_not_depend_on_the_stack(members, site, size):
    """Nor on how the global batch is shared out, nor on how many activations follow."""
    member_seeds, rates = zip(*members, strict=True)
    rate_M = torch.tensor(rates, dtype=torch.float32)
    keys = dropout_keys(member_seeds, [5] * len(members), range(6), 6)
    together = mask_of(keys, rate_M, site, size)
    for m in range(len(members)):
        alone = mask_of(keys[m : m + 1, 2:5], rate_M[m : m + 1], site, size)
        assert torch.equal(together[m : m + 1, 2:5], alone)
        longer = mask_of(keys[m : m + 1], rate_M[m : m + 1], site, size + 9)
        assert torch.equal(together[m : m + 1], longer[..., :size])
