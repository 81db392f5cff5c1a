"""Workloads of a user's, ours beside nanoGPT's: each is a function that returns rows of one table."""

from __future__ import annotations

import itertools
import statistics
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import NamedTuple

from command import LONGEST, Budget, Failed
from ours import Ours
from rival import Cost, Rival

CELL = {"n_layer": 4, "n_head": 4, "n_embd": 128, "batch_size": 8, "block_size": 64, "dropout": 0.1}
PUBLISHED = {"n_layer": 4, "n_head": 4, "n_embd": 256, "batch_size": 64, "block_size": 256, "dropout": 0.2}
LARGE = {"n_layer": 6, "n_head": 6, "n_embd": 384, "batch_size": 64, "block_size": 256, "dropout": 0.2}
CORNER = {"n_layer": [4, 6], "n_embd": [128, 256], "dropout": [0.1, 0.2]}
SEEDS = range(1, 9)
UPDATES, EVALUATIONS = 1500, 8.5  # the grid's means: half of it makes 1,000 updates, half 2,000, evaluated every 200


@dataclass
class Row:
    """Seconds per unit of work, ours and theirs in each turn; theirs may be missing."""

    workload: str
    unit: str
    aim: str
    ours: list[float] = field(default_factory=list)
    theirs: list[float] = field(default_factory=list)
    note: str = ""

    @property
    def ratios(self) -> list[float]:
        return [b / a for a, b in zip(self.ours, self.theirs, strict=False)]


@dataclass(frozen=True)
class Bench:
    ours: Ours
    rival: Rival
    turns: int

    def turn(self, row: Row, ours: Callable[[], float], theirs: Callable[[], float], turns: int | None = None) -> Row:
        """What fails ends the row with a note; the turns before it count."""
        try:
            for _ in range(turns or self.turns):
                theirs_took, ours_took = theirs(), ours()
                row.theirs.append(theirs_took)
                row.ours.append(ours_took)
                print(f"    {row.workload}: ours {ours_took:.3f} s, nanoGPT {theirs_took:.3f} s", flush=True)
        except Failed as problem:
            row.note = "; ".join(filter(None, [row.note, f"ended early ({problem})"]))
        return row

    def faster_way(self, cell: dict[str, object], iterations: int) -> tuple[bool, str]:
        """Whether nanoGPT is faster compiled here, and the two figures."""
        eager, compiled = (self.rival.iteration(cell, iterations, compile=compile) for compile in (False, True))
        return compiled < eager, f"nanoGPT eager {eager * 1e3:.1f} ms, compiled {compiled * 1e3:.1f} ms per update"


class Step(NamedTuple):
    measure: Callable[[Bench], Row | Iterator[Row | str]]
    limit: float = LONGEST  # seconds

    @property
    def name(self) -> str:
        return self.measure.__name__


def measured(step: Step, bench: Bench, budget: Budget) -> Iterator[Row | str]:
    """Its rows and lines as they come; a row that says why, where it ended early."""
    budget.begin(step.limit)
    title = step.name.replace("_", " ")
    if budget.left() <= 0:
        yield Row(title, "step", "", note="not measured (no time was left)")
        return
    try:
        made = step.measure(bench)
        yield from [made] if isinstance(made, Row) else made
    except Failed as problem:
        yield Row(title, "step", "", note=f"not measured ({problem})")


# --- workloads


def published_training(b: Bench) -> Row:
    compiled, figures = b.faster_way(PUBLISHED, 8)
    row = Row("published CPU run, 4/4/256, batch 64, block 256, dropout 0.2", "update", "6x", note=figures)
    return b.turn(
        row,
        lambda: b.ours.iteration(PUBLISHED, 12, "published"),
        lambda: b.rival.iteration(PUBLISHED, 8, compile=compiled),
    )


def cell(b: Bench, precision: str = "auto", aim: str = "5.5x") -> Row:
    compiled, figures = b.faster_way(CELL, 120)
    note = f"{figures}; ours: a study of {len(SEEDS)} seeds, cold start to end, divided by {len(SEEDS)}"
    name = f"grid cell 4/4/128, batch 8, block 64, dropout 0.1, 1,000 updates, 6 evaluations{', fp32' * (precision == 'fp32')}"
    fixed = {**CELL, "max_iters": 1000}
    return b.turn(
        Row(name, "experiment", aim, note=note),
        lambda: b.ours.study(fixed, {}, SEEDS, f"cell-{precision}", "--precision", precision) / len(SEEDS),
        lambda: b.rival.train(CELL, max_iters=1000, compile=compiled)[0],
    )


def cell_fp32(b: Bench) -> Row:
    return cell(b, "fp32", "2x")


def corner(b: Bench) -> Row:
    """Both widths and depths, with both rates of dropout: 8 experiments, cut to 400 updates and 3 evaluations."""
    fixed = {k: v for k, v in CELL.items() if k not in CORNER} | {"max_iters": 400}
    note = "8 experiments one after another; 400 updates each, so that the cold start weighs more than in the grid"
    cells = [{**CELL, **dict(zip(CORNER, values, strict=True))} for values in itertools.product(*CORNER.values())]
    return b.turn(
        Row("a corner of the grid: 8 experiments, cold start, evaluations included", "corner", "5x", note=note),
        lambda: b.ours.study(fixed, CORNER, [1], "corner"),
        lambda: sum(b.rival.train(each, max_iters=400)[0] for each in cells),
        turns=1,
    )


