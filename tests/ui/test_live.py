"""What a page is told of studies and runs: beside their stores and folders, while they run and after."""

import csv
import http.client
import json
import os
import shutil
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path
from urllib.parse import urlsplit

import numpy as np
import pytest
import torch
from serving import RESOURCES, Silent, serving

from nanostudy import api
from nanostudy.study.store import FILE, Store
from nanostudy.training.run_folder import write_metadata
from nanostudy.training.weights import load_weights
from nanostudy.ui import server as server_module
from nanostudy.ui.live import Place, Places, changes, thinned
from nanostudy.ui.playground import Playground, Request
from nanostudy.ui.serve import beside


def test_the_state_is_what_store_and_folders_say(studied):
    state = Place(1, studied).state()
    assert (state["state"], state["counts"]["finished"]) == ("finished", 8)
    assert (state["factors"], state["settings"]) == (["n_embd", "dropout"], ["n_embd", "dropout", "seed"])
    with Store.read(studied / FILE) as store:
        rows = store.rows()
        for row, told in zip(rows, state["rows"], strict=True):
            assert (told["id"], told["name"], told["val_loss"], told["weights"]) == (
                row.id,
                row.name,
                row.val_loss,
                True,
            )
            curve = state["curves"][told["i"]]
            points = store.evaluations(row.name)
            assert curve["evaluations"] == [(p["step"], p["train_loss"], p["val_loss"]) for p in points]
            with (studied / row.name / "training.csv").open(encoding="utf-8") as file:
                assert curve["batches"] == [(int(r["step"]), float(r["loss"])) for r in csv.DictReader(file)]
    best = min(rows, key=lambda row: row.val_loss)
    assert [row["id"] for row in state["rows"] if row["place"] == 1] == [best.id]


def test_nothing_is_read_again_where_nothing_changed(studied, monkeypatch):
    monkeypatch.setattr("nanostudy.ui.live.EVERY", 0.0)
    place = Place(1, studied)
    first = place.state()
    monkeypatch.setattr(Store, "rows", None)
    monkeypatch.setattr("nanostudy.ui.live.SHARE", 0)
    assert place.state() is first


def test_a_curve_is_thinned_by_means():
    points = [(step, float(step)) for step in range(1, 1001)]
    few = thinned(points, 100)
    assert len(few) == 100
    assert few[0] == (10, 5.5)
    assert np.mean([loss for _, loss in few]) == pytest.approx(500.5)


def test_only_what_changed_is_sent():
    before = {
        "state": "running",
        "left": 5.0,
        "rows": [{"i": 0, "step": 1}, {"i": 1, "step": 1}],
        "curves": {0: [1], 1: [2]},
    }
    now = {**before, "left": 4.0, "rows": [{"i": 0, "step": 1}, {"i": 1, "step": 2}], "curves": {0: [1], 1: [2, 3]}}
    assert changes(before, now) == {"left": 4.0, "rows": [{"i": 1, "step": 2}], "curves": {1: [2, 3]}}
    assert changes(now, now) == {}


