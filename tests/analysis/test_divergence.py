"""Divergence: which settings, how often; and that nobody averages over the survivors."""

import math

import pytest
from scipy import stats
from synthetic import synthetic

from nanostudy.analysis import curves
from nanostudy.analysis.analysis import Analysis
from nanostudy.analysis.divergence import by_settings, divergence, unreliable
from nanostudy.analysis.effects import effects
from nanostudy.analysis.ranking import ranking
from nanostudy.reporting.sections import document
from nanostudy.reporting.sections.answer import how_it_generalises, what_diverges, which_model

RATES = {"learning_rate": [1e-3, 1e-1]}


def survivor(**settings):
    """The high rate diverged in three of four seeds, and the fourth has the lowest loss of all."""
    loss = lambda s: 1.9 if s["learning_rate"] == 1e-1 else 2.0  # noqa: E731
    return synthetic(RATES, loss, seeds=(1, 2, 3, 4), noise=0.001, diverged=(5, 6, 7), **settings)


def test_rates_of_settings_by_hand():
    results = survivor()
    rates = by_settings(results)
    assert list(rates["diverged"]) == [0] * 4 + [3] * 4
    assert set(rates["n"]) == {4}
    assert unreliable(results) == {results.experiments.index[7]}
    table = divergence(results).set_index("value")
    assert tuple(table.loc[1e-1, ["diverged", "n", "others_diverged", "others_n"]]) == (3, 4, 0, 4)
    assert table.loc[1e-1, "p"] == pytest.approx(stats.fisher_exact([[3, 1], [0, 4]]).pvalue)
    assert not table["clear"].any()  # 3 of 4 against none of 4 may be chance


def test_survivors_have_a_place_but_no_mean():
    results = survivor()
    rows = ranking(results).set_index("name")
    name = results.experiments.index[7]
    assert rows.index[0] == name  # by its own loss
    assert math.isnan(rows.loc[name, "mean"])
    assert (rows.loc[name, "n"], rows.loc[name, "diverged"], rows.loc[name, "tied"]) == (1, 3, False)
    others = rows.drop(index=name)
    assert set(others["n"]) == {4}
    assert set(others["diverged"]) == {0}
    assert others["mean"].to_numpy() == pytest.approx(2.0, abs=0.002)


def test_what_diverged_is_not_recommended():
    found = Analysis(survivor())
    text = which_model(found)
    assert text.startswith("learning_rate 0.001 has the lowest mean")
    assert "whose settings diverged with 3 other seeds" in text
    assert what_diverges(found) == (
        "3 of 8 trainings diverged: learning_rate 0.1 in 3 of 4; no value of a setting diverges clearly more often than the "
        "others (95%)."
    )
    assert next(iter(document(found).answer)) == "What diverges"


def test_a_value_that_diverges_clearly_is_named():
    factors = {"n_embd": [64, 128], **RATES}
    text = what_diverges(Analysis(synthetic(factors, seeds=range(1, 9), diverged=[*range(9, 15), *range(25, 33)])))
    assert text == (
        "14 of 32 trainings diverged: with learning_rate 0.1 14 of 16, with its other values none of 16 (95% for all "
        "settings at once)."
    )


def test_every_setting_diverged_with_some_seed():
    found = Analysis(synthetic(RATES, seeds=(1, 2, 3), diverged=(1, 4)))
    assert which_model(found) == "Every setting diverged with some seed, so none can be recommended."
    assert ranking(found.results)["mean"].isna().all()
    assert document(found).answer


def test_effects_are_not_of_survivors():
    factors = {"n_embd": [64, 128], "learning_rate": [1e-3, 2e-3, 1e-1]}
    loss = lambda s: 2 - s["n_embd"] / 640 - 0.1 * (s["learning_rate"] == 1e-1)  # noqa: E731
    results = synthetic(factors, loss, seeds=(1, 2, 3), noise=0.001, diverged=(7, 16))
    found = effects(results)
    assert set(found.table.query("factor_a == 'learning_rate' and order == 1")["level"]) == {2e-3}
    assert any("would flatter these settings" in text for text in found.missing)


def test_chance_is_not_named_too_often():
    """Trainings that diverge at random: at most 5% of the studies name a value; Fisher's test is conservative."""
    import numpy as np

    draw = np.random.default_rng(3)
    factors = {"n_layer": [1, 2], "n_embd": [32, 64, 128], "dropout": [0.0, 0.2]}
    results = synthetic(factors, seeds=(1, 2, 3, 4))
    named = 0
    for _ in range(200):
        status = np.where(draw.random(len(results.experiments)) < 0.3, "diverged", "finished")
        results.experiments["status"] = status
        named += bool(divergence(results)["clear"].any())
    assert named <= stats.binom.ppf(0.999, 200, 0.05)


def test_overfitting_is_judged_where_it_can_be():
    results = survivor(curves=True)
    table = curves.overfitting(results)
    assert table["overfits"].notna().sum() == 5
    assert "none of 5 trainings overfit (3 cannot be judged)" in how_it_generalises(Analysis(results))
    assert set(curves.convergence(results)["name"]) == set(results.finished.index)


def test_a_diverged_training_has_no_losses_at_its_end():
    table = survivor().experiments
    lost = table[table["status"] == "diverged"]
    assert lost[["train_loss", "val_loss", "gap"]].isna().all(axis=None)
    assert lost["best_val_loss"].notna().all()
