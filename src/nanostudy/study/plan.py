"""Plans stacks for experiments, memory and workers. Pure: a plan is a function of its arguments, and no timing changes it.

Which experiments share a stack depends on them and on the capacity alone, so the same command makes the same plan again where
memory is no limit. A measured pace only says how long it will take.
"""

from __future__ import annotations

import heapq
import itertools
import math
from collections.abc import Hashable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

from nanostudy.data.corpus import Corpus
from nanostudy.model.config import GPTConfig, count_parameters, flops_per_token
from nanostudy.model.layers import seen_share
from nanostudy.settings import Experiment
from nanostudy.study.grid import Entry
from nanostudy.training.evaluation import contexts_within, evaluation_tokens
from nanostudy.training.inputs import corpus_key
from nanostudy.training.machine import DTYPES
from nanostudy.training.updates import sequences_at_once

# The most slots of a stack. Measured on a CPU (docs/log.md): a member's step costs 6% to 32% less at 4 than at 1, and
# hardly less beyond. Members fill a GPU; its figures are not measured yet.
WIDEST = {"cpu": 4, "cuda": 64, "mps": 16}
# The part of a step that does not grow with the members, in members: what makes narrow stacks slow.
OVERHEAD = {"cpu": 0.4, "cuda": 16.0, "mps": 8.0}
MUCH_EVALUATED = 5_000_000  # tokens, some seconds to a minute of a small model on one core
SLACK = 1.05  # how much longer the study may take for fewer, fuller stacks


@dataclass(frozen=True)
class Capacity:
    """Where a study runs, as far as the planner must know."""

    device: str  # cpu, cuda or mps
    precision: str
    workers: int
    memory: int | None  # bytes that one worker may use; None: unknown


@dataclass(frozen=True)
class Cost:
    """The arithmetic of one experiment, in floating-point operations and tokens."""

    training_flops: int
    evaluation_flops: int
    tokens: int  # trained on
    evaluated: int  # tokens that all evaluations and final scores read

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
    """Measured speeds: (arithmetic of one update, operations per second), ascending by size."""

    training: tuple[tuple[float, float], ...]
    evaluation: tuple[tuple[float, float], ...]

    def seconds(self, experiment: Experiment, corpus: Corpus) -> float:
        spent, size = cost(experiment, corpus), update_flops(experiment, corpus)
        training, evaluation = rate_at(size, self.training), rate_at(size, self.evaluation)
        return spent.training_flops / training + spent.evaluation_flops / evaluation


def stack_key(experiment: Experiment, device: str) -> Hashable:
    """Experiments with the same key may share a stack. The number of heads decides the size of no tensor, and on a GPU, which
    waits for launches, more members beside each other are worth an attention for each.
    """
    heads = experiment.n_head if device == "cpu" else 0
    return corpus_key(experiment), replace(experiment, n_head=1).shape, heads


def shape_of(experiment: Experiment, corpus: Corpus) -> GPTConfig:
    return GPTConfig.of(experiment, corpus.tokenizer.vocab_size)


def update_flops(experiment: Experiment, corpus: Corpus) -> int:
    return experiment.tokens_per_update * flops_per_token(shape_of(experiment, corpus))


