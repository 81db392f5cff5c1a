"""The published layout: the table's numbers, configurations that nanoGPT takes as they are, and files that stay whole."""

import csv
import errno
import json
import os
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from conftest import Silent, write_text

from nanostudy import atomic
from nanostudy.api import run_study
from nanostudy.atomic import sole_owner
from nanostudy.errors import NanostudyError
from nanostudy.interop.nanogpt_config import dataset_name
from nanostudy.model.config import GPTConfig, count_parameters
from nanostudy.result import Result, Status
from nanostudy.settings import Experiment, Resources
from nanostudy.study import export as module
from nanostudy.study.export import COLUMNS, config_py, export_published, results_csv, total_params
from nanostudy.study.folder import rebuild
from nanostudy.study.store import FILE, Store
from nanostudy.training.tensors import load_tensors
from nanostudy.training.window_losses import WINDOW_LOSSES

STUDY = """
settings: {{corpus: '{text}', n_layer: 1, n_head: 2, n_embd: 16, block_size: 32, batch_size: 4, max_iters: 4, warmup_iters: 1,
  eval_interval: 2, log_interval: 1}}
parts:
  slow: {{learning_rate: 3.0e-4}}
  fast: {{learning_rate: 0.01}}
grid: {{dropout: [0.0, 0.1]}}
seeds: one per experiment
sample_tokens: 5
"""

# What nanoGPT's train.py (3adf61e) sets before it runs the configuration, with the type that it has there.
TRAIN_PY = {
    **dict.fromkeys(("out_dir", "init_from", "wandb_project", "wandb_run_name", "dataset", "backend", "device"), str),
    **dict.fromkeys(("eval_interval", "log_interval", "eval_iters", "gradient_accumulation_steps", "batch_size"), int),
    **dict.fromkeys(("block_size", "n_layer", "n_head", "n_embd", "max_iters", "warmup_iters", "lr_decay_iters"), int),
    **dict.fromkeys(("dropout", "learning_rate", "weight_decay", "beta1", "beta2", "grad_clip", "min_lr"), float),
    **dict.fromkeys(("eval_only", "always_save_checkpoint", "wandb_log", "bias", "decay_lr", "compile"), bool),
    "dtype": str,
}


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("made")
    text = write_text(folder / "some words.txt")
    (folder / "study.yaml").write_text(STUDY.format(text=text.as_posix()), encoding="utf-8")
    resources = Resources(device="cpu", precision="fp32", threads=1)
    run_study(str(folder / "study.yaml"), folder / "study", executor="inline", resources=resources, listener=Silent())
    return folder / "study"


@pytest.fixture
def study(made, tmp_path) -> Path:
    return Path(shutil.copytree(made, tmp_path / "study"))


def rows(folder: Path) -> list[Result]:
    with Store.read(folder / FILE) as store:
        return store.rows()


