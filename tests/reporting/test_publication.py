"""What is written for others: a study's findings as a small folder, and somebody's table in this project's columns."""

import itertools
import shlex
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import yaml

import nanostudy
from nanostudy.analysis.results import read_results
from nanostudy.errors import NanostudyError
from nanostudy.reporting import publication, write
from nanostudy.reporting.publication import publish_findings
from nanostudy.study.definition import parse_studies

OLD = Path(__file__).parents[1] / "fixtures" / "format-1" / "study"


@pytest.fixture(autouse=True)
def _no_pictures(monkeypatch):
    def undrawn(*_):
        raise write.DrawingFailed("not drawn in this test")

    monkeypatch.setattr(publication, "scripts", undrawn)


@pytest.fixture
def study(tmp_path):
    return shutil.copytree(OLD, tmp_path / "grid")


def table(path, embedded=(64, 128), extra="", values=("",)):
    """A table of 2 x 2 x 2 rows without seeds, and with another column."""
    cells = itertools.product(embedded, (0.0, 0.2), values, (1, 2))
    lines = [f"run,d_model,dropout{',' + extra if extra else ''},n_layer,final_val_loss"]
    for i, (e, d, x, n) in enumerate(cells):
        lines.append(f"try {i},{e},{d}{',' + x if extra else ''},4,{2.5 - e / 1000 + d / 10 + n / 1000:.4f}")
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def test_findings_are_small_whole_and_without_weights(study, tmp_path):
    to = tmp_path / "docs" / "findings"
    to.parent.mkdir()
    lines = publish_findings(study, to)
    names = {path.relative_to(to).as_posix() for path in to.rglob("*") if path.is_file()}
    assert {"README.md", "index.html", "curves.csv"} < names
    assert not any(name.endswith((".safetensors", ".pt", ".sqlite")) for name in names)
    results = read_results([study])
    parts = [path for path in to.glob("*.csv") if path.name != "curves.csv"]
    rows = [line for path in parts for line in path.read_text(encoding="utf-8").splitlines()[1:]]
    assert len(rows) == len(results.finished)
    again = read_results(parts)
    for name, loss in results.finished["val_loss"].items():
        assert again.experiments.loc[name, "val_loss"] == pytest.approx(loss, abs=5e-5)
    assert (to / "curves.csv").read_text(encoding="utf-8").splitlines()[1].split(",")[1] == "0"  # an update
    text = (to / "README.md").read_text(encoding="utf-8")
    assert "not tested" not in text
    run, export = text.split("```sh\n")[1].split("\n```")[0].splitlines()[-2:]
    assert shlex.split(export)[:4] == [
        "nanostudy",
        "study",
        "export",
        shlex.split(run)[-1],
    ]  # the folder that was just trained
    assert "`nanostudy study confirm" in text
    assert str(tmp_path) not in text.split("## Made by")[1]
    assert f"{len(results.finished)} experiment" in lines[0]
    publish_findings(study, to)  # in place of the earlier ones


def test_curves_are_of_what_has_finished(study):
    results = read_results([study])
    first = results.finished.index[0]
    running = results.experiments.assign(
        status=results.experiments["status"].where(results.experiments.index != first, "running")
    )
    lines = publication._curves(replace(results, experiments=running)).splitlines()[1:]
    assert {line.split(",")[0] for line in lines} == set(results.finished.index) - {first}


def test_findings_replace_no_other_files_and_stay_small(study, tmp_path, monkeypatch):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("all of it")
    with pytest.raises(NanostudyError, match="holds other files"):
        publish_findings(study, tmp_path / "mine")
    monkeypatch.setattr(publication, "MOST_BYTES", 1000)
    with pytest.raises(NanostudyError, match="1,000 at most"):
        publish_findings(study, tmp_path / "new")
    assert not (tmp_path / "new").exists()


def test_a_table_is_taken_over_with_a_study_that_trains_the_same(tmp_path):
    source = table(tmp_path / "theirs.csv")
    imported = nanostudy.import_study(source, out=tmp_path / "imported")
    before, after = read_results([source]).experiments, read_results([imported.table]).experiments
    for column in ("n_embd", "dropout", "n_layer", "val_loss", "status", "source"):
        assert list(before[column]) == list(after[column]), column
    (study,) = parse_studies(imported.study.read_text(encoding="utf-8"), "study.yaml")
    assert study.grid == {"n_embd": (64, 128), "dropout": (0.0, 0.2)}
    assert study.settings == {"n_layer": 4}
    assert "learning_rate" in imported.why
    assert yaml.safe_load(imported.study.read_text(encoding="utf-8"))["seeds"] == [1, 2, 3]


def test_what_is_no_setting_here_is_taken_over_as_a_factor_and_makes_no_study(tmp_path):
    source = table(tmp_path / "theirs.csv", extra="activation", values=("relu", "gelu"))
    imported = nanostudy.import_study(source, out=tmp_path / "imported")
    assert imported.study is None
    assert "activation is no setting here" in imported.why
    assert read_results([imported.table]).factors == ("n_embd", "dropout", "activation")
    with pytest.raises(NanostudyError):
        nanostudy.import_study(source, out=tmp_path / "imported")  # which is there already
