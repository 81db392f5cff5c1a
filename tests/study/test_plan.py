"""The planner's promises on drawn studies, its arithmetic against hand-made figures, and what it knows of the machine."""

import dataclasses
import itertools
import math
import os
import random
import time

import pytest
from conftest import jobs_of, small
from hypothesis import given, settings
from hypothesis import strategies as st

from nanostudy import device
from nanostudy.device import available_cores, available_memory
from nanostudy.settings import Resources
from nanostudy.study.grid import Entry
from nanostudy.study.plan import (
    OVERHEAD,
    SLACK,
    WIDEST,
    Capacity,
    Pace,
    corpus_key,
    cost,
    makespan,
    memory_of,
    plan,
    stack_key,
    update_flops,
)
from nanostudy.training.events import Evaluated
from nanostudy.training.machine import resolve
from nanostudy.training.train import train

shapes = st.fixed_dictionaries(
    {
        "n_layer": st.integers(1, 3),
        "n_embd": st.sampled_from([2, 16, 64]),
        "block_size": st.sampled_from([8, 64]),
        "batch_size": st.sampled_from([1, 16]),
        "bias": st.booleans(),
    }
)
numbers = st.fixed_dictionaries(
    {
        "seed": st.integers(0, 5),
        "max_iters": st.sampled_from([0, 1, 100, 1000, 2000]),
        "dropout": st.sampled_from([0.0, 0.2]),
        "eval_interval": st.sampled_from([10, 250]),
    }
)


@st.composite
def studies(draw) -> list[Entry]:
    """Experiments of a few shapes, some of them many times, with ids in no order."""
    kinds = draw(st.lists(shapes, min_size=1, max_size=4))
    drawn = draw(st.lists(st.tuples(st.sampled_from(kinds), numbers), max_size=40))
    ids = draw(st.permutations(range(1, len(drawn) + 1)))
    made = [small(**shape, **number) for shape, number in drawn]
    return [Entry(i, f"e{i}", "all", e) for i, e in zip(ids, made, strict=True)]


capacities = st.builds(
    Capacity,
    device=st.sampled_from(["cpu", "cuda", "mps"]),
    precision=st.sampled_from(["fp32", "bf16"]),
    workers=st.integers(1, 9),
    memory=st.none() | st.integers(0, 2**29),
)
paces = st.builds(
    lambda points: Pace(tuple(sorted(points.items())), tuple(sorted(points.items()))),
    st.dictionaries(st.floats(1e3, 1e9), st.floats(1e6, 1e12), min_size=1, max_size=4),
)


@pytest.fixture(scope="module")
def corpora(corpus):
    return {corpus_key(small()): corpus}


def weight(flops: int, width: int, capacity: Capacity) -> float:
    """Time but for a factor: a step of `width` members costs width + OVERHEAD."""
    return flops / width * (width + OVERHEAD[capacity.device])


# --- invariants


@settings(deadline=None)
@given(studies(), capacities)
def test_every_experiment_is_in_one_stack_of_its_kind_within_memory(corpora, corpus, entries, capacity):
    stacks = plan(entries, corpora, capacity)
    assert sorted(entry.id for stack in stacks for entry in stack.members) == sorted(entry.id for entry in entries)
    for stack in stacks:
        assert stack.members
        assert len({stack_key(entry.experiment, capacity.device) for entry in stack.members}) == 1
        first = stack.members[0].experiment
        most = min(len(stack.members), WIDEST[capacity.device])
        fitting = [
            w
            for w in range(1, most + 1)
            if capacity.memory is None
            or memory_of(first, corpus, w, capacity.precision, capacity.device) <= capacity.memory
        ]
        assert stack.width == max(fitting, default=1)
        assert stack.memory == memory_of(first, corpus, stack.width, capacity.precision, capacity.device)
        spent = [cost(entry.experiment, corpus) for entry in stack.members]
        assert stack.flops == sum(c.training_flops + c.evaluation_flops for c in spent)
        assert stack.tokens == sum(e.experiment.max_iters * e.experiment.tokens_per_update for e in stack.members)
        lengths = [entry.experiment.max_iters for entry in stack.members]
        assert lengths == sorted(lengths, reverse=True)
    times = [weight(stack.flops, stack.width, capacity) for stack in stacks]
    assert all(a >= b * (1 - 1e-12) for a, b in itertools.pairwise(times))


