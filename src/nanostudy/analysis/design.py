"""What a study compared: its factors with their levels, its cells and blocks, and which effects it cannot separate."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np
import pandas as pd

from nanostudy.analysis.divergence import unreliable
from nanostudy.analysis.frames import Results, known, levels
from nanostudy.analysis.text_error import TextErrors, text_errors
from nanostudy.text import counted, listed, value_text

MOST_LEVELS = 20  # a setting of words with more, and more than half as many as experiments, is left out
GRID_LEVELS = 4  # a setting of numbers with more is a number: of a sweep, or of a search
FEWEST = 2  # degrees of freedom that a curve must leave
MOST_NAMES = 8  # in a sentence
TIMES = " × "  # joins the factors of an interaction
TOGETHER = "/"  # joins the settings of one factor, and their values
SAME = 1e-9  # of a correlation: less than that from 1 is rounding
DEVICE = ("device", "device_name", "precision")  # results are alike on two GPUs of one name, cuda:0 and cuda:1

Array = np.ndarray[Any, np.dtype[Any]]


@dataclass(frozen=True)
class Factor:
    """A setting, or several that always vary together."""

    settings: tuple[str, ...]
    levels: tuple[Any, ...]  # ascending; several settings' values are one text
    codes: Array  # (experiments,): the index of each experiment's level
    degree: int = 0  # of the polynomial that a number's effect is; 0: each level has an effect of its own
    log: bool = False  # a number's scale: the polynomial is in its logarithm

    @property
    def name(self) -> str:
        return TOGETHER.join(self.settings)

    @cached_property
    def coding(self) -> Array:
        """(levels, columns): the columns of the model at each level.

        Of a number those of columns_at. Otherwise sum coding, in which effects add up to 0: the first level is -1 throughout.
        """
        if self.degree:
            return self.columns_at(np.array(self.levels))
        columns = len(self.levels) - 1
        return np.vstack([-np.ones((1, columns)), np.eye(columns)])

    @property
    def coded(self) -> Array:
        """(experiments, columns)."""
        return self.coding[self.codes]

    @property
    def places(self) -> Array:
        """(experiments,): the scaled values of a number."""
        return self.scaled(np.array(self.levels))[self.codes]

    def columns_at(self, values: Array) -> Array:
        """(values, degree): powers of a number from -1 to 1 over its range, on its scale, less their means over the experiments."""
        return powers(self.scaled(values), self.degree) - powers(self.places, self.degree).mean(axis=0)

    def scaled(self, values: Array) -> Array:
        """-1 at the lowest level, 1 at the highest."""
        low, high, at = (self._on_scale(each) for each in (self.levels[0], self.levels[-1], values))
        return 2 * (at - low) / (high - low) - 1

    def unscaled(self, places: Array) -> Array:
        low, high = (float(self._on_scale(each)) for each in (self.levels[0], self.levels[-1]))
        at = low + (np.asarray(places) + 1) / 2 * (high - low)
        return np.exp(at) if self.log else at

    def _on_scale(self, values: Any) -> Array:
        return np.log(np.asarray(values, dtype=float)) if self.log else np.asarray(values, dtype=float)


@dataclass(frozen=True)
class Design:
    """The experiments that have the measure, and how they are laid out."""

    measure: str
    table: pd.DataFrame  # a row per experiment
    repeats: Mapping[str, str]  # left out, with an experiment's settings and seed: its name, and that experiment's
    y: Array  # (experiments,): the measure
    factors: tuple[Factor, ...]
    cells: Array  # (experiments,): the number of the cell, which is a combination of levels
    clusters: Array  # (experiments,): the number of the seed; an unknown seed is one of its own
    blocks: Array | None  # (experiments,): the number of the block; None: nothing is shared, or blocks are confounded
    missing: tuple[str, ...]  # sentences: what is left out or confounded
    text: TextErrors  # what a finite text contributes to the measure

    @property
    def n(self) -> int:
        return len(self.y)

    @property
    def names(self) -> list[str]:
        return list(map(str, self.table.index))

    @property
    def cell_count(self) -> int:
        return len(np.unique(self.cells))

    @property
    def seed_count(self) -> int:
        return len(np.unique(self.clusters))

    @property
    def combinations(self) -> int:
        """Of levels, whether they were run or not."""
        return math.prod(len(factor.levels) for factor in self.factors)

    @cached_property
    def complete(self) -> bool:
        """Whether every combination of levels is there."""
        return self.n > 0 and self.cell_count == self.combinations

    @cached_property
    def balanced(self) -> bool:
        """Complete, equally often, and in every block."""
        if not self.complete or len(set(np.bincount(self.cells))) > 1:
            return False
        blocks = self.blocks
        return blocks is None or combined(self.cells, blocks) == self.n == self.cell_count * len(np.unique(blocks))

    @property
    def two_level(self) -> bool:
        return bool(self.factors) and all(len(factor.levels) == 2 for factor in self.factors)

    def of_levels(self) -> Design:
        """With numbers as levels where all combinations were run repeatedly: for comparing cells, whatever a curve misses."""
        if not self.complete or self.n < 2 * self.cell_count:
            return self
        return replace(self, factors=tuple(replace(factor, degree=0) for factor in self.factors))

    @property
    def numbers(self) -> tuple[int, ...]:
        """The places of the factors that are numbers."""
        return tuple(place for place, factor in enumerate(self.factors) if factor.degree)


def design_of(results: Results, measure: str = "val_loss") -> Design:
    """The layout of the finished experiments. What cannot be compared is named in `missing`, never dropped in silence."""
    varied = results.factors
    table, missing = _measured(results, measure, varied)
    table, repeats = _without_repeats(table, varied)
    if repeats:
        missing.append(
            f"Counted once: {counted(len(repeats), 'experiment')} with another's settings and seed, such as "
            f"{next(iter(repeats))}, which is no independent replicate."
        )
    factors = _factors(table, varied, missing)
    whole = [pd.factorize(table[name])[0] for name in varied]  # what is no factor, too: a cell is one configuration
    cells = _numbered([*(factor.codes for factor in factors), *whole], len(table))
    blocks = _blocks(table, factors, cells, missing)
    y, text = table[measure].to_numpy(dtype=float), text_errors(results, measure)
    design = Design(measure, table, repeats, y, factors, cells, _clusters(table), blocks, (), text)
    return replace(design, missing=(*missing, *_incomplete(design), *_devices(table, factors)))


def _incomplete(design: Design) -> list[str]:
    """A sentence where combinations of levels are missing, or not all there equally often and in every block."""
    if not design.complete:
        there, every = max(1, combined(*(factor.codes for factor in design.factors))), design.combinations
        few = f"Without a finished experiment: {every - there:,} of the {every:,} combinations of levels."
        return [few] if there < every <= 10 * design.n else []
    counts = np.bincount(design.cells)
    if counts.min() < counts.max():
        return [f"Some combinations have more experiments than others: {counts.min()} to {counts.max()} each."]
    return [] if design.balanced else ["The combinations were not all run with the same seeds."]


def _measured(results: Results, measure: str, varied: Sequence[str]) -> tuple[pd.DataFrame, list[str]]:
    """The experiments to compare, and sentences about the others."""
    everything = results.experiments
    finished = everything[(everything["status"] == "finished").to_numpy()]
    table = finished[np.isfinite(finished[measure].to_numpy(dtype=float))]
    missing = []
    others = Counter(str(status) for status in everything["status"] if status != "finished")
    if others:
        statuses = ", ".join(f"{count:,} {status}" for status, count in others.most_common())
        missing.append(f"Left out: {sum(others.values()):,} of {counted(len(everything), 'experiment')} ({statuses}).")
    if len(finished) > len(table):
        missing.append(f"Left out: {counted(len(finished) - len(table), 'finished experiment')} without {measure}.")
    survivors = table.index.isin(unreliable(results))
    if survivors.any():
        missing.append(
            f"Left out: {counted(int(survivors.sum()), 'finished experiment')} whose settings diverged with another seed: a "
            "mean over the survivors would flatter these settings."
        )
        table = table[~survivors]
    unknown = [name for name in varied if not all(known(value) for value in table[name])]
    if unknown:
        whole = table[[all(known(value) for value in row) for row in table[unknown].itertuples(index=False)]]
        if _varying(whole, varied):
            missing.append(
                f"Left out: {counted(len(table) - len(whole), 'experiment')} whose {listed(unknown, MOST_NAMES)} is unknown."
            )
            table = whole
    return table, missing


def _without_repeats(table: pd.DataFrame, varied: Sequence[str]) -> tuple[pd.DataFrame, dict[str, str]]:
    """The first of the experiments with equal settings and seed, whose results are equal up to rounding; each other with its first."""
    first: dict[tuple[Any, ...], str] = {}
    repeats: dict[str, str] = {}
    keys = table[[*varied, "seed"]].itertuples(index=False, name=None)
    for name, seed, key in zip(map(str, table.index), table["seed"], keys, strict=True):
        if known(seed) and first.setdefault(key, name) != name:
            repeats[name] = first[key]
    return table.drop(index=list(repeats)), repeats


def _varying(table: pd.DataFrame, names: Sequence[str]) -> dict[str, list[Any]]:
    """The levels of the settings that have several."""
    by_name = {name: levels(table[name]) for name in names}
    return {name: values for name, values in by_name.items() if len(values) > 1}


def _factors(table: pd.DataFrame, varied: Sequence[str], missing: list[str]) -> tuple[Factor, ...]:
    """The settings that vary, aliases as one, without those that others determine. Adds sentences to `missing`."""
    varying = _varying(table, varied)
    for name in varied:
        if name not in varying and len(table):
            only = [value_text(value) for value in levels(table[name])]
            missing.append(f"{name} cannot be judged: its only value with results is {listed(only) or 'unknown'}.")
    factors: list[Factor] = []
    for name, values in varying.items():
        if not all(known(value) for value in table[name]):
            missing.append(f"{name} is left out: some experiments' values are unknown.")
        elif not _is_number(values) and len(values) > max(MOST_LEVELS, len(table) / 2):
            several = f"{len(values)} values in {len(table)} experiments"
            missing.append(f"{name} is left out: it has {several}, too many to compare.")
        else:
            factor = _factor(name, values, table)
            twin = next((i for i, other in enumerate(factors) if _twins(other, factor)), None)
            if twin is None:
                factors.append(factor)
            else:
                factors[twin] = _together(factors[twin], factor)
    for factor in factors:
        if len(factor.settings) > 1:
            names = " and ".join(factor.settings)
            missing.append(f"{names} always vary together: their effects cannot be separated, and count as one.")
    kept = []
    for factor in factors:
        finer = [other.name for other in factors if other is not factor and _determines(other, factor)]
        if finer:
            why = f"its effect cannot be separated from that of {finer[0]}"
            missing.append(f"{factor.name} follows from {finer[0]}: {why}.")
        else:
            kept.append(factor)
    return _with_degree(kept, len(table))


def _factor(name: str, values: list[Any], table: pd.DataFrame) -> Factor:
    index = {value: i for i, value in enumerate(values)}
    factor = Factor((name,), tuple(values), np.array([index[value] for value in table[name]]))
    return replace(factor, degree=1, log=_in_ratios(np.array(values, dtype=float))) if _is_number(values) else factor


def _is_number(values: Sequence[Any]) -> bool:
    numbers = all(isinstance(value, (int, float)) and not isinstance(value, bool) for value in values)
    return numbers and len(values) > GRID_LEVELS


def _in_ratios(values: Array) -> bool:
    """Whether positive values lie more evenly over their range in logarithms."""
    if values.min() <= 0:
        return False
    even = (np.arange(len(values)) + 0.5) / len(values)

    def uneven(at: Array) -> float:
        return float(np.abs((at - at[0]) / (at[-1] - at[0]) - even).mean())

    return uneven(np.log(values)) < uneven(values)


def _with_degree(factors: Sequence[Factor], experiments: int) -> tuple[Factor, ...]:
    """Numbers as parabolas where the experiments suffice for them, otherwise as straight lines."""
    for degree, share in ((2, 0.5), (1, 0.0)):
        columns = 1 + sum(degree if factor.degree else len(factor.levels) - 1 for factor in factors)
        if experiments - columns >= max(FEWEST, columns * share):
            break
    return tuple(replace(factor, degree=degree) if factor.degree else factor for factor in factors)


def powers(places: Array, degree: int) -> Array:
    """(places, degree), from the first power."""
    return np.stack([places**power for power in range(1, degree + 1)], axis=1)


def _twins(a: Factor, b: Factor) -> bool:
    """Whether the two always vary together. Of two numbers that hardly repeat, that is a straight line through all points."""
    if a.degree and b.degree:
        return bool(abs(np.corrcoef(a.places, b.places)[0, 1]) > 1 - SAME)
    return _determines(a, b) and _determines(b, a)


def _determines(a: Factor, b: Factor) -> bool:
    """Whether the level of `a` determines that of `b`, and not for want of levels that repeat."""
    if a.degree and len(a.levels) > len(a.codes) / 2:
        return False
    return combined(a.codes, b.codes) == len(a.levels)


def _together(a: Factor, b: Factor) -> Factor:
    if a.degree:  # on the scale of the first
        return replace(a, settings=(*a.settings, *b.settings))
    of_b = {int(code): b.levels[b.codes[row]] for row, code in enumerate(a.codes)}
    both = tuple(f"{value_text(level)}{TOGETHER}{value_text(of_b[i])}" for i, level in enumerate(a.levels))
    return Factor((*a.settings, *b.settings), both, a.codes)


def combined(*codes: Array) -> int:
    """How many combinations of the codes there are."""
    return int(_numbered(codes, 0).max(initial=-1)) + 1


def _numbered(codes: Sequence[Array], n: int) -> Array:
    """The combinations of the codes as numbers from 0, (n,)."""
    if not codes:
        return np.zeros(n, dtype=int)
    return np.unique(np.stack(codes), axis=1, return_inverse=True)[1].reshape(-1)


# --- devices


def _devices(table: pd.DataFrame, factors: Sequence[Factor]) -> list[str]:
    """A sentence where the experiments ran on different kinds of device, whose effect may look like a setting's."""
    kinds = [
        ", ".join(str(value).split(":")[0] for value in row if known(value))
        for row in table[[name for name in DEVICE if name in table]].to_numpy()
    ]
    names = sorted(set(kinds))
    if len(names) < 2 or "" in names:
        return []
    codes = np.array([names.index(kind) for kind in kinds])
    bound = [factor.name for factor in factors if not _separable(codes, [factor])]
    uneven = [factor.name for factor in factors if factor.name not in bound and not _evenly(codes, factor)]
    ran = f"The experiments ran on different kinds of device ({'; '.join(names)})"
    if bound:
        which = f"{listed(bound, MOST_NAMES)} {'varies' if len(bound) == 1 else 'vary'}"
        return [f"{ran}, and {which} only with the device: their effects cannot be separated."]
    if uneven:
        why = "part of that effect may be the device's"
        return [f"{ran}, and {listed(uneven, MOST_NAMES)} was spread unevenly over them: {why}."]
    return [f"{ran}; every setting was tried equally often on each."]


