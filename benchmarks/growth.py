"""How an update's time and a stack's memory grow with members, width and context."""

from __future__ import annotations

from collections.abc import Iterator

from nanostudy.gpt.corpus import load_corpus
from nanostudy.gpt.experiment import Experiment
from nanostudy.gpt.machine import Machine
from nanostudy.gpt.train import Job, measure
from nanostudy.study.plan import memory_of

BASE = {"n_layer": 4, "n_head": 4, "n_embd": 128, "batch_size": 8, "block_size": 64, "dropout": 0.1}
AXES = {"members": (1, 2, 4, 8), "n_embd": (64, 128, 256, 384), "block_size": (32, 64, 128, 256), "n_layer": (2, 4, 8)}


def growth(machine: Machine, seconds: float = 1.0) -> Iterator[str]:
    """Lines of a table, around 4 members of the grid's cell."""
    corpus = load_corpus("shakespeare", "char")
    yield from ("", "## Growth", "", f"Around a stack of 4 of the grid's cell, {machine.threads} threads:", "")
    yield from ("| | ms an update and member | planned memory, MiB |", "|---|---|---|")
    for axis, values in AXES.items():
        for value in values:
            members = value if axis == "members" else 4
            settings = BASE if axis == "members" else {**BASE, axis: value}
            experiments = [Experiment(**settings, seed=seed) for seed in range(1, members + 1)]
            jobs = [Job(f"job{i}", e, str(i)) for i, e in enumerate(experiments)]
            update, _ = measure(jobs, corpus, machine, seconds)
            memory = memory_of(experiments[0], corpus, members, machine.precision)
            yield f"| {axis} = {value} | {update / members * 1e3:.2f} | {memory / 2**20:,.0f} |"
