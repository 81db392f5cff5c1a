"""A new measure is one line in the table of measures and one where it is computed: then it is everywhere."""

import csv
import json
import re

import pytest
from conftest import SMALL, write_text

import nanostudy
from nanostudy import tracking
from nanostudy.analysis.results import read_results
from nanostudy.errors import NanostudyError
from nanostudy.measures import MEASURES, Measure
from nanostudy.settings import Resources
from nanostudy.study.folder import rebuild
from nanostudy.study.listing import as_csv, as_json, records, status_lines
from nanostudy.study.store import FILE, Store
from nanostudy.training.train import _Training

CPU = Resources(device="cpu", precision="fp32", threads=1)
LOSSES = {"0.0": 1.23456, "0.1": 1.34567}  # by dropout
TEXTS = {"0.0": "1.235", "0.1": "1.346"}


class Tracker:
    """A tracker that remembers the final figures."""

    ended: dict = {}  # noqa: RUF012

    def __init__(self, subject: tracking.Subject) -> None:
        self.name = subject.name

    def log(self, step, values) -> None: ...

    def end(self, status, figures) -> None:
        self.ended[self.name] = figures


@pytest.fixture(scope="module")
def settings(tmp_path_factory):
    return {**SMALL, "corpus": str(write_text(tmp_path_factory.mktemp("text") / "small.txt")), "eval_interval": 10}


@pytest.fixture(scope="module")
def old_study(tmp_path_factory, settings):
    """One experiment, trained before there is the new measure."""
    folder = tmp_path_factory.mktemp("old")
    study = {"settings": settings, "grid": {"dropout": [0.0]}, "sample_tokens": 5}
    (folder / "small.yaml").write_text(json.dumps(study))
    nanostudy.run_study(folder / "small.yaml", folder / "study", executor="inline", resources=CPU)
    return folder / "study"


@pytest.fixture(scope="module")
def val_loss_ema(old_study):
    """The table's line, and the place where it is computed, of which the old study knows nothing."""
    computed = _Training.final_measures

    def final_measures(self, stack, m):
        dropout = self.jobs[stack.slots[m].name].experiment.dropout
        return {**computed(self, stack, m), "val_loss_ema": LOSSES[str(dropout)]}

    with pytest.MonkeyPatch.context() as patch:
        measure = Measure("val_loss_ema", "validation loss of averaged weights", "nats per token", 3, True, "ema")
        patch.setitem(MEASURES, "val_loss_ema", measure)
        patch.setattr(_Training, "final_measures", final_measures)
        yield measure


@pytest.fixture(scope="module")
def study(tmp_path_factory, settings, val_loss_ema):
    folder = tmp_path_factory.mktemp("new")
    study = {"settings": settings, "grid": {"dropout": [0.0, 0.1]}, "sample_tokens": 5}
    (folder / "small.yaml").write_text(json.dumps(study))
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(tracking.TRACKERS, "tensorboard", Tracker)
        rows = nanostudy.run_study(
            folder / "small.yaml", folder / "study", executor="inline", resources=CPU, track="tensorboard"
        )
    assert [row.val_loss_ema for row in rows] == list(LOSSES.values())
    return folder / "study"


@pytest.fixture(scope="module")
def report(study):
    nanostudy.report(study)
    return study / "report"


def by_dropout(rows) -> dict[str, object]:
    return {str(row["dropout"]): row["val_loss_ema"] for row in rows}


def test_in_the_store(study):
    with Store.read(study / FILE) as store:
        assert {str(row.experiment.dropout): row.val_loss_ema for row in store.rows()} == LOSSES


def test_in_run_json(study):
    found = [json.loads(path.read_text()) for path in study.glob("*/run.json")]
    assert {str(one["settings"]["dropout"]): one["val_loss_ema"] for one in found} == LOSSES


