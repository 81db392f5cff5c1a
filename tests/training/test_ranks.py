"""One training on many processes is the training on one: the same draws to the bit, the same numbers up to rounding.

What can be shown so runs as threads of this process, whose `add` and `of_first` meet at a barrier; what the processes themselves, their
signals and their ends change runs under torchrun, with gloo.
"""

from __future__ import annotations

import csv
import json
import os
import pickle
import re
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch
from conftest import cpu, jobs_of, small, write_text
from hypothesis import given
from hypothesis import strategies as st
from processes import Child, run_command

from nanostudy import api
from nanostudy.cli import main as cli
from nanostudy.errors import Interrupted, RankLost, UsageError
from nanostudy.model.ranks import ALONE, Ranks, started
from nanostudy.settings import Experiment, Resources
from nanostudy.training import evaluation
from nanostudy.training import train as trainer
from nanostudy.training.events import Evaluated, Finished, Logged, Saving, Stopped
from nanostudy.training.machine import resolve
from nanostudy.training.train import train

posix_only = pytest.mark.skipif(os.name != "posix", reason="needs POSIX signals")
pytestmark = pytest.mark.usefixtures("small_evaluations")

# Of losses and gradient norms, relative; of weights, absolute, where the largest is 1. Seen: 2e-7.
BOUND = 2e-6
ROUNDED = 1e-2  # in bf16 and fp16; seen: 5e-5 of losses, 1.4e-3 of norms, 2.3e-4 of weights


# --- who does what


@given(st.integers(1, 40), st.integers(0, 200))
def test_places_are_divided_evenly_and_in_order(count, more):
    """Every place of the global batch is one rank's, and no rank has two more than another."""
    shares = [Ranks(rank, count).share(count + more) for rank in range(count)]
    assert [place for share in shares for place in share] == list(range(count + more))
    assert max(map(len, shares)) - min(map(len, shares)) <= 1


def test_more_ranks_than_sequences_are_refused():
    with pytest.raises(UsageError, match=r"3 sequences .* too few for 4 ranks"):
        Ranks(1, 4).share(3)


@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        ({}, ALONE),
        ({"RANK": "0", "WORLD_SIZE": "1"}, ALONE),
        ({"WORLD_SIZE": "8"}, ALONE),  # set by something else than torchrun
        ({"RANK": "3", "WORLD_SIZE": "4"}, Ranks(3, 4)),
        ({"RANK": "3", "WORLD_SIZE": "4", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2"}, Ranks(3, 4, 1, 2)),
    ],
)
def test_who_a_process_is(monkeypatch, environment, expected):
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert started() == expected


def test_cores_are_shared_among_the_ranks_of_a_machine(monkeypatch):
    monkeypatch.setattr("nanostudy.training.machine.available_cores", lambda: 9)
    of = {count: resolve(Resources(device="cpu"), Ranks(0, 40, 0, count)) for count in (1, 4, 20)}
    assert {count: machine.threads for count, machine in of.items()} == {1: 9, 4: 2, 20: 1}
    assert of[4].as_dict()["ranks"] == 40
    assert resolve(Resources(device="cpu", threads=3), Ranks(0, 2, 0, 2)).threads == 3


@pytest.mark.parametrize("device", ["cuda:0", "mps"])
def test_one_device_for_several_ranks_is_refused(device):
    with pytest.raises(UsageError, match=rf"device={device} is one device, and there are 2 ranks"):
        resolve(Resources(device=device), Ranks(0, 2, 0, 2))


@pytest.mark.parametrize("command", [["sample", "run"], ["study", "run", "quickstart"], ["doctor"]])
@pytest.mark.parametrize("rank", [0, 1])
def test_only_training_is_for_several_processes(monkeypatch, capsys, command, rank):
    """And one of them says so."""
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "none")
    monkeypatch.setenv("RANK", str(rank))
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setattr(sys, "argv", ["nanostudy", *command])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    message = capsys.readouterr().err
    if rank == 0:
        assert ended.value.code == 2
        assert re.search(
            rf"nanostudy {command[0]} is one process, and torchrun started 2\. Call it without torchrun", message
        )
    else:
        assert (ended.value.code, message) == (1, "")


# --- the same numbers, as threads


