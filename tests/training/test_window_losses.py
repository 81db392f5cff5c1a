"""The file of single windows' losses: written by one training and by a study, merged, damaged, absent; and the test loss."""

import csv
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from conftest import Silent

import nanostudy
from nanostudy import api
from nanostudy.errors import NanostudyError
from nanostudy.settings import Resources
from nanostudy.study.folder import rebuild
from nanostudy.study.store import FILE, Store
from nanostudy.training.run_folder import read_result
from nanostudy.training.window_losses import WINDOW_LOSSES, Windows, read_window_losses, write_window_losses

CPU = Resources(device="cpu", threads=1)
SETTINGS = {
    "corpus": "text.txt",
    "split": [0.8, 0.1, 0.1],
    "n_layer": 1,
    "n_head": 1,
    "n_embd": 8,
    "block_size": 40,
    "batch_size": 2,
    "max_iters": 4,
    "eval_interval": 2,
}


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("windows")
    (folder / "text.txt").write_text("To be, or not to be, that is the question: " * 60)
    return folder


@pytest.fixture(scope="module")
def study(place) -> Path:
    settings = {**SETTINGS, "corpus": str(place / "text.txt")}
    (place / "small.yaml").write_text(json.dumps({"settings": settings, "grid": {"dropout": [0.0, 0.2]}}))
    api.run_study(place / "small.yaml", place / "study", executor="inline", resources=CPU, listener=Silent())
    return place / "study"


def names(study: Path) -> list[str]:
    return sorted(path.parent.name for path in study.glob("*/run.json"))


def test_a_study_and_one_training_leave_the_same_file(study, place):
    for name in names(study):
        result, windows = read_result(study / name), read_window_losses(study / name)
        assert set(windows) == {"train", "val", "val_at_32", "test"}
        for which, loss in (("train", result.train_loss), ("val", result.val_loss), ("test", result.test_loss)):
            assert windows[which].mean == pytest.approx(loss, rel=1e-6)
            assert windows[which].context == 40
        assert windows["val_at_32"].mean == pytest.approx(result.context_losses[32], rel=1e-6)
    alone = nanostudy.train(result.experiment, place / "alone", resources=CPU, listen=lambda event: None)
    assert result.test_loss == pytest.approx(read_result(alone.folder).test_loss, rel=1e-5)
    for which, ours in read_window_losses(alone.folder).items():
        np.testing.assert_allclose(ours.losses, windows[which].losses, rtol=1e-4)


def test_the_test_loss_is_recorded_wherever_there_is_one(study, place):
    with Store.read(study / FILE) as store:
        losses = {row.name: row.test_loss for row in store.rows()}
    assert all(loss > 0 for loss in losses.values())
    table = list(csv.DictReader((study / "results.csv").read_text().splitlines()))
    assert {row["name"]: float(row["test_loss"]) for row in table} == losses
    rebuilt = Path(shutil.copytree(study, place / "rebuilt"))
    rebuild(rebuilt)
    with Store.read(rebuilt / FILE) as store:
        assert {row.name: row.test_loss for row in store.rows()} == losses
    found = nanostudy.analyze(study).results.experiments
    assert found["test_loss"].to_dict() == losses


def test_a_merge_takes_the_windows_along(study, place):
    api.merge_study([study], place / "merged")
    for name in names(study):
        assert (place / "merged" / name / WINDOW_LOSSES).read_bytes() == (study / name / WINDOW_LOSSES).read_bytes()


def test_without_a_test_part_there_is_neither_loss_nor_column(place):
    settings = {**SETTINGS, "corpus": str(place / "text.txt"), "split": None}
    (place / "two.yaml").write_text(json.dumps({"settings": settings, "grid": {"dropout": [0.0, 0.2]}}))
    api.run_study(place / "two.yaml", place / "two", executor="inline", resources=CPU, listener=Silent())
    assert "test_loss" not in (place / "two" / "results.csv").read_text()
    for name in names(place / "two"):
        assert "test_loss" not in (place / "two" / name / "run.json").read_text()
        assert set(read_window_losses(place / "two" / name)) == {"train", "val", "val_at_32"}


def test_a_file_is_whole_or_refused(tmp_path, monkeypatch):
    assert read_window_losses(tmp_path) == {}
    losses = np.linspace(1, 3, 7, dtype=np.float32)
    write_window_losses(tmp_path, {"val": Windows(losses, 64, 5)}, "abc")
    [(name, windows)] = read_window_losses(tmp_path).items()
    assert (name, windows.context, windows.last) == ("val", 64, 5)
    assert windows.mean == pytest.approx((64 * losses[:6].sum() + 5 * losses[6]) / (64 * 6 + 5))
    whole = (tmp_path / WINDOW_LOSSES).read_bytes()
    altered = whole.replace(b'last\\": 5', b'last\\": 6')
    for damaged in (b"", whole[:-1], whole[:-1] + b"x", altered):
        assert damaged != whole
        (tmp_path / WINDOW_LOSSES).write_bytes(damaged)
        with pytest.raises(NanostudyError, match=WINDOW_LOSSES):
            read_window_losses(tmp_path)
    (tmp_path / WINDOW_LOSSES).write_bytes(whole)
    monkeypatch.setattr("nanostudy.training.window_losses.LARGEST", len(whole) - 1)
    with pytest.raises(NanostudyError, match=f"{WINDOW_LOSSES} has .* bytes"):
        read_window_losses(tmp_path)
