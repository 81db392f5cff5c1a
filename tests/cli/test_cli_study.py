"""`nanostudy study ...` as people meet it: what it says, what it leaves alone, and what it shows while it runs."""

import contextlib
import csv
import dataclasses
import io
import itertools
import json
import os
import re
import shlex
import shutil
import signal
import sqlite3
import subprocess
import sys
import time
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from commands import call
from conftest import cache_in, write_text
from rich.console import Console
from test_cli import contents, nanostudy, outcome, posix_only, said, start, unchanged, wait_for

from nanostudy import api, view
from nanostudy.errors import NanostudyError
from nanostudy.result import Status
from nanostudy.settings import Resources, Where
from nanostudy.study import database, forecast, progress
from nanostudy.study.definition import study_names
from nanostudy.study.folder import design, open_study
from nanostudy.study.listing import Listing, as_lines, fitted
from nanostudy.study.notes import NOTES, Note, read_notes
from nanostudy.study.plan import Capacity
from nanostudy.study.pool import Pool, _results, make_pool
from nanostudy.study.progress import Assignment, Snapshot
from nanostudy.study.store import FILE, StackRow, Store
from nanostudy.study.tasks import Broken, Done, Measured
from nanostudy.study.workers import MEMORY_SHARE, PROCESS_MEMORY
from nanostudy.training.events import Progress
from nanostudy.view import StudyView

STUDY = """\
settings: {corpus: small.txt, n_layer: 1, n_head: 2, block_size: 8, batch_size: 4, max_iters: 6, warmup_iters: 2, eval_interval: 3}
parts:
  narrow: {n_embd: 16}
  wide: {n_embd: 32}
grid: {dropout: [0.1, 0.2]}
sample_tokens: 5
"""
CPU = ["--device", "cpu", "--precision", "fp32", "--threads", "1"]
INLINE = ["--executor", "inline", *CPU]
SETTINGS = [(e, d) for e in (16, 32) for d in ("0.1", "0.2")]
LABELS = [f"E{e} D{d}" for e, d in SETTINGS]
NAMES = [f"b8_L1_H2_E{e}_BS4_MI6_D{d}_s1" for e in (16, 32) for d in (10, 20)]
A_FORM = pytest.mark.parametrize("form", ["csv", "json"])


