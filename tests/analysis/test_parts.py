"""Mean losses of parts: over fixed settings, with the noise between seeds alone."""

import math

import numpy as np
import pytest
from scipy import stats
from synthetic import synthetic, with_losses

from nanostudy.analysis.parts import part_means

FOUR = {"n_embd": [64, 128], "dropout": [0.0, 0.2]}


def halves(results):
    """Each width is a part."""
    results.experiments["part"] = ["narrow" if width == 64 else "wide" for width in results.experiments["n_embd"]]
    return results


def test_settings_that_differ_widen_no_interval():
    """Two settings a whole nat apart, three seeds that both share: t over the seeds' means, 2.45, 2.5 and 2.55."""
    results = halves(synthetic(FOUR, seeds=(1, 2, 3)))
    results.experiments["val_loss"] = [1.95, 2.0, 2.05, 2.95, 3.0, 3.05] * 2
    found = part_means(results).set_index("part").loc["narrow"]
    assert (found["n"], found["cells"], found["mean"], found["best"]) == (6, 2, 2.5, 1.95)
    assert found["high"] - 2.5 == pytest.approx(4.302653 * 0.05 / math.sqrt(3), abs=1e-6)


def test_seeds_of_their_own_are_pooled_within_settings():
    results = halves(synthetic(FOUR, seeds=(1, 2)))
    results.experiments["seed"] = range(1, 9)
    results.experiments["val_loss"] = [1.9, 2.1, 2.9, 3.1] * 2
    found = part_means(results).iloc[0]
    # variance 0.02 of one with 2 degrees of freedom, of the mean of four a quarter of it
    assert found["high"] - found["mean"] == pytest.approx(4.302653 * math.sqrt(0.02 / 4), abs=1e-6)


def test_one_seed_has_no_interval():
    results = halves(synthetic(FOUR, seeds=(1,)))
    assert part_means(results)[["low", "high"]].isna().all(axis=None)
    results.experiments["part"] = None
    assert part_means(results).empty


def test_settings_that_diverged_are_in_no_mean():
    results = halves(synthetic(FOUR, lambda s: 2 + s["dropout"], seeds=(1, 2), diverged=(3,)))
    found = part_means(results).set_index("part")
    assert (found.loc["narrow", "mean"], found.loc["narrow", "cells"], found.loc["narrow", "diverged"]) == (2.0, 1, 1)
    assert (found.loc["wide", "mean"], found.loc["wide", "diverged"]) == (pytest.approx(2.1), 0)


@pytest.mark.parametrize("repetitions", [400, pytest.param(5000, marks=pytest.mark.soak)])
@pytest.mark.parametrize("shared", [0.0, 0.01])
@pytest.mark.parametrize("seeds", [(1, 2), (1, 2, 3, 4, 5)])
def test_intervals_cover_at_their_rate(seeds, shared, repetitions):
    """Whatever seeds do to all settings of a part alike."""
    results, draw = halves(synthetic(FOUR, lambda s: 2 + s["dropout"], seeds=seeds)), np.random.default_rng(0)
    table, hits = results.experiments, 0
    group = table.groupby(["part", "seed"]).ngroup().to_numpy()
    for _ in range(repetitions):
        noise = 0.01 * draw.standard_normal(len(table)) + shared * draw.standard_normal(group.max() + 1)[group]
        found = part_means(with_losses(results, table["val_loss"] + noise)).iloc[0]
        hits += found["low"] <= 2.1 <= found["high"]
    low, high = stats.binom.ppf([0.0005, 0.9995], repetitions, 0.95)
    assert low <= hits <= high
