"""What curves show: observations on curves whose answers are known, and the tables over all runs of a study."""

import math
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
from conftest import small
from synthetic import evaluations, log, synthetic, with_curves

from nanostudy.analysis import curves as curve

# --- one run


def test_share_of_the_fall():
    rows = evaluations(4.0, 3.1, 2.9, 2.3, 2.19, 2.0)  # falls by 2: half at 3.0, 90% at 2.2
    assert curve.improvement(rows) == 2.0
    assert curve.reached(rows, 0.5) == 200
    assert curve.reached(rows, 0.9) == 400
    assert curve.reached(rows, 1.0) == 500


def test_no_fall_has_no_shares_and_no_plateau():
    for rows in (evaluations(2.0, 2.5, 3.0), evaluations(2.0), []):
        assert curve.improvement(rows) == 0.0
        assert curve.reached(rows, 0.5) is None
        assert curve.plateau(rows) is None


def test_plateau_begins_where_a_hundredth_is_left():
    assert curve.plateau(evaluations(4.0, 2.5, 2.03, 2.019, 2.01, 2.0, 2.0)) == 300  # a hundredth of the fall is 0.02
    assert curve.plateau(evaluations(4.0, 2.5, 2.0, 2.2, 2.4)) == 200  # also where the loss rises later


def test_no_plateau_while_the_loss_still_falls():
    assert curve.plateau(evaluations(4.0, 3.5, 3.0, 2.5, 2.0)) is None
    assert curve.plateau(evaluations(4.0, 2.0)) is None
    falling = evaluations(*np.linspace(4.0, 2.0, 1001), interval=1)  # every evaluation gains a thousandth of the fall
    assert curve.plateau(falling) is None
    assert curve.plateau(evaluations(*(2 + 2 * math.exp(-i / 50) for i in range(1001)), interval=1)) == 231  # 50 ln 100


def test_overfitting():
    found = curve.find_overfitting(evaluations(4.0, 2.0, 1.5, 1.8, train_losses=[4.0, 2.0, 1.4, 0.9]))
    assert found == curve.Overfitting(since=200, rise=pytest.approx(0.3), fall=pytest.approx(0.5))


@pytest.mark.parametrize(
    ("val", "train"),
    [
        ([4.0, 2.0, 1.5], [4.0, 1.9, 1.0]),  # the lowest is the last
        ([4.0, 2.0, 2.019], [4.0, 1.9, 1.0]),  # a rise within 1%
        ([4.0, 2.0, 2.5], [4.0, 1.9, 2.4]),  # the training loss rises too
        ([4.0], [4.0]),
        ([], []),
    ],
)
def test_no_overfitting(val, train):
    assert curve.find_overfitting(evaluations(*val, train_losses=train)) is None


def test_spikes_stand_over_the_rows_before_them():
    norms = [1.0] * 30 + [5.1] + [1.0] * 30 + [4.9, 40.0, math.inf, math.nan] + [1.0] * 5
    found = curve.gradient_norms(log(*norms))
    assert found == curve.GradientNorms(68, 1.0, 40.0, 630, spikes=(310, 630), not_finite=2)


def test_a_spike_needs_a_history_and_forgets_it():
    assert curve.gradient_norms(log(*[1.0] * 9, 100.0)).spikes == ()  # nine rows are too few to judge by
    assert curve.gradient_norms(log(*[1.0] * 10, 100.0)).spikes == (110,)
    risen = [1.0] * 100 + [4.0] * 60 + [6.0]  # 6 is no spike over fifty rows of 4
    assert curve.gradient_norms(log(*risen)).spikes == ()
    often = [1.0] * 20 + [40.0] * 5 + [6.0]  # judged by the median, not the mean
    assert curve.gradient_norms(log(*often)).spikes == (210, 220, 230, 240, 250, 260)
    assert curve.gradient_norms(log(math.nan)) is None


def test_speed_is_the_median_of_what_was_measured():
    assert curve.median_speed(log(1, 1, 1)) == (2000.0, 3)
    unmeasured = [{**row, "tokens_per_second": 0.0} for row in log(1, 1)]
    assert curve.median_speed([*unmeasured, *log(1, 1, 1)]) == (2000.0, 3)
    assert curve.median_speed(unmeasured) is None


def test_bins_are_means():
    rows, size = curve.binned(log(1.0, 3.0, 5.0, 7.0, 11.0), most=3)
    assert size == 2
    assert [row["grad_norm"] for row in rows] == [2.0, 6.0, 11.0]
    assert [row["step"] for row in rows] == [15, 35, 50]
    assert curve.binned(log(1.0, 2.0), most=2)[1] == 1


def test_words_follow_the_numbers():
    text = " ".join(
        curve.observations(evaluations(4.0, 2.0, 1.5, 1.8, train_losses=[4, 2, 1.4, 0.9]), [], small(), 1.2)
    )
    assert "fell by 2.5000 nats per token" in text
    assert "half of that by update 100, 90% by update 200" in text
    assert "The plateau begins at update 200" in text
    assert "0.3000 nats per token higher at the last one, while the training loss fell by 0.5000: it overfits" in text
    assert "is 0.9000 nats per token at update 300, and was 0.1000" in text
    assert "is 0.3000 nats per character above the entropy of the validation text, 1.2000" in text
    warming = curve.observations([], log(1.0, 2.0, 9.0), small(warmup_iters=500, grad_clip=1.5))
    assert "The log ends at update 30, inside the warm-up of 500, below the full rate." in " ".join(warming)
    assert "clipped to 1.5 in 67% of them" in " ".join(warming)


# --- all runs of a study


def test_overfitting_of_all_runs():
    rows = [(0, 0, 0, 0, 4.0), (0, 10, 0, 0, 2.0), (0, 20, 0, 0, 2.5), (1, 0, 0, 0, 4.0), (1, 10, 0, 0, 3.0)]
    results = with_curves(synthetic({"dropout": [0.0, 0.1, 0.2]}), rows)
    results.evaluations["train_loss"] = [4.0, 2.0, 1.5, 4.0, 3.0]
    found = curve.overfitting(results).set_index("name")
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
    found = curve.stability(replace(results, training=pd.DataFrame(log, columns=columns)))
    assert list(found["name"]) == list(results.experiments.index[:2])
    assert (found["largest_norm"].iloc[0], found["median_norm"].iloc[0], found["spikes"].iloc[0]) == (50.0, 1.0, 1)
    assert list(found["diverged"]) == [False, True]
    assert pd.isna(found["spikes"].iloc[1])


def test_convergence_is_that_of_the_single_report():
    flat = [(0, step, 0, 0, 2 + 2 * math.exp(-step / 50)) for step in range(0, 1001, 100)]
    falling = [(1, step, 0, 0, 4 - step / 1000) for step in range(0, 1001, 100)]
    results = with_curves(synthetic({"dropout": [0.0, 0.1, 0.2]}), [*flat, *falling, (2, 0, 0, 0, 4.0)])
    found = curve.convergence(results)
    rows = results.evaluations[results.evaluations["name"] == results.experiments.index[0]].to_dict("records")
    assert found["plateau"].iloc[0] == curve.plateau(rows) == 300
    assert found["plateau"].iloc[1:].isna().all()
    assert list(found["reason"])[1:] == ["the loss was still falling", "one evaluation is no curve"]
