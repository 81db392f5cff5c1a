"""The training loop of a stack: resume, evaluate, retire, step, log, save. It yields events."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import count, islice, takewhile
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from nanostudy.data.corpus import Corpus, evaluation_windows, window_count
from nanostudy.device import memory_errors, total_memory
from nanostudy.errors import OutOfMemory, RankLost
from nanostudy.model.config import GPTConfig, count_parameters
from nanostudy.model.engine import Metrics, State, evaluate
from nanostudy.model.gpt import initial_parameters
from nanostudy.model.optim import learning_rate
from nanostudy.model.ranks import ALONE, Ranks
from nanostudy.result import Result, Status
from nanostudy.settings import Experiment
from nanostudy.training import stack as checkpoint
from nanostudy.training.events import Evaluated, Event, Finished, Logged, Progress, Saving, Started, Stopped
from nanostudy.training.machine import Machine
from nanostudy.training.stack import Slot, Stack
from nanostudy.training.updates import Updates
from nanostudy.training.window_losses import Windows, name_at

BYTES_PER_PARAMETER = 16  # weight, gradient and two moments, in fp32
# What one batch of an evaluation may hold: tokens of a stack, and logits, of which each token has one per token of the
# vocabulary. Both bound memory and do not change the result.
EVALUATION_TOKENS = 8192
EVALUATION_LOGITS = 2**23
EVALUATION_ADVICE = (
    "Memory ran out in an evaluation, in which batch_size plays no part. Lower n_embd, n_layer or block_size, or the number "
    "of different tokens ({vocabulary:,}): tokenizer=byte has 256. The last checkpoint is whole."
)
NO_WINDOWS = Windows(np.zeros(0, np.float32), 0, 0)
SMALLEST_CONTEXT = 32
SAVING_SHARE = 20  # saving takes at most 1 / 20 of the time


@dataclass(frozen=True)
class Job:
    """An experiment to train. `initial` is the row (P,) to start from; None: fresh weights from its seed."""

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
    """Trains experiments of one shape on one corpus, at most `width` at a time (default: all), and yields events.

    Resumes from the checkpoint at `path` if it exists. Saves it every `save_every` seconds (0: after every update) and when
    `stop` returns true, each time after Saving events. An experiment that finished after the last checkpoint finishes again
    after a resume, with the same result. The listener removes the file. With `moments`, Finished events carry AdamW's state.
    `ranks` share the work and yield the same events; rank 0 reads and writes the file. If a rank is lost, the others save as
    after a stop and raise RankLost.
    """
    run = _Training(jobs, corpus, machine, stop, moments, ranks)
    stack, notes = run.begin(path, width or len(jobs))
    yield from (Started(slot.name, slot.step, slot.evaluated_at, len(stack.slots), notes) for slot in stack.active)
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
    except _StopRequested:
        yield from run.save(stack, path)
        ranks.meet()  # no rank ends before the file is saved
        yield from (Stopped(slot.name, slot.step) for slot in stack.active)
    except RankLost:  # the stack changes only after the last exchange of an update, so it is consistent
        yield from run.save(stack, path)
        raise


def measure(jobs: Sequence[Job], corpus: Corpus, machine: Machine, seconds: float) -> tuple[float, float]:
    """Seconds per update of the stack, and per token of its evaluation, for all members together.

    Each is measured for about `seconds`, after two warm-up updates.
    """
    run = _Training(jobs, corpus, machine, lambda: False)
    stack = run.fresh(len(jobs)).to(machine.device)

    def seconds_of(steps: int) -> float:
        start = time.perf_counter()
        for _ in range(steps):
            metrics = run.step(stack)
        metrics.loss.tolist()  # waits for the device
        return time.perf_counter() - start

    seconds_of(2)
    steps = max(2, min(50, int(seconds / seconds_of(1))))
    update = seconds_of(steps) / steps
    context = run.config.block_size
    run.evaluation(stack.state.params, "val", context, batches=1)
    tokens = min(windows_at_once(context, len(jobs), run.config.vocab_size) * context, len(corpus.val.tokens))
    batches, start = 0, time.perf_counter()
    while time.perf_counter() - start < seconds or not batches:
        run.evaluation(stack.state.params, "val", context, batches=1)
        batches += 1
    return update, (time.perf_counter() - start) / batches / tokens


class _StopRequested(Exception):
    """Raised between updates, micro-batches or batches of an evaluation. A resume repeats the unfinished part."""


class _Training:
    """The constants of a stack's training, and its clock."""

    def __init__(
        self,
        jobs: Sequence[Job],
        corpus: Corpus,
        machine: Machine,
        stop: Callable[[], bool],
        moments: bool = False,
        ranks: Ranks = ALONE,
    ) -> None:
        self.moments, self.ranks = moments, ranks
        self.jobs = {job.name: job for job in jobs}
        self.identities = {job.name: job.identity for job in jobs}
        self.corpus, self.machine, self.stop, self.stopping = corpus, machine, stop, False
        first = jobs[0].experiment
        corpus.check_window(first.block_size)
        self.config = GPTConfig.of(first, corpus.tokenizer.vocab_size)
        _check_memory(self.config, machine.device)
        tokens = torch.from_numpy(corpus.train.tokens).to(machine.device)
        self.updates = Updates(tokens, self.config, machine, ranks, self.stop_requested)
        self.speed = _Speed()
        self.clock = time.monotonic()

    # --- starting

    def begin(self, path: Path, width: int) -> tuple[Stack, tuple[str, ...]]:
        """From rank 0's checkpoint if it exists, else from the start."""
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
        before = {"ranks": 1, **before}  # older checkpoints do not record ranks
        now = self.machine.conditions
        changed = [f"{key} {before.get(key)} -> {now[key]}" for key in now if before.get(key) != now[key]]
        notes = [f"{problem} Resuming from the checkpoint before it."] if problem else []
        if changed:
            notes.append(f"resumed under other conditions, so not bit for bit: {', '.join(changed)}")
        return stack, tuple(notes)

    def first_weights(self, name: str) -> Tensor:
        job = self.jobs[name]
        return initial_parameters(self.config, [job.experiment.seed])[0] if job.initial is None else job.initial

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
        evaluations = self.evaluations(stack, due)
        self.elapse(stack)
        self.speed.evaluated(time.monotonic() - start)
        for m in due:
            slot, (train_loss, val_loss, compared, windows) = stack.slots[m], evaluations[m]
            slot.evaluated_at, slot.val_loss = slot.step, val_loss
            slot.diverged = not math.isfinite(train_loss + val_loss)
            if compared < slot.best_val_loss:
                slot.best_step, slot.best_val_loss = slot.step, compared
                stack.best[m] = stack.state.params[m]
            tokens, seconds = self.tokens_seen(slot), slot.seconds
            yield Evaluated(slot.name, slot.step, tokens, seconds, train_loss, val_loss, windows)

    def evaluations(
        self, stack: Stack, due: Sequence[int]
    ) -> dict[int, tuple[float, float, float, dict[str, Windows]]]:
        """By slot: training loss, validation loss, the validation loss to compare with those before, on the same windows; and of
        the last evaluation each window's loss.

        Exact at the end, or where eval_tokens is unset; else on the subset.
        """
        subset = {m: self.jobs[stack.slots[m].name].experiment.eval_tokens for m in due}
        last = [m for m in self.done(stack) if m in subset]
        tokens = {m: None if m in last else subset[m] for m in due}
        train, val = (self.evaluate_split(stack, split, tokens, last) for split in ("train", "val"))
        compared = self.evaluate_split(stack, "val", {m: subset[m] for m in last if subset[m]}, [])
        windows = {m: {"train": train[m][1], "val": val[m][1]} for m in last}
        return {m: (train[m][0], val[m][0], compared.get(m, val[m])[0], windows.get(m, {})) for m in due}

    def evaluate_split(
        self, stack: Stack, split: str, tokens: Mapping[int, int | None], last: Sequence[int]
    ) -> dict[int, tuple[float, Windows]]:
        """By slot its loss, and for those at their `last` evaluation each window's. Slots that read the same number of tokens are
        evaluated together.
        """
        results: dict[int, tuple[float, Windows]] = {}
        for amount in dict.fromkeys(tokens.values()):
            rows = [m for m in tokens if tokens[m] == amount]
            params = stack.state.params if len(rows) == len(stack.slots) else stack.state.params[rows]
            means, windows = self.evaluation(
                params, split, self.config.block_size, tokens=amount, with_windows=not set(rows).isdisjoint(last)
            )
            results |= dict(zip(rows, zip(means, windows or [NO_WINDOWS] * len(rows), strict=True), strict=True))
        return results

    def due(self, stack: Stack, interval: Callable[[Experiment], int], last: Callable[[Slot], int]) -> list[int]:
        """Slots at a multiple of their interval, at their end, or never evaluated, unless `last` was at this step."""
        return [
            m
            for m, (slot, e) in enumerate(zip(stack.slots, self.experiments(stack), strict=True))
            if not slot.idle
            and last(slot) != slot.step
            and (slot.step % interval(e) == 0 or slot.step >= e.max_iters or slot.evaluated_at < 0)
        ]

    def look_for_divergence(self, stack: Stack) -> None:
        """Waits for the device, so it is called only where results are read anyway."""
        for slot, diverged in zip(stack.slots, stack.state.diverged.tolist(), strict=True):
            slot.diverged |= diverged  # an evaluation may have set it before

    def evaluation(
        self,
        params: Tensor,
        split: str,
        context: int,
        *,
        batches: int | None = None,
        tokens: int | None = None,
        with_windows: bool = False,
    ) -> tuple[list[float], list[Windows]]:
        """Mean losses over all windows, over the first batches of them, or over a fixed subset of about so many tokens; and each
        window's own, on request and over all.

        Ranks share the windows and get the same numbers.
        """
        windows = islice(self.windows(split, context, len(params), tokens), batches)
        with memory_errors(EVALUATION_ADVICE.format(vocabulary=self.config.vocab_size)):
            sums, own_MW = evaluate(params, windows, self.config, self.machine.dtype, self.machine.ops)
        totals = torch.cat([sums, sums.new_tensor([self.stopping])])
        self.ranks.add(totals)
        *losses, targets, stopping = totals.tolist()
        if stopping:
            raise _StopRequested
        means = [loss / targets for loss in losses]
        return means, self.of_windows(own_MW, split, context) if with_windows else []

    def of_windows(self, own_MW: Tensor, split: str, context: int) -> list[Windows]:
        """Each member's windows in the order of the text, from what `evaluate` returned at each rank."""
        count, batch = (
            window_count(self.corpus, split, context),
            windows_at_once(context, len(own_MW) - 1, self.config.vocab_size),
        )
        turns = -(-count // (batch * self.ranks.count))
        own_MKB = own_MW.unflatten(1, (-1, batch))
        all_MKRB = own_MW.new_zeros(len(own_MW), turns, self.ranks.count, batch)
        all_MKRB[:, : own_MKB.shape[1], self.ranks.rank] = own_MKB
        self.ranks.add(all_MKRB)
        *sums, targets = all_MKRB.flatten(1)[:, :count].numpy()
        return [Windows.of(one, targets, context) for one in sums]

    def windows(
        self, split: str, context: int, members: int, tokens: int | None = None
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """This rank's batches of windows; none after a request to stop."""
        at_once = windows_at_once(context, members, self.config.vocab_size)
        batches = evaluation_windows(self.corpus, split, context, at_once, tokens)
        for inputs, targets in islice(batches, self.ranks.rank, None, self.ranks.count):
            if self.stop_requested():
                return
            yield torch.from_numpy(inputs).to(self.machine.device), torch.from_numpy(targets).to(self.machine.device)

    def stop_requested(self) -> bool:
        """Once true, the unfinished update or evaluation is given up, and the next exchange tells the other ranks."""
        self.stopping = self.stopping or self.stop()
        return self.stopping

    def done(self, stack: Stack) -> list[int]:
        ends = [e.max_iters for e in self.experiments(stack)]
        return [m for m, slot in enumerate(stack.slots) if not slot.idle and (slot.diverged or slot.step >= ends[m])]

    def retire(self, stack: Stack) -> Iterator[Event]:
        """One finished member leaves. A waiting experiment takes its slot; if none waits, the stack shrinks, where updates are
        replayed only once half of it is idle: a recording holds for one width, and a narrower one is hardly faster.
        """
        m = self.done(stack)[0]
        yield self.finished(stack, m)
        if stack.waiting:
            name = stack.waiting.pop(0)
            stack.put(m, name, self.first_weights(name).to(self.machine.device))
            yield Started(name, 0, -1, len(stack.slots))
            return
        stack.slots[m].idle = True
        active = [other for other, slot in enumerate(stack.slots) if not slot.idle]
        if not self.updates.replays or 2 * len(active) <= len(stack.slots):
            stack.keep(active)

    def finished(self, stack: Stack, m: int) -> Finished:
        slot, params, updates = stack.slots[m], stack.state.params[m : m + 1], int(stack.state.updates[m])
        status, reason, contexts = Status.FINISHED, None, dict[int, float]()
        tested, windows = dict[str, float](), dict[str, Windows]()
        self.elapse(stack)
        if slot.diverged:
            status, reason = Status.DIVERGED, f"the loss or its gradient was not finite after update {updates}"
            slot.step = slot.step if self.machine.precision == "fp16" else updates
        else:
            for context in contexts_within(self.config.block_size):
                if context == self.config.block_size and not math.isnan(slot.val_loss):
                    contexts[context] = slot.val_loss  # the last evaluation's
                else:
                    contexts[context], windows[name_at(context)] = self.score(params, "val", context)
            if self.corpus.test:
                tested["test_loss"], windows["test"] = self.score(params, "test", self.config.block_size)
        last, best = params.cpu().clone(), stack.best[m : m + 1].cpu().clone()
        moments = torch.stack([stack.state.exp_avg[m], stack.state.exp_avg_sq[m]]).cpu() if self.moments else None
        job = self.jobs[slot.name]
        result = Result(
            slot.name,
            job.identity,
            json.dumps(job.experiment.as_dict()),
            status,
            {**self.final_measures(stack, m), **tested},
            reason=reason,
            step=slot.step,
            skipped=slot.step - updates,
            context_losses=contexts,
        )
        return Finished(slot.name, result, last, best, moments, windows)

    def final_measures(self, stack: Stack, m: int) -> dict[str, float | None]:
        """The measures (see measures.py) of a member at its end, besides those of evaluations and its size."""
        slot = stack.slots[m]
        return {
            "updates": int(stack.state.updates[m]),
            "tokens": self.tokens_seen(slot),
            "seconds": slot.seconds,
            "best_step": slot.best_step if slot.best_step >= 0 else None,
        }

    def score(self, params: Tensor, split: str, context: int) -> tuple[float, Windows]:
        """One member's loss at a fixed context, and that of each window."""
        [loss], [windows] = self.evaluation(params, split, context, with_windows=True)
        return loss, windows

    # --- stepping

    def step(self, stack: Stack) -> Metrics:
        experiments, steps = self.experiments(stack), [slot.step for slot in stack.slots]
        metrics = self.updates.step(stack.state, experiments, steps)
        if metrics is None:
            raise _StopRequested
        for slot in stack.slots:
            slot.step += 1
        self.speed.stepped()
        return metrics

    def log_due(self, stack: Stack, metrics: Metrics) -> Iterator[Event]:
        due = self.due(stack, lambda e: e.log_interval, lambda slot: -1)
        if due:
            self.look_for_divergence(stack)
            losses, norms, rate = metrics.loss.tolist(), metrics.grad_norm.tolist(), self.speed.steps_per_second()
        for m in due:
            slot = stack.slots[m]
            e = self.jobs[slot.name].experiment
            lr = learning_rate(e, slot.step - 1)
            yield Logged(slot.name, slot.step, losses[m], lr, norms[m], rate * e.tokens_per_update)
        if self.speed.progress_due():
            left = self.seconds_left(stack)
            yield from (Progress(slot.name, slot.step, left) for slot in stack.active)

    # --- saving and timing

    def save(self, stack: Stack, path: Path) -> Iterator[Event]:
        yield from (Saving(slot.name, slot.step) for slot in stack.active)
        self.elapse(stack)
        if self.ranks.first:
            checkpoint.save(stack, path, self.identities, self.machine.as_dict())

    def elapse(self, stack: Stack) -> None:
        """Adds the time since the last call to every member: they trained side by side."""
        now = time.monotonic()
        for slot in stack.slots:
            slot.seconds += now - self.clock
        self.clock = now

    def tokens_seen(self, slot: Slot) -> int:
        return slot.step * self.jobs[slot.name].experiment.tokens_per_update

    def seconds_left(self, stack: Stack) -> float | None:
        """For the remaining steps, evaluations and final scores, at the measured speed."""
        ahead = [(self.jobs[slot.name].experiment, slot.step) for slot in stack.active]
        ahead += [(self.jobs[name].experiment, 0) for name in stack.waiting]
        updates = [max(0, e.max_iters - step) for e, step in ahead]
        evaluations = sum(-(-n // e.eval_interval) for n, (e, _) in zip(updates, ahead, strict=True))
        scores = len(ahead) * len(contexts_within(self.config.block_size)) / 2
        share = sum(updates) / len(stack.slots)
        if self.machine.device.type != "cpu":  # on a GPU a narrower stack is no faster
            share = max(share, *updates)
        return self.speed.estimate(share, (evaluations + scores) / len(stack.slots))


def _check_memory(config: GPTConfig, device: torch.device) -> None:
    """Before any of it is allocated: Linux promises memory that it does not have, and then ends processes."""
    parameters, memory = count_parameters(config).total, total_memory(device)
    if memory is not None and BYTES_PER_PARAMETER * parameters > memory:
        raise OutOfMemory(
            f"This model has {parameters:,} parameters, and to train it takes {BYTES_PER_PARAMETER * parameters / 2**30:,.1f} GiB "
            f"at least; this machine's {device.type} has {memory / 2**30:,.1f} GiB. Take a smaller n_embd, n_layer or block_size."
        )


class _Speed:
    """Seconds per step and evaluation in this session, for people. Measured when the host has caught up with the device."""

    def __init__(self) -> None:
        self.evaluation_seconds = 0.0
        self.step_seconds: float | None = None
        self.progress_at = self.since = time.monotonic()
        self.steps = 0

    def stepped(self) -> None:
        self.steps += 1

    def evaluated(self, seconds: float) -> None:
        self.evaluation_seconds = seconds
        self.since, self.steps = time.monotonic(), 0

    def steps_per_second(self) -> float:
        """Since the last call or evaluation."""
        if self.steps:
            self.step_seconds = (time.monotonic() - self.since) / self.steps
            self.since, self.steps = time.monotonic(), 0
        return 1 / self.step_seconds if self.step_seconds else 0.0

    def progress_due(self) -> bool:
        """True at most twice a second."""
        now = time.monotonic()
        if now - self.progress_at < 0.5:
            return False
        self.progress_at = now
        return True

    def estimate(self, steps: float, evaluations: float) -> float | None:
        """Seconds, or None before anything was measured."""
        each = self.step_seconds
        if each is None and self.steps >= 3:
            each = (time.monotonic() - self.since) / self.steps
        return None if each is None else steps * each + evaluations * self.evaluation_seconds


def windows_at_once(context: int, members: int, vocabulary: int) -> int:
    """Windows in one batch of an evaluation."""
    return max(1, evaluation_tokens(vocabulary) // (context * members))


def evaluation_tokens(vocabulary: int) -> int:
    """Tokens of a stack in one batch of an evaluation, as long as a window is no longer."""
    return min(EVALUATION_TOKENS, EVALUATION_LOGITS // vocabulary)


def contexts_within(block_size: int) -> list[int]:
    """The fixed context lengths at which experiments are compared: 32, 64, 128, ... up to block_size."""
    return list(takewhile(lambda context: context <= block_size, (SMALLEST_CONTEXT << i for i in count())))
