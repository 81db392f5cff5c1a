"""The best's loss without the luck that chose it, and what fresh seeds say."""

import math
from dataclasses import replace

import numpy as np
import pytest
from scipy import stats
from synthetic import synthetic, with_losses

from nanostudy.analysis.power import by_seed
from nanostudy.analysis.winner import TEST_LOSS, candidates, confirmed, unbiased
from nanostudy.reporting.next_steps import confirmation_sentence

CELLS = {"n_layer": [1, 2, 3, 4], "dropout": [0.0, 0.1, 0.2, 0.3]}


@pytest.mark.parametrize("seeds", [(1, 2), (1, 2, 3, 4)])
def test_the_lowest_mean_is_optimistic_and_the_seeds_left_out_are_not(seeds):
    """Sixteen equal settings: all of what is below 2.0 is luck."""
    lowest, left_out = [], []
    for draw in range(150):
        results = synthetic(CELLS, seeds=seeds, noise=0.01, draw=draw)
        lowest.append(by_seed(results).iloc[0].mean() - 2)
        left_out.append(unbiased(results) - 2)
    error = 3 * np.std(left_out) / math.sqrt(150)
    assert np.mean(lowest) < -0.007
    assert abs(np.mean(left_out)) < error < 0.003


def test_by_hand():
    results = with_losses(synthetic({"dropout": [0.0, 0.1]}, seeds=(1, 2, 3)), [2.0, 2.2, 2.3, 2.1, 2.1, 2.6])
    # without seed 1: 2.25 against 2.35; without 2: 2.15 against 2.35; without 3: 2.1 against 2.1, the first of which wins
    assert unbiased(results) == pytest.approx((2.0 + 2.2 + 2.3) / 3)
    turned = with_losses(results, [2.0, 2.2, 2.3, 2.1, 2.3, 2.0])
    # without seed 1: the second, 2.15 against 2.25, which has 2.1 there; without 2: the second, 2.05, 2.3; without 3: the first, 2.3
    assert unbiased(turned) == pytest.approx((2.1 + 2.3 + 2.3) / 3)


def test_seeds_of_their_own_are_left_out_by_place():
    results = synthetic({"dropout": [0.0, 0.1]}, seeds=(1, 2), noise=0.01, draw=1)
    own = results.experiments.assign(seed=[1, 2, 3, 4])
    assert unbiased(replace(results, experiments=own)) == pytest.approx(unbiased(results))


def test_one_seed_cannot_correct():
    assert math.isnan(unbiased(synthetic(CELLS, noise=0.01)))
    assert math.isnan(unbiased(synthetic(CELLS, waiting=range(1, 17))))


def test_settings_that_diverged_are_not_chosen():
    results = with_losses(
        synthetic({"dropout": [0.0, 0.1]}, seeds=(1, 2, 3), diverged=[3]), [1.0] * 3 + [2.0, 2.1, 2.2]
    )
    assert unbiased(results) == pytest.approx(2.1)


def test_candidates_are_the_tied_ones_from_the_lowest_mean_on():
    results = synthetic({"dropout": [0.0, 0.1, 0.2]}, seeds=(1, 2, 3, 4))
    results = with_losses(results, [2.0, 2.02, 2.01, 2.03, 2.01, 2.0, 2.02, 2.0, 3.0, 3.01, 3.02, 3.0])
    cells = results.cells()
    assert [cells[name] for name in candidates(results, 4)] == ["dropout=0.1", "dropout=0"]
    assert [cells[name] for name in candidates(results, 1)] == ["dropout=0.1"]


# --- confirmation


def fresh(draw, **more):
    """Four equal candidates with five fresh seeds each."""
    return synthetic(
        {"dropout": [0.0, 0.1, 0.2, 0.3]}, seeds=(7, 8, 9, 10, 11), noise=0.01, block_noise=0.01, draw=draw, **more
    )


def test_the_winners_interval_holds_whichever_wins():
    inside = [confirmed(results, results).loss for results in map(fresh, range(100))]
    covered = np.mean([loss.low < 2 < loss.high for loss in inside])
    assert covered > 0.95 - 3 * math.sqrt(0.95 * 0.05 / 100)
    own = by_seed(fresh(0)).iloc[0]
    half = stats.t.ppf(1 - 0.025 / 4, 4) * own.std() / math.sqrt(5)
    assert (inside[0].low, inside[0].high) == pytest.approx((own.mean() - half, own.mean() + half))


def test_a_confirmation_in_words():
    results = with_losses(fresh(1), [2.1] * 5 + [2.0, 2.01, 2.02, 2.01, 2.0] + [2.2] * 5 + [2.3] * 5)
    found = confirmed(results, results)
    assert (found.settings, found.was_best, found.n, found.diverged, found.runs) == ("dropout 0.1", False, 5, 0, 5)
    text = confirmation_sentence(found)
    assert text.startswith(
        "On 5 fresh seeds dropout 0.1 has the lowest loss of 4 settings tied for the best in the study"
    )
    assert "where another led: validation loss 2.0080 nats per token (95% interval over seeds" in text
    assert text.endswith("none of its 5 runs diverged.")
    assert "test" not in text


def test_the_test_part_is_read_where_there_is_one():
    results = with_losses(fresh(1), [2.0] * 5 + [2.1] * 15)
    experiments = results.experiments.assign(**{TEST_LOSS: results.experiments["val_loss"] + 0.5})
    found = confirmed(replace(results, experiments=experiments), results)
    assert found.on_test.mean == found.on_test.unbiased == 2.5
    assert "test loss 2.5000" in confirmation_sentence(found)


def test_settings_that_diverge_win_only_where_all_do():
    losses = [1.0] * 5 + [2.0] * 15
    found = confirmed(with_losses(fresh(1, diverged=[2]), losses), fresh(1))
    assert found.settings != "dropout 0"
    assert found.diverged == 0
    everywhere = confirmed(with_losses(fresh(1, diverged=[2, 7, 12, 17]), losses), fresh(1))
    assert (everywhere.settings, everywhere.diverged, everywhere.n, everywhere.runs) == ("dropout 0", 1, 4, 5)
    assert confirmed(fresh(1, waiting=range(1, 21)), fresh(1)) is None
