"""The policy of a study: who trains next, what is recorded, what happens when something fails.

One loop in one process, which alone writes the store and the run folders. A backend starts tasks and yields their
reports; it decides nothing.
"""

from __future__ import annotations

import contextlib
import shutil
import time
from collections import Counter, deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict
from pathlib import Path

from nanostudy.errors import Interrupted, NanostudyError
from nanostudy.resources import Resources
from nanostudy.study.artifacts import Keeping
from nanostudy.study.bisect import apart, checkpoint_of, divide, make_folder
from nanostudy.study.folder import STACKS, StudyFolder, adopt_evaluations
from nanostudy.study.grid import Entry
from nanostudy.study.plan import Capacity, cost, plan, stack_key
from nanostudy.study.progress import Assignment, Listener, Snapshot, seconds_left
from nanostudy.study.retry import Patience
from nanostudy.study.store import RESULTS, UNDONE, StackRow
from nanostudy.study.tasks import Broken, Done, Noted, Prepared, Report, Sampled, TrainStack
from nanostudy.study.workers import Backend
from nanostudy.text import duration
from nanostudy.tracking import Tracking
from nanostudy.training.events import Evaluated, Event, Finished, Logged, Progress, Saving, Started, Stopped
from nanostudy.training.recorder import Recorder
from nanostudy.training.run_folder import CHECKPOINT

DEATHS = 3  # of its worker without progress in between, after which a stack is taken apart


