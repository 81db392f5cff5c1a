"""Studies on other machines: descriptions, and the simulated run against hand-made ones and against makespan()."""

import dataclasses
import itertools

import pytest
from conftest import small
from hypothesis import given
from hypothesis import strategies as st

from nanostudy.errors import UsageError
from nanostudy.study import hardware
from nanostudy.study.grid import Entry
from nanostudy.study.hardware import GPUS, SHARE, Gpu, Speed, parse_machines
from nanostudy.study.plan import Capacity, Pace, corpus_key, cost, makespan, plan, update_flops
from nanostudy.study.simulate import RECORDING, Prediction, Run, Turn, Work, predict, simulate, work

# --- descriptions


@pytest.mark.parametrize(
    ("text", "gpu", "workers", "memory"),
    [
        ("8xH200", "H200", 8, 141e9),
        ("T4", "T4", 1, 16e9),
        ("2 x a100", "A100", 2, 80e9),
        ("2xA100 40GB", "A100", 2, 40e9),
        ("4×RTX4090", "RTX 4090", 4, 24e9),
        ("rtx 4090, 20 GiB", "RTX 4090", 1, 20 * 2**30),
        ("64 cores", None, 64, None),
        ("1 core", None, 1, None),
        ("1000x1 core", None, 1000, None),
        ("16x8 cores 32GiB", None, 128, 4 * 2**30),
        ("4 cores 1.5 GiB", None, 4, 1.5 * 2**28),
        (" 2x4cores ", None, 8, None),
    ],
)
def test_descriptions_that_are_understood(text, gpu, workers, memory):
    read = parse_machines(text)
    assert (read.gpu and read.gpu.name, read.workers, read.memory) == (gpu, workers, memory)


@pytest.mark.parametrize("name", GPUS)
def test_every_gpu_of_the_table_can_be_asked_for(name):
    assert parse_machines(f"3x{name}").gpu is GPUS[name]


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("", "For example: 8xH200"),
        ("8xH201", "'H201' is neither a known GPU .*H200.* nor a number of cores"),
        ("8", "'8' is neither a known GPU"),
        ("8xH200 lots", "'H200 lots' is neither a known GPU"),
        ("-3 cores", "'-3 cores' is neither a known GPU"),
        ("0 cores", "0 workers; from 1"),
        ("0xT4", "0 workers; from 1"),
        ("1001x1000 cores", "1,001,000 workers; from 1 to 1,000,000"),
        ("64 cores 32", "64 cores 32"),
        ("8xH200 141", "H200 141"),
    ],
)
def test_what_is_not_understood_is_named(text, says):
    with pytest.raises(UsageError, match=says):
        parse_machines(text)


def test_a_driver_names_its_gpu():
    assert GPUS["A100"].is_called("NVIDIA A100-SXM4-80GB")
    assert not GPUS["A10"].is_called("NVIDIA A100-SXM4-80GB")
    assert not GPUS["L4"].is_called("NVIDIA L40S")
    assert GPUS["RTX 4090"].is_called("NVIDIA GeForce RTX 4090")


# --- the run, by hand


def test_three_stacks_on_two_workers_by_hand():
    """Start 1. Worker 0: 1-6; its samples 6-8. Worker 1: 1-4, then its samples 4-5, then the third stack 5-7, whose samples
    7-8 it writes: worker 0 is busy until 8."""
    run = simulate([Work(5, (2,)), Work(3, (1,)), Work(2, (1,))], 2, start=1)
    assert run.turns == (Turn(0, 1, 6), Turn(1, 1, 4), Turn(1, 5, 7))
    assert run.busy == (7, 7)
    assert run.ends == (8, 8)
    assert run.seconds == 8


def test_idle_workers_share_the_samples_and_start_for_them():
    """One stack, three tasks of samples: worker 1 and 2 start (1 second) when there is something to write."""
    run = simulate([Work(4, (3, 3, 3))], 3, start=1)
    assert run.turns == (Turn(0, 1, 5),)
    assert run.ends == (8, 9, 9)
    assert run.busy == (7, 3, 3)


def test_more_workers_than_stacks_and_nothing_at_all():
    assert simulate([Work(2)], 3, start=1) == Run((Turn(0, 1, 3),), (2, 0, 0), (3, 0, 0))
    assert simulate([], 2, start=1).seconds == 0


@given(st.lists(st.floats(0, 100), max_size=30), st.integers(1, 9), st.floats(0, 10))
def test_without_samples_a_run_ends_with_the_makespan(times, workers, start):
    times = sorted(times, reverse=True)
    run = simulate([Work(time) for time in times], workers, start)
    assert run.seconds == pytest.approx(makespan(times, workers) + (start if times else 0))
    assert sum(run.busy) == pytest.approx(sum(times))
    assert [turn.end - turn.begin for turn in run.turns] == pytest.approx(times)


