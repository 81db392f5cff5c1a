"""Sampling with a cache against a plain loop without one; picking against distributions made by hand."""

import numpy as np
import pytest
import torch
from conftest import small
from oracles import lively, plain_of

from nanostudy.errors import NanostudyError, UsageError
from nanostudy.model import sample
from nanostudy.model.config import GPTConfig
from nanostudy.model.gpt import Cache, forward, named_views
from nanostudy.model.sample import _uniforms, generate, pick
from nanostudy.settings import SamplingParams

BLOCK = 8
SHAPE = GPTConfig.of(small(block_size=BLOCK, bias=True), 11)
PARAMS = lively(SHAPE, members=3, seed=4)
SEEDS = [5, 6, 7]
PROMPT = np.array([3, 1, 4])
LONG_PROMPT = np.arange(19) * 7 % 11


def sampled(picking, *, params=PARAMS, prompt=PROMPT, seeds=SEEDS, count=4, tokens=30) -> torch.Tensor:
    """(M, S, tokens)"""
    return torch.stack([ids_MS for ids_MS, _ in generate(params, SHAPE, prompt, seeds, count, tokens, picking)], dim=2)


def by_hand(logits, uniform, picking) -> int:
    """The likeliest first; then a walk along the cumulative distribution. In double precision."""
    order = np.argsort(-logits, kind="stable")
    if picking.temperature == 0:
        return int(order[0])
    weights = np.exp((logits[order] - logits.max()).astype(np.float64) / picking.temperature)
    weights = weights[: picking.top_k]
    if picking.top_p is not None:
        reached = np.cumsum(weights) / weights.sum()
        weights = weights[: np.searchsorted(reached, picking.top_p) + 1]
    place, target = 0, uniform * weights.sum()
    while target >= weights[place]:
        target -= weights[place]
        place += 1
    return int(order[place])


