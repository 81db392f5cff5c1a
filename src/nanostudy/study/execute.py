"""The policy of a study: who trains next, what is recorded, what happens when something fails.

One loop in one process, which alone writes the store and the run folders. A backend starts tasks and yields their
reports; it decides nothing.
"""

from __future__ import annotations

import contextlib
import shutil
import time
from collections import Counter, deque
from collections.abc import Callable, Collection, Sequence
from dataclasses import asdict
from pathlib import Path

from nanostudy.errors import DamagedCheckpoint, Interrupted, NanostudyError
from nanostudy.result import Status
from nanostudy.settings import Resources
from nanostudy.study.artifacts import Artifacts
from nanostudy.study.folder import STACKS, StudyFolder, restore_tables
from nanostudy.study.grid import Entry
from nanostudy.study.names import label, varying
from nanostudy.study.plan import Capacity, plan
from nanostudy.study.progress import Assignment, Listener, Snapshot, StudyProgress
from nanostudy.study.retry import Retry
from nanostudy.study.store import StackRow
from nanostudy.study.tasks import Broken, Done, Noted, Prepared, Report, Sampled, TrainStack
from nanostudy.study.workers import NOBODY, Backend
from nanostudy.text import duration
from nanostudy.tracking import Tracking
from nanostudy.training import stack as checkpoint
from nanostudy.training.events import Evaluated, Event, Finished, Logged, Progress, Saving, Started, Stopped
from nanostudy.training.recorder import Recorder
from nanostudy.training.run_folder import CHECKPOINT, read_rows
from nanostudy.training.train import Job

