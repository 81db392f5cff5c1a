"""Measures nanostudy beside nanoGPT, workload by workload, and prints one table. `python benchmarks/run.py --help`.

Ours and theirs take turns, so that both meet the same machine; a ratio is of a turn, and the table has the median turn with
the lowest and highest.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import platform
import re
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path

import ours
import torch
from ceilings import ceilings, share_of_ceiling
from growth import growth
from rival import Rival

from nanostudy.model.gpt import GPTConfig
from nanostudy.settings import Resources
from nanostudy.training.machine import Machine, resolve

HERE = Path(__file__).parent
CELL = {"n_layer": 4, "n_head": 4, "n_embd": 128, "batch_size": 8, "block_size": 64, "dropout": 0.1}
PUBLISHED = {"n_layer": 4, "n_head": 4, "n_embd": 256, "batch_size": 64, "block_size": 256, "dropout": 0.2}
LARGE = {"n_layer": 6, "n_head": 6, "n_embd": 384, "batch_size": 64, "block_size": 256, "dropout": 0.2}
CORNER = {"n_layer": [4, 6], "n_embd": [128, 256], "dropout": [0.1, 0.2]}
SEEDS = range(1, 9)


@dataclass
class Row:
    """Seconds a unit of work, ours and theirs in each turn; theirs may be missing."""

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
    rival: Rival
    folder: Path
    machine: Machine
    turns: int

    def turn(self, row: Row, ours: Callable[[], float], theirs: Callable[[], float], turns: int | None = None) -> Row:
        for _ in range(turns or self.turns):
            row.theirs.append(theirs())
            row.ours.append(ours())
            print(f"    {row.workload}: ours {row.ours[-1]:.3f} s, nanoGPT {row.theirs[-1]:.3f} s", flush=True)
        return row

    def faster_way(self, cell: dict[str, object], iterations: int) -> tuple[bool, str]:
        """Whether nanoGPT is faster compiled here, and the two figures."""
        eager, made = (self.rival.iteration(cell, iterations, compile=compile) for compile in (False, True))
        return made < eager, f"nanoGPT eager {eager * 1e3:.1f} ms, compiled {made * 1e3:.1f} ms an update"


# --- workloads


def published_training(b: Bench) -> Row:
    compiled, said = b.faster_way(PUBLISHED, 8)
    row = Row("published CPU run, 4/4/256, batch 64, block 256, dropout 0.2", "update", "6x", note=said)
    run = b.folder / "published"
    return b.turn(
        row,
        lambda: ours.iteration(PUBLISHED, 12, run, f"device={b.rival.device}"),
        lambda: b.rival.iteration(PUBLISHED, 8, compile=compiled),
    )


def cell(b: Bench, precision: str = "auto", aim: str = "5x") -> Row:
    compiled, said = b.faster_way(CELL, 120)
    note = f"{said}; ours: a study of {len(SEEDS)} seeds, cold start to end, a share each"
    name = f"grid cell 4/4/128, batch 8, block 64, dropout 0.1, 1,000 updates, 6 evaluations{', fp32' * (precision == 'fp32')}"
    study = b.folder / f"cell-{precision}"

    def mine() -> float:
        spent = ours.study(
            {**CELL, "max_iters": 1000}, {}, SEEDS, study, "--precision", precision, "--device", b.rival.device
        )
        return spent / len(SEEDS)

    return b.turn(
        Row(name, "experiment", aim, note=note), mine, lambda: b.rival.train(CELL, max_iters=1000, compile=compiled)[0]
    )


def cell_fp32(b: Bench) -> Row:
    return cell(b, "fp32", "2x")


def corner(b: Bench) -> Row:
    """Both widths and depths, with both rates of dropout: 8 experiments, cut to 400 updates and 3 evaluations."""
    fixed = {k: v for k, v in CELL.items() if k not in CORNER} | {"max_iters": 400}
    note = "8 experiments one after another; 400 updates each, so that the cold start weighs more than in the grid"

    def theirs() -> float:
        settings = [
            {"n_layer": L, "n_embd": E, "dropout": d}
            for L in CORNER["n_layer"]
            for E in CORNER["n_embd"]
            for d in CORNER["dropout"]
        ]
        return sum(b.rival.train({**CELL, **each}, max_iters=400)[0] for each in settings)

    row = Row("a corner of the grid: 8 experiments, cold start, evaluations included", "corner", "5x", note=note)
    return b.turn(
        row, lambda: ours.study(fixed, CORNER, [1], b.folder / "corner", "--device", b.rival.device), theirs, turns=1
    )


def sampling(b: Bench) -> Iterator[Row]:
    once = {**LARGE, "batch_size": 1}
    b.rival.train(once, max_iters=1, eval_interval=1, eval_iters=1)
    run = b.folder / "large"
    words = ours.assignments({**once, "max_iters": 1, "sample_tokens": 1, "corpus": "shakespeare"})
    ours.command("train", "nanogpt-cpu", *words, f"device={b.rival.device}", "--out", str(run))
    where = ("--device", b.rival.device)
    for exact in ((), ("--exact",)):
        row = Row(
            f"sampling 10 x 500 characters, 10.8M parameters{', --exact' * bool(exact)}",
            "command",
            "20x" if not exact else "",
        )
        yield b.turn(
            row,
            lambda exact=exact: ours.command("sample", str(run), "-n", "10", "--tokens", "500", *where, *exact),
            lambda: b.rival.run("sample.py", num_samples=10, max_new_tokens=500, out_dir="out")[0],
            turns=1,
        )


def starting(b: Bench) -> Iterator[Row]:
    study = b.folder / "corner"
    if not study.is_dir():
        ours.study({**CELL, "max_iters": 2}, {}, [1, 2], study)
    for words in (("--help",), ("study", "status", str(study))):
        row = Row(f"nanostudy {' '.join(words[:2])}", "command", "0.3 s")
        row.ours = [ours.command(*words) for _ in range(5)]
        yield row


def gpu_training(b: Bench) -> Row:
    """The published GPU run; nanoGPT's share is measured over 300 updates and carried on to 6,000, with its evaluations."""
    compiled, said = b.faster_way(LARGE, 120)
    note = f"{said}; theirs: 6,000 updates at that rate, and 13 evaluations as measured once"
    row = Row("published GPU run, 6/6/384, 6,000 updates, start to finish", "run", "2x, under 60 s", note=note)
    run = b.folder / "gpu"

    def mine() -> float:
        ours.cold(run)
        return ours.command("train", "shakespeare-gpu", "corpus=shakespeare", "--out", str(run))

    def theirs() -> float:
        update = b.rival.iteration(LARGE, 300, compile=compiled)
        whole = b.rival.train(LARGE, max_iters=1, eval_interval=1, compile=compiled)[0]  # start, and two evaluations
        return 6000 * update + whole * 13 / 2

    return b.turn(row, mine, theirs, turns=1)


