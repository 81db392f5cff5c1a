"""Results from study folders, run folders and tables: what is read, and what is said of what is missing."""

import json
import math
import shutil
import subprocess

import numpy as np
import pandas as pd
import pytest
from conftest import SMALL, cpu, jobs_of, record_again, small, write_text
from synthetic import synthetic

import nanostudy
from nanostudy.analysis.frames import Results, columns, experiments_frame, joined, levels
from nanostudy.analysis.results import read_results
from nanostudy.atomic import sole_owner
from nanostudy.data.corpus import load_corpus
from nanostudy.errors import NanostudyError, UsageError
from nanostudy.measures import MEASURES
from nanostudy.model.config import GPTConfig, count_parameters, flops_per_token
from nanostudy.settings import FIELDS, Resources
from nanostudy.study.definition import Study, definitions, read_study
from nanostudy.study.folder import design, open_study
from nanostudy.study.store import Store
from nanostudy.training.samples import Sample, read_samples, write_samples

CPU = Resources(device="cpu", precision="fp32", threads=1)


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    return write_text(tmp_path_factory.mktemp("text") / "small.txt")


@pytest.fixture(scope="module")
def study(tmp_path_factory, text):
    """Two dropouts, two seeds, trained."""
    folder = tmp_path_factory.mktemp("study") / "study"
    yaml = folder.parent / "study.yaml"
    settings = {**SMALL, "block_size": 32, "corpus": str(text), "eval_interval": 10}
    lines = [
        f"settings: {json.dumps(settings)}",
        "grid: {dropout: [0.0, 0.2]}",
        "seeds: [1, 2]",
        'prompts: [null, "the"]',
    ]
    yaml.write_text("\n".join([*lines, "sample_tokens: 20"]))
    nanostudy.run_study(str(yaml), out=folder, resources=CPU, executor="inline")
    return folder


@pytest.fixture(scope="module")
def run(tmp_path_factory, text):
    folder = tmp_path_factory.mktemp("runs") / "mine"
    experiment = small(corpus=str(text), seed=9, sample_tokens=20)
    nanostudy.train(experiment, folder, resources=CPU, listen=lambda event: None)
    return folder


def test_study_is_read(study, text):
    found = read_results([study])
    table, corpus = found.experiments, load_corpus(str(text))
    assert (found.title, found.factors, found.notes) == ("study", ("dropout",), ())
    assert set(columns()) <= set(table)
    assert list(table["id"]) == [1, 2, 3, 4]
    assert list(table["dropout"]) == [0.0, 0.0, 0.2, 0.2]
    assert list(table["seed"]) == [1, 2, 1, 2]
    assert set(table["status"]) == {"finished"}
    with Store.read(study / "study.sqlite") as store:
        rows = store.rows()
    assert list(table.index) == [row.name for row in rows]
    assert list(table["val_loss"]) == [row.val_loss for row in rows]
    assert list(table["gap"]) == [row.val_loss - row.train_loss for row in rows]
    shape = GPTConfig.of(small(block_size=32), corpus.tokenizer.vocab_size)
    assert set(table["parameters"]) == {count_parameters(shape).total}
    assert set(table["tokens"]) == {20 * 4 * 32}
    assert set(table["flops"]) == {flops_per_token(shape) * 2560}
    assert table["epochs"].to_numpy() == pytest.approx(2560 / len(corpus.train.tokens))
    assert set(table["corpus_sha256"]) == {corpus.sha256}
    assert (set(table["device"]), set(table["precision"]), set(table["threads"])) == ({"cpu"}, {"fp32"}, {1})
    assert list(found.cells()) == ["dropout=0"] * 2 + ["dropout=0.2"] * 2
    assert all(table[name].dtype == float for name in MEASURES)


def test_curves_and_samples_of_a_study(study):
    found = read_results([study])
    name = found.experiments.index[0]
    curve = found.evaluations[found.evaluations["name"] == name]
    assert list(curve["step"]) == [0, 10, 20]
    known = pd.read_csv(study / name / "evaluations.csv")
    assert list(curve["val_loss"]) == list(known["val_loss"])
    log = found.training[found.training["name"] == name]
    assert list(log["grad_norm"]) == list(pd.read_csv(study / name / "training.csv")["grad_norm"])
    samples = found.samples[found.samples["name"] == name]
    assert list(samples["prompt"]) == ["", "the"]
    assert samples["text"].iloc[1].startswith("the")
    assert len(samples["text"].iloc[1]) == 23


def test_provenance_of_a_study(study, text):
    found = read_results([study]).provenance
    assert found["command"].endswith("\nEND\nnanostudy study run study.yaml --out study-again")
    assert "dropout: [0.0, 0.2]" in found["definition"]
    assert found["machines"][0]["experiments"] == 4
    assert found["versions"][0]["nanostudy"] == nanostudy.__version__
    assert found["checksums"] == {"small.txt": load_corpus(str(text)).sha256}


