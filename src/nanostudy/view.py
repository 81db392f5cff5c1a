"""What a person sees while a training or a study runs: live lines in a terminal or a notebook's cell, plain lines elsewhere."""

from __future__ import annotations

import contextlib
import html
import itertools
import math
import sys
import textwrap
import time
from collections.abc import Mapping, Sequence
from types import TracebackType
from typing import Any, Self

from rich.console import Console, Group
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from nanostudy.data.corpus import LABELS, Corpus
from nanostudy.model.config import count_parameters
from nanostudy.result import Status
from nanostudy.study.folder import StudyFolder
from nanostudy.study.grid import Entry
from nanostudy.study.listing import SHORTEST_NAME, shortened
from nanostudy.study.names import label, varying
from nanostudy.study.plan import evaluation_note
from nanostudy.study.pool import Pool
from nanostudy.study.progress import Assignment, Snapshot
from nanostudy.text import counted, duration, listed
from nanostudy.training.events import Evaluated, Event, Finished, Logged, Progress, Started
from nanostudy.training.recorder import Recorder

PRINTING = contextlib.suppress(OSError)  # a full disk, a closed pipe or a closed terminal ends no training
PLAIN_INTERVAL = 30.0  # seconds between plain lines of a study's progress
BAR = 16  # characters
NARROW, COLUMNS = 80, (8, 0, 10, 19, 10, 15)  # from so many characters on, columns have these least widths
WIDE = 100  # characters of a terminal that has room for speeds
BARS, SPARKS, MOST_POINTS = "▁▂▃▄▅▆▇█", 8, 128  # of a sparkline: heights, bars, losses that are kept
MOST_ODD = 3  # notes on a study's unusual settings

# a notebook's cell
WIDE_CELL, MOST_WORKERS = 120, 8  # characters and workers
MOST_LINES, FIRST_LINES = 24, 8  # all lines, and how many of them are the first ones
REFRESH = 0.5  # seconds between two pictures
CELL_BAR = "width:24em;vertical-align:middle"
COLOURS = {"yellow": "#b26a00", "red": "#c62828"}


class View:
    """Lines that stay, and below them a bar and lines that are rewritten; where none can be, a plain line now and then."""

    def __init__(self, plain_interval: float) -> None:
        self.console = Console(highlight=False, markup=False, soft_wrap=True)
        self.cell = Cell() if in_notebook() else None
        self.live = Live(console=self.console, auto_refresh=False, transient=True)
        self.plain_interval, self.printed_at = plain_interval, -math.inf

    def __enter__(self) -> Self:
        self.introduce()
        if self.console.is_terminal and not self.cell:
            with PRINTING:
                self.live.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        with PRINTING:
            self.live.stop()
            if self.cell:
                self.cell.close()

    def introduce(self) -> None:
        """The lines that come first."""

    def say(self, text: str, style: str = "") -> None:
        if self.console.is_terminal and not self.cell and len(text) > self.console.width:
            wrap = textwrap.TextWrapper(self.console.width, "", " " * 9, break_long_words=False, break_on_hyphens=False)
            text = wrap.fill(text)
        with PRINTING:
            (self.cell.say if self.cell else self.console.print)(text, style=style)

    def say_corpus(self, corpus: Corpus, more: str = "") -> None:
        if corpus.note:
            self.say(f"NOTE: {corpus.note}", "bold yellow")
        sizes = listed([f"{len(split.tokens):,} {LABELS[name]}" for name, split in corpus.splits.items()])
        self.say(f"corpus   {corpus.name}: {sizes} tokens{more}")

    def say_notes(self, notes: Sequence[str]) -> None:
        for note in notes:
            self.say(f"         {note}", "yellow")

    @property
    def room(self) -> tuple[int, int]:
        """Characters of a line, and lines that can be rewritten; none where there is no terminal."""
        if self.cell:
            return WIDE_CELL, MOST_WORKERS
        return self.console.width, self.console.height - 2 if self.live.is_started else 0

    def draw(self, share: float, summary: str, lines: Sequence[str] = (), plain: str = "") -> None:
        """Rewrites the lines, and below them the bar with its summary."""
        if self.cell:
            self.cell.progress(share, summary, *lines)
        elif self.live.is_started:
            bar = Table.grid(padding=(0, 1))
            bar.add_row(ProgressBar(total=1.0, completed=share, width=BAR), Text(summary, no_wrap=True))
            with PRINTING:
                self.live.update(Group(*(Text(line, no_wrap=True) for line in lines), bar), refresh=True)
        elif plain and not self.console.is_terminal and time.monotonic() - self.printed_at > self.plain_interval:
            self.printed_at = time.monotonic()
            self.say(plain)


