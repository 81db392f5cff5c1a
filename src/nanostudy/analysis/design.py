"""What a study compared: factors with their levels, cells, blocks, and what stands in the way of telling them apart."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd

from nanostudy.analysis.frames import Results, known, levels, shown
from nanostudy.text import counted

MOST_LEVELS = 20  # of a factor that has more levels than half the experiments: above, it is no factor but a search
MOST_NAMES = 8  # that a sentence lists
TIMES = " × "  # between the factors of an interaction
TOGETHER = "/"  # between the settings of one factor, and between their values

Array = np.ndarray[Any, np.dtype[Any]]


@dataclass(frozen=True)
class Factor:
    """A setting, or several that always vary together."""

    settings: tuple[str, ...]
    levels: tuple[Any, ...]  # ascending; of several settings their values as one text
    codes: Array  # of each experiment, the place of its level

    @property
    def name(self) -> str:
        return TOGETHER.join(self.settings)


@dataclass(frozen=True)
class Design:
    """The experiments that have the measure, and how they are laid out."""

    measure: str
    table: pd.DataFrame  # those experiments
    repeats: Mapping[str, str]  # others with the settings and the seed of one of them, and of which
    y: Array  # their measure
    factors: tuple[Factor, ...]
    cells: Array  # of each experiment, the number of its cell: equal levels of all factors
    blocks: (
        Array | None
    )  # of each experiment, the number of its block; None: nothing is shared, or it cannot be separated
    block_words: str  # what the blocks are
    shared: Array | None  # seeds that several cells share and that vary together with factors: not separable from them
    complete: bool  # every combination of levels is there
    balanced: bool  # complete, equally often, and in every block
    missing: tuple[str, ...]  # sentences

    @property
    def n(self) -> int:
        return len(self.y)

    @property
    def cell_count(self) -> int:
        return len(np.unique(self.cells))

    @property
    def two_level(self) -> bool:
        return bool(self.factors) and all(len(factor.levels) == 2 for factor in self.factors)


def design_of(results: Results, measure: str = "val_loss") -> Design:
    """Pure. What cannot be compared is named in `missing`, never dropped in silence."""
    asked = results.factors
    table, told = _measured(results, measure, asked)
    table, repeats = _without_repeats(table, asked)
    if repeats:
        told.append(
            f"Counted once: {counted(len(repeats), 'experiment')} with another's settings and seed, such as "
            f"{next(iter(repeats))}; that is no independent replicate."
        )
    factors, told = _factors(table, asked, told)
    cells = _numbered([factor.codes for factor in factors], len(table))
    blocks, words, shared, told = _blocks(table, factors, cells, told)
    combinations = math.prod(len(factor.levels) for factor in factors)
    counts = np.unique(cells, return_counts=True)[1]
    complete = len(counts) == combinations and len(table) > 0
    even = complete and len(set(counts)) == 1
    if blocks is not None and even:
        crossed = np.unique(np.stack([cells, blocks]), axis=1).shape[1]
        even = crossed == len(table) == len(counts) * len(np.unique(blocks))
    if not complete and len(table) and combinations <= 10 * len(table):
        told.append(
            f"Without a finished experiment: {combinations - len(counts):,} of the {combinations:,} combinations of levels."
        )
    elif complete and not even and min(counts) < max(counts):
        told.append(f"The combinations were tried unequally often: {min(counts)} to {max(counts)} experiments each.")
    elif complete and not even:
        told.append(f"The combinations were not all run with the same {words}.")
    told += _where(table, factors)
    y = table[measure].to_numpy(dtype=float)
    return Design(measure, table, repeats, y, factors, cells, blocks, words, shared, complete, even, tuple(told))


def _measured(results: Results, measure: str, asked: Sequence[str]) -> tuple[pd.DataFrame, list[str]]:
    """The experiments to compare, and sentences about the others."""
    everything = results.experiments
    finished = everything[(everything["status"] == "finished").to_numpy()]
    table = finished[np.isfinite(finished[measure].to_numpy(dtype=float))]
    told = []
    others = Counter(str(status) for status in everything["status"] if status != "finished")
    if others:
        why = ", ".join(f"{count:,} {status}" for status, count in others.most_common())
        told.append(f"Left out: {sum(others.values()):,} of {counted(len(everything), 'experiment')} ({why}).")
    if len(finished) > len(table):
        told.append(f"Left out: {counted(len(finished) - len(table), 'finished experiment')} without {measure}.")
    unknown = [name for name in asked if not all(known(value) for value in table[name])]
    if unknown:
        whole = table[[all(known(value) for value in row) for row in table[unknown].itertuples(index=False)]]
        if len(levels_in(whole, asked)) >= 1:
            told.append(
                f"Left out: {counted(len(table) - len(whole), 'experiment')} whose {_listed(unknown)} is not known."
            )
            table = whole
    return table, told


def _without_repeats(table: pd.DataFrame, asked: Sequence[str]) -> tuple[pd.DataFrame, dict[str, str]]:
    """The same settings and seed give the same result, up to rounding: the first counts. And the others, each with its first."""
    first: dict[tuple[Any, ...], str] = {}
    repeats: dict[str, str] = {}
    keys = table[[*asked, "seed", "source"]].itertuples(index=False, name=None)
    for name, seed, key in zip(map(str, table.index), table["seed"], keys, strict=True):
        if known(seed) and first.setdefault(key, name) != name:
            repeats[name] = first[key]
    return table.drop(index=list(repeats)), repeats


def levels_in(table: pd.DataFrame, names: Sequence[str]) -> dict[str, list[Any]]:
    """Of those settings that vary there, the values."""
    found = {name: levels(table[name]) for name in names}
    return {name: values for name, values in found.items() if len(values) > 1}


def _factors(table: pd.DataFrame, asked: Sequence[str], told: list[str]) -> tuple[tuple[Factor, ...], list[str]]:
    """Settings that vary, aliases together; without those that others decide."""
    varying = levels_in(table, asked)
    told = list(told)
    for name in asked:
        if name not in varying and len(table):
            only = [shown(value) for value in levels(table[name])]
            told.append(f"{name} cannot be judged: of its values only {_listed(only) or 'unknown ones'} have results.")
    factors = []
    for name, values in varying.items():
        place = {value: i for i, value in enumerate(values)}
        if len(values) > max(MOST_LEVELS, len(table) / 2):
            told.append(
                f"{name} is left out: it has {len(values)} values in {len(table)} experiments, too many to compare."
            )
            continue
        if not all(known(value) for value in table[name]):
            told.append(f"{name} is left out: it is not known of every experiment.")
            continue
        factors.append(Factor((name,), tuple(values), np.array([place[value] for value in table[name]])))
    merged: list[Factor] = []
    for factor in factors:
        twin = next((i for i, other in enumerate(merged) if _decides(other, factor) and _decides(factor, other)), None)
        if twin is None:
            merged.append(factor)
        else:
            merged[twin] = _together(merged[twin], factor)
    for factor in merged:
        if len(factor.settings) > 1:
            names = " and ".join(factor.settings)
            told.append(f"{names} always vary together: their effects cannot be told apart, and stand as one.")
    kept = []
    for factor in merged:
        finer = [other.name for other in merged if other is not factor and _decides(other, factor)]
        if finer:
            told.append(f"{factor.name} follows from {finer[0]}: its effect cannot be told from that of {finer[0]}.")
        else:
            kept.append(factor)
    return tuple(kept), told


def _decides(a: Factor, b: Factor) -> bool:
    """Whether the level of `a` says that of `b`."""
    return len(np.unique(np.stack([a.codes, b.codes]), axis=1).T) == len(a.levels)


def _together(a: Factor, b: Factor) -> Factor:
    said = {int(code): b.levels[b.codes[row]] for row, code in enumerate(a.codes)}
    both = tuple(f"{shown(level)}{TOGETHER}{shown(said[i])}" for i, level in enumerate(a.levels))
    return Factor((*a.settings, *b.settings), both, a.codes)


def _numbered(codes: Sequence[Array], n: int) -> Array:
    """Each row of codes as one number."""
    if not codes:
        return np.zeros(n, dtype=int)
    return np.unique(np.stack(codes), axis=1, return_inverse=True)[1].reshape(-1)


# --- where it ran

KIND = ("device", "device_name", "precision")  # of two GPUs of one name, cuda:0 and cuda:1, results are alike


def _where(table: pd.DataFrame, factors: Sequence[Factor]) -> list[str]:
    """A sentence where the experiments ran on different kinds of device: what a kind does may look like a setting's doing."""
    kinds = [
        ", ".join(str(value).split(":")[0] for value in row if known(value))
        for row in table[[name for name in KIND if name in table]].to_numpy()
    ]
    names = sorted(set(kinds))
    if len(names) < 2 or "" in names:
        return []
    codes = np.array([names.index(kind) for kind in kinds])
    bound = [factor.name for factor in factors if not _separable(codes, [factor])]
    uneven = [factor.name for factor in factors if factor.name not in bound and not _evenly(codes, factor)]
    ran = f"The experiments ran on different kinds of device ({'; '.join(names)})"
    if bound:
        return [f"{ran}, and {_listed(bound)} only together with them: what the device does cannot be told from that."]
    if uneven:
        return [
            f"{ran}, on which {_listed(uneven)} was spread unevenly: a part of that effect may be the device's doing."
        ]
    return [f"{ran}; every setting was tried equally often on each."]


