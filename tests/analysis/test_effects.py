"""Effects against published examples, statsmodels, and studies with planted effects and known noise."""

import itertools
import math
import re
from collections import Counter
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
from scipy import stats
from statsmodels.formula.api import ols
from statsmodels.stats.anova import anova_lm
from synthetic import synthetic, with_losses

from nanostudy.analysis.design import design_of
from nanostudy.analysis.effects import cell_means, effects
from nanostudy.analysis.fit import level_effect
from nanostudy.analysis.frames import joined
from nanostudy.analysis.noise import estimates, judged
from nanostudy.errors import UsageError

# Stand-ins, two levels each, declared in this order in Experiment
LAYERS, HEADS, WIDTH, DROPOUT = "n_layer", "n_head", "n_embd", "dropout"
TWO = {LAYERS: [2, 4], HEADS: [1, 2], WIDTH: [64, 128], DROPOUT: [0.0, 0.2]}


def lookup(factors, values):
    """LAYERS loss for each combination, the first factor varying fastest (the standard order of the textbooks)."""
    keys = [tuple(reversed(key)) for key in itertools.product(*reversed(list(factors.values())))]
    named = dict(zip(keys, values, strict=True))
    return lambda settings: named[tuple(settings[name] for name in factors)]


def row(found, term, level=None):
    rows = found.table[found.table["term"] == term]
    return (rows if level is None else rows[rows["level"] == level]).iloc[0]


# --- published examples

# Montgomery, Design and Analysis of Experiments, example 6.2: filtration rate, temperature, pressure, concentration, stirring rate
FILTRATION = [45, 71, 48, 65, 68, 60, 80, 65, 43, 100, 45, 104, 75, 86, 70, 96]
FILTRATION_EFFECTS = {  # the same example, table 6.12
    **{LAYERS: 21.625, HEADS: 3.125, WIDTH: 9.875, DROPOUT: 14.625},
    **{f"{LAYERS} × {HEADS}": 0.125, f"{LAYERS} × {WIDTH}": -18.125, f"{LAYERS} × {DROPOUT}": 16.625},
    **{f"{HEADS} × {WIDTH}": 2.375, f"{HEADS} × {DROPOUT}": -0.375, f"{WIDTH} × {DROPOUT}": -1.125},
    **{
        f"{LAYERS} × {HEADS} × {WIDTH}": 1.875,
        f"{LAYERS} × {HEADS} × {DROPOUT}": 4.125,
        f"{LAYERS} × {WIDTH} × {DROPOUT}": -1.625,
        f"{HEADS} × {WIDTH} × {DROPOUT}": -2.625,
    },
    f"{LAYERS} × {HEADS} × {WIDTH} × {DROPOUT}": 1.375,
}
FILTRATION_SHARES = {
    LAYERS: 0.326397,
    DROPOUT: 0.149288,
    f"{LAYERS} × {WIDTH}": 0.229293,
    f"{LAYERS} × {DROPOUT}": 0.192911,
    WIDTH: 0.0680626,
}

# Box, Hunter and Hunter, Statistics for Experimenters (1978), section 10.2: pilot plant, temperature, concentration, catalyst,
# two runs each; their effects, and 1.4 as the standard error of each
PILOT_PLANT = [(59, 61), (74, 70), (50, 58), (69, 67), (50, 54), (81, 85), (46, 44), (79, 81)]
PILOT_EFFECTS = {
    LAYERS: 23.0,
    HEADS: -5.0,
    WIDTH: 1.5,
    f"{LAYERS} × {HEADS}": 1.5,
    f"{LAYERS} × {WIDTH}": 10.0,
    f"{HEADS} × {WIDTH}": 0.0,
}

# The same book, section 4.2: wear of boys' shoes of two materials, each boy wearing both
SHOES_A = [13.2, 8.2, 10.9, 14.3, 10.7, 6.6, 9.5, 10.8, 8.8, 13.3]
SHOES_B = [14.0, 8.8, 11.2, 14.2, 11.8, 6.4, 9.8, 11.3, 9.3, 13.6]

# The same book, table 7.1: penicillin yield of four treatments in five blends; table 7.2: sums of squares 70 and 264 of 560,
# residual mean square 18.8 on 12 degrees of freedom
PENICILLIN = [[89, 84, 81, 87, 79], [88, 77, 87, 92, 81], [97, 92, 87, 89, 80], [94, 79, 85, 84, 88]]


def whole(term, effect):
    """The textbooks' interaction is half the difference of differences."""
    return 2 * effect if "×" in term else effect


