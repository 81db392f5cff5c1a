"""Folders of format 1 that were written before the code was arranged as it is now: they open, go on, and say the same."""

import csv
import io
import json
import shutil
from pathlib import Path

import pytest
import torch
from conftest import Silent

import nanostudy
from nanostudy.analysis.results import read_results
from nanostudy.result import Status
from nanostudy.settings import Resources
from nanostudy.settings_files import experiment_and_resources, read_settings
from nanostudy.study.folder import rebuild
from nanostudy.study.listing import as_csv, records, status_lines
from nanostudy.study.store import FILE, Store
from nanostudy.training.run_folder import read_metadata, read_rows
from nanostudy.training.samples import read_samples

OLD = Path(__file__).parent / "fixtures" / "format-1"
CPU = Resources(device="cpu", threads=1)


@pytest.fixture
def old(tmp_path) -> Path:
    """A copy."""
    return Path(shutil.copytree(OLD, tmp_path / "old"))


def csv_of(folder: Path) -> list[dict[str, str]]:
    return list(csv.DictReader((folder / "results.csv").read_text().splitlines()))


def metadata(folder: Path) -> dict:
    return json.loads((folder / "run.json").read_text())


# --- a run


def test_a_run_opens_and_samples_what_it_sampled_then(old):
    run = nanostudy.load(old / "run", device="cpu")
    m = metadata(OLD / "run")
    assert run.summary["status"] == "finished"
    assert run.summary["validation loss"] == f"{m['final']['val_loss']:.4f}"
    assert run.summary["lowest"] == f"{m['best']['val_loss']:.4f} at update {m['best']['step']}"
    assert list(run.evaluations["val_loss"]) == [row["val_loss"] for row in read_rows(OLD / "run" / "evaluations.csv")]
    e = run.experiment
    [text] = run.sample(e.sample_prompt, tokens=e.sample_tokens, seed=e.seed)
    assert text + "\n" == (OLD / "run" / "sample.txt").read_text()


def test_a_run_is_analysed_and_reported(old):
    found = read_results([old / "run"])
    m, one = metadata(OLD / "run"), found.experiments.loc["run"]
    assert (one["status"], one["updates"], one["tokens"]) == ("finished", m["updates"], m["tokens"])
    assert (one["train_loss"], one["val_loss"]) == (m["final"]["train_loss"], m["final"]["val_loss"])
    assert (one["best_step"], one["best_val_loss"]) == (m["best"]["step"], m["best"]["val_loss"])
    assert (one["parameters"], one["members"]) == (m["parameters"]["total"], 1)
    assert list(found.samples["text"]) == [(OLD / "run" / "sample.txt").read_text().removesuffix("\n")]
    before = {path.name: path.read_bytes() for path in (OLD / "run").iterdir()}
    assert nanostudy.report(old / "run").is_file()
    assert "validation loss" in (old / "run" / "report.md").read_text()
    kept = {path.name: path.read_bytes() for path in (old / "run").iterdir() if path.is_file() and path.name in before}
    assert {name for name in before if kept[name] != before[name]} <= {"report.md"}


def test_a_finished_run_is_not_trained_again(old):
    experiment, resources = experiment_and_resources(read_settings(str(old / "run" / "settings.yaml")))
    before = (old / "run" / "run.json").read_bytes()
    run = nanostudy.train(experiment, old / "run", resources=resources, listen=lambda event: pytest.fail(str(event)))
    assert (old / "run" / "run.json").read_bytes() == before
    assert run.weights.sha256 == nanostudy.load(OLD / "run", device="cpu").weights.sha256


def test_a_stopped_run_goes_on_from_its_checkpoint(old):
    folder = old / "stopped"
    before = metadata(folder)
    assert read_results([folder]).experiments["status"].item() == Status.RUNNING
    experiment, resources = experiment_and_resources(read_settings(str(folder / "settings.yaml")))
    steps = []

    def listen(event):
        steps.append((type(event).__name__, getattr(event, "step", None)))
        if len(steps) == 4:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        nanostudy.train(experiment, folder, resources=resources, listen=listen)
    assert steps[0] == ("Started", 1412)
    after = read_metadata(folder)
    assert after["identity"] == before["identity"]
    assert len(after["sittings"]) == len(before["sittings"]) + 1
    assert after["sittings"][-1]["after_update"] == 1412


# --- a study


def test_a_study_is_listed_as_it_was(old):
    """results.csv, byte for byte, but for losses of experiments that have not finished, which it no longer has."""
    for name in ("study", "stopped-study"):
        then = csv_of(OLD / name)
        for row in then:
            if row["status"] != "finished":
                row |= dict.fromkeys(("train_loss", "val_loss", "loss_gap"), "")
        with Store.read(old / name / FILE) as store:
            assert list(csv.DictReader(io.StringIO(as_csv(records(store.rows()))))) == then
            ended = "8 of 8 experiments finished" if name == "study" else "0 of 2 experiments finished, 2 waiting"
            assert status_lines(store, old / name)[0] == ended