def _evenly(codes: Array, factor: Factor) -> bool:
    """Whether each kind has the same share of every level."""
    counts = np.zeros((int(codes.max()) + 1, len(factor.levels)))
    np.add.at(counts, (codes, factor.codes), 1)
    shares = counts / counts.sum(axis=1, keepdims=True)
    return bool(np.allclose(shares, shares[0]))


# --- blocks


def _blocks(
    table: pd.DataFrame, factors: Sequence[Factor], cells: Array, told: list[str]
) -> tuple[Array | None, str, Array | None, list[str]]:
    """(blocks, what they are, seeds that cannot be separated from factors, sentences).

    Experiments of one seed share random numbers, those of one source a machine and a program: what that does to all of
    them alike is no effect of a setting. It is taken out where the factors can still be told apart within blocks.
    """
    told = list(told)
    sources = pd.factorize(table["source"])[0]
    seeds = pd.factorize(table["seed"])[0] if all(known(seed) for seed in table["seed"]) else None
    if seeds is not None and not _shares(seeds, cells):
        seeds = None
    tries = []
    if len(set(sources)) > 1:
        tries += [(_numbered([sources, seeds], len(table)), "seeds of each source")] if seeds is not None else []
        tries.append((sources, "sources"))
    elif seeds is not None:
        tries.append((seeds, "seeds"))
    for blocks, words in tries:
        if _separable(blocks, factors):
            return blocks, words, None, told
    if len(set(sources)) > 1:
        told.append("The sources of the numbers differ in settings, too: what differs may be the source's doing.")
    if seeds is None or not factors:
        return None, "", None, told
    bound = [factor.name for factor in factors if not _separable(seeds, [factor])]
    told.append(
        f"{_listed(bound) or 'The factors together'} {'varies' if len(bound) == 1 else 'vary'} only together with the seed: "
        "what a seed does cannot be told from what they do, and counts as noise."
    )
    return None, "", seeds, told