def gpu_grid(b: Bench, source: str = "shakespeare-grid", share: int = 1) -> Row:
    """The whole grid; nanoGPT's time is that of a sample of its corners, carried on to 128."""
    study = b.folder / source
    sizes = itertools.product((4, 6), (128, 256), (64, 128))
    cells = [{**CELL, "n_layer": L, "n_embd": E, "block_size": T} for L, E, T in sizes]
    extremes = [cells[0], cells[-1]]
    steps = 40 if source.endswith("published") else 1

    def theirs() -> float:
        spent = [
            b.rival.train(each, max_iters=100, gradient_accumulation_steps=steps, eval_interval=100)[0]
            for each in extremes
        ]
        update = statistics.mean(
            b.rival.iteration({**each, "gradient_accumulation_steps": steps}, 40 if steps > 1 else 60) for each in cells
        )
        evaluation = (statistics.mean(spent) - 100 * update) / 2
        return 128 * (1500 * update + 8.5 * evaluation)  # of 1,000 and of 2,000 updates, half each

    def mine() -> float:
        ours.cold(study)
        # neither setting changes the arithmetic: what is left is a fair quarter of the grid
        words = ("--only", "n_head=4,dropout=0.1") if share > 1 else ()
        return share * ours.command("study", "run", source, "--out", str(study), *words)

    extrapolated = f"; ours carried on from one in {share} of its experiments" if share > 1 else ""
    note = f"theirs carried on from updates of its 8 sizes at batch 8 (16 counted as 8) and evaluations of two{extrapolated}"
    return b.turn(
        Row(f"{source}, 128 experiments", "study", "15x, under 120 s" if steps == 1 else "under 10 min", note=note),
        mine,
        theirs,
        turns=1,
    )


def gpu_grid_as_published(b: Bench) -> Row:
    return gpu_grid(b, "shakespeare-grid-as-published", share=4)


