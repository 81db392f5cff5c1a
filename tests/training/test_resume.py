"""Resuming is exact: real processes, stopped and killed, end with the same bits as one that never was.

Two runs are compared by what their folders hold: tensors as the safetensors library reads them, and the tables' rows but
for times and speeds.
"""

import csv
import hashlib
import json
import os
import random
import re
import shlex
import shutil
import signal
import sys
import time
from pathlib import Path

import pytest
import safetensors.torch
import torch
from processes import WITHOUT_REPORT, Child, run_command, run_training

from nanostudy import api
from nanostudy.cli import main as cli
from nanostudy.device import compiler
from nanostudy.errors import Interrupted, NanostudyError
from nanostudy.settings import Experiment, Resources
from nanostudy.training import machine
from nanostudy.training.events import Evaluated, Logged
from nanostudy.training.tensors import load_tensors

posix_only = pytest.mark.skipif(os.name != "posix", reason="needs POSIX signals")

SETTINGS = {
    "corpus": "text.txt",
    "n_layer": 2,
    "n_head": 2,
    "n_embd": 16,
    "block_size": 16,
    "batch_size": 4,
    "gradient_accumulation_steps": 2,
    "dropout": 0.2,
    "seed": 3,
    "max_iters": 250,
    "warmup_iters": 20,
    "learning_rate": 0.01,
    "eval_interval": 50,
    "log_interval": 1,
    "sample_tokens": 40,
}
RESOURCES = {"device": "cpu", "precision": "fp32", "threads": 1}
# threads that wait without spinning: what else runs on this machine would slow them down a hundredfold
WAITING = {"OMP_WAIT_POLICY": "PASSIVE"}
RESULTS = {"best.safetensors", "last.safetensors", "window_losses.safetensors"}


def text_in(folder: Path) -> Path:
    draw = random.Random(1)
    words = "so long as men can breathe or eyes can see lives this and gives life to thee".split()  # noqa: SIM905
    lines = [" ".join(draw.choice(words) for _ in range(8)) for _ in range(60)]
    (folder / "text.txt").write_text("\n".join(lines) + "\n", encoding="utf-8", newline="\n")
    return folder


def start(folder: Path, out: str, save_every: float = 0.05, **settings) -> Child:
    """A training in a process of its own, started."""
    return Child(folder, run_training, {**SETTINGS, **settings}, out, RESOURCES, save_every, environment=WAITING)


def nanostudy(folder: Path, *args: str) -> Child:
    return Child(folder, run_command, *args, before=WITHOUT_REPORT, environment=WAITING)


def command(out: str, **settings) -> list[str]:
    """What makes `nanostudy` train the same; for `train`."""
    given = {**SETTINGS, "decay_lr": "true", **settings, **RESOURCES}
    return ["train", "settings of this test.yaml", *(f"{name}={value}" for name, value in given.items()), "--out", out]


def finish(process: Child) -> None:
    output = process.communicate()
    assert process.returncode == 0, output


def rows(path: Path, leave_out: str) -> list[dict[str, str]]:
    with path.open(encoding="utf-8", newline="") as file:
        return [{key: value for key, value in row.items() if key != leave_out} for row in csv.DictReader(file)]


def assert_same_run(run: Path, reference: Path) -> None:
    for name in RESULTS:
        ours, theirs = (safetensors.torch.load_file(folder / name) for folder in (run, reference))
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(ours[key], theirs[key]) for key in ours), name
    for name, leave_out in (("training.csv", "tokens_per_second"), ("evaluations.csv", "seconds")):
        assert rows(run / name, leave_out) == rows(reference / name, leave_out), name
    ours, theirs = (json.loads((folder / "run.json").read_text(encoding="utf-8")) for folder in (run, reference))
    for key in (
        "identity",
        "status",
        "updates",
        "skipped_updates",
        "tokens",
        "context_losses",
        "parameters",
        "settings",
    ):
        assert ours[key] == theirs[key], key
    for key in ("initial", "final", "best"):
        assert {**ours[key], "seconds": 0} == {**theirs[key], "seconds": 0}, key
    assert (run / "sample.txt").read_bytes() == (reference / "sample.txt").read_bytes()
    # the first line tells where the text lies, from any folder: two texts here, alike
    ours, theirs = ((folder / "settings.yaml").read_text(encoding="utf-8").splitlines() for folder in (run, reference))
    assert ours[0].startswith("corpus: ")
    assert ours[1:] == theirs[1:]
    assert not (run / "checkpoint.safetensors").exists()