def test_one_replicate_takes_its_noise_from_higher_order():
    found = effects(synthetic(TWO, lookup(TWO, FILTRATION), seeds=None))
    assert "interactions of three and more factors to be nil" in found.explanation
    assert found.balanced
    assert found.n == 16
    assert dict(zip(found.table["term"], found.table["effect"], strict=True)) == pytest.approx(
        {name: whole(name, effect) for name, effect in FILTRATION_EFFECTS.items() if name.count("×") < 2}
    )
    higher = [effect for name, effect in FILTRATION_EFFECTS.items() if name.count("×") >= 2]
    se = math.sqrt(
        sum(effect**2 for effect in higher) / 5
    )  # each contrast squared estimates the variance of a contrast
    assert found.table["se"].to_numpy() == pytest.approx([whole(term, se) for term in found.table["term"]])
    assert found.table["df"].to_numpy() == pytest.approx(5)
    first = row(found, LAYERS)
    assert (first["low"], first["high"]) == pytest.approx((21.625 - 2.5706 * se, 21.625 + 2.5706 * se), abs=1e-3)
    assert first["p"] == pytest.approx(2 * stats.t.sf(21.625 / se, 5))
    for term, share in FILTRATION_SHARES.items():
        assert row(found, term)["share"] == pytest.approx(share, abs=1e-6)
    assert sum(found.shares.values()) == pytest.approx(1)
    assert set(found.table.loc[found.table["clear"], "term"]) == {
        LAYERS,
        WIDTH,
        DROPOUT,
        f"{LAYERS} × {WIDTH}",
        f"{LAYERS} × {DROPOUT}",
    }


def test_half_normal_plot_has_every_contrast_by_size():
    found = effects(synthetic(TWO, lookup(TWO, FILTRATION))).half_normal
    assert dict(zip(found["term"], found["effect"], strict=True)) == pytest.approx(FILTRATION_EFFECTS)
    assert list(found["effect"].abs()) == sorted(found["effect"].abs())
    assert found["quantile"].iloc[0] == pytest.approx(stats.norm.ppf(0.5 + 0.5 / 30))
    assert found["quantile"].iloc[-1] == pytest.approx(stats.norm.ppf(0.5 + 14.5 / 30))


def test_replicates_that_share_no_seed():
    factors = {name: TWO[name] for name in (LAYERS, HEADS, WIDTH)}
    base = synthetic(factors, lookup(factors, range(8)), seeds=(1, 2))
    pairs = [PILOT_PLANT[int(value)] for value in base.experiments["val_loss"]]
    losses = [pair[i % 2] for i, pair in enumerate(pairs)]
    results = with_losses(base, losses)
    results.experiments["seed"] = range(16)
    found = effects(results)
    assert dict(zip(found.table["term"], found.table["effect"], strict=True)) == pytest.approx(
        {term: whole(term, effect) for term, effect in PILOT_EFFECTS.items()}
    )
    assert found.noise == pytest.approx(math.sqrt(8))
    wanted = [whole(term, math.sqrt(2)) for term in found.table["term"]]  # 1.4 in the book
    assert found.table["se"].to_numpy() == pytest.approx(wanted)
    assert found.table["df"].to_numpy() == pytest.approx(8)


def test_two_levels_under_common_seeds_are_a_paired_t_test():
    """The book finds a difference of 0.41 with standard error 0.12, and t = 3.4 on 9 degrees of freedom."""
    base = synthetic({DROPOUT: [0.0, 0.2]}, seeds=range(10))
    found = effects(with_losses(base, [*SHOES_A, *SHOES_B]))
    only = row(found, DROPOUT)
    assert only["effect"] == pytest.approx(0.41)
    assert only["se"] == pytest.approx(0.12, abs=0.005)
    assert only["df"] == pytest.approx(9)
    known = stats.ttest_rel(SHOES_B, SHOES_A)
    assert only["p"] == pytest.approx(known.pvalue)
    assert (only["low"], only["high"]) == pytest.approx(tuple(known.confidence_interval()))


def test_more_levels_in_blocks():
    base = synthetic({WIDTH: [32, 64, 128, 256]}, seeds=range(5))
    found = effects(with_losses(base, np.ravel(PENICILLIN)))
    assert found.noise**2 == pytest.approx(18.83, abs=0.01)
    for level, yields in zip(found.table["level"], PENICILLIN[1:], strict=True):
        known = stats.ttest_rel(yields, PENICILLIN[0])
        one = row(found, WIDTH, level)
        assert (one["p"], one["df"]) == pytest.approx((known.pvalue, 4))
        assert (one["low"], one["high"]) == pytest.approx(tuple(known.confidence_interval()))
    assert found.shares == pytest.approx({WIDTH: 70 / 560, "seeds": 264 / 560, "unexplained": 226 / 560})
    assert list(found.table["level"]) == [64, 128, 256]
    assert set(found.table["reference"]) == {32}
    assert list(found.table["effect"]) == pytest.approx([1, 5, 2])  # treatment means 84, 85, 89, 86


# --- other estimators


def frame_of(results):
    """For formulas, with short names."""
    table = results.finished[[LAYERS, WIDTH, DROPOUT, "seed", "val_loss"]].astype(float)
    return table.set_axis(["a", "c", "d", "s", "y"], axis=1)


