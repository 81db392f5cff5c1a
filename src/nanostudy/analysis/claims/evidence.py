"""What results have to say on a claim: the runs that match its settings, on the machine that it is about."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import pandas as pd

from nanostudy.analysis import curves as curve
from nanostudy.analysis.claims.judging import Judgement
from nanostudy.analysis.frames import Results, known
from nanostudy.analysis.sample_quality import quality
from nanostudy.text import counted

Settings = Mapping[str, Any]


@dataclass(frozen=True)
class Evidence:
    results: Results
    given: pd.DataFrame | None = None  # writing.quality's table

    @cached_property
    def experiments(self) -> pd.DataFrame:
        """With what unset settings stand for."""
        table = self.results.experiments.copy()
        rows = zip(table["lr_decay_iters"], table["max_iters"], table["min_lr"], table["learning_rate"], strict=True)
        resolved = [
            (most if decay == "none" else decay, rate / 10 if least == "none" and known(rate) else least)
            for decay, most, least, rate in rows
        ]
        for name, values in zip(("lr_decay_iters", "min_lr"), zip(*resolved, strict=True), strict=False):
            table[name] = pd.Series(list(values), index=table.index, dtype=object)
        return table

    @cached_property
    def quality(self) -> pd.DataFrame:
        return quality(self.results) if self.given is None else self.given

    @cached_property
    def initial_losses(self) -> pd.Series:
        """The training loss before the first update."""
        rows = self.results.evaluations
        return rows[rows["step"] == 0].set_index("name")["train_loss"].astype(float)

    def matching(self, settings: Settings) -> pd.DataFrame:
        """The experiments, whatever their status, whose settings are all equal to these."""
        fits = [
            at for at, row in enumerate(self.rows) if all(equal(row[key], value) for key, value in settings.items())
        ]
        return self.experiments.iloc[fits]

    def finished(self, alternatives: Sequence[Settings]) -> pd.DataFrame:
        """Those of the finished experiments that match any of the settings."""
        names = {name for settings in alternatives for name in self.matching(settings).index}
        table = self.experiments.loc[self.results.finished.index]
        return table[table.index.isin(names)] if alternatives else table

    def absent(self, alternatives: Sequence[Settings]) -> Judgement:
        """The verdict where no finished run that matches tells what is asked."""
        if len(self.finished(alternatives)):
            return Judgement("not run", why="The runs with these settings did not record what would tell.")
        every = pd.concat([self.matching(settings) for settings in alternatives])
        diverged = int((every["status"] == "diverged").sum())
        if diverged and diverged == len(every):
            why = "Every run with these settings diverged."
            return Judgement("not reproduced", "diverged", diverged, why=why)
        if len(every):
            return Judgement("not run", why=f"{counted(len(every), 'run')} with these settings without a result.")
        silent = [row for row in self.rows if any(_may_fit(row, settings) for settings in alternatives)]
        if not silent:
            return Judgement("not run", why="No run has these settings.")
        settings = alternatives[0]
        unsaid = [name for name in settings if not known(silent[0][name])]
        return Judgement(
            "not run",
            why=f"No run is known to have these settings: {counted(len(silent), 'row')} may, but the table does not tell "
            f"{', '.join(unsaid[:3])}{' and more' if len(unsaid) > 3 else ''}.",
        )

    def on(self, machine: str, runs: pd.DataFrame) -> tuple[pd.DataFrame, str]:
        """(those of the runs that were alone on such a machine, why there are none).

        A machine is a kind of device, such as cpu, or what its name must contain. Runs tell their kind of device alone, so
        every machine of that kind in the results must be such a one.
        """
        names: dict[str, list[str]] = {}
        for one in self.results.provenance.get("machines", ()):
            names.setdefault(str(one.get("device")), []).append(str(one.get("device_name")))
        kinds = [kind for kind, those in names.items() if all(machine in name for name in those)]
        if not kinds and machine != "cpu":
            return runs.iloc[:0], f"It is a claim about another machine: {machine}."
        there = runs[runs["device"].isin([*kinds, machine])]
        alone = there[there["members"].isna() | (there["members"] == 1)]
        if there.empty:
            return there, f"No run with these settings was on such a machine: {machine}."
        return alone, "" if len(alone) else "The runs trained in stacks, whose members share the time."

    def curves(self, alternatives: Sequence[Settings]) -> list[list[Mapping[str, float]]]:
        """The evaluations with a loss of the finished runs that match and have several."""
        rows = self.results.evaluations
        rows = rows[rows["name"].isin(self.finished(alternatives).index)]
        tables = [group.drop(columns="name").astype(float) for _, group in rows.groupby("name")]
        curves = [[{str(k): v for k, v in row.items()} for row in one.to_dict("records")] for one in tables]
        whole = [curve.finite(one, "val_loss") for one in curves]
        return [one for one in whole if len(one) > 1]

    @cached_property
    def rows(self) -> list[dict[Any, Any]]:
        return self.experiments.to_dict("records")


def equal(ours: Any, theirs: Any) -> bool:
    if isinstance(theirs, float) and isinstance(ours, int | float):
        return math.isclose(ours, theirs, rel_tol=1e-9, abs_tol=1e-15)
    return bool(ours == theirs)


def _may_fit(row: Mapping[Any, Any], settings: Settings) -> bool:
    return all(not known(row[name]) or equal(row[name], value) for name, value in settings.items())
