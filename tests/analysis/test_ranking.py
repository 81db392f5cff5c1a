"""Rankings and what cannot be told apart, fair comparisons, Pareto fronts, and what curves show."""

import math

import numpy as np
import pandas as pd
import pytest
from scipy import stats
from synthetic import synthetic

from nanostudy.analysis import curves as curve
from nanostudy.analysis.effects import effects
from nanostudy.analysis.equal_budget import fair
from nanostudy.analysis.frames import joined
from nanostudy.analysis.ranking import (
    convergence,
    critical_value,
    overfitting,
    pareto,
    ranking,
    stability,
    top_indistinguishable,
)
from nanostudy.errors import UsageError

TWO = {"n_layer": [2, 4], "n_head": [1, 2], "n_embd": [64, 128], "dropout": [0.0, 0.2]}


def changed(results, **tables):
    from dataclasses import replace

    return replace(results, **tables)


# --- ranking


def test_ranking_is_by_the_experiments_own_value():
    results = synthetic(TWO, {"n_layer": 0.2}, noise=0.05)
    found = ranking(results)
    assert list(found.index) == list(range(1, 17))
    assert list(found["value"]) == sorted(results.experiments["val_loss"])
    assert dict(zip(found["name"], found["value"], strict=True)) == results.experiments["val_loss"].to_dict()
    noise = effects(results)
    assert noise.method == "higher-order"
    assert found["se"].to_numpy() == pytest.approx(noise.noise)
    margin = stats.t.ppf(0.975, 5) * noise.noise
    assert (found["high"] - found["value"]).to_numpy() == pytest.approx(margin)
    assert "three and more factors" in found.attrs["basis"]
    assert "finite validation text" in found.attrs["basis"]


def test_seeds_of_one_cell_are_judged_together():
    """Two cells with means 2.0 and 2.1, noise within pairs known."""
    results = synthetic({"dropout": [0.0, 0.2]}, seeds=(1, 2, 3))
    results.experiments["val_loss"] = [2.1, 2.0, 1.9, 2.22, 2.1, 1.98]
    found = ranking(results)
    assert list(found["value"]) == [1.9, 1.98, 2.0, 2.1, 2.1, 2.22]
    assert list(found["mean"]) == pytest.approx([2.0, 2.1, 2.0, 2.0, 2.1, 2.1])
    assert set(found["n"]) == {3}
    # by hand: differences 0.12, 0.1, 0.08 have variance 0.0004, twice that of one experiment beside its block
    assert found["se"].to_numpy() == pytest.approx(math.sqrt(0.0002 / 3))
    # 0.1 against t(0.95, 2) * sqrt(0.0004 / 3) = 2.92 * 0.01155: the second cell is out
    assert list(found["tied"]) == [True, False, True, True, False, False]
    assert (found.attrs["cells"], found.attrs["tied_cells"]) == (2, 1)
    results.experiments["val_loss"] = [2.1, 2.0, 1.9, 2.32, 2.1, 1.88]
    assert top_indistinguishable(results) == 6


def test_what_seeds_share_ties_nothing():
    quiet = ranking(synthetic(TWO, {"n_layer": 0.2, "dropout": 0.1}, seeds=(1, 2), noise=0.01, draw=4))
    shifted = synthetic(TWO, {"n_layer": 0.2, "dropout": 0.1}, seeds=(1, 2), noise=0.01, draw=4)
    shifted.experiments["val_loss"] += shifted.experiments["seed"].astype(float)
    loud = ranking(shifted)
    assert loud.attrs["tied_cells"] == quiet.attrs["tied_cells"] < 8
    assert dict(zip(loud["name"], loud["tied"], strict=True)) == dict(zip(quiet["name"], quiet["tied"], strict=True))


def test_unbalanced_blocks_are_made_up_for():
    """The seed that one cell lacks was the good one: its mean is not held against it."""
    results = synthetic({"n_layer": [2, 4, 6], "dropout": [0.0, 0.2]}, seeds=(1, 2), diverged=(1,), noise=0.001)
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


def test_the_best_settings_are_among_the_tied_at_their_rate():
    """Whichever is truly best stays in at least 95% of the time; with all others level with it, in exactly that."""
    kept, repetitions = 0, 400
    factors = {"n_layer": [2, 4], "n_head": [1, 2], "n_embd": [64, 128]}
    for draw in range(repetitions):
        results = synthetic(factors, seeds=(1, 2, 3), noise=0.02, block_noise=0.2, draw=draw)
        found = ranking(results).set_index("name")
        kept += bool(found.loc[results.experiments.index[0], "tied"])
    low, high = stats.binom.ppf([0.0005, 0.9995], repetitions, 0.95)
    assert low <= kept <= high