class TrainingView(View):
    """Call it with each event of one training. tick() between events keeps the time left true."""

    def __init__(self, recorder: Recorder) -> None:
        super().__init__(math.inf)
        self.recorder, self.speed = recorder, ""
        self.trail, self.step, self.phase = Trail(), 0, ""
        self.ends_at, self.drawn_at = math.inf, 0.0

    def introduce(self) -> None:
        r, e, machine = self.recorder, self.recorder.experiment, self.recorder.machine
        self.say_corpus(r.corpus, f", {r.corpus.tokenizer.vocab_size} different")
        total = count_parameters(r.config).total
        self.say(
            f"model    {e.n_layer} layers, {e.n_head} heads, width {e.n_embd}, context {e.block_size}: {total:,} parameters"
        )
        ranks = f"{machine.ranks} ranks of " if machine.ranks > 1 else ""
        self.say(
            f"device   {machine.device} ({machine.device_name}), {machine.precision}, "
            f"{ranks}{counted(machine.threads, 'thread')}{', compiled kernels' * machine.compiled}"
        )
        self.say_notes([*machine.notes, *e.oddities, *filter(None, [evaluation_note([(e, r.corpus)])])])
        self.say(f"folder   {r.folder}")

    def __call__(self, event: Event) -> None:
        if isinstance(event, Started):
            if event.step:
                self.say(f"resumed after update {event.step:,}")
            for note in event.notes:
                self.say(note, "yellow")
        elif isinstance(event, Progress):
            self.step, self.phase = event.step, "evaluating" if event.evaluating else ""
            self.ends_at = math.inf if event.seconds_left is None else time.monotonic() + event.seconds_left
            if not event.evaluating:
                self.trail.add(event.loss)
            self.redraw()
        elif isinstance(event, Logged):
            self.speed = f"{event.tokens_per_second:,.0f} tokens/s"
        elif isinstance(event, Evaluated):
            bits = self.recorder.corpus.val.bits_per_character(event.val_loss)
            self.say(
                f"update {event.step:>6,}   train {event.train_loss:.4f}   val {event.val_loss:.4f}   "
                f"{bits:.3f} bits/character   {duration(event.seconds)}"
            )
        elif isinstance(event, Finished):
            result = event.result
            if result.reason:
                self.say(f"diverged: {result.reason}", "bold red")
            else:
                self.say(
                    f"trained {result.updates:,} updates in {duration(result.seconds)}; best at update {result.best_step:,}"
                )

    def doing(self, phase: str) -> None:
        """What follows the training: "sampling", ..."""
        self.phase, self.ends_at = phase, math.inf
        self.redraw()

    def tick(self) -> None:
        if time.monotonic() - self.drawn_at >= REFRESH:
            self.redraw()

    def redraw(self) -> None:
        self.drawn_at = time.monotonic()
        total, left = self.recorder.experiment.max_iters, self.ends_at - self.drawn_at
        time_left = f"about {duration(left)} left" if 0 < left < math.inf else ""
        texts = [f"{self.step:,}/{total:,}", self.phase or str(self.trail), time_left, "" if self.phase else self.speed]
        texts = texts if self.room[0] >= WIDE else texts[:-1]
        self.draw(self.step / max(1, total), "   ".join(filter(None, texts)), plain=time_left)


class Trail:
    """Losses so far, evenly spaced and at most MOST_POINTS of them, and a picture of their course."""

    def __init__(self) -> None:
        self.losses: list[float] = []
        self.last, self.count, self.every = math.nan, 0, 1

    def add(self, loss: float | None) -> None:
        if loss is None or loss == self.last or not math.isfinite(loss):
            return
        if self.count % self.every == 0:
            self.losses.append(loss)
        self.last, self.count = loss, self.count + 1
        if len(self.losses) > MOST_POINTS:
            self.losses, self.every = self.losses[::2], 2 * self.every

    def __str__(self) -> str:
        return f"loss {self.last:.3f} {sparkline(self.losses)}" if self.losses else ""


