"""How many seeds tell a difference of losses, from the variances that a study shows: power by the noncentral t distribution."""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
import pandas as pd
from scipy import optimize, special, stats

from nanostudy.analysis.design import Array
from nanostudy.analysis.frames import Results, known
from nanostudy.analysis.intervals import satterthwaite
from nanostudy.analysis.ranking import tied_settings

DIFFERENCE = 0.01  # nats per token
POWER = 0.8
ALPHA = 0.05  # two-sided
MOST_SEEDS = 100_000
NEEDED = (
    *("settings", "name", "tied", "mean", "n", "sd"),
    *("paired_sd", "paired", "paired_low", "paired_high"),
    *("unpaired_sd", "unpaired", "unpaired_low", "unpaired_high", "seconds"),
)


# --- one comparison


def power(seeds: int, difference: float, sd: float, df: float | None = None, alpha: float = ALPHA) -> float:
    """Of a two-sided t test of a mean difference, whose standard error is sd / sqrt(seeds); df: seeds - 1 unless given."""
    df = seeds - 1 if df is None else df
    if sd == 0:
        return 1.0 if difference else 0.0
    critical, shift = float(stats.t.ppf(1 - alpha / 2, df)), abs(difference) * math.sqrt(seeds) / sd
    return beyond(critical, df, shift) + beyond(critical, df, -shift)


def beyond(critical: float, df: float, shift: float) -> float:
    """P(T > critical) of a noncentral t. Far out, where SciPy's series ends, T is normal."""
    if abs(shift) > 30:
        return float(stats.norm.sf(critical - shift))
    return float(np.nan_to_num(stats.nct.sf(critical, df, shift)))


def seeds_needed(difference: float, sd: float, df_per_seed: float = 1.0, alpha: float = ALPHA) -> int:
    """The fewest seeds of each setting, from 2, with POWER; `df_per_seed` is 1 for paired seeds, up to 2 for others.

    MOST_SEEDS where more would be needed.
    """
    return smallest(lambda n: power(n, difference, sd, df_per_seed * (n - 1), alpha) >= POWER)


def smallest(enough: Callable[[int], bool], least: int = 2) -> int:
    """The smallest number from `least` to MOST_SEEDS that is enough, where every larger one is, too; MOST_SEEDS if none is."""
    few, many = least, least
    while many < MOST_SEEDS and not enough(many):
        few, many = many + 1, min(2 * many, MOST_SEEDS)
    return bisect_left(range(many), True, lo=few, key=enough)


# --- variances


def moderated(variances: Array, df: Array) -> tuple[Array, Array]:
    """Each variance drawn towards what all have in common, as far as they look alike, and its degrees of freedom.

    Smyth (2004), Linear models and empirical Bayes methods for assessing differential expression, section 6.2: variances scatter
    around a common one as a scaled inverse chi-squared does, with degrees of freedom estimated from the scatter of their logarithms.
    """
    use = (df > 0) & (variances > 0)
    if use.sum() < 3:
        return variances, df
    half = df[use] / 2
    logs = np.log(variances[use]) - special.digamma(half) + np.log(half)
    excess = float(logs.var(ddof=1) - special.polygamma(1, half).mean())
    pooled = float((variances[use] * df[use]).sum() / df[use].sum())
    if excess <= 1e-4:  # no more scatter than chance makes
        return np.full(len(variances), pooled), np.full(len(variances), float(df[use].sum()))
    prior_df = 2 * float(optimize.brentq(lambda half: special.polygamma(1, half) - excess, 1e-3, 1e5))
    prior = float(np.exp(logs.mean() + special.digamma(prior_df / 2) - math.log(prior_df / 2)))
    drawn = (prior_df * prior + df * np.nan_to_num(variances)) / (prior_df + df)
    return drawn, np.minimum(prior_df + df, df[use].sum())


def sd_interval(sd: float, df: float) -> tuple[float, float]:
    """95%, from the chi-squared distribution of a normal sample's variance; the whole line without degrees of freedom."""
    if not df > 0:
        return 0.0, math.inf
    low, high = (float(stats.chi2.ppf(p, df)) for p in (0.975, 0.025))
    return sd * math.sqrt(df / low), sd * math.sqrt(df / high) if high > 0 else math.inf


# --- a study


@dataclass(frozen=True)
class Seeds:
    """How many seeds tell `difference` nats per token with `power`, two-sided at 5%, for each setting against the best."""

    difference: float
    power: float
    best: str  # in words
    n: int  # its seeds
    sd: float  # of one experiment of it
    table: pd.DataFrame  # columns NEEDED; the lowest mean first. `tied`: with the best; `seconds`: a worker's time for one more seed of both
    device: str | None  # of that worker
    threads: float | None
    missing: str  # why the table is empty


