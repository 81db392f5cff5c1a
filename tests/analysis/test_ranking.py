"""Rankings, and which settings are indistinguishable from the best."""

import math

import numpy as np
import pandas as pd
import pytest
from scipy import stats
from synthetic import REAL, real_deviations, synthetic, with_losses

from nanostudy.analysis.effects import effects
from nanostudy.analysis.frames import joined
from nanostudy.analysis.ranking import critical_value, ranking

TWO = {"n_layer": [2, 4], "n_head": [1, 2], "n_embd": [64, 128], "dropout": [0.0, 0.2]}


# --- ranking


def test_ranking_is_by_the_experiments_own_value():
    results = synthetic(TWO, {"n_layer": 0.2}, noise=0.05, seeds=None)
    found = ranking(results)
    assert list(found.index) == list(range(1, 17))
    assert list(found["value"]) == sorted(results.experiments["val_loss"])
    assert dict(zip(found["name"], found["value"], strict=True)) == results.experiments["val_loss"].to_dict()
    noise = effects(results)
    assert found["se"].to_numpy() == pytest.approx(noise.noise)
    margin = stats.t.ppf(0.975, 5) * noise.noise
    assert (found["high"] - found["value"]).to_numpy() == pytest.approx(margin)
    assert "three and more factors" in found.attrs["basis"]
    assert "leave out the error of a finite text" in found.attrs["basis"]


def test_seeds_of_one_cell_are_judged_together():
    """Two cells with means 2.0 and 2.1, noise within pairs known."""
    results = synthetic({"dropout": [0.0, 0.2]}, seeds=(1, 2, 3))
    results.experiments["val_loss"] = [2.1, 2.0, 1.9, 2.22, 2.1, 1.98]
    found = ranking(results)
    assert list(found["value"]) == [1.9, 1.98, 2.0, 2.1, 2.1, 2.22]
    assert list(found["mean"]) == pytest.approx([2.0, 2.1, 2.0, 2.0, 2.1, 2.1])
    assert set(found["n"]) == {3}
    # by hand: differences 0.12, 0.1, 0.08 have variance 0.0004; each mean is half of them from the mean of both
    assert found["se"].to_numpy() == pytest.approx(math.sqrt(0.0001 / 3))
    # 0.1 against t(0.95, 2) * sqrt(0.0004 / 3) = 2.92 * 0.01155: the second cell is out
    assert list(found["tied"]) == [True, False, True, True, False, False]
    assert (found.attrs["cells"], found.attrs["tied_cells"]) == (2, 1)
    results.experiments["val_loss"] = [2.1, 2.0, 1.9, 2.32, 2.1, 1.88]
    assert ranking(results)["tied"].all()


def test_what_seeds_share_ties_nothing():
    quiet = ranking(synthetic(TWO, {"n_layer": 0.2, "dropout": 0.1}, seeds=(1, 2), noise=0.01, draw=4))
    shifted = synthetic(TWO, {"n_layer": 0.2, "dropout": 0.1}, seeds=(1, 2), noise=0.01, draw=4)
    shifted.experiments["val_loss"] += shifted.experiments["seed"].astype(float)
    loud = ranking(shifted)
    assert loud.attrs["tied_cells"] == quiet.attrs["tied_cells"] < 16
    assert dict(zip(loud["name"], loud["tied"], strict=True)) == dict(zip(quiet["name"], quiet["tied"], strict=True))


def test_unbalanced_blocks_are_made_up_for():
    """The seed that one cell lacks was the good one: its mean is not held against it."""
    results = synthetic({"n_layer": [2, 4, 6], "dropout": [0.0, 0.2]}, seeds=(1, 2), waiting=(1,), noise=0.001)
    results.experiments["val_loss"] += results.experiments["seed"].map({1: 0.0, 2: 1.0}).astype(float)
    found = ranking(results).set_index("name")
    assert found["mean"].to_numpy() == pytest.approx(2.5, abs=0.01)
    assert sorted(found["n"]) == [1, *[2] * 10]


@pytest.mark.parametrize(
    ("others", "df", "published"),
    [
        (1, 5, 2.02),
        (2, 5, 2.44),
        (3, 5, 2.68),
        (2, 10, 2.15),
        (5, 10, 2.56),
        (9, 20, 2.60),
        (3, 60, 2.10),
        (1, math.inf, 1.64),
        (5, math.inf, 2.23),
    ],
)
def test_critical_values(others, df, published):
    """Dunnett (1955), A multiple comparison procedure for comparing several treatments with a control, table 1a, one-sided 95%."""
    assert critical_value(others + 1, df) == pytest.approx(published, abs=0.0051)


