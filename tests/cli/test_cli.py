"""The commands as people meet them, and all the ways in which people and machines go wrong.

Whole trainings, and what only a process of its own can show, run as `python -m nanostudy`. The many mistakes go through
`cli.main` in this process: an exception that is no message fails the test, as its traceback would a person.
"""

import contextlib
import errno
import hashlib
import io
import json
import math
import os
import pickle
import random
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterable
from pathlib import Path

import commands
import pytest
import safetensors.torch
import torch
import yaml
from commands import Outcome
from conftest import cache_in, record_again, without_report

from nanostudy import api
from nanostudy.atomic import sole_owner
from nanostudy.cli import main as cli
from nanostudy.cli.options import presets_like, studies_like
from nanostudy.model import kernels
from nanostudy.settings import FIELDS, Experiment
from nanostudy.training import machine
from nanostudy.version import VERSION
from nanostudy.view import View

posix_only = pytest.mark.skipif(os.name != "posix", reason="needs POSIX signals and limits")
linux_only = pytest.mark.skipif(sys.platform != "linux", reason="needs Linux's limits and mounts")

SMALL = [
    "corpus=small.txt",
    "n_layer=1",
    "n_head=2",
    "n_embd=16",
    "block_size=16",
    "batch_size=4",
    "max_iters=20",
    "eval_interval=10",
    "log_interval=5",
    "sample_tokens=40",
    "device=cpu",
    "precision=fp32",
    "threads=1",
]
WORDS = [
    "the",
    "king",
    "and",
    "queen",
    "of",
    "stars",
    "sail",
    "over",
    "deep",
    "blue",
    "seas",
    "while",
    "night",
    "falls",
]
FILES = {
    "settings.yaml", "run.json", "training.csv", "evaluations.csv", "window_losses.safetensors", "best.safetensors", "last.safetensors", "sample.txt", "samples.json",
    "curve.png", "curve.svg", "report.md", "report/index.html", "report/results.csv", "optimizer.safetensors",
}  # fmt: skip
UNDRAWN = {name for name in FILES if not name.startswith(("curve.", "report/"))}


def some_text(seed: int = 0, lines: int = 60) -> str:
    draw = random.Random(seed)
    return "".join(" ".join(draw.choice(WORDS) for _ in range(9)).capitalize() + ".\n" for _ in range(lines))


def said(outcome: Outcome, code: int, *words: str) -> None:
    """The exit code, and a message that has each of the words (regular expressions) and is no traceback."""
    assert outcome.code == code, outcome
    assert "Traceback" not in outcome.out + outcome.err, outcome
    for word in words:
        assert re.search(word, outcome.err), (word, outcome.err)
    if code:
        assert re.search(r"^(nanostudy: |Usage: |This run diverged)", outcome.out + outcome.err, re.MULTILINE), outcome


def contents(folder: Path) -> dict[str, str]:
    """Every file with its checksum; the lock, which is empty, left out."""
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.name != ".lock"
    }


@contextlib.contextmanager
def unchanged(folder: Path):
    before = contents(folder)
    yield
    assert contents(folder) == before


def once(args: Iterable[object]) -> list[str]:
    """Arguments without the settings that later ones give again: SMALL's are where a test begins."""
    texts = [str(arg) for arg in args]
    last = {text.partition("=")[0]: i for i, text in enumerate(texts) if "=" in text}
    return [text for i, text in enumerate(texts) if last.get(text.partition("=")[0], i) == i]


def start(*args: str, cwd: Path, **options) -> subprocess.Popen:
    """`python -m nanostudy` with these arguments, begun."""
    # threads that wait without spinning: what else runs on this machine would slow them down a hundredfold
    calm = {"OMP_WAIT_POLICY": "PASSIVE", "NANOSTUDY_CACHE": str(cwd / "cache")}
    environment = {**os.environ, **calm, **options.pop("env", {})}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "encoding": "utf-8", "errors": "replace", **options}
    return subprocess.Popen([sys.executable, "-m", "nanostudy", *once(args)], cwd=cwd, env=environment, **pipes)


def outcome(process: subprocess.Popen) -> Outcome:
    out, err = process.communicate(timeout=120)
    return Outcome(process.returncode, out, err)


def nanostudy(*args: str, cwd: Path, **options) -> Outcome:
    return outcome(start(*args, cwd=cwd, **options))


def wait_for(condition, process: subprocess.Popen) -> None:
    deadline = time.monotonic() + 60
    while not condition():
        assert process.poll() is None, outcome(process)
        assert time.monotonic() < deadline
        time.sleep(0.005)


@pytest.fixture
def here(tmp_path, monkeypatch) -> Path:
    """An empty folder to work in, with a small text; no corpus is at hand but this."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("NANOSTUDY_CACHE", str(cache_in(tmp_path)))
    monkeypatch.delenv("NANOSTUDY_CORPORA", raising=False)
    Path("small.txt").write_text(some_text(), encoding="utf-8", newline="\n")
    return tmp_path


@pytest.fixture
def call(here, monkeypatch):
    """`nanostudy ...` in this process, with one thread unless told otherwise."""
    monkeypatch.setattr(machine, "available_cores", lambda: 1)
    return lambda *args: commands.call(*once(args))


@pytest.fixture
def draws() -> None:
    """For tests of what a whole training leaves: they wait for the report and its figures."""


@pytest.fixture(autouse=True)
def _report(request):
    with contextlib.nullcontext() if "draws" in request.fixturenames else without_report():
        yield


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> tuple[Path, Outcome]:
    """A finished run's folder, and what was said."""
    folder = tmp_path_factory.mktemp("finished")
    cache_in(folder)
    (folder / "small.txt").write_text(some_text(), encoding="utf-8", newline="\n")
    return folder, nanostudy("train", "quickstart", *SMALL, "--out", "run", cwd=folder)


@pytest.fixture
def run(here, finished) -> Path:
    """A copy of the finished run, to do harm to."""
    shutil.copytree(finished[0] / "run", here / "run")
    return here / "run"


# --- a training and its folder


