"""A referee's verdict on a change, from the losses of two recipes with the same seeds, at any number of looks."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum
from functools import cached_property

import numpy as np
from scipy import stats

from nanostudy.analysis.power import MOST_SEEDS, POWER, beyond, smallest
from nanostudy.text import counted, duration

ALPHA = 0.05  # for all looks together
MARGIN = 0.005  # nats per token
SEEDS = 8


class Verdict(StrEnum):
    """On a change: B instead of A."""

    KEEP = "KEEP"
    DISCARD = "DISCARD"
    UNDECIDED = "UNDECIDED"


@dataclass(frozen=True, kw_only=True, repr=False)
class Judgement:
    """B against A. `improvement` is A's mean validation loss less B's, in nats per token, over the seeds with which neither diverged.

    The interval and p hold at 95% for all looks together. Both and the improvement are NaN below two such seeds.
    """

    verdict: Verdict
    improvement: float
    low: float
    high: float
    p: float  # of no difference
    margin: float
    seeds: int  # that both recipes ran with
    pairs: int  # of these, the ones with which neither diverged
    diverged_a: int
    diverged_b: int
    loss_a: float  # means over the pairs
    loss_b: float
    looks: tuple[int, ...]  # the numbers of seeds at which a verdict was given; this one is the last
    sd: float  # of the paired differences
    seed_seconds: float = math.nan  # that one more seed of both takes here
    a: str = "A"
    b: str = "B"
    measure: str = "val_loss"
    trainings: int = 0
    seconds: float = 0.0  # of training, all seeds together
    folder: str = ""

    @cached_property
    def more_seeds(self) -> int | None:
        """Further ones with which the next look decides in 80% of cases, were the change as it seems; None: no need, or not known."""
        if self.verdict is not Verdict.UNDECIDED or self.pairs < self.seeds:
            return None
        return _more_seeds(self.improvement, self.sd, self.pairs, alpha_at(len(self.looks) + 1), self.margin)

    @property
    def more_seconds(self) -> float | None:
        """That those take here."""
        return None if self.more_seeds is None or math.isnan(self.seed_seconds) else self.more_seeds * self.seed_seconds

    @property
    def reason(self) -> str:
        """The verdict in a sentence."""
        runs = f"A diverged with {self.diverged_a} of {counted(self.seeds, 'seed')}, B with {self.diverged_b}"
        if self.pairs < 2:
            return f"{runs}; too few are left to compare"
        change = f"loss is {_change(self.improvement, self.low, self.high)} over {counted(self.pairs, 'seed')}"
        if self.diverged_a != self.diverged_b:
            return f"{runs}; where neither did, B's {change}"
        return f"B {self._standing()}: its {change}"

    def _standing(self) -> str:
        small = f"{abs(self.margin):g}"
        if self.verdict is Verdict.KEEP:
            return "is better than A" if self.low > 0 else f"is not worse than A by {small} or more"
        if self.verdict is Verdict.DISCARD:
            return "is worse than A" if self.high < 0 else f"is not better than A by {small} or more"
        if self.margin:
            other = f"{small} {'better' if self.margin > 0 else 'worse'}"
            return f"may be as good as A, and may be {other}"
        return "may be better than A, and may be worse"

    def __repr__(self) -> str:
        more = f"; {self.more_seeds:,} more seeds would probably decide" if self.more_seeds else ""
        return f"<{self.verdict}: {self.reason}{more}>"

    def lines(self) -> list[str]:
        """For a person."""
        lines = [f"{self.verdict:9} {self.reason}"]
        if self.pairs > 1:
            p = "p < 0.0001" if self.p < 0.0001 else f"p = {self.p:.4f}"
            looks = f"look {len(self.looks)}; interval and p hold for all looks together, at 95%"
            lines.append(f"losses    A {self.loss_a:.4f}, B {self.loss_b:.4f} nats per token; {p} ({looks})")
        lines.append(f"cost      {counted(self.trainings, 'training')}, {duration(self.seconds)} of training")
        if self.more_seeds and self.seeds + self.more_seeds >= MOST_SEEDS:
            lines.append("next      no number of seeds would decide, were the change as small as it seems")
        elif self.more_seeds:
            time = f" (about {duration(self.more_seconds)})" if self.more_seconds else ""
            lines.append(
                f"next      --seeds {self.seeds + self.more_seeds}: {counted(self.more_seeds, 'more seed')}{time} would decide in "
                f"{POWER:.0%} of cases, were the change as it seems"
            )
        return lines


def _change(improvement: float, low: float, high: float) -> str:
    """0.0123 lower (0.0100 to 0.0146)."""
    sign, word = (1, "lower") if improvement >= 0 else (-1, "higher")
    ends = sorted((sign * low, sign * high))
    texts = [f"{value:.4f}".replace("-", "−") for value in (sign * improvement, *ends)]
    return f"{texts[0]} {word} ({texts[1]} to {texts[2]})"


# --- the rule


def alpha_at(look: int) -> float:
    """2.5% at the first look, and half as much at each later one: at most 5% for all, however many there are (Bonferroni)."""
    return ALPHA / 2**look


def compare(
    losses_a: Sequence[float], losses_b: Sequence[float], looks: Sequence[int] = (), margin: float = MARGIN
) -> Judgement:
    """From losses by seed, in the order in which seeds are added; NaN where a run diverged. `looks`: earlier ones, and this one.

    KEEP: B is better than A (the interval of its improvement lies above 0). DISCARD: B is not better by the margin (the interval
    lies below it), even where it is surely better by less. A negative margin is for a change that is simpler or cheaper. KEEP: B is
    not worse by so much (the interval lies above the margin); DISCARD: B is worse (below 0, and the margin is not excluded).

    The interval is the paired t test's. Where runs diverged with one recipe alone, an exact McNemar test on these stands beside it,
    each with half of the look's alpha; and no verdict is given that the divergences speak against.
    """
    looks = tuple(looks) or (len(losses_a),)
    a, b = (np.asarray(losses[: looks[-1]], dtype=float) for losses in (losses_a, losses_b))
    gone_a, gone_b = np.isnan(a), np.isnan(b)
    only_a, only_b = int((gone_a & ~gone_b).sum()), int((gone_b & ~gone_a).sum())
    alpha = alpha_at(len(looks)) / (2 if only_a + only_b else 1)
    both = ~gone_a & ~gone_b
    gains, n = (a - b)[both], int(both.sum())
    lower, upper = sorted((0.0, margin))
    verdict = Verdict.UNDECIDED
    mean = sd = low = high = p = math.nan
    if n > 1:
        mean, sd = float(gains.mean()), float(gains.std(ddof=1))
        half = float(stats.t.ppf(1 - alpha / 2, n - 1)) * sd / math.sqrt(n)
        low, high = mean - half, mean + half
        single = 2 * float(stats.t.sf(abs(mean) * math.sqrt(n) / sd, n - 1)) if sd > 0 else float(mean == 0)
        p = min(1.0, single * ALPHA / alpha)
        kept, out = low > lower, high < upper
        if kept or out:
            verdict = Verdict.KEEP if kept and not (out and margin > 0) else Verdict.DISCARD
    verdict = _with_divergences(verdict, only_a, only_b, alpha)
    return Judgement(
        verdict=verdict,
        improvement=mean,
        low=low,
        high=high,
        p=p,
        margin=margin,
        seeds=len(a),
        pairs=n,
        diverged_a=int(gone_a.sum()),
        diverged_b=int(gone_b.sum()),
        loss_a=float(a[both].mean()) if n else math.nan,
        loss_b=float(b[both].mean()) if n else math.nan,
        looks=looks,
        sd=sd,
    )


def _with_divergences(verdict: Verdict, only_a: int, only_b: int, alpha: float) -> Verdict:
    if only_a == only_b:
        return verdict
    toward, against = (Verdict.DISCARD, Verdict.KEEP) if only_b > only_a else (Verdict.KEEP, Verdict.DISCARD)
    if verdict is against:
        return Verdict.UNDECIDED
    return toward if float(stats.binomtest(only_b, only_a + only_b).pvalue) <= alpha else verdict


def _more_seeds(mean: float, sd: float, n: int, alpha: float, margin: float) -> int:
    lower, upper = sorted((0.0, margin))

    def decides(total: int) -> bool:
        if sd == 0:
            return mean > lower or mean < upper
        critical, scale = float(stats.t.ppf(1 - alpha / 2, total - 1)), math.sqrt(total) / sd
        distance = max(mean - lower, upper - mean)
        return beyond(critical, total - 1, distance * scale) >= POWER

    return smallest(decides, n + 1) - n
