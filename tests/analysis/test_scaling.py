"""Power laws: planted ones are found, and where the points support none the reason is given."""

import math

import numpy as np
import pytest
from scipy import stats
from synthetic import VOCABULARY, synthetic, with_losses

from nanostudy.analysis.scaling import PowerLaw, Refusal, power_law
from nanostudy.model.config import GPTConfig, count_parameters
from nanostudy.settings import Experiment

WIDTHS = {"n_embd": [32, 64, 128, 256, 512]}
DROPOUTS = {"dropout": [0.0, 0.1, 0.2]}


def parameters(settings):
    experiment = Experiment(**{name: settings[name] for name in ("n_layer", "n_embd", "n_head", "block_size")})
    return count_parameters(GPTConfig.of(experiment, VOCABULARY)).total


def law(settings):
    return 20 * parameters(settings) ** -0.2 * (1 + settings["dropout"])


def test_planted_law_is_found_without_noise():
    found = power_law(synthetic({**WIDTHS, **DROPOUTS}, law, seeds=(1, 2)))
    assert isinstance(found, PowerLaw)
    assert found.exponent == pytest.approx(0.2)
    assert found.coefficient == pytest.approx(20 * (1 * 1.1 * 1.2) ** (1 / 3))
    assert found.low == pytest.approx(found.high)
    assert found.floor is None
    assert found.n == 15
    assert found.formula == "loss = 21.94 × parameters^-0.2"
    x = found.curve["x"]
    assert (x.iloc[0], x.iloc[-1]) == pytest.approx((53_568, 12_653_568))
    assert found.curve["y"].to_numpy() == pytest.approx(found.coefficient * x.to_numpy() ** -0.2)
    assert "geometric mean of the same 3 combinations of dropout" in found.explanation


def test_one_line_is_scipys_regression():
    results = synthetic(WIDTHS, lambda s: 20 * parameters(s) ** -0.2, noise=0.02)
    found = power_law(results)
    table = results.experiments
    known = stats.linregress(np.log(table["parameters"]), np.log(table["val_loss"]))
    assert found.exponent == pytest.approx(-known.slope)
    assert found.coefficient == pytest.approx(math.exp(known.intercept))
    margin = stats.t.ppf(0.975, 3) * known.stderr
    assert found.low == pytest.approx(-known.slope - margin, abs=0.5 * margin)
    assert found.high == pytest.approx(-known.slope + margin, abs=0.5 * margin)


def test_other_settings_are_compared_like_for_like():
    """Large models were given the better dropout, too; only the common one is used."""
    results = synthetic({**WIDTHS, **DROPOUTS}, law, keep=lambda s: s["dropout"] == 0.1 or s["n_embd"] > 100)
    found = power_law(results)
    assert found.exponent == pytest.approx(0.2)
    assert found.n == 5


def test_floor_is_found_where_it_is_supported():
    found = power_law(synthetic(WIDTHS, lambda s: 1.5 + 20 * parameters(s) ** -0.3, seeds=(1, 2, 3)))
    assert isinstance(found, PowerLaw)
    assert found.floor == pytest.approx(1.5, rel=0.01)
    assert found.exponent == pytest.approx(0.3, rel=0.02)
    assert found.formula.endswith("+ 1.5")


def test_tokens():
    found = power_law(
        synthetic({"max_iters": [500, 1000, 2000, 4000, 8000]}, lambda s: 5 * s["max_iters"] ** -0.1), "tokens"
    )
    assert found.exponent == pytest.approx(0.1)
    assert "tokens" in found.formula


def test_same_answer_every_time():
    results = synthetic({**WIDTHS, **DROPOUTS}, law, noise=0.02)
    assert (power_law(results).low, power_law(results).high) == (power_law(results).low, power_law(results).high)


@pytest.mark.parametrize(
    ("results", "why"),
    [
        (synthetic({}, waiting=(1,)), "No experiment has finished"),
        (synthetic({}), "Only 1 value of parameters"),
        (synthetic({"n_embd": [64, 128, 256]}, lambda s: 20 * parameters(s) ** -0.2), "3 values"),
        (synthetic({"n_embd": [64, 72, 80, 88]}, lambda s: 20 * parameters(s) ** -0.2), "too short"),
        (synthetic(WIDTHS, lambda s: 2.0, noise=0.1), "indistinguishable from 0"),
        (synthetic(WIDTHS, lambda s: parameters(s) ** 0.05), "it rises"),
        (
            synthetic(
                {**WIDTHS, "learning_rate": [1e-3, 2e-3, 3e-3, 4e-3, 5e-3]},
                lambda s: 2.0,
                keep=lambda s: abs(s["learning_rate"] - 1e-3 * math.log2(s["n_embd"] / 16)) < 1e-6,
            ),
            r"vary together with other settings \(learning_rate\)",
        ),
        (
            synthetic(
                {"n_embd": [64, 128, 256, 512], **DROPOUTS},
                lambda s: (2 + math.cos(parameters(s))) * (1 + s["dropout"]),
                noise=1e-3,
            ),
            "do not lie on one power law",
        ),
    ],
)
def test_refusals_say_why(results, why):
    import re

    found = power_law(results)
    assert isinstance(found, Refusal), found
    assert re.search(why, found.reason), found.reason


def test_other_texts_and_unknown_sizes():
    results = synthetic(WIDTHS, lambda s: 20 * parameters(s) ** -0.2)
    results.experiments["corpus_sha256"] = ["0" * 64] * 4 + ["1" * 64]
    assert "different texts" in power_law(results).reason
    results.experiments["parameters"] = math.nan
    assert "parameters are unknown" in power_law(results).reason


def test_intervals_cover_at_their_rate():
    """300 simulations: a coverage of 95% is held to 90.2 to 98.7% (its binomial quantiles at 0.05 and 99.95%)."""
    sizes = {"n_embd": WIDTHS["n_embd"][:4]}  # too few for a floor to be tried
    results, draw = synthetic({**sizes, **DROPOUTS}, law), np.random.default_rng(0)
    losses = results.experiments["val_loss"].to_numpy()
    repetitions, hits, fits = 300, 0, 0
    for _ in range(repetitions):
        found = power_law(with_losses(results, losses * np.exp(0.01 * draw.standard_normal(len(losses)))))
        if isinstance(found, PowerLaw):
            fits += 1
            hits += found.low <= 0.2 <= found.high
    assert fits > 0.96 * repetitions  # a bend is refused at 1%
    low, high = stats.binom.ppf([0.0005, 0.9995], fits, 0.95)
    assert low <= hits <= high
