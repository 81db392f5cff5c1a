"""What a person sees while a training runs: a live line in a terminal or notebook, plain lines elsewhere."""

from __future__ import annotations

from pathlib import Path
from types import TracebackType
from typing import Self

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

from nanostudy.gpt.corpus import Corpus
from nanostudy.gpt.device import Machine
from nanostudy.gpt.events import Evaluated, Event, Finished, Logged, Started
from nanostudy.gpt.events import Progress as Progressed
from nanostudy.gpt.experiment import Experiment
from nanostudy.gpt.model import Shape, count_parameters
from nanostudy.insight.words import duration


class TrainingView:
    """Call it with each event of one training."""

    def __init__(self, experiment: Experiment, corpus: Corpus, machine: Machine, folder: Path) -> None:
        self.experiment, self.corpus, self.machine, self.folder = experiment, corpus, machine, folder
        self.console = Console(highlight=False, markup=False, soft_wrap=True)
        self.progress = Progress(
            BarColumn(bar_width=14),
            MofNCompleteColumn(),
            TextColumn("{task.fields[detail]}"),
            TextColumn("{task.fields[left]}"),
            console=self.console,
            transient=True,
            disable=not (self.console.is_terminal or self.console.is_jupyter),
        )
        self.task = self.progress.add_task("training", total=experiment.max_iters, detail="", left="")
        self.announced = False

    def __enter__(self) -> Self:
        e, count = self.experiment, count_parameters(Shape.of(self.experiment, self.corpus.tokenizer.vocab_size))
        say = self.console.print
        if self.corpus.note:
            say(f"NOTE: {self.corpus.note}", style="bold yellow")
        say(
            f"corpus   {self.corpus.name}: {len(self.corpus.train.tokens):,} training and "
            f"{len(self.corpus.val.tokens):,} validation tokens, {self.corpus.tokenizer.vocab_size} different"
        )
        say(
            f"model    {e.n_layer} layers, {e.n_head} heads, width {e.n_embd}, context {e.block_size}: {count.total:,} parameters"
        )
        say(
            f"device   {self.machine.device} ({self.machine.device_name}), {self.machine.precision}, {self.machine.threads} threads"
        )
        for note in self.machine.notes:
            say(f"         {note}", style="yellow")
        say(f"folder   {self.folder}")
        self.progress.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.progress.stop()

    def __call__(self, event: Event) -> None:
        say = self.console.print
        if isinstance(event, Started):
            self.progress.update(self.task, completed=event.step)
            if event.step:
                say(f"resumed after update {event.step:,}")
            for note in event.notes:
                say(note, style="yellow")
        elif isinstance(event, Progressed):
            left = "" if event.seconds_left is None else f"about {duration(event.seconds_left)} left"
            self.progress.update(self.task, completed=event.step, left=left)
            if self.progress.disable and left and not self.announced:
                say(left)
                self.announced = True
        elif isinstance(event, Logged):
            detail = f"loss {event.loss:.3f}, {event.tokens_per_second:,.0f} tokens/s"
            self.progress.update(self.task, completed=event.step, detail=detail)
        elif isinstance(event, Evaluated):
            say(
                f"update {event.step:>6,}   train {event.train_loss:.4f}   val {event.val_loss:.4f} nats a token   "
                f"{self.corpus.val.bits_per_character(event.val_loss):.3f} bits a character   {duration(event.seconds)}"
            )
        elif isinstance(event, Finished):
            self.progress.stop()
            if event.diverged:
                say(f"diverged: {event.diverged}", style="bold red")
            else:
                say(
                    f"trained {event.updates:,} updates in {duration(event.seconds)}; best at update {event.best_step:,}"
                )
