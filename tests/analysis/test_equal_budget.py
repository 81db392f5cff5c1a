"""Rankings at equal budgets, and Pareto fronts."""

import math
from dataclasses import replace

import numpy as np
import pytest
from scipy import stats
from synthetic import synthetic, with_curves

from nanostudy.analysis.equal_budget import equal_budget, pareto
from nanostudy.analysis.ranking import RANKING
from nanostudy.errors import UsageError


def test_equal_updates_and_tokens_and_time():
    results = with_curves(
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
    found = equal_budget(results, "updates").set_index("name")
    assert set(found["at"]) == {100}
    assert found.loc[short, "value"] == 3.0
    assert found.loc[long, "value"] == pytest.approx(3.2 - 1.2 * 20 / 120)
    assert list(found.loc[[short, long], "interpolated"]) == [False, True]
    found = equal_budget(results, "tokens").set_index("name")
    assert found.loc[long, "value"] == pytest.approx(4.2 - 1.0 * 1000 / 1600)
    found = equal_budget(results, "time")
    assert list(found["name"]) == [short, long]
    assert found["at"].tolist() == [11, 11]
    assert found["value"].iloc[1] == pytest.approx(3.2 - 1.2 * 1 / 12)
    assert "1 experiment trained longer" in found.attrs["explanation"]
    assert "like for like" not in found.attrs["explanation"]


def test_equal_arithmetic_counts_operations():
    results = synthetic({"n_embd": [64, 128]}, lambda s: 2.0, curves=True, max_iters=1000)
    found = equal_budget(results, "arithmetic").set_index("name")
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
    found = equal_budget(results, "context")
    assert list(found["value"]) == [2.2, 2.3]
    assert set(found["at"]) == {64}
    assert "own contexts are 64, 128" in found.attrs["explanation"]


def test_times_of_different_machines_do_not_compare():
    results = synthetic({"dropout": [0.0, 0.2]}, curves=True)
    results.experiments["device"] = ["cpu", "cuda"]
    assert "device (cpu, cuda)" in equal_budget(results, "time").attrs["explanation"]
    assert "device (cpu, cuda)" in pareto(results, "seconds").attrs["explanation"]
    assert pareto(results, "flops").attrs["explanation"] == ""


@pytest.mark.parametrize("at", ["context", "updates", "tokens", "arithmetic", "time"])
def test_nothing_to_compare(at):
    for results in (synthetic({}, waiting=(1,)), synthetic({})):
        found = equal_budget(results, at)
        assert len(found) == 0
        assert list(found) == [*RANKING, "at", "interpolated"]
        assert found.attrs["explanation"]


def test_experiments_without_a_curve_are_counted():
    results = synthetic({"dropout": [0.0, 0.2]}, curves=True)
    only = results.evaluations[results.evaluations["name"] == results.experiments.index[0]]
    found = equal_budget(replace(results, evaluations=only), "updates")
    assert len(found) == 1
    assert "1 experiment without a curve" in found.attrs["explanation"]


def test_unknown_comparison():
    with pytest.raises(UsageError, match="equal 'money'"):
        equal_budget(synthetic({}), "money")


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
    results = synthetic({"dropout": np.linspace(0, 0.5, 20).tolist(), "n_layer": [2, 4]})
    results.experiments["flops"] = draw.integers(1, 8, 40).astype(float)
    results.experiments["val_loss"] = draw.integers(1, 8, 40).astype(float)
    points = list(zip(results.experiments["flops"], results.experiments["val_loss"], strict=True))
    for _, one in pareto(results, "flops").iterrows():
        beaten = any(
            c <= one["cost"] and v <= one["val_loss"] and (c, v) != (one["cost"], one["val_loss"]) for c, v in points
        )
        assert one["on_front"] == (not beaten)


def test_ranks_are_of_means_over_seeds_and_ties_are_marked():
    results = synthetic(
        {"dropout": [0.0, 0.2], "n_embd": [64, 128]}, {"n_embd": -0.3}, seeds=(1, 2, 3), noise=0.01, curves=True
    )
    found = equal_budget(results, "updates")
    best = found[found["tied"]]
    assert set(found["n"]) == {3}
    assert len(best) == 6
    assert set(results.experiments.loc[best["name"], "n_embd"]) == {128}
    assert found["low"].notna().all()


def test_no_difference_is_a_tie_at_its_rate():
    """100 studies without effects, 95% for all together: the truly best is tied in 88 at least (binomial, 1 in 1,000)."""
    misses = 0
    for draw in range(100):
        results = synthetic({"dropout": [0.0, 0.2]}, seeds=(1, 2, 3, 4), noise=0.01, draw=draw, curves=True)
        misses += not equal_budget(results, "tokens")["tied"].all()
    assert misses <= stats.binom.ppf(0.999, 100, 0.05)


def test_what_diverged_with_a_seed_is_on_no_front():
    results = synthetic({"n_embd": [64, 128]}, {"n_embd": -0.3}, seeds=(1, 2), noise=0.001, diverged=(4,), curves=True)
    found = pareto(results, "parameters")
    assert list(found["cell"]) == ["n_embd=64"]
    ranked = equal_budget(results, "updates")
    assert ranked.set_index("name").loc[results.experiments.index[2], "diverged"] == 1


def test_the_front_is_of_means_and_says_what_is_indistinguishable_from_it():
    loss = lambda s: {64: 2.0, 128: 1.8, 256: 1.805, 512: 2.3}[s["n_embd"]]  # noqa: E731
    results = synthetic({"n_embd": [64, 128, 256, 512]}, loss, seeds=(1, 2, 3, 4), noise=0.01, draw=2)
    found = pareto(results, "parameters").set_index("cell")
    assert list(found["n"]) == [4] * 4
    assert bool(found.loc["n_embd=64", "on_front"])
    assert bool(found.loc["n_embd=128", "on_front"])
    assert bool(found.loc["n_embd=256", ["on_front", "near_front"]].any())  # 0.005 is within the noise
    assert not found.loc["n_embd=512", ["on_front", "near_front"]].any()
    assert found.loc["n_embd=128", "val_loss"] == pytest.approx(1.8, abs=0.02)
