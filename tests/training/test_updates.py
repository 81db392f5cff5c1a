"""Inputs drawn for many updates at once, and updates that are recorded and replayed, as a GPU does."""

import dataclasses

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from nanostudy.model.config import GPTConfig, count_parameters
from nanostudy.model.engine import State
from nanostudy.model.gpt import initial_parameters
from nanostudy.model.optim import StepSettings
from nanostudy.model.randomness import dropout_keys, offsets
from nanostudy.settings import Experiment, Resources
from nanostudy.training import updates as module
from nanostudy.training.machine import resolve
from nanostudy.training.updates import Inputs, Updates, sequences_at_once

SMALL = {"n_layer": 1, "n_head": 2, "n_embd": 8, "block_size": 8, "batch_size": 4}
TOKENS = torch.arange(500, dtype=torch.uint8) * 7 % 11
MEMBERS = [
    Experiment(**SMALL, seed=1, dropout=0.3),
    Experiment(**SMALL, seed=2),
    Experiment(**SMALL, seed=3, dropout=0.1),
]


def config_of(experiment):
    return GPTConfig.of(experiment, 11)


@pytest.fixture
def updates():
    machine = resolve(Resources(device="cpu", precision="fp32", threads=1, compile="no"))
    return lambda **kwargs: Updates(TOKENS, config_of(MEMBERS[0]), machine, **kwargs)


def fresh(experiments):
    return State.fresh(initial_parameters(config_of(experiments[0]), [e.seed for e in experiments]))


# --- drawing


@pytest.mark.parametrize("accumulation", [1, 3])
def test_a_row_is_what_its_update_would_draw_alone(updates, accumulation):
    experiments = [
        Experiment(**SMALL, seed=seed, gradient_accumulation_steps=accumulation, dropout=0.1) for seed in (1, 2)
    ]
    per_update, steps = 4 * accumulation, [5, 0]
    rows = updates().draw(experiments, steps).rows
    for u in (0, 1, len(rows) - 1):
        inputs = Inputs.of(rows[u], 2)
        for m, (e, step) in enumerate(zip(experiments, steps, strict=True)):
            alone = offsets(e.seed, step + u, range(per_update), per_update, len(TOKENS) - 8)
            assert inputs.starts[m].tolist() == alone.tolist()
            assert torch.equal(inputs.keys[m], dropout_keys([e.seed], [step + u], range(per_update), per_update)[0])
        expected = StepSettings(*StepSettings.rows(experiments, [step + u for step in steps]))
        assert torch.equal(StepSettings(*inputs.settings).learning_rate, expected.learning_rate)
        assert inputs.rates.tolist() == pytest.approx([0.1, 0.1])


def test_what_was_drawn_serves_until_a_member_changes(updates, monkeypatch):
    monkeypatch.setattr(module, "MOST_UPDATES", 3)
    one, state, draws = updates(), fresh(MEMBERS), []
    draw = one.draw
    monkeypatch.setattr(one, "draw", lambda experiments, steps: draws.append(list(steps)) or draw(experiments, steps))
    for step in range(4):
        one.step(state, MEMBERS, [step, step + 7, step])
    other = [Experiment(**SMALL, seed=9), *MEMBERS[1:]]
    one.step(state, other, [0, 11, 4])
    one.step(state, other, [1, 12, 5])
    one.step(state, other, [1, 12, 5])  # again, as after a step that went wrong
    assert draws == [[0, 7, 0], [3, 10, 3], [0, 11, 4]]


def test_many_sequences_are_drawn_for_few_updates(updates, monkeypatch):
    monkeypatch.setattr(module, "MOST_DRAWN", 30)
    assert len(updates().draw(MEMBERS, [0] * 3).rows) == 2
    monkeypatch.setattr(module, "MOST_DRAWN", 1)
    assert len(updates().draw(MEMBERS, [0] * 3).rows) == 1


def test_no_more_is_drawn_than_is_left(updates):
    """By the member that has the most left."""
    ending = [Experiment(**SMALL, seed=1, max_iters=10), Experiment(**SMALL, seed=2, max_iters=25)]
    assert len(updates().draw(ending, [7, 7]).rows) == 18
    assert len(updates().draw(ending, [10, 24]).rows) == 1
    assert len(updates().draw(ending, [10, 30]).rows) == 1  # past its end, where nothing is left


# --- micro-batches


@pytest.mark.parametrize(
    ("settings", "cpu", "cuda"),
    [
        (
            {"n_layer": 4, "n_embd": 128, "batch_size": 8, "block_size": 64},
            8,
            320,
        ),  # the published grid's, as published
        ({"n_layer": 6, "n_embd": 256, "batch_size": 16, "block_size": 128}, 16, 163),
        ({"n_layer": 12, "n_embd": 768, "batch_size": 12, "block_size": 1024}, 12, 12),
    ],
)
def test_a_gpu_merges_micro_batches_by_their_settings_alone(settings, cpu, cuda):
    e = Experiment(**settings, gradient_accumulation_steps=40)
    assert sequences_at_once(e, 65, "cpu") == cpu
    assert sequences_at_once(e, 65, "cuda") == cuda
    once = dataclasses.replace(e, gradient_accumulation_steps=1)
    assert sequences_at_once(once, 65, "cuda") == e.batch_size


