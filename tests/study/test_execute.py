"""The policy of a study, in this process: what is recorded, and what happens when something fails.

Faults are put between the trainer and the policy, or into writes; a kill is an exception after which nothing is written.
Every study that suffered is compared, file by file, with one that nothing disturbed.
"""

import csv
import errno
import hashlib
import json
import os
import re
import shutil
import signal
import sys
import threading
import time
from collections import Counter
from pathlib import Path

import pytest
import safetensors.torch
import torch
import yaml
from conftest import write_text

from nanostudy import api
from nanostudy import atomic as files
from nanostudy.cli import main as cli
from nanostudy.errors import Interrupted, NanostudyError, UsageError
from nanostudy.result import Result, Status
from nanostudy.settings import Resources
from nanostudy.study import database, lease, plan, retry, workers
from nanostudy.study.definition import read_study
from nanostudy.study.folder import design, open_study
from nanostudy.study.listing import Listing, best_lines
from nanostudy.study.store import FILE, Store
from nanostudy.study.tasks import Broken, Done, TrainStack, WriteSamples
from nanostudy.study.workers import Inline
from nanostudy.training import evaluation, recorder
from nanostudy.training import stack as checkpoint
from nanostudy.training.events import Evaluated, Finished, Logged, Saving, Started

posix_only = pytest.mark.skipif(os.name != "posix", reason="needs POSIX signals")

RESOURCES = Resources(device="cpu", precision="fp32", threads=1)
SETTINGS = {
    "n_layer": 1,
    "n_head": 2,
    "n_embd": 16,
    "batch_size": 4,
    "dropout": 0.1,
    "warmup_iters": 3,
    "beta2": 0.99,
    "eval_interval": 5,
    "log_interval": 1,
}
GRID = {"block_size": [8, 16], "max_iters": [12, 20]}  # two stacks of four: in each, two wait while two train


def write_study(folder: Path, grid=GRID, seeds=(1, 2), **changes) -> Path:
    """A study file and its text, made in this folder."""
    folder.mkdir(parents=True, exist_ok=True)
    settings = {**SETTINGS, "corpus": str(write_text(folder / "text.txt", 600)), **changes.pop("settings", {})}
    study = {"settings": settings, "grid": grid, "seeds": list(seeds), "prompts": ["the ", None], "sample_tokens": 12}
    path = folder / "study of tests.yaml"
    path.write_text(yaml.safe_dump({**study, **changes}), encoding="utf-8")
    return path


class Listener:
    """A listener that remembers."""

    def __init__(self) -> None:
        self.messages: list[str] = []

    def say(self, text: str, style: str = "") -> None:
        self.messages.append(text)

    def show(self, snapshot) -> None:
        assert 0 <= snapshot.share <= 1
        assert snapshot.seconds_left is None or snapshot.seconds_left >= 0

    def __contains__(self, pattern: str) -> bool:
        return any(re.search(pattern, text) for text in self.messages)


class Faulty(Inline):
    """Performs tasks in this process; `fault(task, reports)` may change what is reported of them."""

    def __init__(self, resources: Resources, fault) -> None:
        super().__init__(resources)
        self.fault, self.reports = fault, []

    def start(self, worker, task) -> None:
        super().start(worker, task)
        self.running = self.fault(task, self.running)

    def next(self, timeout):
        arrived = super().next(timeout)
        self.reports += [arrived[1]] if arrived else []
        return arrived


@pytest.fixture(autouse=True)
def _no_waiting_for_the_disk(monkeypatch):
    """Nothing here pulls the plug."""
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)


@pytest.fixture
def run(tmp_path, monkeypatch):
    """Runs a study in this process, two members at a time, and returns the listener, whose `reports` are the backend's."""
    monkeypatch.setitem(plan.WIDEST, "cpu", 2)

    def run(source: Path, out="out", fault=lambda task, reports: reports, save_every=1e9, call=api.run_study, **how):
        listener = Listener()
        made = []

        def make(resources):
            made.append(Faulty(resources, fault))
            return made[0]

        monkeypatch.setattr("nanostudy.study.pool.Inline", make)
        run.listener, run.made = listener, made
        args = (tmp_path / out,) if call is api.retry_study else (source, tmp_path / out)
        run.rows = call(*args, executor="inline", resources=RESOURCES, listener=listener, save_every=save_every, **how)
        listener.reports = made[0].reports
        return listener

    return run


def table(path: Path, leave_out: str) -> list[dict[str, str]]:
    with path.open(encoding="utf-8", newline="") as file:
        return [{key: value for key, value in row.items() if key != leave_out} for row in csv.DictReader(file)]


def metadata(folder: Path) -> dict:
    return json.loads((folder / "run.json").read_text(encoding="utf-8"))


def experiments(study: Path) -> list[str]:
    with Store.read(study / FILE) as store:
        return [row.name for row in store.rows()]


def short(study: Path, name: str) -> str:
    """What messages call an experiment."""
    with Store.read(study / FILE) as store:
        return Listing.of(study).label(next(row for row in store.rows() if row.name == name))


