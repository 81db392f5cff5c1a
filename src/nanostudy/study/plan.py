"""Experiments, memory and workers -> stacks. Pure: a plan is a function of its arguments, and no timing changes it.

What shares a stack depends on the experiments and on the capacity alone, so that where memory is no limit the same command
makes the same plan again; a measured pace only tells how long it will take.
"""

from __future__ import annotations

import heapq
import itertools
import math
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, replace

from nanostudy.gpt.corpus import Corpus
from nanostudy.gpt.experiment import Experiment
from nanostudy.gpt.layers import seen_share
from nanostudy.gpt.machine import DTYPES
from nanostudy.gpt.model import Shape, count_parameters, flops_per_token
from nanostudy.gpt.train import EVALUATION_TOKENS, contexts_within
from nanostudy.study.grid import Entry

# Slots that a stack has at most. Measured on a CPU (docs/log.md): a member's step costs 6% to 32% less at 4 than at 1, and
# hardly less beyond. A GPU is filled by members; its figures are not measured yet.
WIDEST = {"cpu": 4, "cuda": 64, "mps": 16}
# How much of a step does not grow with the members, in members: what makes narrow stacks dear.
OVERHEAD = {"cpu": 0.4, "cuda": 16.0, "mps": 8.0}
SLACK = 1.05  # how much longer the whole may take for the sake of fewer, fuller stacks


@dataclass(frozen=True)
class Capacity:
    """What the planner must know of where a study runs."""

    device: str  # cpu, cuda or mps
    precision: str
    workers: int
    memory: int | None  # bytes that one worker may use; None: not known


@dataclass(frozen=True)
class Cost:
    """The arithmetic of one experiment, in floating-point operations and tokens."""

    training_flops: int
    evaluation_flops: int
    tokens: int

    @property
    def flops(self) -> int:
        return self.training_flops + self.evaluation_flops


@dataclass(frozen=True)
class PlannedStack:
    """Members in the order in which they take slots, `width` at a time."""

    members: tuple[Entry, ...]
    width: int
    memory: int  # bytes, estimated, at full width
    flops: int
    tokens: int
    seconds: float | None  # estimated; None without a pace


@dataclass(frozen=True)
class Pace:
    """Rates measured here, for the sizes measured: arithmetic of one update -> operations a second, ascending by size."""

    training: tuple[tuple[float, float], ...]
    evaluation: tuple[tuple[float, float], ...]

    def seconds(self, experiment: Experiment, corpus: Corpus) -> float:
        spent, size = cost(experiment, corpus), update_flops(experiment, corpus)
        return spent.training_flops / _rate(self.training, size) + spent.evaluation_flops / _rate(self.evaluation, size)


def corpus_key(experiment: Experiment) -> tuple[str, str, str | None]:
    """What decides the tokens that an experiment reads."""
    return experiment.corpus, experiment.tokenizer, experiment.init_from


def stack_key(experiment: Experiment) -> Hashable:
    """Experiments that agree in this may share a stack."""
    return corpus_key(experiment), experiment.shape


def shape_of(experiment: Experiment, corpus: Corpus) -> Shape:
    return Shape.of(experiment, corpus.tokenizer.vocab_size)


def update_flops(experiment: Experiment, corpus: Corpus) -> int:
    return experiment.tokens_per_update * flops_per_token(shape_of(experiment, corpus))


