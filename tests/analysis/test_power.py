"""How many seeds tell settings apart: power against statsmodels, variances by simulation."""

import math

import numpy as np
import pytest
from scipy import stats
from statsmodels.stats.power import TTestIndPower, TTestPower
from synthetic import synthetic, with_losses

from nanostudy.analysis.power import MOST_SEEDS, moderated, power, sd_interval, seeds, seeds_needed
from nanostudy.reporting.next_steps import decision, seeds_lines, seeds_record

GRID = {"n_layer": [1, 2, 4], "dropout": [0.0, 0.1, 0.2]}


@pytest.mark.parametrize("effect", [0.02, 0.3, 0.8, 1.5, 4.0])
@pytest.mark.parametrize("n", [2, 5, 30])
def test_power_is_that_of_statsmodels(effect, n):
    paired = TTestPower().power(effect, n, 0.05)
    assert power(n, effect, 1.0) == pytest.approx(paired, abs=1e-6)
    unpaired = TTestIndPower().power(effect, n, 0.05)
    assert power(n, effect, math.sqrt(2), df=2 * (n - 1)) == pytest.approx(unpaired, abs=1e-6)


@pytest.mark.parametrize("effect", [0.1, 0.5, 1.0, 2.5])
def test_seeds_needed_are_those_of_statsmodels(effect):
    assert seeds_needed(effect, 1.0) == max(2, math.ceil(TTestPower().solve_power(effect, None, 0.05, 0.8)))
    independent = math.ceil(TTestIndPower().solve_power(effect, None, 0.05, 0.8))
    assert seeds_needed(effect, math.sqrt(2), 2.0) == max(2, independent)


def test_the_promised_power_is_kept():
    n = seeds_needed(0.01, 0.015)
    draws = np.random.default_rng(1).normal(0.01, 0.015, (20_000, n))
    t = draws.mean(axis=1) / (draws.std(axis=1, ddof=1) / math.sqrt(n))
    found = np.mean(np.abs(t) > stats.t.ppf(0.975, n - 1))
    assert found == pytest.approx(power(n, 0.01, 0.015), abs=0.01)
    assert power(n - 1, 0.01, 0.015) < 0.8 <= power(n, 0.01, 0.015)


def test_far_out_where_the_series_ends_power_is_one():
    assert power(400, 1.5, 1.0) == power(30, 20.0, 1.0) == 1.0
    assert power(10**6, 0.0, 1.0) == pytest.approx(0.05)


def test_seeds_have_bounds():
    assert seeds_needed(0.01, 0.0) == 2
    assert seeds_needed(0.01, 1e6) == MOST_SEEDS
    assert sd_interval(1.0, 0) == (0.0, math.inf)
    low, high = sd_interval(1.0, 10)
    assert (low, high) == pytest.approx((math.sqrt(10 / 20.4832), math.sqrt(10 / 3.24697)), rel=1e-4)


def test_equal_variances_are_pooled_and_unequal_ones_kept_apart():
    random, df = np.random.default_rng(3), np.full(200, 2.0)
    drawn, more = moderated(random.chisquare(2, 200) / 2, df)
    assert drawn == pytest.approx(1, abs=0.2)
    assert (more >= 20).all()
    true = np.where(np.arange(200) < 100, 1.0, 400.0)
    drawn, more = moderated(true * random.chisquare(2, 200) / 2, df)
    assert np.median(drawn[:100]) < 10 < 100 < np.median(drawn[100:])
    assert (more < 4).all()


def test_few_variances_stay_as_they_are():
    variances, df = np.array([1.0, 4.0]), np.array([3.0, 3.0])
    assert moderated(variances, df)[0] is variances


def test_moderated_variances_are_nearer_to_the_truth():
    """With degrees of freedom of 3 and true variances that scatter: the mean squared error of their logarithms."""
    random = np.random.default_rng(5)
    true = 8 / random.chisquare(8, 2000)
    own = true * random.chisquare(3, 2000) / 3
    drawn, df = moderated(own, np.full(2000, 3.0))
    assert df[0] - 3 == pytest.approx(8, abs=2)  # the planted prior
    assert np.mean(np.log(drawn / true) ** 2) < 0.5 * np.mean(np.log(own / true) ** 2)


def test_the_ends_of_the_counts_hold_the_true_number_at_their_rate():
    """Paired seeds of one setting against the best, of a study with seeds that interact with nothing."""
    true = seeds_needed(0.01, 0.01 * math.sqrt(2))
    inside = []
    for draw in range(60):
        results = synthetic(
            GRID, lambda s: 2 + 0.1 * s["dropout"], seeds=(1, 2, 3), noise=0.01, block_noise=0.02, draw=draw
        )
        row = seeds(results).table.iloc[-1]
        inside.append(row["paired_low"] <= true <= row["paired_high"])
    assert np.mean(inside) >= 0.95 - 3 * math.sqrt(0.95 * 0.05 / 60)


def test_what_seeds_share_counts_only_where_they_are_not_paired():
    quiet = seeds(synthetic(GRID, seeds=(1, 2, 3, 4), noise=0.01, draw=1)).table
    loud = seeds(synthetic(GRID, seeds=(1, 2, 3, 4), noise=0.01, block_noise=0.1, draw=1)).table
    assert list(loud["paired"]) == list(quiet["paired"])
    assert (loud["unpaired"] > 10 * quiet["unpaired"]).all()


def test_the_decision_is_between_the_two_best():
    results = synthetic({"dropout": [0.0, 0.1, 0.5]}, lambda s: 2 + s["dropout"], seeds=(1, 2, 3), noise=0.1, draw=2)
    found = seeds(results)
    text = decision(found)
    assert text.startswith("To decide between ")
    row = found.table[found.table["tied"]].iloc[0]
    assert f"{int(row['paired']) - 3:,} more seeds, about " in text
    assert "since 3 seeds leave the noise uncertain" in text
    record = seeds_record(found)
    assert record["decision"] == text
    assert [one["settings"] for one in record["settings"]] == list(found.table["settings"])
    assert any(text in line for line in seeds_lines(found))


def test_the_price_is_a_workers_time_for_both(monkeypatch):
    monkeypatch.setattr("nanostudy.study.pool.available_cores", lambda: 4)
    results = synthetic({"dropout": [0.0, 0.1]}, seeds=(1, 2), noise=0.1, draw=2)
    results.experiments["seconds"], results.experiments["members"] = 60.0, 2  # two share a worker
    found = seeds(results)
    assert list(found.table["seconds"]) == [60.0]
    more = int(found.table["paired"].iloc[0]) - 2
    minutes, rest = divmod(more * 60 // 4, 60)
    assert f"about {minutes // 60:,} h {minutes % 60:02d} min" in decision(
        found
    ) or f"about {minutes} min {rest:02d} s" in decision(found)


def test_without_two_seeds_nothing_is_counted():
    assert "No setting ran with two seeds" in decision(seeds(synthetic(GRID, noise=0.1)))
    assert "one setting" in decision(seeds(synthetic({}, seeds=(1, 2, 3), noise=0.1)))
    assert "No experiment has finished" in decision(seeds(synthetic(GRID, waiting=range(1, 10))))
    apart = synthetic({"dropout": [0.0, 0.1]}, lambda s: 2 + s["dropout"], seeds=(1, 2, 3), noise=1e-4)
    assert "no more seeds are needed" in decision(seeds(apart))
    other = synthetic({"dropout": [0.0, 0.1]}, seeds=None)
    assert "No setting ran with two seeds" in decision(seeds(with_losses(other, [2.0, 2.1])))
