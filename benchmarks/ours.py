"""nanostudy as its users run it: whole commands, timed from outside."""

from __future__ import annotations

import csv
import shutil
import statistics
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import yaml
from command import timed

GRID = {"corpus": "shakespeare", "learning_rate": 3e-4, "eval_interval": 200, "warmup_iters": 100}


@dataclass(frozen=True)
class Ours:
    """nanostudy in a folder of its own, with a cache that nobody else uses."""

    folder: Path
    device: str
    limit: Callable[[], float]  # seconds that a command may take now

    @property
    def cache(self) -> Path:
        return self.folder / "cache"

    def command(self, *words: str) -> float:
        """Seconds that `nanostudy ...` takes. Raises Failed."""
        command = [sys.executable, "-m", "nanostudy", *words]
        return timed(command, limit=self.limit(), environment={"NANOSTUDY_CACHE": str(self.cache)})[0]

    def cold(self, name: str) -> Path:
        """The folder of a run or a study, with nothing of earlier ones left, neither there nor in the cache."""
        shutil.rmtree(self.folder / name, ignore_errors=True)
        shutil.rmtree(self.cache, ignore_errors=True)
        return self.folder / name

    def train(self, preset: str, settings: Mapping[str, object], name: str) -> float:
        """Seconds of a training from a cold start, to its report."""
        words = [f"{key}={value}" for key, value in {**settings, "device": self.device}.items()]
        return self.command("train", preset, *words, "--out", str(self.cold(name)))

    def iteration(self, cell: Mapping[str, object], iterations: int, name: str) -> float:
        """Seconds per update of one training: the median of its log without the first quarter, evaluations left out."""
        fixed = {**GRID, "log_interval": 1, "eval_interval": 10**9, "sample_tokens": 1, "max_iters": iterations}
        self.train("nanogpt-cpu", {**fixed, **cell}, name)
        with open(self.folder / name / "training.csv", encoding="utf-8") as file:
            speeds = [float(row["tokens_per_second"]) for row in csv.DictReader(file)]
        tokens = int(str(cell["batch_size"])) * int(str(cell["block_size"]))
        return tokens / statistics.median(speeds[max(1, len(speeds) // 4) :])

    def study(
        self,
        fixed: Mapping[str, object],
        grid: Mapping[str, Sequence[object]],
        seeds: Sequence[int],
        name: str,
        *words: str,
    ) -> float:
        """Seconds from a cold start to the end of a study, evaluations, weights, samples and tables included."""
        file = self.folder / f"{name}.yaml"
        content: dict[str, object] = {"settings": {**GRID, **fixed}, "seeds": list(seeds)}
        if grid:
            content["grid"] = {key: list(values) for key, values in grid.items()}
        file.write_text(yaml.safe_dump(content, sort_keys=False), encoding="utf-8")
        return self.run_study(str(file), name, *words)

    def run_study(self, source: str, name: str, *words: str) -> float:
        """The same for a study file, or a study that comes with nanostudy."""
        folder = self.cold(name)
        return self.command("study", "run", source, "--out", str(folder), "--device", self.device, *words)
