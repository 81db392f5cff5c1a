"""How often intervals hold the truth and sentences are wrong, in studies that the analysis does not assume.

`python tests/rates.py 1000` prints the table of docs/statistics.md.
"""

import itertools
import math
import sys
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
from scipy import stats
from synthetic import REAL, real_deviations, real_losses, synthetic, with_losses

from nanostudy.analysis.analysis import Analysis
from nanostudy.analysis.design import TOGETHER
from nanostudy.analysis.frames import Results
from nanostudy.reporting.sections.answer import what_does_not, what_matters

SIGNS = np.array(list(itertools.product((-1, 1), repeat=4)))
UNEQUAL = np.exp(
    np.random.default_rng(3).uniform(np.log(0.003), np.log(0.095), 16)
)  # of the cells' standard deviations
THREE = {"n_embd": [32, 64, 128], "n_layer": [1, 2, 3], "dropout": [0.0, 0.1, 0.2]}
FOUR = {"n_embd": [32, 64, 96, 128], "n_layer": [1, 2, 3, 4], "dropout": [0.0, 0.1, 0.2, 0.3]}
RATES = (0.005, 0.01, 0.02, 0.04, 0.08)

Counts = dict[str, tuple[int, int]]  # of a statement: how often, of how many


@dataclass(frozen=True)
class Case:
    what: str
    simulated: Callable[[int, np.random.Generator], tuple[int, int]]
    holds: bool = False  # an interval, which holds the truth in 95%; else a wrong sentence, in at most 5%


def _draws(base: Results, losses: Callable[[], np.ndarray], studies: int) -> list[Analysis]:
    return [Analysis(with_losses(base, np.ravel(losses()))) for _ in range(studies)]


def _own_seeds(base: Results) -> Results:
    return replace(base, experiments=base.experiments.assign(seed=range(1, len(base.experiments) + 1)))


def real_study(random: np.random.Generator, seeds: int, means: np.ndarray | None = None) -> np.ndarray:
    """(cells, seeds): losses with the means and the covariance of 128 real trainings."""
    means = real_losses().mean(axis=1) if means is None else means
    return means[:, None] + real_deviations() @ random.standard_normal((8, seeds))


def _held(analyses: list[Analysis], truth: Callable[[str], float]) -> tuple[int, int]:
    held = n = 0
    for analysis in analyses:
        mains = analysis.effects.table.query("order == 1").dropna(subset=["low"])
        mains = mains[~mains["term"].str.contains(TOGETHER)]  # the truth is known of single settings
        held += sum(row.low <= truth(row.term) <= row.high for row in mains.itertuples())
        n += len(mains)
    return held, n


def _true_effect(term: str) -> float:
    return float(SIGNS[:, list(REAL).index(term)] @ real_losses().mean(axis=1)) / 8


def real(seeds: int) -> Case:
    def simulated(studies: int, random: np.random.Generator) -> tuple[int, int]:
        base = synthetic(REAL, seeds=range(1, seeds + 1))
        return _held(_draws(base, lambda: real_study(random, seeds), studies), _true_effect)

    return Case(f"intervals of effects, real covariance, {seeds} seeds", simulated, holds=True)


def unequal(own: bool) -> Case:
    def simulated(studies: int, random: np.random.Generator) -> tuple[int, int]:
        base = synthetic(REAL, seeds=(1, 2, 3, 4))
        base = _own_seeds(base) if own else base
        noise = lambda: 2 + UNEQUAL[:, None] * random.standard_normal((16, 4))  # noqa: E731
        return _held(_draws(base, noise, studies), lambda _: 0.0)

    which = "each experiment its own seed" if own else "4 common seeds"
    return Case(f"intervals, noise of 0.003 to 0.095 over cells, {which}", simulated, holds=True)


def lost(finished: int, wrong: bool) -> Case:
    """Of 32 experiments with two seeds some are not there."""

    def simulated(studies: int, random: np.random.Generator) -> tuple[int, int]:
        base = synthetic(REAL, seeds=(1, 2))
        analyses = []
        for _ in range(studies):
            results = with_losses(base, real_study(random, 2).ravel())
            status = results.experiments["status"].to_numpy(dtype=object).copy()
            status[random.permutation(32)[finished:]] = "waiting"
            analyses.append(Analysis(replace(results, experiments=results.experiments.assign(status=status))))
        most = max(REAL, key=lambda term: abs(_true_effect(term)))
        return _wrong_most(analyses, most) if wrong else _held(analyses, _true_effect)

    if wrong:
        return Case(f'a false "matters most", {finished} of 32 finished', simulated)
    return Case(f"intervals of effects, {finished} of 32 finished", simulated, holds=True)


def _wrong_most(analyses: list[Analysis], most: str | None) -> tuple[int, int]:
    texts = [what_matters(analysis) for analysis in analyses]
    return sum(" matters most" in text and text.split(" matters most")[0] != most for text in texts), len(texts)


def pure_noise(what: str, factors: dict, seeds: tuple[int, ...] | None, pairs: bool) -> Case:
    def simulated(studies: int, random: np.random.Generator) -> tuple[int, int]:
        base = synthetic(factors, seeds=seeds)
        n = len(base.experiments)
        analyses = _draws(base, lambda: 2 + 0.01 * random.standard_normal(n), studies)
        if pairs:
            return sum("act together (" in what_does_not(one) for one in analyses), studies
        texts = map(what_matters, analyses)
        return sum(not text.startswith(("No setting's effect", "Two seeds cannot")) for text in texts), studies

    return Case(f"pure noise, {what}: {'an interaction' if pairs else 'an effect'} is stated", simulated)