def by_definition(exog, y, clusters, weights):
    """(effect, standard error, degrees of freedom): CR2 from dense matrices (Pustejovsky and Tipton, 2018, equations 3 to 11).

    Scaled so that it is unbiased under equal, independent noise where a cluster's own directions leave no residual.
    """
    n = len(y)
    inverse = np.linalg.pinv(exog)
    residual_maker = np.eye(n) - exog @ inverse
    combined, parts, variance = weights @ inverse, [], 0.0
    for cluster in sorted(set(clusters)):
        rows = np.flatnonzero(np.asarray(clusters) == cluster)
        values, vectors = np.linalg.eigh(residual_maker[np.ix_(rows, rows)])
        root = np.array([1 / math.sqrt(v) if v > 1e-9 else 0.0 for v in values])
        adjusted = (vectors * root) @ vectors.T @ combined[rows]
        variance += float(adjusted @ (residual_maker @ y)[rows]) ** 2
        parts.append(residual_maker[:, rows] @ adjusted)
    products = np.array(parts) @ np.array(parts).T
    trace = np.trace(products)
    se = math.sqrt(variance * float(combined @ combined) / trace)
    return float(combined @ y), se, trace**2 / float((products**2).sum())


def checked(one, known):
    assert (one["effect"], one["se"], one["df"]) == pytest.approx(known)


def test_unbalanced_study_is_cell_means_with_equal_weights():
    factors = {LAYERS: [2, 4, 6], WIDTH: [64, 128], DROPOUT: [0.0, 0.2]}
    loss = lambda s: 2 + 0.1 * s[LAYERS] - s[WIDTH] / 640 + s[DROPOUT] * s[LAYERS] / 10  # noqa: E731
    results = synthetic(factors, loss, seeds=(1, 2, 3), noise=0.05, waiting=(1, 7, 8, 20, 30))
    found = effects(results)
    frame = frame_of(results)
    model = ols("y ~ C(s) + (C(a, Sum) + C(c, Sum) + C(d, Sum)) ** 2", frame).fit()
    table = anova_lm(model, typ=2)
    assert not found.balanced
    assert found.n == 31
    total = ((results.finished["val_loss"] - results.finished["val_loss"].mean()) ** 2).sum()
    names = {LAYERS: "C(a, Sum)", WIDTH: "C(c, Sum)", DROPOUT: "C(d, Sum)"}
    for term, share in found.shares.items():
        known = {"seeds": "C(s)", "unexplained": None}.get(term, ":".join(names.get(p, p) for p in term.split(" × ")))
        if known:
            assert share == pytest.approx(table.loc[known, "sum_sq"] / total), term
    cells = ols("y ~ C(s) + C(a, Sum) * C(c, Sum) * C(d, Sum)", frame).fit()
    assert found.noise == pytest.approx(math.sqrt(cells.scale))
    names, seeds = list(cells.params.index), list(frame["s"])
    # statsmodels names sum-coded levels from the first; the last is less the sum of the others
    one = np.array([-2.0 * (name == "C(c, Sum)[S.64.0]") for name in names])
    checked(row(found, WIDTH), by_definition(cells.model.exog, cells.model.endog, seeds, one))
    parts = {"C(a, Sum)[S.2.0]": -2.0, "C(a, Sum)[S.4.0]": -1.0}
    six = np.array([parts.get(name, 0.0) for name in names])
    checked(row(found, LAYERS, 6), by_definition(cells.model.exog, cells.model.endog, seeds, six))
    assert row(found, LAYERS, 6)["effect"] == pytest.approx(float(cells.params @ six))
    assert any("5 waiting" in text for text in found.missing)


def test_incomplete_blocks_are_least_squares():
    """Each level with two of three seeds, in turn."""
    results = synthetic({DROPOUT: [0.0, 0.1, 0.2], LAYERS: [2, 4]}, seeds=(1, 2), noise=0.05)
    table = results.experiments
    table["seed"] = [
        {0.0: (1, 2), 0.1: (2, 3), 0.2: (1, 3)}[d][s - 1] for d, s in zip(table[DROPOUT], table["seed"], strict=True)
    ]
    found = effects(results)
    frame = table[[LAYERS, DROPOUT, "seed", "val_loss"]].astype(float).set_axis(["a", "d", "s", "y"], axis=1)
    model = ols("y ~ C(s) + C(a) * C(d)", frame).fit()
    assert not found.balanced
    assert found.noise == pytest.approx(math.sqrt(model.scale))
    parts = {"C(d)[T.0.2]": 1.0, "C(a)[T.4.0]:C(d)[T.0.2]": 0.5}
    weights = np.array([parts.get(name, 0.0) for name in model.params.index])
    checked(row(found, DROPOUT, 0.2), by_definition(model.model.exog, model.model.endog, list(frame["s"]), weights))
    assert any("not all run with the same seeds" in text for text in found.missing)


def test_two_groups_with_seeds_of_their_own_are_bell_and_mccaffrey():
    """Welch's standard error; degrees of freedom: Imbens and Kolesár (2016), Robust standard errors in small samples."""
    base = synthetic({DROPOUT: [0.0, 0.2]}, seeds=range(7), noise=0.1, waiting=(1, 2, 3))
    base.experiments["seed"] = range(14)
    only = row(effects(base), DROPOUT)
    few, many = (group["val_loss"] for _, group in base.finished.groupby(DROPOUT))
    assert only["se"] == pytest.approx(math.sqrt(few.var() / 4 + many.var() / 7))
    a, b = 4, 7
    assert only["df"] == pytest.approx((a + b) ** 2 * (a - 1) * (b - 1) / (b**2 * (b - 1) + a**2 * (a - 1)))