def test_ranking_by_the_gap():
    results = synthetic(TWO, noise=0.01)
    results.experiments["gap"] = np.linspace(0.5, 0.1, 16)
    found = ranking(results, "gap")
    assert list(found["name"]) == list(reversed(results.experiments.index))


def test_no_noise_estimate_ties_all_and_says_so():
    results = synthetic({"dropout": [0.0, 0.2], "n_layer": [2, 4]}, {"dropout": 0.1})
    found = ranking(results)
    assert found["tied"].all()
    assert found["se"].isna().all()
    assert "nothing can be told apart" in found.attrs["basis"]


def test_nothing_and_one_to_rank():
    assert len(ranking(synthetic({}, waiting=(1,)))) == 0
    assert top_indistinguishable(synthetic({}, waiting=(1,))) == 0
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
    assert ranking(results)["se"].iloc[0] == pytest.approx(0.1, rel=0.3)


# --- fair comparisons


def curves(results, rows):
    """The results with these evaluations: (number of the experiment, step, tokens, seconds, loss)."""
    names = list(results.experiments.index)
    table = pd.DataFrame(
        [(names[i], step, tokens, seconds, loss, loss) for i, step, tokens, seconds, loss in rows],
        columns=["name", "step", "tokens", "seconds", "train_loss", "val_loss"],
    )
    return changed(results, evaluations=table)


def test_equal_updates_and_tokens_and_time():
    results = curves(
        synthetic({"max_iters": [100, 200]}),
        [
            (0, 0, 0, 1, 4.0),
            (0, 100, 1000, 11, 3.0),
            (1, 0, 0, 2, 4.2),
            (1, 80, 1600, 10, 3.2),
            (1, 200, 4000, 22, 2.0),
        ],
    )
    short, long = results.experiments.index
    found = fair(results, "updates").set_index("name")
    assert set(found["at"]) == {100}
    assert found.loc[short, "value"] == 3.0
    assert found.loc[long, "value"] == pytest.approx(3.2 - 1.2 * 20 / 120)
    assert list(found.loc[[short, long], "interpolated"]) == [False, True]
    found = fair(results, "tokens").set_index("name")
    assert found.loc[long, "value"] == pytest.approx(4.2 - 1.0 * 1000 / 1600)
    found = fair(results, "time")
    assert list(found["name"]) == [short, long]
    assert found["at"].tolist() == [11, 11]
    assert found["value"].iloc[1] == pytest.approx(3.2 - 1.2 * 1 / 12)
    assert "1 experiment went on" in found.attrs["explanation"]
    assert "like for like" not in found.attrs["explanation"]


def test_equal_arithmetic_counts_operations():
    results = synthetic({"n_embd": [64, 128]}, lambda s: 2.0, curves=True, max_iters=1000)
    found = fair(results, "arithmetic").set_index("name")
    small, large = results.experiments.index
    flops = results.experiments["flops"]
    assert set(found["at"]) == {flops[small]}
    share = flops[small] / flops[large]
    assert found.loc[large, "value"] == pytest.approx((1 - share) * math.log(65) + share * 2.0)
    assert found.loc[small, "value"] == pytest.approx(2.0)


def test_equal_context_is_the_longest_that_all_have():
    results = synthetic({"block_size": [64, 128]})
    results.experiments["val_loss_at_32"] = [2.5, 2.6]
    results.experiments["val_loss_at_64"] = [2.3, 2.2]
    results.experiments["val_loss_at_128"] = [math.nan, 2.0]
    found = fair(results, "context")
    assert list(found["value"]) == [2.2, 2.3]
    assert set(found["at"]) == {64}
    assert "own contexts are 64, 128" in found.attrs["explanation"]


def test_times_of_different_machines_are_said_not_to_compare():
    results = synthetic({"dropout": [0.0, 0.2]}, curves=True)
    results.experiments["device"] = ["cpu", "cuda"]
    assert "device cpu, cuda" in fair(results, "time").attrs["explanation"]
    assert "device cpu, cuda" in pareto(results, "seconds").attrs["explanation"]
    assert pareto(results, "flops").attrs["explanation"] == ""


@pytest.mark.parametrize("at", ["context", "updates", "tokens", "arithmetic", "time"])
def test_nothing_to_compare(at):
    for results in (synthetic({}, waiting=(1,)), synthetic({})):
        found = fair(results, at)
        assert len(found) == 0
        assert list(found) == ["name", "value", "at", "interpolated"]
        assert found.attrs["explanation"]


