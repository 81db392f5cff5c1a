"""Trackers get what the run folder gets; one that is missing is told of before, and one that fails stops nothing."""

from __future__ import annotations

import importlib.util
import json
import math
import sys
import threading
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
from commands import call
from conftest import SMALL, write_text

import nanostudy
from nanostudy import tracking
from nanostudy.errors import UsageError
from nanostudy.reporting import write
from nanostudy.settings import TRACKING, Resources, Where
from nanostudy.training.events import Event, Logged
from nanostudy.training.run_folder import read_rows

ONE = Resources(device="cpu", precision="fp32", threads=1)
BATCH = ("loss", "learning_rate", "grad_norm", "tokens_per_second")


class Ended(Exception):
    pass


def end_at_15(event: Event) -> None:
    if isinstance(event, Logged) and event.step == 15:
        raise Ended


@pytest.fixture(autouse=True)
def _undrawn(monkeypatch: pytest.MonkeyPatch) -> None:
    """Reports take most of the time of so short trainings."""
    monkeypatch.setattr(write, "publish_run", lambda folder: None)


@pytest.fixture
def experiment(tmp_path: Path) -> nanostudy.Experiment:
    text = write_text(tmp_path / "small.txt")
    return nanostudy.Experiment(**{**SMALL, "eval_interval": 10, "corpus": str(text), "sample_tokens": 5})


def train(
    experiment: nanostudy.Experiment, folder: Path, track: str | None, listen: Any = lambda event: None, **how: Any
):
    return nanostudy.train(experiment, folder, resources=ONE, track=track, listen=listen, **how)


def events_of(folder: Path) -> Any:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    found = EventAccumulator(str(folder / "tensorboard"), size_guidance={"scalars": 0, "tensors": 0})
    found.Reload()
    return found


def scalars_of(folder: Path) -> dict[str, list[tuple[int, float]]]:
    found = events_of(folder)
    return {name: [(p.step, p.value) for p in found.Scalars(name)] for name in found.Tags()["scalars"]}


def assert_told(folder: Path, told: dict[str, list[tuple[int, float]]], tolerance: float = 1e-6) -> None:
    """What was tracked are the run folder's tables."""
    for table, group, columns in (
        ("training.csv", "batch", BATCH),
        ("evaluations.csv", "exact", ("train_loss", "val_loss", "tokens")),
    ):
        rows = read_rows(folder / table)
        assert rows
        for column in columns:
            points = told[f"{group}/{column}"]
            assert [step for step, _ in points] == [row["step"] for row in rows], column
            rough = 0.06 if column == "tokens_per_second" else 0.0  # the table rounds it
            for (_, value), row in zip(points, rows, strict=True):
                assert math.isclose(value, row[column], rel_tol=tolerance, abs_tol=max(rough, 1e-9)), column
    metadata = json.loads((folder / "run.json").read_text())
    for name, value in (
        ("val_loss", metadata["final"]["val_loss"]),
        ("updates", 20),
        ("best_step", metadata["best"]["step"]),
    ):
        ((step, last),) = told[f"final/{name}"]
        assert step == 20
        assert math.isclose(last, value, rel_tol=1e-6)
    assert metadata["notes"] == [] or not any("tracking" in note for note in metadata["notes"])


# --- TensorBoard


def test_tensorboard_files_hold_the_tables_of_the_run(experiment, tmp_path) -> None:
    train(experiment, tmp_path / "run", "tensorboard")
    assert_told(tmp_path / "run", scalars_of(tmp_path / "run"))
    found = events_of(tmp_path / "run")
    settings = found.Tensors("settings/text_summary")[0].tensor_proto.string_val[0].decode()
    assert "| learning_rate | 0.001 |" in settings
    assert {"_hparams_/experiment", "_hparams_/session_start_info"} <= set(found.summary_metadata)


@pytest.mark.parametrize("saved", [True, False])
def test_a_resumed_run_goes_on_in_tensorboard_or_begins_again(experiment, tmp_path, saved) -> None:
    """Again where it was killed before its first checkpoint."""
    with pytest.raises(Ended):
        train(experiment, tmp_path / "run", "tensorboard", end_at_15, save_every=0.0 if saved else 60.0)
    assert (tmp_path / "run" / "checkpoint.safetensors").exists() == saved
    train(experiment, tmp_path / "run", "tensorboard")
    assert_told(tmp_path / "run", scalars_of(tmp_path / "run"))