def sparkline(values: Sequence[float]) -> str:
    """At most SPARKS bars, each of the mean of consecutive values."""
    bars = min(SPARKS, len(values))
    edges = [round(i * len(values) / bars) for i in range(bars + 1)]
    means = [sum(values[a:b]) / (b - a) for a, b in itertools.pairwise(edges)]
    low, height = min(means), (max(means) - min(means)) or 1.0
    return "".join(BARS[round((mean - low) / height * (len(BARS) - 1))] for mean in means)


class StudyView(View):
    """A line for each experiment as it ends, and below them a line for each worker and one for the whole."""

    def __init__(self, folder: StudyFolder, chosen: Sequence[Entry], pool: Pool) -> None:
        super().__init__(PLAIN_INTERVAL)
        self.folder, self.chosen, self.pool = folder, chosen, pool
        self.iters = {entry.name: entry.experiment.max_iters for entry in folder.design.entries}
        self.varying = varying(folder.design.studies)
        self.trails: dict[tuple[str, ...], Trail] = {}  # of what trains beside each other, at each moment

    def introduce(self) -> None:
        design, capacity = self.folder.design, self.pool.capacity
        for corpus in design.inputs.corpora.values():
            self.say_corpus(corpus)
        self.say(f"study    {design.study.name}: {counted(len(self.chosen), 'experiment')} of {len(design.entries):,}")
        self.say_notes([f"skipped as impossible: {text}" for text in design.skipped])
        threads = counted(self.pool.each.threads or 1, "thread")
        self.say(f"workers  {capacity.workers} on {capacity.device}, {threads} each, {capacity.precision}")
        experiments = [entry.experiment for entry in self.chosen]
        odd = list(dict.fromkeys(note for e in experiments for note in e.oddities))
        odd[MOST_ODD:] = [f"and {len(odd) - MOST_ODD} more like these"] if len(odd) > MOST_ODD else []
        much = evaluation_note((e, design.inputs.corpus(e)) for e in experiments)
        self.say_notes([*self.pool.notes, *odd, *filter(None, [much])])
        self.say(f"folder   {design.path}")

    def show(self, snapshot: Snapshot) -> None:
        width, most = self.room
        self.follow(snapshot.workers)
        best = label(snapshot.best.experiment.as_dict(), self.varying) if snapshot.best else ""
        summary = _overall(snapshot, len(self.chosen), best, 10**6 if self.cell else width - BAR - 2)
        plain = "" if snapshot.seconds_left is None else _overall(snapshot, len(self.chosen), best)
        self.draw(snapshot.share, summary, self.lines(snapshot.workers, width, most) if most else (), plain)

    def follow(self, workers: Mapping[int, Assignment]) -> None:
        """Adds the mean loss of what trains beside each other to its trail."""
        trails: dict[tuple[str, ...], Trail] = {}
        for assignment in workers.values():
            losses = [last.loss for last in assignment.progress.values() if last.loss is not None]
            if assignment.phase == "training" and losses:
                members = tuple(assignment.progress)
                trails[members] = self.trails.get(members) or Trail()
                trails[members].add(sum(losses) / len(losses))
        self.trails = trails

    def lines(self, workers: Mapping[int, Assignment], width: int, most: int) -> list[str]:
        """One line per worker, in columns, no wider than the terminal: names are cut."""
        shown = sorted(workers.items())[: most if len(workers) <= most else most - 1]
        rows = [(f"worker {worker}", each.label, *self.figures(each, width >= WIDE)) for worker, each in shown]
        columns = zip(COLUMNS if width >= NARROW else [0] * len(COLUMNS), zip(*rows, strict=True), strict=False)
        widths = [max(at_least, *map(len, column)) for at_least, column in columns]  # no rows: no columns
        if rows:
            widths[1] = min(widths[1], width - sum(widths) + widths[1] - 2 * len(widths))
        cut = [[shortened(cell, w).ljust(w) for cell, w in zip(row, widths, strict=True)] for row in rows]
        lines = ["  ".join(cells).rstrip() for cells in cut]
        return [*lines, f"and {len(workers) - len(shown)} more workers"] if len(shown) < len(workers) else lines

    def figures(self, assignment: Assignment, with_speed: bool) -> tuple[str, ...]:
        """How far the member is that is farthest behind, or another phase; loss; time left; tokens per second."""
        last = min(assignment.progress.values(), key=lambda last: last.step, default=None)
        left, trail = assignment.left(), self.trails.get(tuple(assignment.progress))
        steps = "" if last is None else f"{last.step:,}/{self.iters[last.name]:,}"
        speed = f"{sum(assignment.rates.values()):,.0f} tokens/s" if assignment.rates else ""
        return (
            steps if assignment.phase == "training" else assignment.phase,
            str(trail or ""),
            duration(left) if left else "",
            *([speed] if with_speed else []),
        )