def test_places_are_studies_and_runs_and_new_ones_are_found(studied, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    places = Places()
    assert places.find() == []
    (tmp_path / "studies").mkdir()
    (tmp_path / "studies" / "small").symlink_to(studied)
    (tmp_path / "studies" / "else").mkdir()
    assert [(place.number, place.path.name) for place in places.find()] == [(1, "small")]
    assert places[1].brief()["total"] == 8
    one_run = sorted(path for path in studied.iterdir() if (path / "run.json").is_file())[0]
    [run] = Places([one_run]).places
    assert run.state()["kind"] == "run"
    assert run.brief()["state"] == "finished"


def test_torch_is_imported_at_the_first_prompt(studied):
    code = (
        "import sys; from pathlib import Path\n"
        "from nanostudy.ui.serve import make; from nanostudy.ui.live import Place\n"
        f"make([Path({str(studied)!r})], port=0); state = Place(1, Path({str(studied)!r})).state()\n"
        "print([name for name in ('torch', 'pandas', 'altair') if name in sys.modules])\n"
        f"from nanostudy.ui.reports import effects_so_far, live; live(state)\n"
        f"print(effects_so_far(Path({str(studied)!r}))['finished'], 'torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split("\n")[:2] == ["[]", "8 False"]


# --- the playground


def request(**content) -> Request:
    return Request.of({"experiments": [1, 2, 3, 4], "prompt": "the ", "length": 30, **content})


def written(studied, asked: Request) -> tuple[dict[int, str], dict[int, list[float]], list[dict]]:
    """By experiment: its text and the surprises; and all lines."""
    rows = {row["id"]: row["name"] for row in Place(1, studied).state()["rows"]}
    lines = list(Playground().write(asked, {number: studied / name for number, name in rows.items()}))
    stacks = [line["experiments"] for line in lines if "experiments" in line]
    texts, surprises = dict.fromkeys(asked.experiments, ""), {number: [] for number in asked.experiments}
    for line in lines:
        for number, piece, surprise in (
            zip(stacks[line["stack"]], line["pieces"], line["surprises"], strict=True) if "stack" in line else ()
        ):
            texts[number] += piece
            surprises[number].append(surprise)
    return texts, surprises, lines


def test_models_write_as_they_do_alone_from_the_same_random_numbers(studied):
    asked = request(seed=7, temperature=0.9, top_k=5)
    texts, surprises, lines = written(studied, asked)
    rows = {row["id"]: row["name"] for row in Place(1, studied).state()["rows"]}
    for number in asked.experiments:
        run = api.load(studied / rows[number], device="cpu")
        [alone] = run.sample("the ", tokens=30, seed=7, temperature=0.9, top_k=5)
        assert "the " + texts[number] == alone
        assert len(surprises[number]) == 30
    order = [line["stack"] for line in lines if "stack" in line]
    assert order[:6] == [0, 1, 0, 1, 0, 1]  # two shapes, in turn: all cards grow together


def test_surprise_is_minus_log_p_of_the_models_own_distribution(studied):
    """By a plain reading of the whole text, without a cache."""
    from nanostudy.model.gpt import forward, named_views

    texts, surprises, lines = written(studied, request(length=3, experiments=[1], temperature=2.0))
    name = Place(1, studied).state()["rows"][0]["name"]
    weights = load_weights(studied / name)
    ids = weights.tokenizer.encode("the " + texts[1])
    logits = forward(named_views(weights.params, weights.config), torch.from_numpy(ids)[None, None], weights.config)[
        0, 0
    ]
    expected = [-float(logits[t - 1].float().log_softmax(-1)[ids[t]]) for t in range(1, len(ids))]
    [of_prompt] = [line["prompt"][0] for line in lines if "prompt" in line]
    assert of_prompt[0] is None
    assert [*of_prompt[1:], *surprises[1]] == pytest.approx(expected, abs=0.006)


def test_a_closed_connection_stops_the_writing(studied, monkeypatch):
    steps = []
    step = server_module.Playground.write

    def counted(self, asked, folders):
        for line in step(self, asked, folders):
            steps.append(line)
            time.sleep(0.002)
            yield line
        steps.append("all")

    monkeypatch.setattr(server_module.Playground, "write", counted)
    with serving(studied) as ui:
        connection = http.client.HTTPConnection("127.0.0.1", ui.port)
        body = json.dumps({"experiments": [1, 2], "length": 2000})
        headers = {"Cookie": ui.cookie, "Origin": ui.root, "Content-Type": "application/json"}
        connection.request("POST", "/api/1/sample", body, headers)
        answer = connection.getresponse()
        answer.readline()
        answer.close()
        connection.close()
        time.sleep(0.5)
        after = len(steps)
        time.sleep(0.3)
        assert len(steps) == after < 2000
        assert "all" not in steps


def test_a_shared_page_has_texts_that_were_written_here_alone(studied):
    with serving(studied) as ui:
        _, _, body = ui.post("/api/1/sample", {"experiments": [1, 8], "prompt": "the sea", "length": 12})
        numbers = json.loads(body.splitlines()[0])["texts"]
        status, headers, page = ui.post("/api/1/share", {"texts": list(numbers.values())})
        assert status == 200
        assert headers["content-disposition"].startswith("attachment")
        data = json.loads(page.decode().split('id="data">')[1].split("</script>")[0])
        first = [
            dict(zip(data["tables"]["samples"]["columns"], row, strict=True))
            for row in data["tables"]["samples"]["rows"][:2]
        ]
        assert [(one["i"], one["prompt"], len(one["text"])) for one in first] == [
            (0, "the sea", 19),
            (7, "the sea", 19),
        ]
        assert data["first"] == [0, 7]
        assert ui.post("/api/1/share", {"texts": [99]})[0] == 400
        assert ui.post("/api/1/share", {"texts": ["<script>"]})[0] == 400


def test_a_blind_comparison_tells_nothing_before_its_answer_and_counts_once(studied):
    with serving(studied) as ui:
        rows = {row["id"]: row for row in Place(1, studied).state()["rows"]}
        for answered in range(1, 4):
            _, _, body = ui.post("/api/1/compare", {"experiments": [1, 2, 3], "length": 5})
            lines = [json.loads(line) for line in body.splitlines()]
            assert {key for line in lines for key in line} == {
                "comparison",
                "experiments",
                "prompt",
                "stack",
                "pieces",
                "surprises",
                "end",
            }
            assert sorted(side for line in lines for side in line.get("experiments", ())) == ["left", "right"]
            key = lines[0]["comparison"]
            status, _, body = ui.post("/api/1/answer", {"comparison": key, "better": "left"})
            told = json.loads(body)
            assert status == 200
            assert {told["left"], told["right"]} < {1, 2, 3}
            assert told["tally"]["answers"] == answered
            lower = rows[told["left"]]["val_loss"] < rows[told["right"]]["val_loss"]
            assert told["tally"]["lower_loss"]["better"] >= lower
            assert ui.post("/api/1/answer", {"comparison": key, "better": "left"})[0] == 400
        assert ui.json("/api/1/tally")["lower_loss"]["of"] == 3
        assert ui.post("/api/1/compare", {"experiments": [1], "length": 5})[0] == 400


# --- beside a study that runs


def test_a_study_with_the_ui_has_the_same_bits(studied, tmp_path):
    """Watched all the time, and prompted while it runs."""
    watched = threading.Event()
    states = []

    def watch() -> None:
        with serving(begin=tmp_path / "small") as ui:
            while not watched.is_set():
                for line in (ui.get("/api/places")[2], ui.get("/api/1/report")[2]):
                    states.append(json.loads(line))
                if (tmp_path / "small" / FILE).exists():
                    ui.post("/api/1/sample", {"experiments": [1], "length": 5})

    thread = threading.Thread(target=watch)
    thread.start()
    try:
        api.run_study(
            studied.parent / "small.yaml", tmp_path / "small", executor="inline", resources=RESOURCES, listener=Silent()
        )
    finally:
        watched.set()
        thread.join(30)
    assert states
    for name in (row["name"] for row in Place(1, studied).state()["rows"]):
        for which in ("best", "last"):
            a, b = (load_weights(folder / name, which) for folder in (tmp_path / "small", studied))
            assert torch.equal(a.params, b.params)
        assert _losses(tmp_path / "small" / name) == _losses(studied / name)
        assert (tmp_path / "small" / name / "sample.txt").read_bytes() == (studied / name / "sample.txt").read_bytes()


def _losses(run: Path) -> list[tuple[str, str]]:
    with (run / "training.csv").open(encoding="utf-8") as file:
        return [(row["step"], row["loss"]) for row in csv.DictReader(file)]


def test_beside_a_study_a_process_of_its_own_serves_as_long(tmp_path):
    with beside(tmp_path / "small") as address:
        port = urlsplit(address).port
        connection = http.client.HTTPConnection("127.0.0.1", port)
        connection.request("GET", f"/?{urlsplit(address).query}")
        assert connection.getresponse().status == 303
        connection.close()
    with pytest.raises(ConnectionRefusedError), socket.create_connection(("127.0.0.1", port), timeout=5):
        pass


def test_a_training_that_goes_on_is_running_and_one_that_was_left_is_not(studied, tmp_path):
    name = Place(1, studied).state()["rows"][0]["name"]
    run = shutil.copytree(studied / name, tmp_path / "run")
    metadata = json.loads((run / "run.json").read_text(encoding="utf-8"))
    left = ("sha256", "checksums", "final", "updates", "skipped_updates", "tokens", "seconds", "context_losses")
    write_metadata(run, {key: value for key, value in metadata.items() if key not in left} | {"status": "unfinished"})
    [place] = Places([run]).places
    state = place.state()
    assert (state["state"], state["kind"], state["rows"][0]["status"]) == ("running", "run", "running")
    assert state["rows"][0]["loss"] == state["curves"][0]["batches"][-1][1]
    for file in run.iterdir():
        os.utime(file, (0, 0))
    assert Place(1, run).state()["state"] == "unfinished"