@dataclass(frozen=True)
class Thread(Ranks):
    """A rank that is a thread. What ranks add up goes through memory, in order of rank."""

    table: list = None
    barrier: threading.Barrier = None

    def add(self, numbers):
        numbers.copy_(sum(self._exchanged(numbers.clone())))

    def of_first(self, make):
        return pickle.loads(self._exchanged(pickle.dumps(make()) if self.first else None)[0])

    def _exchanged(self, mine):
        self.table[self.rank] = mine
        try:
            self.barrier.wait(60)
            found = list(self.table)
            self.barrier.wait(60)
        except threading.BrokenBarrierError:
            raise RankLost("another thread has ended") from None
        return found


def together(count: int, work) -> list:
    """What `work` returns for each of so many ranks, side by side; or what it raises at the first rank, if anything."""
    table, barrier = [None] * count, threading.Barrier(count)

    def one(rank):
        try:
            return work(Thread(rank, count, table=table, barrier=barrier))
        except BaseException:
            barrier.abort()
            raise

    with ThreadPoolExecutor(count) as pool:
        return list(pool.map(one, range(count)))


@pytest.fixture
def drawn(on_batches):
    """What every place of the global batch got, by seed, step and place: tokens and dropout words."""
    held = {}

    def record(updates, experiments, steps, sequences, batch):
        words = [word.unflatten(0, (len(steps), -1)) for word in next(iter(batch.dropout or ()), ())[:3]]
        for m, (e, step) in enumerate(zip(experiments, steps, strict=True)):
            for i, place in enumerate(sequences):
                parts = [t[m, i].tolist() for t in (batch.inputs, batch.targets, *words)]
                assert held.setdefault((updates.ranks.count, e.seed, step, place), parts) == parts

    on_batches(record)
    return held


def events_of(jobs, corpus, machine, folder: Path, ranks: Ranks = ALONE, **options) -> list:
    path = folder / f"{ranks.count}-{ranks.rank}.safetensors"
    return list(train(jobs, corpus, machine, path, ranks=ranks, **options))


def select(events, kind, name="job0") -> list:
    return [event for event in events if isinstance(event, kind) and event.name == name]


def assert_same_training(ours, theirs, name="job0", bound=BOUND):
    for kind, keys in (
        (Logged, ("step", "loss", "grad_norm")),
        (Evaluated, ("step", "tokens", "train_loss", "val_loss")),
    ):
        pairs = list(zip(select(ours, kind, name), select(theirs, kind, name), strict=True))
        assert pairs
        for our, their in pairs:
            for key in keys:
                assert getattr(our, key) == pytest.approx(getattr(their, key), rel=bound, nan_ok=True), (our, their)
    (our,), (their,) = select(ours, Finished, name), select(theirs, Finished, name)
    for key in ("updates", "skipped", "reason", "best_step"):
        assert getattr(our.result, key) == getattr(their.result, key)
    assert our.result.context_losses == pytest.approx(their.result.context_losses, rel=bound)
    torch.testing.assert_close(our.last_weights, their.last_weights, rtol=0, atol=bound)


def assert_copies(everyone):
    """All ranks yield the same events, to the bit, except times and speeds."""
    first = everyone[0]
    for other in everyone[1:]:
        for ours, theirs in zip(select(first, Logged), select(other, Logged), strict=True):
            assert (ours.loss, ours.grad_norm) == (theirs.loss, theirs.grad_norm)
        for ours, theirs in zip(select(first, Evaluated), select(other, Evaluated), strict=True):
            assert (ours.train_loss, ours.val_loss) == (theirs.train_loss, theirs.val_loss)
        for ours, theirs in zip(select(first, Finished), select(other, Finished), strict=True):
            assert torch.equal(ours.last_weights, theirs.last_weights)
            assert torch.equal(ours.best_weights, theirs.best_weights)
            assert_same_windows(ours.windows, theirs.windows, 0)
        assert_same_windows(select(first, Evaluated)[-1].windows, select(other, Evaluated)[-1].windows, 0)


def assert_same_windows(ours, theirs, bound):
    assert ours.keys() == theirs.keys()
    for name, windows in ours.items():
        np.testing.assert_allclose(windows.losses, theirs[name].losses, rtol=bound)
        assert (windows.context, windows.last) == (theirs[name].context, theirs[name].last)


