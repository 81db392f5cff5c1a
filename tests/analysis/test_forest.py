"""Forests' shares against what was planted, and how often chance alone looks like a share."""

import numpy as np
import pytest
from scipy import stats
from synthetic import search, synthetic
from test_shapes import nothing, slope, valley

from nanostudy.analysis.forest import FEWEST, forest


def test_the_setting_that_matters_has_its_share_of_the_variance():
    """Sobol's index of a setting that acts alone is its share: the valley's, of all but noise."""
    found = forest(search(200, valley, noise=0.005))
    shares = found.table.set_index("factor")["share"]
    assert shares["learning_rate"] == pytest.approx(1, abs=0.1)
    assert shares.drop("learning_rate").abs().max() < 0.05
    assert list(found.table["clear"]) == [True, False, False, False]
    assert found.n == 200
    assert found.predicted > 0.8


def test_settings_that_act_together_have_shares_too():
    def crossed(settings):
        return 2.0 + 0.2 * (settings["dropout"] > 0.15) * (1 if settings["weight_decay"] > 0.5 else -1)

    found = forest(search(100, crossed)).table.set_index("factor")
    assert set(found.index[found["clear"]]) == {"dropout", "weight_decay"}


def test_the_mean_prediction_runs_along_the_planted_curve():
    rows = forest(search(200, slope, noise=0.001)).dependence
    width = rows[rows["factor"] == "n_embd"]
    assert list(width["value"]) == pytest.approx([64, 96, 128, 192, 256])
    assert width["loss"].to_numpy() == pytest.approx([slope({"n_embd": v}) for v in width["value"]], abs=0.01)


def test_grids_have_shares_and_too_few_have_none():
    grid = synthetic({"n_embd": [64, 128], "dropout": [0.0, 0.2]}, {"n_embd": 0.2}, seeds=range(8), noise=0.01)
    assert list(forest(grid).table["clear"]) == [True, False]
    assert forest(search(FEWEST - 1)).table.empty
    assert forest(synthetic({"n_embd": [64, 128]}, seeds=range(20))).table.empty  # all losses are the same


def test_the_same_results_have_the_same_forest():
    assert forest(search(30, valley)).table.equals(forest(search(30, valley)).table)


@pytest.mark.soak
def test_chance_alone_is_clear_in_one_study_of_twenty():
    studies = 200
    wrong = np.mean([forest(search(30, nothing, draw=draw)).table["clear"].any() for draw in range(studies)])
    print(f"\n{wrong:.1%} of {studies} studies of 30 points")
    assert wrong <= stats.binom.ppf(0.98, studies, 0.05) / studies