def test_a_study_tracks_each_of_its_experiments(experiment, tmp_path) -> None:
    settings = {**SMALL, "corpus": experiment.corpus, "eval_interval": 10}
    study = {"settings": settings, "grid": {"dropout": [0.0, 0.1]}, "sample_tokens": 5}
    (tmp_path / "mine.yaml").write_text(json.dumps({**study, "description": "two"}))
    rows = nanostudy.run_study(
        tmp_path / "mine.yaml", tmp_path / "s", executor="inline", resources=ONE, track="tensorboard"
    )
    assert len(rows) == 2
    for row in rows:
        assert_told(tmp_path / "s" / row.name, scalars_of(tmp_path / "s" / row.name))


def test_tracking_changes_no_result(experiment, tmp_path) -> None:
    tracked, alone = train(experiment, tmp_path / "a", "tensorboard"), train(experiment, tmp_path / "b", None)
    assert tracked.metadata["identity"] == alone.metadata["identity"]
    assert tracked.weights.params.equal(alone.weights.params)
    assert not (tmp_path / "b" / "tensorboard").exists()
    assert 'track: "tensorboard"' in (tmp_path / "a" / "settings.yaml").read_text()
    assert "\ntrack:" not in (tmp_path / "b" / "settings.yaml").read_text()


# --- Weights & Biases and MLflow, by fakes of what is called


class FakeRun:
    def __init__(self, **asked: Any) -> None:
        self.asked, self.logged, self.summary, self.code = asked, [], {}, None

    def log(self, values: dict[str, float], step: int) -> None:
        self.logged.append((step, values))

    def finish(self, exit_code: int) -> None:
        self.code = exit_code


@pytest.fixture
def wandb(monkeypatch) -> ModuleType:
    module = ModuleType("wandb")
    module.__spec__ = importlib.util.spec_from_loader("wandb", None)
    module.runs, module.known, module.Settings = [], False, lambda **asked: asked

    def init(**asked: Any) -> FakeRun:
        module.runs.append(FakeRun(**asked))
        return module.runs[-1]

    module.init = init
    module.login = lambda prompt: module.known and not prompt
    monkeypatch.setitem(sys.modules, "wandb", module)
    for name in ("WANDB_MODE", "WANDB_PROJECT"):
        monkeypatch.delenv(name, raising=False)
    return module


def test_wandb_gets_the_tables_offline(experiment, tmp_path, wandb) -> None:
    train(experiment, tmp_path / "run", "wandb")
    (run,) = wandb.runs
    assert run.asked["mode"] == "offline"
    assert run.asked["dir"] == str(tmp_path / "run")
    assert run.asked["config"]["learning_rate"] == experiment.learning_rate
    assert run.asked["name"] == experiment.name
    told: dict[str, list[tuple[int, float]]] = {}
    for step, values in run.logged:
        for name, value in values.items():
            told.setdefault(name, []).append((step, value))
    told |= {name: [(20, value)] for name, value in run.summary.items() if name.startswith("final/")}
    assert_told(tmp_path / "run", told)
    assert run.summary["status"] == "finished"
    assert run.code == 0


def test_wandb_is_online_where_the_person_says_so(experiment, tmp_path, wandb, monkeypatch) -> None:
    monkeypatch.setenv("WANDB_PROJECT", "mine")
    wandb.known = True
    train(experiment, tmp_path / "a", "wandb")
    monkeypatch.setenv("WANDB_MODE", "disabled")
    train(experiment, tmp_path / "b", "wandb")
    assert [run.asked["mode"] for run in wandb.runs] == ["online", "disabled"]
    assert wandb.runs[0].asked["project"] == "mine"
    assert wandb.runs[0].asked["resume"] == "allow"
    train(experiment, tmp_path / "c", "wandb", track_project="theirs", track_name="first try")
    assert [wandb.runs[2].asked[key] for key in ("project", "name")] == ["theirs", "first try"]
    assert wandb.runs[0].asked["id"] != wandb.runs[1].asked["id"]


class FakeClient:
    """As much of mlflow.MlflowClient as is called."""

    store: dict[str, Any] = {}  # noqa: RUF012

    def __init__(self, tracking_uri: str) -> None:
        self.store.setdefault("uri", tracking_uri)

    def get_experiment_by_name(self, name: str) -> Any:
        return self.store.get(("experiment", name))

    def create_experiment(self, name: str) -> str:
        self.store["experiment", name] = SimpleNamespace(experiment_id="7")
        return "7"

    def search_runs(self, places: list[str], which: str, max_results: int) -> list[Any]:
        tag = which.removeprefix("tags.nanostudy = '").removesuffix("'")
        return [run for run in self.store.setdefault("runs", []) if run.tags["nanostudy"] == tag]

    def create_run(self, place: str, run_name: str, tags: dict[str, str]) -> Any:
        info = SimpleNamespace(run_id=str(len(self.store["runs"])))
        run = SimpleNamespace(info=info, name=run_name, tags=tags, metrics=[], params=[], status="RUNNING")
        self.store["runs"].append(run)
        return run

    def log_batch(self, id: str, metrics: Any = (), params: Any = (), tags: Any = ()) -> None:
        self.store["runs"][int(id)].metrics.extend(metrics)
        self.store["runs"][int(id)].params.extend(params)

    def get_metric_history(self, id: str, name: str) -> list[Any]:
        return [metric for metric in self.store["runs"][int(id)].metrics if metric.key == name]

    def update_run(self, id: str, status: str) -> None:
        self.store["runs"][int(id)].status = status

    def set_terminated(self, id: str, status: str) -> None:
        self.store["runs"][int(id)].status = status


