"""Studies on a Ray cluster: a backend whose workers are actors, each with cores or a GPU, or a share of one, of its own.

Nodes may die, join and leave. After a checkpoint another worker goes on from there, and reports again what followed it, so a lost
node costs only the time since then. Ray is imported where it is used; the far end is actor.py.
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
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

from nanostudy.data.corpus import Corpus
from nanostudy.device import available_cores
from nanostudy.errors import NanostudyError, UsageError
from nanostudy.settings import Resources
from nanostudy.study.cluster.actor import TOKEN, WorkerActor
from nanostudy.study.cluster.checkpoints import CheckpointStore
from nanostudy.study.cluster.messages import Kept, Message, Part, Wanted, parts
from nanostudy.study.cluster.nodes import LOOK, Nodes, Roster, first_line, share_out
from nanostudy.study.plan import Capacity
from nanostudy.study.tasks import Broken, Done, Measure, Noted, Prepared, Report, Task, TrainStack
from nanostudy.study.workers import NOBODY
from nanostudy.training import stack as checkpoint

UNUSED = 10.0  # seconds without demand after which workers with nothing to do give their resources back
WAITED = 30.0  # seconds without a worker after which a note says so


def connect(
    address: str | None, checkpoints: str | None, workers: int | None, resources: Resources, experiments: int
) -> tuple[Cluster, Capacity, tuple[str, ...]]:
    """The cluster at the address, or one of this machine alone, once its nodes are inspected.

    Raises NanostudyError where a node has other code or versions than this machine, UsageError where the request is impossible.
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
        has = [node["Resources"] for node in roster.alive().values()]
        with_gpus = resources.device != "cpu" and any(node.get("GPU") for node in has)
        kind = "cuda" if with_gpus or resources.device == "cuda" else "cpu"
        most = max(1, experiments)
        share = share_out(has, kind, resources.threads, workers, most)
        nodes = Nodes(ray, roster, share, replace(resources, device=kind, threads=share.cpus))
        capacity, notes = nodes.inspect_all(workers, most)
        begun.pop_all()  # close() ends it
        return Cluster(ray, own, nodes, workers, most, checkpoint_store), capacity, notes


def _begin(ray: Any, address: str | None) -> None:
    address = address or os.environ.get("RAY_ADDRESS")
    for name in ("RAY_USAGE_STATS_ENABLED", "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO"):  # sends nothing, and prints less
        os.environ.setdefault(name, "0")
    quiet = {"log_to_driver": False, "logging_level": logging.CRITICAL}
    worker = ray._private.worker
    if hasattr(worker, "print_to_stdstream"):  # it prints whatever nodes report of their ends into the display
        worker.print_to_stdstream = lambda *_, **__: None
    try:
        if address:
            ray.init(address, **quiet)
        else:
            ray.init("local", num_cpus=available_cores(), include_dashboard=False, **quiet)
    except Exception as problem:  # Ray has many classes of them, and none in common
        where = f"at {address} cannot be used" if address else "of this machine did not start"
        raise NanostudyError(f"The Ray cluster {where}: {' '.join(str(problem).split())}") from problem


@dataclass
class _Worker:
    actor: Any
    call: Any  # the one under way, or None
    node: str | None = None  # None: it does not run yet
    task: Task | None = None
    unread: int = 0  # reports that arrived and were not handed on