def contents(folder: Path) -> dict[str, bytes]:
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def table(folder: Path, part: str) -> list[dict[str, str]]:
    with open(folder / f"nanoGPT_results_{part}" / "results.csv", newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def executed(text: str) -> dict[str, object]:
    names: dict[str, object] = {}
    exec(text, names)
    del names["__builtins__"]
    return names


def row_of(experiment: Experiment, **values) -> Result:
    measures = {"parameters": 0, "train_loss": 1.0, "val_loss": 1.0, **values}
    settings = json.dumps(experiment.as_dict())
    return Result(experiment.name, "", settings, Status.FINISHED, measures, part="all")


# --- the table


def test_the_published_row():
    """Of the published study: its one published row; 65 characters, 128 channels, 4 layers, context 128."""
    shape = {"n_layer": 4, "n_head": 4, "n_embd": 128, "block_size": 128, "batch_size": 8, "max_iters": 1000}
    experiment = Experiment(**shape, dropout=0.1)
    parameters = count_parameters(GPTConfig.of(experiment, 65)).total
    row = row_of(experiment, parameters=parameters, train_loss=2.20184, val_loss=2.23126)
    name = "b128_L4_H4_E128_BS8_MI1000_D10_s1"
    assert results_csv([row]).splitlines() == [
        "Experiment,Train Loss,Val Loss,Loss Gap,Total Params,Config Path",
        f"{name},2.2018,2.2313,0.0295,800000.0,{name}/{name}.py",
    ]


@pytest.mark.parametrize(
    ("train", "val", "shown"),
    [
        (2.0, 2.5, "2.0000,2.5000,0.5000"),
        (2.00004, 2.00006, "2.0000,2.0001,0.0001"),
        (1.5, 1.25, "1.5000,1.2500,-0.2500"),
    ],
)
def test_losses_as_nanogpt_prints_them(train, val, shown):
    """The gap is that of the losses that stand beside it: a hand-run study knows no others."""
    assert f",{shown}," in results_csv([row_of(Experiment(), train_loss=train, val_loss=val)])


@pytest.mark.parametrize("parameters", [2_010_000, 1_130_000, 290_000, 4_740_123, 3_155_000])
def test_total_params_are_whole(parameters):
    experiment = Experiment(n_embd=128, block_size=64)
    shown = total_params(row_of(experiment, parameters=parameters + 64 * 128))
    assert shown == round(shown)
    assert f"{shown / 1e6:.2f}" == f"{parameters / 1e6:.2f}"


# --- the layout


def test_the_published_layout(study, tmp_path):
    to = tmp_path / "published"
    before = contents(study)
    lines = export_published(study, to)
    assert contents(study) == before
    expected = set()
    for part in ("slow", "fast"):
        folder = f"nanoGPT_results_{part}"
        own = [row for row in rows(study) if row.part == part]
        shown = table(to, part)
        assert [tuple(each) for each in shown] == [COLUMNS] * 2
        assert [each["Experiment"] for each in shown] == [row.name for row in own]
        expected.add(f"{folder}/results.csv")
        for row, each in zip(own, shown, strict=True):
            final = json.loads((study / row.name / "run.json").read_text(encoding="utf-8"))
            assert float(each["Train Loss"]) == round(final["final"]["train_loss"], 4)
            assert float(each["Val Loss"]) == round(final["final"]["val_loss"], 4)
            assert float(each["Total Params"]) == round(final["parameters"]["without_positions"], -4)
            name = row.name.replace("=", "-")
            config = (to / folder / each["Config Path"]).read_text(encoding="ascii")
            assert executed(config)["dropout"] == row.experiment.dropout
            files = (
                "run.json",
                "training.csv",
                "evaluations.csv",
                WINDOW_LOSSES,
                "best.safetensors",
                "last.safetensors",
            )
            for file in files:
                assert (to / folder / name / file).read_bytes() == (study / row.name / file).read_bytes()
            sample = to / folder / "samples" / f"{name}.txt"
            assert sample.read_bytes() == (study / row.name / "sample.txt").read_bytes()
            expected |= {f"{folder}/{name}/{file}" for file in (*files, f"{name}.py", "ckpt.pt")}
            checkpoint = torch.load(to / folder / name / "ckpt.pt", weights_only=True)
            last, _ = load_tensors(study / row.name / "last.safetensors")
            assert torch.equal(checkpoint["model"]["transformer.h.0.mlp.c_proj.weight"], last["layer0.mlp_out.weight"])
            assert (checkpoint["iter_num"], checkpoint["optimizer"]["state"]) == (4, {})
            assert checkpoint["config"]["out_dir"] == f"{folder}/{name}"
            expected.add(f"{folder}/samples/{name}.txt")
    assert set(contents(to)) == expected
    assert lines == [
        f"{part}: 2 of 2 experiments   {to / f'nanoGPT_results_{part}' / 'results.csv'}" for part in ("slow", "fast")
    ]


def test_weights_take_no_second_place(study, tmp_path):
    try:
        os.link(study / FILE, tmp_path / "link")
    except OSError:
        pytest.skip("this file system has no hard links")
    export_published(study, tmp_path / "out")
    (weights,) = {p for p in (tmp_path / "out").rglob("last.safetensors") if "D10_s2" in str(p) and "slow" in str(p)}
    weights.unlink()
    weights.write_bytes(b"of an older export")
    export_published(study, tmp_path / "out")
    original = study / rows(study)[1].name / "last.safetensors"
    assert os.path.samefile(weights, original)
    original.unlink()
    assert weights.stat().st_size > 0


def test_where_links_do_not_work_weights_are_copied(study, tmp_path, monkeypatch):
    def fails(source, target, **_):
        raise OSError("no links here")

    monkeypatch.setattr(os, "link", fails)
    export_published(study, tmp_path / "out")
    copies = list((tmp_path / "out").rglob("last.safetensors"))
    assert len(copies) == 4
    assert all(path.stat().st_nlink == 1 for path in copies)


def test_exporting_again_gives_the_same_and_deletes_nothing(study, tmp_path):
    to = tmp_path / "out"
    export_published(study, to)
    before = contents(to)
    mine = to / "nanoGPT_results_slow" / "thesis.txt"
    mine.write_text("mine")
    (to / "nanoGPT_results_slow" / "results.csv").write_text(",".join(COLUMNS) + "\nof an older export")
    for weights in to.rglob("best.safetensors"):
        weights.unlink()
        weights.write_bytes(b"of an older export")
    for _ in range(2):
        export_published(study, to)
        assert contents(to) == {**before, "nanoGPT_results_slow/thesis.txt": b"mine"}
    assert b"older" not in b"".join(contents(study).values())


def test_a_folder_of_something_else_is_left_alone(study, tmp_path):
    """The other part is not written either."""
    mine = tmp_path / "out" / "nanoGPT_results_fast" / "results.csv"
    mine.parent.mkdir(parents=True)
    mine.write_text("thesis,grade\n")
    with pytest.raises(
        NanostudyError, match=r"nanoGPT_results_fast holds other files, and no export. .*nothing was changed"
    ):
        export_published(study, tmp_path / "out")
    assert contents(tmp_path / "out") == {"nanoGPT_results_fast/results.csv": b"thesis,grade\n"}


def test_an_export_appears_whole_or_not_at_all(study, tmp_path, monkeypatch):
    to = tmp_path / "out"
    export_published(study, to)
    (to / "nanoGPT_results_fast" / "notes.txt").write_text("mine")
    before = contents(to)

    def full(trained, path, out_dir):
        raise OSError(errno.ENOSPC, "No space left on device")

    def killed(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(module, "write_ckpt", full)
        with pytest.raises(NanostudyError, match=r"No space is left for .*unchanged"):
            export_published(study, to)
    assert contents(to) == before
    with monkeypatch.context() as patch:  # between the two moves of a part's folder
        move = atomic._move

        def broken_off(source, target):
            return killed() if source.is_dir() and source.name.endswith(f".{os.getpid()}.tmp") else move(source, target)

        patch.setattr(atomic, "_move", broken_off)
        patch.setattr(atomic.shutil, "rmtree", lambda *_, **__: None)
        with pytest.raises(KeyboardInterrupt):
            export_published(study, to)
    assert not (to / "nanoGPT_results_slow").exists()
    export_published(study, to)
    assert contents(to) == before


def test_while_the_study_runs(study, tmp_path, monkeypatch):
    """Another process holds the folder, and drops weights between two looks."""
    copy = module.copy_bounded
    dropped = study / rows(study)[0].name / "best.safetensors"

    def late(source, target, most):
        dropped.unlink(missing_ok=True)
        return copy(source, target, most)

    monkeypatch.setattr(module, "copy_bounded", late)
    with sole_owner(study):
        lines = export_published(study, tmp_path / "out")
    assert len(lines) == 2
    assert len(list((tmp_path / "out").rglob("best.safetensors"))) == 3


def test_what_is_not_finished_is_told(study, tmp_path):
    first, second, third, fourth = rows(study)
    for row in (first, second, third):
        shutil.rmtree(study / row.name)
    rebuild(study, [first.name, second.name, third.name])  # the last alone has a result now
    with Store.open(study / FILE) as store:
        store.failed(first.name, "no luck")
        measures = {"updates": 2, "tokens": 9, "seconds": 1.0}
        store.evaluated(second.name, 2, 9, 1.0, 2.0, 3.0)
        store.finished(replace(second, status=Status.DIVERGED, reason="the loss is nan", measures=measures))
        store.progressed(third.name, 1)
        store.started(third.name, 0, -1, 1, None, {})
    lines = export_published(study, tmp_path / "out")
    assert table(tmp_path / "out", "slow") == []
    assert [each["Experiment"] for each in table(tmp_path / "out", "fast")] == [fourth.name]
    assert [line.split("  ")[0] for line in lines] == [
        "slow: 0 of 2 experiments",
        "fast: 1 of 2 experiments",
        f"failed, so not in the tables: {first.name} (no luck)",
        f"diverged, so not in the tables: {second.name} (the loss is nan)",
        "1 experiment unfinished, so not in the tables",
    ]
    assert [path for path in contents(tmp_path / "out") if "nanoGPT_results_slow" in path] == [
        "nanoGPT_results_slow/results.csv"
    ]


def test_a_lost_run_folder_is_told(study, tmp_path):
    lost = rows(study)[0]
    shutil.rmtree(study / lost.name)
    lines = export_published(study, tmp_path / "out")
    assert f"{lost.name}: run.json, training.csv and evaluations.csv not there, not exported" in lines
    assert table(tmp_path / "out", "slow")[0]["Experiment"] == lost.name


def test_checkpoints_are_where_weights_are_and_fit(study, tmp_path):
    """There is none for weights that were not kept, and none for damaged ones, which is reported."""
    first, second, third, fourth = (study / row.name for row in rows(study))
    for which in ("best", "last"):
        (first / f"{which}.safetensors").unlink()
    (second / "last.safetensors").write_bytes(b"damaged")
    (third / "last.safetensors").unlink()  # the best is left
    lines = export_published(study, tmp_path / "out")
    there = {path.parent.name for path in (tmp_path / "out").rglob("ckpt.pt")}
    assert there == {run.name.replace("=", "-") for run in (third, fourth)}
    assert [second.name in line for line in lines if "ckpt.pt" in line] == [True]
    assert any(second.name in line and "last.safetensors is not what run.json recorded" in line for line in lines)
    assert (
        sum(first.name in line and "is not there. It is not exported." in line for line in lines) == 2
    )  # it keeps all


def test_a_model_that_nanogpt_has_not_is_told(tmp_path):
    text = write_text(tmp_path / "words.txt")
    untied = STUDY.format(text=text.as_posix()).replace("n_layer: 1,", "n_layer: 1, tie_embeddings: false,")
    (tmp_path / "study.yaml").write_text(untied, encoding="utf-8")
    resources = Resources(device="cpu", precision="fp32", threads=1)
    run_study(str(tmp_path / "study.yaml"), tmp_path / "s", executor="inline", resources=resources, listener=Silent())
    lines = export_published(tmp_path / "s", tmp_path / "out")
    assert len([line for line in lines if "no ckpt.pt" in line and "tie_embeddings" in line]) == 4
    assert not list((tmp_path / "out").rglob("ckpt.pt"))


def test_places_that_do_not_do(study, tmp_path):
    (tmp_path / "file").write_text("mine")
    with pytest.raises(NanostudyError, match="could not be written"):
        export_published(study, tmp_path / "file")
    with pytest.raises(NanostudyError, match="There is no study in"):
        export_published(tmp_path, tmp_path / "out")
    assert not (tmp_path / "out").exists()


# --- the configuration

VARIED = [
    Experiment(),
    Experiment(lr_decay_iters=300, min_lr=1e-5 / 3, learning_rate=0.1 + 0.2, dropout=1 / 3, beta2=0.1 * 3, bias=True),
    Experiment(learning_rate=7e-4 / 9, decay_lr=False, grad_clip=0, weight_decay=0, gradient_accumulation_steps=40),
    Experiment(
        max_iters=0, warmup_iters=0, lr_decay_iters=0, min_lr=0.0, n_layer=3, n_head=3, n_embd=33, eval_interval=7
    ),
    Experiment(corpus="dir/my 'text'\n.v2.txt", tokenizer="byte", init_from="runs/\nö", tie_embeddings=False),
]


@pytest.mark.parametrize("experiment", VARIED)
def test_every_assignment_is_the_experiments(experiment):
    text = config_py(row_of(experiment))
    given = executed(text)
    assert {name: type(value) for name, value in given.items()} == {name: TRAIN_PY[name] for name in given}
    ours = {
        **experiment.as_dict(),
        "out_dir": f"nanoGPT_results_all/{experiment.name}",
        "dataset": dataset_name(experiment),
        "always_save_checkpoint": True,
        "compile": False,
    }
    if experiment.lr_decay_iters is None:
        ours["lr_decay_iters"] = experiment.max_iters
    if experiment.min_lr is None:
        ours["min_lr"] = experiment.learning_rate / 10
    assert given == {name: ours[name] for name in given}
    # All that decides a training, but what train.py has no name for; init_from is another thing there.
    assert set(given) == (set(ours) & set(TRAIN_PY)) - {"init_from"}
    assert text.isascii()


def test_what_nanogpt_does_otherwise_is_said():
    plain, other = (config_py(row_of(experiment)) for experiment in (VARIED[0], VARIED[4]))
    for text in (plain, other):
        assert "# seed 1 has no counterpart" in text
        assert "one update more than it says, 2001." in text
    for word in ("tie_embeddings", "init_from", "must hold train.bin"):
        assert word not in plain
        assert word in other
    assert "zero by zero" not in plain
    assert "zero by zero at iteration 2000" in config_py(row_of(Experiment(warmup_iters=2000)))
    assert "zero by zero" not in config_py(row_of(Experiment(warmup_iters=2001)))
    assert "zero by zero" not in config_py(row_of(Experiment(warmup_iters=2001, lr_decay_iters=2001)))  # never reached


@pytest.mark.parametrize(
    ("corpus", "tokenizer", "name"),
    [
        ("shakespeare", "char", "shakespeare_char"),
        ("shakespeare", "byte", "shakespeare_byte"),
        ("playhouse", "char", "playhouse"),
        ("/home/me/My notes (2).txt", "char", "My_notes_2"),
        ("C:\\texts\\drama.v1.txt", "char", "drama_v1"),
        ("../...", "char", "text"),
    ],
)
def test_datasets_are_folders_names(corpus, tokenizer, name):
    assert dataset_name(Experiment(corpus=corpus, tokenizer=tokenizer)) == name


def test_no_path_looks_like_a_setting(study, tmp_path):
    """nanoGPT's configurator takes an argument with = in it for --key=value, and stops."""
    assert any("=" in row.name for row in rows(study))
    export_published(study, tmp_path / "out")
    assert not [path for path in contents(tmp_path / "out") if "=" in path]
    for part in ("slow", "fast"):
        assert all("=" not in each["Config Path"] for each in table(tmp_path / "out", part))
