"""Evaluations on devices that record them, and what does not depend on how many windows are read at once."""

import pytest
import torch
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


class Graph:
    """Stands in for torch.cuda.CUDAGraph: a replay computes again, from the same memory to the same memory."""

    made = 0

    def __init__(self):
        Graph.made += 1


class Recording:
    def __init__(self, graph):
        pass

    def __enter__(self):
        return self

    def __exit__(self, *problem):
        return False


@pytest.fixture
def recording(training, monkeypatch):
    """Evaluations that record and replay."""
    monkeypatch.setattr(torch.cuda, "CUDAGraph", Graph)
    monkeypatch.setattr(torch.cuda, "graph", Recording)
    Graph.made, begin = 0, module._Recorded.__init__

    def record(self, params_MP, config, losses, starts_B):
        begin(self, params_MP, config, losses, starts_B)
        weights = module.working_copies(self.params_MP, config, self.params_MP.dtype)
        self.graph.replay = lambda: self.losses_MB.copy_(losses(weights, self.starts_B))
        self.losses_MB.fill_(-1)  # recording computes nothing

    monkeypatch.setattr(module._Recorded, "__init__", record)
    training.evaluations.replays = True
    return training


def test_replays_make_the_same_bits_as_batches_one_by_one(recording, monkeypatch):
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
    assert Graph.made == 3


def test_few_batches_are_not_recorded(recording):
    recording.evaluated(recording.fresh(3), range(3), "val")
    assert Graph.made == 0


def test_the_oldest_recordings_go(recording, monkeypatch):
    monkeypatch.setitem(module.TOKENS, "cpu", 64)
    stack = recording.fresh(3)
    for context in (3, 4, 5, 6, 7, 3):
        recording.evaluated(stack, range(3), "val", context)
    assert Graph.made == 6
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
