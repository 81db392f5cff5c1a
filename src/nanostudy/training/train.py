"""The training loop of a stack: resume, evaluate, retire, step, log, save. It yields events."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from nanostudy.data.corpus import Corpus
from nanostudy.device import total_memory
from nanostudy.errors import OutOfMemory, RankLost
from nanostudy.model.config import GPTConfig, count_parameters
from nanostudy.model.engine import Metrics, State
from nanostudy.model.gpt import initial_parameters
from nanostudy.model.optim import learning_rate
from nanostudy.model.ranks import ALONE, Ranks
from nanostudy.result import Result, Status
from nanostudy.settings import Experiment
from nanostudy.training import stack as checkpoint
from nanostudy.training.evaluation import Evaluations, contexts_within
from nanostudy.training.events import Evaluated, Event, Finished, Logged, Progress, Saving, Started, Stopped
from nanostudy.training.machine import Machine
from nanostudy.training.stack import Slot, Stack
from nanostudy.training.updates import Updates
from nanostudy.training.window_losses import Windows, name_at

BYTES_PER_PARAMETER = 16  # weight, gradient and two moments, in fp32
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
    members = range(len(jobs))
    run.evaluated(stack, members, "val", batches=1)
    tokens, start = 0, time.perf_counter()
    while time.perf_counter() - start < seconds or not tokens:
        [one, *_] = run.evaluated(stack, members, "val", batches=1)
        tokens += int(one.targets.sum())
    return update, (time.perf_counter() - start) / tokens


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
        self.evaluations = Evaluations(corpus, self.config, machine, ranks, self.stop_requested)
        self.updates = Updates(self.evaluations.texts["train"], self.config, machine, ranks, self.stop_requested)
        self.speed = _Speed()
        self.seen: dict[str, tuple[float, float]] = {}  # loss and learning rate of the last update that was looked at
        self.clock = time.monotonic()

    # --- starting

    def begin(self, path: Path, width: int) -> tuple[Stack, tuple[str, ...]]:
        """From rank 0's checkpoint if it exists, else from the start."""
        stack, notes = self.ranks.of_first(
            lambda: self.resume(path) if checkpoint.exists(path) else (self.fresh(width), ())
        )
        return stack.to(self.machine.device), notes

    def fresh(self, width: int) -> Stack:
        """Members with as many heads lie side by side: attention computes them at once."""
        names = list(self.jobs)
        names[:width] = sorted(names[:width], key=self.heads)
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

    def heads(self, name: str) -> int:
        return self.jobs[name].experiment.n_head

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
        yield from self.progress(stack, evaluating=True)
        start = time.monotonic()
        self.elapse(stack)
        losses = self.losses(stack, due)
        self.elapse(stack)
        self.speed.evaluated(time.monotonic() - start)
        for m, (train_loss, val_loss, compared, windows) in losses.items():
            slot = stack.slots[m]
            slot.evaluated_at, slot.val_loss = slot.step, val_loss
            slot.diverged = not math.isfinite(train_loss + val_loss)
            if compared < slot.best_val_loss:
                slot.best_step, slot.best_val_loss = slot.step, compared
                stack.best[m] = stack.state.params[m]
            tokens, seconds = self.tokens_seen(slot), slot.seconds
            yield Evaluated(slot.name, slot.step, tokens, seconds, train_loss, val_loss, windows)

    def losses(self, stack: Stack, due: Sequence[int]) -> dict[int, tuple[float, float, float, dict[str, Windows]]]:
        """By slot: training loss, validation loss, the validation loss to compare with those before, on the same windows; and of
        the last evaluation each window's loss.

        Exact at the end, or where eval_tokens is unset; else on the subset. Slots that read as much are evaluated together.
        """
        subset = {m: self.jobs[stack.slots[m].name].experiment.eval_tokens for m in due}
        last = {m for m in self.done(stack) if m in subset}

        def split(name: str, tokens: Mapping[int, int | None]) -> dict[int, Windows]:
            results: dict[int, Windows] = {}
            for amount in dict.fromkeys(tokens.values()):
                rows = [m for m in tokens if tokens[m] == amount]
                results |= zip(rows, self.evaluated(stack, rows, name, tokens=amount), strict=True)
            return results

        read = {m: None if m in last else subset[m] for m in due}
        train, val = split("train", read), split("val", read)
        compared = {**val, **split("val", {m: subset[m] for m in last if subset[m]})}
        windows = {m: {"train": train[m], "val": val[m]} if m in last else {} for m in due}
        return {m: (train[m].mean, val[m].mean, compared[m].mean, windows[m]) for m in due}

    def evaluated(
        self,
        stack: Stack,
        rows: Sequence[int],
        split: str,
        context: int | None = None,
        *,
        tokens: int | None = None,
        batches: int | None = None,
    ) -> list[Windows]:
        """As Evaluations.windows, of these slots."""
        params_MP = stack.state.params if len(rows) == len(stack.slots) else stack.state.params[list(rows)]
        heads = [self.heads(stack.slots[m].name) for m in rows]
        context = context or self.config.block_size
        windows = self.evaluations.windows(params_MP, heads, split, context, tokens=tokens, batches=batches)
        if windows is None:
            raise _StopRequested
        return windows

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

    def stop_requested(self) -> bool:
        """Once true, the unfinished update or evaluation is given up, and the next exchange tells the other ranks."""
        self.stopping = self.stopping or self.stop()
        return self.stopping

    def done(self, stack: Stack) -> list[int]:
        ends = [e.max_iters for e in self.experiments(stack)]
        return [m for m, slot in enumerate(stack.slots) if not slot.idle and (slot.diverged or slot.step >= ends[m])]

    def retire(self, stack: Stack) -> Iterator[Event]:
        """One finished member leaves. A waiting experiment, with as many heads if there is one, takes its slot; if none waits, the
        stack shrinks: where updates are replayed only once half of it is idle, as a recording holds for one width, and a narrower
        stack is hardly faster.
        """
        m = self.done(stack)[0]
        yield self.finished(stack, m)
        if stack.waiting:
            like = self.heads(stack.slots[m].name)
            name = next((name for name in stack.waiting if self.heads(name) == like), stack.waiting[0])
            stack.waiting.remove(name)
            stack.put(m, name, self.first_weights(name).to(self.machine.device))
            yield Started(name, 0, -1, len(stack.slots))
            return
        stack.slots[m].idle = True
        active = [other for other, slot in enumerate(stack.slots) if not slot.idle]
        if not self.updates.replays or 2 * len(active) <= len(stack.slots):
            stack.keep(active)

    def finished(self, stack: Stack, m: int) -> Finished:
        slot, updates = stack.slots[m], int(stack.state.updates[m])
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
                    [windows[name_at(context)]] = self.evaluated(stack, [m], "val", context)
                    contexts[context] = windows[name_at(context)].mean
            if self.corpus.test:
                [windows["test"]] = self.evaluated(stack, [m], "test")
                tested["test_loss"] = windows["test"].mean
        last, best = (rows[m : m + 1].cpu().clone() for rows in (stack.state.params, stack.best))
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
        progress = self.speed.progress_due()
        if due or progress:
            losses = metrics.loss.tolist()
            rates = [learning_rate(e, s.step - 1) for e, s in zip(self.experiments(stack), stack.slots, strict=True)]
            self.seen = dict(zip((s.name for s in stack.slots), zip(losses, rates, strict=True), strict=True))
        if due:
            self.look_for_divergence(stack)
            norms, steps_per_second = metrics.grad_norm.tolist(), self.speed.steps_per_second()
        for m in due:
            slot = stack.slots[m]
            tokens_per_second = steps_per_second * self.jobs[slot.name].experiment.tokens_per_update
            yield Logged(slot.name, slot.step, *self.seen[slot.name], norms[m], tokens_per_second)
        if progress:
            yield from self.progress(stack)

    def progress(self, stack: Stack, evaluating: bool = False) -> Iterator[Event]:
        left = self.seconds_left(stack)
        for slot in stack.active:
            loss, rate = self.seen.get(slot.name, (None, None))
            yield Progress(slot.name, slot.step, left, loss, rate, evaluating)

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