OUTCOME = ("status", "updates", "skipped", "step", "tokens", "train_loss", "val_loss", "best_step", "best_val_loss")


def assert_same_study(ours: Path, theirs: Path, weights=("best", "last")) -> None:
    """To the bit: weights, curves, samples, and what the store says; but for times, speeds and how it came about."""
    names = experiments(theirs)
    for name in names:
        for which in weights:
            a, b = (safetensors.torch.load_file(study / name / f"{which}.safetensors") for study in (ours, theirs))
            assert a.keys() == b.keys()
            assert all(torch.equal(a[key], b[key]) for key in a), (name, which)
        for file, leave_out in (("training.csv", "tokens_per_second"), ("evaluations.csv", "seconds")):
            assert table(ours / name / file, leave_out) == table(theirs / name / file, leave_out), (name, file)
        a, b = (metadata(study / name) for study in (ours, theirs))
        for key in ("identity", "status", "updates", "skipped_updates", "tokens", "context_losses", "settings"):
            assert a[key] == b[key], (name, key)
        texts = [(study / name / "sample.txt").read_bytes() for study in (ours, theirs)]
        assert texts[0] == texts[1], name
    with Store.read(ours / FILE) as a, Store.read(theirs / FILE) as b:
        for row, other in zip(a.rows(), b.rows(), strict=True):
            for key in ("id", "name", "identity", "settings", "sampled", "context_losses", *OUTCOME):
                assert getattr(row, key) == getattr(other, key), (row.name, key)
            curves = [[{**p, "seconds": 0} for p in store.evaluations(row.name)] for store in (a, b)]
            assert curves[0] == curves[1], row.name
        assert a.open_stacks() == []
    assert list((ours / "stacks").iterdir()) == []


def assert_near(ours: Path, theirs: Path, names: list[str]) -> None:
    """In other company: the losses of all updates equal but for the order of additions (as tests/training/test_stack.py)."""
    for name in names:
        a, b = (table(study / name / "training.csv", "tokens_per_second") for study in (ours, theirs))
        assert len(a) == len(b)
        assert [float(row["loss"]) for row in a] == pytest.approx([float(row["loss"]) for row in b], rel=1e-5)
        assert metadata(ours / name)["status"] == metadata(theirs / name)["status"] == "finished"


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> Path:
    return write_study(tmp_path_factory.mktemp("study"))


