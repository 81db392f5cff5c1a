"""Measures nanostudy beside nanoGPT, step by step, and prints one table. `python benchmarks/run.py --help`.

Ours and theirs take turns, so that both meet the same machine; a ratio is of one turn, and the table has the median turn with
the lowest and highest. Each side has a cache of its own. Every step has a limit of time. What it measured is printed and
written when it is there; what failed is a note, and the next step begins.
"""

from __future__ import annotations

import argparse
import os
import tempfile
from pathlib import Path

HERE = Path(__file__).parent
HOME = tempfile.TemporaryDirectory()
# Before anything of nanostudy's is imported: what it builds for the ceilings must not warm the cache of what is measured.
os.environ["NANOSTUDY_CACHE"] = str(Path(HOME.name) / "cache")

import torch  # noqa: E402
import workloads as w  # noqa: E402
from command import Budget  # noqa: E402
from gpu import pace, profile, rival_pace, stacks, tests, whole  # noqa: E402
from growth import growth  # noqa: E402
from ours import Ours  # noqa: E402
from outcome import Outcome  # noqa: E402
from rival import Rival  # noqa: E402
from workloads import Bench, Step, measured  # noqa: E402

from nanostudy.settings import Resources  # noqa: E402
from nanostudy.training.machine import resolve  # noqa: E402

SAMPLING, STARTING = Step(w.sampling), Step(w.starting)
CPU = [Step(w.published_training), Step(w.cell), Step(w.cell_fp32), Step(w.corner), SAMPLING, STARTING]
# The parts, in little time; then whole trainings, which --only runs alone.
PARTS = [Step(tests, 90), Step(profile, 60), Step(pace, 120), Step(rival_pace, 90), Step(stacks, 100)]
GPU = [*PARTS, Step(w.gpu_training), Step(w.gpu_grid), Step(w.gpu_grid_as_published), SAMPLING, STARTING]
STEPS = {step.name: step for step in (*CPU, *GPU, Step(growth), Step(whole))}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--nanogpt", type=Path, required=True, help="an unmodified nanoGPT checkout (benchmarks/README.md)"
    )
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument(
        "--only", nargs="+", choices=sorted(STEPS), help="steps; default: all of the device's but growth"
    )
    parser.add_argument("--turns", type=int, default=3, help="of ours and theirs (default 3)")
    parser.add_argument(
        "--budget", type=float, default=float("inf"), help="seconds for all; what is left is not measured"
    )
    parser.add_argument("--out", type=Path, default=HERE / "results", help="where the results of this machine are kept")
    options = parser.parse_args()
    budget = Budget(options.budget)
    steps = [STEPS[name] for name in options.only] if options.only else (CPU if options.device == "cpu" else GPU)
    with HOME as home:
        folder = Path(home)
        outcome = Outcome.begin(options.out, resolve(Resources(device=options.device)), bool(options.only))
        print("\n".join(outcome.machine_lines()), flush=True)
        outcome.write()
        (folder / "ours").mkdir()
        ours = Ours(folder / "ours", options.device, budget.left)
        rival = Rival.prepare(options.nanogpt, folder / "nanogpt", options.device, budget.left)
        bench = Bench(ours, rival, options.turns)
        for step in steps:
            print(f"{step.name}: {min(step.limit, budget.left()):,.0f} s at most", flush=True)
            outcome.begin_step(step.name)
            for made in measured(step, bench, budget):
                print(outcome.add(step.name, made), flush=True)
                outcome.write()
    print("\n" + "\n".join(outcome.lines()))


if __name__ == "__main__":
    main()