MOST_DEATHS = 3  # a stack whose worker died so often without progress in between is split
MOST_FAILED_STARTS = 3  # after so many in a row a worker gets no more work


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
        self.inputs = folder.design.inputs
        self.entries = {entry.name: entry for entry in folder.design.entries}
        self.varying = varying(folder.design.studies)
        self.identities = self.store.identities()
        self.progress = StudyProgress(folder, [entry.name for entry in chosen])
        self.retry = Retry(folder.path, listener.say, stop)
        self.artifacts = Artifacts(folder, self.retry, listener.say)
        self.to_train: deque[StackRow] = deque()
        self.assignments: dict[int, Assignment] = {}
        self.failures: Counter[tuple[str, ...]] = Counter()  # by a task's members, since their last progress
        self.failed_starts: Counter[int] = Counter()  # in a row, by worker
        self.failed_because = ""
        self.stopping = False
        self.best = next(iter(self.store.best(1)), None)
        self.committed, self.commit_took, self.shown, self.show_took = time.monotonic(), 0.0, 0.0, 0.0
        backend.stop = stop

    def run(self) -> None:
        """Returns when all is done. Raises Interrupted where it was asked to stop; everything is saved then."""
        try:
            self.collect_work()
            while self.assignments or (not self.stopping and (self.to_train or self.artifacts.waiting)):
                if self.stop() and not self.stopping:
                    self.stopping = True
                    self.listener.say("stopping: saving what is under way")
                if not self.stopping:
                    self.assign()
                arrived = self.backend.next(0.5)
                self.folder.lease.check()  # before more is written
                if arrived:
                    self.handle(*arrived)
                self.publish()
        finally:
            self.backend.close()
            self.store.end_session()
            self.store.set_progress(None, [])
            if self.folder.lease.taken_by:  # it is the store of the process there
                self.store.discard()
            with contextlib.suppress(NanostudyError):  # the next session makes up for what could not be written
                self.store.commit()
        if self.stopping:
            raise Interrupted("Stopped. Everything is saved; the same command goes on.")

    # --- the work

    def collect_work(self) -> None:
        """Stacks of an earlier session go on as they were; experiments in none are planned."""
        stacks = self.store.open_stacks()
        stacks += self.recover_stacks(stacks)
        in_stacks: set[str] = set()
        chosen = self.progress.chosen
        for stack in stacks:
            undone = self.progress.undone(stack)
            if not undone:
                self.close_stack(stack)
                continue
            in_stacks.update(stack.members)
            if not chosen.isdisjoint(undone):
                self.to_train.append(stack)
        fresh = [self.entries[name] for name in chosen if self.progress.is_undone(name) and name not in in_stacks]
        planned = plan(fresh, self.inputs.corpora, self.capacity)
        self.to_train.extend(self.store.add_stacks(([e.name for e in s.members], s.width) for s in planned))
        without_samples: dict[int | None, list[str]] = {}  # members of open stacks write when their stack has ended
        for name, last in self.store.results(sampled=False).items():
            if name not in in_stacks:
                without_samples.setdefault(last, []).append(name)
        for names in without_samples.values():
            self.artifacts.queue(names)
        self.retry(self.artifacts.delete_weights)
        self.commit()

    def recover_stacks(self, known: Sequence[StackRow]) -> list[StackRow]:
        """Checkpoints that the store does not know, as after a rebuild, become stacks again; other leftovers are removed."""
        found, taken = [], {name for stack in known for name in stack.members}
        places = {str(stack.id) for stack in known}
        for place in [p for p in self.folder.path.glob(f"{STACKS}/*") if p.name not in places]:
            slots, identities = read_checkpoint(place / CHECKPOINT)
            same = all(self.identities.get(name) == identity for name, identity in identities.items())
            wanted = same and any(map(self.progress.is_undone, identities))
            if slots and wanted and taken.isdisjoint(identities):
                taken.update(identities)
                place = place.rename(place.with_name(f"found-{place.name}"))  # out of the way of new ids
                found.append((place, tuple(identities), len(slots)))
            else:
                shutil.rmtree(place, ignore_errors=True)
        rows = self.store.add_stacks([(names, width) for _, names, width in found])
        for (place, _, _), row in zip(found, rows, strict=True):
            place.rename(self.stack_folder(row))
        return rows

    def assign(self) -> None:
        """Every idle worker takes the longest stack left. Samples come first, since weights may be deleted after them."""
        idle = self.backend.idle() if self.artifacts.waiting or self.to_train else []
        usable = [worker for worker in idle if self.failed_starts[worker] < MOST_FAILED_STARTS]
        if idle and not usable and not self.assignments:
            raise self.no_workers()
        for worker in usable:
            if self.artifacts.waiting:
                names = self.artifacts.waiting.popleft()
                writing = self.artifacts.task(names)
                if writing:
                    self.assignments[worker] = Assignment(self.label(names), names, None)
                    self.backend.start(worker, writing)
            elif self.to_train:
                stack = self.to_train.popleft()
                label = self.label(self.progress.undone(stack))
                self.assignments[worker] = Assignment(label, stack.members, stack)
                self.backend.start(worker, self.training_task(stack))

    def label(self, names: Sequence[str]) -> str:
        """Of the first experiment, and how many more there are: L2 E128 D0 s1 +3."""
        first = label(self.entries[names[0]].experiment.as_dict(), self.varying)
        return f"{first} +{len(names) - 1}" if len(names) > 1 else first

    def training_task(self, stack: StackRow) -> TrainStack:
        jobs = tuple(self.job(name) for name in stack.members)
        corpus, place = self.inputs.corpus(jobs[0].experiment), self.stack_folder(stack)
        self.retry(lambda: make_folder(place))
        return TrainStack(jobs, corpus, place, stack.width, self.save_every)

    def job(self, name: str) -> Job:
        return self.inputs.job(name, self.entries[name].experiment)

    def stack_folder(self, stack: StackRow) -> Path:
        return self.folder.path / STACKS / str(stack.id)

    # --- reports

    def handle(self, worker: int, report: Report) -> None:
        assignment = self.assignments.get(worker)
        if assignment is None:  # about the backend itself
            if isinstance(report, Noted):
                self.listener.say(report.text, "yellow")
            elif isinstance(report, Broken):
                self.count_failed_start(worker, report.reason)
        elif isinstance(report, Prepared):
            assignment.machine = report.machine
            for number in (worker, NOBODY):
                self.failed_starts.pop(number, None)
        elif isinstance(report, Noted):
            self.note(assignment, report.text)
        elif isinstance(report, Sampled):
            self.retry(lambda: self.artifacts.save(report.samples))
        elif isinstance(report, Done):
            del self.assignments[worker]
            if assignment.stack and not self.stop():
                self.finish_stack(assignment.stack)
        elif isinstance(report, Broken):
            del self.assignments[worker]
            self.handle_failure(worker, assignment, report)
        elif isinstance(report, Event):
            self.handle_event(assignment, report)

    def handle_event(self, assignment: Assignment, event: Event) -> None:
        for text in event.notes if isinstance(event, Started) else ():
            self.note(assignment, text)
        if isinstance(event, Saving):
            assignment.saving = True
            self.commit()
        elif assignment.saving:  # the event after it shows that the checkpoint is saved
            assignment.saving = False
            self.failures.pop(assignment.members, None)
        if self.progress.is_undone(event.name):  # else it finished after the last checkpoint, and does so again
            self.record(assignment, event)

    def note(self, assignment: Assignment, text: str) -> None:
        """Once, though every member of a stack may report it."""
        if assignment.stack and text not in assignment.notes:
            assignment.notes.add(text)
            self.store.note("note", text, stack=assignment.stack.id)
            self.listener.say(f"{assignment.label}: {text}", "yellow")

    def record(self, assignment: Assignment, event: Event) -> None:
        """Records the event of an experiment that is not done yet."""
        assert assignment.stack
        name = event.name
        if name not in assignment.recorders:
            assignment.recorders[name] = self.retry(lambda: self.open_recorder(name, assignment))
        recorder = assignment.recorders[name]
        if isinstance(event, Started):
            for note in self.retry(lambda: restore_tables(self.folder, name, recorder)):
                self.listener.say(note, "yellow")
        self.retry(lambda: recorder.record(event))
        if self.tracked:
            self.tracked.hear(event, recorder)
        if isinstance(event, Started):
            assert assignment.machine
            machine = assignment.machine.as_dict()
            self.store.started(name, event.step, event.evaluated_at, event.members, assignment.stack.id, machine)
            # which a store that was rebuilt may lack
            self.store.add_curve(name, self.retry(lambda: read_rows(recorder.folder / "evaluations.csv")))
            self.progress.set_status(name, Status.RUNNING)
        elif isinstance(event, Progress):
            assignment.progress[name] = event
            assignment.seconds_left, assignment.estimated_at = event.seconds_left, time.monotonic()
        elif isinstance(event, Logged):
            assignment.rates[name] = event.tokens_per_second
        elif isinstance(event, Evaluated):
            self.store.evaluated(name, event.step, event.tokens, event.seconds, event.train_loss, event.val_loss)
        elif isinstance(event, Stopped):
            self.store.progressed(name, event.step)
        elif isinstance(event, Finished):
            self.record_finished(assignment, event)

    def open_recorder(self, name: str, assignment: Assignment) -> Recorder:
        job = self.job(name)
        folder, corpus = self.folder.run(name), self.inputs.corpus(job.experiment)
        folder.mkdir(exist_ok=True)
        assert assignment.machine
        recorder = Recorder(folder, job.experiment, job.identity, corpus, assignment.machine)
        recorder.claim(asdict(self.resources))
        return recorder

    def record_finished(self, assignment: Assignment, event: Finished) -> None:
        name, result = event.name, event.result
        self.store.finished(result)
        self.commit()
        self.progress.set_status(name, result.status, assignment.stack)
        for values in (assignment.progress, assignment.rates, assignment.recorders):
            values.pop(name, None)
        count = f"[{self.progress.ended()}/{len(self.progress.chosen)}]"
        if result.reason:
            self.listener.say(f"{count} {self.label([name])} diverged: {result.reason}", "red")
        else:
            row = self.retry(lambda: self.store.row(name))
            self.best = self.retry(lambda: self.store.best(1))[0]
            took = duration(result.seconds)
            self.listener.say(
                f"{count} {self.label([name])}   train {row.train_loss:.4f}   val {row.val_loss:.4f}   {took}"
            )

    def finish_stack(self, stack: StackRow) -> None:
        """Its members are done: they write samples, and their checkpoint is deleted."""
        undone = self.progress.undone(stack)
        if undone:  # their rows were lost with a run folder or a store, and the checkpoint had them as done
            self.to_train.extend(self.store.add_stacks([(undone, stack.width)]))
        self.close_stack(stack)
        self.artifacts.queue(stack.members)

    def close_stack(self, stack: StackRow) -> None:
        self.store.close_stack(stack.id)
        self.commit()
        shutil.rmtree(self.stack_folder(stack), ignore_errors=True)

    # --- failures

    def handle_failure(self, worker: int, assignment: Assignment, broken: Broken) -> None:
        goes_on = f"{assignment.label}: {broken.reason}; it goes on from its last checkpoint"
        if self.stopping:
            self.listener.say(f"{assignment.label}: {broken.reason}; its last checkpoint is kept", "yellow")
        elif broken.cause == "lost":  # no experiment's fault, however often
            self.listener.say(goes_on, "yellow")
            self.requeue(assignment)
        elif assignment.machine is None and broken.cause != "files":  # no experiment's fault either
            self.count_failed_start(worker, broken.reason)
            self.requeue(assignment)
        elif broken.cause == "files":
            was_away = self.retry.wait(broken.problem, self.failures[assignment.members])
            self.failures[assignment.members] = 0 if was_away else self.failures[assignment.members] + 1
            self.requeue(assignment)
        elif broken.cause == "died" and self.failures[assignment.members] < MOST_DEATHS - 1:
            self.failures[assignment.members] += 1
            self.listener.say(goes_on, "yellow")
            self.requeue(assignment)
        elif assignment.stack:
            self.split_stack(assignment.stack, broken.reason)
        else:
            self.artifacts.failed(assignment.members, broken.reason)

    def count_failed_start(self, worker: int, reason: str) -> None:
        """A worker that fails again and again gets no more work; the others go on."""
        self.failed_starts[worker] += 1
        self.failed_because = reason
        last = self.failed_starts[worker] >= MOST_FAILED_STARTS
        if worker != NOBODY:
            what = "it gets no more work" if last else "it is tried again"
            self.listener.say(f"worker {worker} did not begin: {reason}; {what}", "yellow")
        elif last:
            raise self.no_workers()

    def no_workers(self) -> NanostudyError:
        return NanostudyError(f"Workers fail before they begin ({self.failed_because}); --executor inline shows why.")

    def requeue(self, assignment: Assignment) -> None:
        stack = assignment.stack
        if stack is None:
            self.artifacts.waiting.append(assignment.members)
        elif self.progress.undone(stack):
            self.to_train.appendleft(stack)
        else:  # it broke after its last member had finished
            self.finish_stack(stack)

    def split_stack(self, stack: StackRow, reason: str) -> None:
        """Bisects a stack that keeps failing; its parts go on from where it was."""
        undone = self.progress.undone(stack)
        if not undone:
            self.finish_stack(stack)
            return
        path = self.stack_folder(stack) / CHECKPOINT
        saved, _ = self.retry(lambda: read_checkpoint(path))
        # the first in order have the slots that others left
        culprit, parts, width = bisect(undone, saved or undone[: stack.width])
        if culprit:
            self.store.failed(culprit, reason)
            self.store.note("failed", reason, experiment=culprit)
            self.progress.set_status(culprit, Status.FAILED)
            self.listener.say(f"{self.label([culprit])} failed: {reason}", "red")
        else:
            self.listener.say(f"{self.label(undone)}: {reason} Going on in smaller stacks.", "yellow")
        stacks = self.store.add_stacks((names, width) for names in parts)
        if saved:
            self.retry(lambda: self.divide_checkpoint(path, stacks))
        self.close_stack(stack)  # the new stacks appear in the same transaction
        self.artifacts.queue(stack.members)
        self.to_train.extendleft(reversed(stacks))

    def divide_checkpoint(self, path: Path, stacks: Sequence[StackRow]) -> None:
        for stack in stacks:
            make_folder(self.stack_folder(stack))
        members = {self.stack_folder(stack) / CHECKPOINT: stack.members for stack in stacks}
        checkpoint.divide(path, {to: {n: self.identities[n] for n in names} for to, names in members.items()})

    # --- progress

    def commit(self) -> None:
        start = time.monotonic()
        self.retry(self.store.commit)
        self.committed = time.monotonic()
        self.commit_took = self.committed - start

    def snapshot(self) -> Snapshot:
        return self.progress.snapshot(self.assignments, self.to_train, self.capacity.workers, self.best)

    def publish(self) -> None:
        """Shows and stores the progress, seldom enough to cost nothing: a commit waits for the disk."""
        now = time.monotonic()
        if now - self.shown < max(0.25, 20 * self.show_took):
            return
        self.shown = now
        snapshot = self.snapshot()
        self.listener.show(snapshot)
        self.show_took = time.monotonic() - now
        if now - self.committed > max(2.0, 50 * self.commit_took):
            workers = []
            for worker, assignment in self.assignments.items():
                for name, last in assignment.progress.items():
                    self.store.progressed(name, last.step)
                workers.append({"worker": worker, **assignment.as_dict()})
            self.store.set_progress(snapshot.seconds_left, workers)
            self.commit()