@pytest.mark.parametrize(
    ("count", "batch_size", "accumulation"), [(2, 4, 1), (2, 4, 3), (3, 4, 1), (3, 4, 2), (4, 5, 1), (5, 5, 1)]
)
def test_many_ranks_train_as_one(corpus, machine, tmp_path, monkeypatch, drawn, count, batch_size, accumulation):
    """Evenly divided or not, and with evaluations in batches that are fewer than ranks, or do not divide."""
    monkeypatch.setitem(evaluation.TOKENS, "cpu", 32)
    settings = {
        "batch_size": batch_size,
        "gradient_accumulation_steps": accumulation,
        "dropout": 0.2,
        "eval_interval": 7,
    }
    jobs = jobs_of(small(**settings))
    alone = events_of(jobs, corpus, machine, tmp_path)
    everyone = together(count, lambda ranks: events_of(jobs, corpus, machine, tmp_path, ranks))
    assert_copies(everyone)
    assert_same_training(everyone[0], alone)
    ends = [select(events, Evaluated)[-1].windows for events in (everyone[0], alone)]
    assert set(ends[0]) == {"train", "val"}
    assert_same_windows(*ends, 1e-3)
    ours = {key[1:]: parts for key, parts in drawn.items() if key[0] == count}
    assert ours == {key[1:]: parts for key, parts in drawn.items() if key[0] == 1}
    assert len(ours) == 20 * batch_size * accumulation
    assert not list(tmp_path.glob(f"{count}-*"))  # nothing was asked to be saved


@pytest.mark.parametrize("count", [2, 3, 30])
def test_an_evaluation_is_divided(corpus, machine, monkeypatch, count):
    """Each batch of windows is read by one rank."""
    monkeypatch.setitem(evaluation.TOKENS, "cpu", 16)

    def read(ranks):
        """Where the windows of each batch start."""
        training, starts = trainer._Training(jobs_of(small()), corpus, machine, lambda: False, ranks=ranks), []
        monkeypatch.setattr(Ranks, "add", lambda self, tensor: None)
        monkeypatch.setattr(
            evaluation, "windows_at", lambda text, at, *more: starts.append(at.tolist()) or at_places(text, at, *more)
        )
        training.evaluated(training.fresh(1), [0], "val")
        return starts

    at_places = evaluation.windows_at
    shares = [read(Ranks(rank, count)) for rank in range(count)]
    assert sorted(batch for share in shares for batch in share) == sorted(read(ALONE))
    assert max(map(len, shares)) - min(map(len, shares)) <= 1


def test_a_stack_whose_slots_are_refilled(corpus, machine, tmp_path):
    """Three members in two slots, of which one diverges."""
    broken = small(seed=2, learning_rate=1e6, grad_clip=0.0, warmup_iters=0)
    jobs = jobs_of(small(seed=1, dropout=0.1), broken, small(seed=3, max_iters=12))
    alone = events_of(jobs, corpus, machine, tmp_path, width=2)
    everyone = together(3, lambda ranks: events_of(jobs, corpus, machine, tmp_path, ranks, width=2))
    assert_copies(everyone)
    for name in ("job0", "job2"):
        assert_same_training(everyone[0], alone, name)
    (ours,), (theirs,) = select(everyone[0], Finished, "job1"), select(alone, Finished, "job1")
    assert ours.result.reason
    assert ours.result.updates == theirs.result.updates


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_other_precisions(corpus, tmp_path, precision):
    """Rounded products differ by how they are divided: the bounds are these precisions' own. All ranks are copies still, and share
    one loss scale, which overflows at first."""
    machine = cpu(precision)
    jobs = jobs_of(small(dropout=0.1, batch_size=5))
    alone = events_of(jobs, corpus, machine, tmp_path)
    everyone = together(2, lambda ranks: events_of(jobs, corpus, machine, tmp_path, ranks))
    assert_copies(everyone)
    assert_same_training(everyone[0], alone, bound=ROUNDED)


# --- stopping and going on, as threads