def sampling(b: Bench) -> Iterator[Row]:
    once = {**LARGE, "batch_size": 1}
    b.rival.train(once, max_iters=1, eval_interval=1, eval_iters=1)
    b.ours.train("nanogpt-cpu", {**once, "max_iters": 1, "sample_tokens": 1, "corpus": "shakespeare"}, "large")
    words = ("sample", str(b.ours.folder / "large"), "-n", "10", "--tokens", "500", "--device", b.ours.device)
    for exact in ((), ("--exact",)):
        name = f"sampling 10 x 500 characters, 10.8M parameters{', --exact' * bool(exact)}"
        yield b.turn(
            Row(name, "command", "" if exact else "20x"),
            lambda exact=exact: b.ours.command(*words, *exact),
            lambda: b.rival.run("sample.py", num_samples=10, max_new_tokens=500, out_dir="out")[0],
            turns=1,
        )


def starting(b: Bench) -> Iterator[Row]:
    b.ours.study({**CELL, "max_iters": 2}, {}, [1, 2], "small")
    for words in (("--help",), ("study", "status", str(b.ours.folder / "small"))):
        row = Row(f"nanostudy {' '.join(words[:2])}", "command", "0.3 s")
        row.ours = [b.ours.command(*words) for _ in range(5)]
        yield row


def gpu_training(b: Bench) -> Row:
    """The published GPU run. nanoGPT's start, update and evaluation are measured once each, and added up to 6,000 updates."""
    ways = {way: b.rival.cost(LARGE, 120, compile=way == "compiled") for way in ("eager", "compiled")}
    row = Row("published GPU run, 6/6/384, 6,000 updates, start to finish", "run", "25x", note=_parts(ways))
    theirs = min(cost.of(6000, 13) for cost in ways.values())
    return b.turn(
        row, lambda: b.ours.train("shakespeare-gpu", {"corpus": "shakespeare"}, "gpu"), lambda: theirs, turns=1
    )


def _parts(ways: dict[str, Cost]) -> str:
    return "nanoGPT's start, update and evaluation: " + "; ".join(
        f"{way} {c.start:.1f} s, {c.update * 1e3:.1f} ms, {c.evaluation:.1f} s" for way, c in ways.items()
    )


def _grid_of_rival(b: Bench, steps: int) -> tuple[float, str]:
    """Seconds of nanoGPT's 128 experiments one by one, from updates at the eight sizes of model, start and evaluation at two."""
    sizes = itertools.product((4, 6), (128, 256), (64, 128))
    cells = [{**CELL, "n_layer": L, "n_embd": E, "block_size": T} for L, E, T in sizes]
    cells = [{**each, "gradient_accumulation_steps": steps} for each in cells]
    extremes, updates = (cells[0], cells[-1]), 20 if steps > 1 else 60
    totals, notes = [], []
    for way in ("eager", "compiled"):
        costs = [b.rival.cost(each, updates, compile=way == "compiled") for each in extremes]
        others = [] if way == "compiled" else [b.rival.iteration(each, updates) for each in cells[1:-1]]
        parts = (statistics.mean(values) for values in zip(*((c.start, c.evaluation) for c in costs), strict=True))
        start, evaluation = parts
        update = statistics.mean([*(cost.update for cost in costs), *others])
        totals.append(128 * Cost(start, update, evaluation).of(UPDATES, EVALUATIONS))
        notes.append(
            _parts({way: Cost(start, update, evaluation)}).removeprefix("nanoGPT's start, update and evaluation: ")
        )
    return min(totals), f"nanoGPT's start, update and evaluation in the mean of its sizes: {'; '.join(notes)}"


def gpu_grid(b: Bench) -> Row:
    theirs, note = _grid_of_rival(b, 1)
    row = Row("shakespeare-grid, 128 experiments", "study", "25x, under 75 s", note=note)
    return b.turn(row, lambda: b.ours.run_study("shakespeare-grid", "grid"), lambda: theirs, turns=1)


def gpu_grid_as_published(b: Bench) -> Row:
    """40 micro-batches per update: both sides are measured over a few updates of each size, in whole stacks, and carried on."""
    theirs, note = _grid_of_rival(b, 40)

    def mine() -> float:
        def took(updates: int, eval_interval: int) -> float:
            # two lengths stand for the grid's two, so that the stacks are those of the whole study
            words = (f"max_iters={updates},{updates + 1}", f"eval_interval={eval_interval}")
            return b.ours.run_study("shakespeare-grid-as-published", "as-published", *words)

        short, long, often = took(20, 10**9), took(40, 10**9), took(20, 10)
        return short + (long - short) / 20 * (UPDATES - 20.5) + (often - short) * (EVALUATIONS - 2)

    row = Row("shakespeare-grid-as-published, 128 experiments", "study", "under 12 min", note=note)
    return b.turn(row, mine, lambda: theirs, turns=1)
