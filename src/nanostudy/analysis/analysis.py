"""Everything that results say: each part is a data frame or a record, computed when it is first read."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property

import pandas as pd

from nanostudy.analysis import (
    curves,
    divergence,
    effects,
    equal_budget,
    forest,
    parts,
    power,
    ranking,
    sample_quality,
    shapes,
    sources,
    text_error,
    winner,
)
from nanostudy.analysis.claims import claims
from nanostudy.analysis.effects import Effects
from nanostudy.analysis.equal_budget import Budget, Cost
from nanostudy.analysis.forest import Forest
from nanostudy.analysis.frames import AT_CONTEXT, Results
from nanostudy.analysis.power import Seeds
from nanostudy.analysis.results import read_study_folder
from nanostudy.analysis.scaling import PowerLaw, Refusal, power_law
from nanostudy.analysis.shapes import Shapes
from nanostudy.analysis.sources import Sources
from nanostudy.analysis.winner import Confirmed
from nanostudy.text import counted


@dataclass(frozen=True)
class EqualWindows:
    """Validation losses scored in windows of one length, the longest that all experiments share."""

    context: int
    effects: Effects
    ranking: pd.DataFrame


@dataclass(frozen=True, repr=False)
class Analysis:
    """Data frames about `results`. Losses are in nats per token, intervals are 95%."""

    results: Results

    def __repr__(self) -> str:
        return f"<Analysis of {counted(len(self.results.experiments), 'experiment')}: {self.results.title}>"

    @cached_property
    def effects(self) -> Effects:
        """On the validation loss."""
        return effects.effects(self.results)

    @cached_property
    def gap_effects(self) -> Effects:
        """On the gap, validation less training loss."""
        return effects.effects(self.results, "gap")

    @cached_property
    def shapes(self) -> Shapes:
        """Of the settings that are numbers, on the validation loss."""
        return shapes.shapes(self.results)

    @cached_property
    def forest(self) -> Forest:
        """On the validation loss."""
        return forest.forest(self.results)

    @cached_property
    def ranking(self) -> pd.DataFrame:
        """By validation loss."""
        return ranking.ranking(self.results)

    @cached_property
    def generalisation(self) -> pd.DataFrame:
        """The ranking by the gap."""
        return ranking.ranking(self.results, "gap")

    @cached_property
    def best_unbiased(self) -> float:
        """The best's validation loss on seeds that did not choose it; NaN without two seeds."""
        return winner.unbiased(self.results)

    @cached_property
    def confirmed(self) -> Confirmed | None:
        """What fresh seeds say of the best settings, where `nanostudy study confirm` ran them."""
        folder = winner.confirmation_of(self.results)
        return winner.confirmed(read_study_folder(folder), self.results) if folder else None

    @cached_property
    def seeds(self) -> Seeds:
        """How many tell settings from the best."""
        return power.seeds(self.results)

    @cached_property
    def text_error(self) -> pd.DataFrame:
        """What a finite text contributes to each validation loss."""
        return text_error.text_error(self.results)

    @cached_property
    def equal_windows(self) -> EqualWindows | None:
        """Where the experiments' own contexts differ, and all were scored at one."""
        common = equal_budget.common_context(self.results)
        if common is None or self.results.finished["block_size"].nunique() < 2:
            return None
        column = f"{AT_CONTEXT}{common}"
        return EqualWindows(common, effects.effects(self.results, column), ranking.ranking(self.results, column))

    @cached_property
    def part_means(self) -> pd.DataFrame:
        return parts.part_means(self.results)

    @cached_property
    def sources(self) -> Sources | None:
        """The same effects as several studies or tables measured them; None where they have none in common."""
        return sources.sources(self.results)

    @cached_property
    def divergence(self) -> pd.DataFrame:
        """How often each value of a setting diverged, beside its other values."""
        return divergence.divergence(self.results)

    @cached_property
    def overfitting(self) -> pd.DataFrame:
        return curves.overfitting(self.results)

    @cached_property
    def stability(self) -> pd.DataFrame:
        return curves.stability(self.results)

    @cached_property
    def convergence(self) -> pd.DataFrame:
        return curves.convergence(self.results)

    @cached_property
    def scaling(self) -> Mapping[str, PowerLaw | Refusal]:
        """Against "parameters" and "tokens"."""
        return {"parameters": power_law(self.results, "parameters"), "tokens": power_law(self.results, "tokens")}

    @cached_property
    def quality(self) -> pd.DataFrame:
        """Of the samples."""
        return sample_quality.quality(self.results)

    @cached_property
    def quality_against_loss(self) -> pd.DataFrame:
        return sample_quality.quality_against_loss(self.results, self.quality)

    @cached_property
    def verdicts(self) -> pd.DataFrame:
        """On the published claims that these results test; empty where they test none."""
        return claims.verdicts(self.results, self.quality)

    def equal_budget(self, at: Budget) -> pd.DataFrame:
        """The ranking at equal "context", "updates", "tokens", "arithmetic" or "time"."""
        return equal_budget.equal_budget(self.results, at)

    def pareto(self, cost: Cost = "parameters") -> pd.DataFrame:
        """The front of loss against "parameters", "flops" or "seconds"."""
        return equal_budget.pareto(self.results, cost)

    def cell_means(self, factor_a: str, factor_b: str | None = None, measure: str = "val_loss") -> pd.DataFrame:
        return effects.cell_means(self.results, factor_a, factor_b, measure)