@pytest.fixture
def mlflow(monkeypatch) -> dict[str, Any]:
    module, entities = ModuleType("mlflow"), ModuleType("mlflow.entities")
    module.__spec__ = importlib.util.spec_from_loader("mlflow", None)
    module.MlflowClient = FakeClient
    entities.Metric = lambda key, value, now, step: SimpleNamespace(key=key, value=value, step=step)
    entities.Param = entities.RunTag = lambda key, value: (key, value)
    monkeypatch.setitem(sys.modules, "mlflow", module)
    monkeypatch.setitem(sys.modules, "mlflow.entities", entities)
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    monkeypatch.setattr(FakeClient, "store", {})
    return FakeClient.store


def test_mlflow_gets_the_tables_once_though_the_run_was_resumed(experiment, tmp_path, mlflow) -> None:
    with pytest.raises(Ended):
        train(experiment, tmp_path / "run", "mlflow", end_at_15, save_every=1e9)
    assert FakeClient.store["runs"][0].status == "KILLED"
    train(experiment, tmp_path / "run", "mlflow")
    store = FakeClient.store
    assert store["uri"] == f"sqlite:///{(tmp_path / 'mlflow.db').as_posix()}"
    (run,) = store["runs"]
    assert run.status == "FINISHED"
    assert run.name == experiment.name
    assert ("n_embd", "16") in run.params
    told: dict[str, list[tuple[int, float]]] = {}
    for metric in run.metrics:
        told.setdefault(metric.key, []).append((metric.step, metric.value))
    told["batch/tokens_per_second"] = [
        (int(r["step"]), r["tokens_per_second"]) for r in read_rows(tmp_path / "run" / "training.csv")
    ]
    assert_told(tmp_path / "run", told)


@pytest.mark.skipif(importlib.util.find_spec("mlflow") is None, reason="mlflow is not installed")
def test_a_real_mlflow_store_reads_back(experiment, tmp_path) -> None:
    from mlflow import MlflowClient

    train(experiment, tmp_path / "run", "mlflow")
    client = MlflowClient(tracking_uri=f"sqlite:///{tmp_path / 'mlflow.db'}")
    place = client.get_experiment_by_name("nanostudy").experiment_id
    (run,) = client.search_runs([place])
    names = [f"batch/{c}" for c in BATCH] + [f"exact/{c}" for c in ("train_loss", "val_loss", "tokens")]
    names += [f"final/{c}" for c in ("val_loss", "updates", "best_step")]
    told = {n: [(m.step, m.value) for m in client.get_metric_history(run.info.run_id, n)] for n in names}
    assert_told(tmp_path / "run", told)
    assert run.info.status == "FINISHED"
    assert run.data.params["n_embd"] == "16"


# --- what goes wrong


@pytest.mark.parametrize("track", ["tensorboard", "wandb", "mlflow"])
def test_a_missing_package_is_told_before_anything_begins(experiment, tmp_path, monkeypatch, track) -> None:
    real = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *rest: None if name == track else real(name, *rest))
    with pytest.raises(UsageError, match=f"pip install {track}"):
        train(experiment, tmp_path / "run", track)
    assert not (tmp_path / "run").exists()
    with pytest.raises(UsageError, match=f"pip install {track}"):
        nanostudy.run_study("quickstart", tmp_path / "s", track=track)
    assert not (tmp_path / "s").exists()


def test_an_unknown_tracker_is_refused() -> None:
    with pytest.raises(UsageError, match="tensorboard, wandb or mlflow"):
        Where(track="excel")
    assert Where(track="none").track is None


class Failing:
    """A tracker that fails at the n-th thing it is told."""

    after = 0
    problem: BaseException = RuntimeError("no space\nleft")

    def __init__(self, subject: tracking.Subject) -> None:
        self.left = self.after
        self._do()

    def _do(self) -> None:
        self.left -= 1
        if self.left < 0:
            raise self.problem

    def log(self, step: int, values: Any) -> None:
        self._do()

    def end(self, status: str, figures: Any) -> None:
        self._do()