def by_seed(results: Results, measure: str = "val_loss") -> pd.DataFrame:
    """Settings in words (rows) by seeds (columns), NaN without a finished experiment; the lowest mean first.

    Settings that diverged with any seed come last; attrs["diverged"] has them. Experiments without a known seed are numbered within their settings.
    """
    table, cells = results.experiments, results.cells()
    ended = table[table["status"].isin(["finished", "diverged"])]
    values = ended[measure].where(ended["status"] == "finished")
    ended = pd.DataFrame({"cell": cells[ended.index], "seed": ended["seed"], "value": values})
    if not all(known(seed) for seed in ended["seed"]):
        ended["seed"] = ended.groupby("cell").cumcount()
    wide = ended.groupby(["cell", "seed"], sort=False)["value"].first().unstack()
    wide = wide.reindex(columns=sorted(wide.columns))
    diverged = set(cells[table.index[table["status"] == "diverged"]])
    order = pd.DataFrame({"diverged": [cell in diverged for cell in wide.index], "mean": wide.mean(axis=1).to_numpy()})
    wide = wide.iloc[order.sort_values(["diverged", "mean"], kind="stable").index]
    wide.attrs["diverged"] = sorted(diverged)
    return wide


def seeds(results: Results, difference: float = DIFFERENCE) -> Seeds:
    """From the losses of the finished experiments. Each variance counts as much as its seeds say; see `moderated`."""
    losses = by_seed(results)
    losses = losses[losses.notna().any(axis=1)]
    empty = pd.DataFrame({name: pd.Series(dtype=object if name in NEEDED[:2] else float) for name in NEEDED})
    found = Seeds(difference, POWER, "", 0, math.nan, empty, None, None, "No experiment has finished.")
    if losses.empty:
        return found
    best = str(losses.index[0])
    device, threads = (results.finished[name].iloc[0] for name in ("device", "threads"))
    counts = losses.notna().sum(axis=1).to_numpy()
    variances, dfs = _moderated_rows(losses)
    found = replace(found, best=best, n=int(counts[0]), sd=math.sqrt(variances[0]), device=device, threads=threads)
    if len(losses) == 1:
        return replace(found, missing="There is one setting, and no other to tell it from.")
    if not (counts > 1).any():
        why = "No setting ran with two seeds. With more (seeds=1,2,3), equal settings show how much seeds differ."
        return replace(found, sd=math.nan, missing=why)
    differences = losses.iloc[1:] - losses.iloc[0]
    paired, paired_df = _moderated_rows(differences)
    pairs = differences.notna().sum(axis=1).to_numpy()
    paired_df = np.minimum(paired_df, 4 * np.maximum(pairs - 1, 0))  # half of a difference's variance is the best's own
    cells, tied, cost = results.cells(), tied_settings(results), seconds_of_one(results)
    name_of = {cell: name for name, cell in reversed(list(cells.items()))}
    rows = []
    for i, cell in enumerate(losses.index[1:]):
        own, own_df = variances[[0, i + 1]], dfs[[0, i + 1]]
        both = float(own.sum())
        sd_df = satterthwaite(own, own_df) if own_df.min() > 0 and both > 0 else 0.0
        per_seed = satterthwaite(own, (1, 1)) if both > 0 else 2.0  # Welch
        about = (
            cell,
            name_of[cell],
            cell in tied,
            float(losses.loc[cell].mean()),
            int(counts[i + 1]),
            math.sqrt(own[1]),
        )
        of_pairs = _counts(difference, math.sqrt(paired[i]), paired_df[i], 1.0)
        of_others = _counts(difference, math.sqrt(both), sd_df, per_seed)
        rows.append((*about, *of_pairs, *of_others, cost.get(best, math.nan) + cost.get(cell, math.nan)))
    return replace(found, table=pd.DataFrame(rows, columns=list(NEEDED)), missing="")


def _moderated_rows(losses: pd.DataFrame) -> tuple[Array, Array]:
    """The moderated variance of each row, and its degrees of freedom."""
    variances = losses.var(axis=1, ddof=1).to_numpy(dtype=float)
    return moderated(np.nan_to_num(variances), np.maximum(losses.notna().sum(axis=1).to_numpy() - 1, 0))


def _counts(difference: float, sd: float, df: float, per_seed: float) -> tuple[float, ...]:
    """(sd, seeds, and these at the ends of the sd's 95% interval); NaN where nothing shows the sd."""
    if not df > 0:
        return (math.nan,) * 4
    low, high = sd_interval(sd, df)
    return sd, *(seeds_needed(difference, one, per_seed) for one in (sd, low, high))


def seconds_of_one(results: Results) -> dict[str, float]:
    """Of each setting, a worker's time for one experiment: members of a stack share it."""
    table = results.finished
    time = table["seconds"] / pd.to_numeric(table["members"], errors="coerce").fillna(1).clip(lower=1)
    return dict(time.groupby(results.cells()[table.index], sort=False).mean())
