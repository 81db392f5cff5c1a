"""The nodes of a Ray cluster: which there are, which can be used, and what a worker gets of one."""

from __future__ import annotations

import contextlib
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from nanostudy.errors import NanostudyError, UsageError
from nanostudy.settings import PRECISIONS, Resources
from nanostudy.study.plan import Capacity
from nanostudy.study.workers import MEMORY_SHARE, PROCESS_MEMORY
from nanostudy.text import counted, listed

LOOK = 3.0  # seconds between two looks at the nodes
SILENCE = 40.0  # seconds after which a cluster that does not answer is lost; after 60, Ray ends the process
ANSWER = 120.0  # seconds in which the nodes answer at the start
AVOIDED = 60.0  # seconds in which a node that lost a worker gets no other; Ray needs 15 to know that it is dead

Node = Mapping[str, Any]  # as Ray describes it


@dataclass(frozen=True)
class Share:
    """What one worker takes of a node."""

    cpus: int
    gpus: float = 0.0  # one, or a share of one
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
    """Each worker's share of nodes with these resources, for `count` workers, or for as many as fit and `most` at most.

    With fewer workers than cores, each gets more threads; with more workers than GPUs, several share one.
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
    """The nodes that are there. A thread asks for them, since a cluster whose head is gone never answers."""

    def __init__(self, ray: Any) -> None:
        self.ray = ray
        self.nodes: list[Node] = ray.nodes()
        self.here = ray.get_runtime_context().get_node_id()
        self.answered_at = time.monotonic()
        self.ended = threading.Event()
        threading.Thread(target=self._ask, daemon=True).start()

    def alive(self) -> dict[str, Node]:
        if time.monotonic() - self.answered_at > SILENCE:
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
            with contextlib.suppress(Exception):  # whatever it is, the cluster has not answered
                self.nodes = self.ray.nodes()
                self.answered_at = time.monotonic()


@dataclass(frozen=True)
class NodeInfo:
    """What the planner must know of a node."""

    device_name: str
    precision: str
    memory: int | None  # bytes of its device that are free
    compiled: bool
    notes: tuple[str, ...]


class Nodes:
    """The nodes with room for a worker that run the same code and versions as this machine."""

    def __init__(self, ray: Any, roster: Roster, share: Share, each: Resources) -> None:
        self.ray, self.roster, self.share, self.each = ray, roster, share, each
        self.fit: dict[str, bool] = {}  # inspected nodes, and whether they may be used
        self.inspections: dict[Any, str] = {}  # under way
        self.avoided: dict[str, float] = {}  # until when
        self.without_kernels: tuple[str, ...] = ()  # why no node's are compiled, although they were to be
        self.inspector = inspector()
        self.expected = self.inspector(None, {})[0]

    def usable(self) -> dict[str, Node]:
        now = time.monotonic()
        alive = self.roster.alive()
        return {id: node for id, node in alive.items() if self.fit.get(id) and self.avoided.get(id, 0.0) < now}

    def room(self) -> int:
        """How many workers fit on the usable nodes."""
        return sum(self.share.fit(node["Resources"]) for node in self.usable().values())

    def avoid(self, id: str | None) -> None:
        if id:
            self.avoided[id] = time.monotonic() + AVOIDED

    def inspect_all(self, count: int | None, most: int) -> tuple[Capacity, tuple[str, ...]]:
        """The capacity for `count` workers, or at most `most`, and notes for a person.

        Raises UsageError where no node has room, NanostudyError where one lacks what this machine has.
        """
        ids = [id for id, node in self.roster.alive().items() if self.share.fit(node["Resources"])]
        if not ids:
            raise UsageError(
                f"No node of the Ray cluster has room for a worker ({self.share}). `ray status` shows what there is."
            )
        for id in ids:
            self._inspect(id)
        _, late = self.ray.wait(list(self.inspections), num_returns=len(self.inspections), timeout=ANSWER)
        if late:
            names = ", ".join(self.roster.name(self.inspections[ref]) for ref in late)
            raise NanostudyError(
                f"{names} did not answer within {ANSWER:.0f} seconds. `ray status` shows what is wrong."
            )
        results = self._inspected()
        problems = [info for _, info in results if isinstance(info, str)]
        if problems:
            raise NanostudyError("\n".join(problems))
        infos = [info for _, info in results if isinstance(info, NodeInfo)]
        without = [self.roster.name(id) for id, info in results if isinstance(info, NodeInfo) and not info.compiled]
        if without and len(without) < len(infos):
            raise NanostudyError(
                f"Kernels are not compiled on {listed(without, 3)}, and are on the others: their results would differ. Put a C++ "
                "compiler there, or give --compile no."
            )
        # nodes that join, and workers, must have it like these
        self.each = replace(self.each, compile="no" if without else "yes")
        self.without_kernels = tuple(dict.fromkeys(note for info in infos for note in info.notes)) if without else ()
        return self._capacity(infos, count or most), self._notes(infos, count)

    def look_around(self) -> list[str]:
        """Inspects nodes that joined. Returns, in words, those that cannot be used."""
        unused, nodes = [], self.roster.alive()
        for id, node in nodes.items():
            if id in self.fit or id in self.inspections.values():
                continue
            if self.share.fit(node["Resources"]):
                self._inspect(id)
            elif replace(self.share, memory=None).fit(node["Resources"]):
                self.fit[id] = False
                free = node["Resources"].get("memory", 0) / 2**30
                unused.append(f"{self.roster.name(id)} has {free:.1f} GiB free, and a worker asks for {self.share}")
        unused += [info for id, info in self._inspected() if isinstance(info, str) and id in nodes]
        return unused

    def _inspect(self, id: str) -> None:
        """Needs no free core. A process that has seen all GPUs is used for nothing else."""
        options = {"num_cpus": 0, "max_retries": 0, "max_calls": int(bool(self.share.gpus))}
        inspect = self.ray.remote(**options)(self.inspector)
        affinity = self.ray.util.scheduling_strategies.NodeAffinitySchedulingStrategy(id, soft=False)
        ref = inspect.options(scheduling_strategy=affinity).remote(self.expected, asdict(self.each))
        self.inspections[ref] = id

    def _inspected(self) -> list[tuple[str, NodeInfo | str]]:
        """The nodes whose inspection has ended: by id, what there is, or why the node cannot be used."""
        refs = list(self.inspections)
        ready = self.ray.wait(refs, num_returns=len(refs), timeout=0)[0] if refs else []
        results = []
        for ref in ready:
            id = self.inspections.pop(ref)
            info = self._result(ref, self.roster.name(id))
            self.fit[id] = not isinstance(info, str)
            results.append((id, info))
        return results

    def _result(self, ref: Any, name: str) -> NodeInfo | str:
        try:
            versions, info = self.ray.get(ref)
        except self.ray.exceptions.RayError as problem:
            return f"{name} could not be looked at: {first_line(problem)}"
        differing = [
            f"{key} {versions[key]} there, {here} here" for key, here in self.expected.items() if versions[key] != here
        ]
        if differing:
            return f"{name} has other code or versions: {'; '.join(differing)}. Install the same there, and run again."
        return f"{name}: {info}" if isinstance(info, str) else info

    def _capacity(self, infos: Iterable[NodeInfo], most: int) -> Capacity:
        workers = max(1, min(self.room(), most))
        precision = min((info.precision for info in infos), key=PRECISIONS.index)  # the one that takes most memory
        memory = None if self.share.memory is None else max(0, self.share.memory - PROCESS_MEMORY)
        if self.share.gpus:
            free = [info.memory for info in infos if info.memory is not None]
            memory = int(MEMORY_SHARE * min(free) * self.share.gpus) if free else None
        return Capacity(self.each.device, precision, workers, memory)

    def _notes(self, infos: Sequence[NodeInfo], count: int | None) -> tuple[str, ...]:
        kinds = Counter(f"{info.device_name}, {info.precision}" for info in infos)
        notes = [f"a Ray cluster of {counted(len(infos), 'node')} that can be used"]
        if len(kinds) > 1:
            which = "; ".join(f"{kind}: {counted(number, 'node')}" for kind, number in kinds.items())
            notes.append(f"different kinds of device ({which}): each result tells where it was made")
        room = self.room()
        if count and room < count:
            notes.append(
                f"there is room for {room} of the {counted(count, 'worker')} asked for; others begin where nodes join"
            )
        return (*notes, *dict.fromkeys(note for info in infos for note in info.notes))


def first_line(problem: object) -> str:
    lines = str(problem).strip().splitlines()
    return f"{type(problem).__name__}{f': {lines[0]}' if lines else ''}"


def inspector() -> Callable[[Mapping[str, str] | None, Mapping[str, Any]], tuple[dict[str, str], Any]]:
    """A function that says what a node runs, and where that is as expected, what it has or why it cannot be used.

    It is defined here so that it travels by value: a node may have another nanostudy, or none.
    """

    def inspect(expected: Mapping[str, str] | None, resources: Mapping[str, Any]) -> tuple[dict[str, str], Any]:
        import hashlib
        import importlib.metadata
        import importlib.util
        import sys
        from pathlib import Path

        versions = {"Python": f"{sys.version_info.major}.{sys.version_info.minor}"}
        for package in ("torch", "numpy"):
            try:  # builds of PyTorch for different devices may differ
                versions[package] = importlib.metadata.version(package).partition("+")[0]
            except importlib.metadata.PackageNotFoundError:
                versions[package] = "missing"
        spec = importlib.util.find_spec("nanostudy")
        if spec is None or spec.origin is None:
            return {**versions, "nanostudy": "missing", "numerics version": "missing", "source": "missing"}, None
        digest = hashlib.sha256()
        root = Path(spec.origin).parent
        for path in sorted(path for pattern in ("*.py", "*.cpp", "*.h") for path in root.rglob(pattern)):
            digest.update(f"{path.relative_to(root).as_posix()}\0".encode() + path.read_bytes() + b"\0")
        from nanostudy import version

        versions |= {"nanostudy": version.VERSION, "numerics version": str(version.NUMERICS)}
        versions["source"] = digest.hexdigest()[:12]
        if versions != expected:
            return versions, None
        from nanostudy.device import available_memory
        from nanostudy.errors import NanostudyError
        from nanostudy.settings import Resources
        from nanostudy.study.cluster.nodes import NodeInfo
        from nanostudy.training.machine import resolve

        try:
            machine = resolve(Resources(**resources))
        except NanostudyError as problem:
            return versions, str(problem)
        memory = available_memory(machine.device)
        return versions, NodeInfo(machine.device_name, machine.precision, memory, machine.compiled, machine.notes)

    return inspect
