"""What tells in little time how fast a machine is, and why: its tests, a profile, the pace of parts, two whole stacks."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from command import Failed, timed
from workloads import CELL, LARGE, Bench, Row

HERE = Path(__file__).parent
EXTREMES = {
    "4/4/128, batch 8, block 64": CELL,
    "6/8/256, batch 16, block 128": {
        **CELL,
        "n_layer": 6,
        "n_head": 8,
        "n_embd": 256,
        "batch_size": 16,
        "block_size": 128,
    },
}
LARGEST = "6/6/384, batch 64, block 256"


def probe(
    what: str, settings: Mapping[str, object], members: int, device: str, seconds: float, limit: float
) -> dict[str, Any]:
    """What probe.py prints. Raises Failed."""
    words = [what, json.dumps(settings), str(members), device, str(seconds)]
    _, printed = timed([sys.executable, str(HERE / "probe.py"), *words], limit=limit)
    return json.loads(printed.splitlines()[-1])


def tried(row: Row, measure: Callable[[Row], None]) -> Row:
    """The row, with what was measured or with a note."""
    try:
        measure(row)
    except Failed as problem:
        row.note = f"not measured ({problem})"
    return row


def tests(b: Bench) -> Iterator[str]:
    """Every kernel against the reference, the same bits with a fresh and a used cache, and the rest of test_gpu.py."""
    file = next((HERE.parent / "tests").rglob("test_gpu.py"), None)
    if file is None:
        raise Failed("there is no test_gpu.py")
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", str(file)]
    seconds, printed = timed(command, limit=b.ours.limit(), folder=HERE.parent)
    yield f"- {printed.strip().splitlines()[-1]} ({seconds:.0f} s)"


def profile(b: Bench) -> Iterator[str]:
    """20 updates of the published GPU run and of a stack of 4 cells."""
    for name, settings, members in ((LARGEST, LARGE, 1), (f"{next(iter(EXTREMES))}, 4 members", CELL, 4)):
        try:
            found = probe("profile", settings, members, b.ours.device, b.ours.limit() / 10, b.ours.limit())
        except Failed as problem:
            yield f"- {name}: not measured ({problem})"
            continue
        yield (
            f"- {name}: {found['update'] * 1e3:.2f} ms an update, {found['busy']:.0%} busy, {found['kernels']:.0f} kernels and "
            f"{found['host'] * 1e3:.2f} ms of the host's an update, over {found['updates']} updates"
        )
        yield from (f"    - {kernel[:80]}: {seconds * 1e3:.3f} ms" for kernel, seconds in found["longest"])


def pace(b: Bench) -> Iterator[Row]:
    """Milliseconds an update, and nanoseconds an evaluated token."""
    cell, large = EXTREMES
    stacks = [(LARGEST, LARGE, 1), *((cell, CELL, members) for members in (4, 1, 16, 64)), (large, EXTREMES[large], 4)]
    for name, settings, members in stacks:

        def measure(row: Row, settings: Mapping[str, object] = settings, members: int = members) -> None:
            found = probe("pace", settings, members, b.ours.device, min(2.0, b.ours.limit() / 12), b.ours.limit())
            row.ours = [found["update"]]
            row.note = (
                f"{found['update'] / members * 1e3:.3f} ms a member; {found['token'] * 1e9:.1f} ns an evaluated token of a member; "
                f"{found['peak'] / 2**20:,.0f} MiB at most, {found['planned'] / 2**20:,.0f} planned"
            )

        yield tried(Row(f"{name}, a stack of {members}", "update", ""), measure)


def rival_pace(b: Bench) -> Iterator[Row]:
    """nanoGPT's seconds an update, eager and compiled, and an evaluation as the difference of two runs."""
    for way in ("eager", "compiled"):
        for name, settings in {LARGEST: LARGE, **EXTREMES}.items():

            def measure(row: Row, settings: Mapping[str, object] = settings, way: str = way) -> None:
                row.theirs = [b.rival.iteration(settings, 60, compile=way == "compiled")]

            yield tried(Row(f"nanoGPT {way}, {name}", "update", ""), measure)

    def evaluation(row: Row) -> None:
        row.theirs = [b.rival.evaluation(LARGE, compile=False)]

    yield tried(Row(f"nanoGPT eager, {LARGEST}: an evaluation", "evaluation", ""), evaluation)


def stacks(b: Bench) -> Iterator[Row]:
    """A part of the grid: both batches at width 128, which makes two stacks on a GPU."""
    for workers in (1, 2):
        words = ("--part", "shallow_small", "n_embd=128", "--workers", str(workers))
        name = f"16 experiments of shakespeare-grid, {workers} worker{'s' * (workers > 1)}"
        yield tried(
            Row(name, "part", ""), _ours(lambda words=words: b.ours.run_study("shakespeare-grid", "part", *words))
        )


def whole(b: Bench) -> Iterator[Row]:
    """Ours alone, from a cold start to the end: what the parts add up to."""
    training = _ours(lambda: b.ours.train("shakespeare-gpu", {"corpus": "shakespeare"}, "gpu"))
    yield tried(Row("the whole of train shakespeare-gpu", "run", ""), training)
    grid = _ours(lambda: b.ours.run_study("shakespeare-grid", "grid"))
    yield tried(Row("the whole of study run shakespeare-grid", "study", ""), grid)


def _ours(run: Callable[[], float]) -> Callable[[Row], None]:
    def measure(row: Row) -> None:
        row.ours = [run()]

    return measure
