"""nanoGPT as it is published: its own train.py and sample.py, run in a folder of ours that holds its data.

The checkout is only read. Its scripts are run as their README says, `python train.py --setting=value`.
"""

from __future__ import annotations

import os
import re
import statistics
import subprocess
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

ITERATION = re.compile(r"^iter (\d+): loss ([\d.]+|nan), time ([\d.]+)ms", re.M)
NEEDED = ("train.py", "sample.py", "model.py", "configurator.py")


@dataclass(frozen=True)
class Rival:
    """An unmodified nanoGPT checkout, and the folder that its scripts run in."""

    folder: Path
    device: str

    @staticmethod
    def prepare(checkout: Path, folder: Path, device: str) -> Rival:
        missing = [name for name in NEEDED if not (checkout / name).is_file()]
        if missing:
            raise SystemExit(f"{checkout} is no nanoGPT checkout: {', '.join(missing)} is not there.")
        folder.mkdir(parents=True)
        for name in NEEDED:
            (folder / name).symlink_to((checkout / name).resolve())
        data = folder / "data" / "shakespeare_char"
        subprocess.run(
            [sys.executable, "-m", "nanostudy", "corpus", "export", "shakespeare", "--out", str(data)],
            check=True,
            stdout=subprocess.DEVNULL,
        )
        return Rival(folder, device)

    def run(self, script: str, **settings: object) -> tuple[float, str]:
        """(seconds of the whole command, what it printed)"""
        words = [f"--{name}={value}" for name, value in {"device": self.device, **settings}.items()]
        start = time.perf_counter()
        done = subprocess.run(
            [sys.executable, script, *words], cwd=self.folder, capture_output=True, text=True, env=dict(os.environ)
        )
        if done.returncode:
            raise SystemExit(f"nanoGPT's {script} failed:\n{done.stderr[-2000:]}")
        return time.perf_counter() - start, done.stdout

    def train(self, cell: Mapping[str, object], *, compile: bool = False, **settings: object) -> tuple[float, str]:
        """Its template for this text, with the cell's settings. Evaluations are its own: 200 random batches a split."""
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
        """Seconds an update, as it prints them: the median without the first quarter, evaluations left out."""
        _, printed = self.train(
            cell, compile=compile, max_iters=iterations, eval_interval=10**9, eval_iters=1, always_save_checkpoint=False
        )
        times = [float(found[2]) / 1000 for found in ITERATION.findall(printed)]
        return statistics.median(times[max(1, len(times) // 4) :])
