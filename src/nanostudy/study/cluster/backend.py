"""Studies on a Ray cluster: a backend whose workers are actors, each with cores or a GPU, or a share of one, of its own.

Nodes may die, join and leave. What was not told before a checkpoint is told again after it, by another worker, so that nothing is lost
with a node but the time since then. All Ray is in this module and imported where it is used; the far end is slot.py.
"""

from __future__ import annotations

import contextlib
import errno
import importlib
import importlib.util
import logging
import os
import secrets
import time
from collections import Counter, deque
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from nanostudy.data.corpus import Corpus
from nanostudy.device import available_cores
from nanostudy.errors import NanostudyError, UsageError
from nanostudy.settings import PRECISIONS, Resources
from nanostudy.study.cluster.actor import TOKEN, Facts, Kept, Part, Slot, Unseen, parts
from nanostudy.study.cluster.checkpoints import CheckpointStore
from nanostudy.study.cluster.nodes import LOOK, Node, Roster, Share, inspector, share_out
from nanostudy.study.plan import Capacity
from nanostudy.study.tasks import Broken, Done, Measure, Noted, Report, Task, TrainStack
from nanostudy.study.workers import MEMORY_SHARE, PROCESS_MEMORY
from nanostudy.text import counted
from nanostudy.training import stack as checkpoint

ANSWER = 120.0  # seconds in which the nodes answer at the start
UNUSED = 10.0  # seconds without demand after which workers with nothing to do give their resources back
SHUNNED = 60.0  # seconds in which a node that lost a worker gets no other; Ray needs 15 to know that it is dead
WAITED = 30.0  # seconds without a worker after which that is said
STILLBORN = 3  # workers in a row that fail before they begin, after which the study ends
NOBODY = -1  # whose notes are of the cluster itself


def connect(
    address: str | None, checkpoints: str | None, workers: int | None, resources: Resources, experiments: int
) -> tuple[Cluster, Capacity, tuple[str, ...]]:
    """A cluster that is there, or one of this machine alone, with its nodes looked at. Raises NanostudyError where one of them has
    other code or versions than this machine, UsageError where what is asked cannot be.
    """
    if resources.device not in ("auto", "cpu", "cuda"):
        raise UsageError(f"device={resources.device}: on a cluster Ray chooses the devices; auto, cpu or cuda.")
    if importlib.util.find_spec("ray") is None:
        raise UsageError("--executor ray needs the package ray, which is not installed: pip install 'nanostudy[ray]'.")
    checkpoint_store = CheckpointStore(checkpoints)
    ray: Any = importlib.import_module("ray")
    own = not ray.is_initialized()
    if own:
        _begin(ray, address)
    with contextlib.ExitStack() as begun:
        if own:
            begun.callback(ray.shutdown)
        roster = Roster(ray)
        begun.callback(roster.ended.set)
        nodes = [node["Resources"] for node in roster.alive().values()]
        with_gpus = resources.device != "cpu" and any(node.get("GPU") for node in nodes)
        kind = "cuda" if with_gpus or resources.device == "cuda" else "cpu"
        share = share_out(nodes, kind, resources.threads, workers, max(1, experiments))
        each = replace(resources, device=kind, threads=share.cpus)
        cluster = Cluster(ray, own, roster, share, each, workers, max(1, experiments), checkpoint_store)
        found = cluster.inspect()
        begun.pop_all()  # close() ends it
        return cluster, *found


def _begin(ray: Any, address: str | None) -> None:
    address = address or os.environ.get("RAY_ADDRESS")
    for name in ("RAY_USAGE_STATS_ENABLED", "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO"):  # sends nothing, and says less
        os.environ.setdefault(name, "0")
    quiet = {"log_to_driver": False, "logging_level": logging.CRITICAL}
    worker = ray._private.worker
    if hasattr(worker, "print_to_stdstream"):  # it prints into the display whatever a node tells of its ends
        worker.print_to_stdstream = lambda *_, **__: None
    try:
        if address:
            ray.init(address, **quiet)
        else:
            ray.init("local", num_cpus=available_cores(), include_dashboard=False, **quiet)
    except Exception as problem:  # Ray has a class for each, and none in common
        where = f"at {address} cannot be used" if address else "of this machine did not start"
        raise NanostudyError(f"The Ray cluster {where}: {' '.join(str(problem).split())}") from problem


@dataclass
class _Worker:
    actor: Any
    asked: Any  # the call that is under way
    node: str | None = None  # None: it does not run yet
    task: Task | None = None
    unread: int = 0  # reports that arrived and were not handed on