def test_a_study_is_analysed_and_reported(old):
    analysis, then = nanostudy.analyze(old / "study"), csv_of(OLD / "study")
    table = analysis.results.experiments
    assert list(table.index) == [row["name"] for row in then]
    for ours, theirs in (("val_loss",) * 2, ("gap", "loss_gap"), ("best_step",) * 2, ("tokens",) * 2, ("seconds",) * 2):
        assert list(table[ours]) == [float(row[theirs]) for row in then], ours
    assert analysis.results.factors == ("n_embd", "dropout")
    samples = analysis.results.samples
    assert len(samples) == 2 * len(then)
    assert set(samples["prompt"]) == {"", "The "}
    for name, rows in samples.groupby("name"):
        text = "\n".join(f"--- {row.prompt or 'no prompt'}\n{row.text}\n" for row in rows.itertuples())
        assert text == (OLD / "study" / str(name) / "sample.txt").read_text()
    assert nanostudy.report(old / "study").is_file()


def test_a_study_alone_or_beside_its_store_says_the_same(old):
    """What is read of each run folder alone is what the store says."""
    table = read_results([old / "study"]).experiments
    for name in table.index[:2]:
        one = read_results([old / "study" / name]).experiments.loc[name]
        same = [column for column in table if column not in ("id", "part", "seconds", "folder", "study")]
        told = table.loc[name, same]
        assert {c: one[c] for c in same if one[c] == one[c]} == {c: told[c] for c in same if told[c] == told[c]}


def test_a_finished_study_trains_nothing_and_is_rebuilt_to_the_same(old):
    def run():
        return nanostudy.run_study(old / "study", executor="inline", resources=CPU, listener=Silent())

    def without_times():
        return [{key: value for key, value in row.items() if key != "seconds"} for row in csv_of(old / "study")]

    before = csv_of(OLD / "study")
    assert [row.val_loss for row in run()] == [float(row["val_loss"]) for row in before]
    assert csv_of(old / "study") == before
    assert rebuild(old / "study")[:2] == (8, 8)
    run()
    assert without_times() == [{key: value for key, value in row.items() if key != "seconds"} for row in before]


def test_a_stopped_study_goes_on_from_its_stacks_checkpoint(old):
    """For a moment: 6000 updates take long."""
    folder = old / "stopped-study"

    class Impatient(Silent):
        def show(self, snapshot):
            if any(assignment.progress for assignment in snapshot.workers.values()):
                raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        nanostudy.run_study(folder, executor="inline", resources=CPU, listener=Impatient())
    with Store.read(folder / FILE) as store:
        [stack] = store.open_stacks()
        assert {row.name for row in store.rows()} == set(stack.members)
    for row in csv_of(OLD / "stopped-study"):
        sessions = metadata(folder / row["name"])["sittings"]
        assert [session["after_update"] for session in sessions] == [0, 85]
        assert read_rows(folder / row["name"] / "evaluations.csv") == read_rows(
            OLD / "stopped-study" / row["name"] / "evaluations.csv"
        )


def test_parts_are_merged(old, tmp_path):
    into = tmp_path / "whole"
    lines = nanostudy.merge_study([old / "study"], into)
    assert "8 results taken" in "\n".join(lines)
    with Store.read(into / FILE) as store:
        assert [row.val_loss for row in store.rows()] == [float(row["val_loss"]) for row in csv_of(OLD / "study")]
        assert all(row.sampled for row in store.rows())


# --- conversions


def test_a_run_becomes_nanogpts_and_comes_back(old, tmp_path):
    nanostudy.convert(old / "run", "nanogpt", out=tmp_path / "nanogpt")
    theirs, ours = (torch.load(path / "ckpt.pt", weights_only=True) for path in (OLD / "nanogpt", tmp_path / "nanogpt"))
    assert theirs["model"].keys() == ours["model"].keys()
    for name, tensor in theirs["model"].items():
        assert torch.equal(tensor, ours["model"][name]), name
    assert theirs["iter_num"] == ours["iter_num"]


def test_a_checkpoint_of_nanogpt_becomes_a_run(old, tmp_path):
    nanostudy.convert(old / "nanogpt" / "ckpt.pt", tmp_path / "back", meta=old / "nanogpt" / "meta.pkl")
    back, run = (
        nanostudy.load(tmp_path / "back", "last", device="cpu"),
        nanostudy.load(old / "run", "last", device="cpu"),
    )
    assert torch.equal(back.weights.params, run.weights.params)


def test_older_samples_are_read_without_their_study():
    for folder in sorted((OLD / "study").glob("b16*")):
        assert [sample.prompt for sample in read_samples(folder)] == [None, "The "]
    [sample] = read_samples(OLD / "run", prompt="x")
    assert sample.prompt == "x"