def test_the_command_that_reproduces_a_study_writes_its_definition(study, tmp_path):
    command = read_results([study]).provenance["command"]
    subprocess.run(["bash", "-c", f"nanostudy() {{ echo $@ > asked; }}\n{command}"], cwd=tmp_path, check=True)
    assert (tmp_path / "asked").read_text().split()[:3] == ["study", "run", "study.yaml"]
    assert read_study(str(tmp_path / "study.yaml")) == definitions(study)[-1]


def test_corpus_of_a_study(study, text, tmp_path):
    facts = next(iter(read_results([study]).corpora.values()))
    assert (facts.name, facts.tokenizer, facts.entropy) == ("small.txt", "char", None)
    assert "".join(facts.parts()) == text.read_text()


def test_text_that_changed_or_went_is_none(study, text, tmp_path):
    from dataclasses import replace

    facts = next(iter(read_results([study]).corpora.values()))
    changed = tmp_path / "small.txt"
    changed.write_text("something else")
    assert replace(facts, requested=str(changed)).parts() is None
    assert replace(facts, requested=str(tmp_path / "gone.txt")).parts() is None


def test_run_is_read(run):
    found = read_results([run])
    one = found.experiments.loc["mine"]
    metadata = json.loads((run / "run.json").read_text())
    assert one["val_loss"] == metadata["final"]["val_loss"]
    assert one["best_step"] == metadata["best"]["step"]
    assert one["seed"] == 9
    assert one["status"] == "finished"
    assert one["flops"] > 0
    assert list(found.samples["prompt"]) == [""]
    assert found.factors == ()


def test_study_and_run_together(study, run):
    found = read_results([study, run])
    assert len(found.experiments) == 5
    assert found.experiments.index[-1] == "mine"
    assert found.title == "study + mine"
    assert found.factors == ("block_size", "dropout")
    assert found.contexts == (32,)
    assert list(found.experiments["val_loss_at_32"].notna()) == [True] * 4 + [False]
    assert found.provenance["paths"] == [str(study), str(run)]


def test_a_run_of_the_study_named_again_counts_once(study):
    name = read_results([study]).experiments.index[2]
    found = read_results([study, study / name])
    assert len(found.experiments) == 4
    assert len(found.evaluations) == 4 * 3
    assert any("came twice" in note for note in found.notes)


def test_the_same_experiment_on_another_machine_is_another_result(run, tmp_path):
    other = tmp_path / "mine"
    shutil.copytree(run, other)
    metadata = json.loads((other / "run.json").read_text())
    metadata["seconds"] += 100
    record_again(other, metadata)
    found = read_results([run, other])
    assert list(found.experiments.index) == ["mine", "mine (mine)"]
    assert set(found.evaluations["name"]) == set(found.experiments.index)


def test_parts_of_one_study_run_apart_complete_each_other():
    first = synthetic({"dropout": [0.0, 0.2]}, seeds=(1, 2), waiting=(3, 4))
    second = synthetic({"dropout": [0.0, 0.2]}, seeds=(1, 2), waiting=(1, 2))
    for pieces in ([first, second], [second, first]):
        found = joined(pieces)
        assert sorted(found.experiments["id"]) == [1, 2, 3, 4]
        assert set(found.experiments["status"]) == {"finished"}


def test_unfinished_run(text, tmp_path):
    from nanostudy.training import stack as checkpoint
    from nanostudy.training.recorder import Recorder
    from nanostudy.training.train import train

    folder, corpus, experiment = tmp_path / "mine", load_corpus(str(text)), small(corpus=str(text), eval_interval=5)
    with sole_owner(folder):
        recorder = Recorder(folder, experiment, "identity", corpus, cpu())
        recorder.claim({})
        for event in train(jobs_of(experiment), corpus, cpu(), folder / "checkpoint.safetensors", save_every=1e9):
            recorder.record(event)
            if getattr(event, "step", 0) >= 10:
                break
    checkpoint.remove(folder / "checkpoint.safetensors")
    found = read_results([folder])
    assert found.experiments["status"].iloc[0] == "running"
    assert len(found.finished) == 0
    assert len(found.evaluations) >= 2
    assert "has not finished" in found.notes[0]


def test_study_that_has_not_begun(text, tmp_path):
    study = Study("waiting", {**SMALL, "corpus": str(text)}, {"dropout": (0.0, 0.2)}, {"all": {}}, (1,))
    with open_study(design(tmp_path / "waiting", study)):
        pass
    found = read_results([tmp_path / "waiting"])
    assert list(found.experiments["status"]) == ["waiting", "waiting"]
    assert found.experiments["val_loss"].isna().all()
    assert len(found.finished) == len(found.evaluations) == len(found.samples) == 0
    assert "0 of the 2 experiments of waiting finished (2 waiting)" in found.notes[0]