def test_seeds_of_their_own_are_hc2():
    results = synthetic(TWO, {LAYERS: 0.1}, seeds=None, noise=0.1, waiting=(2, 5, 9))
    found, frame = effects(results), frame_of(results).assign(h=results.finished[HEADS].astype(float))
    formula = "C(a, Sum) + C(c, Sum) + C(d, Sum) + C(h, Sum)"
    formula = f"({formula}) ** 2" if found.table["order"].max() == 2 else formula
    known = ols(f"y ~ {formula}", frame).fit(cov_type="HC2")
    assert row(found, LAYERS)["effect"] == pytest.approx(-2 * known.params["C(a, Sum)[S.2.0]"])
    assert row(found, LAYERS)["se"] == pytest.approx(2 * known.bse["C(a, Sum)[S.2.0]"])


def test_one_lost_run_of_32_changes_the_noise_little():
    """Pure error remains, and interactions of three settings stay out of it."""
    loss = lambda s: 2 + 0.1 * (s[LAYERS] == 4) * (s[WIDTH] == 128) * (s[DROPOUT] > 0)  # noqa: E731
    full = effects(synthetic(TWO, loss, seeds=(1, 2, 3), noise=0.01))
    one = effects(synthetic(TWO, loss, seeds=(1, 2, 3), noise=0.01, waiting=(7,)))
    assert one.noise == pytest.approx(full.noise, rel=0.1)
    for term in (LAYERS, WIDTH, DROPOUT):
        assert row(one, term)["effect"] == pytest.approx(row(full, term)["effect"], abs=0.004)


def test_unknown_seeds_may_be_one_and_the_explanation_says_so():
    results = synthetic({"n_embd": [64, 128], "n_layer": [2, 4]}, {"n_embd": -0.1}, seeds=(1, 2, 3), noise=0.01)
    known = "what another would change is in no interval"
    assert known not in effects(results).explanation
    unknown = replace(results, experiments=results.experiments.assign(seed=None))
    found = effects(unknown)
    assert "what differs between experiments, whose seeds are not known (n = " in found.explanation
    assert f"If all have one seed, as nanoGPT's trainings do, {known}." in found.explanation
    assert found.table["low"].notna().all()


def test_one_seed_of_all_has_no_interval():
    found = effects(synthetic(TWO, {LAYERS: 0.1}, noise=0.01))
    assert found.table[["se", "low", "high", "p"]].isna().all(axis=None)
    assert not found.table["clear"].any()
    assert found.explanation.startswith("All experiments have seed 1: nothing shows what another seed would change")


def test_a_cell_with_one_run_has_no_interval_of_its_own():
    """What leaves no residual shows no noise: half of an estimate's must be there to be seen."""
    results = synthetic({DROPOUT: [0.0, 0.2], LAYERS: [2, 4]}, seeds=(1, 2, 3), noise=0.01, waiting=(2, 3))
    results.experiments["seed"] = range(12)
    fit = judged(design_of(results))[0]
    assert fit.of_cells
    layers, both = level_effect(fit, (0,), (1,), (0,)), level_effect(fit, (0, 1), (1, 1), (0, 0))
    lone, rest = estimates(fit, np.stack([layers - both / 2, layers + both / 2])).se  # at dropout 0, and at 0.2
    assert math.isnan(lone)
    assert rest > 0


def test_unequal_noise_is_named_where_it_is():
    base = synthetic(TWO, seeds=(1, 2, 3, 4))
    loud = np.where(base.experiments[WIDTH] == 128, 0.05, 0.005) * np.random.default_rng(1).standard_normal(64)
    text = effects(with_losses(base, 2 + loud)).explanation
    assert re.search(r"not equal: its standard deviation is about 0.00\d+ at n_embd 64 and 0.0\d+ at 128", text)
    draw = np.random.default_rng(2)
    said = [
        "not equal" in effects(with_losses(base, 2 + 0.01 * draw.standard_normal(64))).explanation for _ in range(100)
    ]
    assert sum(said) <= stats.binom.ppf(0.999, 100, 0.05)


def test_largest_difference_is_between_any_two_levels():
    """A factor shaped like a U: its ends are alike."""
    levels = [1e-4, 3e-4, 1e-3, 1e-2]
    loss = lambda s: {1e-4: 0.3, 3e-4: 0.1, 1e-3: 0.0, 1e-2: 0.32}[s["learning_rate"]] - s[WIDTH] / 640  # noqa: E731
    found = effects(synthetic({WIDTH: [64, 128], "learning_rate": levels}, loss, seeds=(1, 2, 3, 4), noise=0.01))
    first, second = (one for _, one in found.importance.iterrows())
    assert (first["factor"], first["reference"], first["level"], first["levels"]) == ("learning_rate", 1e-3, 1e-2, 4)
    assert first["effect"] == pytest.approx(0.32, abs=0.03)
    assert (first["clear"], second["clear"], second["rival"]) == (True, True, False)