def u_shape(shape: tuple[float, ...]) -> Case:
    """A width whose effect is 0.19, and a learning rate without a trend: all of its range lies between."""
    levels = list(RATES[: len(shape)])

    def simulated(studies: int, random: np.random.Generator) -> tuple[int, int]:
        loss = lambda s: 2 - 0.19 * (s["n_embd"] == 128) + shape[levels.index(s["learning_rate"])]  # noqa: E731
        base = synthetic({"n_embd": [64, 128], "learning_rate": levels}, loss, seeds=(1, 2, 3, 4))
        known, n = base.experiments["val_loss"].to_numpy(), len(base.experiments)
        return _wrong_most(_draws(base, lambda: known + 0.01 * random.standard_normal(n), studies), "learning_rate")

    return Case(f'a false "matters most", a U over {len(levels)} learning rates', simulated)


def tie(first: float, second: float) -> Case:
    factors = {"n_embd": [64, 128], "dropout": [0.0, 0.2], "n_layer": [2, 4]}

    def simulated(studies: int, random: np.random.Generator) -> tuple[int, int]:
        base = synthetic(factors, {"n_embd": -first, "dropout": second}, seeds=(1, 2, 3, 4))
        known = base.experiments["val_loss"].to_numpy()
        analyses = _draws(base, lambda: known + 0.0104 * random.standard_normal(32), studies)
        return _wrong_most(analyses, "dropout" if second > first else None)

    return Case(f'a false "matters most", effects of {first} and {second}', simulated)


def fraction() -> Case:
    """A 2^(5-2) fraction: dropout does nothing, but varies with an interaction."""
    factors = {**REAL, "n_head": [1, 2]}

    def sign(s, *names: str) -> int:
        return math.prod(1 if s[name] == factors[name][-1] else -1 for name in names)

    def simulated(studies: int, random: np.random.Generator) -> tuple[int, int]:
        def inside(s) -> bool:
            alike = sign(s, "dropout") == sign(s, "n_layer", "n_embd")
            return alike and sign(s, "n_head") == sign(s, "n_layer", "learning_rate")

        base = synthetic(factors, lambda s: 2 + 0.047 * sign(s, "n_layer", "n_embd"), seeds=(1, 2, 3, 4), keep=inside)
        known, n = base.experiments["val_loss"].to_numpy(), len(base.experiments)
        texts = map(what_matters, _draws(base, lambda: known + 0.01 * random.standard_normal(n), studies))
        return sum("dropout" in text and "n_layer × n_embd" not in text for text in texts), studies

    return Case("a fraction's alias is stated without its other name", simulated)


def best(own: bool) -> Case:
    """All settings are equally good: of the one that is lost most often, how often it is not among the tied."""

    def simulated(studies: int, random: np.random.Generator) -> tuple[int, int]:
        base, lost = synthetic(REAL, seeds=(1, 2, 3, 4)), Counter[int]()
        names = list(base.experiments.index[::4])
        for _ in range(studies):
            noise = UNEQUAL[:, None] * random.standard_normal((16, 4))
            losses = 2 + noise if own else real_study(random, 4, np.full(16, 2.0))
            tied = Analysis(with_losses(base, losses.ravel())).ranking.set_index("name").loc[names, "tied"]
            lost.update(np.flatnonzero(~tied.to_numpy(dtype=bool)).tolist())
        return max(lost.values(), default=0), studies

    return Case(f"a best setting is not among the tied, {'unequal noise' if own else 'real covariance'}", simulated)


CASES = [
    *(real(seeds) for seeds in (2, 3, 4, 8)),
    *(unequal(own) for own in (False, True)),
    *(lost(finished, wrong) for wrong in (False, True) for finished in (31, 20, 12, 9)),
    *(pure_noise("2^4, 2 seeds", REAL, (1, 2), pairs) for pairs in (False, True)),
    *(pure_noise("2^4, 4 seeds", REAL, (1, 2, 3, 4), pairs) for pairs in (False, True)),
    *(pure_noise("2^5, a seed each", {**REAL, "n_head": [1, 2]}, None, pairs) for pairs in (False, True)),
    *(pure_noise("3 x 3 x 3, 3 seeds", THREE, (1, 2, 3), pairs) for pairs in (False, True)),
    *(pure_noise("4 x 4 x 4, a seed each", FOUR, None, pairs) for pairs in (False, True)),
    *(u_shape(shape) for shape in ((0, -0.16, 0.14), (0.29, 0.1, 0.0, 0.12, 0.28))),
    *(tie(*sizes) for sizes in ((0.208, 0.21), (0.2, 0.2))),
    fraction(),
    *(best(own) for own in (False, True)),
]


def main(studies: int) -> None:
    print("| what | rate | bounds |\n|---|---|---|")
    for case in CASES:
        count, n = case.simulated(studies, np.random.default_rng(11))
        low, high = stats.binomtest(count, n).proportion_ci(0.95, method="wilson") if n else (math.nan, math.nan)
        print(f"| {case.what} | {count / max(1, n):.1%} | {low:.1%} to {high:.1%} |", flush=True)


if __name__ == "__main__":
    main(int(sys.argv[1]))
