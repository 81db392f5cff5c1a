"""The runs that a claim is about: those on tiny Shakespeare with its settings, on the machine that it names."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import pandas as pd

from nanostudy.analysis import curves as curve
from nanostudy.analysis.claims.judging import Judgement
from nanostudy.analysis.frames import Results, known, without_unset
from nanostudy.analysis.sample_quality import quality
from nanostudy.data.texts import SHAKESPEARE_SHA256
from nanostudy.text import counted, listed

Settings = Mapping[str, Any]  # a list holds values any of which will do
DONE = ("finished", "diverged")
DIVERGED = "diverged"  # what stands for our figure, where there is none
MOST_NAMED = 3


@dataclass(frozen=True)
class Evidence:
    results: Results
    given_quality: pd.DataFrame | None = None  # sample_quality.quality's table, where it was computed before

    @cached_property
    def experiments(self) -> pd.DataFrame:
        """Those on tiny Shakespeare, or in a table that names no text; with the values that unset settings stand for."""
        table = without_unset(self.results.experiments)
        texts = zip(table["corpus_sha256"], table["corpus"], strict=True)
        of_shakespeare = [
            sha == SHAKESPEARE_SHA256 if known(sha) else text in ("shakespeare", None) for sha, text in texts
        ]
        return table[of_shakespeare]

    @cached_property
    def rows(self) -> list[dict[Any, Any]]:
        return self.experiments.to_dict("records")

    @cached_property
    def quality(self) -> pd.DataFrame:
        return quality(self.results) if self.given_quality is None else self.given_quality

    @cached_property
    def initial_losses(self) -> pd.Series:
        """The training loss before the first update."""
        rows = self.results.evaluations
        return rows[rows["step"] == 0].set_index("name")["train_loss"].astype(float)

    def was_run(self, settings: Settings) -> bool:
        """Whether a run with these settings has ended, or one of a table that gives its size and not all of them."""
        of_size = (row for row in self.rows if all(known(row[name]) for name in ("n_layer", "n_head", "n_embd")))
        return any(row["status"] in DONE and matches(row, settings, unknown=True) for row in of_size)

    def matching(self, settings: Settings) -> pd.DataFrame:
        """The experiments, whatever their status, whose settings are all equal to these."""
        return self.experiments.loc[[matches(row, settings) for row in self.rows]]

    def finished(self, alternatives: Sequence[Settings]) -> pd.DataFrame:
        """The finished experiments that match any of the settings."""
        table = self.experiments[self.experiments.index.isin(self.results.finished.index)]
        names = {name for settings in alternatives for name in self.matching(settings).index}
        return table[table.index.isin(names)]

    def diverged(self, alternatives: Sequence[Settings]) -> int:
        """How many of the experiments that match any of the settings diverged."""
        return sum(int((self.matching(settings)["status"] == "diverged").sum()) for settings in alternatives)

    def absent(self, alternatives: Sequence[Settings]) -> Judgement:
        """The judgement where no finished run that matches has what the test needs."""
        if len(self.finished(alternatives)):
            return Judgement("not tested", why="The runs with these settings did not record what the test needs.")
        every = pd.concat([self.matching(settings) for settings in alternatives])
        diverged = self.diverged(alternatives)
        if diverged and diverged == len(every):
            why = "Every run with these settings diverged."
            return Judgement("not reproduced", DIVERGED, diverged, why=why)
        if len(every):
            return Judgement("not tested", why=f"{counted(len(every), 'run')} with these settings without a result.")
        silent = [row for row in self.rows if any(matches(row, settings, unknown=True) for settings in alternatives)]
        if not silent:
            return Judgement("not tested", why="No run has these settings.")
        missing = listed([name for name in alternatives[0] if not known(silent[0][name])], MOST_NAMED)
        rows = f"{counted(len(silent), 'row')} of the table may have these settings"
        return Judgement("not tested", why=f"{rows}, but it does not give {missing}.")

    def on(self, machine: str, runs: pd.DataFrame) -> tuple[pd.DataFrame, str]:
        """(those of the runs that had such a machine to themselves, why there are none).

        A machine is a kind of device, such as cpu, or what its name must contain. Runs record their kind of device alone, so
        every machine of that kind in the results must be such a one.
        """
        names: dict[str, list[str]] = {}
        for one in self.results.provenance.get("machines", ()):
            names.setdefault(str(one.get("device")), []).append(str(one.get("device_name")))
        kinds = [kind for kind, those in names.items() if all(machine in name for name in those)]
        if not kinds and machine != "cpu":
            return runs.iloc[:0], f"The claim is about another machine: {machine}."
        there = runs[runs["device"].isin([*kinds, machine])]
        alone = there[there["members"].isna() | (there["members"] == 1)]
        if there.empty:
            return there, f"No run with these settings was on such a machine: {machine}."
        if alone.empty:
            return alone, "The runs trained in stacks, whose members share the time."
        whole = alone[(alone["device"] != "cpu") | ~(alone["threads"] == 1)]
        shared = "The runs had a thread each, as several at a time have; `nanostudy train` gives one all cores."
        return whole, "" if len(whole) else shared

    def curves(self, alternatives: Sequence[Settings]) -> list[list[Mapping[str, float]]]:
        """The finite evaluations of each finished run that matches and has several."""
        rows = self.results.evaluations
        rows = rows[rows["name"].isin(self.finished(alternatives).index)]
        curves = [curve.finite(one, "val_loss") for one in curve.rows_by_name(rows).values()]
        return [points for points in curves if len(points) > 1]


def matches(row: Mapping[Any, Any], settings: Settings, unknown: bool = False) -> bool:
    """Whether the settings are equal, those that the row does not give as `unknown` says."""
    return all((unknown and not known(row[name])) or _equal(row[name], value) for name, value in settings.items())


def _equal(ours: Any, theirs: Any) -> bool:
    if isinstance(theirs, list):
        return any(_equal(ours, one) for one in theirs)
    if isinstance(theirs, float) and isinstance(ours, int | float):
        return math.isclose(ours, theirs, rel_tol=1e-9, abs_tol=1e-15)
    return bool(ours == theirs)