@pytest.mark.parametrize("asked", [7, 12, 18, 27])
def test_a_request_to_stop_at_one_rank_stops_all_after_the_same_update(corpus, machine, tmp_path, monkeypatch, asked):
    """In the midst of an update or an evaluation, which are made again: on one process, what is left comes out the same."""
    monkeypatch.setitem(evaluation.TOKENS, "cpu", 16)
    jobs = jobs_of(small(dropout=0.2, batch_size=5, eval_interval=5))

    def stopped(ranks):
        calls = iter(range(10**9))
        return events_of(jobs, corpus, machine, tmp_path, ranks, stop=lambda: ranks.rank == 1 and next(calls) >= asked)

    everyone = together(2, stopped)
    steps = {select(events, Stopped)[0].step for events in everyone}
    assert len(steps) == 1
    assert not select(everyone[0], Finished)
    assert [path.name for path in tmp_path.iterdir()] == ["2-0.safetensors"]  # the first alone writes
    (tmp_path / "2-0.safetensors").rename(tmp_path / "1-0.safetensors")
    rest = events_of(jobs, corpus, machine, tmp_path)
    (begun,) = [event for event in rest if type(event).__name__ == "Started"]
    assert begun.step == steps.pop()
    before = [event for event in everyone[0] if not isinstance(event, Stopped | Saving)]
    (tmp_path / "1-0.safetensors").unlink()
    assert_same_training([*before, *rest], events_of(jobs, corpus, machine, tmp_path))


def test_several_go_on_with_what_one_began(corpus, machine, tmp_path):
    jobs = jobs_of(small(dropout=0.2))
    whole = events_of(jobs, corpus, machine, tmp_path)
    steps = iter(range(9))
    begun = events_of(jobs, corpus, machine, tmp_path, stop=lambda: next(steps, None) is None)
    assert select(begun, Stopped)
    (tmp_path / "1-0.safetensors").rename(tmp_path / "3-0.safetensors")
    other = resolve(Resources(device="cpu", precision="fp32", threads=1), Ranks(0, 3))
    everyone = together(3, lambda ranks: events_of(jobs, corpus, other, tmp_path, ranks))
    assert_copies(everyone)
    before = [event for event in begun if not isinstance(event, Stopped | Saving)]
    assert_same_training([*before, *everyone[0]], whole)
    assert everyone[2][0].notes == ("resumed under other conditions, so not bit for bit: ranks 1 -> 3",)


@pytest.mark.parametrize("asked", [12, 17, 25])
def test_a_rank_that_is_lost_costs_no_update(corpus, machine, tmp_path, monkeypatch, asked):
    """The first rank saves what it has, all up to the last word of the other: in an update or an evaluation."""
    monkeypatch.setitem(evaluation.TOKENS, "cpu", 16)
    jobs, heard = jobs_of(small(dropout=0.2, eval_interval=4)), []

    def work(ranks):
        calls = iter(range(asked))

        def dies():
            if ranks.rank == 1:
                next(calls)  # StopIteration: whatever it is, it is no request to stop
            return False

        for event in train(jobs, corpus, machine, tmp_path / f"{ranks.rank}.safetensors", ranks=ranks, stop=dies):
            if ranks.first:
                heard.append(event)

    with pytest.raises(RankLost):
        together(2, work)
    assert [path.name for path in tmp_path.iterdir()] == ["0.safetensors"]
    assert isinstance(heard.pop(), Saving)
    rest = list(train(jobs, corpus, machine, tmp_path / "0.safetensors"))
    assert rest[0].step == heard[-1].step > 0
    assert_same_training([*heard, *rest], events_of(jobs, corpus, machine, tmp_path))


# --- processes

SETTINGS = {
    "corpus": "text.txt",
    "n_layer": 1,
    "n_head": 2,
    "n_embd": 16,
    "block_size": 16,
    "batch_size": 5,
    "dropout": 0.2,
    "max_iters": 120,
    "warmup_iters": 20,
    "eval_interval": 20,
    "log_interval": 1,
    "sample_tokens": 40,
}
RESOURCES = {"device": "cpu", "precision": "fp32", "threads": 1}
LONG = 5e-5  # after 120 updates; seen: 2e-7 of losses, 6e-6 of norms, 1.2e-7 of weights
CHANGE = """
import os
from nanostudy import api
from nanostudy.errors import UsageError
from nanostudy.training import train
if os.environ["RANK"] == "1":
    {change}
"""


def arguments(folder: Path, out: str, settings) -> list[str]:
    write_text(folder / "text.txt")
    (folder / "settings.yaml").write_text("{}")
    given = [f"{name}={value}" for name, value in {**SETTINGS, **settings, **RESOURCES}.items()]
    return ["train", "settings.yaml", *given, "--out", out]