class Execution:
    """Runs chosen experiments of an open study to their end."""

    def __init__(
        self,
        folder: StudyFolder,
        chosen: Sequence[Entry],
        backend: Backend,
        capacity: Capacity,
        resources: Resources,
        listener: Listener,
        stop: Callable[[], bool] = lambda: False,
        save_every: float = 60.0,
        tracked: Tracking | None = None,
    ) -> None:
        self.folder, self.store, self.backend, self.capacity = folder, folder.store, backend, capacity
        self.resources, self.listener, self.stop, self.save_every = resources, listener, stop, save_every
        self.tracked = tracked
        self.entries = {entry.name: entry for entry in folder.entries}
        self.chosen = {entry.name for entry in chosen}
        self.identities = self.store.identities()
        self.status = self.store.statuses()
        self.flops = {
            name: cost(e.experiment, folder.texts.corpus(e.experiment)).flops for name, e in self.entries.items()
        }
        # sums that are kept, so that an experiment's end costs as much among many as among few
        self.counts = Counter(self.status[name] for name in self.chosen)
        self.total = sum(self.flops[name] for name in self.chosen)
        self.done = sum(self.flops[name] for name in self.chosen if not self.undone(name))
        self.stack_flops: dict[int, int] = {}
        self.to_train: deque[StackRow] = deque()
        self.assignments: dict[int, Assignment] = {}
        self.deaths: Counter[tuple[str, ...]] = Counter()  # of the worker that has these in hand, since it last got on
        backend.stop = stop
        self.stillborn = 0  # workers that failed before they began, in a row
        self.stopping = False
        self.patiently = Patience(folder.path, listener.say, stop)
        self.keeping = Keeping(folder, self.patiently, listener.say)
        self.best = next(iter(self.store.best(1)), None)
        self.committed, self.commit_took, self.shown, self.show_took = time.monotonic(), 0.0, 0.0, 0.0

    def run(self) -> None:
        """Returns when all is done. Raises Interrupted where it was asked to stop; everything is saved then."""
        try:
            self.gather()
            while self.assignments or (not self.stopping and (self.to_train or self.keeping.waiting)):
                if self.stop() and not self.stopping:
                    self.stopping = True
                    self.listener.say("stopping: saving what is under way")
                if not self.stopping:
                    self.assign()
                arrived = self.backend.next(0.5)
                if arrived:
                    self.hear(*arrived)
                self.keep_up()
                self.folder.owner.check()
        finally:
            self.backend.close()
            self.store.end_sitting()
            self.store.set_progress(None, [])
            with contextlib.suppress(NanostudyError):  # what could not be written is made up for by the next sitting
                self.store.commit()
        if self.stopping:
            raise Interrupted("Stopped. Everything is saved; the same command goes on.")

    # --- what there is to do

    def gather(self) -> None:
        """Stacks of an earlier sitting go on as they were; what is in none is planned."""
        stacks = self.store.open_stacks()
        stacks += self.recover({stack.id for stack in stacks}, {name for stack in stacks for name in stack.members})
        in_stacks: set[str] = set()
        for stack in stacks:
            if not any(self.undone(name) for name in stack.members):
                self.close(stack)
                continue
            in_stacks.update(stack.members)
            if any(name in self.chosen and self.undone(name) for name in stack.members):
                self.to_train.append(stack)
        fresh = [self.entries[name] for name in self.chosen if self.undone(name) and name not in in_stacks]
        self.add_stacks(
            ([e.name for e in s.members], s.width) for s in plan(fresh, self.folder.texts.corpora, self.capacity)
        )
        silent: dict[object, list[str]] = {}  # done, and have written nothing; those of open stacks do it in their turn
        for name, last in self.store.results(sampled=False).items():
            if name not in in_stacks:
                silent.setdefault((last, stack_key(self.entries[name].experiment)), []).append(name)
        for names in silent.values():
            self.keeping.later(names)
        self.patiently(self.keeping.drop_weights)
        self.commit()

    def recover(self, open_stacks: set[int], in_stacks: set[str]) -> list[StackRow]:
        """Checkpoints that the store does not know, as after a rebuild, become stacks again; what else a kill left goes."""
        found = []
        known_places = {str(id) for id in open_stacks}
        for place in [p for p in self.folder.path.glob(f"{STACKS}/*") if p.name not in known_places]:
            slots, identities = checkpoint_of(place / CHECKPOINT)
            known = all(self.identities.get(name) == identity for name, identity in identities.items())
            if slots and known and not in_stacks & set(identities) and any(self.undone(name) for name in identities):
                in_stacks |= set(identities)
                place = place.rename(place.with_name(f"found-{place.name}"))  # out of the way of new ids
                found.append((place, tuple(identities), len(slots)))
            else:
                shutil.rmtree(place, ignore_errors=True)
        rows = self.store.add_stacks([(names, width) for _, names, width in found])
        for (place, _, _), row in zip(found, rows, strict=True):
            place.rename(self.place(row))
        return rows

    def undone(self, name: str) -> bool:
        return self.status[name] in UNDONE

    def becomes(self, name: str, status: str) -> None:
        if name in self.chosen:
            self.counts[self.status[name]] -= 1
            self.counts[status] += 1
            self.done += self.flops[name] * (self.undone(name) - (status in UNDONE))
        self.status[name] = status

    def add_stacks(self, stacks: Iterable[tuple[Sequence[str], int]]) -> None:
        self.to_train.extend(self.store.add_stacks(stacks))

    def assign(self) -> None:
        """Every idle worker takes the longest stack left; texts are written first, since weights may go after them."""
        for worker in self.backend.idle() if self.keeping.waiting or self.to_train else ():
            if self.keeping.waiting:
                names = self.keeping.waiting.popleft()
                writing = self.keeping.task(names)
                if writing:
                    self.assignments[worker] = Assignment(f"samples of {_and_more(names)}", names, None)
                    self.backend.start(worker, writing)
            elif self.to_train:
                stack = self.to_train.popleft()
                label = _and_more([name for name in stack.members if self.undone(name)])
                self.assignments[worker] = Assignment(label, stack.members, stack)
                self.backend.start(worker, self.training(stack))

    def training(self, stack: StackRow) -> TrainStack:
        jobs = tuple(self.folder.texts.job(self.entries[name]) for name in stack.members)
        corpus, place = self.folder.texts.corpus(jobs[0].experiment), self.place(stack)
        self.patiently(lambda: make_folder(place))
        return TrainStack(jobs, corpus, place, stack.width, self.save_every)

    def place(self, stack: StackRow) -> Path:
        return self.folder.path / STACKS / str(stack.id)

    # --- what is told

    def hear(self, worker: int, report: Report) -> None:
        if isinstance(report, Noted) and worker not in self.assignments:
            self.listener.say(report.text, "yellow")
            return
        assignment = self.assignments[worker]
        if isinstance(report, Prepared):
            assignment.machine, self.stillborn = report.machine, 0
        elif isinstance(report, Noted):
            self.note(assignment, report.text)
        elif isinstance(report, Sampled):
            self.patiently(lambda: self.keeping.keep(report.texts))
        elif isinstance(report, Done):
            del self.assignments[worker]
            if assignment.stack and not self.stop():
                self.conclude(assignment.stack)
        elif isinstance(report, Broken):
            del self.assignments[worker]
            self.mend(assignment, report)
        elif isinstance(report, Event):
            self.follow(assignment, report)

    def follow(self, assignment: Assignment, event: Event) -> None:
        """What is told of a stack as a whole; the rest is for those of its members that are not done yet."""
        for text in event.notes if isinstance(event, Started) else ():
            self.note(assignment, text)
        if isinstance(event, Saving):
            assignment.saving = True
            self.commit()
        elif assignment.saving:  # what follows tells that it is saved
            assignment.saving = False
            self.deaths.pop(assignment.members, None)
        if self.undone(event.name):  # else it finished after the last checkpoint, and does so again
            self.record(assignment, event)

    def note(self, assignment: Assignment, text: str) -> None:
        """Once, though every member of a stack may tell it."""
        if assignment.stack and text not in assignment.notes:
            assignment.notes.add(text)
            self.store.note("note", text, stack=assignment.stack.id)
            self.listener.say(f"{assignment.label}: {text}", "yellow")

    def record(self, assignment: Assignment, event: Event) -> None:
        assert assignment.stack
        name = event.name
        if name not in assignment.recorders:
            assignment.recorders[name] = self.patiently(lambda: self.claim(name, assignment))
        self.patiently(lambda: assignment.recorders[name].record(event))
        if self.tracked:
            recorder = assignment.recorders[name]
            self.tracked.hear(event, recorder.folder, recorder.experiment.as_dict(), recorder.identity)
        if isinstance(event, Started):
            assert assignment.machine
            machine = assignment.machine.as_dict()
            self.store.started(name, event.step, event.evaluated_at, event.members, assignment.stack.id, machine)
            self.patiently(lambda: adopt_evaluations(self.folder, name))
            self.becomes(name, "running")
        elif isinstance(event, Progress):
            assignment.steps[name] = event.step
            assignment.seconds_left, assignment.told_at = event.seconds_left, time.monotonic()
        elif isinstance(event, Logged):
            assignment.rates[name] = event.tokens_per_second
        elif isinstance(event, Evaluated):
            values = (event.step, event.tokens, event.seconds, event.train_loss, event.val_loss)
            self.store.evaluated(name, *values)
        elif isinstance(event, Stopped):
            self.store.progressed(name, event.step)
        elif isinstance(event, Finished):
            self.finished(assignment, event)

    def claim(self, name: str, assignment: Assignment) -> Recorder:
        job = self.folder.texts.job(self.entries[name])
        folder, corpus = self.folder.run(name), self.folder.texts.corpus(job.experiment)
        folder.mkdir(exist_ok=True)
        assert assignment.machine
        recorder = Recorder(folder, job.experiment, job.identity, corpus, assignment.machine)
        recorder.claim(asdict(self.resources))
        return recorder

    def finished(self, assignment: Assignment, event: Finished) -> None:
        name = event.name
        result = event.result
        self.store.finished(result)
        self.commit()
        assert assignment.stack
        self.stack_flops[assignment.stack.id] = self.left(assignment.stack) - self.flops[name]
        self.becomes(name, result.status)
        for told in (assignment.steps, assignment.rates, assignment.recorders):
            told.pop(name, None)
        done = len(self.chosen) - sum(self.counts[status] for status in UNDONE)
        count = f"[{done}/{len(self.chosen)}]"
        if result.reason:
            self.listener.say(f"{count} {name} diverged: {result.reason}", "red")
        else:
            row = self.patiently(lambda: self.store.row(name))
            self.best = self.patiently(lambda: self.store.best(1))[0]
            took = duration(result.seconds)
            self.listener.say(f"{count} {name}   train {row.train_loss:.4f}   val {row.val_loss:.4f}   {took}")

    def conclude(self, stack: StackRow) -> None:
        """A stack has come to its end: its models write, its checkpoint goes."""
        left = [name for name in stack.members if self.undone(name)]
        if left:  # their rows were lost with a run folder or a store, and the checkpoint knew them as done
            self.add_stacks([(left, stack.width)])
        self.close(stack)
        self.sample(stack)

    def sample(self, stack: StackRow) -> None:
        self.keeping.later(name for name in stack.members if self.status[name] in RESULTS)

    def close(self, stack: StackRow) -> None:
        self.store.close_stack(stack.id)
        self.commit()
        shutil.rmtree(self.place(stack), ignore_errors=True)

    # --- what goes wrong

    def mend(self, assignment: Assignment, broken: Broken) -> None:
        if self.stopping:
            self.listener.say(f"{assignment.label}: {broken.reason}; its last checkpoint is kept", "yellow")
        elif broken.cause == "lost":  # nobody's fault, however often
            self.listener.say(f"{assignment.label}: {broken.reason}; it goes on from its last checkpoint", "yellow")
            self.again(assignment)
        elif assignment.machine is None and broken.cause != "files":  # no experiment's fault
            self.stillborn += 1
            if self.stillborn >= DEATHS:
                raise NanostudyError(f"Workers fail before they begin ({broken.reason}); --executor inline shows why.")
            self.again(assignment)
        elif broken.cause == "files":
            gone = self.patiently.wait(broken.problem, self.deaths[assignment.members])
            self.deaths[assignment.members] = 0 if gone else self.deaths[assignment.members] + 1
            self.again(assignment)
        elif broken.cause == "died" and self.deaths[assignment.members] < DEATHS - 1:
            self.deaths[assignment.members] += 1
            self.listener.say(f"{assignment.label}: {broken.reason}; it goes on from its last checkpoint", "yellow")
            self.again(assignment)
        elif assignment.stack:
            self.isolate(assignment.stack, broken.reason)
        else:
            self.keeping.failed(assignment.members, broken.reason)

    def again(self, assignment: Assignment) -> None:
        if assignment.stack:
            self.to_train.appendleft(assignment.stack)
        else:
            self.keeping.waiting.append(assignment.members)

    def isolate(self, stack: StackRow, reason: str) -> None:
        """Takes a stack that keeps failing apart (see apart.py)."""
        left = [name for name in stack.members if self.undone(name)]
        if not left:
            self.conclude(stack)
            return
        path = self.place(stack) / CHECKPOINT
        saved, _ = self.patiently(lambda: checkpoint_of(path))
        # the first in order have the slots that others left
        result = apart(left, saved or left[: stack.width])
        if result.at_fault:
            self.fail(result.at_fault, reason)
        else:
            self.listener.say(f"{_and_more(left)}: {reason} Going on in smaller stacks.", "yellow")
        stacks = self.store.add_stacks([(names, result.width) for names in result.parts])
        if saved:
            places = {self.place(s) / CHECKPOINT: {name: self.identities[name] for name in s.members} for s in stacks}
            self.patiently(lambda: divide(path, places))
        self.close(stack)  # and with it, in one transaction, the others are there
        self.sample(stack)
        self.to_train.extendleft(reversed(stacks))

    def fail(self, name: str, reason: str) -> None:
        self.store.failed(name, reason)
        self.store.note("failed", reason, experiment=name)
        self.becomes(name, "failed")
        self.listener.say(f"{name} failed: {reason}", "red")

    # --- accounts

    def commit(self) -> None:
        start = time.monotonic()
        self.patiently(self.store.commit)
        self.committed = time.monotonic()
        self.commit_took = self.committed - start

    def left(self, stack: StackRow) -> int:
        """The arithmetic of its members that are not done; counted once, and from then on kept by finished()."""
        if stack.id not in self.stack_flops:
            self.stack_flops[stack.id] = sum(self.flops[name] for name in stack.members if self.undone(name))
        return self.stack_flops[stack.id]

    def spent(self, name: str, step: int) -> float:
        """The arithmetic of an experiment so far."""
        return self.flops[name] * step / max(1, self.entries[name].experiment.max_iters)

    def snapshot(self) -> Snapshot:
        assignments, done = [], float(self.done)
        for assignment in self.assignments.values():
            under_way = {name: self.spent(name, step) for name, step in assignment.steps.items() if self.undone(name)}
            done += sum(flops for name, flops in under_way.items() if name in self.chosen)
            assignments.append(
                (
                    assignment,
                    max(0.0, self.left(assignment.stack) - sum(under_way.values())) if assignment.stack else 0.0,
                )
            )
        queued = [self.left(stack) for stack in self.to_train]
        return Snapshot(
            counts=dict(+self.counts),
            workers=dict(self.assignments),
            best=self.best,
            seconds_left=seconds_left(assignments, queued, self.capacity.workers),
            share=min(1.0, done / self.total) if self.total else 1.0,
        )

    def keep_up(self) -> None:
        """Tells those who look, seldom enough to cost nothing: a commit waits for the disk."""
        now = time.monotonic()
        if now - self.shown < max(0.25, 20 * self.show_took):
            return
        self.shown = now
        snapshot = self.snapshot()
        self.listener.show(snapshot)
        self.show_took = time.monotonic() - now
        if now - self.committed > max(2.0, 50 * self.commit_took):
            for assignment in self.assignments.values():
                for name, step in assignment.steps.items():
                    self.store.progressed(name, step)
            workers = [
                {
                    "worker": worker,
                    "doing": assignment.label,
                    "tokens_per_second": round(sum(assignment.rates.values())),
                }
                for worker, assignment in self.assignments.items()
            ]
            self.store.set_progress(snapshot.seconds_left, workers)
            self.commit()


def _and_more(names: Sequence[str]) -> str:
    return names[0] if len(names) == 1 else f"{names[0]} and {len(names) - 1} more"