def _evenly(codes: Array, factor: Factor) -> bool:
    """Whether each kind has the same share of every level."""
    shares = pd.crosstab(codes, factor.codes, normalize="index").to_numpy()
    return bool(np.allclose(shares, shares[0]))


# --- clusters and blocks


def _clusters(table: pd.DataFrame) -> Array:
    """Experiments of one seed draw alike, so that they are no independent evidence."""
    own = [str(seed) if known(seed) else f"unknown {row}" for row, seed in enumerate(table["seed"])]
    return pd.factorize(pd.Series(own, dtype=object))[0]


def _blocks(table: pd.DataFrame, factors: Sequence[Factor], cells: Array, missing: list[str]) -> Array | None:
    """The seeds, where the factors' effects can still be estimated within them. Adds sentences to `missing`.

    Experiments of one seed share random numbers: what affects all of them alike is no effect of a setting, and blocks take it out.
    """
    if not all(known(seed) for seed in table["seed"]):
        return None
    seeds = pd.factorize(table["seed"])[0]
    if not _shares(seeds, cells):
        return None
    if _separable(seeds, factors):
        return seeds
    bound = [factor.name for factor in factors if not _separable(seeds, [factor])]
    missing.append(
        f"{listed(bound, MOST_NAMES) or 'The factors together'} {'varies' if len(bound) == 1 else 'vary'} only together with "
        f"the seed: the seed's effect cannot be separated from {'its' if len(bound) == 1 else 'theirs'}, and counts as noise."
    )
    return None


def _shares(seeds: Array, cells: Array) -> bool:
    """Whether there is more than one seed, and one that several cells have."""
    return 1 < len(set(seeds)) < combined(seeds, cells)


def _separable(blocks: Array, factors: Sequence[Factor]) -> bool:
    """Whether all main effects can be estimated beside the blocks."""
    if not factors:
        return True
    columns = np.hstack([factor.coded for factor in factors])
    within = columns - group_means(columns, blocks)[blocks]
    return bool(np.linalg.matrix_rank(within) == np.linalg.matrix_rank(columns - columns.mean(axis=0)))


def group_means(values: Array, groups: Array) -> Array:
    """(groups, ...): the mean over each group of the rows of values; groups are numbers from 0."""
    sums = np.zeros((int(groups.max()) + 1, *values.shape[1:]))
    np.add.at(sums, groups, values)
    return np.asarray((sums.T / np.bincount(groups)).T)