@pytest.fixture(scope="module")
def reference(source, tmp_path_factory) -> Path:
    """The folder of the study that nothing disturbed, and that saved nothing on the way."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(plan.WIDEST, "cpu", 2)
        out = tmp_path_factory.mktemp("reference") / "out"
        api.run_study(source, out, executor="inline", resources=RESOURCES, listener=Listener(), save_every=1e9)
    return out


# --- undisturbed


def test_every_experiment_ends_once_and_leaves_its_results(run, source, reference, tmp_path):
    listener = run(source)
    assert_same_study(tmp_path / "out", reference)
    names = experiments(reference)
    assert len(names) == 8
    for name in names:
        folder = reference / name
        assert sum(f"{short(reference, name)} " in text for text in listener.messages) == 1
        assert {path.name for path in folder.iterdir()} >= {"run.json", "best.safetensors", "last.safetensors"}
        assert re.fullmatch(r"--- the \nthe .*\n\n--- no prompt\n.*\n", (folder / "sample.txt").read_text(), re.S)
        assert metadata(folder)["updates"] == metadata(folder)["settings"]["max_iters"]
    started = [report for report in listener.reports if isinstance(report, Started)]
    assert Counter(report.members for report in started) == {2: 8}, "slots are refilled"
    assert len((reference / "results.csv").read_text().splitlines()) == 9


def test_what_is_done_is_not_done_again(run, source, tmp_path):
    run(source)
    before = contents(tmp_path / "out")
    listener = run(source)
    assert listener.reports == []
    assert contents(tmp_path / "out") == before


def contents(study: Path) -> dict[str, str]:
    """Checksums of the run folders' files."""
    files = (path for name in experiments(study) for path in (study / name).glob("*"))
    return {str(path.relative_to(study)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def test_a_refilled_slot_trains_as_the_experiment_alone(run, source, reference, tmp_path, monkeypatch, on_batches):
    """Batches to the bit, losses to rounding: in a slot that another left, and with the machine to itself."""
    drawn = {}

    def record(_, members, steps, sequences, batch):
        for m, (e, step) in enumerate(zip(members, steps, strict=True)):
            digest = hashlib.sha256(batch.inputs[m].numpy().tobytes() + batch.targets[m].numpy().tobytes())
            drawn.setdefault((e, step), []).append(digest.hexdigest())

    on_batches(record)
    run(source, "together")
    monkeypatch.setitem(plan.WIDEST, "cpu", 1)
    run(source, "alone")
    assert len(drawn) == 2 * 2 * (12 + 20)
    assert all(len(hashes) == 2 and len(set(hashes)) == 1 for hashes in drawn.values())
    assert_near(tmp_path / "alone", reference, experiments(reference))


# --- members that go wrong


def test_a_study_in_which_all_diverge_ends_with_exit_code_1(tmp_path, monkeypatch, capsys):
    settings = {"block_size": 8, "max_iters": 12, "eval_interval": 12, "grad_clip": 0.0, "warmup_iters": 0}
    source = write_study(tmp_path, {"learning_rate": [1e30]}, settings=settings)
    argv = ["study", "run", "--no-report", str(source), "--out", str(tmp_path / "all"), "--executor", "inline"]
    monkeypatch.setattr(sys, "argv", ["nanostudy", *argv, "--device", "cpu", "--precision", "fp32", "--threads", "1"])
    with pytest.raises(SystemExit) as end:
        cli.main()
    assert end.value.code == 1
    assert "0 of 2 experiments finished" in capsys.readouterr().out
    rows = list(csv.DictReader((tmp_path / "all" / "results.csv").read_text().splitlines()))
    for row in rows:
        assert (row["status"], int(row["step"]) > 0, row["best_step"]) == ("diverged", True, "0")
        assert (row["train_loss"], row["val_loss"], row["loss_gap"]) == (
            "",
            "",
            "",
        )  # those that there are, are of update 0


def test_a_study_says_when_it_takes_another_text(tmp_path, monkeypatch):
    def unavailable():
        raise NanostudyError("no network")

    monkeypatch.setattr("nanostudy.data.texts._shakespeare", unavailable)
    source = write_study(tmp_path, settings={"corpus": "auto"})
    with open_study(design(tmp_path / "out", read_study(str(source)))) as folder:
        assert folder.design.study.settings["corpus"] == "playhouse"
        assert folder.notes == ["Shakespeare is not available, so this trains on playhouse instead. no network"]
    with open_study(design(tmp_path / "out", read_study(str(source)))) as folder:
        assert not folder.notes, "the study has its text now"


def test_the_best_says_where_its_settings_diverged_with_another_seed():
    def result(id, status, loss, **settings):
        return Result(f"e{id}", "", json.dumps(settings), Status(status), {"val_loss": loss, "train_loss": loss}, id=id)

    rows = [
        result(1, "finished", 1.9, learning_rate=0.1, seed=1),
        result(2, "diverged", None, learning_rate=0.1, seed=2),
        result(3, "finished", 2.0, learning_rate=0.01, seed=1),
    ]
    listing = Listing(Path(), ("learning_rate", "seed"), {})
    assert best_lines(rows, listing)[-1] == "Settings that diverged with another seed: lr=0.1 s1"
    assert "diverged" not in "".join(best_lines([rows[0], rows[2]], listing))


def test_one_diverges_among_healthy_ones(tmp_path, monkeypatch, capsys):
    """By command: exit code 0, its reason listed, its neighbours as in a study without it."""
    monkeypatch.setitem(plan.WIDEST, "cpu", 2)
    settings = {"block_size": 8, "max_iters": 12, "grad_clip": 0.0, "warmup_iters": 0}

    def study(name: str, rates: list[float]) -> Path:
        source = write_study(tmp_path, {"learning_rate": rates}, settings=settings)
        argv = ["study", "run", "--no-report", str(source), "--out", str(tmp_path / name), "--executor", "inline"]
        argv += ["--device", "cpu", "--precision", "fp32", "--threads", "1"]
        monkeypatch.setattr(sys, "argv", ["nanostudy", *argv])
        with pytest.raises(SystemExit) as end:
            cli.main()
        assert not end.value.code
        return tmp_path / name

    healthy, one = study("healthy", [0.01]), study("one", [0.01, 1e30])
    printed = capsys.readouterr().out
    with Store.read(one / FILE) as store:
        rows = store.rows()
    ill = [row for row in rows if row.experiment.learning_rate > 1]
    assert [row.status for row in ill] == ["diverged", "diverged"]
    assert "Settings that diverged with another seed" not in printed
    for row in ill:
        assert "not finite" in row.reason
        assert f"diverged {row.id}  {short(one, row.name)}: {row.reason}" in printed
        assert (one / row.name / "sample.txt").exists()
    well = {row.experiment: row.name for row in rows if row not in ill}
    with Store.read(healthy / FILE) as store:
        for row in store.rows():
            a, b = (
                table(s / n / "training.csv", "tokens_per_second")
                for s, n in ((healthy, row.name), (one, well[row.experiment]))
            )
            assert [float(r["loss"]) for r in a] == pytest.approx([float(r["loss"]) for r in b], rel=1e-5)
            assert len(a) == 12


def breaking(name: str, step: int, broken: Broken, when=lambda members: True):
    """A fault: while that experiment is at this step, or beyond, the task breaks."""

    def fault(task, reports):
        in_slots = set()
        for report in reports:
            yield report
            if isinstance(report, Started):
                in_slots.add(report.name)
            elif isinstance(report, Finished):
                in_slots.discard(report.name)
            elif isinstance(report, Logged) and report.name == name and report.step >= step and when(in_slots):
                reports.close()
                yield broken
                return

    return fault


@pytest.mark.parametrize(
    ("cause", "save_every", "which"),  # which: one of those that begin, or one that waits for a slot
    [("error", 0.0, 0), ("error", 1e9, 3), ("died", 0.0, 3), ("died", 1e9, 0), ("memory", 0.0, 3)],
)
def test_one_that_always_breaks_its_stack_is_found_and_fails_alone(
    run, source, reference, tmp_path, cause, save_every, which
):
    names = experiments(reference)
    long_first = sorted(names, key=lambda name: ("MI20" not in name, names.index(name)))
    culprit = [name for name in long_first if "b8_" in name][which]
    reason = "the reason of this test."
    listener = run(source, fault=breaking(culprit, 6, Broken(cause, reason)), save_every=save_every)
    status = {row.name: (row.status, row.reason) for row in run.rows}
    assert status.pop(culprit) == ("failed", reason)
    assert set(status.values()) == {("finished", None)}
    assert f"{short(tmp_path / 'out', culprit)} failed: {reason}" in listener
    assert_near(tmp_path / "out", reference, list(status))
    with Store.read(tmp_path / "out" / FILE) as store:
        assert [event["experiment"] for event in store.events() if event["kind"] == "failed"] == [culprit]
    before = contents(tmp_path / "out")

    run(source)  # the same command does not try it again
    assert {row.name: row.status for row in run.rows}[culprit] == "failed"
    assert contents(tmp_path / "out") == before
    run(source, call=api.retry_study)
    assert [row.name for row in run.rows] == [culprit]
    assert_near(tmp_path / "out", reference, names)
    after = contents(tmp_path / "out")
    assert {key: after[key] for key in before if not key.startswith(culprit)} == {
        key: value for key, value in before.items() if not key.startswith(culprit)
    }


def test_too_little_memory_for_two_goes_on_as_halves_where_they_were(run, source, reference, tmp_path):
    """Memory runs out at the 9th update of a stack of two, again and again; for one alone it suffices."""

    def fault(task, reports):
        width = 0
        for report in reports:
            yield report
            if isinstance(report, Started):
                width = report.members
            if isinstance(report, Logged) and report.step == 9 and width > 1:
                yield Broken("memory", "Memory ran out.")
                return

    listener = run(source, fault=fault, save_every=0.0)
    assert {row.status for row in run.rows} == {"finished"}
    assert "Memory ran out. Going on in smaller stacks" in listener
    started = [(report.step, report.members) for report in listener.reports if isinstance(report, Started)]
    assert Counter(started) == {(0, 2): 4, (8, 1): 4, (0, 1): 4}
    assert_near(tmp_path / "out", reference, experiments(reference))


def test_one_beside_a_member_that_is_done_is_not_blamed_before_it_was_alone(
    run, source, reference, tmp_path, monkeypatch
):
    """The only checkpoint is of update 6, a member finished after it, and the stack breaks while both train along."""
    saved, original = [], checkpoint.save

    def save_once(stack, path, *args):
        if path not in saved and stack.slots[0].step == 6:
            saved.append(path)
            original(stack, path, *args)

    monkeypatch.setattr(checkpoint, "save", save_once)
    source = write_study(tmp_path / "pair", {"max_iters": [12, 20]}, seeds=[1], settings={"block_size": 8})
    run(source, "whole")
    (short,), (long,) = ([n for n in experiments(tmp_path / "whole") if m in n] for m in ("MI12", "MI20"))
    saved.clear()
    with pytest.raises(Killed), monkeypatch.context() as patch:
        run(source, fault=kill_at(Logged, 15, patch), save_every=0.0)
    assert metadata(tmp_path / "out" / short)["status"] == "finished"
    in_company = breaking(long, 9, Broken("memory", "Memory ran out."), when=lambda members: len(members) > 1)
    listener = run(source, fault=in_company, save_every=0.0)
    assert {row.status for row in run.rows} == {"finished"}
    steps = [(r.name, r.step) for r in listener.reports if isinstance(r, Started)]
    assert steps == [(long, 6), (short, 6), (long, 6)]
    assert_near(tmp_path / "out", tmp_path / "whole", [short, long])


@pytest.mark.parametrize("cause", ["lost", "died"])
def test_a_worker_that_breaks_after_the_last_member_costs_nothing(run, source, reference, tmp_path, cause):
    def fault(task, reports):
        for report in reports:
            broken = isinstance(task, TrainStack) and isinstance(report, Done)
            yield Broken(cause, "the reason of this test.") if broken else report

    listener = run(source, fault=fault)
    assert sum(isinstance(report, Broken) for report in listener.reports) == 2
    assert_same_study(tmp_path / "out", reference)


def test_models_that_cannot_write_together_write_alone(run, source, reference, tmp_path):
    broken = experiments(reference)[2]

    def fault(task, reports):
        if isinstance(task, WriteSamples) and (len(task.names) > 1 or task.names == (broken,)):
            return iter([next(reports), Broken("memory", "Memory ran out.")])
        return reports

    listener = run(source, fault=fault)
    assert f"{broken} has no sample: Memory ran out" in listener
    assert [row.name for row in run.rows if not row.sampled] == [broken]
    run(source)  # the next session makes up for it
    assert_same_study(tmp_path / "out", reference)


# --- stopped, and killed


class Killed(BaseException):
    """After this nothing is written: the store refuses all."""


def dead(*_args, **_more):
    raise Killed


def kill_at(kind: type, step: int, patch, count: int = 1):
    """A fault: at an event of a kind, everything ends as if by SIGKILL."""
    seen = []

    def fault(task, reports):
        for report in reports:
            if isinstance(report, kind) and getattr(report, "step", step) >= step:
                seen.append(report)
                if len(seen) >= count:
                    patch.setattr(database.Database, "commit", dead)
                    reports.close()
                    raise Killed
            yield report

    return fault


def stop_at(kind: type, step: int):
    """A fault: at an event of a kind, the study is asked to stop, as by Ctrl-C."""
    requested = []

    def fault(task, reports):
        for report in reports:
            yield report
            if isinstance(report, kind) and getattr(report, "step", step) >= step and not requested:
                requested.append(report)
                signal.raise_signal(signal.SIGINT)

    return fault


@posix_only
@pytest.mark.parametrize("kind", [Logged, Evaluated, Finished])
def test_stopped_again_and_again(run, source, reference, tmp_path, kind):
    for step in (1, 3, 7, 15, 18):
        with pytest.raises(Interrupted, match="the same command goes on"):
            run(source, fault=stop_at(kind, step))
    run(source)
    assert_same_study(tmp_path / "out", reference)


@posix_only
def test_stopped_in_the_midst_of_an_evaluation(run, source, reference, tmp_path, monkeypatch):
    """Ctrl-C while the second batch of an evaluation is read: the others are not waited for."""
    monkeypatch.setitem(evaluation.TOKENS, "cpu", 32)
    read, windows_at = [], evaluation.windows_at

    def counted(*arguments):
        read.append(arguments)
        if len(read) == 100:
            signal.raise_signal(signal.SIGINT)
        return windows_at(*arguments)

    monkeypatch.setattr(evaluation, "windows_at", counted)
    with pytest.raises(Interrupted):
        run(source)
    assert len(read) == 100
    run(source)
    assert {row.status for row in run.rows} == {"finished"}


@pytest.mark.parametrize(("kind", "save_every"), [(Logged, 0.0), (Saving, 0.0), (Finished, 0.0), (Finished, 1e9)])
def test_killed_at_events(run, source, reference, tmp_path, monkeypatch, kind, save_every):
    """Between two reports; what finished stays as it was."""
    kept: dict[str, str] = {}
    for step in (2, 9, 17):
        with pytest.raises(Killed), monkeypatch.context() as patch:
            run(source, fault=kill_at(kind, step, patch), save_every=save_every)
        now = contents(tmp_path / "out")
        assert kept.items() <= now.items()
        with Store.read(tmp_path / "out" / FILE) as store:
            done = [row.name for row in store.rows(status="finished")]
        kept = {path: digest for path, digest in now.items() if Path(path).parts[0] in done}
    run(source)
    assert kept.items() <= contents(tmp_path / "out").items()
    assert_same_study(tmp_path / "out", reference)


def dying(at: int, reached: bool):
    """A commit that is killed before, or after, it does its work for the `at`-th time."""
    commit, count = database.Database.commit, 0

    def die_at(self) -> None:
        nonlocal count
        if not self._pending:
            return
        count += 1
        if count < at or (count == at and reached):
            commit(self)
        if count >= at:
            raise Killed

    return die_at


TINY = {"grid": {"max_iters": [3, 5]}, "seeds": [1, 2], "settings": {"block_size": 8, "eval_interval": 3}}


@pytest.mark.parametrize(("reached", "keep"), [(True, "best 1"), (False, "all")], ids=["after", "before"])
def test_killed_at_every_commit(run, tmp_path, monkeypatch, reached, keep):
    """Before or after each commit of the store, beginning with the folder's first: adopted, gone on, nothing twice."""
    source = write_study(tmp_path / "study", **TINY, keep=keep)
    run(source, "whole", save_every=0.0)
    for at in range(1, 1000):
        shutil.rmtree(tmp_path / "out", ignore_errors=True)
        with monkeypatch.context() as patch:
            patch.setattr(database.Database, "commit", dying(at, reached))
            try:
                run(source, save_every=0.0)
                break
            except Killed:
                pass
        done = [name for name in TINY_NAMES if finished(tmp_path / "out" / name)]
        before = {name: (tmp_path / "out" / name / "run.json").read_bytes() for name in done}
        listener = run(source, save_every=0.0)
        assert not [text for text in listener.messages for name in done if text.startswith("[") and name in text], at
        assert all((tmp_path / "out" / name / "run.json").read_bytes() == before[name] for name in done), at
        assert_same_study(tmp_path / "out", tmp_path / "whole", weights=() if keep != "all" else ("best", "last"))
        assert weights_of(tmp_path / "out") == weights_of(tmp_path / "whole"), at
    assert at > 12


def test_killed_while_a_stack_is_taken_apart(run, tmp_path, monkeypatch):
    """At every commit: no experiment is ever in two open stacks."""
    source = write_study(tmp_path / "study", **{**TINY, "seeds": [1]})
    run(source, "whole")
    broken = breaking(TINY_NAMES[2], 2, Broken("memory", "Memory ran out."), when=lambda members: len(members) > 1)
    apart = 0
    for at in range(1, 1000):
        shutil.rmtree(tmp_path / "out", ignore_errors=True)
        with monkeypatch.context() as patch:
            patch.setattr(database.Database, "commit", dying(at, reached=True))
            try:
                run(source, fault=broken, save_every=0.0)
                break
            except Killed:
                pass
        with Store.read(tmp_path / "out" / FILE) as store:
            members = [name for stack in store.open_stacks() for name in stack.members]
            apart += len(store.open_stacks()) == 2
        assert len(members) == len(set(members)), at
        run(source, fault=broken, save_every=0.0)
        assert_near(tmp_path / "out", tmp_path / "whole", experiments(tmp_path / "whole"))
    assert apart


TINY_NAMES = [f"b8_L1_H2_E16_BS4_MI{n}_D10_s{s}" for n in (3, 5) for s in (1, 2)]


def finished(folder: Path) -> bool:
    return (folder / "run.json").exists() and metadata(folder)["status"] == "finished"


def weights_of(study: Path) -> dict[str, set[str]]:
    return {name: {path.stem for path in (study / name).glob("*t.safetensors")} for name in experiments(study)}


@pytest.mark.parametrize("keep", ["all", "final", "best 2", "none"])
def test_what_is_kept(run, tmp_path, keep):
    source = write_study(tmp_path / "study", **TINY, keep=keep)
    run(source)
    best = sorted(run.rows, key=lambda row: row.val_loss)[:2]
    kept = {
        "all": {row.name: {"best", "last"} for row in run.rows},
        "final": {row.name: {"last"} for row in run.rows},
        "best 2": {row.name: {"best", "last"} if row in best else set() for row in run.rows},
        "none": {row.name: set() for row in run.rows},
    }
    assert weights_of(tmp_path / "out") == kept[keep]
    assert all((tmp_path / "out" / row.name / "sample.txt").exists() for row in run.rows)


# --- what is on disk


def interrupted(run, source, step=15, out="out") -> None:
    """A study stopped in its first stack, with the checkpoint before the newest beside it."""
    with pytest.raises(Interrupted):
        run(source, out, fault=stop_at(Logged, step), save_every=0.0)


def newest(study: Path) -> Path:
    (path,) = study.glob("stacks/*/checkpoint.safetensors")
    return path


def damage(path: Path) -> None:
    whole = bytearray(path.read_bytes())
    whole[-100] ^= 1
    path.write_bytes(whole)


@posix_only
def test_a_damaged_checkpoint_leaves_the_one_before(run, source, reference, tmp_path):
    interrupted(run, source)
    damage(newest(tmp_path / "out"))
    listener = run(source)
    assert r"damaged.*Resuming from the checkpoint before it" in listener
    with Store.read(tmp_path / "out" / FILE) as store:
        assert any("checkpoint before it" in event["detail"] for event in store.events() if event["kind"] == "note")
    assert next(r.step for r in listener.reports if isinstance(r, Started)) in (14, 15)
    assert_same_study(tmp_path / "out", reference)


@posix_only
@pytest.mark.parametrize("both", [True, False])
def test_without_a_whole_checkpoint_the_stack_trains_from_the_beginning(run, source, reference, tmp_path, both):
    with pytest.raises(Interrupted):
        run(source, fault=stop_at(Finished, 0), save_every=0.0)
    with Store.read(tmp_path / "out" / FILE) as store:
        done = [row.name for row in store.rows(status="finished")]
    assert done
    before = {name: (tmp_path / "out" / name / "run.json").read_bytes() for name in done}
    path = newest(tmp_path / "out")
    damage(path)
    other = path.with_name("checkpoint.before.safetensors")
    damage(other) if both else other.unlink()
    listener = run(source)
    assert "set aside; training from the beginning" in listener
    assert next(r.step for r in listener.reports if isinstance(r, Started)) == 0
    assert all((tmp_path / "out" / name / "run.json").read_bytes() == before[name] for name in done)
    assert_same_study(tmp_path / "out", reference)


@posix_only
def test_a_folder_is_moved_and_copied_between_sessions(run, source, reference, tmp_path):
    interrupted(run, source)
    (tmp_path / "out").rename(tmp_path / "moved")
    interrupted(run, source, 19, "moved")
    shutil.copytree(tmp_path / "moved", tmp_path / "copied")
    for out in ("moved", "copied"):
        run(source, out)
        assert_same_study(tmp_path / out, reference)


@posix_only
def test_what_a_kill_left_of_unknown_stacks_does_no_harm(run, source, reference, tmp_path):
    """A stack's folder under an id that the store has not given yet: it was killed before it could say so."""
    interrupted(run, source)
    shutil.copytree(newest(tmp_path / "out").parent, tmp_path / "out" / "stacks" / "3")
    (newest_of := tmp_path / "out" / "stacks" / "1" / ".checkpoint.safetensors.4711.tmp").write_bytes(b"half of it")
    run(source)
    assert not newest_of.exists()
    assert_same_study(tmp_path / "out", reference)


def failing(original, number: int, code: int, times: int = 1, half=lambda *args: None):
    """As the original, but calls `number` and after fail, so many times."""
    calls = 0

    def call(*args, **named):
        nonlocal calls
        calls += 1
        if number <= calls < number + times:
            half(*args)
            problem = OSError(code, os.strerror(code))
            raise NanostudyError(files.explain_writing(Path("a file"), problem)) from problem
        return original(*args, **named)

    return call


def half_a_row(path: Path, rows) -> None:
    with path.open("a") as file:
        file.write(f"{rows[0][0]},1.2")


WRITES = {  # what writes, and a call of it in the midst
    "checkpoint": (checkpoint, "save_tensors", 9, lambda *args: None),
    "table": (recorder, "append_rows", 7, half_a_row),
    "metadata": (recorder, "write_metadata", 9, lambda *args: None),
    "weights": (recorder, "save_weights", 2, lambda *args: None),
}


@pytest.mark.parametrize("what", WRITES)
def test_a_full_disk_ends_the_study_clearly_and_loses_nothing(run, source, reference, tmp_path, monkeypatch, what):
    module, name, number, half = WRITES[what]
    with monkeypatch.context() as patch:
        patch.setattr(module, name, failing(getattr(module, name), number, errno.ENOSPC, 10**9, half))
        with pytest.raises(NanostudyError, match=r"No space is left for.*free some space and run again"):
            run(source, save_every=0.0)
    run(source)
    assert_same_study(tmp_path / "out", reference)


@pytest.mark.parametrize("what", WRITES)
def test_a_passing_fault_of_the_drive_is_waited_for(run, source, reference, tmp_path, monkeypatch, what):
    module, name, number, half = WRITES[what]
    monkeypatch.setattr(module, name, failing(getattr(module, name), number, errno.EIO, 2, half))
    run(source, save_every=0.0)
    assert_same_study(tmp_path / "out", reference)


def test_a_fault_that_stays_ends_the_study(run, source, monkeypatch):
    monkeypatch.setattr(checkpoint, "save_tensors", failing(checkpoint.save_tensors, 3, errno.EIO, 10**9))
    with pytest.raises(NanostudyError, match="could not be written"):
        run(source, save_every=0.0)


@posix_only
def test_a_folder_that_is_away_is_waited_for(run, source, reference, tmp_path):
    """Renamed away at an update, and back a second later: the study says so and goes on."""
    away = []

    def fault(task, reports):
        for report in reports:
            if isinstance(report, Logged) and report.step == 15 and not away:
                (tmp_path / "out").rename(tmp_path / "away")
                away.append(threading.Timer(1.0, lambda: (tmp_path / "away").rename(tmp_path / "out")))
                away[0].start()
            yield report

    listener = run(source, fault=fault)
    assert "does not answer" in listener
    assert "answers again; going on" in listener
    assert_same_study(tmp_path / "out", reference)


@posix_only
def test_ctrl_c_while_the_folder_is_away(run, source, reference, tmp_path):
    def fault(task, reports):
        for report in reports:
            if isinstance(report, Logged) and report.step == 15 and (tmp_path / "out").exists():
                (tmp_path / "out").rename(tmp_path / "away")
                threading.Timer(0.5, lambda: signal.raise_signal(signal.SIGINT)).start()
            yield report

    with pytest.raises(Interrupted, match="did not answer"):
        run(source, fault=fault, save_every=0.0)
    assert not (tmp_path / "out").exists(), "nothing is made in the place of a drive"
    (tmp_path / "away").rename(tmp_path / "out")
    run(source)
    assert_same_study(tmp_path / "out", reference)


def test_a_stack_makes_no_folder_where_the_study_is_gone(tmp_path, corpus):
    task = TrainStack((), corpus, tmp_path / "gone" / "stacks" / "1", 1, 1.0)
    from nanostudy.study.tasks import perform

    *_, broken = perform(task, RESOURCES, lambda: False)
    assert (broken.cause, broken.code) == ("files", errno.ENOENT)
    assert not (tmp_path / "gone").exists()


# --- trying again


@pytest.fixture
def waited(monkeypatch):
    """Seconds that were slept, without sleeping."""
    slept = []
    monkeypatch.setattr(retry.time, "sleep", slept.append)
    return slept


def test_a_folder_is_waited_for_and_no_longer(tmp_path, waited):
    messages, calls = [], []
    try_again = retry.Retry(tmp_path / "drive", lambda text, style: messages.append(text), lambda: False)

    def action():
        calls.append(1)
        if not (tmp_path / "drive").exists():
            raise OSError(errno.ENOENT, "No such file or directory")
        return "done"

    def back(seconds):
        waited.append(seconds)
        if len(waited) == 5:
            (tmp_path / "drive").mkdir()

    retry.time.sleep = back
    assert try_again(action) == "done"
    assert len(calls) == 2
    assert len(messages) == 2


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EACCES, errno.EROFS, None])
@pytest.mark.usefixtures("waited")
def test_what_does_not_pass_is_not_tried_again(tmp_path, code):
    calls = []

    def action():
        calls.append(1)
        problem = NanostudyError("this one")
        problem.__cause__ = code and OSError(code, "x")
        raise problem

    with pytest.raises(NanostudyError, match="this one"):
        retry.Retry(tmp_path, lambda *_: None, lambda: False)(action)
    assert len(calls) == 1