def test_train_leaves_a_whole_folder(finished):
    folder, told = finished
    said(told, 0)
    run = folder / "run"
    assert set(contents(run)) == FILES
    for name in ("sample.txt", "report.md"):
        assert str(Path("run") / name) in told.out
    assert told.err == ""

    metadata = json.loads((run / "run.json").read_text(encoding="utf-8"))
    assert (metadata["status"], metadata["updates"], metadata["tokens"]) == ("finished", 20, 20 * 4 * 16)
    assert metadata["corpus"]["sha256"] == hashlib.sha256((folder / "small.txt").read_bytes()).hexdigest()
    assert (metadata["machine"]["device"], metadata["machine"]["precision"], metadata["machine"]["threads"]) == (
        "cpu",
        "fp32",
        1,
    )
    assert metadata["machine"]["torch"] == torch.__version__

    training = [line.split(",") for line in (run / "training.csv").read_text(encoding="utf-8").splitlines()]
    assert training[0] == ["step", "loss", "learning_rate", "grad_norm", "tokens_per_second"]
    assert [row[0] for row in training[1:]] == ["5", "10", "15", "20"]
    evaluations = [line.split(",") for line in (run / "evaluations.csv").read_text(encoding="utf-8").splitlines()]
    assert [row[:2] for row in evaluations[1:]] == [["0", "0"], ["10", "640"], ["20", "1280"]]
    loss, bits = evaluations[0].index("val_loss"), evaluations[0].index("val_bits_per_character")
    for row in evaluations[1:]:
        assert float(row[bits]) == pytest.approx(float(row[loss]) / math.log(2))

    settings = yaml.safe_load((run / "settings.yaml").read_text(encoding="utf-8"))
    assert set(settings) == {*FIELDS, "device", "precision", "compile", "threads"}
    assert (settings["n_embd"], settings["corpus"], settings["threads"]) == (
        16,
        str((run.parent / "small.txt").resolve()),
        1,
    )
    assert len((run / "sample.txt").read_text(encoding="utf-8").removesuffix("\n")) == 40
    assert (run / "curve.png").read_bytes().startswith(b"\x89PNG")
    assert "](curve.png)" in (run / "report.md").read_text(encoding="utf-8")
    for name in ("best", "last"):
        tensors = safetensors.torch.load_file(run / f"{name}.safetensors")
        assert tensors["token_embedding"].shape == (metadata["corpus"]["tokenizer"]["characters"].__len__(), 16)
        assert all(tensor.isfinite().all() for tensor in tensors.values())


@pytest.mark.parametrize("again", [("run",), ("quickstart", *SMALL, "--out", "run"), (str(Path("run/settings.yaml")),)])
def test_training_a_finished_run_again_says_so_and_changes_nothing(call, run, again):
    with unchanged(run):
        told = call("train", *again)
        said(told, 0)
        assert str(Path("run") / "report.md") in told.out
        assert "finished" in told.out or "already" in told.out


def test_settings_that_change_no_weight_do_not_make_another_run(call, run):
    with unchanged(run):
        said(call("train", "quickstart", *SMALL, "log_interval=7", "--out", "run"), 0)
        shutil.copy("small.txt", "same text.txt")
        said(call("train", "quickstart", *SMALL, "corpus=same text.txt", "--out", "run"), 0)


def test_a_folder_that_holds_another_run_is_left_alone(call, run):
    with unchanged(run):
        said(
            call("train", "quickstart", *SMALL, "n_layer=2", "seed=5", "--out", "run"),
            1,
            "n_layer 1.*2",
            "seed 1.*5",
            "--out",
        )
        Path("other.txt").write_text(some_text(1), encoding="utf-8")
        said(call("train", "quickstart", *SMALL, "corpus=other.txt", "--out", "run"), 1, "another run", "text|corpus")


def test_a_folder_of_another_format_version_is_left_alone(call, run):
    metadata = json.loads((run / "run.json").read_text(encoding="utf-8"))
    (run / "run.json").write_text(
        json.dumps({**metadata, "format_version": 99, "nanostudy": "9.9.9"}), encoding="utf-8"
    )
    with unchanged(run):
        for command in (["train", "run"], ["report", "run"]):
            said(call(*command), 1, "99", r"9\.9\.9")


def test_a_folder_of_other_things_keeps_them(call, here):
    mine = here / "mine"
    mine.mkdir()
    for name in ("settings.yaml", "report.md", "sample.txt", "curve.png", "training.csv", "notes.txt", ".mine.tmp"):
        (mine / name).write_text(f"corpus: small.txt  # my {name}, of which there is no copy\n", encoding="utf-8")
    before = contents(mine)
    call("train", "quickstart", *SMALL, "--out", "mine")
    assert {name: checksum for name, checksum in contents(mine).items() if name in before} == before


def test_a_persons_settings_file_is_not_rewritten(call, here):
    text = f"# mine\n{''.join(line.replace('=', ': ') + chr(10) for line in SMALL)}"
    (here / "settings.yaml").write_text(text, encoding="utf-8")
    call("train", "settings.yaml")
    assert (here / "settings.yaml").read_text(encoding="utf-8") == text


def test_default_folders_are_named_after_what_was_asked(call, here):
    said(call("train", "quickstart", *SMALL), 0)
    (folder,) = (here / "runs").iterdir()
    assert folder.name.startswith("quickstart-")
    assert "n_layer=1-n_head=2-n_embd=16" in folder.name
    many = "weight_decay=0.2 learning_rate=0.003 warmup_iters=5 min_lr=0.0001 grad_clip=0.5 dropout=0.05 bias=true beta1=0.8 beta2=0.95"
    said(call("train", "quickstart", *SMALL, *many.split(), "tie_embeddings=false", "gradient_accumulation_steps=2"), 0)
    Path("small.txt").write_text(some_text() + "../", encoding="utf-8")
    said(call("train", "quickstart", *SMALL, "max_iters=1", "sample_prompt=\n../../../the"), 0)
    assert len(list((here / "runs").iterdir())) == 3
    assert {path.name for path in here.iterdir()} <= {"runs", "small.txt", "cache"}


def test_no_updates_are_a_run_too(call, here, draws):
    said(call("train", "quickstart", *SMALL, "max_iters=0", "--out", "run"), 0)
    assert set(contents(here / "run")) == FILES


def test_threads_asked_for_hold_to_the_end(call, monkeypatch):
    """Writing the sample is part of the training too."""
    monkeypatch.setattr(machine, "available_cores", lambda: 2)
    said(call("train", "quickstart", *SMALL, "max_iters=1", "--out", "run"), 0)
    assert torch.get_num_threads() == 1


