"""Evaluations on devices that record them, and what does not depend on how many windows are read at once."""

import pytest
from conftest import jobs_of, small

from nanostudy.training import evaluation as module
from nanostudy.training.evaluation import Evaluations, evaluation_tokens
from nanostudy.training.train import _Training


@pytest.fixture
def training(corpus, machine):
    jobs = jobs_of(small(seed=1), small(seed=2, n_head=2), small(seed=3, n_head=2))
    return _Training(jobs, corpus, machine, lambda: False)


def losses(training, stack, **options):
    return [one.losses.tolist() for one in training.evaluated(stack, range(3), "val", **options)]


@pytest.fixture
def recording(training, recordings):
    """Evaluations that record and replay."""
    training.evaluations.replays = True
    return training


def test_replays_make_the_same_bits_as_batches_one_by_one(recording, recordings, monkeypatch):
    """For weights that change between evaluations, both splits, and a part of the stack."""
    monkeypatch.setitem(module.TOKENS, "cpu", 64)
    stack = recording.fresh(3)
    plain = Evaluations(recording.corpus, recording.config, recording.machine)
    for _ in range(3):
        stack.state.params.mul_(1.1)
        for rows, split in (([0, 1, 2], "train"), ([0, 1, 2], "val"), ([1, 2], "val")):
            heads = [recording.heads(stack.slots[m].name) for m in rows]
            expected = plain.windows(stack.state.params[rows], heads, split, 8)
            for mine, theirs in zip(recording.evaluated(stack, rows, split), expected, strict=True):
                assert mine.losses.tolist() == theirs.losses.tolist()
    assert recordings.made == 3


def test_few_batches_are_not_recorded(recording, recordings):
    recording.evaluated(recording.fresh(3), range(3), "val")
    assert recordings.made == 0


def test_the_oldest_recordings_go(recording, recordings, monkeypatch):
    monkeypatch.setitem(module.TOKENS, "cpu", 64)
    stack = recording.fresh(3)
    for context in (3, 4, 5, 6, 7, 3):
        recording.evaluated(stack, range(3), "val", context)
    assert recordings.made == 6
    assert len(recording.evaluations.recorded) == module.MOST_RECORDED


def test_how_many_windows_are_read_at_once_changes_no_bit(training, monkeypatch):
    stack, seen = training.fresh(3), []
    for tokens in (64, 256, 2**14):
        monkeypatch.setitem(module.TOKENS, "cpu", tokens)
        seen.append(losses(training, stack))
    assert seen[0] == seen[1] == seen[2]


@pytest.mark.parametrize("device", ["cpu", "cuda", "mps"])
def test_a_large_vocabulary_is_read_in_smaller_batches(device):
    assert evaluation_tokens(65, device) == module.TOKENS[device]
    assert evaluation_tokens(50_000, device) < module.TOKENS[device]


def test_a_request_to_stop_ends_an_evaluation(training, monkeypatch):
    monkeypatch.setitem(module.TOKENS, "cpu", 64)
    calls = iter(range(10**6))
    training.evaluations.stop = lambda: next(calls) > 3
    stack = training.fresh(3)
    assert training.evaluations.windows(stack.state.params, [1, 2, 2], "val", 8) is None
    assert next(calls) == 5