# --- bisecting a stack: half of it needs half the memory, and an experiment alone shows whether it is the culprit


def bisect(undone: Sequence[str], in_slots: Collection[str]) -> tuple[str | None, list[list[str]], int]:
    """The experiment that failed alone, if there is one, and the stacks in which the others go on, with their width.

    `in_slots` had slots when the stack failed; those of them that are not in `undone` are done, and trained along.
    """
    suspects = [name for name in undone if name in in_slots]
    behind = [name for name in undone if name not in in_slots]
    culprit = None
    if len(in_slots) == 1 and suspects:
        culprit, parts = suspects[0], [behind]
    elif len(suspects) > 1:
        parts = [suspects[::2] + behind[::2], suspects[1::2] + behind[1::2]]
    else:  # one beside members that are done was not alone yet
        parts = [suspects, behind]
    return culprit, [part for part in parts if part], (len(in_slots) + 1) // 2


def read_checkpoint(path: Path) -> tuple[list[str], dict[str, str]]:
    """Who has a slot in it, and the identities of its stack; empty where none is whole, which is then set aside."""
    if checkpoint.exists(path):
        try:
            return checkpoint.members(path)
        except DamagedCheckpoint:
            checkpoint.set_aside(path)
    return [], {}


def make_folder(place: Path) -> None:
    """And its parent, no more: a drive that is gone must not get a folder in its stead."""
    place.parent.mkdir(exist_ok=True)
    place.mkdir(exist_ok=True)
