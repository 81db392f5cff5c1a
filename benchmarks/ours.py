"""nanostudy as its users run it: whole commands, timed from outside."""

from __future__ import annotations

import csv
import os
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

import yaml


def command(*words: str) -> float:
    """Seconds that `nanostudy ...` takes."""
    start = time.perf_counter()
    done = subprocess.run(
        [sys.executable, "-m", "nanostudy", *words], capture_output=True, text=True, env=dict(os.environ)
    )
    if done.returncode:
        raise SystemExit(f"nanostudy {' '.join(words)} failed:\n{done.stdout[-1000:]}\n{done.stderr[-1000:]}")
    return time.perf_counter() - start


def cold(folder: Path) -> None:
    """Forgets what earlier runs left: the run's folder, and the kernels in the cache that NANOSTUDY_CACHE names."""
    shutil.rmtree(folder, ignore_errors=True)
    shutil.rmtree(Path(os.environ["NANOSTUDY_CACHE"]) / "kernels", ignore_errors=True)


def assignments(settings: Mapping[str, object]) -> list[str]:
    return [f"{name}={value}" for name, value in settings.items()]


def iteration(cell: Mapping[str, object], iterations: int, folder: Path, *resources: str) -> float:
    """Seconds an update of one training: the median of its log without the first quarter, evaluations left out."""
    shutil.rmtree(folder, ignore_errors=True)
    settings = {
        "learning_rate": 3e-4,
        "corpus": "shakespeare",
        "log_interval": 1,
        "eval_interval": 10**9,
        "sample_tokens": 1,
    }
    words = assignments({**settings, **cell, "max_iters": iterations})
    command("train", "nanogpt-cpu", *words, *resources, "--out", str(folder))
    with open(folder / "training.csv", encoding="utf-8") as file:
        speeds = [float(row["tokens_per_second"]) for row in csv.DictReader(file)]
    tokens = int(str(cell["batch_size"])) * int(str(cell["block_size"]))
    return tokens / statistics.median(speeds[max(1, len(speeds) // 4) :])


def study(
    fixed: Mapping[str, object], grid: Mapping[str, Sequence[object]], seeds: Sequence[int], folder: Path, *words: str
) -> float:
    """Seconds from a cold start to the end of a study, evaluations, weights, samples and tables included."""
    file = folder.with_suffix(".yaml")
    settings = {"corpus": "shakespeare", "learning_rate": 3e-4, "eval_interval": 200, "warmup_iters": 100}
    content: dict[str, object] = {"settings": {**settings, **fixed}, "seeds": list(seeds)}
    if grid:
        content["grid"] = {name: list(values) for name, values in grid.items()}
    file.write_text(yaml.safe_dump(content, sort_keys=False), encoding="utf-8")
    cold(folder)
    return command("study", "run", str(file), "--out", str(folder), *words)