# --- time


@posix_only
def test_nothing_depends_on_the_clock(run, source, reference, tmp_path, monkeypatch):
    """It jumps back and forth by years, at every look."""
    jumps = iter(range(10**9))
    monkeypatch.setattr(time, "time", lambda: 1.7e9 + (-1) ** next(jumps) * 1e8)
    from nanostudy.study import store

    class Clock(store.datetime):
        @classmethod
        def now(cls, zone=None):
            return super().fromtimestamp(1.7e9 - next(jumps) * 1e5, zone)

    monkeypatch.setattr(store, "datetime", Clock)
    interrupted(run, source)
    run(source, save_every=0.0)
    assert_same_study(tmp_path / "out", reference)


# --- worker processes that cannot start


@posix_only
def test_a_study_that_another_machine_took_over_writes_no_more_here(run, source, tmp_path, monkeypatch):
    monkeypatch.setattr(lease, "RENEWED_EVERY", 0.01)

    def fault(task, reports):
        for report in reports:
            yield report
            if isinstance(report, Logged) and report.step == 9:
                for _ in range(20):  # more often than it is renewed
                    (tmp_path / "out" / lease.FILE).write_text('{"host": "another", "token": "b"}')
                    time.sleep(0.02)

    with pytest.raises(NanostudyError, match="another took"):
        run(source, fault=fault, save_every=0.0)
    with Store.read(tmp_path / "out" / FILE) as store:
        assert "running" in store.statuses().values(), "who goes on there has said so"