def test_half_precision_trains_on_a_cpu(call, here):
    said(call("train", "quickstart", *SMALL, "precision=fp16", "dropout=0.1", "max_iters=3", "--out", "run"), 0)
    metadata = json.loads((here / "run" / "run.json").read_text(encoding="utf-8"))
    assert (metadata["machine"]["precision"], metadata["updates"] + metadata["skipped_updates"]) == ("fp16", 3)
    assert 0 < metadata["final"]["val_loss"] < 5


@pytest.fixture
def no_compiler(monkeypatch):
    def forget():
        kernels.cpu.native_ops.cache_clear()
        kernels.cpu.library_path.cache_clear()

    monkeypatch.setattr(kernels.cpu, "compiler", lambda: None)
    forget()
    yield
    forget()


@pytest.mark.usefixtures("no_compiler")
def test_a_machine_without_a_compiler_trains_and_says_so_once(call, here):
    command = ("train", "quickstart", *SMALL, "max_iters=2")
    told = call(*command, "--out", "run")
    said(told, 0)
    assert " ".join((told.out + told.err).split()).count("kernels are not compiled") == 1
    metadata = json.loads((here / "run" / "run.json").read_text(encoding="utf-8"))
    assert metadata["machine"]["compiled"] is False
    assert [note for note in metadata["notes"] if "no C++ compiler was found" in note] == metadata["notes"]
    assert len(metadata["notes"]) == 1
    said(call(*command, "compile=yes", "--out", "other"), 2, "compile=yes: no C.. compiler", "compile=auto")
    assert not (here / "other").exists()


def test_kernels_that_are_not_wanted_are_not_missed(call, here):
    told = call("train", "quickstart", *SMALL, "max_iters=1", "compile=no", "--out", "run")
    said(told, 0)
    assert "kernels" not in told.out + told.err
    metadata = json.loads((here / "run" / "run.json").read_text(encoding="utf-8"))
    assert (metadata["machine"]["compiled"], metadata["notes"]) == (False, [])


# --- a training that fails


def test_a_diverging_run_says_so_and_keeps_its_files(call, here, draws):
    wild = "learning_rate=1e9 decay_lr=false grad_clip=0 max_iters=50"
    command = ("train", "quickstart", *SMALL, *wild.split(), "--out", "run")
    told = call(*command)
    said(told, 1)
    assert "diverged" in told.out + told.err
    run = here / "run"
    assert set(contents(run)) >= FILES - {
        "curve.png",
        "curve.svg",
        "optimizer.safetensors",
        "window_losses.safetensors",
    }
    metadata = json.loads((run / "run.json").read_text(encoding="utf-8"))
    assert metadata["status"] == "diverged"
    assert "not finite" in metadata["diverged"]
    tensors = safetensors.torch.load_file(run / "best.safetensors")
    assert all(tensor.isfinite().all() for tensor in tensors.values())
    with unchanged(run):
        for again in (command, ("train", "run")):
            told = call(*again)
            said(told, 1)
            assert "diverged" in told.out + told.err
    said(call("sample", "run", "--tokens", "5"), 0)


@pytest.mark.parametrize(
    "settings", ["learning_rate=1e30 max_iters=1", "learning_rate=1e300", "weight_decay=1e300", "weight_decay=1e30"]
)
def test_a_run_is_not_finished_with_losses_that_are_not_finite(call, here, settings):
    outcome = call("train", "quickstart", *SMALL, "decay_lr=false", *settings.split(), "--out", "run")
    assert outcome.code in (1, 2), outcome
    if Path("run/run.json").exists():
        status = json.loads(
            Path("run/run.json").read_text(encoding="utf-8"), parse_constant=lambda name: pytest.fail(name)
        )
        assert status["status"] == "diverged"


