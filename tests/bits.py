"""The bits of a small run, a small study and a report, to compare before and after a change that must alter none.

    python tests/bits.py --out before.json      # on the commit before
    python tests/bits.py --against before.json  # on the commit after, on the same machine; exit code 1 where they differ

It uses the commands and the public calls alone, so that it runs on either side of a change within. Times are left out:
they differ from run to run. Bits differ between kinds of CPU and versions of PyTorch, so no file of them is kept here.
"""

import argparse
import csv
import hashlib
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

RUN = ["max_iters=60", "eval_interval=20", "n_layer=2", "n_head=2", "n_embd=32", "block_size=32", "batch_size=6"]
RUN += ["dropout=0.1", "sample_tokens=80", "log_interval=5", "corpus=playhouse", "device=cpu", "threads=1"]
STUDY = """\
settings: {corpus: playhouse, n_head: 2, block_size: 32, batch_size: 6, max_iters: 30, eval_interval: 10, warmup_iters: 5}
grid: {n_layer: [1, 2], n_embd: [16, 32], dropout: [0.0, 0.2], learning_rate: [1.0e-3, 4.0e-3]}
seeds: [1, 2]
prompts: [null, "The "]
sample_tokens: 40
"""
TIMES = {"seconds", "tokens_per_second", "finished_at"}


def nanostudy(*arguments, folder):
    done = subprocess.run(
        [sys.executable, "-m", "nanostudy", *arguments], cwd=folder, capture_output=True, text=True, env=os.environ
    )
    if done.returncode:
        raise SystemExit(f"nanostudy {' '.join(arguments)}\n{done.stdout}\n{done.stderr}")


def digest(content):
    return hashlib.sha256(content if isinstance(content, bytes) else content.encode()).hexdigest()[:16]


def table(path):
    """Its cells by column, times left out."""
    rows = list(csv.DictReader(path.read_text(encoding="utf-8").splitlines()))
    return {name: digest("\n".join(row[name] for row in rows)) for name in rows[0] if name not in TIMES}


def weights(path):
    from safetensors.numpy import load

    return {name: digest(tensor.tobytes()) for name, tensor in sorted(load(path.read_bytes()).items())}


def run_folder(path):
    bits = {name: table(path / name) for name in ("training.csv", "evaluations.csv")}
    bits |= {file.name: digest(json.dumps(weights(file))) for file in sorted(path.glob("*.safetensors"))}
    metadata = json.loads((path / "run.json").read_text(encoding="utf-8"))
    kept = ("identity", "updates", "tokens", "context_losses", "parameters", "status", "numerics_version")
    return {**bits, "sample.txt": digest((path / "sample.txt").read_bytes()), **{name: metadata[name] for name in kept}}


def numbers(frame):
    """Its numbers to the bit, by column."""
    return {
        str(name): digest(",".join(map(repr, column.astype(object))))
        for name, column in frame.select_dtypes("number").items()
        if name not in TIMES
    }


def report(path):
    import nanostudy

    analysis = nanostudy.analyze(path)
    frames = {
        name: getattr(analysis, name)
        for name in ("ranking", "generalisation", "overfitting", "stability", "convergence", "quality")
    }
    frames |= {"effects": analysis.effects.table, "gap effects": analysis.gap_effects.table}
    frames |= {f"pareto {cost}": analysis.pareto(cost) for cost in ("parameters", "tokens")}
    return {name: numbers(frame) for name, frame in frames.items()}


def collect(folder):
    (folder / "small.yaml").write_text(STUDY, encoding="utf-8")
    nanostudy("train", "quickstart", *RUN, "--out", "run", folder=folder)
    nanostudy("train", "quickstart", *RUN, "precision=fp32", "compile=no", "--out", "run-fp32", folder=folder)
    nanostudy(
        "study",
        "run",
        "--no-report",
        "small.yaml",
        "--out",
        "study",
        "--device",
        "cpu",
        "--workers",
        "2",
        folder=folder,
    )
    nanostudy("report", "study", folder=folder)
    names = sorted(path.parent.name for path in folder.glob("study/*/run.json"))
    return {
        "run": run_folder(folder / "run"),
        "run in fp32": run_folder(folder / "run-fp32"),
        "results.csv": table(folder / "study" / "results.csv"),
        "report/results.csv": table(folder / "study" / "report" / "results.csv"),
        "experiments": {name: run_folder(folder / "study" / name) for name in names},
        "analysis": report(folder / "study"),
    }


def flat(bits, at=""):
    if isinstance(bits, dict):
        return {key: value for name, inner in bits.items() for key, value in flat(inner, f"{at}/{name}").items()}
    return {at: bits}


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, help="the file to write")
    parser.add_argument("--against", type=Path, help="an earlier file of the same machine")
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        bits = json.loads(json.dumps(collect(Path(folder))))
    if asked.out:
        asked.out.write_text(json.dumps(bits, indent=1) + "\n", encoding="utf-8")
    if asked.against:
        before, now = flat(json.loads(asked.against.read_text(encoding="utf-8"))), flat(bits)
        changed = [
            f"{key}: {before.get(key)} -> {now.get(key)}"
            for key in {**before, **now}
            if before.get(key) != now.get(key)
        ]
        print("\n".join(changed) or f"all {len(before)} are the same")
        sys.exit(bool(changed))


if __name__ == "__main__":
    main()