def test_merged_micro_batches_make_the_same_update(updates, monkeypatch):
    """The same starts and masks by place, so the same gradient up to rounding, in fewer parts."""
    experiments, parts, ends = (
        [Experiment(**SMALL, seed=s, dropout=0.2, gradient_accumulation_steps=6) for s in (1, 2)],
        [],
        [],
    )
    for at_once in (4, 10):
        monkeypatch.setattr(module, "sequences_at_once", lambda *_, at_once=at_once: at_once)
        one, state = updates(), fresh(experiments)
        batch = one.batch
        monkeypatch.setattr(
            one, "batch", lambda e, places, now, batch=batch: parts.append(len(places)) or batch(e, places, now)
        )
        ends.append([one.step(state, experiments, [step] * 2).loss for step in range(3)] + [state.params])
    assert parts == [4] * 6 * 3 + [8] * 3 * 3
    torch.testing.assert_close(ends[0], ends[1], rtol=1e-5, atol=1e-6)


# --- recording


@pytest.fixture
def recording(updates, recordings):
    """Updates that record and replay."""
    one = updates()
    one.replays = True
    return one


def test_replays_make_the_same_bits_as_updates_one_by_one(recording, recordings, updates):
    """A member may leave for another on the way: inputs are copied, and the memory of its row stays."""
    plain, states, losses = updates(), [fresh(MEMBERS), fresh(MEMBERS)], [[], []]
    experiments, steps = list(MEMBERS), [0, 0, 0]
    for i in range(9):
        if i == 5:
            experiments[1], steps[1] = Experiment(**SMALL, seed=8, dropout=0.2, learning_rate=0.01), 0
            for state in states:
                state.params[1] = initial_parameters(config_of(experiments[1]), [8])[0]
                for tensor in (state.exp_avg, state.exp_avg_sq, state.updates):
                    tensor[1] = 0
        for one, state, seen in zip((recording, plain), states, losses, strict=True):
            seen.append(one.step(state, experiments, steps).loss.tolist())
        steps = [step + 1 for step in steps]
    assert losses[0] == losses[1]
    for mine, theirs in zip(states[0].tensors().values(), states[1].tensors().values(), strict=True):
        assert torch.equal(mine, theirs)
    assert (recordings.made, recordings.replayed) == (1, 8)


def test_a_narrower_stack_and_its_first_dropout_are_recorded_anew(recording, recordings):
    state = fresh(MEMBERS)
    for step in range(3):
        recording.step(state, MEMBERS, [step] * 3)
    narrow, without = state.rows([1]), [MEMBERS[1]]
    for step in range(3, 6):
        recording.step(narrow, without, [step])
    for step in range(2):
        recording.step(narrow, [MEMBERS[0]], [step])
    assert recordings.made == 3


def test_other_numbers_of_heads_are_recorded_anew(recording, recordings):
    state, other = fresh(MEMBERS), [Experiment(**{**SMALL, "n_head": 4}, seed=1, dropout=0.3), *MEMBERS[1:]]
    for experiments in (MEMBERS, other, other):
        recording.step(state, experiments, [0] * 3)
    assert recordings.made == 2


def test_a_request_to_stop_ends_before_a_replay_or_a_recording(recording, recordings, monkeypatch):
    """What was never computed has compiled no kernels, so it cannot be recorded."""
    state, stops = fresh(MEMBERS), True
    before = state.params.clone()
    monkeypatch.setattr(recording, "stop", lambda: stops)
    assert recording.step(state, MEMBERS, [0] * 3) is None
    assert recordings.made == 0
    assert torch.equal(state.params, before)
    stops = False
    recording.step(state, MEMBERS, [0] * 3)
    before, stops = state.params.clone(), True
    assert recording.step(state, MEMBERS, [1] * 3) is None
    assert torch.equal(state.params, before)


# --- what an update asks of a device


class Reads(TorchDispatchMode):
    """Operations that wait for the device."""

    NAMES = ("aten::_local_scalar_dense", "aten::is_nonzero", "aten::equal", "aten::nonzero")

    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        if operation._schema.name in self.NAMES:
            self.seen.append(operation._schema.name)
        return operation(*args, **(kwargs or {}))


@pytest.mark.parametrize("accumulation", [1, 2])
def test_an_update_reads_nothing_from_the_device(updates, accumulation):
    """On PyTorch's device without memory, where tensors of the host among those of the device are an error, too."""
    experiment = Experiment(**SMALL, dropout=0.2, gradient_accumulation_steps=accumulation)
    one, config = updates(), config_of(experiment)
    one.tokens = TOKENS.to("meta")
    now = Inputs.of(one.draw([experiment], [0]).rows[0].to("meta"), 1)
    state = State.fresh(torch.empty(1, count_parameters(config).total, device="meta"))
    with Reads() as reads:
        assert one.update(state, [experiment], now, lambda: False)
    assert reads.seen == []