@settings(deadline=None)
@given(studies(), capacities, paces, st.randoms(use_true_random=False))
def test_a_plan_depends_on_experiments_and_capacity_alone(corpora, entries, capacity, pace, shuffle):
    stacks = plan(entries, corpora, capacity)
    shuffled = list(entries)
    shuffle.shuffle(shuffled)
    assert plan(shuffled, corpora, capacity) == stacks
    timed = plan(entries, corpora, capacity, pace)
    assert [dataclasses.replace(stack, seconds=None) for stack in timed] == stacks
    for stack in timed:
        assert stack.seconds == pytest.approx(
            sum(pace.seconds(e.experiment, corpora[corpus_key(e.experiment)]) for e in stack.members)
        )


@settings(deadline=None)
@given(studies(), capacities)
def test_no_other_way_to_cut_is_much_shorter(corpora, corpus, entries, capacity):
    """Other ways: every group of one shape in parts of at most n, for each power of two n; all alone, all together."""
    stacks = plan(entries, corpora, capacity)
    mine = makespan([weight(stack.flops, stack.width, capacity) for stack in stacks], capacity.workers)
    groups: dict[object, list[Entry]] = {}
    for entry in sorted(entries, key=lambda entry: (-entry.experiment.max_iters, entry.id)):
        groups.setdefault(stack_key(entry.experiment, capacity.device), []).append(entry)
    for most in (1, 2, 4, 8, 16, 32, 64):
        times = []
        for group in groups.values():
            count = -(-len(group) // most)
            for i in range(count):
                part = group[i * len(group) // count : (i + 1) * len(group) // count]
                width = min(len(part), WIDEST[capacity.device])
                while width > 1 and (
                    capacity.memory is not None
                    and memory_of(part[0].experiment, corpus, width, capacity.precision, capacity.device)
                    > capacity.memory
                ):
                    width -= 1
                times.append(weight(sum(cost(e.experiment, corpus).flops for e in part), width, capacity))
        assert mine <= SLACK * makespan(times, capacity.workers) * (1 + 1e-12)


def test_stacks_are_as_wide_as_workers_and_memory_let_them(corpora, corpus):
    entries = [Entry(i, f"e{i}", "all", small(seed=i)) for i in range(1, 9)]

    def widths(workers: int, memory: int | None = None) -> list[tuple[int, int]]:
        stacks = plan(entries, corpora, Capacity("cpu", "fp32", workers, memory))
        return [(len(stack.members), stack.width) for stack in stacks]

    assert widths(1) == [(8, 4)]
    assert widths(2) == [(4, 4)] * 2
    assert widths(4) == [(2, 2)] * 4
    assert widths(8) == [(1, 1)] * 8
    room_for_two = memory_of(entries[0].experiment, corpus, 2, "fp32", "cpu")
    assert widths(1, room_for_two) == [(8, 2)]
    assert widths(1, room_for_two - 1) == [(1, 1)] * 8 or widths(1, room_for_two - 1) == [(8, 1)]
    assert {width for _, width in widths(1, 0)} == {1}  # nothing smaller can be tried
    assert plan([], corpora, Capacity("cpu", "fp32", 2, None)) == []


@pytest.mark.parametrize(("device", "stacks"), [("cpu", [4, 4]), ("cuda", [8]), ("mps", [8])])
def test_members_with_other_heads_share_a_stack_where_launches_cost(corpora, device, stacks):
    entries = [Entry(i, f"e{i}", "all", small(seed=i, n_embd=16, n_head=1 + i % 2)) for i in range(1, 9)]
    planned = plan(entries, corpora, Capacity(device, "fp32", 1, None))
    assert [len(stack.members) for stack in planned] == stacks


def test_merged_micro_batches_need_their_memory(corpus):
    once, often = (small(batch_size=2, gradient_accumulation_steps=n) for n in (1, 64))
    for kind, same in (("cpu", True), ("cuda", False)):
        sizes = [memory_of(e, corpus, 64, "bf16", kind) for e in (once, often)]
        assert (sizes[0] == sizes[1]) is same


def test_memory_grows_with_the_width_and_with_wider_numbers(corpus):
    for e in (small(), small(n_embd=64, block_size=64, batch_size=16)):
        sizes = [memory_of(e, corpus, width, "fp32", "cpu") for width in range(1, 9)]
        assert sizes == sorted(sizes)
        assert sizes[0] > memory_of(e, corpus, 1, "bf16", "cpu") > 0


def test_ten_thousand_experiments_are_planned_at_once(corpora):
    def spent(count: int) -> float:
        entries = [
            Entry(i, f"e{i}", "all", small(n_embd=2 * (1 + i % 20), max_iters=100 + i % 7, seed=i))
            for i in range(1, count + 1)
        ]
        best = math.inf
        for _ in range(3):
            begun = time.process_time()
            stacks = plan(entries, corpora, Capacity("cpu", "fp32", 2, 2**30))
            best = min(best, time.process_time() - begun)
        assert sum(len(stack.members) for stack in stacks) == count
        return best

    few, many = spent(1250), spent(10_000)
    assert many < 2.5
    assert many < 3 * 8 * few  # eight times as many, with room for a busy machine; squared would be 64 times


# --- makespan


def simulated(times: list[int], workers: int, begun: list[int]) -> int:
    """Second by second: whoever is free takes the longest job left."""
    left = [*begun, *[0] * (workers - len(begun))]
    jobs, clock = sorted(times), 0
    while jobs or any(left):
        for worker, busy in enumerate(left):
            while not left[worker] and jobs and not busy:
                left[worker] = jobs.pop()
        if any(left):
            clock += 1
        left = [max(0, seconds - 1) for seconds in left]
    return clock


@given(st.lists(st.integers(0, 12), max_size=9), st.integers(1, 4), st.data())
def test_makespan_is_that_of_a_simulation(times, workers, data):
    begun = data.draw(st.lists(st.integers(0, 9), max_size=workers))
    assert makespan(times, workers, begun) == simulated(times, workers, begun)


@given(st.lists(st.integers(1, 20), min_size=1, max_size=6), st.integers(1, 3))
def test_makespan_is_near_the_best_of_all_assignments(times, workers):
    """Graham (1969): longest first takes at most 4/3 - 1/(3 workers) of the least that is possible."""
    least = min(
        max(sum(t for t, w in zip(times, chosen, strict=True) if w == worker) for worker in range(workers))
        for chosen in itertools.product(range(workers), repeat=len(times))
    )
    assert least <= makespan(times, workers) <= least * (4 / 3 - 1 / (3 * workers)) + 1e-9


# --- cost


@pytest.mark.parametrize(
    ("L", "E", "T", "contexts"), [(1, 16, 8, 0), (2, 16, 32, 1), (3, 8, 64, 2), (1, 16, 100, 2), (1, 4, 128, 3)]
)
def test_cost_by_hand(corpus, L, E, T, contexts):
    V = corpus.tokenizer.vocab_size
    N = V * E + E + L * (2 * E + 3 * E * E + E * E + 4 * E * E + 4 * E * E)  # tied head, no biases, no positions
    a_token = 6 * N + 12 * L * E * T
    e = small(
        n_layer=L, n_embd=E, block_size=T, batch_size=3, gradient_accumulation_steps=5, max_iters=20, eval_interval=7
    )
    spent = cost(e, corpus)
    assert spent.tokens == 20 * 5 * 3 * T
    assert spent.training_flops == spent.tokens * a_token
    assert update_flops(e, corpus) == 5 * 3 * T * a_token
    # before the first update and after 7, 14 and 20, on both splits; and the fixed contexts; a forward pass is a third
    passes = 2 * 4 + contexts
    assert spent.evaluation_flops == pytest.approx(passes * len(corpus.val.tokens) * a_token / 3, abs=passes)
    assert spent.flops == spent.training_flops + spent.evaluation_flops


@pytest.mark.parametrize(("max_iters", "eval_interval"), [(6, 3), (6, 4), (5, 50), (0, 5)])
def test_cost_counts_the_evaluations_that_a_training_makes(corpus, machine, tmp_path, max_iters, eval_interval):
    e = small(max_iters=max_iters, eval_interval=eval_interval)
    events = train(jobs_of(e), corpus, machine, tmp_path / "checkpoint")
    made = sum(isinstance(event, Evaluated) for event in events)
    a_pass = len(corpus.val.tokens) * update_flops(e, corpus) / e.tokens_per_update / 3
    assert cost(e, corpus).evaluation_flops == pytest.approx(2 * made * a_pass, abs=1)


# --- pace


def test_pace_interpolates_between_sizes_and_stays_within_them(corpus):
    def rate(size: float, *points: tuple[float, float]) -> float:
        """The rate at which a training of this size would run, with evaluation at no cost."""
        e = small(max_iters=7)
        scaled = tuple((update_flops(e, corpus) * at / size, r) for at, r in points)
        seconds = Pace(scaled, ((1.0, 1e300),)).seconds(e, corpus)
        return cost(e, corpus).training_flops / seconds

    ends = (10.0, 100.0), (1000.0, 400.0)
    assert rate(10, *ends) == pytest.approx(100)
    assert rate(1000, *ends) == pytest.approx(400)
    assert rate(100, *ends) == pytest.approx(200)  # half the way in both logarithms
    assert rate(1, *ends) == pytest.approx(100)
    assert rate(1e9, *ends) == pytest.approx(400)
    assert rate(100, *ends, (1e6, 4.0)) == pytest.approx(200)
    assert rate(5, (77.0, 3.0)) == pytest.approx(3)


def test_pace_adds_training_and_evaluation(corpus):
    e = small()
    spent = cost(e, corpus)
    seconds = Pace(((1.0, 2e6),), ((1.0, 5e6),)).seconds(e, corpus)
    assert seconds == pytest.approx(spent.training_flops / 2e6 + spent.evaluation_flops / 5e6)


# --- the machine


@pytest.mark.parametrize(
    ("bound", "quota", "cores"),
    [
        (8, "max 100000", 8),
        (8, "", 8),
        (8, "200000 100000", 2),
        (8, "350000 100000", 3),
        (8, "50000 100000", 1),
        (2, "800000 100000", 2),
    ],
)
def test_cores_are_those_bound_to_and_paid_for(monkeypatch, bound, quota, cores):
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(bound)), raising=False)
    monkeypatch.setattr(device, "_control_group", lambda name: {"cpu.max": quota}[name])
    assert available_cores() == cores


def test_memory_is_what_the_container_has_left(monkeypatch):
    cpu = resolve(Resources(device="cpu", threads=1)).device
    files = {"memory.max": "max", "memory.stat": "anon 1000\nfile 77\nanon_thp 5"}
    monkeypatch.setattr(device, "_control_group", lambda name: files[name])
    free = available_memory(cpu)
    assert free is not None
    assert free > 10**7
    files["memory.max"] = "1000000"
    assert available_memory(cpu) == 999_000  # what files hold in memory is given back when it is needed
    files["memory.stat"] = "inactive_anon 5\nanon 250000\n"
    assert available_memory(cpu) == 750_000
    files["memory.stat"] = ""
    assert available_memory(cpu) == pytest.approx(free, rel=0.5)


def test_a_machine_without_control_groups_says_nothing():
    assert device._control_group(f"no.such.{random.random()}") == ""