@given(st.lists(st.tuples(st.integers(0, 9), st.lists(st.integers(1, 5), max_size=3)), max_size=12), st.integers(1, 4))
def test_no_worker_does_two_things_at_once_and_none_waits_for_long(drawn, workers):
    works = [Work(t, tuple(w)) for t, w in sorted(drawn, reverse=True)]
    run = simulate(works, workers, start=2)
    assert sum(run.busy) == sum(w.training + sum(w.writing) for w in works)
    for worker in range(workers):
        turns = sorted((t for t in run.turns if t.worker == worker), key=lambda t: t.begin)
        assert all(a.end <= b.begin for a, b in itertools.pairwise(turns))
    # Graham (1966): whoever is free works, so the end is no later than an even share and the longest chain together
    chain = max((w.training + max(w.writing, default=0) for w in works), default=0)
    assert run.seconds <= 2 + 2 + sum(run.busy) / workers + chain


# --- a stack's time


class Plain:
    """A step takes 3 seconds and 1 for each member; evaluations 5 an experiment; a token 2 and 0.5 a model."""

    start = 7.0

    def update(self, experiment, corpus):
        return 3.0, 1.0

    def evaluations(self, experiment, corpus):
        return 5.0

    def token(self, experiment, corpus):
        return 2.0, 0.5


def test_slots_are_refilled_within_a_stack(corpus):
    """Two slots, lengths 6, 4, 4, 2: the second slot takes the third at 4, the first the fourth at 6; both end at 8."""
    kinds = [(small(max_iters=6), 1), (small(max_iters=4), 2), (small(max_iters=2), 1)]
    result = work(kinds, 2, corpus, Plain(), tokens=10)
    assert result.training == 8 * 3 + (6 + 4 + 4 + 2) * 1 + 4 * 5
    assert result.writing == (10 * (2 + 4 * 0.5),)
    assert work(kinds, 2, corpus, Plain(), tokens=0).writing == ()
    alone = work([(small(max_iters=6), 1)], 1, corpus, Plain(), tokens=10)
    assert (alone.training, alone.writing) == (6 * 3 + 6 + 5, (25,))


def test_a_prediction_by_hand(corpus):
    """Two stacks of one: (6 steps of 4, 5 for evaluations, 25 to write) and (2 of 4, 5, 25) on two workers."""
    entries = [Entry(1, "a", "all", small(max_iters=6)), Entry(2, "b", "all", small(max_iters=2))]
    corpora = {corpus_key(small()): corpus}
    stacks = [s for e in entries for s in plan([e], corpora, Capacity("cpu", "fp32", 2, None))]
    prediction = predict(stacks, corpora, Plain(), 2, tokens=10)
    assert prediction.run.busy == (54, 38)
    assert prediction.seconds == 7 + 54
    assert prediction.even == 7 + 46
    assert prediction.longest == 7 + 54
    assert prediction.useful == 2  # 92 seconds of work, of which the longest is 54
    assert prediction.tail == 54 - 38
    assert prediction.shares() == (38 / 61, 46 / 61, 54 / 61)
    assert prediction.recording == 2 * RECORDING


def test_recording_is_a_bound():
    assert Prediction(Run((), (1.0,), (2.0,)), 9.0, 2.0, 2.0, 1).seconds == 9.0


# --- speeds


def test_the_assumed_speed_is_what_it_says(corpus):
    e, gpu = small(n_layer=3, gradient_accumulation_steps=5), Gpu("X", 1e12, 2**34, "bf16")
    speed = Speed.assumed(gpu)
    fixed, each = speed.update(e, corpus)
    assert fixed == pytest.approx(4 * 24 * 4e-6)  # five small micro-batches are one
    large = small(n_layer=3, n_embd=4096, batch_size=400, gradient_accumulation_steps=5)
    assert Speed.assumed(gpu).update(large, corpus)[0] == pytest.approx(5 * fixed)
    assert each == pytest.approx(update_flops(e, corpus) / (SHARE * 1e12))
    evaluations = speed.evaluations(e, corpus) - cost(e, corpus).evaluation_flops / (SHARE * 1e12)
    assert evaluations > 0
    assert hardware.assumption(gpu).startswith("assumed, not measured")
    assert "published for X" in hardware.assumption(gpu)
    assert Speed.assumed(dataclasses.replace(gpu, precision="fp16")).update(e, corpus)[0] == pytest.approx(
        4 * 60 * 8e-6
    )


def test_the_measured_speed_is_the_pace(corpus):
    e = small(max_iters=9)
    pace = Pace(((1e3, 2e6), (1e9, 8e6)), ((1e3, 5e6),))
    speed = Speed(pace, 4.0)
    fixed, each = speed.update(e, corpus)
    assert fixed + 9 * each + speed.evaluations(e, corpus) == pytest.approx(pace.seconds(e, corpus))