def test_a_factor_with_a_clear_pair_of_levels_has_an_effect():
    """The largest estimate is a noisy level's; another's is small and certain."""
    base = synthetic({WIDTH: [64, 128, 256]}, seeds=range(6))
    draw = np.random.default_rng(1)
    noise = np.concatenate([0.0005 * draw.standard_normal(12), draw.standard_normal(6)])
    losses = 2 + noise - 0.018 * (base.experiments[WIDTH] == 128)
    found = effects(with_losses(base, losses)).importance.iloc[0]
    assert found["clear"]
    assert found[["reference", "level"]].tolist() == [64, 128]


def test_effects_at_the_best_settings_stand_where_they_differ():
    loss = lambda s: 2 - 0.2 * (s[WIDTH] == 128) + (s[LAYERS] == 4) * (0.1 if s[WIDTH] == 128 else -0.12)  # noqa: E731
    found = effects(
        synthetic({LAYERS: [2, 4], WIDTH: [64, 128], DROPOUT: [0, 0.2]}, loss, seeds=(1, 2, 3, 4), noise=0.002)
    )
    best = found.at_best.set_index("factor")
    assert list(best.index) == [LAYERS, WIDTH]
    assert best.loc[LAYERS, ["best", "level"]].tolist() == [2, 4]
    assert best.loc[LAYERS, "effect"] == pytest.approx(0.1, abs=0.01)
    assert best.loc[LAYERS, "average"] == pytest.approx(-0.01, abs=0.01)
    assert best.loc[LAYERS, "low"] < 0.1 < best.loc[LAYERS, "high"]


def test_interaction_is_the_difference_of_differences():
    found = effects(
        synthetic(
            {LAYERS: [2, 4, 6], DROPOUT: [0.0, 0.2]},
            lambda s: {2: 0, 4: 0.1, 6: 0.4}[s[LAYERS]] * (1 + 5 * s[DROPOUT]),
            seeds=(1, 2),
        )
    )
    rows = found.table[found.table["order"] == 2]
    assert list(rows["level"]) == ["4 × 0.2", "6 × 0.2"]
    assert list(rows["reference"]) == ["2 × 0", "2 × 0"]
    assert list(rows["effect"]) == pytest.approx([0.1, 0.4])


def test_planted_effects_are_found_exactly_without_noise():
    planted = {LAYERS: -0.2, DROPOUT: 0.05, f"{LAYERS} x {DROPOUT}": 0.03}
    for missing in ((), (3, 11)):
        found = effects(synthetic(TWO, planted, seeds=(1, 2), waiting=missing))
        for term in (*TWO, f"{LAYERS} × {DROPOUT}", f"{LAYERS} × {HEADS}"):
            known = whole(term, planted.get(term.replace("×", "x"), 0.0))
            assert row(found, term)["effect"] == pytest.approx(known, abs=1e-12)
        assert set(found.table.loc[found.table["clear"], "term"]) == {LAYERS, DROPOUT, f"{LAYERS} × {DROPOUT}"}


def test_what_seeds_share_cancels():
    quiet = effects(synthetic(TWO, {LAYERS: 0.1}, seeds=(1, 2, 3), noise=0.01, draw=5))
    loud = effects(with_shift(synthetic(TWO, {LAYERS: 0.1}, seeds=(1, 2, 3), noise=0.01, draw=5)))
    for column in ("effect", "se", "df"):
        assert list(loud.table[column]) == pytest.approx(list(quiet.table[column]))
    assert loud.shares["seeds"] > 0.9


def with_shift(results):
    table = results.experiments.copy()
    table["val_loss"] += table["seed"].astype(float)
    return type(results)(results.title, table)


# --- what stands in the way


def test_settings_that_vary_together_stand_as_one():
    results = synthetic({LAYERS: [2, 4], DROPOUT: [0.0, 0.2]}, {LAYERS: 0.1}, seeds=(1, 2))
    results.experiments["warmup_iters"] = results.experiments[LAYERS].map({2: 100, 4: 50})
    found = effects(results)
    assert list(found.table["term"]) == ["n_layer/warmup_iters", DROPOUT, f"n_layer/warmup_iters × {DROPOUT}"]
    assert found.table["level"].iloc[0] == "4/50"
    assert row(found, "n_layer/warmup_iters")["effect"] == pytest.approx(0.1)
    assert any("always vary together" in text for text in found.missing)


def test_setting_that_follows_from_another_is_named():
    results = synthetic({WIDTH: [32, 64, 128]}, lambda s: s[WIDTH] / 100, seeds=(1, 2))
    results.experiments["warmup_iters"] = results.experiments[WIDTH].map({32: 100, 64: 100, 128: 50})
    found = effects(results)
    assert set(found.table["term"]) == {WIDTH}
    assert any("warmup_iters follows from n_embd" in text for text in found.missing)


