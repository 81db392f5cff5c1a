"""The least-squares fit of what a study compared: cell means, or main effects and interactions as far as they can be separated."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from nanostudy.analysis.design import TIMES, Array, Design, combined

TOLERANCE = 1e-8  # relative to a column's length: what is left of it beside others, and counts as nothing
ALIAS = 0.5  # of an interaction's size: what another term's estimate must contain of it to bear its name, too
NEGLIGIBLE = 1e-12  # relative to the largest value: smaller differences are rounding


@dataclass(frozen=True)
class Term:
    """A main effect or an interaction, and its columns."""

    factors: tuple[int, ...]  # their indices in the design
    name: str
    columns: slice


@dataclass(frozen=True)
class Fit:
    """A least-squares fit of the design's measure."""

    design: Design
    order: int  # 1: main effects alone; 2: two-way interactions, too; the number of factors: means of the cells
    terms: tuple[Term, ...]
    dropped: tuple[str, ...]  # in words, interactions that cannot be estimated
    aliases: Mapping[str, tuple[str, ...]]  # of a term: the two-way interactions that its estimate contains, too
    columns: Array  # (experiments, parameters): mean, blocks, terms
    offset: int  # columns before the terms
    inverse: Array  # (parameters, experiments): of the columns
    span: Array  # (experiments, rank): an orthonormal basis of the columns
    residuals: Array
    row_space: Array | None  # the projection on what can be estimated; None: everything can

    @property
    def of_cells(self) -> bool:
        """Whether it is the means of the cells, beside the blocks."""
        design = self.design
        return design.complete and not design.numbers and self.order >= len(design.factors) and not self.dropped

    @property
    def mains(self) -> list[Term]:
        """The main effects of factors that are no numbers: those have curves (shapes.py)."""
        return [one for one in self.terms if len(one.factors) == 1 and one.factors[0] not in self.design.numbers]

    @property
    def residual_df(self) -> int:
        return self.design.n - self.span.shape[1]

    @property
    def sd(self) -> float:
        """Of the residuals."""
        return math.sqrt(float(self.residuals @ self.residuals) / self.residual_df)

    @property
    def shows_seeds(self) -> bool:
        """Whether the residuals hold what seeds do: not where each effect of a seed is an effect of its settings, too."""
        clusters = self.design.clusters == np.arange(self.design.seed_count)[:, None]
        return self.design.seed_count > np.linalg.matrix_rank(clusters @ self.span)

    @property
    def negligible(self) -> float:
        """Smaller differences of the measure are rounding."""
        return NEGLIGIBLE * float(np.abs(self.design.y).max(initial=0.0))

    @cached_property
    def params(self) -> Array:
        return np.asarray(self.inverse @ self.design.y)

    @property
    def mean(self) -> Array:
        """The weights of the mean of all, blocks weighted equally."""
        weights = np.zeros(self.columns.shape[1])
        weights[0] = 1.0
        weights[1 : self.offset] = 1 / self.offset
        return weights

    @cached_property
    def clusters(self) -> list[tuple[Array, Array, Array]]:
        """Of each cluster its rows, and the directions and eigenvalues of its block of the hat matrix."""
        rows = [np.flatnonzero(self.design.clusters == c) for c in range(self.design.seed_count)]
        parts = [np.linalg.svd(self.span[own], full_matrices=False)[:2] for own in rows]
        return [(own, sides, sizes**2) for own, (sides, sizes) in zip(rows, parts, strict=True)]

    def estimable(self, weights: Array) -> bool:
        """Whether the experiments determine this function of the parameters (Searle, 1971, Linear models, section 5.4)."""
        if self.row_space is None:
            return True
        return bool(np.linalg.norm(weights - self.row_space @ weights) <= TOLERANCE * np.linalg.norm(weights))

    def shares(self) -> dict[str, float]:
        """The share of the measure's variance that each main effect and two-way interaction explains.

        Eta squared of type II (Langsrud, 2003).

        A term's sum of squares is what it explains beside all terms that do not contain it. On a balanced design this is its
        part of the total, and all parts and the rest add up to 1. The blocks' share has the name `seeds`.
        """
        if not self.design.n:
            return {}
        y = self.design.y - self.design.y.mean()
        total = float(y @ y)
        small = [term for term in self.terms if len(term.factors) <= 2]
        if total <= self.design.n * self.negligible**2:
            return {term.name: 0.0 for term in small}
        gram, moments = self.columns.T @ self.columns, self.columns.T @ y

        def explained(columns: Sequence[int]) -> float:
            inner = gram[np.ix_(columns, columns)]
            inverse = np.linalg.pinv(inner, hermitian=True) if self.row_space is not None else np.linalg.inv(inner)
            return float(moments[columns] @ inverse @ moments[columns])

        def columns_of(terms: Iterable[Term]) -> list[int]:
            return [*range(self.offset), *(c for t in terms for c in range(t.columns.start, t.columns.stop))]

        shares = {}
        for term in small:
            beside = [t for t in small if not set(term.factors) <= set(t.factors)]
            shares[term.name] = (explained(columns_of([*beside, term])) - explained(columns_of(beside))) / total
        if self.design.blocks is not None:
            terms = [0, *columns_of(small)[self.offset :]]
            shares["seeds"] = (explained(columns_of(small)) - explained(terms)) / total
        return {name: max(0.0, share) for name, share in shares.items()}


