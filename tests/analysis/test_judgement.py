"""The referee's rule on simulated losses: its errors over several looks, its power, and what divergence does."""

import math
from collections import Counter

import numpy as np
import pytest
from scipy import stats
from statsmodels.stats.contingency_tables import mcnemar

from nanostudy.analysis.judgement import ALPHA, Verdict, alpha_at, compare
from nanostudy.analysis.power import power, seeds_needed

KEEP, DISCARD, UNDECIDED = Verdict
SD = 0.014  # of paired differences: about that of the quickstart's models
NAN = math.nan


def losses(improvement, draw, n=64, sd=SD, diverge=(0.0, 0.0)):
    """Of A and B by seed: what seeds share, and what they do to each alone."""
    random = np.random.default_rng(draw)
    shared = random.normal(2, 0.02, n)
    both = [shared + random.normal(0, sd / math.sqrt(2), n) for _ in "AB"]
    both[1] -= improvement
    for one, rate in zip(both, diverge, strict=True):
        one[random.random(n) < rate] = NAN
    return both


def verdicts(improvement, *, margin=0.0, draws=1000, looks=(8, 16, 32, 64), **more):
    """Of studies that go on until decided; and how many end with each verdict."""
    counts = Counter()
    for draw in range(draws):
        a, b = losses(improvement, draw, n=looks[-1], **more)
        for i in range(1, len(looks) + 1):
            verdict = compare(a, b, looks[:i], margin).verdict
            if verdict is not UNDECIDED:
                break
        counts[verdict] += 1
    return counts


def at_most(rate, draws=1000):
    """Three standard errors above the rate."""
    return draws * rate + 3 * math.sqrt(draws * rate * (1 - rate))


# --- the rule


def test_by_hand():
    gains = np.array([0.02, 0.03, 0.01, 0.02])
    found = compare(2 + gains, np.full(4, 2.0))
    se = gains.std(ddof=1) / 2
    half = stats.t.ppf(1 - 0.025 / 2, 3) * se  # the first look has half of 5%
    assert (found.improvement, found.low, found.high) == pytest.approx((0.02, 0.02 - half, 0.02 + half))
    assert found.p == pytest.approx(2 * stats.ttest_rel(2 + gains, np.full(4, 2.0)).pvalue)
    assert (found.verdict, found.pairs, found.loss_a, found.loss_b) == (KEEP, 4, pytest.approx(2.02), 2.0)
    second = compare(2 + gains, np.full(4, 2.0), looks=(2, 4))
    assert second.p == pytest.approx(2 * found.p)
    assert second.high - second.low > found.high - found.low


def test_all_looks_together_have_five_percent():
    assert sum(alpha_at(look) for look in range(1, 60)) == pytest.approx(ALPHA)


@pytest.mark.parametrize(
    ("improvement", "margin", "verdict"),
    [
        (0.02, 0.0, KEEP),
        (-0.02, 0.0, DISCARD),
        (0.0001, 0.0, UNDECIDED),
        (0.02, 0.005, KEEP),
        (0.0001, 0.005, DISCARD),
        (0.003, 0.005, DISCARD),  # surely better, and surely by less than the margin
        (-0.02, 0.005, DISCARD),
        (-0.003, -0.005, KEEP),  # a simpler recipe that is surely worse, and surely by less
        (0.0001, -0.005, KEEP),
        (-0.02, -0.005, DISCARD),
        (-0.005, -0.005, DISCARD),
    ],
)
def test_the_margin_on_either_side(improvement, margin, verdict):
    a = 2 + np.array([-1, 1, -1, 1, -1, 1, -1, 1]) * 0.0005
    found = compare(a, np.full(8, 2.0 - improvement), margin=margin)
    assert found.verdict is verdict
    assert str(found.verdict) in repr(found)


def test_equal_losses_are_no_improvement():
    same = [2.0, 2.1, 2.2]
    assert compare(same, same).verdict is DISCARD
    found = compare(same, same, margin=0.0)
    assert (found.verdict, found.p, found.improvement) == (UNDECIDED, 1.0, 0.0)
    assert "no number of seeds" in "\n".join(found.lines())


# --- operating characteristics


def test_without_a_difference_both_verdicts_together_stay_below_five_percent():
    counts = verdicts(0.0)
    assert counts[KEEP] + counts[DISCARD] <= at_most(ALPHA)
    assert min(counts[KEEP], counts[DISCARD]) > 0  # the bound is used: this test can fail