def test_nested_grid_compares_within_its_parts_alone():
    """One part varies depth without dropout, the other dropout at another depth: between them both change."""
    inside = ((2, 0.0), (4, 0.0), (6, 0.1), (6, 0.2))
    loss = lambda s: {2: 2.0, 4: 1.9, 6: 1.5}[s[LAYERS]] + s[DROPOUT]  # noqa: E731
    results = synthetic(
        {LAYERS: [2, 4, 6], DROPOUT: [0.0, 0.1, 0.2]},
        loss,
        seeds=(1, 2),
        keep=lambda s: (s[LAYERS], s[DROPOUT]) in inside,
    )
    found = effects(results)
    assert list(zip(found.table["term"], found.table["level"], found.table["reference"], strict=True)) == [
        (LAYERS, 4, 2),
        (DROPOUT, 0.2, 0.1),
    ]
    assert list(found.table["effect"]) == pytest.approx([-0.1, 0.1])
    assert "Not estimated, because other settings always change with them: n_layer=6, dropout=0.1." in found.missing
    assert np.isfinite(list(found.shares.values())).all()
    assert len(cell_means(results, LAYERS)) == 3


def test_factor_with_one_finished_level_is_named():
    found = effects(synthetic({LAYERS: [2, 4], DROPOUT: [0.0, 0.2]}, seeds=(1, 2), waiting=(5, 6, 7, 8)))
    assert set(found.table["term"]) == {DROPOUT}
    assert any("n_layer cannot be judged: its only value with results is 2" in text for text in found.missing)


def test_half_fraction_names_what_is_confounded():
    factors = {name: TWO[name] for name in (LAYERS, HEADS, WIDTH)}
    half = synthetic(
        factors, {LAYERS: 0.1}, seeds=(1, 2, 3), keep=lambda s: (s[LAYERS] == 4) ^ (s[HEADS] == 2) ^ (s[WIDTH] == 128)
    )
    found = effects(half)
    assert set(found.table["term"]) == {LAYERS, HEADS, WIDTH}
    assert row(found, LAYERS)["effect"] == pytest.approx(0.1)
    assert any(f"{LAYERS} × {HEADS} (confounded with others)" in text for text in found.missing)
    assert found.aliases == {
        LAYERS: (f"{HEADS} × {WIDTH}",),
        HEADS: (f"{LAYERS} × {WIDTH}",),
        WIDTH: (f"{LAYERS} × {HEADS}",),
    }


def test_missing_combination_is_named():
    found = effects(
        synthetic(
            {LAYERS: [2, 4], WIDTH: [64, 128]},
            {LAYERS: 0.1},
            seeds=(1, 2),
            keep=lambda s: s[LAYERS] == 2 or s[WIDTH] == 64,
        )
    )
    assert (
        f"Not estimated, and taken to be nil: {LAYERS} × {WIDTH} (3 of its 4 combinations have results)."
        in found.missing
    )
    assert any("1 of the 4 combinations of levels" in text for text in found.missing)
    assert row(found, LAYERS)["effect"] == pytest.approx(0.1)


def test_factor_that_varies_with_the_seed_alone_is_named():
    results = synthetic({LAYERS: [2, 4], DROPOUT: [0.0, 0.2]}, {LAYERS: 0.1, DROPOUT: 0.2})
    results.experiments["seed"] = results.experiments[DROPOUT].map({0.0: 1, 0.2: 2})
    found = effects(results)
    assert any("dropout varies only together with the seed" in text for text in found.missing)
    assert row(found, DROPOUT)["effect"] == pytest.approx(0.2)