def test_a_study_without_its_run_folders_still_has_its_numbers(study, tmp_path):
    for name in ("study.yaml", "study.sqlite"):
        shutil.copy(study / name, tmp_path / name)
    found = read_results([tmp_path])
    assert found.experiments["val_loss"].notna().all()
    assert len(found.evaluations) == 12
    assert found.experiments["folder"].isna().all()
    assert len(found.training) == 0


def test_a_read_only_study_is_not_written(study):
    before = {path: path.stat().st_mtime_ns for path in study.rglob("*")}
    read_results([study])
    assert {path: path.stat().st_mtime_ns for path in study.rglob("*")} == before


@pytest.mark.parametrize("what", ["nothing", "folder", "file"])
def test_what_is_no_study_and_no_run(tmp_path, what):
    path = tmp_path / "there"
    if what == "folder":
        path.mkdir()
    elif what == "file":
        path.write_text("text")
    with pytest.raises(UsageError, match="there"):
        read_results([path])


def test_study_by_its_name(study, tmp_path, monkeypatch):
    shutil.copytree(study, tmp_path / "studies" / "mine")
    monkeypatch.chdir(tmp_path)
    assert len(read_results(["mine"]).experiments) == 4
    with pytest.raises(UsageError, match=r"^other is not there"):
        read_results(["other"])


def test_no_path_and_damage(tmp_path, run):
    with pytest.raises(UsageError, match="at least one"):
        read_results([])
    shutil.copytree(run, tmp_path / "broken")
    (tmp_path / "broken" / "run.json").write_text("{")
    with pytest.raises(NanostudyError, match=r"run\.json"):
        read_results([tmp_path / "broken"])


def test_different_texts_are_told(study, run, tmp_path):
    other = tmp_path / "other"
    shutil.copytree(run, other)
    metadata = json.loads((other / "run.json").read_text())
    metadata["corpus"]["sha256"], metadata["identity"] = "0" * 64, "other"
    record_again(other, metadata)
    assert any("2 different texts" in note for note in read_results([study, other]).notes)


# --- samples


def test_samples_of_an_older_version_are_split_at_the_prompts(tmp_path):
    """A model may write a line that looks like a heading."""
    (tmp_path / "sample.txt").write_text(
        "--- no prompt\n\nfirst\n--- no prompt\nstill first\n\n--- ROMEO:\nROMEO:second\n"
    )
    assert read_samples(tmp_path, prompts=[(None, "ROMEO:")]) == [
        Sample(None, "\nfirst\n--- no prompt\nstill first"),
        Sample("ROMEO:", "ROMEO:second"),
    ]
    assert [one.prompt for one in read_samples(tmp_path, prompts=[("JULIET:",)])] == [None, None, "ROMEO:"]
    (tmp_path / "sample.txt").write_text("just text\n")
    assert read_samples(tmp_path, "just", [(None,)]) == [Sample("just", "just text")]
    assert read_samples(tmp_path / "elsewhere") == []


def test_samples_are_read_as_they_were_written(tmp_path):
    samples = [Sample(None, "\n--- ROMEO:\nno heading\n", 3, 7, 0.8, 200, None), Sample("ROMEO:", "ROMEO:\x00")]
    write_samples(tmp_path, samples, headings=True)
    assert read_samples(tmp_path) == samples
    (tmp_path / "samples.json").write_text("[{")
    with pytest.raises(NanostudyError, match=r"samples\.json is damaged"):
        read_samples(tmp_path)


# --- frames


def test_frame_of_a_little_knowledge():
    table = experiments_frame([{"name": "a", "val_loss": "2.5", "train_loss": 2.0}, {"name": "b", "n_layer": 4}])
    assert set(columns()) <= set(table)
    assert table.loc["a", "gap"] == 0.5
    assert math.isnan(table.loc["b", "val_loss"])
    assert list(table["n_layer"]) == [None, 4]
    assert set(table["source"]) == {"table"}
    results = Results("t", table)
    assert results.factors == ()
    assert len(results.evaluations) == 0
    assert list(results.cells()) == ["", ""]


def test_factors_leave_out_what_changes_no_weight():
    results = synthetic({"dropout": [0.0, 0.1], "eval_interval": [100, 200], "n_layer": [2, 4]}, seeds=(1, 2))
    assert results.factors == ("n_layer", "dropout")
    assert [name for name in FIELDS if name in results.factors] == list(results.factors)


def test_levels_are_ascending():
    column = pd.Series([128, 64, None, 64.0, np.nan, "none"], dtype=object)
    assert levels(column) == [64, 128, "none"]