def contents(folder: Path) -> dict[str, str]:
    return {
        path.name: hashlib.sha256(path.read_bytes()).hexdigest()
        for path in folder.rglob("*")
        if path.is_file() and path.name != ".lock"
    }


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    return text_in(tmp_path_factory.mktemp("resume"))


@pytest.fixture(scope="module")
def reference(place) -> Path:
    """The folder of a run that nothing disturbed, and that never saved on the way."""
    finish(start(place, "reference", save_every=1e9))
    return place / "reference"


# --- killed


def trained_rows(out: Path) -> int:
    try:
        return (out / "training.csv").read_bytes().count(b"\n") - 1
    except OSError:
        return -1


def killed_until_done(place: Path, out: Path, kills: int, **settings) -> list[int]:
    """Starts the training again and again, kills it at random moments, and at last lets it end.

    Returns the number of updates on record after each kill.
    """
    progress = []
    for kill in range(kills):
        process, before = start(place, out.name, **settings), trained_rows(out)
        into_training = kill % 3 != 2  # the others hit anything from the first import on
        while into_training and trained_rows(out) == before and process.poll() is None:
            time.sleep(0.001)
        time.sleep(random.random() * (0.5 if into_training else 2))
        process.kill()
        words = process.communicate()
        if process.returncode == 0:
            break
        assert "Traceback" not in words
        progress.append(trained_rows(out))
    finish(start(place, out.name, **settings))
    return progress


def test_killed_runs_end_with_the_same_bits(place, reference):
    progress = killed_until_done(place, place / "killed", 4)
    assert_same_run(place / "killed", reference)
    assert any(0 < updates < SETTINGS["max_iters"] for updates in progress), progress


@pytest.mark.soak
@pytest.mark.parametrize("other", [{}, {"tie_embeddings": False, "bias": True}], ids=["default", "biases"])
def test_thirty_kills_end_with_the_same_bits(tmp_path, other):
    settings = {"max_iters": 3000, "eval_interval": 150, **other}
    finish(start(text_in(tmp_path), "reference", save_every=1e9, **settings))
    progress = killed_until_done(tmp_path, tmp_path / "killed", 30, **settings)
    assert_same_run(tmp_path / "killed", tmp_path / "reference")
    assert len({updates for updates in progress if 0 < updates < 3000}) > 5, progress
    assert not list((tmp_path / "killed").glob(".*.tmp"))


# --- asked to stop


@pytest.fixture(scope="module")
def from_commands(place) -> Path:
    """What the commands read their settings from."""
    (place / "settings of this test.yaml").write_text("decay_lr: true\n", encoding="utf-8")
    return place


def stopped(place: Path, out: str, number: int) -> tuple[Path, str, float]:
    """A training by command that got a signal in its middle: its folder, its last words, and the seconds it took to end."""
    process = nanostudy(place, *command(out))
    while trained_rows(place / out) < 30:
        assert process.poll() is None, process.communicate()
        time.sleep(0.002)
    begun = time.monotonic()
    process.send_signal(number)
    words = process.communicate(timeout=60)
    assert process.returncode == 130, words
    return place / out, words, time.monotonic() - begun


@posix_only
@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM", "SIGHUP"])
def test_a_signal_saves_all_and_the_command_it_names_goes_on(from_commands, reference, name):
    run, words, seconds = stopped(from_commands, f"got-{name}", getattr(signal, name))
    assert seconds < 5
    assert "Traceback" not in words
    step = int(re.search(r"Stopped after ([\d,]+) updates", words)[1].replace(",", ""))
    assert trained_rows(run) == step, "all of it is saved"
    assert (run / "checkpoint.safetensors").exists()
    assert json.loads((run / "run.json").read_text(encoding="utf-8"))["status"] == "unfinished"

    told = shlex.split(words.split("go on with: ")[1])
    assert told[0] == "nanostudy"
    finish(nanostudy(from_commands, *told[1:]))
    assert_same_run(run, reference)