def without_cache(m, s, picking, prompt, tokens) -> list[int]:
    """Every token from a whole reading of its context by the plain model."""
    plain, uniform = plain_of(PARAMS[m], SHAPE), _uniforms(SEEDS, s + 1, tokens)[:, m, s]
    text = [int(token) for token in prompt]
    context = text[-BLOCK:]
    for u in uniform:
        with torch.no_grad():
            logits = plain(torch.tensor([context]))[0, -1].numpy()
        text.append(by_hand(logits, u, picking))
        if picking.exact:
            context = text[-BLOCK:]
        else:
            context = [*context, text[-1]] if len(context) < BLOCK else text[-BLOCK // 2 :]
    return text[len(prompt) :]


PICKINGS = [
    SamplingParams(temperature=1.0, top_k=None),
    SamplingParams(temperature=1.0, top_k=None, exact=True),
    SamplingParams(temperature=0.7, top_k=4, exact=True),
    SamplingParams(temperature=1.3, top_k=None, top_p=0.8),
    SamplingParams(temperature=0.9, top_k=6, top_p=0.7),
    SamplingParams(temperature=0),
    SamplingParams(temperature=0, exact=True),
]


@pytest.mark.parametrize("prompt", [PROMPT, PROMPT[:1], LONG_PROMPT[:BLOCK], LONG_PROMPT], ids=len)
@pytest.mark.parametrize("picking", PICKINGS, ids=repr)
def test_sampling_equals_a_loop_without_a_cache(picking, prompt):
    """30 tokens with a block of 8: far past the block, by both policies, from short, full and longer prompts."""
    samples = sampled(picking, prompt=prompt, count=2)
    for m in range(3):
        for s in range(2):
            assert samples[m, s].tolist() == without_cache(m, s, picking, prompt, 30)


@pytest.mark.parametrize("read_first", [1, 3, 8])
def test_logits_with_a_cache_equal_logits_without(read_first):
    """Every position, whatever was read at once before. Bound 1e-5; deviation seen: 4e-7, of logits up to 1.6."""
    tokens = torch.randint(11, (3, 2, BLOCK), generator=torch.Generator().manual_seed(0))
    views = named_views(PARAMS, SHAPE)
    whole, cache = forward(views, tokens, SHAPE), Cache.empty(SHAPE, 3, 2, PARAMS)
    ops = [forward(views, tokens[..., :read_first], SHAPE, cache=cache)]
    for t in range(read_first, BLOCK):
        ops.append(forward(views, tokens[..., t : t + 1], SHAPE, cache=cache))
    assert cache.length == BLOCK
    torch.testing.assert_close(torch.cat(ops, 2), whole, rtol=0, atol=1e-5)
    with pytest.raises(ValueError, match="after 8"):
        forward(views, tokens[..., :1], SHAPE, cache=cache)


@pytest.mark.parametrize("prompt", [PROMPT, LONG_PROMPT], ids=len)
@pytest.mark.parametrize("picking", PICKINGS, ids=repr)
def test_a_recorded_decode_writes_the_same_tokens(recordings, monkeypatch, picking, prompt):
    """To the bit, as one that computes each token anew on the same memory; and those of a cache that grows, up to rounding."""
    grown = sampled(picking, prompt=prompt)
    monkeypatch.setattr(sample, "replays", lambda device: True)
    replayed = sampled(picking, prompt=prompt)
    assert recordings.made == (0 if picking.exact and len(prompt) > BLOCK else 1)
    monkeypatch.setattr(sample.graphs, "record", lambda function, *inputs: function)
    assert torch.equal(sampled(picking, prompt=prompt), replayed)
    assert torch.equal(replayed, grown)  # no token was near enough to the edge of another


def test_logits_of_a_recorded_decode_equal_those_without(recordings, monkeypatch):
    arguments = (PARAMS, SHAPE, PROMPT, SEEDS, 2, 6, FREE)
    grown = [logits.clone() for _, logits in generate(*arguments)]
    monkeypatch.setattr(sample, "replays", lambda device: True)
    for (_, mine), theirs in zip(generate(*arguments), grown, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=0, atol=1e-5)
    assert recordings.replayed == 4


# --- of whom a sample is a function

FREE = SamplingParams(temperature=1.0, top_k=None)


def test_a_sample_does_not_depend_on_their_number():
    many = sampled(FREE, count=5)
    assert torch.equal(sampled(FREE, count=2), many[:, :2])
    assert len({tuple(sample.tolist()) for sample in many.flatten(0, 1)}) == 15  # and all differ


def test_a_member_does_not_depend_on_the_others():
    together = sampled(FREE)
    for m in range(3):
        assert torch.equal(sampled(FREE, params=PARAMS[m : m + 1], seeds=SEEDS[m : m + 1]), together[m : m + 1])


def test_a_sample_repeats_with_its_seed_and_goes_on_the_same():
    first = sampled(FREE)
    assert torch.equal(sampled(FREE), first)
    assert torch.equal(sampled(FREE, tokens=12), first[..., :12])
    other = sampled(FREE, seeds=[5, 6, 8])
    assert torch.equal(other[:2], first[:2])
    assert not torch.equal(other[2], first[2])


def test_a_prompt_counts_up_to_the_block():
    """What lies before the last block_size tokens cannot be read."""
    before = np.concatenate([[1, 2, 3, 4, 5], LONG_PROMPT])
    assert torch.equal(sampled(FREE, prompt=before), sampled(FREE, prompt=LONG_PROMPT))
    assert not torch.equal(sampled(FREE, prompt=LONG_PROMPT[-BLOCK + 1 :]), sampled(FREE, prompt=LONG_PROMPT))


def test_a_block_of_one_token():
    config = GPTConfig.of(small(block_size=1), 11)
    for exact in (False, True):
        picking = SamplingParams(temperature=1.0, top_k=None, exact=exact)
        tokens = list(generate(lively(config, 1), config, PROMPT, [1], 2, 5, picking))
        assert [token.shape for token, _ in tokens] == [(1, 2)] * 5


# --- picking

LOGITS = torch.tensor([0.5, -1.0, 2.0, 0.0, 1.0, -3.0, 1.5])


def shares(picking, logits=LOGITS, n=100_000) -> np.ndarray:
    """How often each token is picked at n evenly spread uniform numbers: its probability, give or take 1 / n."""
    uniform = ((torch.arange(n, dtype=torch.float64) + 0.5) / n).float()[None]
    picked = pick(logits.expand(1, n, -1), uniform, picking)
    return np.bincount(picked[0].numpy(), minlength=len(logits)) / n


@pytest.mark.parametrize("temperature", [0.3, 1.0, 2.5])
def test_shares_are_those_of_the_softmax(temperature):
    expected = np.exp(LOGITS.double().numpy() / temperature)
    expected /= expected.sum()
    assert shares(SamplingParams(temperature=temperature, top_k=None)) == pytest.approx(expected, abs=2e-5)


def test_samples_follow_the_softmax():
    """First tokens of 4,000 samples a member: chi-square, 10 degrees of freedom, within 4.5 standard errors."""
    first = sampled(FREE, count=4000, tokens=1)[..., 0]
    for m in range(3):
        expected = 4000 * plain_of(PARAMS[m], SHAPE)(torch.from_numpy(PROMPT)[None])[0, -1].detach().double().softmax(0)
        assert expected.min() > 5
        observed = torch.bincount(first[m], minlength=11)
        chi_square = ((observed - expected) ** 2 / expected).sum()
        assert abs(chi_square - 10) < 4.5 * np.sqrt(20)


BY_HAND = torch.tensor([0.1, 0.4, 0.05, 0.3, 0.15]).log()


@pytest.mark.parametrize(
    ("picking", "expected"),
    [
        ({}, [0.1, 0.4, 0.05, 0.3, 0.15]),
        ({"top_p": 1.0}, [0.1, 0.4, 0.05, 0.3, 0.15]),
        ({"top_p": 0.39}, [0, 1, 0, 0, 0]),
        ({"top_p": 0.41}, [0, 4 / 7, 0, 3 / 7, 0]),
        ({"top_p": 0.69}, [0, 4 / 7, 0, 3 / 7, 0]),
        ({"top_p": 0.71}, [0, 8 / 17, 0, 6 / 17, 3 / 17]),
        ({"top_p": 1e-9}, [0, 1, 0, 0, 0]),
        ({"top_k": 3}, [0, 8 / 17, 0, 6 / 17, 3 / 17]),
        ({"top_k": 99}, [0.1, 0.4, 0.05, 0.3, 0.15]),
        ({"top_k": 3, "top_p": 0.8}, [0, 4 / 7, 0, 3 / 7, 0]),  # 14/17 > 0.8, though 0.7 < 0.8: k goes first
        ({"top_k": 1}, [0, 1, 0, 0, 0]),
        ({"temperature": 0}, [0, 1, 0, 0, 0]),
        ({"temperature": 0.5}, np.array([4, 64, 1, 36, 9]) / 114),
        ({"temperature": 0.5, "top_p": 0.8}, [0, 0.64, 0, 0.36, 0]),  # the tempered ones count
    ],
    ids=str,
)
def test_distributions_made_by_hand(picking, expected):
    picking = SamplingParams(**{"temperature": 1.0, "top_k": None, **picking})
    assert shares(picking, BY_HAND) == pytest.approx(expected, abs=2e-5)


def test_the_likeliest_alone():
    """Temperature 0, top_k 1 and a tiny top_p are the same text."""
    likeliest = sampled(SamplingParams(temperature=0))
    assert torch.equal(sampled(SamplingParams(temperature=2.0, top_k=1)), likeliest)
    assert torch.equal(sampled(SamplingParams(temperature=2.0, top_k=None, top_p=1e-6)), likeliest)
    assert (likeliest == likeliest[:, :1]).all()


@pytest.mark.parametrize("uniform", [0.0, 1 - 2**-24])
@pytest.mark.parametrize("options", [{}, {"top_k": 3}, {"top_p": 0.5}])
def test_the_ends_of_the_uniform_numbers_pick_what_may_be_picked(uniform, options):
    """Rounding must not carry the last number past the last token that is allowed."""
    logits = 3 * torch.randn(500, 1, 65, generator=torch.Generator().manual_seed(1))
    logits[..., 60:] = -torch.inf
    picking = SamplingParams(**{"temperature": 1.0, "top_k": None, **options})
    picked = pick(logits, torch.full((500, 1), uniform), picking)
    assert (picked < 60).all()
    rank = (logits > logits.gather(-1, picked[..., None])).sum(-1)
    assert (rank < picking.top_k).all() if picking.top_k else True
    assert (rank == 0).all() if uniform == 0 else True


@pytest.mark.parametrize("temperature", [1e-3, 1e-10, 1e-42])
def test_a_tiny_temperature_is_nearly_none(temperature):
    assert (
        pick(LOGITS[None, None], torch.tensor([[0.9]]), SamplingParams(temperature=temperature)) == LOGITS.argmax()
    ).all()


def test_weights_that_give_no_probabilities_are_refused():
    """Such as the last weights of a diverged run: they may be finite and still too large."""
    for weight in (1e30, torch.nan):
        with pytest.raises(NanostudyError, match="weights"):
            sampled(FREE, params=torch.full_like(PARAMS, weight), tokens=3)


def test_weights_that_fail_later_crash_nothing():
    """Only the positions from 5 on are NaN: a person gets tokens of the vocabulary, or an error to read."""
    params = PARAMS.clone()
    named_views(params, SHAPE)["position_embedding"][:, 5:] = torch.nan
    try:
        tokens = sampled(FREE, params=params)
    except NanostudyError:
        return
    assert ((tokens >= 0) & (tokens < 11)).all()


@pytest.mark.parametrize("wrong", [{"temperature": -1.0}, {"top_k": 0}, {"top_p": 0.0}, {"top_p": 1.5}])
def test_what_cannot_be_picked_is_refused(wrong):
    (name,) = wrong
    with pytest.raises(UsageError, match=name):
        SamplingParams(**wrong)


def test_tokens_come_with_the_logits_that_they_were_drawn_from():
    likeliest = SamplingParams(temperature=0)
    steps = list(generate(PARAMS, SHAPE, PROMPT, SEEDS, 2, 12, likeliest))
    assert all(torch.equal(logits_MSV.argmax(-1), ids_MS) for ids_MS, logits_MSV in steps)
    assert torch.equal(torch.stack([ids_MS for ids_MS, _ in steps], 2), sampled(likeliest, count=2, tokens=12))