def test_critical_value_is_the_multivariate_t():
    shape = np.full((4, 4), 0.5) + 0.5 * np.eye(4)
    known = stats.multivariate_t(shape=shape, df=8, seed=1).cdf(np.full(4, critical_value(5, 8)))
    assert known == pytest.approx(0.95, abs=1e-3)


def test_every_best_setting_is_among_the_tied_at_its_rate():
    """All settings are equally good; their noise is as unequal and correlated as that of real trainings."""
    results, deviations = synthetic(REAL, seeds=(1, 2, 3)), real_deviations()
    draw, repetitions = np.random.default_rng(1), 250
    kept = np.zeros(16)
    for _ in range(repetitions):
        losses = 2 + deviations @ draw.standard_normal((8, 3))
        found = ranking(with_losses(results, losses.ravel())).set_index("name")
        kept += found.loc[results.experiments.index[::3], "tied"].to_numpy()
    assert kept.min() >= stats.binom.ppf(0.0005, repetitions, 0.95)
    assert kept.mean() < repetitions


def test_ranking_by_the_gap():
    results = synthetic(TWO, noise=0.01)
    results.experiments["gap"] = np.linspace(0.5, 0.1, 16)
    found = ranking(results, "gap")
    assert list(found["name"]) == list(reversed(results.experiments.index))


def test_no_noise_estimate_ties_all_and_says_so():
    results = synthetic({"dropout": [0.0, 0.2], "n_layer": [2, 4]}, {"dropout": 0.1}, noise=0.01)
    found = ranking(results)
    assert found["tied"].all()
    assert found["se"].isna().all()
    assert "all settings count as indistinguishable" in found.attrs["basis"]


def test_nothing_and_one_to_rank():
    assert len(ranking(synthetic({}, waiting=(1,)))) == 0
    assert len(ranking(synthetic({}))) == 1


def test_repeats_on_another_machine_have_a_place():
    first = synthetic({"dropout": [0.0, 0.2]}, {"dropout": 0.1}, seeds=(1, 2), noise=0.001)
    again = synthetic({"dropout": [0.0, 0.2]}, {"dropout": 0.1}, seeds=(1, 2), noise=0.001, draw=1)
    found = ranking(joined([first, again]))
    assert len(found) == 8
    assert set(found["n"]) == {2}


def test_seeds_bound_to_factors_count_in_comparisons():
    """Noise between seeds is ten times that within them, and a comparison of experiments of two seeds has both."""
    five = {**TWO, "batch_size": [8, 16]}
    results = synthetic({**five, "learning_rate": [1e-3, 2e-3]}, noise=0.01, draw=1)
    seeds = (np.arange(64) // 2) + 1
    results.experiments["seed"] = pd.Series(seeds, index=results.experiments.index, dtype=object)
    results.experiments["val_loss"] += (0.1 * np.random.default_rng(2).standard_normal(33))[seeds]
    assert ranking(results)["se"].iloc[0] == pytest.approx(0.1, rel=0.4)


def test_settings_of_other_seeds_are_not_compared_where_nothing_shows_what_seeds_do():
    """Width goes with the seed, so that no residual holds the seed's share."""
    three = {name: TWO[name] for name in ("n_layer", "n_head", "n_embd")}
    results = synthetic(three, {"n_embd": -0.5, "n_layer": -0.2}, noise=0.005)
    results.experiments["seed"] = results.experiments["n_embd"].map({64: 1, 128: 9})
    basis = ranking(results).attrs["basis"]
    found = ranking(results).join(results.experiments[["n_embd", "n_layer"]], on="name")
    assert found["low"].isna().all()
    assert found.loc[found["n_embd"] == 64, "tied"].all()
    assert not found.loc[(found["n_embd"] == 128) & (found["n_layer"] == 2), "tied"].any()
    assert "those of other seeds cannot be compared with it" in basis
    own = synthetic(three, {"n_embd": -0.5, "n_layer": -0.2}, noise=0.005, seeds=None)
    assert ranking(own)["low"].notna().all()


def test_two_thousand_experiments():
    import time

    factors = {
        **TWO,
        "batch_size": [8, 16],
        "max_iters": [1000, 2000],
        "learning_rate": [1e-3, 2e-3],
        "block_size": [32, 64],
    }
    results = synthetic(factors, {"n_layer": 0.1}, seeds=range(8), noise=0.01, curves=False)
    start = time.thread_time()
    assert len(ranking(results)) == 2048
    assert time.thread_time() - start < 5