def cost(experiment: Experiment, corpus: Corpus) -> Cost:
    e, per_token = experiment, flops_per_token(shape_of(experiment, corpus))
    evaluations = 1 + math.ceil(e.max_iters / e.eval_interval)
    passes = 2 * evaluations + len(contexts_within(e.block_size))
    tokens = e.max_iters * e.tokens_per_update
    return Cost(tokens * per_token, passes * len(corpus.val.tokens) * per_token // 3, tokens)


def memory_of(experiment: Experiment, corpus: Corpus, width: int, precision: str) -> int:
    """Bytes that a stack of this width needs, about: a fit to measured peaks on a CPU (docs/log.md), and a tenth more."""
    e, shape = experiment, shape_of(experiment, corpus)
    element = DTYPES[precision].itemsize / 2
    parameters = 23 * count_parameters(shape).total * width
    layer = 4.3 * e.n_head * e.block_size * seen_share(e.block_size) + 31 * e.n_embd  # bytes a token, two an element
    training = width * e.batch_size * e.block_size * ((e.n_layer + 1.4) * layer + 14 * shape.vocab_size)
    evaluation = EVALUATION_TOKENS * (1.4 * layer + 14 * shape.vocab_size)
    return int(1.1 * (2**26 + parameters + element * max(training, evaluation)))


def plan(
    entries: Sequence[Entry], corpora: Mapping[Hashable, Corpus], capacity: Capacity, pace: Pace | None = None
) -> list[PlannedStack]:
    """Every entry in one stack; the longest stack first. `corpora` by corpus_key.

    Stacks are as wide and as few as memory and balance among the workers allow. A stack of one member may exceed the
    capacity's memory: nothing smaller can be tried.
    """
    groups: dict[Hashable, list[Entry]] = {}
    for entry in sorted(entries, key=lambda entry: (-entry.experiment.max_iters, entry.id)):  # long ones share stacks
        groups.setdefault(stack_key(entry.experiment), []).append(entry)
    costs = {entry.id: cost(entry.experiment, corpora[corpus_key(entry.experiment)]) for entry in entries}
    largest = max((len(group) for group in groups.values()), default=1)
    limits = [2**i for i in range(math.ceil(math.log2(largest)), -1, -1)]
    plans = [[_stack(part, corpora, costs, capacity) for g in groups.values() for part in _parts(g, n)] for n in limits]
    spans = [makespan([_weight(stack, capacity) for stack in plan], capacity.workers) for plan in plans]
    chosen = next(plan for plan, span in zip(plans, spans, strict=True) if span <= SLACK * min(spans))
    timed = [replace(stack, seconds=_seconds(stack, corpora, pace)) for stack in chosen] if pace else chosen
    return sorted(timed, key=lambda stack: (-_weight(stack, capacity), stack.members[0].id))


def _parts(group: Sequence[Entry], limit: int) -> list[Sequence[Entry]]:
    """Consecutive runs of nearly the same length, at most `limit`."""
    count = math.ceil(len(group) / limit)
    cuts = [i * len(group) // count for i in range(count + 1)]
    return [group[a:b] for a, b in itertools.pairwise(cuts)]


def _stack(
    members: Sequence[Entry], corpora: Mapping[Hashable, Corpus], costs: Mapping[int, Cost], capacity: Capacity
) -> PlannedStack:
    first = members[0].experiment
    corpus = corpora[corpus_key(first)]
    width = min(len(members), WIDEST[capacity.device])
    limit = math.inf if capacity.memory is None else capacity.memory
    while width > 1 and memory_of(first, corpus, width, capacity.precision) > limit:
        width -= 1
    return PlannedStack(
        tuple(members),
        width,
        memory_of(first, corpus, width, capacity.precision),
        sum(costs[entry.id].flops for entry in members),
        sum(costs[entry.id].tokens for entry in members),
        None,
    )


def _seconds(stack: PlannedStack, corpora: Mapping[Hashable, Corpus], pace: Pace) -> float:
    corpus = corpora[corpus_key(stack.members[0].experiment)]
    return sum(pace.seconds(entry.experiment, corpus) for entry in stack.members)


def _weight(stack: PlannedStack, capacity: Capacity) -> float:
    """Relative time: a step's overhead is shared by the members beside each other."""
    return stack.flops * (1 + OVERHEAD[capacity.device] / stack.width)


def makespan(times: Sequence[float], workers: int, begun: Sequence[float] = ()) -> float:
    """When the last worker ends if each takes the longest job left as it comes free (Graham, 1969).

    `begun`: what is left of the jobs that workers have in hand.
    """
    free_at = [*begun, *[0.0] * (workers - len(begun))]
    heapq.heapify(free_at)
    for time in sorted(times, reverse=True):
        heapq.heappush(free_at, heapq.heappop(free_at) + time)
    return max(free_at, default=0.0)


def _rate(measured: Sequence[tuple[float, float]], size: float) -> float:
    """Between two sizes measured, linear in the logarithm of the size; outside, the nearest."""
    below = [point for point in measured if point[0] <= size]
    above = [point for point in measured if point[0] > size]
    if not below or not above:
        return (below or above)[-1 if below else 0][1]
    (a, rate_a), (b, rate_b) = below[-1], above[0]
    share = math.log(size / a) / math.log(b / a)
    return rate_a * (rate_b / rate_a) ** share