def test_a_ctrl_c_that_is_not_waited_for_is_answered(call, monkeypatch):
    def interrupted(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr(api, "train", interrupted)
    told = call("train", "quickstart", *SMALL, "--out", "run")
    said(told, 130, "stopped", "checkpoint")


def test_a_folder_in_which_another_process_works_is_left_alone(call, here):
    with sole_owner(here / "run"):
        said(call("train", "quickstart", *SMALL, "--out", "run"), 1, "nother process", "run", "--out")
        assert contents(here / "run") == {}
    said(call("train", "quickstart", *SMALL, "--out", "run"), 0)


@posix_only
def test_the_first_of_two_processes_finishes(call, here):
    command = ("train", "quickstart", *SMALL, "max_iters=300", "--out", "run")
    first = start(*command, cwd=here)
    table = here / "run" / "training.csv"
    wait_for(lambda: table.exists() and table.read_text().count("\n") > 2, first)
    first.send_signal(signal.SIGSTOP)
    try:
        with unchanged(here / "run"):
            said(call(*command), 1, "nother process")
    finally:
        first.send_signal(signal.SIGCONT)
    said(outcome(first), 0)
    assert set(contents(here / "run")) == FILES
    assert table.read_text().count("\n") == 1 + 300 // 5


@contextlib.contextmanager
def limited(name: str, value: int):
    """A limit of this process (RLIMIT_ and the name), lifted again in the end."""
    import resource

    limit = getattr(resource, f"RLIMIT_{name}")
    before = resource.getrlimit(limit)
    resource.setrlimit(limit, (value, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(limit, before)


@posix_only
def test_a_file_that_cannot_grow_is_told_and_nothing_is_lost(call, here):
    command = ("train", "quickstart", *SMALL, "--out", "run")
    with limited("FSIZE", 10_000):
        said(call(*command), 1, "last.safetensors", "unchanged")
    assert not list((here / "run").glob("*.safetensors"))
    assert not list((here / "run").glob(".*.tmp"))
    said(call(*command), 0)
    assert set(contents(here / "run")) == UNDRAWN


@contextlib.contextmanager
def mounted(folder: Path, options: str):
    """A small file system of its own at the folder; skips where that is not permitted."""
    folder.mkdir()
    mount = shutil.which("mount") and subprocess.run(
        ["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(folder)], capture_output=True, check=False
    )
    if not mount or mount.returncode:
        pytest.skip("mounting a file system is not permitted here")
    try:
        yield lambda options: subprocess.run(["mount", "-o", f"remount,{options}", str(folder)], check=True)
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=True)


@linux_only
@pytest.mark.parametrize("size", ["12k", "24k", "40k", "200k"])
def test_a_full_disk_is_told_and_the_same_command_completes(call, here, size, draws):
    command = ("train", "quickstart", *SMALL, "--out", str(Path("disk/run")))
    with mounted(here / "disk", f"size={size}") as change:
        said(call(*command), 1, "No space", "unchanged", "again")
        change("size=10m")
        said(call(*command), 0)
        assert set(contents(here / "disk" / "run")) == FILES


@linux_only
def test_a_read_only_folder_is_told(call, here):
    with mounted(here / "disk", "size=1m") as change:
        (here / "disk" / "run").mkdir()
        change("ro")
        said(call("train", "quickstart", *SMALL, "--out", "disk/run"), 1, "disk")
        said(call("train", "quickstart", *SMALL, "--out", "disk/other"), 1, "disk")


@linux_only
def test_a_finished_run_in_a_read_only_folder_can_be_used(call, here, finished):
    with mounted(here / "disk", "size=4m") as change:
        shutil.copytree(finished[0] / "run", here / "disk" / "run")
        change("ro")
        said(call("sample", "disk/run", "--tokens", "5"), 0)
        outcome = call("train", "disk/run")
        assert outcome.code in (0, 1)
        said(outcome, outcome.code)


@linux_only
def test_when_memory_runs_out_it_says_what_to_lower(call, here):
    taken = int(Path("/proc/self/statm").read_text().split()[0]) * os.sysconf("SC_PAGE_SIZE")
    with limited("AS", taken + 2**29):
        told = call("train", "quickstart", *SMALL, "batch_size=1000000", "--out", "run")
    said(told, 1, "emory", "batch_size", "gradient_accumulation_steps")


@linux_only
def test_under_a_limit_of_address_space_a_run_still_ends_well(here):
    """As many clusters set it: the run is small, but what draws the curve asks for very much address space."""
    import resource

    limit = lambda: resource.setrlimit(resource.RLIMIT_AS, (2**33, 2**33))  # noqa: E731
    said(nanostudy("train", "quickstart", *SMALL, "max_iters=2", "--out", "run", cwd=here, preexec_fn=limit), 0)
    assert (here / "run" / "report.md").exists()


@pytest.mark.parametrize("out", ["file", "file/run", "x" * 300])
def test_a_run_folder_that_cannot_be_is_told(call, here, out):
    Path("file").write_text("mine", encoding="utf-8")
    outcome = call("train", "quickstart", *SMALL, "--out", out)
    assert outcome.code in (1, 2)
    said(outcome, outcome.code, re.escape(out[:100]))
    assert Path("file").read_text(encoding="utf-8") == "mine"


@pytest.mark.parametrize("name", ["runs [1]", "a[/b]", "[bold]"])
def test_brackets_in_names_are_shown_as_they_are(call, here, name):
    Path("[red].txt").write_text(some_text(), encoding="utf-8")
    told = call("train", "quickstart", *SMALL, "max_iters=1", "corpus=[red].txt", "--out", name)
    said(told, 0)
    assert f"folder   {Path(name)}" in told.out
    assert "[red].txt" in told.out


# --- what the sample at the end needs is checked before the hours of training


def test_a_sample_prompt_that_cannot_be_is_told_before_the_training(call, here):
    said(call("train", "quickstart", *SMALL, "sample_prompt=ROMEO: Ω", "--out", "run"), 2, "Ω|R", "sample_prompt")
    assert not (here / "run" / "last.safetensors").exists()


def test_a_text_of_one_line_can_be_trained_on(call, here):
    Path("line.txt").write_text("all work and no play " * 100, encoding="utf-8")
    said(call("train", "quickstart", *SMALL, "corpus=line.txt", "--out", "run"), 0)
    said(call("sample", "run", "--tokens", "5"), 0)


# --- sampling


def test_sample_is_a_function_of_its_arguments(call, run):
    told = call("sample", "run", "--prompt", "The ", "-n", "3", "--tokens", "12", "--seed", "7")
    said(told, 0)
    samples = re.split(r"--- \d\n", told.out)[1:]
    assert len(samples) == 3
    assert len({*samples}) == 3
    assert all(len(sample) == 4 + 12 + 1 and sample.startswith("The ") for sample in samples)
    again = call("sample", "run", "--prompt", "The ", "-n", "3", "--tokens", "12", "--seed", "7")
    assert again.out == told.out
    assert call("sample", "run", "--prompt", "The ", "--tokens", "12", "--seed", "7").out == samples[0]
    assert call("sample", "run", "--prompt", "The ", "--tokens", "12", "--seed", "8").out != samples[0]
    assert call("sample", "run", "--prompt", "The ", "--tokens", "0").out == "The \n"


@pytest.mark.parametrize(
    ("text", "prompt"),
    [
        ('-- 17: "it\'s a sea", he said\r\n' * 90, "it's a sea\", he said"),
        ("0123456789 " * 90, None),
        ("Ω😀 " * 300, "Ω😀 Ω😀 Ω😀 Ω😀 Ω😀 Ω😀 Ω😀"),
    ],
    ids=["quotes", "digits", "no Latin"],
)
def test_the_command_that_is_printed_at_the_end_works_on_any_text(call, here, text, prompt):
    Path("my text.txt").write_bytes(text.encode())
    told = call("train", "quickstart", *SMALL, "max_iters=0", "corpus=my text.txt", "--out", "a run; $(x) 'of' mine")
    said(told, 0)
    command = shlex.split(told.out.splitlines()[-1].removeprefix("more     nanostudy "))
    assert command == ["sample", "a run; $(x) 'of' mine", *(["--prompt", prompt] if prompt else [])]
    again = call(*command, "--tokens", "5")
    said(again, 0)
    assert again.out.startswith(prompt or "")


def test_a_prompt_from_a_file_is_that_of_nanogpt(call, run):
    """FILE:PATH, whose line ends are read as Python reads them."""
    Path("prompt.txt").write_bytes("\ufeffThe king\r\n".encode())
    told = call("sample", "run", "--prompt", "FILE:prompt.txt", "--tokens", "3")
    said(told, 0)
    assert told.out == call("sample", "run", "--prompt", "The king\n", "--tokens", "3").out
    said(call("sample", "run", "--prompt", "FILE:nowhere.txt"), 2, "FILE:nowhere.txt: there is no such file")
    said(call("sample", "run", "--prompt", "FILE:/dev/zero"), 2, "no regular file")


def test_sample_past_the_context(call, run):
    short = call("sample", "run", "--prompt", "The ", "--tokens", "12")
    assert short.err == ""
    rough, exact = (call("sample", "run", "--prompt", "The ", "--tokens", "40", *flag) for flag in ([], ["--exact"]))
    for told in (rough, exact):
        said(told, 0)
        assert "16 tokens" in told.err
        assert len(told.out) == 4 + 40 + 1
        assert told.out.startswith(short.out.rstrip("\n")), "within the context both read the same"


def test_sample_picks_as_asked(call, run):
    greedy = call("sample", "run", "--temperature", "0", "--tokens", "12").out
    for narrow in (["--top-k", "1"], ["--top-p", "1e-9"], ["--temperature", "1e-320"], ["--temperature", "1e-6"]):
        assert call("sample", "run", *narrow, "--tokens", "12").out == greedy
    assert (
        call("sample", "run", "--top-k", "0", "--tokens", "12").out
        == call("sample", "run", "--top-k", "35", "--tokens", "12").out
    )


def test_sample_reads_either_weights_and_a_file_by_itself(call, run):
    said(call("sample", "run", "--which", "last", "--tokens", "5"), 0)
    told = call("sample", "run", "--tokens", "5")
    shutil.move(run / "best.safetensors", "alone.safetensors")
    assert call("sample", "alone.safetensors", "--tokens", "5").out == told.out


def test_sample_of_a_run_that_has_not_finished(call, run):
    (run / "best.safetensors").unlink()
    (run / "last.safetensors").rename(run / "checkpoint.safetensors")
    metadata = json.loads((run / "run.json").read_text(encoding="utf-8"))
    record_again(run, {**metadata, "status": "unfinished"})
    said(call("sample", "run"), 1, "run", "not finished", "nanostudy train")


def test_bytes_take_any_prompt(call, here):
    said(call("train", "quickstart", *SMALL, "tokenizer=byte", "max_iters=1", "--out", "run"), 0)
    for prompt in ("☃ and \U0001f600", "a\udcff", "longer than the whole context of it"):
        told = call("sample", "run", "--prompt", prompt, "--tokens", "5")
        said(told, 0)
        assert told.out[0] == prompt[0]


def test_a_text_that_a_console_cannot_show(call, here, monkeypatch):
    Path("snow.txt").write_text("☃ über \U0001f600\n" * 200, encoding="utf-8")
    said(call("train", "quickstart", *SMALL, "max_iters=0", "corpus=snow.txt", "--out", "run"), 0)
    console = io.TextIOWrapper(io.BytesIO(), encoding="cp1252")
    monkeypatch.setattr(sys, "stdout", console)
    monkeypatch.setattr(sys, "argv", ["nanostudy", "sample", "run", "--prompt", "☃ über", "--tokens", "3"])
    with pytest.raises(SystemExit, match="0"):
        cli.main()
    console.flush()
    assert console.buffer.getvalue().decode("cp1252").startswith("? über")


# --- files that are damaged or hostile


def with_header(path: Path, change) -> None:
    """Rewrites a weights file's description of itself, tensors as they were."""
    with safetensors.safe_open(path, framework="pt") as file:
        described, tensors = json.loads(file.metadata()["nanostudy"]), {k: file.get_tensor(k) for k in file.keys()}  # noqa: SIM118
    change(described)
    safetensors.torch.save_file(tensors, path, {"nanostudy": json.dumps(described)})


@pytest.mark.parametrize("kept", [0, 1, 8, 100, 2000, -1])
def test_truncated_weights_are_refused(call, run, kept):
    path = run / "best.safetensors"
    path.write_bytes(path.read_bytes()[:kept])
    with unchanged(run):
        said(call("sample", "run"), 1, r"best\.safetensors", "damaged")


def test_one_flipped_bit_is_refused_wherever_it_is(call, run):
    path, draw = run / "best.safetensors", random.Random(5)
    whole = path.read_bytes()
    header = 8 + int.from_bytes(whole[:8], "little")
    alphabet = whole.index(b"characters") + 30
    places = [draw.randrange(header, len(whole)) for _ in range(8)] + [draw.randrange(header) for _ in range(30)]
    for place in (alphabet, *places):
        flipped = bytearray(whole)
        flipped[place] ^= 1 << draw.randrange(8)
        path.write_bytes(flipped)
        outcome = call("sample", "run", "--tokens", "3")
        said(outcome, 1, r"best\.safetensors")


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda d: d.update(format_version=99), "99"),
        (lambda d: d.update(kind="stack"), "damaged|checksum"),
        (lambda d: d["tokenizer"].update(characters=d["tokenizer"]["characters"][::-1]), "damaged|checksum"),
        (lambda d: d["settings"].update(n_head=4), "damaged|checksum"),
        (lambda d: d.pop("tokenizer"), "damaged|checksum"),
        (lambda d: d.clear(), r"best\.safetensors"),
    ],
    ids=["version", "kind", "alphabet", "heads", "no tokenizer", "nothing"],
)
def test_weights_that_describe_themselves_otherwise_are_refused(call, run, change, reason):
    with_header(run / "best.safetensors", change)
    said(call("sample", "run", "--tokens", "3"), 1, r"best\.safetensors", reason)


