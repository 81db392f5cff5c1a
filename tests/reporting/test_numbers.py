"""What a page says of searches and sweeps: nothing that was not run, nothing that is not sure."""

import math
from dataclasses import replace

import pytest
from synthetic import search, synthetic

from nanostudy.analysis.analysis import Analysis
from nanostudy.reporting.sections import document
from nanostudy.reporting.sections.numbers import best_values, lowest_of_search, what_does_not, what_matters

RATES = [1e-4, 2e-4, 5e-4, 1e-3, 2e-3, 5e-3, 1e-2]


def valley(settings):
    return 2.0 + 0.2 * (math.log10(settings["learning_rate"]) + 2.8) ** 2 + 0.1 * settings["dropout"]


def sentences(results):
    return document(Analysis(results)).answer


@pytest.mark.parametrize("points", [40, 20])
def test_a_search_has_true_sentences(points):
    results = search(points, valley)
    texts = sentences(results)
    assert texts["What matters"].startswith("learning_rate matters most: from 0.0001")
    assert "more than any other setting (95% for all 4 settings at once" in texts["What matters"]
    assert "what another seed than 1337 would change is in no interval" in texts["What matters"]
    assert "weight_decay (by at most 0." in texts["What does not, and what acts together"]
    assert "is undecided" in texts["What does not, and what acts together"]
    assert "learning_rate is best near 0.001" in texts["Which values are best"]
    best = results.experiments["val_loss"].idxmin()
    model = texts["Which model to use"]
    assert model.startswith(f"{best} (n_embd ")
    assert f"lowest validation loss of {points} configurations, each run once: " in model
    assert f"{results.experiments['val_loss'].min():.4f} nats per token" in model
    assert "seeds" not in model.replace("other seeds", "")
    everything = " ".join(texts.values())
    assert "always vary together" not in everything
    assert "every setting that was varied" not in everything.lower()


def test_nothing_is_said_to_matter_where_nothing_does():
    shapes = Analysis(search(40)).shapes
    text = what_matters(shapes)
    assert text.startswith("No setting's effect differs from zero: the largest estimate is ")
    assert "agrees with the results (95% for all 4 settings at once" in text
    assert "matters" not in text
    assert best_values(shapes) == (
        "Where n_embd, dropout, learning_rate and weight_decay are best cannot be told from these experiments."
    )


def test_two_settings_of_one_size_are_undecided():
    def tie(settings):
        return 2.0 + 0.05 * math.log10(settings["learning_rate"]) + 0.1 * settings["weight_decay"]

    text = what_matters(Analysis(search(40, tie)).shapes)
    assert "learning_rate" in text.split(" matter, ")[0]
    assert "weight_decay matter, and which matters most is undecided: " in text or "undecided: weight_decay" in text
    assert "matters most:" not in text


def test_a_sweep_with_one_seed_and_with_three():
    once = sentences(synthetic({"learning_rate": RATES}, lambda s: valley({**s, "dropout": 0}), noise=0.01))
    assert once["What matters"].startswith("learning_rate matters: from 0.0001 to 0.001")
    assert "lowest validation loss of 7 configurations, each run once" in once["Which model to use"]
    assert "learning_rate is best near 0.001" in once["Which values are best"]
    seeds = synthetic({"learning_rate": RATES}, lambda s: valley({**s, "dropout": 0}), noise=0.01, seeds=(1, 2, 3))
    thrice = sentences(seeds)
    assert "what another seed" not in thrice["What matters"]
    assert "over 3 seeds" in thrice["Which model to use"]


def test_what_the_curves_miss_is_said():
    edge = synthetic({"learning_rate": RATES}, lambda s: 2.0 + (s["learning_rate"] > 2e-3), noise=0.01, seeds=(1, 2, 3))
    shapes = Analysis(edge).shapes
    assert "the fitted curves miss something (p = " in what_does_not(shapes)
    assert "as far as parabolas describe it, which the test doubts" in best_values(shapes)


def test_the_ends_of_a_range_are_no_optimum():
    falling = synthetic(
        {"n_embd": [64, 96, 128, 192, 256]}, lambda s: 2 - 0.1 * math.log(s["n_embd"]), noise=0.003, seeds=range(5)
    )
    assert best_values(Analysis(falling).shapes) == (
        "n_embd has no optimum inside its range: the loss falls up to its highest value, 256."
    )


def test_too_few_points_say_so():
    texts = sentences(search(5, valley))
    assert texts["What matters"] == "5 experiments for 4 settings are too few to fit curves through."
    assert "run the best few again with other seeds" in lowest_of_search(Analysis(search(5, valley)))


def test_the_page_has_curves_changes_and_shares():
    page = document(Analysis(search(40, valley)))
    section = next(section for section in page.sections if section.id == "curves-of-numbers")
    figure, explanation, changes, about, shares = section.blocks
    assert len(figure.panels) == 4
    assert "learning_rate is lowest near 0.001" in figure.alternative
    assert "All have seed 1337" in explanation.text
    assert changes.rows[0]["setting"] == "learning_rate"
    assert "(n = 40)" in about.text
    assert shares.rows[0]["setting"] == "learning_rate"
    assert section.title == figure.title == "How the loss runs along each setting"
    assert page.data.colourings[0] in ("n_embd", "name", "status")  # forty rates are no colours


def test_a_diverged_point_is_not_among_the_configurations():
    results = search(40, valley)
    table = results.experiments.copy()
    lost = table.index[:3]
    table.loc[lost, "status"] = "diverged"
    text = lowest_of_search(Analysis(replace(results, experiments=table)))
    assert "of 37 configurations, each run once" in text
