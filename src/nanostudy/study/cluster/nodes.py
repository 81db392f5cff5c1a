"""The nodes of a Ray cluster: who is there, what a worker gets of one, and whether they run what this machine runs."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from nanostudy.errors import NanostudyError
from nanostudy.study.cluster.actor import Facts
from nanostudy.study.workers import MEMORY_SHARE
from nanostudy.text import counted

LOOK = 3.0  # seconds between two looks at the nodes
SILENCE = 40.0  # seconds after which a cluster that does not answer is lost; after 60, Ray ends the process

Node = Mapping[str, Any]  # as Ray tells of it


@dataclass(frozen=True)
class Share:
    """What one worker asks of a node."""

    cpus: int
    gpus: float = 0.0  # a share of one, or one
    memory: int | None = None  # bytes

    def fit(self, has: Mapping[str, float]) -> int:
        """How many such workers a node has room for."""
        rooms = [has.get("CPU", 0) // self.cpus]
        if self.gpus:
            rooms.append(has.get("GPU", 0) // 1 * round(1 / self.gpus))
        if self.memory:
            rooms.append(has.get("memory", 0) // self.memory)
        return int(min(rooms))

    def __str__(self) -> str:
        gpus = f", {self.gpus:g} GPU" if self.gpus else ""
        memory = f", {self.memory / 2**30:.1f} GiB" if self.memory else ""
        return f"{counted(self.cpus, 'core')}{gpus}{memory}"


def share_out(
    nodes: Sequence[Mapping[str, float]], kind: str, threads: int | None, count: int | None, most: int
) -> Share:
    """Each worker's share of nodes with these resources, for `count` workers, or as many as there is room for and `most` at most.

    Where there are fewer workers than cores, they get more threads; where there are more than GPUs, several share one.
    """
    if kind == "cuda":
        gpus = sum(int(node.get("GPU", 0)) for node in nodes)
        return Share(threads or 1, 1 / max(1, -(-(count or 1) // max(1, gpus))))
    cores = [int(node.get("CPU", 0)) for node in nodes]
    wanted = count or min(sum(cores), most)
    fitting = [n for n in range(max(cores, default=1), 1, -1) if sum(c // n for c in cores) >= wanted]
    share = Share(threads or (fitting[0] if fitting else 1))
    free = [int(n["memory"]) // share.fit(n) for n in nodes if share.fit(n) and "memory" in n]
    # less than all: nodes of one kind differ a little, and one that joins should do
    return replace(share, memory=int(MEMORY_SHARE * min(free)) if free else None)


class Roster:
    """The nodes, asked for in a thread of its own: a cluster whose head is gone never answers."""

    def __init__(self, ray: Any) -> None:
        self.ray = ray
        self.nodes: list[Node] = ray.nodes()
        self.here = ray.get_runtime_context().get_node_id()
        self.told = time.monotonic()
        self.ended = threading.Event()
        threading.Thread(target=self._ask, daemon=True).start()

    def alive(self) -> dict[str, Node]:
        if time.monotonic() - self.told > SILENCE:
            raise NanostudyError(
                f"The Ray cluster has not answered for {SILENCE:.0f} seconds: its head is lost, or the way to it. What is recorded "
                "is on disk; once the cluster is there, the same command goes on."
            )
        alive = {node["NodeID"]: node for node in self.nodes if node["Alive"]}
        if self.here not in alive:
            raise NanostudyError(
                f"The {self.name(self.here)} of the Ray cluster, through which this process reaches it, is lost. What is recorded is on "
                "disk; the same command goes on."
            )
        return alive

    def name(self, id: str | None) -> str:
        names = [str(node.get("NodeManagerHostname")) for node in self.nodes if node["NodeID"] == id]
        return f"node {names[0] if names else 'unknown'} ({(id or '')[:8]})"

    def _ask(self) -> None:
        while not self.ended.wait(LOOK / 2):
            with contextlib.suppress(Exception):  # whatever it is: it has not answered
                self.nodes = self.ray.nodes()
                self.told = time.monotonic()


def inspector() -> Callable[[Mapping[str, str] | None, Mapping[str, Any]], tuple[dict[str, str], Facts | str | None]]:
    """A function that tells what a node runs, and what it has where that is what is expected.

    It is made here so that it travels by value: a node may have another nanostudy, or none.
    """

    def inspect(expected: Mapping[str, str] | None, asked: Mapping[str, Any]) -> tuple[dict[str, str], Any]:
        import hashlib
        import importlib.metadata
        import importlib.util
        import sys
        from pathlib import Path

        found = {"Python": f"{sys.version_info.major}.{sys.version_info.minor}"}
        for package in ("torch", "numpy"):
            try:  # which devices PyTorch was built for may differ
                found[package] = importlib.metadata.version(package).partition("+")[0]
            except importlib.metadata.PackageNotFoundError:
                found[package] = "missing"
        spec = importlib.util.find_spec("nanostudy")
        if spec is None or spec.origin is None:
            return {**found, "nanostudy": "missing", "numerics version": "missing", "source": "missing"}, None
        digest = hashlib.sha256()
        root = Path(spec.origin).parent
        for path in sorted(path for pattern in ("*.py", "*.cpp", "*.h") for path in root.rglob(pattern)):
            digest.update(f"{path.relative_to(root).as_posix()}\0".encode() + path.read_bytes() + b"\0")
        from nanostudy import version

        found |= {"nanostudy": version.VERSION, "numerics version": str(version.NUMERICS)}
        found["source"] = digest.hexdigest()[:12]
        if found != expected:
            return found, None
        from nanostudy.errors import NanostudyError
        from nanostudy.settings import Resources
        from nanostudy.study.cluster.actor import facts

        try:
            return found, facts(Resources(**asked))
        except NanostudyError as problem:
            return found, str(problem)

    return inspect