def test_in_results_csv_after_the_older_ones(study, report):
    rows = list(csv.DictReader((study / "results.csv").read_text().splitlines()))
    assert by_dropout(rows) == {dropout: str(loss) for dropout, loss in LOSSES.items()}
    assert list(rows[0])[-3:] == ["seconds", "val_loss_ema", "reason"]
    table = list(csv.DictReader((report / "results.csv").read_text().splitlines()))
    assert by_dropout(table) == by_dropout(rows)


def test_in_listings(study):
    with Store.read(study / FILE) as store:
        found = list(records(store.rows()))
        assert by_dropout(json.loads(as_json(found))) == LOSSES
        assert by_dropout(csv.DictReader(as_csv(found).splitlines())) == {d: str(loss) for d, loss in LOSSES.items()}
        for every in (True, False):
            text = "\n".join(status_lines(store, study, every))
            assert re.search(r"\bema\b", text)
            assert all(loss in text for loss in TEXTS.values())


def test_in_the_data_frame(study):
    table = nanostudy.analyze(study).results.experiments
    assert dict(zip(table["dropout"].map(str), table["val_loss_ema"], strict=True)) == LOSSES
    assert table["val_loss_ema"].dtype == float


def test_on_the_page(report):
    page = (report / "index.html").read_text()
    assert 'data-column="val_loss_ema"' in page
    data = json.loads(re.search(r'<script[^>]*id="data"[^>]*>(.*?)</script>', page, re.DOTALL)[1])
    table = data["tables"]["experiments"]
    assert by_dropout([dict(zip(table["columns"], row, strict=True)) for row in table["rows"]]) == LOSSES
    assert data["decimals"]["val_loss_ema"] == 3
    assert "val_loss_ema" in data["lowest"]


def test_in_markdown(report):
    text = (report / "report.md").read_text()
    assert re.search(r"\| ema \|", text)
    assert all(loss in text for loss in TEXTS.values())


def test_in_a_notebook(study):
    shown = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("IPython.display.display", lambda thing: shown.append(getattr(thing, "data", "")))
        nanostudy.analyze(study).section("experiments")._ipython_display_()
    text = "\n".join(shown)
    assert "ema" in text
    assert all(loss in text for loss in TEXTS.values())


def test_of_a_run(study, val_loss_ema):
    folder = next(path.parent for path in study.glob("*/run.json") if json.loads(path.read_text())["val_loss_ema"])
    run = nanostudy.load(folder)
    assert run.summary[val_loss_ema.title] in TEXTS.values()
    assert val_loss_ema.title in run._repr_html_()
    assert read_results([folder]).experiments["val_loss_ema"].iloc[0] in LOSSES.values()


def test_in_the_trackers_final_figures(study):
    assert sorted(figures["final/val_loss_ema"] for figures in Tracker.ended.values()) == sorted(LOSSES.values())


def test_a_rebuilt_store_has_it(study):
    rebuild(study)
    test_in_the_store(study)


def test_an_older_study_gets_the_column_when_it_goes_on(old_study, val_loss_ema):
    """Read as it is until then. What finished before has none, and keeps none."""
    before = (old_study / FILE).read_bytes()
    with Store.read(old_study / FILE) as store:
        [row] = store.rows()
        assert row.val_loss_ema is None
        assert next(iter(records([row])))["val_loss_ema"] is None
    assert read_results([old_study]).experiments["val_loss_ema"].isna().all()
    assert (old_study / FILE).read_bytes() == before
    for _ in range(2):
        nanostudy.run_study(old_study, settings={"dropout": "0.0,0.1"}, executor="inline", resources=CPU)
    with Store.open(old_study / FILE) as store:
        found = {str(row.experiment.dropout): row.val_loss_ema for row in store.rows()}
        assert found == {"0.0": None, "0.1": LOSSES["0.1"]}
        store._db.write("UPDATE experiments SET val_loss_ema = 7")
        with pytest.raises(NanostudyError, match="never changed"):
            store.commit()