class Cluster:
    """The backend. A worker that died is replaced while there is something to do."""

    def __init__(
        self, ray: Any, own: bool, nodes: Nodes, count: int | None, most: int, checkpoint_store: CheckpointStore
    ) -> None:
        self.ray, self.own, self.nodes, self.each = ray, own, nodes, nodes.each
        self.count, self.most, self.checkpoint_store = count, most, checkpoint_store
        self.stop: Callable[[], bool] = lambda: False
        self.token = secrets.token_hex(8)
        self.workers: dict[int, _Worker] = {}
        self.arrived: deque[tuple[int, Report]] = deque()
        self.corpora: dict[int, tuple[Corpus, Any]] = {}  # each lies in the cluster once, and travels once to a node
        self.demanded = self.staffed = self.looked = time.monotonic()  # when each was last

    def idle(self) -> list[int]:
        """Hires workers where none is free."""
        self.demanded = time.monotonic()
        usable = self.nodes.usable()
        free = [number for number, worker in self.workers.items() if worker.task is None and worker.node in usable]
        if not free:
            for _ in range(len(self.workers), self.count or min(self.nodes.room(), self.most)):
                self._hire()
        return free

    def _hire(self) -> None:
        share, usable = self.nodes.share, self.nodes.usable()
        unusable = [id for id in self.nodes.roster.alive() if id in self.nodes.fit and id not in usable]
        needs = {"num_cpus": share.cpus, "num_gpus": share.gpus or None, "memory": share.memory}
        where = {"label_selector": {"ray.io/node-id": f"!in({','.join(unusable)})"}} if unusable else {}
        options = {**needs, **where, "scheduling_strategy": "SPREAD", "max_restarts": 0}
        actor = self.ray.remote(WorkerActor).options(**options).remote(share.cpus)
        number = next(n for n in range(len(self.workers) + 1) if n not in self.workers)
        self.workers[number] = _Worker(actor, actor.node.remote())

    def start(self, worker: int, task: Task) -> None:
        one, corpus, transport = self.workers[worker], None, None
        one.task = task
        if isinstance(task, TrainStack):
            with contextlib.suppress(OSError):  # then the worker does not see the folder
                (task.folder / TOKEN).write_text(self.token, encoding="ascii")
            try:
                transport = self.checkpoint_store.begin(task)
            except (OSError, NanostudyError) as problem:  # the study waits for its folder, or for the address
                self._arrive(worker, _files_problem(problem))
                return
        bare: Any = task
        if isinstance(task, TrainStack | Measure):
            if id(task.corpus) not in self.corpora:
                self.corpora[id(task.corpus)] = task.corpus, self.ray.put(task.corpus)
            corpus, bare = self.corpora[id(task.corpus)][1], replace(bare, corpus=None)
        one.call = one.actor.start.remote(bare, corpus, self.each, self.token, transport)

    def next(self, timeout: float) -> tuple[int, Report] | None:
        self._look_around()
        for worker in self.workers.values():  # all its reports are dealt with
            if worker.task and worker.call is None and not worker.unread:
                worker.call = worker.actor.pull.remote(self.stop())
        end = time.monotonic() + timeout
        while not self.arrived:
            calls = {worker.call: number for number, worker in self.workers.items() if worker.call is not None}
            left = end - time.monotonic()
            if left <= 0:
                return None
            if not calls:
                time.sleep(min(left, 0.1))
                continue
            self.ray.wait(list(calls), timeout=left)
            for ref in self.ray.wait(list(calls), num_returns=len(calls), timeout=0)[0]:
                self._answered(calls[ref], ref)
        number, report = self.arrived.popleft()
        if number != NOBODY:
            report = self._hand_on(number, report)
        return number, report

    def _arrive(self, number: int, report: Report) -> None:
        self.arrived.append((number, report))
        if number != NOBODY:
            self.workers[number].unread += 1

    def _hand_on(self, number: int, report: Report) -> Report:
        worker = self.workers[number]
        worker.unread -= 1
        if isinstance(report, Prepared):  # it was told to do without kernels, and does not know why
            notes = dict.fromkeys((*report.machine.notes, *self.nodes.without_kernels))
            report = Prepared(replace(report.machine, notes=tuple(notes)))
        if isinstance(report, Done | Broken):
            if isinstance(worker.task, TrainStack):
                try:
                    self.checkpoint_store.end(worker.task, report, self.stop())
                except (OSError, NanostudyError) as problem:
                    report = _files_problem(problem)
            worker.task = None
        if isinstance(report, Broken):
            if report.cause == "lost":
                self.nodes.avoid(worker.node)
            self._dismiss(number)
        return report

    def _answered(self, number: int, ref: Any) -> None:
        """Takes the answer to a worker's call."""
        worker = self.workers[number]
        worker.call = None
        try:
            answer = self.ray.get(ref)
        except self.ray.exceptions.RayError as problem:
            broken = self._broken(problem, worker.node)
            if worker.task is None:
                self._dismiss(number)
                if broken.cause != "lost":
                    self._arrive(NOBODY, broken)
                return
            answer = [broken]
        if isinstance(answer, str):
            worker.node = answer
            return
        for message in answer or ():
            for report in self._reports(worker, message):
                self._arrive(number, report)
        if not worker.unread:
            worker.call = worker.actor.pull.remote(self.stop())

    def _reports(self, worker: _Worker, message: Message) -> Iterator[Report]:
        """What of the message is for the study; checkpoints are dealt with here."""
        if not isinstance(message, Wanted | Part | Kept):
            yield message
            return
        assert isinstance(worker.task, TrainStack)
        try:
            if isinstance(message, Wanted):
                file = checkpoint.newest(worker.task.path)
                for part in parts(file) if file else [Part(b"", 0, 0)]:
                    self.ray.get(
                        worker.actor.take.remote(part)
                    )  # one by one, so that only one lies in the cluster's memory
            else:
                self.checkpoint_store.keep(worker.task, message)
        except self.ray.exceptions.RayError as problem:
            node = self.nodes.roster.name(worker.node)
            yield Broken("lost", f"{node} did not take a checkpoint: {first_line(problem)}")
        except (OSError, NanostudyError) as problem:
            wanted = isinstance(message, Wanted)
            yield _files_problem(problem) if wanted else Noted(f"a checkpoint could not be kept: {problem}")

    def _broken(self, problem: Exception, node: str | None) -> Broken:
        errors, name = self.ray.exceptions, self.nodes.roster.name(node)
        if isinstance(problem, errors.OutOfMemoryError):  # whoever took it; a worker of one machine just dies, too
            return Broken("died", f"memory ran out on {name}, and Ray ended the worker")
        if isinstance(problem, errors.RayTaskError):
            return Broken("error", first_line(problem.cause))
        if node is None and "node has died" not in str(problem):
            last_line = str(problem).strip().rpartition("\n")[2].strip() or type(problem).__name__
            return Broken("died", f"a worker did not begin: {last_line}")
        gone = "node has died" in str(problem) or node not in {None, *self.nodes.roster.alive()}
        if isinstance(problem, errors.ActorDiedError) and not gone:
            return Broken("died", f"its worker on {name} died")
        self.nodes.avoid(node)
        return Broken("lost", f"{name} is lost")

    def _look_around(self) -> None:
        """Notices nodes that joined or left, and dismisses workers that nobody needs."""
        now = time.monotonic()
        if now - self.looked < LOOK:
            return
        self.looked = now
        for reason in self.nodes.look_around():
            self._arrive(NOBODY, Noted(f"not used: {reason}"))
        usable, surplus = self.nodes.usable(), len(self.workers) - max(self.count or 0, self.nodes.room())
        for number, worker in list(self.workers.items()):
            pending, inspected = worker.node is None, worker.node in self.nodes.fit
            unneeded = now - self.demanded > UNUSED or (inspected and worker.node not in usable)
            if worker.task is None and (unneeded or (pending and surplus > 0)):
                surplus -= 1
                self._dismiss(number)
        if any(worker.task or worker.node for worker in self.workers.values()):
            self.staffed = now
        elif now - self.staffed > WAITED and now - self.demanded < LOOK:
            self.staffed = now + 10 * WAITED  # says it again only then
            room = f"a node with room for a worker ({self.nodes.share})"
            self._arrive(NOBODY, Noted(f"waiting for {room}; `ray status` shows what there is"))

    def _dismiss(self, number: int) -> None:
        worker = self.workers.pop(number)
        with contextlib.suppress(Exception):  # it is gone
            self.ray.kill(worker.actor)

    def close(self) -> None:
        self.nodes.roster.ended.set()
        for number in list(self.workers):
            self._dismiss(number)
        self.corpora.clear()
        if self.own and self.ray.is_initialized():
            self.ray.shutdown()


def _files_problem(problem: Exception) -> Broken:
    return Broken("files", str(problem), getattr(problem.__cause__ or problem, "errno", None) or errno.EAGAIN)