def test_weights_of_someone_else_are_refused(call, here):
    safetensors.torch.save_file({"weight": torch.zeros(3)}, here / "other.safetensors")
    said(call("sample", "other.safetensors"), 1, r"other\.safetensors", "nanostudy")
    said(call("sample", "small.txt"), 1, r"small\.txt")


class Hostile:
    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self):
        return Path.touch, (self.mark,)


@pytest.mark.parametrize("name", ["best.safetensors", "last.safetensors", "checkpoint.safetensors"])
@pytest.mark.parametrize("format", ["pickle", "torch"])
def test_a_pickle_is_never_unpickled(call, run, name, format):
    mark = run.parent / "pwned"
    if format == "pickle":
        (run / name).write_bytes(pickle.dumps(Hostile(mark)))
    else:
        buffer = io.BytesIO()
        torch.save({"weights": Hostile(mark)}, buffer)
        (run / name).write_bytes(buffer.getvalue())
    if name == "checkpoint.safetensors":
        metadata = json.loads((run / "run.json").read_text(encoding="utf-8"))
        record_again(run, {**metadata, "status": "unfinished"})
    with unchanged(run):
        command = (
            ["train", "run"] if name == "checkpoint.safetensors" else ["sample", "run", "--which", name.split(".")[0]]
        )
        said(call(*command), 1, re.escape(name), "damaged")
    assert not mark.exists()