def test_workers_that_cannot_start_are_one_clear_error(source, tmp_path, monkeypatch):
    monkeypatch.setattr(workers.sys, "executable", shutil.which("false"))
    begun = time.monotonic()
    with pytest.raises(NanostudyError, match=r"fail before they begin \(its process ended \(exit code 1\)\).*inline"):
        api.run_study(source, tmp_path / "out", workers=2, resources=RESOURCES, listener=Listener())
    assert time.monotonic() - begun < 20


@pytest.mark.usefixtures("reference")
def test_a_lost_store_loses_no_training(run, source, reference, tmp_path):
    """What was under way goes on from its checkpoints, to the same bits, in the same stacks."""

    def fault(task, reports):
        for report in reports:
            yield report
            if isinstance(report, Logged) and report.step == 15:
                raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(source, fault=fault, save_every=0.0)
    assert list((tmp_path / "out" / "stacks").glob("*/checkpoint.safetensors"))
    (tmp_path / "out" / FILE).unlink()
    listener = run(source)
    assert any(isinstance(report, Started) and report.step > 0 for report in listener.reports)
    assert_same_study(tmp_path / "out", reference)


def test_workers_that_cannot_use_their_device_fail_no_experiment(run, source, tmp_path, reference):
    """As with a GPU that is out of order: it is not the experiments' fault."""

    def broken(task, reports):
        yield Broken("error", "the GPU does not work")

    with pytest.raises(NanostudyError, match=r"Workers fail before they begin.*does not work"):
        run(source, fault=broken)
    run(source)
    assert_same_study(tmp_path / "out", reference)


def test_two_experiments_of_one_identity_are_refused(run, source, tmp_path):
    """Other names for the same text make no other experiment."""
    text = tmp_path / "copy.txt"
    settings = yaml.safe_load(source.read_text())
    text.write_bytes(Path(settings["settings"]["corpus"]).read_bytes())
    settings["grid"]["corpus"] = [settings["settings"].pop("corpus"), str(text)]
    source.write_text(yaml.safe_dump(settings))
    with pytest.raises(UsageError, match=r"duplicate experiments.*same text"):
        run(source)
    assert not (tmp_path / "out" / "study.yaml").exists()
