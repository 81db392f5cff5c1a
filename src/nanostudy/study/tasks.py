"""What a worker does: tasks and reports as plain data that travels, and perform(), which does a task.

PyTorch is imported when a task is performed: a worker process listens to its study before that.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Generator, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from safetensors import SafetensorError

from nanostudy.atomic import sole_owner
from nanostudy.errors import DamagedCheckpoint, NanostudyError, OutOfMemory
from nanostudy.settings import Resources, SamplingParams
from nanostudy.training.events import Event
from nanostudy.training.run_folder import CHECKPOINT
from nanostudy.training.samples import Sample

if TYPE_CHECKING:
    from nanostudy.data.corpus import Corpus
    from nanostudy.training.machine import Machine
    from nanostudy.training.train import Job
    from nanostudy.training.trial import Shape
    from nanostudy.training.weights import Weights


@dataclass(frozen=True)
class TrainStack:
    """Train these experiments, `width` at a time, from the folder's checkpoint where there is one."""

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
    """Continue each prompt with each of these models, which have one shape. `names` are the models'."""

    names: tuple[str, ...]
    weights: tuple[Weights, ...]
    prompts: tuple[str | None, ...]
    tokens: int


@dataclass(frozen=True)
class Measure:
    """Measure how long an update and an evaluated token of this stack take."""

    jobs: tuple[Job, ...]
    corpus: Corpus
    seconds: float


@dataclass(frozen=True)
class Examine:
    """Say what machine this is, and whether its kernels run at these shapes."""

    shapes: tuple[Shape, ...]


Task = TrainStack | WriteSamples | Measure | Examine


@dataclass(frozen=True)
class Prepared:
    """The machine that the task runs on. Comes first."""

    machine: Machine


@dataclass(frozen=True)
class Noted:
    """A message for a person."""

    text: str


@dataclass(frozen=True)
class Sampled:
    """Each experiment's samples, one per prompt."""

    samples: dict[str, list[Sample]]


@dataclass(frozen=True)
class Measured:
    """Seconds, for all members of the stack together."""

    update: float
    evaluated_token: float


@dataclass(frozen=True)
class Examined:
    """Free bytes, if the system reports them; why kernels do not run here, if they do not."""

    memory: int | None
    problem: str | None


@dataclass(frozen=True)
class Done:
    """The task is complete, or was stopped by request."""


@dataclass(frozen=True)
class Broken:
    """The task failed. Its cause is one of

    memory  too little of it
    files   they cannot be read or written
    died    the worker's process ended
    lost    the worker's machine is gone, or cannot be reached
    error   anything else
    """

    cause: str
    reason: str
    code: int | None = None  # the errno, where the cause is files

    @property
    def problem(self) -> NanostudyError:
        error = NanostudyError(self.reason)
        error.__cause__ = None if self.code is None else OSError(self.code, self.reason)
        return error


Report = Event | Prepared | Noted | Sampled | Measured | Examined | Done | Broken


def perform(task: Task, resources: Resources, stop: Callable[[], bool]) -> Generator[Report, None, None]:
    """Does the task and reports on it; the last report is Done or Broken.

    Asking for the next report promises that those before it are safe (see events.Saving).
    """
    import torch

    from nanostudy.device import available_memory, memory_errors
    from nanostudy.training import trial
    from nanostudy.training.machine import resolve
    from nanostudy.training.train import measure

    try:
        with memory_errors():
            machine = resolve(resources)
            if isinstance(task, TrainStack | Measure):
                machine = trial.settled(
                    resources, machine, [trial.Shape.of(j.experiment, task.corpus) for j in task.jobs]
                )
            yield Prepared(machine)
            if isinstance(task, Examine):
                yield Examined(available_memory(machine.device), trial.problem(machine, task.shapes))
            elif isinstance(task, TrainStack):
                yield from _train(task, machine, stop)
            elif isinstance(task, WriteSamples):
                samples = _samples(task, machine, stop)
                if samples is not None:
                    yield Sampled(samples)
            else:
                yield Measured(*measure(task.jobs, task.corpus, machine, task.seconds))
    except OutOfMemory as problem:
        yield Broken("memory", str(problem))
    except NanostudyError as problem:
        cause = problem.__cause__
        yield Broken("files" if isinstance(cause, OSError | SafetensorError) else "error", str(problem), _errno(cause))
    except OSError as problem:
        yield Broken("files", str(problem), problem.errno)
    except Exception as problem:  # a library's, or a mistake of ours: the study goes on without this stack
        yield Broken("error", f"{type(problem).__name__}: {problem}")
    else:
        yield Done()
    finally:
        if torch.cuda.is_initialized():  # another process may need it
            torch.cuda.empty_cache()


def _train(task: TrainStack, machine: Machine, stop: Callable[[], bool]) -> Iterator[Report]:
    from nanostudy.training import stack as checkpoint
    from nanostudy.training.train import train

    # The lock ends with its process. It keeps the next session's worker waiting while the worker of a study that was
    # killed has yet to notice.
    with sole_owner(task.folder, patience=30.0, make=False):
        for leftover in task.folder.glob(".*.tmp"):  # a process was killed while it wrote
            leftover.unlink(missing_ok=True)
        arguments = (task.jobs, task.corpus, machine, task.path)
        go_on = partial(train, *arguments, width=task.width, save_every=task.save_every, stop=stop)
        events = go_on()
        try:
            yield next(events)
        except DamagedCheckpoint as problem:
            yield Noted(f"{problem} It was set aside; training from the beginning.")
            checkpoint.set_aside(task.path)
            events = go_on()
        yield from events


def _errno(cause: BaseException | None) -> int | None:
    """The safetensors library gives it in words."""
    in_words = re.search(r"\(os error (\d+)\)", str(cause))
    return getattr(cause, "errno", None) or (int(in_words[1]) if in_words else None)


def _samples(task: WriteSamples, machine: Machine, stop: Callable[[], bool]) -> dict[str, list[Sample]] | None:
    """None where it was stopped."""
    import torch

    from nanostudy.model.sample import generate

    first = task.weights[0]
    params_MP = torch.cat([weights.params for weights in task.weights]).to(machine.device)
    seeds = [weights.experiment.seed for weights in task.weights]
    sampling = SamplingParams()
    samples: dict[str, list[Sample]] = {name: [] for name in task.names}
    for prompt in task.prompts:
        ids = first.tokenizer.encode(prompt or first.tokenizer.opening)
        steps = []
        for step_MS, _ in generate(params_MP, first.config, ids, seeds, 1, task.tokens, sampling):
            if stop():
                return None
            steps.append(step_MS[:, 0])
        written = torch.stack(steps).T.tolist() if steps else [[] for _ in task.names]
        for name, seed, tokens in zip(task.names, seeds, written, strict=True):
            text = (prompt or "") + first.tokenizer.decode(tokens)
            how = (task.tokens, seed, sampling.temperature, sampling.top_k, sampling.top_p)
            samples[name].append(Sample(prompt, text, *how))
    return samples
