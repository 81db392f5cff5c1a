"""nanoGPT as it is published: its own train.py and sample.py, run in a folder of ours that holds its data.

The checkout is only read. Its scripts are run as their README says, `python train.py --setting=value`.
"""

from __future__ import annotations

import re
import shutil
import statistics
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from command import timed

ITERATION = re.compile(r"^iter (\d+): loss ([\d.]+|nan), time ([\d.]+)ms", re.M)
NEEDED = ("train.py", "sample.py", "model.py", "configurator.py")
NEVER = 10**9  # nanoGPT evaluates at update 0 all the same


@dataclass(frozen=True)
class Cost:
    """Seconds of nanoGPT for one size of model."""

    start: float  # from a cold start to the first update's end: imports, data and compilation, without an evaluation
    update: float
    evaluation: float

    def of(self, updates: float, evaluations: float) -> float:
        """Seconds of a training; the start, with its first update, is counted once."""
        return self.start + (updates - 1) * self.update + evaluations * self.evaluation


@dataclass(frozen=True)
class Rival:
    """An unmodified nanoGPT checkout, the folder that its scripts run in, and a cache that nobody else uses."""

    folder: Path
    device: str
    limit: Callable[[], float]  # seconds that a command may take now

    @staticmethod
    def prepare(checkout: Path, folder: Path, device: str, limit: Callable[[], float]) -> Rival:
        missing = [name for name in NEEDED if not (checkout / name).is_file()]
        if missing:
            raise SystemExit(f"{checkout} is not a nanoGPT checkout: {', '.join(missing)} is not there.")
        folder.mkdir(parents=True)
        for name in NEEDED:
            (folder / name).symlink_to((checkout / name).resolve())
        return Rival(folder, device, limit)

    def run(self, script: str, **settings: object) -> tuple[float, str]:
        """(seconds of the whole command, what it printed). Raises Failed."""
        data = self.folder / "data" / "shakespeare_char"
        if not data.exists():
            export = [sys.executable, "-m", "nanostudy", "corpus", "export", "shakespeare", "--out", str(data)]
            timed(export, limit=self.limit())
        words = [f"--{name}={value}" for name, value in {"device": self.device, **settings}.items()]
        caches = {name: str(self.folder / "cache" / name) for name in ("TORCHINDUCTOR_CACHE_DIR", "TRITON_CACHE_DIR")}
        return timed([sys.executable, script, *words], limit=self.limit(), folder=self.folder, environment=caches)

    def cold(self) -> None:
        shutil.rmtree(self.folder / "cache", ignore_errors=True)

    def train(self, cell: Mapping[str, object], *, compile: bool = False, **settings: object) -> tuple[float, str]:
        """Its template for this text, with the cell's settings. Evaluations are its own: 200 random batches per split."""
        fixed = {
            "dataset": "shakespeare_char",
            "out_dir": "out",
            "always_save_checkpoint": True,
            "gradient_accumulation_steps": 1,
            "learning_rate": 3e-4,
            "warmup_iters": 100,
            "log_interval": 1,
            "eval_interval": 200,
            "eval_iters": 200,
            "compile": compile,
        }
        return self.run("train.py", **{**fixed, **cell, **settings})

    def iteration(self, cell: Mapping[str, object], iterations: int, *, compile: bool = False) -> float:
        """Seconds per update, as it prints them: the median without the first quarter, evaluations left out."""
        _, printed = self.train(
            cell, compile=compile, max_iters=iterations, eval_interval=NEVER, eval_iters=1, always_save_checkpoint=False
        )
        times = [float(found[2]) / 1000 for found in ITERATION.findall(printed)]
        return statistics.median(times[max(1, len(times) // 4) :])

    def evaluation(self, cell: Mapping[str, object], *, compile: bool) -> float:
        """Seconds, as the difference of two runs that differ in one evaluation."""
        one, two = (self.train(cell, compile=compile, max_iters=1, eval_interval=each)[0] for each in (NEVER, 1))
        return max(0.0, two - one)

    def cost(self, cell: Mapping[str, object], iterations: int, *, compile: bool) -> Cost:
        """Each part once."""
        self.cold()
        first = self.train(cell, compile=compile, max_iters=1, eval_interval=NEVER)[0]
        update, evaluation = self.iteration(cell, iterations, compile=compile), self.evaluation(cell, compile=compile)
        # max_iters=1 makes two updates; the evaluation at update 0 is in every run
        return Cost(max(0.0, first - evaluation - update), update, evaluation)