class Torchrun:
    """`nanostudy train` on so many processes, by torchrun."""

    def __init__(self, folder: Path, count: int, change: str = "pass", **settings) -> None:
        script = folder / "command.py"
        script.write_text(f"{CHANGE.format(change=change)}\nfrom nanostudy.cli.main import main\nmain()\n")
        words = ["--standalone", "--nproc-per-node", str(count), script, *arguments(folder, "run", settings)]
        self.process = subprocess.Popen(
            [sys.executable, "-m", "torch.distributed.run", *words],
            cwd=folder,
            env={**os.environ, "OMP_NUM_THREADS": "1"},  # or torchrun says at length that it sets it
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )

    def running(self) -> bool:
        return self.process.poll() is None

    def send_signal(self, number: int) -> None:
        self.process.send_signal(number)

    def end(self) -> tuple[int, str]:
        """Exit code, and the output of the ranks without torchrun's own lines."""
        output, _ = self.process.communicate(timeout=120)
        output = re.split(r"^Traceback.*\n.*\n.*\n.*torch/distributed/run.py", output, flags=re.MULTILINE)[0]
        return self.process.returncode, re.sub(r"^[WE]\d{4} .*\n", "", output, flags=re.MULTILINE)


class Forked:
    """The same with the environment that torchrun sets, and without torchrun: quickly started."""

    def __init__(self, folder: Path, count: int, change: str = "pass", **settings) -> None:
        # as torchrun's agent, this process keeps the store, which outlives rank 0
        self.store = torch.distributed.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        common = {
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(self.store.port),
            "TORCHELASTIC_USE_AGENT_STORE": "True",
        }
        common |= {"WORLD_SIZE": str(count), "LOCAL_WORLD_SIZE": str(count)}
        words, before = arguments(folder, "run", settings), CHANGE.format(change=change)
        self.ranks = [
            Child(
                folder, run_command, *words, before=before, environment={**common, "RANK": str(r), "LOCAL_RANK": str(r)}
            )
            for r in range(count)
        ]

    def running(self) -> bool:
        return all(rank.poll() is None for rank in self.ranks)

    def send_signal(self, number: int) -> None:
        for rank in self.ranks:
            rank.send_signal(number)

    def end(self) -> tuple[int, str]:
        output = "".join(rank.communicate() for rank in self.ranks)
        return int(any(rank.returncode for rank in self.ranks)), output


def wait_for_evaluation(folder: Path, step: int, training) -> None:
    deadline = time.monotonic() + 100
    while not (steps := [int(row["step"]) for row in rows(folder / "evaluations.csv")]) or steps[-1] < step:
        assert training.running(), training.end()
        assert time.monotonic() < deadline
        time.sleep(0.01)


def rows(path: Path) -> list[dict[str, str]]:
    return list(csv.DictReader(path.read_text(encoding="utf-8").splitlines())) if path.is_file() else []


def on_one(out: Path, until: int | None = None, **settings) -> None:
    """In this process; stopped by Ctrl-C after update `until`."""

    def listen(event):
        if isinstance(event, Logged) and event.step == until:
            signal.raise_signal(signal.SIGINT)

    text = str(write_text(out.parent / "text.txt"))
    experiment = Experiment(**{**SETTINGS, **settings, "corpus": text})
    if until is None:
        api.train(experiment, out, resources=Resources(**RESOURCES), listen=listen)
        return
    with pytest.raises(Interrupted):
        api.train(experiment, out, resources=Resources(**RESOURCES), listen=listen)


def assert_same_run(run: Path, reference: Path, bound: float) -> None:
    for name, keys in (("training.csv", ("loss", "grad_norm")), ("evaluations.csv", ("train_loss", "val_loss"))):
        for ours, theirs in zip(rows(run / name), rows(reference / name), strict=True):
            assert ours["step"] == theirs["step"]
            for key in keys:
                assert float(ours[key]) == pytest.approx(float(theirs[key]), rel=bound), (name, ours, theirs)
    for name in ("best.safetensors", "last.safetensors", "optimizer.safetensors"):
        ours, theirs = (safetensors.torch.load_file(folder / name) for folder in (run, reference))
        for key, tensor in ours.items():
            torch.testing.assert_close(tensor, theirs[key], rtol=0, atol=bound)
    ours, theirs = (json.loads((folder / "run.json").read_text(encoding="utf-8")) for folder in (run, reference))
    for key in ("identity", "status", "updates", "tokens"):
        assert ours[key] == theirs[key]
    assert ours["context_losses"] == pytest.approx(theirs["context_losses"], rel=bound)
    assert {path.name for path in run.iterdir()} == {path.name for path in reference.iterdir()}