def test_seeds_added_as_recommended_keep_the_rate():
    """The next number of seeds is chosen from the losses seen, so no table of looks is fixed beforehand."""
    wrong = 0
    for draw in range(600):
        a, b = losses(0.0, draw, n=300)
        looks = [8]
        while (found := compare(a, b, looks, 0.0)).verdict is UNDECIDED and found.seeds < 300:
            looks.append(min(300, found.seeds + found.more_seeds))
        wrong += found.verdict is not UNDECIDED
    assert wrong <= at_most(ALPHA, 600)


def test_unequal_and_heavy_noise_keep_the_rate():
    random, wrong = np.random.default_rng(2), 0
    for _ in range(1000):
        a, b = 2 + 0.003 * random.standard_t(4, 32), 2 + 0.03 * random.standard_t(4, 32)
        wrong += any(compare(a, b, looks, 0.0).verdict is not UNDECIDED for looks in ((8,), (8, 16), (8, 16, 32)))
    assert wrong <= at_most(ALPHA)


def test_with_a_margin_each_error_stays_below_its_half():
    assert verdicts(0.0, margin=0.005)[KEEP] <= at_most(ALPHA / 2)
    assert verdicts(0.005, margin=0.005)[DISCARD] <= at_most(ALPHA / 2)
    assert verdicts(-0.005, margin=-0.005)[KEEP] <= at_most(ALPHA / 2)


def test_power_is_what_seeds_promises():
    n = seeds_needed(0.02, SD, alpha=alpha_at(1))
    counts = verdicts(0.02, looks=(n,))
    assert counts[KEEP] / 1000 == pytest.approx(power(n, 0.02, SD, alpha=alpha_at(1)), abs=0.04)
    assert counts[KEEP] / 1000 > 0.8 - 0.04


def test_what_is_harmful_is_discarded():
    counts = verdicts(-0.02)
    assert counts[DISCARD] > 980
    assert counts[KEEP] <= at_most(ALPHA / 2)
    assert verdicts(0.02)[KEEP] > 980


def test_the_seeds_that_it_asks_for_decide():
    """Four of five times, were the change as it seems: here it is made to be so."""
    a, b = losses(0.006, 3, n=8)
    first = compare(a, b)
    assert first.verdict is UNDECIDED
    total, sd = first.seeds + first.more_seeds, (a - b).std(ddof=1)
    decided = 0
    for draw in range(400):
        a, b = losses(first.improvement, draw, n=total, sd=sd)
        decided += compare(a, b, looks=(8, total)).verdict is not UNDECIDED
    assert decided / 400 > 0.8 - 3 * math.sqrt(0.16 / 400)


# --- divergence


@pytest.mark.parametrize("only_b", [3, 5, 8, 12])
def test_divergence_of_one_recipe_is_mcnemars_test(only_b):
    a, b = losses(0.0, 4, n=12)
    b[:only_b] = NAN
    p = mcnemar([[12 - only_b, only_b], [0, 0]], exact=True).pvalue
    found = compare(a, b, margin=0.0)
    assert found.verdict is (DISCARD if p <= alpha_at(1) / 2 else UNDECIDED)
    assert (found.diverged_a, found.diverged_b, found.pairs) == (0, only_b, 12 - only_b)


def test_a_better_recipe_that_diverged_once_is_not_kept():
    a, b = losses(0.2, 1, n=8)
    assert compare(a, b).verdict is KEEP
    b[0] = NAN
    found = compare(a, b)
    assert found.verdict is UNDECIDED
    assert "A diverged with 0 of 8 seeds, B with 1" in found.reason
    a[0] = NAN  # both: the seed's, not the recipe's
    assert compare(a, b).verdict is KEEP


def test_a_recipe_that_cures_divergence_is_kept():
    a, b = losses(0.0, 1, n=12)
    a[:10] = NAN
    assert compare(a, b).verdict is KEEP
    a[:] = b[:] = NAN
    found = compare(a, b)
    assert found.verdict is UNDECIDED
    assert "too few are left to compare" in found.reason


def test_equal_rates_of_divergence_keep_the_rate():
    counts = verdicts(0.0, diverge=(0.3, 0.3))
    assert counts[KEEP] + counts[DISCARD] <= at_most(ALPHA)