class Stop:
    """Listens to a training and asks it to stop, as Ctrl-C does, at the first event of a kind."""

    def __init__(self, kind: type = Logged, step: int = 5) -> None:
        self.kind, self.step = kind, step

    def __call__(self, event) -> None:
        if isinstance(event, self.kind) and event.step >= self.step:
            signal.raise_signal(signal.SIGINT)


@pytest.fixture
def here(tmp_path, monkeypatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(machine, "available_cores", lambda: 1)
    return text_in(tmp_path)


def train(out, listen=lambda event: None, resources=RESOURCES, **settings):
    small = {**SETTINGS, "max_iters": 20, "eval_interval": 10, **settings}
    return api.train(Experiment(**small), out, resources=Resources(**resources), listen=listen)


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Path:
    """The folder of what `train` trains, never interrupted."""
    folder = text_in(tmp_path_factory.mktemp("whole"))
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setattr(machine, "available_cores", lambda: 1)
        train("run")
    return folder / "run"


def interrupted(out, listen=None, **settings) -> str:
    with pytest.raises(Interrupted) as stop:
        train(out, listen or Stop(), **settings)
    return str(stop.value)


@pytest.mark.parametrize("out", ["run", "a run", "it's", "quickstart", "runs/deep/er"])
@pytest.mark.usefixtures("no_report")
def test_the_command_it_names_is_the_one_that_goes_on(here, monkeypatch, out, whole):
    told = shlex.split(interrupted(out).split("go on with: ")[1])
    assert told[:2] == ["nanostudy", "train"]
    monkeypatch.setattr(sys, "argv", told)
    with pytest.raises(SystemExit) as end:
        cli.main()
    assert not end.value.code
    assert_same_run(here / out, whole)


@pytest.mark.parametrize("kind", [Logged, Evaluated])
@pytest.mark.usefixtures("no_report")
def test_stopped_again_and_again(here, kind, whole):
    for step in range(1, 20, 3) if kind is Logged else (0, 10):
        interrupted("run", Stop(kind, step))
    train("run")
    assert_same_run(here / "run", whole)


@pytest.mark.usefixtures("no_report")
def test_a_second_ctrl_c_is_not_waited_for_and_costs_only_what_was_not_saved(here, whole):
    interrupted("run")
    stop, steps = Stop(step=12), []

    def twice(event) -> None:
        steps.extend([event.step] * isinstance(event, Logged))
        stop(event)
        stop(event)

    with pytest.raises(KeyboardInterrupt):
        train("run", twice)
    assert steps == list(range(6, 13))
    train("run")
    assert_same_run(here / "run", whole)


@pytest.mark.usefixtures("no_report")
def test_python_says_the_same_as_the_command_line(here):
    interrupted("run")
    steps = []
    train("run", lambda event: steps.append(event.step) if isinstance(event, Logged) else None)
    assert steps == list(range(6, 21))


def test_other_conditions_are_told(here):
    interrupted("run")
    train("run", resources={**RESOURCES, "precision": "bf16"})
    metadata = json.loads((here / "run" / "run.json").read_text(encoding="utf-8"))
    assert re.search(r"not bit for bit.*precision fp32 -> bf16", " ".join(metadata["notes"]))
    assert "not bit for bit" in (here / "run" / "report.md").read_text(encoding="utf-8")


@pytest.mark.skipif(compiler() is None, reason="no C++ compiler is on the PATH")
@pytest.mark.usefixtures("no_report")
def test_going_on_without_kernels_is_told(here):
    interrupted("run")
    train("run", resources={**RESOURCES, "compile": "no"})
    metadata = json.loads((here / "run" / "run.json").read_text(encoding="utf-8"))
    assert re.search(r"not bit for bit.*: compiled True -> False$", metadata["notes"][-1])
    assert metadata["machine"]["compiled"] is False


@pytest.mark.usefixtures("no_report")
def test_settings_that_change_no_weight_may_change_on_the_way(here, whole):
    interrupted("run")
    train("run", sample_tokens=5)
    for name in RESULTS:
        ours, theirs = (safetensors.torch.load_file(folder / name) for folder in (here / "run", whole))
        assert all(torch.equal(ours[key], theirs[key]) for key in ours)


# --- between the end of the training and the end of the work


def test_what_was_still_to_be_done_is_done_without_training_again(here, whole):
    interrupted("other")
    run = Path(shutil.copytree(whole, here / "run"))
    before = contents(run)
    for missing in (["report.md"], ["sample.txt", "report.md", "curve.png"]):
        for name in missing:
            (run / name).unlink()
        shutil.copy(here / "other" / "checkpoint.safetensors", run)
        events = []
        train("run", events.append)
        assert events == []
        assert contents(run) == before


@pytest.mark.usefixtures("no_report")
def test_a_kill_among_the_last_writes(here, whole):
    """Both weights are written, run.json does not yet tell of them."""
    interrupted("run")
    for name in RESULTS:
        shutil.copy(whole / name, here / "run")
    train("run")
    assert_same_run(here / "run", whole)


# --- checkpoints that are damaged, or not what they seem


def damage_nothing(path: Path) -> None:
    path.write_bytes(b"")


def damage_end(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


def damage_tensor(path: Path) -> None:
    whole = bytearray(path.read_bytes())
    whole[-100] ^= 1
    path.write_bytes(whole)


def damage_step(path: Path) -> None:
    """The number of updates done, which decides the data, the dropout and the rate of all that follow."""
    whole = path.read_bytes()
    changed = re.sub(rb'(\\"step\\": )5', rb"\g<1>7", whole)
    assert changed != whole
    path.write_bytes(changed)


def damage_kind(path: Path) -> None:
    shutil.copy(path.parent.parent / "last.safetensors", path)


@pytest.mark.parametrize("damage", [damage_nothing, damage_end, damage_tensor, damage_step, damage_kind])
def test_a_damaged_checkpoint_is_named_and_the_folder_left_alone(here, damage, whole):
    interrupted("run")
    shutil.copy(whole / "last.safetensors", here)
    damage(here / "run" / "checkpoint.safetensors")
    before = contents(here / "run")
    with pytest.raises(NanostudyError, match=r"checkpoint\.safetensors") as failure:
        train("run")
    assert contents(here / "run") == before
    if damage is not damage_kind:
        # what a person can do: without it, the training begins again
        assert re.search("[Dd]elete|[Rr]emove|--out|Restore", str(failure.value))


def test_a_checkpoint_of_another_run_is_refused(here):
    interrupted("run")
    interrupted("other", seed=4)
    shutil.copy(here / "other" / "checkpoint.safetensors", here / "run")
    before = contents(here / "run")
    with pytest.raises(NanostudyError, match=r"checkpoint\.safetensors.*other experiment"):
        train("run")
    assert contents(here / "run") == before


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="needs /proc to see what a process has mapped")
def test_a_resumed_training_does_not_hang_on_its_file(here):
    """Windows replaces no file that is mapped into memory, and a mapped file that a network drive loses ends the process."""
    interrupted("run")
    tensors, _ = load_tensors(here / "run" / "checkpoint.safetensors")
    assert "checkpoint.safetensors" not in Path("/proc/self/maps").read_text()
    assert tensors


@posix_only
@pytest.mark.usefixtures("no_report")
def test_a_checkpoint_that_cannot_be_written_leaves_the_one_before(here, whole):
    import resource

    interrupted("run")
    checkpoint = here / "run" / "checkpoint.safetensors"
    before = checkpoint.read_bytes()
    handler, (soft, hard) = signal.signal(signal.SIGXFSZ, signal.SIG_IGN), resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (len(before) // 2, hard))
    try:
        with pytest.raises(NanostudyError, match=r"checkpoint\.safetensors.*unchanged"):
            train("run", Stop(step=12))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, handler)
    assert checkpoint.read_bytes() == before
    train("run")
    assert_same_run(here / "run", whole)


@pytest.mark.usefixtures("no_report")
def test_without_its_checkpoint_a_run_begins_again(here, whole):
    interrupted("run")
    (here / "run" / "checkpoint.safetensors").unlink()
    train("run")
    assert_same_run(here / "run", whole)


@pytest.mark.usefixtures("no_report")
def test_what_killed_writes_leave_does_no_harm_and_is_cleared_away(here, whole):
    interrupted("run")
    for name in ("checkpoint.safetensors", "run.json", "training.csv", "last.safetensors"):
        (here / "run" / f".{name}.4711.tmp").write_bytes(b"half of it")
    with (here / "run" / "training.csv").open("a") as file:
        file.write("6,3.1,0.00")
    train("run")
    assert_same_run(here / "run", whole)
    assert not list((here / "run").glob(".*.tmp"))
