"""How an update's time and a process's memory grow with members, width, context and depth; and a study's with workers."""

from __future__ import annotations

from collections.abc import Iterator

from gpu import probe
from workloads import CELL, Bench

from nanostudy.device import available_cores

AXES = {"members": (1, 2, 4, 8), "n_embd": (64, 128, 256, 384), "block_size": (32, 64, 128, 256), "n_layer": (2, 4, 8)}


def growth(b: Bench, seconds: float = 1.0) -> Iterator[str]:
    """Lines of two tables: around 4 members of the grid's cell, and 8 of its seeds by workers."""
    threads = available_cores()
    yield from ("Around a stack of 4 of the grid's cell:", "")
    yield from ("| | ms per update and member | peak of memory, MiB | planned, MiB |", "|---|---|---|---|")
    for axis, values in AXES.items():
        for value in values:
            members = value if axis == "members" else 4
            settings = CELL if axis == "members" else {**CELL, axis: value}
            found = probe("pace", settings, members, b.ours.device, seconds, b.ours.limit())
            memory = " | ".join(f"{found[what] / 2**20:,.0f}" for what in ("peak", "planned"))
            yield f"| {axis} = {value} | {found['update'] / members * 1e3:.2f} | {memory} |"
    if b.ours.device != "cpu":
        return
    yield from ("", "8 seeds of the cell, 200 updates and 2 evaluations each, from a cold start:", "")
    yield from ("| workers | s |", "|---|---|")
    count = 1
    while count <= threads:
        spent = b.ours.study({**CELL, "max_iters": 200}, {}, range(1, 9), f"workers{count}", "--workers", str(count))
        yield f"| {count} | {spent:.1f} |"
        count *= 2
