"""The training loop of a stack: resume, evaluate, retire, step, log, save. Yields events."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from nanostudy.data.corpus import Corpus, evaluation_windows
from nanostudy.errors import RankLost
from nanostudy.model.engine import Batch, Metrics, State, evaluate, train_step
from nanostudy.model.gpt import Dropout, GPTConfig, initial_parameters
from nanostudy.model.optim import StepSettings, learning_rate
from nanostudy.model.randomness import dropout_keys, offsets
from nanostudy.model.ranks import ALONE, Ranks
from nanostudy.settings import Experiment
from nanostudy.training import stack as checkpoint
from nanostudy.training.events import Evaluated, Event, Finished, Logged, Progress, Saving, Started, Stopped
from nanostudy.training.machine import Machine
from nanostudy.training.stack import Slot, Stack
from nanostudy.training.stopwatch import Stopwatch

EVALUATION_TOKENS = 8192  # tokens of a stack that an evaluation reads at once: a bound on memory, not on the result
SMALLEST_CONTEXT = 32
SAVING_SHARE = 20  # saving takes at most one part in so many of the time, however large the stack


@dataclass(frozen=True)
class Job:
    """An experiment to train. `initial` is the row (P,) to start from, or None for fresh weights of its seed."""

    name: str
    experiment: Experiment
    identity: str
    initial: Tensor | None = None


def train(
    jobs: Sequence[Job],
    corpus: Corpus,
    machine: Machine,
    path: Path,
    *,
    width: int | None = None,
    save_every: float = 60.0,
    stop: Callable[[], bool] = lambda: False,
    moments: bool = False,
    ranks: Ranks = ALONE,
) -> Iterator[Event]:
    """Trains experiments of one shape on one corpus, at most `width` at a time (default: all), and yields what happens.

    Goes on from the checkpoint at `path` if there is one; writes it every `save_every` seconds (0: after every update),
    and when `stop` asks to stop, each time after Saving events. An experiment that finished after the last checkpoint
    finishes again after a resume, with the same result. The file stays; whoever listens removes it. `moments` has Finished
    events carry AdamW's state. `ranks` share the work and yield the same; the first reads and writes the file, and what it
    stands for. A rank that is lost ends the others with RankLost, saved as after a stop.
    """
    run = _Training(jobs, corpus, machine, stop, moments, ranks)
    stack, notes = run.begin(path, width or len(jobs))
    yield from (Started(slot.name, slot.step, slot.evaluated_at, len(stack.slots), notes) for slot in stack.slots)
    saved, took = time.monotonic(), 0.0
    try:
        while stack.slots:
            yield from run.evaluate_due(stack)
            if run.done(stack):
                yield from run.retire(stack)
                continue
            metrics = run.step(stack)
            yield from run.log_due(stack, metrics)
            if time.monotonic() - saved >= (save_every and max(save_every, SAVING_SHARE * took)):
                start = time.monotonic()
                yield from run.save(stack, path)
                saved = time.monotonic()
                took = saved - start
    except _StopAsked:
        yield from run.save(stack, path)
        ranks.meet()  # so that none has ended before it is saved
        yield from (Stopped(slot.name, slot.step) for slot in stack.slots)
    except RankLost:  # nothing is half done: what changes the stack comes after the last word of the others
        yield from run.save(stack, path)
        raise


def measure(jobs: Sequence[Job], corpus: Corpus, machine: Machine, seconds: float) -> tuple[float, float]:
    """Seconds that an update of the stack takes, and a token of its evaluation, for all members together.

    Each is tried for about `seconds`, after two updates that warm the machine up.
    """
    run = _Training(jobs, corpus, machine, lambda: False)
    stack = run.fresh(len(jobs)).to(machine.device)

    def spent(steps: int) -> float:
        start = time.perf_counter()
        for _ in range(steps):
            metrics = run.step(stack)
        metrics.loss.tolist()  # waits for the device
        return time.perf_counter() - start

    spent(2)
    count = max(2, min(50, int(seconds / spent(1))))
    update = spent(count) / count
    context = run.shape.block_size
    run.losses(stack.state.params, "val", context, batches=1)
    tokens = min(windows_at_once(context, len(jobs)) * context, len(corpus.val.tokens))
    batches, start = 0, time.perf_counter()
    while time.perf_counter() - start < seconds or not batches:
        run.losses(stack.state.params, "val", context, batches=1)
        batches += 1
    return update, (time.perf_counter() - start) / batches / tokens


class _StopAsked(Exception):
    """Between two updates or micro-batches, or two batches of an evaluation: what was begun is made again."""


class _Training:
    """What does not change while a stack trains, and the clock."""

    def __init__(
        self,
        jobs: Sequence[Job],
        corpus: Corpus,
        machine: Machine,
        stop: Callable[[], bool],
        moments: bool = False,
        ranks: Ranks = ALONE,
    ) -> None:
        self.moments = moments
        self.ranks = ranks
        self.jobs = {job.name: job for job in jobs}
        self.identities = {job.name: job.identity for job in jobs}
        self.corpus, self.machine, self.stop, self.stopping = corpus, machine, stop, False
        first = jobs[0].experiment
        corpus.check_window(first.block_size)
        self.shape = GPTConfig.of(first, corpus.tokenizer.vocab_size)
        self.tokens = torch.from_numpy(corpus.train.tokens).to(machine.device)
        self.stopwatch = Stopwatch()
        self.clock = time.monotonic()

    # --- starting

    def begin(self, path: Path, width: int) -> tuple[Stack, tuple[str, ...]]:
        """From the checkpoint at the first rank, if there is one, or afresh."""
        stack, notes = self.ranks.of_first(
            lambda: self.resume(path) if checkpoint.exists(path) else (self.fresh(width), ())
        )
        return stack.to(self.machine.device), notes

    def fresh(self, width: int) -> Stack:
        names = list(self.jobs)
        rows = torch.stack([self.first_weights(name) for name in names[:width]])
        return Stack([Slot(name) for name in names[:width]], names[width:], State.fresh(rows), rows.clone())

    def resume(self, path: Path) -> tuple[Stack, tuple[str, ...]]:
        stack, before, problem = checkpoint.load(path, self.identities)
        before = {"ranks": 1, **before}  # older ones know of no others
        now = self.machine.conditions
        changed = [f"{key} {before.get(key)} -> {now[key]}" for key in now if before.get(key) != now[key]]
        notes = [f"{problem} Going on from the checkpoint before it."] if problem else []
        if changed:
            notes.append(f"resumed under other conditions, so not bit for bit: {', '.join(changed)}")
        return stack, tuple(notes)

    def first_weights(self, name: str) -> Tensor:
        job = self.jobs[name]
        return initial_parameters(self.shape, [job.experiment.seed])[0] if job.initial is None else job.initial

    def experiments(self, stack: Stack) -> list[Experiment]:
        return [self.jobs[slot.name].experiment for slot in stack.slots]

    # --- evaluating and leaving

    def evaluate_due(self, stack: Stack) -> Iterator[Event]:
        due = self.due(stack, lambda e: e.eval_interval, lambda slot: slot.evaluated_at)
        if due:
            self.look_for_divergence(stack)
            due = [m for m in due if not stack.slots[m].diverged]
        if not due:
            return
        start = time.monotonic()
        self.elapse(stack)
        params = stack.state.params if len(due) == len(stack.slots) else stack.state.params[due]
        train_losses, val_losses = (self.losses(params, split, self.shape.block_size) for split in ("train", "val"))
        self.elapse(stack)
        self.stopwatch.evaluated(time.monotonic() - start)
        for m, train_loss, val_loss in zip(due, train_losses, val_losses, strict=True):
            slot = stack.slots[m]
            slot.evaluated_at, slot.val_loss = slot.step, val_loss
            slot.diverged = not math.isfinite(train_loss + val_loss)
            if val_loss < slot.best_val_loss:
                slot.best_step, slot.best_val_loss = slot.step, val_loss
                stack.best[m] = stack.state.params[m]
            yield Evaluated(slot.name, slot.step, self.tokens_seen(slot), slot.seconds, train_loss, val_loss)

    def due(self, stack: Stack, interval: Callable[[Experiment], int], last: Callable[[Slot], int]) -> list[int]:
        """Slots at a multiple of their interval, at their end, or never evaluated, that were not served there yet."""
        return [
            m
            for m, (slot, e) in enumerate(zip(stack.slots, self.experiments(stack), strict=True))
            if last(slot) != slot.step
            and (slot.step % interval(e) == 0 or slot.step >= e.max_iters or slot.evaluated_at < 0)
        ]

    def look_for_divergence(self, stack: Stack) -> None:
        """Waits for the device, so it is asked only where results are read anyway."""
        for slot, diverged in zip(stack.slots, stack.state.diverged.tolist(), strict=True):
            slot.diverged |= diverged  # an evaluation may have found it out before

    def losses(self, params: Tensor, split: str, context: int, batches: int | None = None) -> list[float]:
        """Over all windows, or the first batches of them. Ranks divide them and get the same numbers."""
        windows = islice(self.windows(split, context, len(params)), batches)
        sums = evaluate(params, windows, self.shape, self.machine.dtype, self.machine.ops)
        told = torch.cat([sums, sums.new_tensor([self.stopping])])
        self.ranks.add(told)
        *losses, targets, stopping = told.tolist()
        if stopping:
            raise _StopAsked
        return [loss / targets for loss in losses]

    def windows(self, split: str, context: int, members: int) -> Iterator[tuple[Tensor, Tensor]]:
        """This rank's batches of them; none after a request to stop."""
        batches = evaluation_windows(self.corpus, split, context, windows_at_once(context, members))
        for inputs, targets in islice(batches, self.ranks.rank, None, self.ranks.count):
            if self.asked_to_stop():
                return
            yield torch.from_numpy(inputs).to(self.machine.device), torch.from_numpy(targets).to(self.machine.device)

    def asked_to_stop(self) -> bool:
        """What is begun is then brought to no end, and the ranks meet at once: there all of them learn of it."""
        self.stopping = self.stopping or self.stop()
        return self.stopping

    def done(self, stack: Stack) -> list[int]:
        return [
            m
            for m, (slot, e) in enumerate(zip(stack.slots, self.experiments(stack), strict=True))
            if slot.diverged or slot.step >= e.max_iters
        ]

    def retire(self, stack: Stack) -> Iterator[Event]:
        """A member that is done leaves; a waiting experiment takes its slot, and when none waits the others close up."""
        m = self.done(stack)[0]
        yield self.finished(stack, m)
        if stack.waiting:
            name = stack.waiting.pop(0)
            stack.put(m, name, self.first_weights(name).to(self.machine.device))
            yield Started(name, 0, -1, len(stack.slots))
        else:
            stack.keep([other for other in range(len(stack.slots)) if other != m])

    def finished(self, stack: Stack, m: int) -> Finished:
        slot, params, updates = stack.slots[m], stack.state.params[m : m + 1], int(stack.state.updates[m])
        reason, contexts = None, {}
        self.elapse(stack)
        if slot.diverged:
            reason = f"the loss or its gradient was not finite after update {updates}"
            slot.step = slot.step if self.machine.precision == "fp16" else updates
        else:
            contexts = {c: self.score(slot, params, c) for c in contexts_within(self.shape.block_size)}
        last, best = params.cpu().clone(), stack.best[m : m + 1].cpu().clone()
        tokens, skipped = self.tokens_seen(slot), slot.step - updates
        moments = torch.stack([stack.state.exp_avg[m], stack.state.exp_avg_sq[m]]).cpu() if self.moments else None
        ended = (slot.name, updates, skipped, tokens, slot.seconds, reason, slot.best_step, contexts)
        return Finished(*ended, last, best, moments)

    def score(self, slot: Slot, params: Tensor, context: int) -> float:
        """Its validation loss at a fixed context; its own was found by the last evaluation."""
        known = context == self.shape.block_size and not math.isnan(slot.val_loss)
        return slot.val_loss if known else self.losses(params, "val", context)[0]

    # --- stepping

    def step(self, stack: Stack) -> Metrics:
        experiments, steps = self.experiments(stack), [slot.step for slot in stack.slots]
        metrics = train_step(
            stack.state,
            self.micro_batches(experiments, steps),
            experiments[0].sequences_per_update,
            StepSettings.at(experiments, steps, self.machine.device),
            self.shape,
            self.machine.dtype,
            self.machine.ops,
            self.ranks,
        )
        if metrics is None:
            raise _StopAsked
        for slot in stack.slots:
            slot.step += 1
        self.stopwatch.stepped()
        return metrics

    def micro_batches(self, experiments: Sequence[Experiment], steps: Sequence[int]) -> Iterator[Batch]:
        """This rank's share of the update, in equal parts as far as that goes; no more of them after a request to stop."""
        share = self.ranks.share(experiments[0].sequences_per_update)
        parts = -(-len(share) // experiments[0].batch_size)
        for i in range(parts):
            if self.asked_to_stop():
                return
            places = share[i * len(share) // parts : (i + 1) * len(share) // parts]
            yield self.batch(experiments, steps, places)

    def batch(self, experiments: Sequence[Experiment], steps: Sequence[int], sequences: range) -> Batch:
        """The micro-batch of these places in the global batch, for every member."""
        device, T = self.machine.device, self.shape.block_size
        seeds, per_update = [e.seed for e in experiments], experiments[0].sequences_per_update
        choices = len(self.tokens) - T
        drawn = [offsets(seed, step, sequences, per_update, choices) for seed, step in zip(seeds, steps, strict=True)]
        starts_MB1 = torch.from_numpy(np.stack(drawn)).to(device)[..., None]
        window = self.tokens[starts_MB1 + torch.arange(T + 1, device=device)].long()
        dropout = None
        if any(e.dropout for e in experiments):
            keys = dropout_keys(seeds, steps, sequences, per_update).to(device)
            dropout = Dropout(keys, torch.tensor([e.dropout for e in experiments], device=device), self.shape)
        return Batch(window[..., :-1], window[..., 1:], dropout)

    def log_due(self, stack: Stack, metrics: Metrics) -> Iterator[Event]:
        due = self.due(stack, lambda e: e.log_interval, lambda slot: -1)
        if due:
            self.look_for_divergence(stack)
            losses, norms, rate = metrics.loss.tolist(), metrics.grad_norm.tolist(), self.stopwatch.measured()
        for m in due:
            slot = stack.slots[m]
            e = self.jobs[slot.name].experiment
            lr = learning_rate(e, slot.step - 1)
            yield Logged(slot.name, slot.step, losses[m], lr, norms[m], rate * e.tokens_per_update)
        if self.stopwatch.tick():
            left = self.seconds_left(stack)
            yield from (Progress(slot.name, slot.step, left) for slot in stack.slots)

    # --- accounts

    def save(self, stack: Stack, path: Path) -> Iterator[Event]:
        yield from (Saving(slot.name, slot.step) for slot in stack.slots)
        self.elapse(stack)
        if self.ranks.first:
            checkpoint.save(stack, path, self.identities, self.machine.as_dict())

    def elapse(self, stack: Stack) -> None:
        """Charges the time since the last call to every member: they trained side by side."""
        now = time.monotonic()
        for slot in stack.slots:
            slot.seconds += now - self.clock
        self.clock = now

    def tokens_seen(self, slot: Slot) -> int:
        return slot.step * self.jobs[slot.name].experiment.tokens_per_update

    def seconds_left(self, stack: Stack) -> float | None:
        """Steps, evaluations and final scores still to come, at the pace measured."""
        ahead = [(self.jobs[slot.name].experiment, slot.step) for slot in stack.slots]
        ahead += [(self.jobs[name].experiment, 0) for name in stack.waiting]
        updates = [max(0, e.max_iters - step) for e, step in ahead]
        evaluations = sum(-(-n // e.eval_interval) for n, (e, _) in zip(updates, ahead, strict=True))
        scores = len(ahead) * len(contexts_within(self.shape.block_size)) / 2
        share = sum(updates) / len(stack.slots)
        if self.machine.device.type != "cpu":  # there a stack that narrows gets no faster
            share = max(share, *updates)
        return self.stopwatch.estimate(share, (evaluations + scores) / len(stack.slots))


def windows_at_once(context: int, members: int) -> int:
    return max(1, EVALUATION_TOKENS // (context * members))


def contexts_within(block_size: int) -> list[int]:
    """The fixed contexts at which any two experiments compare: 32, 64, 128, ... that fit."""
    contexts, c = [], SMALLEST_CONTEXT
    while c <= block_size:
        contexts.append(c)
        c *= 2
    return contexts
