"""Rates of intervals and of wrong sentences, in studies that the analysis does not assume: few here, many under -m soak."""

import numpy as np
import pytest
from rates import CASES, Case
from scipy import stats

QUICK = [case for case in CASES if not case.what.startswith(("pure noise, 4 x 4", "pure noise, 3 x 3"))]


def check(case: Case, studies: int) -> None:
    """A right rate fails once in 1,000; intervals of one study go together, so that few of them count in the bounds."""
    count, n = case.simulated(studies, np.random.default_rng(5))
    if not case.holds:
        assert count <= stats.binom.ppf(0.999, n, 0.05), f"{count} of {n}"
        return
    independent = min(studies, n // 2)
    if independent >= 10:
        low = stats.binom.ppf(0.0005, independent, 0.93) / independent
        high = (
            stats.binom.ppf(0.9995, independent, 0.98) / independent
        )  # where most is lost, intervals are a little wide
        assert low <= count / n <= high, f"{count} of {n}"


@pytest.mark.parametrize("case", QUICK, ids=lambda case: case.what)
def test_rates_in_a_few_studies(case):
    check(case, 30)


@pytest.mark.soak
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.what)
def test_rates_in_many_studies(case):
    check(case, 1000)