@pytest.fixture(scope="module")
def reference(tmp_path_factory) -> Path:
    """On one process, never stopped."""
    out = tmp_path_factory.mktemp("one") / "run"
    on_one(out)
    return out


def notes(run: Path) -> list[str]:
    return json.loads((run / "run.json").read_text(encoding="utf-8"))["notes"]


def stopped(training, number: int, run: Path, step: int) -> str:
    """The output of ranks that get a signal once the run has come to that step. All is saved."""
    wait_for_evaluation(run, step, training)
    training.send_signal(number)
    code, output = training.end()
    assert (code, "Traceback" in output) == (1, False), output
    (message,) = re.findall(r"^nanostudy: (.*)$", output, re.MULTILINE)
    parts = re.fullmatch(r"Stopped after (\d+) updates\. All of it is saved; go on with: nanostudy train run", message)
    assert int(parts[1]) == int(rows(run / "training.csv")[-1]["step"]) >= step
    return output


@posix_only
def test_one_two_and_three_processes_take_turns(tmp_path, reference):
    """Stopped by Ctrl-C and by a termination signal. Five sequences: three and two of them, or two, two and one."""
    run = tmp_path / "run"
    on_one(run, until=15)
    output = stopped(Torchrun(tmp_path, 2), signal.SIGINT, run, 40)
    assert "fp32, 2 ranks of 1 thread" in output
    assert output.count("resumed after update 15") == 1
    stopped(Forked(tmp_path, 3), signal.SIGTERM, run, 80)
    on_one(run)
    assert_same_run(run, reference, LONG)
    assert [note.rpartition(": ")[2] for note in notes(run)] == ["ranks 1 -> 2", "ranks 2 -> 3", "ranks 3 -> 1"]


@posix_only
@pytest.mark.parametrize("launch", [Forked, pytest.param(Torchrun, marks=pytest.mark.soak)])
def test_a_process_dies_and_two_go_on(tmp_path, reference, launch):
    """Killed before an evaluation. Rank 0 saves the rest, and another number of processes brings the run to its end."""
    run = tmp_path / "run"
    dies = "train._Training.elapse = lambda self, stack: stack.slots[0].step >= 60 and os.kill(os.getpid(), 9)"
    code, output = launch(tmp_path, 3, dies).end()
    assert (code, "Traceback" in output) == (1, False), output
    (lost,) = re.findall(r"^nanostudy: (.*)$", output, re.MULTILINE)
    assert re.search(
        r"Another rank has ended, or cannot be reached \(.*\), and this training with it\. Its checkpoint is", lost
    )
    assert int(rows(run / "training.csv")[-1]["step"]) == 60
    code, output = launch(tmp_path, 2).end()
    assert code == 0, output
    for once in ("resumed after update 60", "final    train", "report   run/report.md"):
        assert output.count(once) == 1, output
    assert_same_run(run, reference, LONG)
    assert notes(run) == ["resumed under other conditions, so not bit for bit: ranks 3 -> 2"]
    assert json.loads((run / "run.json").read_text(encoding="utf-8"))["machine"]["ranks"] == 2
    assert "| ranks | 2, each with these threads |" in (run / "report.md").read_text(encoding="utf-8")


@posix_only
@pytest.mark.parametrize("launch", [Forked, pytest.param(Torchrun, marks=pytest.mark.soak)])
@pytest.mark.parametrize(
    ("change", "settings", "message"),
    [
        ("api.VERSION = '0.0.7'", {}, r"rank 1 would not train the same as the others: nanostudy 0\.0\.7 there, .* at rank 0\."),
        ("def gone(*_): raise UsageError('There is no such text.')\n    api.Inputs.corpus = gone", {}, r"rank 1: There is no such text\."),
        ("pass", {"n_lyer": 1}, r"There is no setting 'n_lyer'\. Did you mean n_layer\?"),
    ],
)  # fmt: skip
def test_an_error_is_reported_once_and_ends_every_rank(tmp_path, launch, change, settings, message):
    """Wherever it occurs, and however many ranks find it. Nothing is started."""
    begun = time.monotonic()
    code, output = launch(tmp_path, 2, change, **settings).end()
    assert code == 1
    assert re.fullmatch(rf"nanostudy: {message}\n*", output), output
    assert time.monotonic() - begun < 60
    assert not (tmp_path / "run").exists()
