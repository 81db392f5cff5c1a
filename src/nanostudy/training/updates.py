"""The updates of a stack: what they read is drawn for many at once, and a GPU records one update as a graph and replays it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from nanostudy.model import graphs
from nanostudy.model.config import GPTConfig
from nanostudy.model.engine import Batch, Metrics, State, train_step
from nanostudy.model.gpt import dropouts
from nanostudy.model.optim import StepSettings
from nanostudy.model.randomness import dropout_keys, offsets
from nanostudy.model.ranks import ALONE, Ranks
from nanostudy.settings import Experiment
from nanostudy.training.machine import Machine

MOST_DRAWN = 2**16  # sequences of all members whose random words are drawn at once
MOST_UPDATES = 256
# numbers as wide as the residual stream, of all layers and the logits, that a member's merged micro-batch may have
MERGED = 2**25


class Inputs(NamedTuple):
    """What an update reads, on the device: parts of one row, so that one copy brings all of it."""

    starts: Tensor  # int64 (M, B): where each sequence begins in the training split
    keys: Tensor  # int64 (M, B): of dropout
    settings: Tensor  # fp32 (7, M, 1): StepSettings.rows
    rates: Tensor  # fp32 (M,): of dropout

    @staticmethod
    def of(row: Tensor, members: int) -> Inputs:
        """From a row, int64."""
        B = len(row) // members // 2 - 2
        starts, keys, numbers = row.split([members * B, members * B, 4 * members])
        settings, rates = numbers.view(torch.float32).split([7 * members, members])
        return Inputs(starts.view(members, B), keys.view(members, B), settings.view(7, members, 1), rates)


@dataclass(frozen=True)
class Draws:
    """The inputs of the next updates of a stack: those of update `steps[m] + u` of member m are in row u, int64 (U, N)."""

    experiments: tuple[Experiment, ...]
    steps: tuple[int, ...]
    rows: Tensor

    def row(self, experiments: Sequence[Experiment], steps: Sequence[int]) -> int | None:
        """The row of these updates, if it is here."""
        u = steps[0] - self.steps[0]
        same = self.experiments == tuple(experiments) and self.steps == tuple(step - u for step in steps)
        return u if same and 0 <= u < len(self.rows) else None


def sequences_at_once(experiment: Experiment, vocabulary: int, device: str) -> int:
    """Of each member in a micro-batch. A GPU merges micro-batches, up to a bound that follows from the settings and the kind of
    device: sums of gradients depend on it, so memory and the stack must not.
    """
    e = experiment
    if device != "cuda":
        return e.batch_size
    tokens = MERGED // (e.n_layer * e.n_embd + vocabulary)
    return min(max(e.batch_size, tokens // e.block_size), e.sequences_per_update)


class _Recorded(NamedTuple):
    """One update as a CUDA graph, which writes the state in place."""

    state: State
    how: tuple[bool, list[int]]  # whether there is dropout, and each member's number of heads
    replay: Callable[[Tensor], Metrics | None]


class Updates:
    """The updates of one stack after another, of experiments of one shape on one text."""

    def __init__(
        self,
        tokens: Tensor,
        config: GPTConfig,
        machine: Machine,
        ranks: Ranks = ALONE,
        stop: Callable[[], bool] = lambda: False,
    ) -> None:
        self.tokens, self.config, self.machine, self.ranks, self.stop = tokens, config, machine, ranks, stop
        self.draws: Draws | None = None
        self.replays = machine.device.type == "cuda" and machine.compiled and ranks.count == 1
        self.recorded: _Recorded | None = None

    def step(self, state: State, experiments: Sequence[Experiment], steps: Sequence[int]) -> Metrics | None:
        """Update `steps[m]` of every member m, in place. None, and nothing changed, after a request to stop."""
        row = self.draws.row(experiments, steps) if self.draws else None
        if row is None:
            self.draws, row = self.draw(experiments, steps), 0
        assert self.draws is not None
        now, M, how = self.draws.rows[row], len(experiments), (_drops(experiments), _heads(experiments))
        # a member may give its row to another experiment, but the rows must be the same memory
        if self.recorded and self.recorded.state is state and self.recorded.how == how:
            return None if self.stop() else self.recorded.replay(now)
        metrics = self.update(state, experiments, Inputs.of(now, M), self.stop)
        if self.replays and metrics is not None:  # the update has compiled kernels, which a recording must not
            self.recorded = None  # frees its memory
            replay = graphs.record(lambda now: self.update(state, experiments, Inputs.of(now, M), lambda: False), now)
            self.recorded = _Recorded(state, how, replay)
        return metrics

    def draw(self, experiments: Sequence[Experiment], steps: Sequence[int]) -> Draws:
        """As many updates as MOST_DRAWN allows and one of the members has left, in one copy."""
        per_update, M = experiments[0].sequences_per_update, len(experiments)
        left = max(e.max_iters - step for e, step in zip(experiments, steps, strict=True))
        U = max(1, min(left, MOST_UPDATES, MOST_DRAWN // (M * per_update)))
        choices = len(self.tokens) - self.config.block_size
        words = range(U * per_update)  # an update's words follow those of the update before
        pairs = list(zip(experiments, steps, strict=True))
        starts = torch.from_numpy(np.stack([offsets(e.seed, step, words, per_update, choices) for e, step in pairs]))
        keys = dropout_keys([e.seed for e in experiments], steps, words, per_update)
        settings = torch.stack([StepSettings.rows(experiments, [step + u for step in steps]) for u in range(U)])
        rates_UM = torch.tensor([e.dropout for e in experiments]).expand(U, -1)
        places = [words_MN.view(M, U, per_update).transpose(0, 1).flatten(1) for words_MN in (starts, keys)]
        numbers = torch.cat([settings.flatten(1), rates_UM], 1).view(torch.int64)
        rows, device = torch.cat([*places, numbers], 1), self.machine.device
        rows = rows.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else rows.to(device)
        return Draws(tuple(experiments), tuple(steps), rows)

    def update(
        self,
        state: State,
        experiments: Sequence[Experiment],
        now: Inputs,
        stop: Callable[[], bool],
    ) -> Metrics | None:
        """One update, without a copy from the host."""
        return train_step(
            state,
            self.micro_batches(experiments, now, stop),
            experiments[0].sequences_per_update,
            StepSettings(*now.settings),
            self.config,
            self.machine.dtype,
            self.machine.ops,
            self.ranks,
        )

    def micro_batches(
        self, experiments: Sequence[Experiment], now: Inputs, stop: Callable[[], bool]
    ) -> Iterator[Batch]:
        """This rank's share of the update in nearly equal parts; no more of them after a request to stop."""
        share = self.ranks.share(experiments[0].sequences_per_update)
        parts = -(-len(share) // sequences_at_once(experiments[0], self.config.vocab_size, self.machine.device.type))
        for i in range(parts):
            if stop():
                return
            yield self.batch(experiments, share[i * len(share) // parts : (i + 1) * len(share) // parts], now)

    def batch(self, experiments: Sequence[Experiment], sequences: range, now: Inputs) -> Batch:
        """The micro-batch at these places of the global batch, for every member."""
        places, ops = slice(sequences.start, sequences.stop), self.machine.ops
        windows = ops.windows(self.tokens, now.starts[:, places], self.config.block_size)
        dropout = dropouts(now.keys[:, places], now.rates, self.config, ops) if _drops(experiments) else None
        return Batch(*windows, dropout, _heads(experiments))


def _drops(experiments: Sequence[Experiment]) -> bool:
    return any(e.dropout for e in experiments)


def _heads(experiments: Sequence[Experiment]) -> list[int]:
    return [e.n_head for e in experiments]
