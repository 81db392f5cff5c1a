"""Main effects and two-way interactions by least squares, as far as the design can separate them."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from nanostudy.analysis.design import TIMES, Array, Design, coded

TOLERANCE = 1e-8  # relative to a column's length: what is left of it beside others, and counts as nothing
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
    order: int  # 1: main effects alone; 2: two-way interactions, too
    terms: tuple[Term, ...]
    dropped: tuple[str, ...]  # in words, interactions that cannot be estimated
    columns: Array  # (experiments, parameters): mean, blocks, terms
    offset: int  # columns before the terms
    params: Array
    covariance: Array  # of the parameters, for noise of variance 1
    residuals: Array
    rank: int
    row_space: Array | None  # the projection on what can be estimated; None: everything can

    @property
    def residual_df(self) -> int:
        return self.design.n - self.rank

    @property
    def residual_variance(self) -> float:
        return float(self.residuals @ self.residuals) / self.residual_df if self.residual_df > 0 else math.nan

    def estimable(self, weights: Array) -> bool:
        """Whether the experiments determine this function of the parameters (Searle, 1971, Linear models, section 5.4)."""
        if self.row_space is None:
            return True
        return bool(np.linalg.norm(weights - self.row_space @ weights) <= TOLERANCE * np.linalg.norm(weights))

    def estimate(self, weights: Array) -> tuple[float, float]:
        """(a linear function of the parameters, its standard error for noise of variance 1)."""
        return float(weights @ self.params), math.sqrt(max(0.0, float(weights @ self.covariance @ weights)))

    def shares(self) -> dict[str, float]:
        """The share of the measure's variance that each term explains: eta squared of type II (Langsrud, 2003).

        A term's sum of squares is what it explains beside all terms that do not contain it. On a balanced design this is its
        part of the total, and all parts and the rest add up to 1. The blocks' share has the design's `block_words` as its name.
        """
        if not self.design.n:
            return {}
        y = self.design.y - self.design.y.mean()
        total = float(y @ y)
        if total <= self.design.n * (NEGLIGIBLE * np.abs(self.design.y).max(initial=0.0)) ** 2:
            return {term.name: 0.0 for term in self.terms}
        gram, moments = self.columns.T @ self.columns, self.columns.T @ y

        def explained(columns: Sequence[int]) -> float:
            inner = gram[np.ix_(columns, columns)]
            inverse = np.linalg.pinv(inner, hermitian=True) if self.row_space is not None else np.linalg.inv(inner)
            return float(moments[columns] @ inverse @ moments[columns])

        def columns_of(terms: Iterable[Term]) -> list[int]:
            return [*range(self.offset), *(c for t in terms for c in range(t.columns.start, t.columns.stop))]

        shares = {}
        for term in self.terms:
            beside = [t for t in self.terms if not set(term.factors) <= set(t.factors)]
            shares[term.name] = (explained(columns_of([*beside, term])) - explained(columns_of(beside))) / total
        if self.design.blocks is not None:
            terms = [0, *columns_of(self.terms)[self.offset :]]
            shares[self.design.block_words] = (explained(columns_of(self.terms)) - explained(terms)) / total
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
        if basis.add(_product([coded(factor) for factor in factors]), partly=len(group) == 1):
            terms.append(Term(group, name, slice(start, basis.count)))
        else:
            there = len(np.unique(np.stack([factor.codes for factor in factors]), axis=1).T)
            combinations = math.prod(len(factor.levels) for factor in factors)
            why = (
                f"{there} of its {combinations} combinations have results"
                if there < combinations
                else "confounded with others"
            )
            dropped.append(f"{name} ({why})")
    columns = basis.columns
    inverse = np.linalg.pinv(columns)
    params = inverse @ design.y
    covariance, residuals = inverse @ inverse.T, design.y - columns @ params
    row_space = None if basis.rank == columns.shape[1] else inverse @ columns
    return Fit(
        design,
        order,
        tuple(terms),
        tuple(dropped),
        columns,
        offset,
        params,
        covariance,
        residuals,
        basis.rank,
        row_space,
    )


class _Basis:
    """Columns, and an orthonormal basis of what they span."""

    def __init__(self, rows: int) -> None:
        self.columns, self._span = np.zeros((rows, 0)), np.zeros((rows, 0))

    @property
    def count(self) -> int:
        return self.columns.shape[1]

    @property
    def rank(self) -> int:
        return self._span.shape[1]

    def add(self, columns: Array, partly: bool = False) -> bool:
        """Adds all columns; without `partly`, none and False where they depend on each other or on those before."""
        if not partly and self.rank + columns.shape[1] > len(columns):
            return False
        rest = columns - self._span @ (self._span.T @ columns)
        rest -= self._span @ (self._span.T @ rest)  # once more, against rounding
        left, sizes, _ = np.linalg.svd(rest, full_matrices=False)
        new = sizes > TOLERANCE * np.linalg.norm(columns)
        if not partly and not new.all():
            return False
        self.columns, self._span = np.hstack([self.columns, columns]), np.hstack([self._span, left[:, new]])
        return True


def _product(columns: Sequence[Array]) -> Array:
    """All products of one column of each."""
    product = columns[0]
    for other in columns[1:]:
        product = (product[:, :, None] * other[:, None, :]).reshape(len(product), -1)
    return product


# --- functions of the parameters


def level_effect(fit: Fit, term: Term, levels: Sequence[int], reference: int = 0) -> Array:
    """The weights of an effect: a level against the reference; of two factors, half the difference of such differences."""
    codings = [fit.design.factors[i].coding for i in term.factors]
    steps = [each[level] - each[reference] for each, level in zip(codings, levels, strict=True)]
    weights = np.zeros(fit.columns.shape[1])
    weights[term.columns] = _product([step[None, :] for step in steps])[0] / 2 ** (len(levels) - 1)
    return weights


def level_mean(fit: Fit, levels: dict[int, int]) -> Array | None:
    """The weights of the mean at these levels ({index of the factor: level}), all others and blocks weighted equally.

    None where the fit lacks a term that it takes, or the experiments do not determine it.
    """
    weights = np.zeros(fit.columns.shape[1])
    weights[0] = 1.0
    weights[1 : fit.offset] = 1 / fit.offset
    by_factors = {term.factors: term for term in fit.terms}
    groups = [(index,) for index in levels] + ([tuple(sorted(levels))] if len(levels) > 1 else [])
    for group in groups:
        term = by_factors.get(group)
        if term is None:
            return None
        rows = [fit.design.factors[index].coding[levels[index]][None, :] for index in group]
        weights[term.columns] = _product(rows)[0]
    return weights if fit.estimable(weights) else None