def test_experiments_without_a_curve_are_counted():
    results = synthetic({"dropout": [0.0, 0.2]}, curves=True)
    only = results.evaluations[results.evaluations["name"] == results.experiments.index[0]]
    found = fair(changed(results, evaluations=only), "updates")
    assert len(found) == 1
    assert "1 experiment without a curve" in found.attrs["explanation"]


def test_unknown_comparison():
    with pytest.raises(UsageError, match="equal 'money'"):
        fair(synthetic({}), "money")


# --- Pareto fronts


def test_pareto_front():
    results = synthetic({"dropout": [0.0, 0.1, 0.2], "n_layer": [2, 4]})
    results.experiments["parameters"] = [1.0, 1.0, 2.0, 2.0, 3.0, 3.0]
    results.experiments["val_loss"] = [3.0, 3.0, 3.5, 2.5, 2.5, 2.4]
    found = pareto(results, "parameters")
    assert list(found["cost"]) == [1, 1, 2, 2, 3, 3]
    assert list(found["val_loss"]) == [3.0, 3.0, 2.5, 3.5, 2.4, 2.5]
    assert list(found["on_front"]) == [True, True, True, False, True, False]


def test_pareto_front_by_definition():
    draw = np.random.default_rng(1)
    results = synthetic({"dropout": np.linspace(0, 0.5, 40).tolist()})
    results.experiments["flops"] = draw.integers(1, 8, 40).astype(float)
    results.experiments["val_loss"] = draw.integers(1, 8, 40).astype(float)
    points = list(zip(results.experiments["flops"], results.experiments["val_loss"], strict=True))
    for _, one in pareto(results, "flops").iterrows():
        beaten = any(
            c <= one["cost"] and v <= one["val_loss"] and (c, v) != (one["cost"], one["val_loss"]) for c, v in points
        )
        assert one["on_front"] == (not beaten)


# --- curves


def test_overfitting():
    rows = [(0, 0, 0, 0, 4.0), (0, 10, 0, 0, 2.0), (0, 20, 0, 0, 2.5), (1, 0, 0, 0, 4.0), (1, 10, 0, 0, 3.0)]
    results = curves(synthetic({"dropout": [0.0, 0.1, 0.2]}), rows)
    results.evaluations["train_loss"] = [4.0, 2.0, 1.5, 4.0, 3.0]
    found = overfitting(results).set_index("name")
    first, second, third = results.experiments.index
    assert tuple(found.loc[first, ["best_step", "last_step", "rise"]]) == (10, 20, 0.5)
    assert list(found["overfits"])[:2] == [True, False]
    assert found.loc[second, "rise"] == 0
    assert pd.isna(found.loc[third, "overfits"])


def test_stability_counts_spikes_and_divergence():
    results = synthetic({"dropout": [0.0, 0.1, 0.2]}, diverged=(2,), waiting=(3,))
    name = results.experiments.index[0]
    norms = [1.0] * 20 + [50.0] + [1.0] * 5
    log = [(name, 10 * i, 2.0, 1e-3, norm, 1.0) for i, norm in enumerate(norms)]
    columns = ["name", "step", "loss", "learning_rate", "grad_norm", "tokens_per_second"]
    found = stability(changed(results, training=pd.DataFrame(log, columns=columns)))
    assert list(found["name"]) == list(results.experiments.index[:2])
    assert (found["largest_norm"].iloc[0], found["median_norm"].iloc[0], found["spikes"].iloc[0]) == (50.0, 1.0, 1)
    assert list(found["diverged"]) == [False, True]
    assert pd.isna(found["spikes"].iloc[1])


def test_convergence_is_that_of_the_single_report():
    flat = [(0, step, 0, 0, 2 + 2 * math.exp(-step / 50)) for step in range(0, 1001, 100)]
    falling = [(1, step, 0, 0, 4 - step / 1000) for step in range(0, 1001, 100)]
    results = curves(synthetic({"dropout": [0.0, 0.1, 0.2]}), [*flat, *falling, (2, 0, 0, 0, 4.0)])
    found = convergence(results)
    rows = results.evaluations[results.evaluations["name"] == results.experiments.index[0]].to_dict("records")
    assert found["plateau"].iloc[0] == curve.plateau(rows) == 300
    assert found["plateau"].iloc[1:].isna().all()
    assert list(found["reason"])[1:] == ["the loss was still falling", "one evaluation is no curve"]


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
    start = time.perf_counter()
    assert len(ranking(results)) == 2048
    assert pareto(results)["on_front"].any()
    assert time.perf_counter() - start < 5