def test_seeds_bound_to_factors_are_judged_between_seeds():
    """As in split plots: 32 seeds, each with one combination of five factors, in two parts that differ in a sixth."""
    five = {LAYERS: [2, 4], HEADS: [1, 2], WIDTH: [64, 128], "batch_size": [8, 16], DROPOUT: [0.0, 0.2]}
    results = synthetic({**five, "learning_rate": [1e-3, 2e-3]}, {LAYERS: 0.1}, noise=0.01, draw=1)
    table = results.experiments
    seeds = (np.arange(64) // 2) + 1
    shared = 0.1 * np.random.default_rng(2).standard_normal(33)
    table["seed"] = pd.Series(seeds, index=table.index, dtype=object)
    table["val_loss"] += shared[seeds]
    found = effects(results)
    assert row(found, "learning_rate")["df"] == pytest.approx(32 - 6)
    assert row(found, "learning_rate")["se"] == pytest.approx(2 * 0.01 / math.sqrt(64), rel=0.4)
    # By hand: each seed's mean is an unreplicated factorial of its own.
    means = table.groupby("seed")["val_loss"].mean()
    base = synthetic(five, seeds=None).experiments.assign(val_loss=means.to_numpy())
    between = effects(type(results)("means", base))
    for term in between.table["term"]:
        for column in ("effect", "se", "df", "low", "p"):
            assert row(found, term)[column] == pytest.approx(row(between, term)[column]), (term, column)


def test_repeats_of_a_seed_are_no_replicates():
    results = synthetic({DROPOUT: [0.0, 0.2]}, {DROPOUT: 0.1}, seeds=(1, 2))
    again = synthetic({DROPOUT: [0.0, 0.2]}, {DROPOUT: 0.1}, seeds=(1, 2), draw=1, eval_interval=100)
    found = effects(joined([results, again]))
    assert found.n == 4
    assert any("with another's settings and seed" in text for text in found.missing)


@pytest.mark.parametrize(
    ("on_the_gpu", "sentence"),
    [
        (lambda row: row["n_layer"] == 2, r"n_layer varies only with the device: their effects cannot be separated"),
        (
            lambda row: row["n_layer"] == 2 and row["seed"] == 1,
            r"n_layer was spread unevenly over them: part of that effect may be",
        ),
        (lambda row: row["seed"] == 1, r"every setting was tried equally often on each"),
        (lambda row: False, None),
        (lambda row: True, None),
    ],
)
def test_what_kinds_of_device_confound_is_named(on_the_gpu, sentence):
    results = synthetic({"n_layer": [2, 4], "dropout": [0.0, 0.2]}, seeds=(1, 2))
    table = results.experiments
    gpu = [bool(on_the_gpu(row)) for _, row in table.iterrows()]
    table["device"] = [f"cuda:{i % 2}" if there else "cpu" for i, there in enumerate(gpu)]
    table["device_name"] = ["a GPU" if there else "a CPU" for there in gpu]
    missing = [text for text in effects(results).missing if "kinds of device" in text]
    assert len(missing) == (sentence is not None)
    if sentence:
        assert re.search(sentence, missing[0])
        assert "(cpu, a CPU, fp32; cuda, a GPU, fp32)" in missing[0]


def test_context_lowers_the_loss_by_itself():
    results = synthetic({"block_size": [64, 128], LAYERS: [2, 4]}, {"block_size": -0.3}, seeds=(1, 2))
    results.experiments["val_loss_at_64"] = results.experiments["val_loss"] + 0.3 * (
        results.experiments["block_size"] == 128
    )
    found = effects(results)
    assert row(found, "block_size")["effect"] == pytest.approx(-0.3)
    assert any("see val_loss_at_64" in text for text in found.missing)
    alike = effects(results, "val_loss_at_64")
    assert row(alike, "block_size")["effect"] == pytest.approx(0.0)
    assert not any("windows" in text for text in alike.missing)


# --- bad input


def test_no_experiment_and_one():
    for waiting, n in (((1,), 0), ((), 1)):
        found = effects(synthetic({}, waiting=waiting))
        assert (len(found.table), len(found.importance), found.n) == (0, 0, n)
        assert found.half_normal is None
        assert "experiment" in found.explanation


def test_no_noise_estimate_gives_effects_without_intervals():
    found = effects(synthetic({LAYERS: [2, 4], DROPOUT: [0.0, 0.2]}, {LAYERS: 0.1}, seeds=None))
    assert row(found, LAYERS)["effect"] == pytest.approx(0.1)
    assert found.table[["se", "low", "high", "p"]].isna().all(axis=None)
    assert not found.table["clear"].any()
    assert "no intervals" in found.explanation


def test_constant_response():
    found = effects(synthetic(TWO, seeds=(1, 2)))
    assert (found.table["effect"] == 0).all()
    assert not found.table["clear"].any()
    assert (found.table["share"] == 0).all()
    assert np.isfinite(found.table[["low", "high", "p"]]).all(axis=None)


def test_losses_that_are_not_finite_are_left_out():
    results = synthetic(TWO, {LAYERS: 0.1}, seeds=(1, 2), noise=0.01)
    results.experiments.iloc[3, results.experiments.columns.get_loc("val_loss")] = math.nan
    found = effects(results)
    assert found.n == 31
    assert any("1 finished experiment without val_loss" in text for text in found.missing)


def test_settings_of_many_values_are_numbers_beside_the_effects():
    results = synthetic({DROPOUT: [0.0, 0.2]}, {DROPOUT: 0.1}, seeds=range(30), noise=0.001)
    rates = np.random.default_rng(1).uniform(1e-4, 1e-3, 60)
    results.experiments["learning_rate"] = rates
    results.experiments["val_loss"] += 300 * rates
    found = effects(results)
    assert set(found.table["term"]) == {DROPOUT}
    assert row(found, DROPOUT)["effect"] == pytest.approx(0.1, abs=0.002)  # the rates' effect, up to 0.27, is taken out
    assert not any("learning_rate" in text for text in found.missing)
    results.experiments["corpus"] = [f"text {i}" for i in range(60)]
    assert any("corpus is left out: it has 60 values in 60 experiments" in text for text in effects(results).missing)


def test_unknown_measure():
    with pytest.raises(UsageError, match="no measure 'loss'"):
        effects(synthetic({}), "loss")


def test_every_design_of_a_few_experiments_has_an_answer():
    """Whatever subset of a grid has finished."""
    draw = np.random.default_rng(3)
    for _ in range(60):
        factors = {LAYERS: [2, 4, 6][: draw.integers(1, 4)], WIDTH: [64, 128], DROPOUT: [0.0, 0.2]}
        seeds = (1, 2)[: draw.integers(1, 3)]
        count = 2 * 2 * len(factors[LAYERS]) * len(seeds)
        waiting = tuple(int(id) for id in draw.permutation(count)[: draw.integers(0, count + 1)] + 1)
        found = effects(synthetic(factors, {DROPOUT: 0.1}, seeds=seeds, noise=0.01, waiting=waiting))
        assert found.n == count - len(waiting)
        assert found.table["effect"].notna().all()
        assert np.isfinite(found.table["se"]).any() <= math.isfinite(found.noise)
        assert (found.table["se"].dropna() > 0).all()


# --- cell means


def test_cell_means_of_a_balanced_study_are_the_means():
    results = synthetic(TWO, {LAYERS: 0.2, f"{LAYERS} x {DROPOUT}": 0.1}, seeds=(1, 2), noise=0.01)
    found = cell_means(results, DROPOUT, LAYERS)
    known = results.experiments.groupby([DROPOUT, LAYERS])["val_loss"].mean()
    assert list(zip(found["level_a"], found["level_b"], strict=True)) == list(known.index)
    assert list(found["mean"]) == pytest.approx(list(known))
    assert set(found["n"]) == {8}
    table = results.experiments
    by_seed = table.groupby([DROPOUT, LAYERS, "seed"])["val_loss"].mean() - table.groupby("seed")["val_loss"].mean()
    deviations = by_seed.groupby([DROPOUT, LAYERS]).std(ddof=1)
    assert (found["high"] - found["mean"]).to_numpy() == pytest.approx(
        stats.t.ppf(0.975, 1) * deviations.to_numpy() / math.sqrt(2)
    )
    alone = cell_means(results, LAYERS)
    assert list(alone["mean"]) == pytest.approx(list(results.experiments.groupby(LAYERS)["val_loss"].mean()))
    assert alone["level_b"].isna().all()


def test_cell_means_make_up_for_what_is_missing():
    """Without the worst corner a plain mean would flatter its level."""
    results = synthetic(TWO, {LAYERS: 1.0, WIDTH: 1.0}, seeds=(1, 2), waiting=(15, 16, 31, 32))
    found = cell_means(results, LAYERS)
    assert found["mean"].tolist() == pytest.approx([1.5, 2.5])
    assert found["n"].sum() == 28


def test_cell_means_of_no_factor():
    with pytest.raises(UsageError, match="batch_size is no factor"):
        cell_means(synthetic(TWO), "batch_size")


# --- coverage


REPETITIONS = 250
LOW, HIGH = (
    stats.binom.ppf([0.0005, 0.9995], REPETITIONS, 0.95) / REPETITIONS
)  # 90.0 to 98.8%: a true 95% fails once in 1,000
PLANTED = {LAYERS: 0.02, DROPOUT: -0.05, f"{LAYERS} x {DROPOUT}": 0.01}
CASES = {
    "common seeds": synthetic({LAYERS: [2, 4], DROPOUT: [0.0, 0.2]}, PLANTED, seeds=(1, 2, 3)),
    "one run a cell": synthetic(TWO, PLANTED, seeds=None),
    "lost runs": synthetic(TWO, PLANTED, seeds=(1, 2), waiting=(1, 2, 9, 20, 31)),
}


def covered(results, truth):
    """How often the intervals of each term hold the truth, over studies that differ in their noise alone."""
    seeds, draw, hits = results.experiments["seed"].astype(int), np.random.default_rng(1), Counter()
    shared = 0.1 * draw.standard_normal((REPETITIONS, seeds.max() + 1)) if seeds.duplicated().any() else None
    for i in range(REPETITIONS):
        noise = 0.02 * draw.standard_normal(len(seeds)) + (shared[i, seeds] if shared is not None else 0)
        table = effects(with_losses(results, results.experiments["val_loss"] + noise)).table
        for term, low, high in zip(table["term"], table["low"], table["high"], strict=True):
            hits[term] += low <= whole(term, truth.get(term.replace("×", "x"), 0.0)) <= high
    return {term: count / REPETITIONS for term, count in hits.items()}


@pytest.mark.parametrize("case", CASES)
def test_intervals_cover_at_their_rate(case):
    shares = covered(CASES[case], PLANTED)
    assert len(shares) == (3 if case == "common seeds" else 10)
    for term, share in shares.items():
        assert LOW <= share <= HIGH, (term, share)


# --- size


def test_two_thousand_experiments_take_a_moment():
    import time

    factors = {
        **TWO,
        "batch_size": [8, 16],
        "max_iters": [1000, 2000],
        "learning_rate": [1e-3, 2e-3],
        "block_size": [32, 64],
    }
    results = synthetic(factors, {LAYERS: 0.1}, seeds=range(8), noise=0.01, waiting=(5, 77, 1500))
    assert len(results.experiments) == 2048
    start = time.thread_time()
    found = effects(results)
    assert time.thread_time() - start < 5
    assert len(found.table) == 8 + 28
    assert row(found, LAYERS)["clear"]
    assert design_of(results).cell_count == 256


def test_contrasts_are_orthogonal():
    results = synthetic(TWO, noise=1.0)
    y = results.experiments["val_loss"]
    assert (4 * effects(results).half_normal["effect"] ** 2).sum() == pytest.approx(((y - y.mean()) ** 2).sum())
