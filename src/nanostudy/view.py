"""What a person sees while a training or a study runs: live lines in a terminal or notebook, plain lines elsewhere."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Self

from rich.console import Console, Group
from rich.live import Live
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from nanostudy.data.corpus import Corpus
from nanostudy.model.gpt import GPTConfig, count_parameters
from nanostudy.notebook import Cell, in_notebook
from nanostudy.settings import Experiment, Resources
from nanostudy.study.folder import StudyFolder
from nanostudy.study.grid import Entry
from nanostudy.study.plan import Capacity
from nanostudy.study.progress import Assignment, Snapshot
from nanostudy.text import counted, duration
from nanostudy.training.events import Evaluated, Event, Finished, Logged, Started
from nanostudy.training.events import Progress as Progressed
from nanostudy.training.machine import Machine

PLAIN_INTERVAL = 30.0  # seconds between plain lines of progress
BAR = 16  # characters
WIDE = 80  # characters of a terminal in which columns keep these widths at least, so that they stand still
COLUMNS = (8, 0, 11, 15, 15)
WIDE_CELL, MOST_WORKERS = 120, 8  # characters and workers that a notebook's cell shows
SHORTEST_NAME = 12  # characters of a name that still say something


class TrainingView:
    """Call it with each event of one training."""

    def __init__(self, experiment: Experiment, corpus: Corpus, machine: Machine, folder: Path) -> None:
        self.experiment, self.corpus, self.machine, self.folder = experiment, corpus, machine, folder
        self.console = Console(highlight=False, markup=False, soft_wrap=True)
        self.cell = Cell() if in_notebook() else None
        self.progress = Progress(
            BarColumn(bar_width=14),
            MofNCompleteColumn(),
            TextColumn("{task.fields[detail]}"),
            TextColumn("{task.fields[left]}"),
            console=self.console,
            transient=True,
            disable=not self.console.is_terminal or self.cell is not None,
        )
        self.task = self.progress.add_task("training", total=experiment.max_iters, detail="", left="")
        self.announced = False

    def say(self, text: str, style: str = "") -> None:
        if self.cell:
            self.cell.say(text, style)
        else:
            self.console.print(text, style=style)

    def __enter__(self) -> Self:
        e, count = self.experiment, count_parameters(GPTConfig.of(self.experiment, self.corpus.tokenizer.vocab_size))
        say = self.say
        if self.corpus.note:
            say(f"NOTE: {self.corpus.note}", style="bold yellow")
        say(
            f"corpus   {self.corpus.name}: {len(self.corpus.train.tokens):,} training and "
            f"{len(self.corpus.val.tokens):,} validation tokens, {self.corpus.tokenizer.vocab_size} different"
        )
        say(
            f"model    {e.n_layer} layers, {e.n_head} heads, width {e.n_embd}, context {e.block_size}: {count.total:,} parameters"
        )
        ranks = f"{self.machine.ranks} ranks of " if self.machine.ranks > 1 else ""
        say(
            f"device   {self.machine.device} ({self.machine.device_name}), {self.machine.precision}, "
            f"{ranks}{counted(self.machine.threads, 'thread')}{', compiled kernels' * self.machine.compiled}"
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
        if self.cell:
            self.cell.close()

    def __call__(self, event: Event) -> None:
        say = self.say
        if isinstance(event, Started):
            self.progress.update(self.task, completed=event.step)
            if event.step:
                say(f"resumed after update {event.step:,}")
            for note in event.notes:
                say(note, style="yellow")
        elif isinstance(event, Progressed):
            left = "" if event.seconds_left is None else f"about {duration(event.seconds_left)} left"
            self.progress.update(self.task, completed=event.step, left=left)
            self.draw()
            if self.progress.disable and not self.cell and left and not self.announced:
                say(left)
                self.announced = True
        elif isinstance(event, Logged):
            detail = f"loss {event.loss:.3f}, {event.tokens_per_second:,.0f} tokens/s"
            self.progress.update(self.task, completed=event.step, detail=detail)
            self.draw()
        elif isinstance(event, Evaluated):
            say(
                f"update {event.step:>6,}   train {event.train_loss:.4f}   val {event.val_loss:.4f} nats per token   "
                f"{self.corpus.val.bits_per_character(event.val_loss):.3f} bits per character   {duration(event.seconds)}"
            )
        elif isinstance(event, Finished):
            self.progress.stop()
            if event.diverged:
                say(f"diverged: {event.diverged}", style="bold red")
            else:
                say(
                    f"trained {event.updates:,} updates in {duration(event.seconds)}; best at update {event.best_step:,}"
                )

    def draw(self) -> None:
        """The bar, in a notebook."""
        if self.cell:
            task, total = self.progress.tasks[0], self.experiment.max_iters
            told = [f"{task.completed:,.0f}/{total:,}", task.fields["detail"], task.fields["left"]]
            self.cell.progress(task.completed / max(1, total), "   ".join(text for text in told if text))


class StudyView:
    """What a person sees while a study runs: a line an experiment as it ends, and below it a line a worker and the whole."""

    def __init__(
        self,
        folder: StudyFolder,
        chosen: Sequence[Entry],
        capacity: Capacity,
        resources: Resources,
        notes: Sequence[str] = (),
    ) -> None:
        self.folder, self.chosen, self.capacity, self.resources, self.notes = folder, chosen, capacity, resources, notes
        self.iters = {entry.name: entry.experiment.max_iters for entry in folder.entries}
        self.console = Console(highlight=False, markup=False, soft_wrap=True)
        self.live = Live(console=self.console, auto_refresh=False, transient=True)
        self.cell = Cell() if in_notebook() else None
        self.plain = not self.console.is_terminal
        self.told_at = -math.inf

    def __enter__(self) -> Self:
        say, workers = self.say, self.capacity.workers
        for corpus in self.folder.texts.corpora.values():
            if corpus.note:
                say(f"NOTE: {corpus.note}", style="bold yellow")
            say(
                f"corpus   {corpus.name}: {len(corpus.train.tokens):,} training and {len(corpus.val.tokens):,} validation tokens"
            )
        say(
            f"study    {self.folder.study.name}: {counted(len(self.chosen), 'experiment')} of {len(self.folder.entries):,}"
        )
        for text in self.folder.skipped:
            say(f"         skipped as impossible: {text}", style="yellow")
        say(
            f"workers  {workers} on {self.capacity.device}, {counted(self.resources.threads or 1, 'thread')} each, "
            f"{self.capacity.precision}"
        )
        for note in self.notes:
            say(f"         {note}", style="yellow")
        say(f"folder   {self.folder.path}")
        if not self.plain and not self.cell:
            self.live.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.live.stop()
        if self.cell:
            self.cell.close()

    def say(self, text: str, style: str = "") -> None:
        if self.cell:
            self.cell.say(text, style)
        else:
            self.console.print(text, style=style)

    def show(self, snapshot: Snapshot) -> None:
        if self.cell:
            lines = _of_workers(snapshot.workers, self.iters, WIDE_CELL, MOST_WORKERS)
            self.cell.progress(snapshot.share, _overall(snapshot, len(self.chosen)), *lines)
            return
        if self.plain:
            if time.monotonic() - self.told_at > PLAIN_INTERVAL and snapshot.seconds_left is not None:
                self.told_at = time.monotonic()
                self.console.print(_overall(snapshot, len(self.chosen)))
            return
        lines = _of_workers(snapshot.workers, self.iters, self.console.width, self.console.height - 2)
        bar = ProgressBar(total=1.0, completed=snapshot.share, width=BAR)
        whole = Table.grid(padding=(0, 1))
        whole.add_row(bar, _overall(snapshot, len(self.chosen), self.console.width - BAR - 2))
        self.live.update(Group(*(Text(line, no_wrap=True) for line in lines), whole), refresh=True)


def _of_workers(workers: Mapping[int, Assignment], iters: Mapping[str, int], width: int, most: int) -> list[str]:
    """A line each, in columns, no wider than the terminal: what gives way is the name."""
    shown = sorted(workers.items())[: most if len(workers) <= most else most - 1]
    cells = [(f"worker {worker}", hand.label, *_known(hand, iters)) for worker, hand in shown]
    least = COLUMNS if width >= WIDE else [0] * len(COLUMNS)
    columns = zip(least, zip(*cells, strict=True), strict=False)  # no cells: no columns
    widths = [max(at_least, *map(len, column)) for at_least, column in columns]
    widths[1:2] = [min(widths[1], width - sum(widths) + widths[1] - 2 * len(widths))] if cells else []
    lines = []
    for worker, label, *known in cells:
        right = [text.rjust(w) for text, w in zip(known, widths[2:], strict=True)]
        lines.append(
            "  ".join([worker.ljust(widths[0]), _shortened(label, widths[1]).ljust(widths[1]), *right]).rstrip()
        )
    return [*lines, f"and {len(workers) - len(shown)} more workers"] if len(shown) < len(workers) else lines


def _known(hand: Assignment, iters: Mapping[str, int]) -> tuple[str, str, str]:
    """The member farthest behind, tokens per second, time left; what is not known is empty."""
    last = min(hand.steps, key=lambda name: hand.steps[name], default=None)
    rate, left = sum(hand.rates.values()), hand.left()
    return (
        "" if last is None else f"{hand.steps[last]:,}/{iters[last]:,}",
        f"{rate:,.0f} tokens/s" if rate else "",
        f"{duration(left)} left" if left else "",
    )


def _shortened(text: str, width: int) -> str:
    """Cut in the middle: names differ at their ends."""
    if len(text) <= width:
        return text
    end = max(0, (width - 1) // 2)
    return f"{text[: max(0, width - 1 - end)]}…{text[len(text) - end :]}"[: max(0, width)]


def _overall(snapshot: Snapshot, total: int, width: int = 10**6) -> str:
    """On one line of this width: what gives way is the name of the best."""
    counts = snapshot.counts
    done = counts.get("finished", 0) + counts.get("diverged", 0) + counts.get("failed", 0)
    texts = [f"{done}/{total} done"]
    texts += [f"{counts[status]} {status}" for status in ("running", "diverged", "failed") if counts.get(status)]
    if snapshot.seconds_left:
        texts.append(f"about {duration(snapshot.seconds_left)} left")
    if snapshot.best:
        texts.append(f"best val {snapshot.best.val_loss:.4f}")
    text = ", ".join(texts)
    name = _shortened(snapshot.best.name, width - len(text) - 1) if snapshot.best else ""
    return f"{text} {name}" if len(name) >= SHORTEST_NAME else text[: max(0, width)]