RUN_JSON = {
    "cut": b'{"format_version": 1, "ident',
    "a list": b"[]",
    "not UTF-8": b"\xff\xfe",
    "empty": b"",
    "lacks most": b'{"format_version": 1}',
    "lacks settings": b'{"format_version": 1, "identity": "x", "status": "finished"}',
    "odd settings": b'{"format_version": 1, "identity": "x", "status": "finished", "settings": []}',
}


@pytest.mark.parametrize("kind", RUN_JSON)
@pytest.mark.parametrize("command", ["train", "report"])
def test_a_damaged_run_json_is_told_and_left(call, run, kind, command):
    (run / "run.json").write_bytes(RUN_JSON[kind])
    with unchanged(run):
        said(call(command, "run"), 1, r"run\.json")


@pytest.mark.parametrize("name", ["training.csv", "evaluations.csv"])
def test_a_table_that_is_no_text_is_told(call, run, name):
    with (run / name).open("ab") as file:
        file.write(b"\xff\xfe\n")
    outcome = call("report", "run")
    assert outcome.code in (0, 1)
    said(outcome, outcome.code, *([re.escape(name)] if outcome.code else []))


def test_a_run_without_its_weights_says_what_to_do(call, run):
    (run / "best.safetensors").unlink()
    with unchanged(run):
        said(call("train", "run"), 1, r"best\.safetensors", "[Rr]estore|--out|again|[Dd]elete")


# --- starting from another run's weights


def test_fine_tuning_starts_at_the_other_runs_weights(call, run):
    Path("more.txt").write_text(some_text(3), encoding="utf-8", newline="\n")
    said(call("train", "quickstart", *SMALL, "corpus=more.txt", "init_from=run", "max_iters=0", "--out", "same"), 0)
    before, after = (safetensors.torch.load_file(Path(name, "best.safetensors")) for name in ("run", "same"))
    assert all(torch.equal(before[name], after[name]) for name in before)
    said(call("train", "quickstart", *SMALL, "corpus=more.txt", "init_from=run", "--out", "tuned"), 0)
    (start, end), fresh = (
        [float(line.split(",")[4]) for line in Path(name, "evaluations.csv").read_text().splitlines()[1:]][0::steps]
        for name, steps in (("tuned", 2), ("run", 5))
    )
    assert end < start < fresh[0], "it goes on from where the other stopped"
    said(call("train", "tuned"), 0)


def test_first_weights_that_changed_since_are_named(call, run):
    shutil.copy(run / "best.safetensors", "start.safetensors")
    tuned = ("train", "quickstart", *SMALL, "init_from=start.safetensors", "max_iters=0", "--out", "tuned")
    said(call(*tuned), 0)
    said(call("train", "quickstart", *SMALL, "seed=2", "max_iters=0", "--out", "other"), 0)
    shutil.copy("other/best.safetensors", "start.safetensors")
    with unchanged(Path("tuned")):
        said(call(*tuned), 1, r"tuned holds another run \(init_from=start.safetensors has other weights now\)", "--out")


def test_a_shorter_context_keeps_the_first_positions(call, run):
    said(call("train", "quickstart", *SMALL, "init_from=run", "block_size=8", "max_iters=0", "--out", "cropped"), 0)
    before, after = (safetensors.torch.load_file(Path(name, "best.safetensors")) for name in ("run", "cropped"))
    assert torch.equal(after.pop("position_embedding"), before.pop("position_embedding")[:8])
    assert all(torch.equal(before[name], after[name]) for name in before)


@pytest.mark.parametrize(
    "other",
    ["n_layer=2", "n_head=4", "n_embd=32", "block_size=32", "bias=true", "tie_embeddings=false", "tokenizer=byte"],
)
def test_weights_of_another_shape_are_refused(call, run, other):
    outcome = call("train", "quickstart", *SMALL, "init_from=run", other, "--out", "new")
    assert outcome.code in (1, 2), outcome
    said(outcome, outcome.code, "init_from", other.split("=")[0])
    assert not Path("new").exists()


def test_weights_that_do_not_know_the_text_are_refused(call, run):
    Path("accents.txt").write_text(some_text() + "é", encoding="utf-8")
    said(
        call("train", "quickstart", *SMALL, "corpus=accents.txt", "init_from=run", "--out", "new"),
        2,
        "é",
        r"accents\.txt",
    )
    assert not Path("new").exists()
    outcome = call("train", "quickstart", *SMALL, "init_from=nowhere", "--out", "new")
    assert outcome.code in (1, 2)
    said(outcome, outcome.code, "nowhere")