def cost(experiment: Experiment, corpus: Corpus) -> Cost:
    e, per_token = experiment, flops_per_token(shape_of(experiment, corpus))
    whole, before_last = len(corpus.val.tokens), math.ceil(e.max_iters / e.eval_interval)
    evaluated = 2 * before_last * min(whole, e.eval_tokens or whole) + (2 + len(contexts_within(e.block_size))) * whole
    tokens = e.max_iters * e.tokens_per_update
    return Cost(tokens * per_token, evaluated * per_token // 3, tokens, evaluated)


def evaluation_note(experiments: Iterable[tuple[Experiment, Corpus]]) -> str | None:
    """Says it where a long text makes evaluations most of the work, and what would be less."""
    costs = [cost(*one) for one in experiments]
    share = sum(c.evaluation_flops for c in costs) / max(1, sum(c.flops for c in costs))
    most = max((c.evaluated for c in costs), default=0)
    if most < MUCH_EVALUATED or share < 0.5:
        return None
    return (
        f"evaluations read up to {most:,} tokens of an experiment, {share:.0%} of all arithmetic; with eval_tokens=100000 all but "
        "the last read a fixed subset"
    )


def memory_of(experiment: Experiment, corpus: Corpus, width: int, precision: str, device: str) -> int:
    """Bytes that a stack of this width needs, estimated: a fit to peaks measured on a CPU (docs/log.md), and a tenth more."""
    e, shape = experiment, shape_of(experiment, corpus)
    element = DTYPES[precision].itemsize / 2
    parameters = 23 * count_parameters(shape).total * width
    # bytes per token, at two per element
    layer = 4.3 * e.n_head * e.block_size * seen_share(e.block_size) + 31 * e.n_embd
    tokens = sequences_at_once(e, shape.vocab_size, device) * e.block_size
    training = width * tokens * ((e.n_layer + 1.4) * layer + 14 * shape.vocab_size)
    evaluation = evaluation_tokens(shape.vocab_size, device) * (1.4 * layer + 14 * shape.vocab_size)
    # a GPU keeps the memory of both: each is recorded
    activations = training + evaluation if device == "cuda" else max(training, evaluation)
    return int(1.1 * (2**26 + parameters + element * activations))


def plan(
    entries: Sequence[Entry], corpora: Mapping[Hashable, Corpus], capacity: Capacity, pace: Pace | None = None
) -> list[PlannedStack]:
    """Puts every entry into a stack; the longest stack comes first. `corpora` by corpus_key.

    Stacks are as wide and as few as memory and balance among the workers allow. A stack of one member may exceed the
    capacity's memory: nothing smaller can be tried.
    """
    groups: dict[Hashable, list[Entry]] = {}
    for entry in sorted(entries, key=lambda entry: (-entry.experiment.max_iters, entry.id)):  # long ones share stacks
        groups.setdefault(stack_key(entry.experiment, capacity.device), []).append(entry)
    kinds = [_Kind.of(members, corpora[corpus_key(members[0].experiment)], capacity) for members in groups.values()]
    largest = max((len(kind.members) for kind in kinds), default=1)
    limits = [2**i for i in range(math.ceil(math.log2(largest)), -1, -1)]
    spans = [makespan([w for kind in kinds for w in kind.weights(n, capacity)], capacity.workers) for n in limits]
    limit = next(n for n, span in zip(limits, spans, strict=True) if span <= SLACK * min(spans))
    chosen = [stack for kind in kinds for stack in kind.stacks(limit)]
    if pace:
        for i, stack in enumerate(chosen):
            seconds = sum(pace.seconds(e.experiment, corpora[corpus_key(e.experiment)]) for e in stack.members)
            chosen[i] = replace(stack, seconds=seconds)
    return sorted(chosen, key=lambda stack: (-_weight(stack.flops, stack.width, capacity), stack.members[0].id))


@dataclass(frozen=True)
class _Kind:
    """Experiments that may share stacks, in order, with running sums: trying every limit takes linear time in all."""

    members: Sequence[Entry]
    flops: Sequence[int]  # sums over the first 0, 1, 2, ... members; tokens likewise
    tokens: Sequence[int]
    memory: Sequence[int]  # bytes of a stack of width 1, 2, 3, ... while it fits; width 1 is always there

    @staticmethod
    def of(members: Sequence[Entry], corpus: Corpus, capacity: Capacity) -> _Kind:
        costs = [cost(entry.experiment, corpus) for entry in members]
        widths = range(1, min(len(members), WIDEST[capacity.device]) + 1)
        most = max((entry.experiment for entry in members), key=lambda e: e.n_head)
        memory = [memory_of(most, corpus, width, capacity.precision, capacity.device) for width in widths]
        limit = math.inf if capacity.memory is None else capacity.memory
        fitting = [memory[0], *itertools.takewhile(lambda bytes: bytes <= limit, memory[1:])]
        flops = [0, *itertools.accumulate(c.flops for c in costs)]
        return _Kind(members, flops, [0, *itertools.accumulate(c.tokens for c in costs)], fitting)

    def cuts(self, limit: int) -> Iterator[tuple[int, int]]:
        """(start, end) of consecutive runs of nearly equal length, at most `limit`."""
        count = math.ceil(len(self.members) / limit)
        return itertools.pairwise(i * len(self.members) // count for i in range(count + 1))

    def weights(self, limit: int, capacity: Capacity) -> Iterator[float]:
        for a, b in self.cuts(limit):
            yield _weight(self.flops[b] - self.flops[a], min(b - a, len(self.memory)), capacity)

    def stacks(self, limit: int) -> Iterator[PlannedStack]:
        for a, b in self.cuts(limit):
            width = min(b - a, len(self.memory))
            flops, tokens = self.flops[b] - self.flops[a], self.tokens[b] - self.tokens[a]
            yield PlannedStack(tuple(self.members[a:b]), width, self.memory[width - 1], flops, tokens, None)


def _weight(flops: int, width: int, capacity: Capacity) -> float:
    """A stack's relative time: a step's overhead is shared by the members beside each other."""
    return flops * (1 + OVERHEAD[capacity.device] / width)


def makespan(times: Sequence[float], workers: int, begun: Sequence[float] = ()) -> float:
    """When the last worker ends if each takes the longest job left as it comes free (Graham, 1969).

    `begun`: times that workers still need for what they have begun.
    """
    free_at = [*begun, *[0.0] * (workers - len(begun))]
    heapq.heapify(free_at)
    for time in sorted(times, reverse=True):
        heapq.heappush(free_at, heapq.heappop(free_at) + time)
    return max(free_at, default=0.0)


def rate_at(size: float, measured: Sequence[tuple[float, float]]) -> float:
    """Between two measured sizes, linear in the logarithm of the size; outside, that of the nearest."""
    below = [point for point in measured if point[0] <= size]
    above = [point for point in measured if point[0] > size]
    if not below or not above:
        return (below or above)[-1 if below else 0][1]
    (a, rate_a), (b, rate_b) = below[-1], above[0]
    share = math.log(size / a) / math.log(b / a)
    return rate_a * (rate_b / rate_a) ** share