def fit_design(design: Design, order: int) -> Fit:
    """Blocks and main effects first, then the interactions that are independent of all before; the others are named in `dropped`.

    Main effects may depend on each other: `estimable` says which functions of them the experiments determine.
    """
    basis = _Basis(design.n)
    basis.add(np.ones((design.n, 1)))
    if design.blocks is not None:
        for block in range(1, int(design.blocks.max()) + 1):
            basis.add((design.blocks == block).astype(float)[:, None])
    offset, terms, dropped = basis.count, [], []
    indices = range(len(design.factors))
    groups = itertools.chain.from_iterable(itertools.combinations(indices, size) for size in range(1, order + 1))
    for group in groups:
        factors = [design.factors[i] for i in group]
        if len(group) > 1 and any(factor.degree for factor in factors):
            continue  # numbers add up: shapes.py tests whether that leaves more than noise
        name = TIMES.join(factor.name for factor in factors)
        start = basis.count
        if basis.add(_product([factor.coded for factor in factors]), partly=len(group) == 1):
            terms.append(Term(group, name, slice(start, basis.count)))
        else:
            there, every = combined(*(f.codes for f in factors)), math.prod(len(f.levels) for f in factors)
            few = f"{there} of its {every} combinations have results"
            dropped.append(f"{name} ({few if there < every else 'confounded with others'})")
    columns, span = basis.columns, basis.span
    inverse = np.linalg.pinv(columns)
    return Fit(
        design,
        order,
        tuple(terms),
        tuple(dropped),
        _aliases(design, terms, inverse),
        columns,
        offset,
        inverse,
        span,
        design.y - span @ (span.T @ design.y),
        None if basis.rank == columns.shape[1] else inverse @ columns,
    )


def _aliases(design: Design, terms: Sequence[Term], inverse: Array) -> dict[str, tuple[str, ...]]:
    """Of each term the two-way interactions outside the fit that change its estimate by at least half their size."""
    there = {term.factors for term in terms}
    levels = [place for place in range(len(design.factors)) if place not in design.numbers]
    outside = [pair for pair in itertools.combinations(levels, 2) if pair not in there]
    found: dict[str, list[str]] = {}
    for pair in outside:
        bias = inverse @ _product([design.factors[i].coded for i in pair])
        for term in terms:
            if np.abs(bias[term.columns]).max() >= ALIAS:
                found.setdefault(term.name, []).append(TIMES.join(design.factors[i].name for i in pair))
    return {name: tuple(pairs) for name, pairs in found.items()}


class _Basis:
    """Columns, and an orthonormal basis of what they span."""

    def __init__(self, rows: int) -> None:
        self._columns, self.count = [np.zeros((rows, 0))], 0
        self._space, self.rank = np.zeros((rows, 16), order="F"), 0

    @property
    def columns(self) -> Array:
        return np.hstack(self._columns)

    @property
    def span(self) -> Array:
        return self._space[:, : self.rank]

    def add(self, columns: Array, partly: bool = False) -> bool:
        """Adds all columns; without `partly`, none and False where they depend on each other or on those before."""
        if not partly and self.rank + columns.shape[1] > len(columns):
            return False
        rest = columns - self.span @ (self.span.T @ columns)
        rest -= self.span @ (self.span.T @ rest)  # once more, against rounding
        left, sizes, _ = np.linalg.svd(rest, full_matrices=False)
        new = sizes > TOLERANCE * np.linalg.norm(columns)
        if not partly and not new.all():
            return False
        self._columns.append(columns)
        self.count += columns.shape[1]
        rank = self.rank + int(new.sum())
        if rank > self._space.shape[1]:
            self._space = np.asfortranarray(np.hstack([self.span, np.zeros((len(columns), 2 * rank))]))
        self._space[:, self.rank : rank] = left[:, new]
        self.rank = rank
        return True


def _product(columns: Sequence[Array]) -> Array:
    """All products of one column of each."""
    product = columns[0]
    for other in columns[1:]:
        product = (product[:, :, None] * other[:, None, :]).reshape(len(product), -1)
    return product


# --- functions of the parameters


def level_mean(fit: Fit, levels: Mapping[int, int]) -> Array | None:
    """The weights of the mean at these levels ({index of the factor: level}), all others and blocks weighted equally.

    None where the fit lacks a term that it takes, or the experiments do not determine it.
    """
    terms = [term for term in fit.terms if set(term.factors) <= set(levels)]
    if len(terms) < (len(levels) if len(levels) < 2 else len(levels) + 1):
        return None
    weights = fit.mean
    for term in terms:
        rows = [fit.design.factors[i].coding[levels[i]][None, :] for i in term.factors]
        weights[term.columns] = _product(rows)[0]
    return weights if fit.estimable(weights) else None


def cell_weights(fit: Fit) -> Array:
    """(cells, parameters): the weights of the mean of every cell, in the order of `Design.cells`; of a fit of cell means."""
    counts = [len(factor.levels) for factor in fit.design.factors]
    cells = np.array(list(itertools.product(*map(range, counts))), dtype=int)
    weights = np.tile(fit.mean, (len(cells), 1))
    for term in fit.terms:
        weights[:, term.columns] = _product([fit.design.factors[i].coding[cells[:, i]] for i in term.factors])
    return weights


def level_effect(fit: Fit, factors: Sequence[int], levels: Sequence[int], reference: Sequence[int]) -> Array:
    """The weights of an effect: levels against reference levels; of two factors, the difference of such differences."""
    steps = [
        fit.design.factors[i].coding[level] - fit.design.factors[i].coding[other]
        for i, level, other in zip(factors, levels, reference, strict=True)
    ]
    weights = np.zeros(fit.columns.shape[1])
    columns = next(term.columns for term in fit.terms if term.factors == tuple(factors))
    weights[columns] = _product([step[None, :] for step in steps])[0]
    return weights