class Listener:
    def __init__(self) -> None:
        self.said: list[str] = []

    def __call__(self, event: Event) -> None: ...

    def say(self, text: str, style: str = "") -> None:
        self.said.append(text)

    def show(self, snapshot: Any) -> None: ...


@pytest.mark.parametrize("after", [0, 1, 12, 24])
@pytest.mark.parametrize("problem", [RuntimeError("no space\nleft"), SystemExit(3)])
def test_a_tracker_that_fails_stops_no_training(experiment, tmp_path, monkeypatch, after, problem) -> None:
    monkeypatch.setattr(Failing, "after", after)
    monkeypatch.setattr(Failing, "problem", problem)
    monkeypatch.setitem(tracking.TRACKERS, "tensorboard", Failing)
    listener = Listener()
    trained = train(experiment, tmp_path / "run", "tensorboard", listener)
    assert trained.metadata["status"] == "finished"
    assert len(trained.training) == 20
    (note,) = listener.said
    assert note.startswith("tracking with tensorboard ended early, and the training went on: " + type(problem).__name__)
    assert "left" not in note
    assert trained.metadata["notes"].count(note) == 1


def test_a_study_goes_on_too_with_one_note(experiment, tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(Failing, "after", 5)
    monkeypatch.setitem(tracking.TRACKERS, "tensorboard", Failing)
    study = {"settings": {**SMALL, "corpus": experiment.corpus}, "grid": {"dropout": [0.0, 0.1]}, "description": "two"}
    (tmp_path / "mine.yaml").write_text(json.dumps(study))
    listener = Listener()
    rows = nanostudy.run_study(
        tmp_path / "mine.yaml", tmp_path / "s", executor="inline", resources=ONE, track="tensorboard", listener=listener
    )
    assert [row.status for row in rows] == ["finished"] * 2
    assert len([text for text in listener.said if "tracking" in text]) == 1
    notes = [json.loads((tmp_path / "s" / row.name / "run.json").read_text())["notes"] for row in rows]
    assert sum("tracking with" in note for of_run in notes for note in of_run) == 1


def test_a_tracker_that_hangs_delays_no_training(experiment, tmp_path, monkeypatch) -> None:
    released = threading.Event()
    monkeypatch.setattr(tracking, "PATIENCE", 0.3)
    monkeypatch.setattr(Failing, "_do", lambda self: released.wait(30))
    monkeypatch.setitem(tracking.TRACKERS, "tensorboard", Failing)
    listener = Listener()
    trained = train(experiment, tmp_path / "run", "tensorboard", listener)
    released.set()
    assert trained.metadata["status"] == "finished"
    (note,) = listener.said
    assert "made no progress" in note


# --- the ways in


def test_a_settings_file_names_its_tracker_for_python_too(experiment, tmp_path) -> None:
    settings = {**SMALL, "corpus": experiment.corpus, "sample_tokens": 5, "max_iters": 1, "track": "tensorboard"}
    (tmp_path / "mine.yaml").write_text(json.dumps(settings))
    nanostudy.train(tmp_path / "mine.yaml", tmp_path / "run", resources=ONE, listen=lambda event: None)
    assert events_of(tmp_path / "run").Tags()["scalars"]
    nanostudy.train(tmp_path / "mine.yaml", tmp_path / "b", resources=ONE, listen=lambda event: None, track=None)
    assert not (tmp_path / "b" / "tensorboard").exists()


def test_the_command_takes_it_as_a_setting(experiment, tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    settings = [f"{name}={value}" for name, value in {**SMALL, "corpus": experiment.corpus, "sample_tokens": 5}.items()]
    assert call("train", "quickstart", *settings, "--track=tensorboard", "--out", "run").code == 0
    assert events_of(tmp_path / "run").Tags()["scalars"]
    told = call("train", "quickstart", "track=paper")
    assert told.code == 2
    assert "track='paper' is not known" in told.err


def test_nanogpts_wandb_log_is_the_same(tmp_path) -> None:
    from nanostudy.interop.nanogpt_config import read_config

    names = "wandb_project = 'owt'\nwandb_run_name = 'mini'\n"
    (tmp_path / "a.py").write_text(f"wandb_log = True\n{names}dataset = 'shakespeare_char'\n")
    found = read_config(tmp_path / "a.py")
    assert [found.settings[name] for name in TRACKING] == ["wandb", "owt", "mini"]
    assert not found.unused
    untracked = read_config(tmp_path / "a.py", {"wandb_log": "False"})
    assert [name for name, *_ in untracked.unused if "wandb" in name] == [
        "wandb_log",
        "wandb_project",
        "wandb_run_name",
    ]
    assert read_config(tmp_path / "a.py", {"track": "none"}).settings["track"] == "none"
    assert "track" not in read_config(tmp_path / "a.py", {"wandb_log": "False"}).settings
