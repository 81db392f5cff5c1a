"""The Python interface as people meet it: what it takes, what it refuses, what a notebook shows."""

import inspect
from pathlib import Path

import pytest
from conftest import Silent, write_text

import nanostudy
from nanostudy.errors import UsageError
from nanostudy.result import Status
from nanostudy.study.listing import Rows

TINY = {"n_layer": 1, "n_head": 2, "block_size": 8, "batch_size": 4, "max_iters": 6, "warmup_iters": 2, "n_embd": 16}
HERE = nanostudy.Resources(device="cpu", precision="fp32", threads=1)


@pytest.fixture
def here(tmp_path, monkeypatch, no_report) -> Path:
    monkeypatch.chdir(tmp_path)
    write_text(tmp_path / "small.txt", 600)
    return tmp_path


@pytest.fixture
def study(here):
    """A study as a mapping, with numbers in its changes."""
    document = {
        "name": "mine",
        "settings": {"corpus": "small.txt", **TINY},
        "grid": {"n_embd": [16, 32]},
        "sample_tokens": 5,
    }
    del document["settings"]["n_embd"]
    return lambda **options: nanostudy.run_study(
        document,
        settings={"dropout": [0.0, 0.1], "lr": 0.002},
        executor="inline",
        resources=HERE,
        listener=Silent(),
        **options,
    )


def test_the_interface_is_what_dir_shows():
    assert dir(nanostudy) == sorted(nanostudy.__all__)
    for name in nanostudy.__all__:
        assert inspect.getdoc(getattr(nanostudy, name)), name
    assert issubclass(nanostudy.UsageError, nanostudy.NanostudyError)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: nanostudy.train(), "train: missing a required argument: 'experiment'"),
        (lambda: nanostudy.train(5), "experiment must be a name or a path, not 5"),
        (lambda: nanostudy.train("quickstart", {"n_layer": 2}), "out must be a name or a path"),
        (lambda: nanostudy.report("a", out=["b"]), "out must be a name or a path"),
        (lambda: nanostudy.merge_study(["a", 5], into="b"), "sources must be a name or a path"),
        (lambda: nanostudy.merge_study("a", into="b"), "sources must be a list, not 'a'"),
        (lambda: nanostudy.run_study("quickstart", only={"dropout": 0.1}), "only must be text"),
        (lambda: nanostudy.train("quickstart", n_layer=2), r"settings=\{'n_layer': \.\.\.\}"),
        (lambda: nanostudy.train("quickstart", settings={"n_lyer": 2}), "Did you mean n_layer"),
        (lambda: nanostudy.train("quickstart", "out", 3), "too many positional arguments"),
        (lambda: nanostudy.run_study({"grid": {"lr": [1, 2]}}), "it is called learning_rate"),
        (lambda: nanostudy.run_study(7), "source must be a name or a path"),
        (lambda: nanostudy.run_study("quickstart", wokers=2), "Did you mean workers"),
        (lambda: nanostudy.report(5), "paths must be a name or a path"),
        (lambda: nanostudy.judge("quickstart"), "missing a required argument: 'b'"),
        (lambda: nanostudy.load(3), "run must be a name or a path"),
        (lambda: nanostudy.load_corpus(5), "name must be a name or a path"),
        (lambda: nanostudy.import_study(), "Name at least one"),
        (lambda: nanostudy.workspace("nowhere"), "no folder nowhere"),
    ],
)
def test_a_wrong_call_is_a_usage_error(here, call, message):
    with pytest.raises(UsageError, match=message):
        call()
    assert [path.name for path in here.iterdir()] == ["small.txt"]


def test_a_preset_or_a_mapping_is_trained_with_numbers_for_settings(here):
    changes = {"corpus": "small.txt", **TINY, "lr": 0.01}
    by_name = nanostudy.train("quickstart", "a", settings=changes, resources=HERE, listen=lambda event: None)
    same = {**nanostudy.preset("quickstart").as_dict(), **TINY, "corpus": "small.txt"}
    by_mapping = nanostudy.train(same, "b", settings={"learning_rate": 0.01}, resources=HERE, listen=lambda event: None)
    assert by_name.experiment == by_mapping.experiment == nanostudy.preset("quickstart", **changes)
    assert by_name.metadata["final"]["val_loss"] == by_mapping.metadata["final"]["val_loss"]


def test_a_study_is_a_mapping_and_its_results_plan_and_effects_are_tables(study, here):
    rows = study()
    assert isinstance(rows, Rows)
    assert [
        (row.status, row.experiment.n_embd, row.experiment.dropout, row.experiment.learning_rate) for row in rows
    ] == [(Status.FINISHED, width, dropout, 0.002) for width in (16, 32) for dropout in (0.0, 0.1)]
    table = rows._repr_html_()
    assert table.count("<tr") == 5
    assert all(f"<td>{width}</td>" in table for width in (16, 32))
    effects = nanostudy.analyze("mine").effects._repr_html_()
    assert "<td>n_embd</td>" in effects
    assert nanostudy.load("mine").folder == Path("studies/mine", min(rows, key=lambda row: row.val_loss).name)
    assert nanostudy.load("mine/3").short_name == "E32 D0"
    plan = nanostudy.plan_study("studies/mine", settings={"seeds": [1, 2]}, resources=HERE, executor="inline")
    assert "<td>E16 D0 s2</td>" in plan._repr_html_()


def test_charts_lie_in_the_notebook_and_load_nothing(study, here):
    study()
    chart = nanostudy.analyze("mine").charts("effects")[0]
    picture = chart._repr_mimebundle_()["image/svg+xml"]
    assert picture.startswith("<svg")
    assert "http" not in picture.replace("http://www.w3.org/", "")


def test_a_notice_when_a_study_ends(study, here, capfd):
    (here / "tell").write_text('#!/bin/sh\necho "$2" > "$1"\n')
    (here / "tell").chmod(0o755)
    study(notify=f"{here}/tell told.txt")
    assert Path("told.txt").read_text() == "mine has ended: 4 of 4 experiments finished\n"
    study(notify="bell")
    assert "\a" in capfd.readouterr().err
    study(notify="no-such-command")  # is no reason to fail
    assert "The notice could not be given: no-such-command" in capfd.readouterr().err
