"""What a worker is asked to do, as plain data that travels, and the one function that does it."""

from __future__ import annotations

import re
from collections.abc import Callable, Generator, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError

from nanostudy.atomic import sole_owner
from nanostudy.data.corpus import Corpus
from nanostudy.device import memory_errors
from nanostudy.errors import DamagedCheckpoint, NanostudyError, OutOfMemory
from nanostudy.model.sample import generate
from nanostudy.settings import Resources, SamplingParams
from nanostudy.training import stack as checkpoint
from nanostudy.training.events import Event
from nanostudy.training.machine import Machine, resolve
from nanostudy.training.run_folder import CHECKPOINT
from nanostudy.training.train import Job, measure, train
from nanostudy.training.weights import Weights

OPENING = "--- "  # of the line above each sample, which names its prompt


@dataclass(frozen=True)
class TrainStack:
    """Train these, `width` at a time, going on from the folder's checkpoint where there is one."""

    jobs: tuple[Job, ...]
    corpus: Corpus
    folder: Path
    width: int
    save_every: float

    @property
    def path(self) -> Path:
        return self.folder / CHECKPOINT


@dataclass(frozen=True)
class WriteSamples:
    """Let these models, all of one shape, go on from each prompt. `names` are theirs."""

    names: tuple[str, ...]
    weights: tuple[Weights, ...]
    prompts: tuple[str | None, ...]
    tokens: int


@dataclass(frozen=True)
class Measure:
    """Find out how long an update and an evaluated token of this stack take."""

    jobs: tuple[Job, ...]
    corpus: Corpus
    seconds: float


Task = TrainStack | WriteSamples | Measure


@dataclass(frozen=True)
class Prepared:
    """The machine that the task runs on. Comes first."""

    machine: Machine


@dataclass(frozen=True)
class Noted:
    """What a person should know."""

    text: str


@dataclass(frozen=True)
class Sampled:
    """One text an experiment."""

    texts: dict[str, str]


@dataclass(frozen=True)
class Measured:
    """Seconds, for all members of the stack together."""

    update: float
    evaluated_token: float


@dataclass(frozen=True)
class Done:
    """The task has come to its end, or was asked to stop."""


@dataclass(frozen=True)
class Broken:
    """The task failed."""

    # memory: too little of it. files: they cannot be read or written. died: the process ended. lost: its machine did, or
    # the way to it. error: all else
    cause: str
    reason: str
    code: int | None = None  # of a file's problem: its errno

    @property
    def problem(self) -> NanostudyError:
        error = NanostudyError(self.reason)
        error.__cause__ = None if self.code is None else OSError(self.code, self.reason)
        return error


Report = Event | Prepared | Noted | Sampled | Measured | Done | Broken


def perform(task: Task, resources: Resources, stop: Callable[[], bool]) -> Generator[Report, None, None]:
    """Does the task and tells how it goes; ends with Done or Broken. Whoever asks for the next report has the ones before
    safe (see events.Saving).
    """
    try:
        with memory_errors():
            machine = resolve(resources)
            yield Prepared(machine)
            if isinstance(task, TrainStack):
                yield from _train(task, machine, stop)
            elif isinstance(task, WriteSamples):
                texts = _samples(task, machine, stop)
                if texts is not None:
                    yield Sampled(texts)
            else:
                yield Measured(*measure(task.jobs, task.corpus, machine, task.seconds))
    except OutOfMemory as problem:
        yield Broken("memory", str(problem))
    except NanostudyError as problem:
        cause = problem.__cause__
        of_files = isinstance(cause, OSError | SafetensorError)
        yield Broken("files" if of_files else "error", str(problem), _errno(cause))
    except OSError as problem:
        yield Broken("files", str(problem), problem.errno)
    except Exception as problem:  # of a library, or a mistake of ours: the study goes on without this stack
        yield Broken("error", f"{type(problem).__name__}: {problem}")
    else:
        yield Done()
    finally:
        if torch.cuda.is_initialized():  # another process may need it
            torch.cuda.empty_cache()


def _train(task: TrainStack, machine: Machine, stop: Callable[[], bool]) -> Iterator[Report]:
    # The lock outlasts nobody: it keeps a worker whose study was killed, and that is about to notice, out of the
    # way of the one that goes on.
    with sole_owner(task.folder, patience=30.0, make=False):
        for leftover in task.folder.glob(".*.tmp"):  # of a process that was killed while it wrote
            leftover.unlink(missing_ok=True)
        arguments = (task.jobs, task.corpus, machine, task.path)
        events = train(*arguments, width=task.width, save_every=task.save_every, stop=stop)
        try:
            first = next(events)
        except DamagedCheckpoint as problem:
            yield Noted(f"{problem} It was set aside; training from the beginning.")
            checkpoint.set_aside(task.path)
            events = train(*arguments, width=task.width, save_every=task.save_every, stop=stop)
            first = next(events)
        yield first
        yield from events


def _errno(cause: BaseException | None) -> int | None:
    """Of a file's problem; the safetensors library tells it in words."""
    told = re.search(r"\(os error (\d+)\)", str(cause))
    return getattr(cause, "errno", None) or (int(told[1]) if told else None)


def _samples(task: WriteSamples, machine: Machine, stop: Callable[[], bool]) -> dict[str, str] | None:
    """None where it was asked to stop."""
    first = task.weights[0]
    params_MP = torch.cat([weights.params for weights in task.weights]).to(machine.device)
    seeds = [weights.experiment.seed for weights in task.weights]
    texts: dict[str, list[str]] = {name: [] for name in task.names}
    for prompt in task.prompts:
        ids = first.tokenizer.encode(prompt or first.tokenizer.opening)
        steps = []
        for step_MS in generate(params_MP, first.shape, ids, seeds, 1, task.tokens, SamplingParams()):
            if stop():
                return None
            steps.append(step_MS[:, 0])
        written = torch.stack(steps).T.tolist() if steps else [[] for _ in task.names]
        for name, tokens in zip(task.names, written, strict=True):
            texts[name].append(f"{OPENING}{prompt or 'no prompt'}\n{prompt or ''}{first.tokenizer.decode(tokens)}\n")
    return {name: "\n".join(pieces) for name, pieces in texts.items()}