CPU = [published_training, cell, cell_fp32, corner, sampling, starting]
GPU = [gpu_training, gpu_grid, gpu_grid_as_published, sampling, starting]


# --- reporting


def table(rows: list[Row]) -> list[str]:
    lines = [
        "| workload | ours, s | nanoGPT, s | ratio | aim | turns |",
        "|---|---|---|---|---|---|",
    ]
    for row in rows:
        a, b = (f"{statistics.median(times):.4g}" if times else "" for times in (row.ours, row.theirs))
        ratios = row.ratios
        spread = f" ({min(ratios):.1f} to {max(ratios):.1f})" if len(ratios) > 1 else ""
        ratio = f"**{statistics.median(ratios):.1f}x**{spread}" if ratios else ""
        lines.append(f"| {row.workload} (a {row.unit}) | {a} | {b} | {ratio} | {row.aim} | {len(row.ours)} |")
    lines += ["", *(f"- {row.workload}: {row.note}." for row in rows if row.note)]
    return lines


def reached(rows: list[Row], found: dict[str, float], machine: Machine) -> list[str]:
    """What share of the machine's rate of products each training reaches."""
    lines = []
    for row in rows:
        known = {"published CPU": PUBLISHED, "grid cell": CELL}
        settings = next((cell for start, cell in known.items() if row.workload.startswith(start)), None)
        if settings is None:
            continue
        shape = GPTConfig(
            settings["n_layer"], settings["n_head"], settings["n_embd"], settings["block_size"], 65, False, True
        )
        updates = 1000 if row.unit == "experiment" else 1
        tokens = updates * settings["batch_size"] * settings["block_size"] / statistics.median(row.ours)
        precision = "fp32" if "fp32" in row.workload else machine.precision
        share = share_of_ceiling(shape, tokens, found[f"{precision} products, FLOP/s"])
        lines.append(f"- {row.workload}: {tokens:,.0f} tokens/s, {share:.0%} of the rate of {precision} products.")
    return lines


def main() -> None:
    names = [*sorted({workload.__name__ for workload in (*CPU, *GPU)}), "growth"]
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--nanogpt", type=Path, required=True, help="an unmodified nanoGPT checkout (benchmarks/README.md)"
    )
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--only", nargs="+", choices=names, help="workloads; default: all of the device's")
    parser.add_argument("--turns", type=int, default=3, help="of ours and theirs (default 3)")
    parser.add_argument("--out", type=Path, default=HERE / "results", help="where the results of this machine are kept")
    asked = parser.parse_args()
    machine = resolve(Resources(device=asked.device))
    name = re.sub(r"[^a-z0-9]+", "-", f"{machine.device_name} {machine.threads}".lower()).strip("-")
    kept = asked.out / f"{name}.json"
    before = json.loads(kept.read_text(encoding="utf-8")) if kept.is_file() and asked.only else {}
    rows = {row["workload"]: Row(**row) for row in before.get("rows", [])}
    with tempfile.TemporaryDirectory() as home:
        folder = Path(home)
        os.environ["NANOSTUDY_CACHE"] = str(folder / "cache")
        bench = Bench(Rival.prepare(asked.nanogpt, folder / "nanogpt", asked.device), folder, machine, asked.turns)
        found = ceilings(machine)
        for workload in CPU if asked.device == "cpu" else GPU:
            if asked.only and workload.__name__ not in asked.only:
                continue
            made = workload(bench)
            rows |= {row.workload: row for row in ([made] if isinstance(made, Row) else made)}
        grown = list(growth(machine, folder)) if "growth" in (asked.only or ["growth"]) else before.get("growth", [])
    told = [
        f"# {machine.device_name}, {machine.threads} threads, {machine.precision}",
        "",
        f"{time.strftime('%Y-%m-%d')}, PyTorch {torch.__version__}, {platform.system()}. Times are medians of the turns; ratios, medians of each turn's, with the lowest and highest.",
        "",
        *table(list(rows.values())),
        "",
        "## Ceilings",
        "",
        *(f"- {what}: {rate:.3g}" for what, rate in found.items()),
        *reached(list(rows.values()), found, machine),
        *grown,
    ]
    print("\n" + "\n".join(told))
    asked.out.mkdir(parents=True, exist_ok=True)
    kept.with_suffix(".md").write_text("\n".join(told) + "\n", encoding="utf-8")
    content = {
        "machine": machine.as_dict(),
        "ceilings": found,
        "rows": [asdict(row) for row in rows.values()],
        "growth": grown,
    }
    kept.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
