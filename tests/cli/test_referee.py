"""`study seeds`, `study confirm` and `judge` on real trainings of small models, as people meet them."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
from commands import call
from conftest import Silent, cache_in, write_text
from test_cli import contents

import nanostudy
from nanostudy.analysis.judgement import Verdict
from nanostudy.analysis.results import read_results
from nanostudy.errors import NanostudyError, UsageError
from nanostudy.referee import LOOKS, read_recipe
from nanostudy.study.definition import definitions
from nanostudy.study.store import FILE, Store

STUDY = """\
settings: {corpus: small.txt, n_layer: 1, n_head: 2, n_embd: 16, block_size: 8, batch_size: 4, max_iters: 20, warmup_iters: 2, eval_interval: 20}
grid: {learning_rate: [0.02, 0.019, 0.001]}
seeds: [1, 2, 5]
sample_tokens: 5
"""
RECIPE = "corpus=small.txt n_layer=1 n_head=2 n_embd=16 block_size=8 batch_size=4 max_iters=20 warmup_iters=2 eval_interval=20"
HERE = {"executor": "inline", "device": "cpu", "precision": "fp32", "threads": 1}
INLINE = [word for name, value in HERE.items() for word in (f"--{name}", str(value))]
CONFIRMATION = "studies/mine/confirmation"


def judge(a, b, **options):
    return nanostudy.judge(a, b, listener=Silent(), **HERE, **options)


@pytest.fixture(scope="module")
def prepared(tmp_path_factory) -> Path:
    """A folder with a text and a finished study."""
    folder = tmp_path_factory.mktemp("prepared")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        write_text(folder / "small.txt", 600)
        (folder / "mine.yaml").write_text(STUDY, encoding="utf-8")
        nanostudy.run_study("mine.yaml", listener=Silent(), **HERE)
    return folder


@pytest.fixture
def here(prepared, tmp_path, monkeypatch) -> Path:
    import shutil

    place = tmp_path / "here"
    shutil.copytree(prepared, place)
    monkeypatch.chdir(place)
    monkeypatch.setenv("NANOSTUDY_CACHE", str(cache_in(tmp_path)))
    monkeypatch.delenv("NANOSTUDY_CORPORA", raising=False)
    monkeypatch.setattr("nanostudy.study.pool.CALIBRATION_SECONDS", 0.01)
    return place


# --- seeds


def test_seeds_for_a_person_and_for_a_program(here):
    found = call("study", "seeds", "mine", "--difference", "0.02")
    assert found.code == 0
    assert "80% to tell 0.02 nats per token" in found.out
    record = json.loads(call("study", "seeds", "mine", "--difference", "0.02", "--json").out)
    assert record["decision"] in found.out
    assert record["difference"] == 0.02
    assert len(record["settings"]) == 2
    assert nanostudy.plan_seeds("mine", 0.02).best == record["best"]
    assert call("study", "seeds", "mine", "--difference", "0").code == 2


# --- confirmation


def test_the_best_is_confirmed_on_fresh_seeds_and_the_report_leads_with_it(here, undrawn):
    before = contents(here / "studies/mine")
    plan = call("study", "confirm", "mine", "--seeds", "3", "--dry-run", "--device", "cpu", "--threads", "1")
    assert (plan.code, "seeds 6 to 8" in plan.out, "experiments in" in plan.out) == (0, True, True)
    assert contents(here / "studies/mine") == before
    done = call("study", "confirm", "mine", "--seeds", "3", *INLINE)
    assert done.code == 0
    assert "On 3 fresh seeds learning_rate 0.0" in " ".join(done.out.split())
    with Store.read(Path(CONFIRMATION, FILE)) as store:
        rows = store.rows()
    assert {row.experiment.seed for row in rows} == {6, 7, 8}
    assert {row.experiment.learning_rate for row in rows} == {0.02, 0.019}
    report = call("report", "mine")
    assert report.out.startswith("1  What fresh seeds confirm\n   On 3 fresh seeds")
    again = call("study", "confirm", "mine", "--seeds", "3", *INLINE)  # nothing is trained twice
    assert again.out.splitlines()[-6:] == done.out.splitlines()[-6:]
    more = call("study", "confirm", "mine", "--seeds", "4", *INLINE)
    assert "On 4 fresh seeds" in more.out
    assert len(read_results([CONFIRMATION]).experiments) == 8
    assert len(definitions(Path(CONFIRMATION))) == 2


def test_at_most_so_many_are_confirmed(here):
    found = nanostudy.confirm_study("mine", most=1, seeds=2, listener=Silent(), **HERE)
    assert (found.candidates, found.n, found.tied, found.was_best) == (1, 2, 0, True)


def test_seeds_that_the_study_took_since_are_not_fresh(here):
    nanostudy.confirm_study("mine", most=1, seeds=2, listener=Silent(), **HERE)
    nanostudy.run_study("mine.yaml", settings={"seeds": "1,6"}, listener=Silent(), **HERE)
    with pytest.raises(UsageError, match=r"Seed 6 of .* is in the study itself now"):
        nanostudy.confirm_study("mine", most=1, seeds=2, listener=Silent(), **HERE)


# --- judge


def test_a_change_is_kept_discarded_or_undecided_and_each_has_its_exit_code(here):
    kept = call("judge", f"{RECIPE} learning_rate=0.001", "learning_rate=0.02", "--seeds", "4", *INLINE)
    assert kept.code == 0
    assert "\nKEEP      B is better than A: its loss is " in kept.out
    assert "cost      8 trainings, " in kept.out
    turned = call("judge", f"{RECIPE} learning_rate=0.02", "learning_rate=0.001", "--seeds", "4", *INLINE)
    assert turned.code == 3
    assert "\nDISCARD   B is worse than A: its loss is " in turned.out
    words = ["judge", f"{RECIPE} learning_rate=0.02", "learning_rate=0.019", "--seeds", "2", "--margin", "0", "--json"]
    open_ = call(*words, *INLINE)
    record = json.loads(open_.out)
    assert (open_.code, record["verdict"]) == (4, "UNDECIDED")
    assert record["more_seeds"] > 0
    assert record["more_seconds"] > 0
    assert record["b"].endswith("learning_rate=0.02 learning_rate=0.019")
    assert "[4/4]" in open_.err


def test_the_losses_are_those_of_trainings_alone(here):
    found = judge(RECIPE, {"learning_rate": 0.02}, seeds=2)
    alone = [
        nanostudy.train(
            replace(read_recipe(RECIPE), seed=s),
            f"runs/{s}",
            listen=lambda e: None,
            resources=None,
            device="cpu",
            precision="fp32",
            threads=1,
        )
        for s in (1, 2)
    ]
    losses = [run.metadata["final"]["val_loss"] for run in alone]
    assert found.loss_a == pytest.approx(sum(losses) / 2, abs=1e-5)
    assert found.improvement == pytest.approx(found.loss_a - found.loss_b)


def test_more_seeds_go_on_and_are_a_further_look(here):
    first = judge(RECIPE, "dropout=0.01", seeds=2, margin=0.0)
    assert first.looks == (2,)
    before = contents(Path(first.folder))
    again = judge(RECIPE, "dropout=0.01", seeds=2, margin=0.0)
    assert again == replace(first, seed_seconds=again.seed_seconds)
    for name, content in contents(Path(first.folder)).items():
        if name.endswith(("evaluations.csv", LOOKS)):
            assert before[name] == content
    second = judge(RECIPE, "dropout=0.01", seeds=5, margin=0.0)
    assert (second.looks, second.seeds, second.folder) == ((2, 5), 5, first.folder)
    fewer = judge(RECIPE, "dropout=0.01", seeds=2, margin=0.0)  # what is there is not thrown away
    assert (fewer.looks, fewer.improvement) == ((2, 5), second.improvement)
    assert json.loads(Path(first.folder, LOOKS).read_text()) == [2, 5]
    Path(first.folder, LOOKS).write_text("[5, 2]")
    with pytest.raises(NanostudyError, match=r"looks\.json is damaged"):
        judge(RECIPE, "dropout=0.01", seeds=2, margin=0.0)


def test_while_undecided_it_doubles_the_seeds(here):
    found = judge(RECIPE, "learning_rate=0.00101", seeds=2, most=6, margin=0.0)
    assert found.verdict is not Verdict.UNDECIDED or found.looks == (2, 4, 6)
    assert list(found.looks) == [2, 4, 6][: len(found.looks)]


def test_contexts_that_differ_are_compared_at_the_longest_common_one(here):
    write_text(here / "small.txt", 3000)
    found = judge(RECIPE.replace("block_size=8", "block_size=64"), "block_size=128", seeds=2)
    assert found.measure == "val_loss_at_64"
    with pytest.raises(UsageError, match="at least 32"):
        judge(RECIPE, "block_size=16")


def test_a_recipe_that_diverges_is_not_kept(here):
    found = judge(RECIPE, {"learning_rate": 1e30, "grad_clip": 0.0}, seeds=8)
    assert (found.verdict, found.diverged_a, found.diverged_b) == (Verdict.DISCARD, 0, 8)
    assert "A diverged with 0 of 8 seeds, B with 8" in repr(found)


@pytest.mark.parametrize(
    ("a", "b", "message"),
    [
        (RECIPE, "seed=4", "the same recipe"),
        (RECIPE, "log_interval=5", "the same recipe"),
        (RECIPE, "corpus=playhouse", "different texts"),
        (RECIPE, "tokenizer=byte", "different texts"),
        (RECIPE, "n_layerz=2", "Did you mean n_layer"),
        ("nowhere", "n_layer=2", "no preset, settings file or run folder"),
        (RECIPE, "", "empty"),
        (RECIPE, "'n_layer=2", "No closing quotation"),
    ],
)
def test_recipes_that_cannot_be_compared_are_refused_before_any_training(here, a, b, message):
    with pytest.raises(UsageError, match=message):
        judge(a, b)
    assert not Path("judgements").exists()


def test_recipes_as_people_write_them(here):
    Path("mine settings.yaml").write_text("n_layer: 2\nmax_iters: 7\n", encoding="utf-8")
    base = read_recipe(RECIPE)
    assert read_recipe("n_layer=3", base) == replace(base, n_layer=3)
    assert read_recipe({"n_layer": 3}, base) == replace(base, n_layer=3)
    assert read_recipe("mine settings.yaml").max_iters == 7
    assert read_recipe("'mine settings.yaml' max_iters=9", base).max_iters == 9
    assert read_recipe("quickstart dropout=0.1") == nanostudy.preset("quickstart", dropout=0.1)
    assert read_recipe(base) is base