class Cluster:
    """The backend. A worker that died is replaced while there is something to do."""

    def __init__(
        self,
        ray: Any,
        own: bool,
        roster: Roster,
        share: Share,
        each: Resources,
        count: int | None,
        most: int,
        checkpoint_store: CheckpointStore,
    ) -> None:
        self.ray, self.own, self.roster, self.share, self.each = ray, own, roster, share, each
        self.count, self.most, self.checkpoint_store = count, most, checkpoint_store
        self.stop: Callable[[], bool] = lambda: False
        self.token = secrets.token_hex(8)
        self.workers: dict[int, _Worker] = {}
        self.arrived: deque[tuple[int, Report]] = deque()
        self.notes: deque[str] = deque()
        self.corpora: dict[int, tuple[Corpus, Any]] = {}  # each lies in the cluster once, and travels once to a node
        self.fit: dict[str, bool] = {}  # nodes that were looked at, and whether they may be used
        self.looks: dict[Any, str] = {}  # under way
        self.shunned: dict[str, float] = {}  # until when
        self.demand = self.busy = self.looked = time.monotonic()  # when each was last
        self.stillborn = 0
        self.inspector = inspector()
        self.same = self.inspector(None, {})[0]

    # --- the nodes

    def inspect(self) -> tuple[Capacity, tuple[str, ...]]:
        """What they have, and what a person should know of it. Raises NanostudyError where they have not what this machine has."""
        nodes = {id: node for id, node in self.roster.alive().items() if self.share.fit(node["Resources"])}
        if not nodes:
            raise UsageError(
                f"No node of the Ray cluster has room for a worker ({self.share}). `ray status` shows what there is."
            )
        for id in nodes:
            self._look_at(id)
        ready, late = self.ray.wait(list(self.looks), num_returns=len(self.looks), timeout=ANSWER)
        if late:
            names = ", ".join(self.roster.name(self.looks[ref]) for ref in late)
            raise NanostudyError(
                f"{names} did not answer within {ANSWER:.0f} seconds. `ray status` shows what is wrong."
            )
        found: dict[str, Facts] = {}
        problems = []
        for ref in ready:
            id = self.looks.pop(ref)
            facts = self._read(ref, id)
            if isinstance(facts, str):
                problems.append(facts)
            else:
                found[id] = facts
        if problems:
            raise NanostudyError("\n".join(problems))
        return self._capacity(found), self._notes(found)

    def _look_at(self, id: str) -> None:
        """Needs no free core. A process that has seen all GPUs is used for nothing else."""
        strategies = importlib.import_module("ray.util.scheduling_strategies")
        options = {"num_cpus": 0, "max_retries": 0, "max_calls": int(bool(self.share.gpus))}
        look = self.ray.remote(**options)(self.inspector)
        affinity = strategies.NodeAffinitySchedulingStrategy(id, soft=False)
        ref = look.options(scheduling_strategy=affinity).remote(self.same, asdict(self.each))
        self.looks[ref] = id

    def _read(self, ref: Any, id: str) -> Facts | str:
        """What was found there, or why the node cannot be used."""
        name = self.roster.name(id)
        try:
            found, facts = self.ray.get(ref)
        except self.ray.exceptions.RayError as problem:
            return f"{name} could not be looked at: {_first_line(problem)}"
        differing = [f"{key} {found[key]} there, {here} here" for key, here in self.same.items() if found[key] != here]
        if differing:
            return f"{name} has other code or versions: {'; '.join(differing)}. Install the same there, and run again."
        if isinstance(facts, str):
            return f"{name}: {facts}"
        self.fit[id] = True
        return facts

    def _capacity(self, found: Mapping[str, Facts]) -> Capacity:
        workers = max(1, min(self._room(), self.count or self.most))
        precision = min((facts.precision for facts in found.values()), key=PRECISIONS.index)  # what takes most memory
        memory = None if self.share.memory is None else max(0, self.share.memory - PROCESS_MEMORY)
        if self.share.gpus:
            free = [facts.memory for facts in found.values() if facts.memory is not None]
            memory = int(MEMORY_SHARE * min(free) * self.share.gpus) if free else None
        return Capacity(self.each.device, precision, workers, memory)

    def _notes(self, found: Mapping[str, Facts]) -> tuple[str, ...]:
        kinds = Counter(f"{facts.device_name}, {facts.precision}" for facts in found.values())
        told = [f"a Ray cluster of {counted(len(found), 'node')} that can be used"]
        if len(kinds) > 1:
            which = "; ".join(f"{kind}: {counted(count, 'node')}" for kind, count in kinds.items())
            told.append(f"different kinds of device ({which}): each result tells where it was made")
        room = self._room()
        if self.count and room < self.count:
            told.append(
                f"there is room for {room} of the {counted(self.count, 'worker')} asked for; others begin where nodes join"
            )
        return (*told, *dict.fromkeys(note for facts in found.values() for note in facts.notes))

    def _usable(self) -> dict[str, Node]:
        now = time.monotonic()
        alive = self.roster.alive()
        return {id: node for id, node in alive.items() if self.fit.get(id) and self.shunned.get(id, 0.0) < now}

    def _room(self) -> int:
        return sum(self.share.fit(node["Resources"]) for node in self._usable().values())

    def _look_around(self) -> None:
        """Sees who joined and who left, and gives back what nobody needs."""
        now = time.monotonic()
        if now - self.looked < LOOK:
            return
        self.looked, nodes = now, self.roster.alive()
        for id, node in nodes.items():
            if id in self.fit or id in self.looks.values():
                continue
            if self.share.fit(node["Resources"]):
                self._look_at(id)
            elif replace(self.share, memory=None).fit(node["Resources"]):
                self.fit[id] = False
                has = node["Resources"].get("memory", 0) / 2**30
                self.notes.append(
                    f"not used: {self.roster.name(id)} has {has:.1f} GiB free, and a worker asks for {self.share}"
                )
        for ref in self.ray.wait(list(self.looks), num_returns=len(self.looks), timeout=0)[0] if self.looks else ():
            id = self.looks.pop(ref)
            facts = self._read(ref, id)
            if isinstance(facts, str):
                self.fit[id] = False
                if id in nodes:
                    self.notes.append(f"not used: {facts}")
        usable, surplus = self._usable(), len(self.workers) - max(self.count or 0, self._room())
        for number, worker in list(self.workers.items()):
            pending, looked_at = worker.node is None, worker.node in self.fit
            unneeded = now - self.demand > UNUSED or (looked_at and worker.node not in usable)
            if worker.task is None and (unneeded or (pending and surplus > 0)):
                surplus -= 1
                self._end(number)
        if any(worker.task or worker.node for worker in self.workers.values()):
            self.busy = now
        elif now - self.busy > WAITED and now - self.demand < LOOK:
            self.busy = now + 10 * WAITED
            self.notes.append(
                f"waiting for a node with room for a worker ({self.share}); `ray status` shows what there is"
            )

    # --- the backend

    def idle(self) -> list[int]:
        """Asked where there is something to do: where nobody is free for it, workers are asked of the cluster."""
        self.demand = time.monotonic()
        usable = self._usable()
        free = [number for number, worker in self.workers.items() if worker.task is None and worker.node in usable]
        if not free:
            for _ in range(len(self.workers), self.count or min(self._room(), self.most)):
                self._hire()
        return free

    def _hire(self) -> None:
        usable = self._usable()
        unfit = [id for id in self.roster.alive() if id in self.fit and id not in usable]
        options: dict[str, Any] = {"num_cpus": self.share.cpus, "max_restarts": 0, "scheduling_strategy": "SPREAD"}
        if self.share.gpus:
            options["num_gpus"] = self.share.gpus
        if self.share.memory is not None:
            options["memory"] = self.share.memory
        if unfit:
            options["label_selector"] = {"ray.io/node-id": f"!in({','.join(unfit)})"}
        actor = self.ray.remote(Slot).options(**options).remote(self.share.cpus)
        number = next(n for n in range(len(self.workers) + 1) if n not in self.workers)
        self.workers[number] = _Worker(actor, actor.where.remote())

    def start(self, worker: int, task: Task) -> None:
        one, corpus, home, at = self.workers[worker], None, None, None
        one.task = task
        if isinstance(task, TrainStack):
            with contextlib.suppress(OSError):  # then it counts as unseen
                (task.folder / TOKEN).write_text(self.token, encoding="ascii")
            try:
                home, at = self.checkpoint_store.begin(task)
            except (OSError, NanostudyError) as problem:  # the study waits for its folder, or for the address
                one.unread += 1
                self.arrived.append((worker, _of_files(problem)))
                return
        bare: Any = task
        if isinstance(task, TrainStack | Measure):
            corpus, bare = self._shared(task.corpus), replace(bare, corpus=None)
        one.asked = one.actor.start.remote(bare, corpus, self.each, self.token, home, at)

    def _shared(self, corpus: Corpus) -> Any:
        if id(corpus) not in self.corpora:
            self.corpora[id(corpus)] = corpus, self.ray.put(corpus)
        return self.corpora[id(corpus)][1]

    def next(self, timeout: float) -> tuple[int, Report] | None:
        self._look_around()
        for worker in self.workers.values():  # all that they told was dealt with
            if worker.task and worker.asked is None and not worker.unread:
                worker.asked = worker.actor.pull.remote(self.stop())
        end = time.monotonic() + timeout
        while not self.arrived and not self.notes:
            asked = {worker.asked: number for number, worker in self.workers.items() if worker.asked is not None}
            left = end - time.monotonic()
            if left <= 0:
                return None
            if not asked:
                time.sleep(min(left, 0.1))
                continue
            self.ray.wait(list(asked), timeout=left)
            for ref in self.ray.wait(list(asked), num_returns=len(asked), timeout=0)[0]:
                self._hear(asked[ref], ref)
        if self.notes:
            return NOBODY, Noted(self.notes.popleft())
        number, report = self.arrived.popleft()
        worker = self.workers[number]
        worker.unread -= 1
        if isinstance(report, Done | Broken):
            if isinstance(worker.task, TrainStack):
                try:
                    self.checkpoint_store.end(worker.task, report, self.stop())
                except (OSError, NanostudyError) as problem:
                    report = _of_files(problem)
            worker.task = None
        if isinstance(report, Broken):
            if report.cause == "lost" and worker.node:
                self.shunned[worker.node] = time.monotonic() + SHUNNED
            self._end(number)
        return number, report

    def _hear(self, number: int, ref: Any) -> None:
        worker = self.workers[number]
        worker.asked = None
        try:
            told = self.ray.get(ref)
        except self.ray.exceptions.RayError as problem:
            broken = self._broken(problem, worker.node)
            if worker.task:
                told = [broken]
            else:
                self._end(number)
                self.stillborn += broken.cause != "lost"
                if self.stillborn >= STILLBORN:
                    raise NanostudyError(f"Workers fail before they begin: {broken.reason}") from problem
                return
        if isinstance(told, str):
            worker.node, self.stillborn = told, 0
            return
        for report in told or ():
            for heard in self._received(worker, report):
                worker.unread += 1
                self.arrived.append((number, heard))
        if not worker.unread:
            worker.asked = worker.actor.pull.remote(self.stop())

    def _broken(self, problem: Exception, node: str | None) -> Broken:
        errors, name = self.ray.exceptions, self.roster.name(node)
        if isinstance(problem, errors.OutOfMemoryError):  # whoever took it: likewise a worker of this machine just dies
            return Broken("died", f"memory ran out on {name}, and Ray ended the worker")
        if isinstance(problem, errors.RayTaskError):
            return Broken("error", _first_line(problem.cause))
        if node is None and "node has died" not in str(problem):
            return Broken("died", f"a worker did not begin: {_last_line(problem)}")
        gone = "node has died" in str(problem) or node not in {None, *self.roster.alive()}
        if isinstance(problem, errors.ActorDiedError) and not gone:
            return Broken("died", f"its worker on {name} died")
        if node:
            self.shunned[node] = time.monotonic() + SHUNNED
        return Broken("lost", f"{name} is lost")

    def _received(self, worker: _Worker, told: Report | Unseen | Part | Kept) -> Iterator[Report]:
        """What is for the study; the rest is dealt with here."""
        if not isinstance(told, Unseen | Part | Kept):
            yield told
            return
        assert isinstance(worker.task, TrainStack)
        if isinstance(told, Unseen):
            try:
                self._give(worker, checkpoint.newest(worker.task.path))
            except (OSError, NanostudyError) as problem:
                yield _of_files(problem)
            except self.ray.exceptions.RayError as problem:
                yield Broken(
                    "lost", f"{self.roster.name(worker.node)} did not take a checkpoint: {_first_line(problem)}"
                )
            return
        try:
            self.checkpoint_store.keep(worker.task, told)
        except (OSError, NanostudyError) as problem:
            yield Noted(f"a checkpoint could not be kept: {problem}")

    def _give(self, worker: _Worker, file: Path | None) -> None:
        """Part after part: no more than one lies in the cluster's memory."""
        size = 0
        for part in parts(file) if file else ():
            self.ray.get(worker.actor.take.remote(part))
            size = part.size
        worker.actor.begin.remote(size)

    def _end(self, number: int) -> None:
        worker = self.workers.pop(number)
        with contextlib.suppress(Exception):  # it is gone
            self.ray.kill(worker.actor)

    def close(self) -> None:
        self.roster.ended.set()
        for number in list(self.workers):
            self._end(number)
        self.corpora.clear()
        if self.own and self.ray.is_initialized():
            self.ray.shutdown()


def _of_files(problem: Exception) -> Broken:
    return Broken("files", str(problem), getattr(problem.__cause__ or problem, "errno", None) or errno.EAGAIN)


def _last_line(problem: object) -> str:
    return next((line.strip() for line in reversed(str(problem).splitlines()) if line.strip()), type(problem).__name__)


def _first_line(problem: object) -> str:
    lines = str(problem).strip().splitlines()
    return f"{type(problem).__name__}{f': {lines[0]}' if lines else ''}"