def _shares(seeds: Array, cells: Array) -> bool:
    """Whether there is more than one seed, and one that several cells have."""
    pairs = np.unique(np.stack([seeds, cells]), axis=1)
    return len(set(seeds)) > 1 and len(pairs.T) > len(set(seeds))


def _separable(blocks: Array, factors: Sequence[Factor]) -> bool:
    """Whether all main effects can be estimated beside the blocks."""
    columns = np.hstack([coded(factor) for factor in factors]) if factors else np.zeros((len(blocks), 0))
    within = columns - group_means(columns, blocks)[blocks]
    full = np.linalg.matrix_rank(columns - columns.mean(axis=0)) if columns.size else 0
    return bool(columns.size == 0 or np.linalg.matrix_rank(within) == full)


def group_means(columns: Array, groups: Array) -> Array:
    """The mean of each column in each group; groups are numbers from 0."""
    sums = np.zeros((int(groups.max()) + 1, columns.shape[1]))
    np.add.at(sums, groups, columns)
    return sums / np.bincount(groups)[:, None]


# --- coding


def coding(count: int) -> Array:
    """Sum coding (count, count - 1): the first level is -1 throughout, so that coefficients add up to nothing over levels."""
    return np.vstack([-np.ones((1, count - 1)), np.eye(count - 1)])


def coded(factor: Factor) -> Array:
    return coding(len(factor.levels))[factor.codes]


def _listed(names: Sequence[str]) -> str:
    shown_ = list(names[:MOST_NAMES])
    if len(names) > MOST_NAMES:
        shown_.append(f"{len(names) - MOST_NAMES} more")
    return " and ".join([", ".join(shown_[:-1]), shown_[-1]]) if len(shown_) > 1 else "".join(shown_)