def test_several_runs_write_side_by_side(call, run, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    shutil.copytree(run, run.parent / "other")
    words = ("--prompt", "the", "--tokens", "60", "--seed", "3")
    alone = call("sample", "run", *words).out.removesuffix("\n")
    told = call("sample", "run", "other", *words)
    said(told, 0)
    title, rule, *lines = told.out.splitlines()
    assert re.fullmatch(r"run, val \d\.\d{4} +other, val \d\.\d{4}", title)
    assert rule == f"{'-' * 38}   {'-' * 38}"
    left, right = ("".join(line[start:][:38].rstrip() for line in lines) for start in (0, 41))
    assert left == right
    assert re.sub(r"\s", "", left) == re.sub(r"\s", "", alone)
    monkeypatch.setenv("COLUMNS", "40")  # no room
    told = call("sample", "run", "other", *words)
    assert told.out.count(f"\n{alone}") == 2
    assert len(call("sample", "run", "other", *words, "-n", "2").out.split("--- 2\n")) == 2


def test_the_version_and_the_shells_completion(call):
    assert call("--version").out == f"nanostudy {VERSION}\n"
    assert "--install-completion" in call("--help").out
    Path("mine.yaml").write_text("grid: {n_embd: [64, 128]}", encoding="utf-8")
    assert presets_like("nano") == ["nanogpt-cpu", "nanogpt-gpu"]
    assert studies_like("q") == ["quickstart"]
    assert studies_like("mi") == ["mine.yaml"]


# --- mistakes


MISTAKES = {
    ("train", "nonsense"): (2, "nonsense", "quickstart"),
    ("train", "quickstart", "learning_rat=1"): (2, "learning_rat", "Did you mean learning_rate"),
    ("train", "quickstart", "max_iters"): (2, "max_iters", "setting=value"),
    ("train", "quickstart", "--lr"): (2, "learning_rate=VALUE"),
    ("train", "quickstart", "epochs=3"): (2, "counts updates, max_iters", r"1,307 of shakespeare"),
    ("train", "quickstart", "lr=1", "learning_rate=2"): (2, "learning_rate is given twice"),
    ("train", "small.txt"): (2, "is no settings file but a text", r"nanostudy train quickstart corpus=small\.txt"),
    ("train", "quickstart", "--dry-run"): (2, "nanostudy study plan"),
    ("train", "quickstart", "n_layer=two"): (2, "n_layer", "whole number"),
    ("train", "quickstart", "n_embd=130"): (2, "130", "128 or 132"),
    ("train", "quickstart", "corpus=nowhere.txt"): (2, "nowhere.txt", "playhouse"),
    ("train", "quickstart", "corpus=small.txt", "block_size=5000"): (2, "small.txt", "block_size=5000"),
    ("train", "quickstart", "corpus=small.txt", "device=gpu"): (2, "gpu", "cuda"),
    ("train", "quickstart", "corpus=small.txt", "device=cuda:x"): (2, "cuda:x"),
    ("train", "quickstart", "corpus=small.txt", "precision=fp8"): (2, "fp8", "bf16"),
    ("train", "quickstart", "corpus=small.txt", "threads=0"): (2, "threads"),
    ("train",): (2, "Missing argument"),
    ("trian", "quickstart"): (2, "trian"),
    ("sample", "run", "--tokens", "3", "--prompt", "Ω"): (2, "'Ω'"),
    ("sample", "run", "--tokens", "3", "--prompt", "a\udcff"): (2, "udcff"),
    ("sample", "run", "--tokens", "3", "--temperature", "-1"): (2, "temperature"),
    ("sample", "run", "--tokens", "3", "--temperature", "nan"): (2, "temperature"),
    ("sample", "run", "--tokens", "3", "--top-k", "-1"): (2, "top.k"),
    ("sample", "run", "--tokens", "3", "--top-p", "2"): (2, "top.p"),
    ("sample", "run", "-n", "0"): (2, "count"),
    ("sample", "run", "--tokens", "-1"): (2, "tokens"),
    ("sample", "run", "--tokens", "3", "--seed", str(2**64)): (2, "seed"),
    ("sample", "run", "--tokens", "3", "--which", "third"): (2, "third", "best"),
    ("sample", "run", "--tokens", "3", "--device", "gpu"): (2, "gpu"),
    ("report", "nowhere"): (2, "nowhere"),
    ("corpus", "show", "nowhere.txt"): (2, "nowhere.txt"),
    ("corpus", "show", "small.txt", "--tokenizer", "word"): (2, "word", "byte"),
    ("corpus", "fetch", "hamlet"): (2, "hamlet", "shakespeare"),
}  # fmt: skip


@pytest.mark.parametrize("args", MISTAKES, ids=lambda args: ascii(" ".join(args)))
def test_a_mistake_is_answered_with_a_message(call, run, args):
    code, *words = MISTAKES[args]
    with unchanged(run.parent):
        said(call(*args), code, *words)


@pytest.mark.parametrize("args", [("sample", "nowhere"), ("sample", ".")])
def test_a_run_that_is_not_there_is_named(call, here, args):
    outcome = call(*args)
    assert outcome.code in (1, 2)
    said(outcome, outcome.code, re.escape(args[1]), "no trained weights|no run folder")


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA GPU")
def test_a_gpu_that_is_not_there_is_told(call, here):
    for name in ("cuda", "cuda:3"):
        said(call("train", "quickstart", *SMALL, f"device={name}", "--out", "run"), 2, name, "device=cpu")
    assert not Path("run").exists()


def test_running_out_of_space_reads_the_same_from_every_writer(call, here, monkeypatch):
    """The tables are appended to, all else is written whole; each failure names its file and says what is safe."""
    real = open

    def full(path, *args, **kwargs):
        if str(path).endswith("training.csv") and "a" in (*args, ""):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return real(path, *args, **kwargs)

    monkeypatch.setattr("builtins.open", full)
    said(call("train", "quickstart", *SMALL, "--out", "run"), 1, r"training\.csv", "[Nn]o space", "again")


# --- the commands themselves


def test_help_is_quick_and_does_not_load_torch(here):
    spent = []
    for _ in range(3):
        begun = time.perf_counter()
        told = nanostudy("--help", cwd=here)
        spent.append(time.perf_counter() - begun)
        said(told, 0)
    assert min(spent) < 0.5, spent
    for command in ("train", "sample", "report", "presets", "settings", "doctor", "corpus"):
        assert re.search(rf"^ +{command} ", told.out, re.MULTILINE)
    probe = (
        "import sys; from nanostudy.cli import main as cli\n"
        "try: cli.main()\n"
        "except SystemExit: pass\n"
        "print('LOADED', [name for name in ('torch', 'numpy', 'altair', 'yaml') if name in sys.modules])"
    )
    for args in (["--help"], ["train", "--help"], []):
        done = subprocess.run(
            [sys.executable, "-c", probe, *args], capture_output=True, text=True, cwd=here, check=True
        )
        assert "LOADED []" in done.stdout


def test_presets_and_settings_are_listed(call):
    told = call("presets")
    said(told, 0)
    assert [line.split()[0] for line in told.out.splitlines() if not line.startswith(" ")] == [
        "nanogpt-cpu", "nanogpt-gpu", "quickstart", "shakespeare-cpu", "shakespeare-gpu",
    ]  # fmt: skip
    told = call("settings")
    said(told, 0)
    assert [line.split()[0] for line in told.out.splitlines() if not line.startswith(" ")] == [
        *FIELDS,
        *("device", "precision", "compile", "threads"),
        *("track", "track_project", "track_name"),
    ]
    assert all(len(line.split()) >= 3 for line in told.out.splitlines() if not line.startswith(" "))


def test_corpora_are_listed_and_shown(call):
    told = call("corpus", "list")
    said(told, 0)
    assert re.search(r"^shakespeare +tiny.*^playhouse .*^auto ", told.out, re.MULTILINE | re.DOTALL)
    assert "not on this machine" in told.out
    told = call("corpus", "show", "small.txt")
    said(told, 0)
    text = Path("small.txt").read_text(encoding="utf-8")
    assert hashlib.sha256(text.encode()).hexdigest() in told.out
    assert f"{int(len(text) * 0.9):,} characters" in told.out
    assert text[:400] in told.out
    assert f"char, {len(set(text))} tokens" in told.out
    assert "byte, 256 tokens" in call("corpus", "show", "small.txt", "--tokenizer", "byte").out


def test_report_writes_again_what_was_deleted(call, run, draws):
    before = contents(run)
    (run / "curve.png").unlink()
    (run / "report.md").unlink()
    told = call("report", "run")
    said(told, 0)
    assert contents(run) == before
    for name in ("report.md", "report/index.html"):
        assert str(Path("run") / name) in told.out.split()


def test_doctor_says_what_a_training_would_use_and_how_fast_it_is(call):
    told = call("doctor")
    said(told, 0)
    found = dict(re.findall(r"^(.{20})(.*)$", told.out, re.MULTILINE))
    found = {what.strip(): finding for what, finding in found.items()}
    assert found["torch"] == torch.__version__
    rates = [finding for what, finding in found.items() if what.startswith("products in")]
    assert rates
    assert all(float(re.match(r"([\d,]+) GFLOP/s", rate)[1].replace(",", "")) > 0 for rate in rates)
    assert re.match(r"(cpu|cuda:\d+|mps), (fp32|bf16|fp16), \d+ threads", found["training would use"])
    assert found["because"]


def test_the_same_from_python(run):
    loaded = api.load("run", device="cpu")
    assert loaded.experiment.n_embd == 16
    assert loaded.metadata["status"] == "finished"
    (text,) = loaded.sample("The ", tokens=8, seed=3)
    assert text == "The " + "".join(loaded.stream("The ", tokens=8, seed=3))


# --- texts and where they are


def test_a_settings_files_text_is_beside_it(call, here):
    (here / "far").mkdir()
    (here / "far" / "mine.txt").write_text(some_text(), encoding="utf-8")
    (here / "far" / "mine.yaml").write_text("corpus: mine.txt\n", encoding="utf-8")
    said(call("train", "far/mine.yaml", *SMALL[1:], "max_iters=1", "--out", "run"), 0)
    assert json.loads((here / "run" / "run.json").read_text(encoding="utf-8"))["corpus"]["name"] == "mine.txt"
    (here / "far" / "mine.txt").unlink()
    said(
        call("train", "far/mine.yaml", *SMALL[1:], "max_iters=1", "--out", "other"),
        2,
        "'mine.txt'.*neither beside .* nor in",
    )
    assert not (here / "other").exists()


def test_a_moved_project_goes_on(call, here, monkeypatch):
    (here / "before").mkdir()
    monkeypatch.chdir(here / "before")
    Path("text.txt").write_text(some_text(), encoding="utf-8")
    Path("other.txt").write_text(some_text(9), encoding="utf-8")
    settings = [*SMALL[1:], "max_iters=2", "corpus=text.txt"]
    said(call("train", "quickstart", *settings, "--out", "runs/b"), 0)
    monkeypatch.chdir(here)
    (here / "before").rename(here / "after")
    monkeypatch.chdir(here / "after")
    for more in ([], ["corpus=text.txt"]):
        told = call("train", "runs/b", *more)
        said(told, 0)
        assert "runs/b is finished already" in told.out
    said(call("train", "runs/b", "corpus=other.txt"), 2, r"corpus=other.txt is another text than runs/b", "Add --out")
    assert [path.name for path in Path("runs").iterdir()] == ["b"]
    Path("text.txt").unlink()
    said(call("train", "runs/b"), 2, r"runs/b was trained on .*text.txt, which is not there", "corpus=PATH")


# --- output that goes nowhere


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_output_that_cannot_be_written_ends_no_training(here):
    with open("/dev/full", "w") as full:
        done = nanostudy("train", "quickstart", *SMALL, "max_iters=2", "--out", "run", cwd=here, stdout=full)
        listed = nanostudy("settings", cwd=here, stdout=full)
    assert (done.code, listed.code) == (0, 1)
    for one in (done, listed):
        assert one.err.strip() == "nanostudy: what it prints could not be written: No space left on device"
    assert json.loads((here / "run" / "run.json").read_text(encoding="utf-8"))["status"] == "finished"


def test_a_reader_that_leaves_ends_nothing(here):
    process = start("train", "quickstart", *SMALL, "max_iters=2", "--out", "run", cwd=here)
    process.stdout.close()
    assert process.stderr.read() == ""
    assert process.wait(60) == 0
    assert json.loads((here / "run" / "run.json").read_text(encoding="utf-8"))["status"] == "finished"


def test_a_view_outlives_its_stream():
    class Full(io.StringIO):
        def write(self, text):
            raise OSError(errno.ENOSPC, "No space left on device")

    view = View(0.0)
    view.console.file = Full()
    with view:
        view.say("something")
        view.draw(0.5, "half", plain="half")


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"warmup_iters": 100, "max_iters": 50}, ["never reaches its peak"]),
        ({"min_lr": 0.1, "learning_rate": 0.01}, ["rises to it"]),
        ({"min_lr": 0.1, "learning_rate": 0.01, "decay_lr": False}, []),
        ({"warmup_iters": 50, "max_iters": 50}, []),
        ({"warmup_iters": 50, "max_iters": 0}, []),
    ],
)
def test_unusual_schedules_get_a_note(settings, words):
    notes = Experiment(**{"warmup_iters": 0, **settings}).oddities
    assert len(notes) == len(words)
    assert all(word in note for word, note in zip(words, notes, strict=True))