def _overall(snapshot: Snapshot, total: int, best: str, width: int = 10**6) -> str:
    """On one line of this width; the name of the best is cut, or left out."""
    counts = snapshot.counts
    done = sum(count for status, count in counts.items() if not status.is_undone)
    noted = (Status.RUNNING, Status.DIVERGED, Status.FAILED)
    texts = [f"{done}/{total} done", *(f"{counts[status]} {status}" for status in noted if counts.get(status))]
    if snapshot.seconds_left:
        texts.append(f"about {duration(snapshot.seconds_left)} left")
    if snapshot.best:
        texts.append(f"best val {snapshot.best.val_loss:.4f}")
    text = ", ".join(texts)
    name = shortened(best, width - len(text) - 1)
    return f"{text} {name}" if name and len(name) >= min(SHORTEST_NAME, len(best)) else text[: max(0, width)]


# --- notebooks


def in_notebook() -> bool:
    """Whether what this process shows goes to a notebook's cell."""
    shell = sys.modules.get("IPython")
    return shell is not None and getattr(shell.get_ipython(), "kernel", None) is not None


class Cell:
    """One output of a notebook's cell: lines, a bar, and lines on what runs. It is rewritten, so that a notebook stays small."""

    def __init__(self) -> None:
        self.lines: list[tuple[str, str]] = []
        self.status: Sequence[str] = ()
        self.share: float | None = None
        self.shown_at = 0.0
        self.handle: Any = None

    def say(self, text: str, style: str = "") -> None:
        self.lines.append((text, style))
        self.draw()

    def progress(self, share: float, *status: str) -> None:
        """`status`: the text beside the bar, then the lines below it."""
        self.share, self.status = share, status
        if time.monotonic() - self.shown_at >= REFRESH:
            self.draw()

    def close(self) -> None:
        """Takes the bar away; the lines stay."""
        self.share, self.status = None, ()
        self.draw()

    def draw(self) -> None:
        from IPython.display import display

        self.shown_at = time.monotonic()
        content = {"text/html": self.as_html(), "text/plain": "\n".join(text for text, _ in self.kept())}
        if self.handle is None:
            self.handle = display(content, raw=True, display_id=True)
        else:
            self.handle.update(content, raw=True)

    def kept(self) -> list[tuple[str, str]]:
        left_out = len(self.lines) - MOST_LINES
        if left_out <= 0:
            return self.lines
        gap = (f"... {left_out:,} lines ...", "")
        return [*self.lines[:FIRST_LINES], gap, *self.lines[FIRST_LINES + left_out :]]

    def as_html(self) -> str:
        lines = [_line(text, style) for text, style in self.kept()]
        if self.share is not None:
            bar = f'<progress max="1" value="{self.share:.4f}" style="{CELL_BAR}"></progress>'
            summary, *below = map(html.escape, self.status)
            lines += [f"{bar} {summary}", *below]
        return f'<pre style="line-height:1.35;margin:0">{chr(10).join(lines)}</pre>'


def _line(text: str, style: str) -> str:
    colour = next((value for name, value in COLOURS.items() if name in style), None)
    return f'<span style="color:{colour}">{html.escape(text)}</span>' if colour else html.escape(text)