@pytest.fixture
def here(tmp_path, monkeypatch, undrawn) -> Path:
    """A folder with a text and a study file; no corpus is at hand but this."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("NANOSTUDY_CACHE", str(cache_in(tmp_path)))
    monkeypatch.delenv("NANOSTUDY_CORPORA", raising=False)
    monkeypatch.setattr("nanostudy.study.pool.CALIBRATION_SECONDS", 0.01)
    write_text(tmp_path / "small.txt", 600)
    (tmp_path / "mine.yaml").write_text(STUDY, encoding="utf-8")
    return tmp_path


@pytest.fixture
def study(here):
    """`nanostudy study ...` in this process."""
    return partial(call, "study")


@contextlib.contextmanager
def unchanged_results(folder: Path):
    before = results(folder)
    yield
    assert results(folder) == before


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> Path:
    """The study, run to its end."""
    folder = tmp_path_factory.mktemp("finished")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        write_text(folder / "small.txt", 600)
        (folder / "mine.yaml").write_text(STUDY, encoding="utf-8")
        assert call("study", "run", "mine.yaml", "--out", "done", "--no-report", *INLINE).code == 0
    return folder / "done"


@pytest.fixture
def done(here, finished) -> Path:
    """A copy of the finished study, to do harm to; relative to here."""
    shutil.copytree(finished, here / "done")
    return Path("done")


def parsed(text: str, form: str) -> list[dict]:
    return json.loads(text) if form == "json" else list(csv.DictReader(io.StringIO(text)))


def results(folder: Path) -> dict[str, str]:
    """The files of the run folders with their checksums."""
    files = {Path(name).as_posix(): checksum for name, checksum in contents(folder).items()}
    return {name: checksum for name, checksum in files.items() if "/" in name and not name.startswith("report/")}


def rows(folder: Path) -> list[dict]:
    with Store.read(folder / FILE) as store:
        found = [(vars(row), store.evaluations(row.name)) for row in store.rows()]
    return [{**row.pop("measures"), **row, "curve": curve} for row, curve in found]


# --- run


def test_run_says_what_came_out_and_where(study, here):
    told = study("run", "mine.yaml", *INLINE)
    said(told, 0)
    folder = Path("studies/mine")
    assert [path.name for path in sorted(folder.iterdir()) if path.name.startswith("b8")] == NAMES
    table = parsed((folder / "results.csv").read_text(encoding="utf-8"), "csv")
    assert [(row["id"], row["name"], row["status"]) for row in table] == [
        (str(i), name, "finished") for i, name in enumerate(NAMES, start=1)
    ]
    assert "4 of 4 experiments finished; this took " in told.out
    best = min(table, key=lambda row: float(row["val_loss"]))
    shown = re.search(rf"^{best['id']} +{best['n_embd']} +{best['dropout']} .*$", told.out, re.M)
    assert f"{float(best['val_loss']):.4f}" in shown[0]
    for path in (folder / "results.csv", folder / "report" / "index.html"):
        assert path.is_file()
        assert str(path) in told.out
    assert (folder / best["name"] / "sample.txt").is_file()
    for name in LABELS:
        assert re.search(rf"^\[\d/4\] {re.escape(name)}   train \d\.\d{{4}}   val \d\.\d{{4}}   ", told.out, re.M)
    assert told.err == ""


def test_printed_commands_can_be_pasted(study, done):
    place = done.rename("my study; rm x")
    lost = sorted(path.parent.name for path in place.glob("*/run.json"))[0]
    shutil.rmtree(place / lost)
    outcome = study("run", place, "--no-report", *INLINE)
    commands = [shlex.split(line.split("  ")[-1]) for line in outcome.out.splitlines() if "  nanostudy " in line]
    commands += [
        shlex.split(line.partition("again with: ")[2]) for line in outcome.out.splitlines() if "again with: " in line
    ]
    assert len(commands) >= 2, outcome.out
    assert all(any(word.startswith(str(place)) for word in command) for command in commands), commands
    assert ["nanostudy", "study", "retry", str(place), lost] in commands


def test_run_again_changes_nothing(study, done):
    before = results(done)
    for source in ("mine.yaml", "done"):
        told = study("run", source, "--out", "done", *INLINE)
        said(told, 0)
        assert "4 of 4 experiments finished" in told.out
        assert "[1/4]" not in told.out
    assert results(done) == before


def test_parts_and_only_choose_and_the_folder_goes_on(study, here):
    said(study("run", "mine.yaml", "--part", "wide", "--only", "dropout=0.2", *INLINE), 0)
    folder = Path("studies/mine")
    first = results(folder)
    assert {Path(name).parts[0] for name in first} == {NAMES[3]}
    told = study("run", folder, "--part", "wide", *INLINE)
    assert "2 of 2 experiments finished" in told.out
    told = study("run", "studies/mine", *INLINE)
    assert "4 of 4 experiments finished" in told.out
    assert results(folder).items() >= first.items()
    assert [row["id"] for row in rows(folder)] == [1, 2, 3, 4]


def test_a_study_is_extended_on_the_command_line(study, done):
    before = results(done)
    told = study("run", "done", "dropout=0.1,0.2,0.3", *INLINE)
    said(told, 0)
    assert "6 of 6 experiments finished" in told.out
    assert results(done).items() >= before.items()
    assert [(row["id"], row["name"]) for row in rows(done)][:4] == list(enumerate(NAMES, start=1))
    assert [row["name"] for row in rows(done)][4:] == [name.replace("D20", "D30") for name in NAMES[1::2]]
    told = study("run", "done", *INLINE)  # as it is now
    assert "6 of 6 experiments finished" in told.out
    told = study("run", "mine.yaml", "--out", "done", *INLINE)  # as it began
    assert "4 of 4 experiments finished" in told.out


def test_failures_are_listed_and_retried(study, here):
    said(study("run", "mine.yaml", "--part", "narrow", *INLINE), 0)
    path = Path("studies/mine")
    with Store.open(path / FILE) as store:
        store.failed(NAMES[2], "lightning struck")
    told = study("run", "mine.yaml", *INLINE)
    assert told.code == 1
    assert f"failed   3  {LABELS[2]}: lightning struck" in told.out
    assert "nanostudy study retry studies/mine" in told.out
    assert "3 of 4 experiments finished" in told.out
    planned = study("plan", "mine.yaml", *INLINE)
    assert "0 experiments to run; 3 done already; 1 failed" in planned.out
    told = study("status", "mine")
    assert f"failed   3  {LABELS[2]}: lightning struck" in told.out
    assert "3 of 4 experiments finished, 1 failed" in told.out
    said(study("retry", "mine", NAMES[0], *INLINE), 2, "has failed under these names")
    said(study("retry", "mine", NAMES[2] + "x", *INLINE), 2, f"Nearest: .*{NAMES[2]}")
    said(study("retry", "mine", NAMES[2], "--executor", "nonsense"), 2, "workers, inline or ray")
    assert rows(path)[2]["status"] == "failed"
    told = study("retry", "mine", "3", *INLINE)
    said(told, 0)
    assert "1 of 1 experiments finished" in told.out
    said(study("retry", "mine", *INLINE), 2, "No experiment .* has failed")


# --- plan


def test_plan_writes_nothing_and_has_every_experiment_once(study, here):
    with unchanged(here):
        listed = {form: study("plan", "mine.yaml", "--format", form, *INLINE) for form in ("table", "csv", "json")}
    assert not (here / "studies").exists()
    for form in ("csv", "json"):
        said(listed[form], 0)
        stacks = parsed(listed[form].out, form)
        assert sorted(int(id) for stack in stacks for id in stack["ids"].split()) == [1, 2, 3, 4]
        assert sum(int(stack["tokens"]) for stack in stacks) == 4 * 6 * 4 * 8
        assert [int(stack["stack"]) for stack in stacks] == list(range(1, len(stacks) + 1))
        assert all(float(stack["seconds"]) >= 0 for stack in stacks)
    out = listed["table"].out
    assert re.search(rf"^1 +2 +2 +\d+ MiB +~\S+ s +3-4  {LABELS[2]}$", out, re.M)
    for words in ("4 experiments in 2 stacks, the longest first", "1 on cpu, 1 thread each, fp32", "768 tokens"):
        assert words in out
    assert re.search(r"^time +about .* \(calibration: 2 of 2 sizes tried", out, re.M)


def test_plan_has_only_what_is_left(study, done):
    with unchanged(Path.cwd()):
        told = study("plan", "done", *INLINE)
        said(told, 0)
        assert "0 experiments to run; 4 done already" in told.out
        assert parsed(study("plan", "done", "--format", "json", *INLINE).out, "json") == []
        told = study("plan", "mine.yaml", "dropout=0.2,0.3", "--out", "done", "--format", "json", *INLINE)
        (one, other) = parsed(told.out, "json")
    assert {one["ids"], other["ids"]} == {"5", "6"}
    assert one["first"] == NAMES[3].replace("D20", "D30")


def test_plan_tries_the_sizes_in_worker_processes(study, here):
    told = study("plan", "mine.yaml", "--workers", "1", *CPU)
    said(told, 0)
    assert "4 experiments in 2 stacks" in told.out
    assert "tried" in told.out


@pytest.mark.parametrize("what", ["8xH200", "3 cores 2GiB"])
def test_plan_for_other_machines(study, here, what):
    workers, before = int(what[0]), contents(here)
    told = study("plan", "mine.yaml", "--plan-for", what)
    said(told, 0)
    assert re.search(rf"^workers  {workers} on (H200|cpu, 1 thread each)", told.out, re.M)
    assert ("assumed, not measured" in told.out) == (what == "8xH200")
    assert re.search(r"^busy +\d+\.\d% of the time in the mean of the workers", told.out, re.M)
    assert "more would not help" in told.out
    assert contents(here) == before


def test_plan_for_other_machines_as_json_and_csv(study, here):
    told = study("plan", "mine.yaml", "--plan-for", "2xA100", "--format", "json")
    said(told, 0)
    found = json.loads(told.out)
    assert (found["device"], found["workers"], found["precision"]) == ("A100", 2, "bf16")
    assert found["pace"].startswith("assumed, not measured")
    ends = [stack["begins"] + stack["seconds"] for stack in found["stacks"]]
    assert max(ends) <= found["seconds"] + 0.2
    assert 0 <= found["busy_least"] <= found["busy_mean"] <= found["busy_most"] <= 1
    told = study("plan", "mine.yaml", "--plan-for", "2xA100", "--format", "csv")
    assert [row["first"] for row in parsed(told.out, "csv")] == [stack["first"] for stack in found["stacks"]]
    assert {row["worker"] for row in parsed(told.out, "csv")} == {"0", "1"}


def test_plan_for_says_what_it_does_not_understand_or_take(study, here):
    for words, problem in (
        (["--plan-for", "8xH201"], "'H201' is neither a known GPU"),
        (["--plan-for", "8xH200", "--workers", "2"], "leave --workers"),
        (["--plan-for", "8xH200", "--device", "cpu"], "leave --workers, --device"),
        (["--plan-for", "8xH200", "--precision", "fp32"], "only the peak in bf16 is known"),
    ):
        told = study("plan", "mine.yaml", *words)
        assert told.code == 2
        assert problem in told.err


def test_a_long_plan_is_shortened_for_a_person(study, here):
    seeds = ",".join(str(seed) for seed in range(1, 31))
    told = study("plan", "mine.yaml", f"seeds={seeds}", "--plan-for", "1000xT4")
    said(told, 0)
    assert "and 80 more stacks; --format csv or json has every one" in told.out


class Fake:
    """A backend of one worker that answers as it was told to."""

    def __init__(self, *reports):
        self.reports, self.tasks = list(reports), []

    def idle(self):
        return [0]

    def start(self, worker, task):
        self.tasks.append(task)

    def next(self, timeout):
        return self.reports.pop(0)


def test_calibration_scales_a_micro_batch_to_the_update(here):
    """An update of forty micro-batches takes minutes on a small machine, and as long as forty of one."""
    backend = Fake((0, Measured(0.5, 1e-4)), (0, Done()))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(forecast, "make_pool", lambda *_: Pool(backend, capacity, Resources(threads=1), ()))
        backend.close = lambda: None
        capacity = Capacity("cpu", "fp32", 1, None)
        settings = {"gradient_accumulation_steps": "40"}
        plan = api.plan_study("mine.yaml", settings=settings, parts=["wide"])
    (task,) = backend.tasks
    assert [job.experiment.gradient_accumulation_steps for job in task.jobs] == [1, 1]
    # 6 updates of 40 half-second micro-batches; 3 evaluations of 60 - 8 % 8 = 60 tokens on two splits, two members at once
    assert plan.seconds == pytest.approx(6 * 40 * 0.5 + 3 * 2 * 60 * 1e-4, rel=1e-3)


def test_calibration_waits_for_slow_workers_and_hears_of_dead_ones():
    measured = Measured(1.0, 2.0)
    backend = Fake(None, None, (0, measured), None, (0, Done()))
    assert list(_results(backend, 1)) == [measured]
    with pytest.raises(NanostudyError, match=r"it failed.*killed"):
        list(_results(Fake(None, (0, Broken("died", "killed"))), 1))


# --- status and list


@A_FORM
def test_status_has_every_experiment(study, done, form):
    with unchanged(done):
        told = study("status", done, "--format", form)
    said(told, 0)
    table = parsed(told.out, form)
    assert [row["name"] for row in table] == NAMES
    assert {row["status"] for row in table} == {"finished"}
    assert {row["part"] for row in table} == {"narrow", "wide"}
    assert [float(row["val_loss"]) for row in table] == [row["val_loss"] for row in rows(done)]


def test_status_for_a_person(study, done):
    told = study("status", done)
    said(told, 0)
    lines = told.out.splitlines()
    assert lines[0] == "4 of 4 experiments finished"
    ids = [int(line.split()[0]) for line in lines[4:]]
    assert ids == sorted((1, 2, 3, 4), key=lambda id: rows(done)[id - 1]["val_loss"])
    assert len({len(line) for line in lines[3:]}) == 1  # columns stand under their names
    told = study("status", done, "--all")
    assert [tuple(line.split()[1:3]) for line in told.out.splitlines()[3:]] == [(str(e), d) for e, d in SETTINGS]
    assert told.out.count("finished") == 5


def test_status_tells_when_nothing_was_heard(study, done):
    with Store.open(done / FILE) as store:
        store.set_progress(3600.0, [{"worker": 0, "doing": "something", "tokens_per_second": 12345, "members": []}])
    told = study("status", done)
    assert re.search(
        r"^time left +about (59 min 5\d s|1 h 00 min)\nworker 0  something +12,345 tokens/s$", told.out, re.M
    )
    for said_at, words in (
        ("2020-01-01", r"It recorded no progress (.|\n)* nanostudy study run done"),
        ("2999-01-01", "1 h 00"),
    ):
        with sqlite3.connect(done / FILE) as db:
            db.execute("UPDATE progress SET updated_at = ?", (f"{said_at}T00:00:00+00:00",))
        db.close()
        assert re.search(words, study("status", done).out)


@posix_only
def test_status_while_it_runs_and_after_it_was_stopped(study, here):
    run = start("study", "run", "mine.yaml", "max_iters=50000", "eval_interval=25000", *INLINE, cwd=here)

    def running() -> bool:
        return Path("studies/mine", FILE).is_file() and "worker 0" in study("status", "mine").out

    try:
        wait_for(running, run)
        told = study("status", "mine")
        said(told, 0)
        assert re.search(r"^0 of 4 experiments finished, 2 waiting, 2 running$", told.out, re.M)
        assert re.search(r"^worker 0  E32 D0.1 \+1 .*[\d,]+ tokens/s$", told.out, re.M)
        said(study("run", "mine.yaml", "max_iters=50000", "eval_interval=25000", *INLINE), 1, "Another process")
        said(study("plan", "mine.yaml", "max_iters=50000", "eval_interval=25000", *INLINE), 0)
    finally:
        run.send_signal(signal.SIGINT)
        stopped = outcome(run)
    said(stopped, 130, "Stopped. Everything is saved")
    piped = nanostudy("study", "status", "mine", cwd=here)
    said(piped, 0)
    assert "0 of 4 experiments finished, 4 waiting" in piped.out
    assert re.search(
        r"^2 of those have begun; they go on from their last checkpoints, about update \d", piped.out, re.M
    )
    assert "Go on with: nanostudy study run studies/mine" in piped.out
    assert "\x1b" not in piped.out + stopped.out
    steps = [row["step"] for row in rows(Path("studies/mine"))]
    assert max(steps) > 0


@A_FORM
def test_studies_are_listed(study, form):
    told = study("list")
    said(told, 0)
    assert [line.split()[0] for line in told.out.splitlines() if not line.startswith(" ")] == study_names()
    listed = parsed(study("list", "--format", form).out, form)
    assert [each["name"] for each in listed] == study_names()
    assert all(len(each["description"]) > 20 for each in listed)


# --- notes and stars


def test_notes_and_stars_are_listed_and_outlive_a_rebuild_and_a_merge(study, done, here):
    told = study("note", done)
    said(told, 0)
    assert "nanostudy study note done NUMBER TEXT --star" in told.out
    with unchanged_results(done):
        said(study("note", done, "3", "sharp [names]: is it luck?", "--star"), 0)
        said(study("note", done, NAMES[0], "the baseline"), 0)
    told = study("status", done)
    assert re.search(r"^★3 +32 +0\.1 .*\n    sharp \[names\]: is it luck\?$", told.out, re.M)
    assert re.search(r"^ 1 +16 +0\.1 .*\n    the baseline$", told.out, re.M)
    experiments = api.analyze(done).results.experiments
    assert list(experiments["star"]) == [None, None, True, None]
    assert list(experiments["note"]) == ["the baseline", None, "sharp [names]: is it luck?", None]
    told = parsed(study("status", done, "--format", "json").out, "json")
    assert [row["star"] for row in told] == [False, False, True, False]
    (done / FILE).unlink()
    said(study("rebuild", done), 0)
    other = here / "other"
    shutil.copytree(done, other)
    said(study("note", other, "1", "seen twice", "--star"), 0)
    said(study("note", other, "3", ""), 0)  # deletes the text, not the star
    said(study("merge", done, "other", "--into", "all"), 0)
    assert read_notes(Path("all")) == {
        NAMES[0]: Note("the baseline; seen twice", True),
        NAMES[2]: Note("sharp [names]: is it luck?", True),
    }
    said(study("note", "all", "3", "", "--no-star"), 0)
    assert list(read_notes(Path("all"))) == [NAMES[0]]


def test_a_note_of_what_is_not_there_and_a_damaged_file_are_told(study, done):
    said(study("note", done, "5", "x"), 2, "no experiment '5'")
    said(study("note", done, "1", "x" * 3000), 2, "2,000 characters")
    (done / NOTES).write_text(f"{NAMES[0]}: {{star: often}}\n", encoding="utf-8")
    said(study("note", done, "1", "x"), 2, "notes.yaml.*must be a text")
    told = study("status", done)  # results are still listed
    said(told, 0)
    assert "4 of 4 experiments finished" in told.out
    assert "must be a text" in told.out


# --- 80 columns


def test_every_listing_fits_80_columns(study, done, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    said(study("note", done, "2", "a note that goes on and on " * 8, "--star"), 0)
    for words in (
        ["status", done],
        ["status", done, "--all"],
        ["note", done],
        ["plan", "mine.yaml", *INLINE],
        ["list"],
    ):
        told = study(*words)
        said(told, 0)
        assert max(map(len, told.out.splitlines())) <= 80, told.out
    for word in ("presets", "settings"):
        told = call(word)
        assert told.code == 0
        assert max(map(len, told.out.splitlines())) <= 80, told.out


@pytest.mark.parametrize("width", [30, 44, 60, 80, 120])
def test_a_table_that_is_too_wide_loses_columns_and_never_a_digit(done, monkeypatch, width):
    monkeypatch.setenv("COLUMNS", str(width))
    with Store.read(done / FILE) as store:
        rows = store.rows()
    listing = Listing.of(done)
    lines = listing.lines(rows)
    assert max(map(len, lines)) <= width
    for line, row in zip(lines[1:], rows, strict=True):
        assert f"{row.val_loss:.4f}" in line.split()
    many = tuple(name for name in row.experiment.as_dict() if name not in ("corpus", "sample_prompt"))
    crowded = dataclasses.replace(listing, varying=many).lines(rows)
    assert max(map(len, crowded)) <= width
    assert "…" in crowded[1]
    assert all(f"{row.val_loss:.4f}" in line.split() for line, row in zip(crowded[1:], rows, strict=True))


# --- mistakes


@pytest.mark.parametrize(
    ("asked", "words"),
    [
        (["run", "quickstrat"], "no study or study file 'quickstrat'.*quickstart"),
        (["plan", "quickstrat"], "quickstart"),
        (["run", "."], "no study or study file"),
        (["run", "mine.yaml", "n_ebd=3"], "Did you mean n_embd"),
        (["run", "mine.yaml", "dropout"], "not of the form setting=value"),
        (["run", "mine.yaml", "dropout="], "dropout"),
        (["run", "mine.yaml", "dropout=0.1,0.1"], "twice"),
        (["run", "mine.yaml", "dropout=1.5"], "dropout=1.5 must be"),
        (["run", "mine.yaml", "n_embd=8"], "set by the parts"),
        (["run", "mine.yaml", "n_head=3"], "not divisible.*skip_impossible"),
        (["run", "mine.yaml", "corpus=gone.txt"], r"gone\.txt"),
        (["run", "mine.yaml", "block_size=100000"], "smaller block_size"),
        (["run", "mine.yaml", "--part", "wid"], "Did you mean wide"),
        (["plan", "mine.yaml", "--part", "wid"], "Did you mean wide"),
        (["run", "mine.yaml", "--only", "dropout=0.7"], r"dropout is 0\.1 or 0\.2"),
        (["plan", "mine.yaml", "--only", "dropout=0.7"], r"dropout is 0\.1 or 0\.2"),
        (["run", "mine.yaml", "--only", "dropuot=0.1"], "Did you mean dropout"),
        (["run", "mine.yaml", "--only", "dropout"], "setting=value"),
        (["run", "mine.yaml", "--workers", "0"], "workers=0"),
        (["run", "mine.yaml", "--workers", "many"], "--workers"),
        (["run", "mine.yaml", "--threads", "0"], "threads=0"),
        (["run", "mine.yaml", "--executor", "nonsense"], "workers, inline or ray"),
        (["run", "mine.yaml", "--executor", "inline", "--workers", "2"], "one worker"),
        (["run", "mine.yaml", "--device", "nonsense"], "device='nonsense' is not known"),
        (["run", "mine.yaml", "--precision", "fp8"], "precision='fp8' is not known: auto, fp32"),
        (["plan", "mine.yaml", "--format", "xml"], "'table', 'csv', 'json'"),
        (["status", "mine", "--format", "xml"], "'table', 'csv', 'json'"),
        (["run", "asks.yaml"], "prompts: .*é"),
        (["run", "empty.yaml"], "no values"),
        (["run", "twice.yaml"], "duplicate experiments"),
        (["run", "broken.yaml"], r"broken\.yaml, line 1 is not YAML"),
        (["run", "binary.yaml"], r"binary\.yaml is not UTF-8"),
        (["status", "."], r"no study in \.\. .*nanostudy study run"),
        (["status", "small.txt"], r"no study in small\.txt"),
        (["retry", "nothing"], "no study in nothing, and none in studies/nothing"),
        (["rebuild", "nothing"], "no study in nothing"),
        (["export", "nothing"], "no study in nothing"),
        (["export", "nothing", "--layout", "round"], "'published', 'findings'"),
        (["merge", "nothing", "--into", "all"], "no study in nothing"),
    ],
)
def test_a_mistake_ends_in_a_message_and_leaves_everything_as_it_was(study, here, asked, words):
    for name, text in {
        "asks.yaml": STUDY + "prompts: [été]\n",
        "empty.yaml": STUDY.replace("[0.1, 0.2]", "[]"),
        "twice.yaml": STUDY.replace("n_embd: 32", "n_embd: 16"),
        "broken.yaml": "settings: {",
    }.items():
        (here / name).write_text(text, encoding="utf-8")
    (here / "binary.yaml").write_bytes(b"\xff\xfe\x00")
    there = sorted(here.rglob("*"))
    with unchanged(here):
        told = study(*asked)
    said(told, 2, words)
    assert sorted(here.rglob("*")) == there


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA GPU")
@pytest.mark.parametrize("asked", ["run", "plan"])
def test_a_gpu_that_is_not_there_leaves_no_study(study, here, asked):
    said(study(asked, "mine.yaml", "--device", "cuda"), 2, "device=cuda", "device=cpu")
    assert not Path("studies").exists()


def test_the_nearest_folders_are_named(study, done):
    shutil.move(done, "studies/one")
    said(study("status", "two"), 2, "no study in two, and none in studies/two. There are studies/one")
    said(study("status", "one"), 0)


@pytest.mark.parametrize(
    ("asked", "code", "words"),
    [
        (["run", "done", "max_iters=7"], 2, "max_iters 6 there, 7 requested.*--out.*nothing was changed"),
        (["plan", "done", "max_iters=7"], 2, "max_iters 6 there, 7 requested"),
        (["run", "mine.yaml", "max_iters=7", "--out", "done"], 2, "max_iters 6 there, 7 requested"),
        (["run", "done", "dropout=0.1,0.3", "--only", "dropout=0.7"], 2, "dropout is 0.1 or 0.3"),
        (["run", "done", "dropout=0.1,0.3", "--device", "nonsense"], 2, "device"),
        (["run", "mine.yaml", "--out", "small.txt"], 1, r"small\.txt"),
    ],
)
def test_a_study_that_is_there_is_left_alone(study, done, asked, code, words):
    with unchanged(Path.cwd()):
        said(study(asked[0], *INLINE, *asked[1:]), code, words)


def test_a_text_that_changed_or_went_is_told(study, done):
    text = Path("small.txt").read_text(encoding="utf-8")
    Path("small.txt").write_text(text + "and more\n", encoding="utf-8")
    with unchanged(done):
        said(study("run", "done", "dropout=0.1,0.2,0.3", *INLINE), 1, "the text.* changed since", "--out")
    Path("small.txt").write_text(text[:20], encoding="utf-8")
    with unchanged(done):
        said(study("run", "done", *INLINE), 2, "block_size")
    Path("small.txt").unlink()
    with unchanged(done):
        for asked in ("run", "plan"):
            said(study(asked, "done", *INLINE), 2, r"needs corpus=small\.txt, .*Say where it is")
        said(study("status", "done"), 0)  # what is known is still told


def test_a_damaged_store_is_told_with_its_cure(study, done, monkeypatch):
    monkeypatch.setattr(database, "PATIENCE", 0.1)
    (done / FILE).write_bytes(b"not a database " * 400)
    with unchanged(done):
        for asked in (["run", "done", *INLINE], ["status", "done"], ["plan", "done", *INLINE]):
            said(study(*asked), 1, "damaged", "nanostudy study rebuild done")
    (done / FILE).unlink()
    with unchanged(done):
        said(study("status", "done"), 1, "nanostudy study rebuild done")


def test_a_store_of_another_version_is_told(study, done):
    with sqlite3.connect(done / FILE) as db:
        db.execute("INSERT INTO migrations VALUES ('wormholes', '2999-01-01')")
    db.close()
    with unchanged(done):
        for asked in (["run", "done", *INLINE], ["status", "done"], ["plan", "done", *INLINE]):
            said(study(*asked), 1, "newer nanostudy", "Update nanostudy")


@pytest.mark.parametrize(
    ("content", "code", "words"),
    [
        (b"settings: {", 2, r"study\.yaml, line 1 is not YAML"),
        (b"", 2, r"study\.yaml must hold lines"),
        (b"\xff\xfe\x00", 2, r"study\.yaml is not UTF-8"),
        (b"setings: {}", 2, "settings"),
    ],
)
def test_a_damaged_definition_is_told(study, done, content, code, words):
    (done / "study.yaml").write_bytes(content)
    with unchanged(done):
        for asked in (["run", "done", *INLINE], ["plan", "done", *INLINE], ["rebuild", "done"]):
            said(study(*asked), code, words)
        said(study("status", "done"), 0)  # needs the store alone


@pytest.mark.skipif(os.name != "posix" or os.geteuid() == 0, reason="rights do not bind this user")
def test_folders_without_rights_are_told(study, done):
    done.chmod(0o000)
    try:
        for asked in (["run", "done", *INLINE], ["status", "done"], ["plan", "done", *INLINE]):
            said(study(*asked), 1, "done")
        done.chmod(0o555)
        said(study("run", "done", "dropout=0.3,0.4", *INLINE), 1, "done")
        said(study("status", "done"), 0)
    finally:
        done.chmod(0o755)


# --- rebuild


@pytest.mark.parametrize("harm", ["lost", "damaged", "cut"])
def test_rebuild_makes_the_same_rows(study, done, harm):
    before = rows(done)
    if harm == "lost":
        (done / FILE).unlink()
    elif harm == "damaged":
        (done / FILE).write_bytes(b"not a database " * 400)
    else:
        (done / FILE).write_bytes((done / FILE).read_bytes()[:5000])
    files = results(done)
    told = study("rebuild", "done")
    said(told, 0)
    assert "4 experiments, 4 results" in told.out

    for now, then in zip(rows(done), before, strict=True):
        for row in (now, then):
            for name in ("finished_at", "seconds", "stack"):  # a rebuilt store knows no stacks
                row.pop(name)
            for point in row["curve"]:
                point.pop("seconds")
        assert now == then
    assert results(done) == files
    told = study("run", "done", *INLINE)
    said(told, 0)
    assert "[1/4]" not in told.out


def test_a_table_gives_up_its_superfluous_columns_first(monkeypatch):
    table = [{"settings": "L2 E128 D0 lr=0.004", "mean": "2.1064", "seeds": "2", "paired": "32 (13 to 244)"}]
    for width, line in (
        (60, "L2 E128 D0 lr=0.004  2.1064      2  32 (13 to 244)"),
        (46, "L2 E128 D0 lr=0.004  2.1064  32 (13 to 244)"),
        (38, "L2 E128…=0.004  2.1064  32 (13 to 244)"),
    ):
        monkeypatch.setenv("COLUMNS", str(width))
        assert fitted(table, ("seeds",), "settings")[1] == line


def test_listings_are_aligned():
    table = [{"": "9", "name": "a", "loss": "1.5"}, {"": "10", "name": "longer", "loss": ""}]
    assert as_lines(table) == ["    name    loss", " 9  a        1.5", "10  longer"]
    assert as_lines([]) == []


# --- the commands themselves


def test_what_only_reads_and_lists_does_not_load_torch(done):
    probe = (
        "import sys; from nanostudy.cli import main as cli\n"
        "try: cli.main()\n"
        "except SystemExit as end: code = end.code\n"
        "print('LOADED', code, [name for name in ('torch', 'numpy', 'altair') if name in sys.modules])"
    )
    study = ("--help", "run --help", "list", "status done", "status done --format json", "note done")
    for words in ("presets", *(f"study {words}" for words in study)):
        command = [sys.executable, "-c", probe, *words.split()]
        ran = subprocess.run(command, capture_output=True, text=True, check=True)
        assert re.search(r"LOADED (0|None) \[\]$", ran.stdout), ran


def test_every_command_is_listed_with_help(study):
    commands = ("run", "plan", "status", "retry", "list", "merge", "export", "rebuild")
    told = study("--help")
    for name in commands:
        assert re.search(rf"^ +{name} +[A-Z]", told.out, re.M)
        help = study(name, "--help")
        said(help, 0)
        assert "Usage" in help.out


def test_merge_and_export_say_what_they_did(study, here):
    for part in ("narrow", "wide"):
        said(study("run", "mine.yaml", "--part", part, "--out", part, *INLINE), 0)
    told = study("merge", "narrow", "wide", "--into", "all")
    said(told, 0)
    assert re.search("4 of 4 experiments", told.out)
    assert [(row["name"], row["status"]) for row in rows(Path("all"))] == [(name, "finished") for name in NAMES]
    said(study("export", "all"), 0)
    for part in ("narrow", "wide"):
        assert Path(f"all/published/nanoGPT_results_{part}/results.csv").is_file()


# --- who works


@pytest.mark.parametrize(
    ("cores", "asked", "workers", "threads"),
    [
        (8, {}, 8, 1),
        (8, {"experiments": 3}, 3, 2),
        (8, {"experiments": 1}, 1, 8),
        (8, {"workers": 2}, 2, 4),
        (8, {"workers": 2, "experiments": 1}, 2, 4),
        (8, {"threads": 4}, 2, 4),
        (2, {"threads": 4}, 1, 4),
        (1, {"workers": 3}, 3, 1),
    ],
)
def test_the_cores_are_shared_out(monkeypatch, cores, asked, workers, threads):
    monkeypatch.setattr("nanostudy.study.pool.available_cores", lambda: cores)
    monkeypatch.setattr("nanostudy.study.pool.available_memory", lambda device: 10**9 * workers)
    asked = {"workers": None, "threads": None, "experiments": 100, **asked}
    where = Where(device="cpu", precision="fp32", threads=asked["threads"], workers=asked["workers"])
    pool = make_pool(where, asked["experiments"])
    assert (pool.capacity.workers, pool.each.threads) == (workers, threads)
    assert pool.capacity.memory == int(10**9 * MEMORY_SHARE) - PROCESS_MEMORY
    assert len(pool.backend.idle()) == workers


# --- the live view


@pytest.fixture
def shown(done, monkeypatch):
    """shown(width, snapshot): what a terminal of this width shows, line by line; None: no terminal."""

    def shown(width: int | None, *snapshots: Snapshot, height: int = 24) -> list[str]:
        text = io.StringIO()

        def console(**options) -> Console:
            size = {"width": width, "height": height} if width else {}
            return Console(file=text, force_terminal=width is not None, color_system=None, **size, **options)

        monkeypatch.setattr(view, "Console", console)
        with open_study(design(done)) as folder:
            capacity, each = Capacity("cpu", "fp32", 2, None), Resources(threads=1)
            looking = StudyView(folder, folder.design.entries, Pool(Fake(), capacity, each, ("a note",)))
            with looking:
                begun = len(text.getvalue())
                for snapshot in snapshots:
                    looking.show(snapshot)
                told = text.getvalue()[begun:]
            head = text.getvalue()[:begun]
            assert "study    mine: 4 experiments of 4\n" in head
            assert "workers  2 on cpu, 1 thread each, fp32\n         a note\n" in head
        return re.sub(r"\x1b\[[?\d;]*[A-Za-z]|\r", "", told).splitlines()

    return shown


def snapshot(workers: int, best=None, left: float | None = 754.0, **counts: int) -> Snapshot:
    assignments = {}
    for worker in range(workers):
        stack = StackRow(worker, (NAMES[0], NAMES[1]), 2)
        assignments[worker] = Assignment(f"L4 H4 E128 D0.1 lr=0.00{worker + 1} warmup=100 s1 +3", stack.members, stack)
    if workers:
        for name, step in ((NAMES[0], 5), (NAMES[1], 3)):
            assignments[0].progress[name] = Progress(name, step, None, 2.5, 0.001)
        assignments[0].rates.update({NAMES[0]: 10_000.0, NAMES[1]: 2345.0})
        assignments[0].seconds_left, assignments[0].estimated_at = 65.4, time.monotonic()
    by_status = {Status(name): count for name, count in (counts or {"finished": 1, "running": 3}).items()}
    return Snapshot(by_status, assignments, best, left, 1.0)


@pytest.mark.parametrize("width", [40, 60, 80, 120, 200])
def test_a_line_a_worker_and_one_for_the_whole(shown, done, width):
    with Store.read(done / FILE) as store:
        best = store.best(1)[0]
    lines = shown(width, snapshot(2, best))
    assert len(lines) == 3
    assert all(len(line) <= width for line in lines), lines
    assert lines[0].startswith("worker 0")
    assert lines[1].startswith("worker 1")
    assert lines[2].startswith("━" * 16 + " 1/4 done, 3 ru"[: width - 16])
    if width >= 80:
        assert re.search(r"s1 \+3 +3/6 +loss 2\.500 ▁ +1 min 05 s", lines[0])
        assert lines[1].endswith("s1 +3  starting")
        assert lines[0].index("+3") == lines[1].index("+3")
        assert f"about 12 min 34 s left, best val {best.val_loss:.4f}" in lines[2]
    if width >= 120:
        assert lines[0].endswith("12,345 tokens/s")
        assert "  L4 H4 E128 D0.1 lr=0.001 warmup=100 s1 +3  " in lines[0]
        assert lines[2].endswith(LABELS[best.id - 1])


def test_the_course_of_the_loss_is_drawn_and_what_else_is_done_is_said(shown, monkeypatch):
    monkeypatch.setattr(progress, "time", SimpleNamespace(monotonic=lambda: 0.0))  # so many pictures take a while
    falling = [snapshot(2) for _ in range(300)]
    for i, each in enumerate(falling):
        for name in each.workers[0].progress:
            each.workers[0].progress[name] = Progress(name, i, None, 4.0 - i / 100, 0.001)
    evaluating = snapshot(2)
    evaluating.workers[0].progress = {NAMES[0]: Progress(NAMES[0], 6, None, 2.5, 0.001, evaluating=True)}
    evaluating.workers[0].estimated_at = 0.0
    evaluating.workers[1] = Assignment(LABELS[0], (NAMES[0],), None)
    lines = shown(80, *falling, evaluating)
    assert any(re.search(r" 299/6 +loss 1\.010 █▇▆▅▄▃▂▁ ", line) for line in lines)
    assert re.search(r"\+3 +evaluating +1 min 05 s$", lines[-3])
    assert re.search(r"^worker 1  E16 D0.1 +sampling$", lines[-2])


@pytest.mark.parametrize(("losses", "bars"), [([1.0], "▁"), ([3.0, 2.0, 1.0], "█▅▁"), ([5.0] * 9, "▁" * 8)])
def test_a_sparkline_goes_from_the_highest_to_the_lowest(losses, bars):
    assert view.sparkline(losses) == bars


def test_a_low_terminal_still_shows_the_whole(shown):
    lines = shown(80, snapshot(40), height=12)
    assert len(lines) == 11  # and one for the cursor
    assert "1/4 done" in lines[-1]
    assert re.search(r"and 3\d more workers", lines[-2])
    assert len(shown(80, snapshot(10), height=12)) == 11


def test_what_is_not_known_is_not_shown(shown):
    over = snapshot(1)
    over.workers[0].seconds_left = 0.0  # it takes longer than was thought
    assert shown(80, over)[0].endswith("loss 2.500 ▁")
    lines = shown(80, snapshot(0, left=None, finished=4, diverged=1))
    assert [line.rstrip() for line in lines] == ["━" * 16 + " 5/4 done, 1 diverged"]


def test_plain_lines_where_there_is_no_terminal(shown, monkeypatch):
    clock = itertools.count(1000, 10)  # ten seconds at each look
    unknown, known = snapshot(2, left=None), snapshot(2)
    monkeypatch.setattr(view.time, "monotonic", lambda: next(clock))
    assert shown(None, unknown) == []
    assert shown(None, *[known] * 5) == ["1/4 done, 3 running, about 12 min 34 s left"] * 2
