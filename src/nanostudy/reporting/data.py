"""The data of a document: one row per experiment, one per point of a curve, samples; its figures and tables share them.

Of many experiments a part is kept, so that a page opens at once, and `left_out` says what was left out.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
import pandas as pd

from nanostudy.analysis.frames import WITHOUT_EFFECT, Results, levels
from nanostudy.measures import MEASURES
from nanostudy.reporting.charts.figure import TABLES, plain_value, records
from nanostudy.settings import FIELDS
from nanostudy.study.names import label

T = TypeVar("T")

MOST_CURVES = 256  # experiments whose curves are drawn
MOST_POINTS = 24_000  # of all curves together
FEWEST_POINTS = 24  # of one
MOST_SAMPLED = 128  # experiments whose samples the page has
LONGEST_SAMPLE = 2_000  # characters of one, where there are several experiments


@dataclass(frozen=True)
class Data:
    experiments: list[dict[str, Any]]
    curves: list[dict[str, Any]]  # of evaluations; i: the experiment's place in `experiments`
    batches: list[dict[str, Any]]  # losses of training batches
    samples: list[dict[str, Any]]  # i, prompt, text
    colourings: tuple[str, ...]  # columns by which figures can be coloured, the first one first
    settings: tuple[str, ...]  # that tell experiments apart
    left_out: tuple[str, ...] = ()  # sentences

    @property
    def ranked(self) -> list[dict[str, Any]]:
        """The experiments, the lowest loss first."""
        return sorted(self.experiments, key=lambda row: (row["place"] is None, row["place"] or 0.0, row["i"]))

    @property
    def tables(self) -> dict[str, list[dict[str, Any]]]:
        """That figures name."""
        return {name: getattr(self, name) for name in TABLES}


def data_of(results: Results, colourings: Sequence[str]) -> Data:
    by_loss = names_by_loss(results)
    settings = telling(results)
    rows = _experiments(results, settings)
    place = {row["name"]: row["i"] for row in rows}
    names, notes = _drawn(results, by_loss, place)
    curves, thinned = _curves(results.evaluations, names, place)
    samples, unread = _samples(results, by_loss, place)
    batches = _batches(results.training, names, place)
    return Data(rows, curves, batches, samples, tuple(colourings), settings, (*notes, *thinned, *unread))


def names_by_loss(results: Results) -> list[str]:
    """Of the finished experiments, the lowest validation loss first."""
    return [str(name) for name in results.finished.sort_values("val_loss", kind="stable").index]


def telling(results: Results) -> tuple[str, ...]:
    """The settings that tell experiments apart, and the seed where it does."""
    return (*results.factors, *(["seed"] if results.experiments["seed"].nunique(dropna=True) > 1 else []))


def shared(results: Results) -> dict[str, Any]:
    """The settings with one known value in all experiments."""
    table = results.experiments
    values = {name: levels(table[name]) for name in FIELDS if name in table and name not in (*WITHOUT_EFFECT, "seed")}
    return {name: known[0] for name, known in values.items() if len(known) == 1}


def short_names(results: Results, settings: Sequence[str]) -> list[str]:
    """Of each experiment what tells it apart; its name where that is not enough."""
    table = results.experiments
    rows = table[list(settings)].itertuples(index=False, name=None)
    names = [label(dict(zip(settings, row, strict=True)), settings) if settings else "" for row in rows]
    count = Counter(names)
    return [brief if brief and count[brief] == 1 else str(name) for brief, name in zip(names, table.index, strict=True)]


def _experiments(results: Results, settings: Sequence[str]) -> list[dict[str, Any]]:
    marks = [column for column in ("star", "note") if column in results.experiments]
    columns = ["id", *marks, "part", "status", "reason", *results.factors, "seed", *MEASURES, "device", "precision"]
    table = results.experiments[[column for column in columns if column in results.experiments]].copy()
    for name in results.factors:  # as charts and filters take them: numbers, or text
        table[name] = [plain_value(value) for value in table[name]]
    table["cell"] = results.cells()
    table["place"] = results.finished["val_loss"].rank(method="first").reindex(table.index)
    table["short"] = short_names(results, settings)
    rows = records(table.reset_index(names="name"))
    return [{"i": i, **row} for i, row in enumerate(rows)]


def _drawn(results: Results, by_loss: list[str], place: dict[str, int]) -> tuple[list[str], list[str]]:
    """The experiments whose curves are drawn, and a note where some are left out."""
    there = {*results.evaluations["name"], *results.training["name"]} & set(place)
    ranked = [name for name in by_loss if name in there]
    names = [*ranked, *sorted(there - set(ranked), key=lambda name: place[name])]
    if len(names) <= MOST_CURVES:
        return names, []
    which = "the best quarter of these, and the others spread evenly over the ranking"
    return spread(names, MOST_CURVES), [f"Curves are drawn for {MOST_CURVES} of {len(names):,} experiments: {which}."]


def _curves(table: pd.DataFrame, names: list[str], place: dict[str, int]) -> tuple[list[dict[str, Any]], list[str]]:
    """Losses with the decimals that tooltips show."""
    table = table[np.isfinite(table["val_loss"].astype(float)) & table["name"].isin(names)]
    each = max(FEWEST_POINTS, MOST_POINTS // max(1, len(names)))
    val_losses = table["val_loss"].to_numpy(float)
    groups = table.groupby("name", sort=False).indices.values()
    kept = [place for rows in groups for place in thin(np.asarray(rows), val_losses[rows], each)]
    points = table.iloc[kept]
    losses = points[["step", "train_loss", "val_loss"]].astype(float)
    losses["gap"] = losses["val_loss"] - losses["train_loss"]
    note = f"Curves are thinned to {each} evaluations each, the lowest among them; evaluations.csv has all."
    return records(losses.assign(i=points["name"].map(place)).round(4)), [note] if len(kept) < len(table) else []


def _batches(table: pd.DataFrame, names: list[str], place: dict[str, int]) -> list[dict[str, Any]]:
    """Means of consecutive rows, as many as there is room for."""
    each = max(FEWEST_POINTS, MOST_POINTS // max(1, len(names)))
    table = table[np.isfinite(table["loss"].astype(float)) & table["name"].isin(names)]
    groups = table.groupby("name", sort=False)
    bins = groups.cumcount() // np.ceil(groups["step"].transform("size") / each)
    means = table[["step", "loss"]].groupby([table["name"], bins], sort=False).mean().reset_index("name")
    return records(means[["step", "loss"]].assign(i=means["name"].map(place)).round({"step": 0, "loss": 4}))


def spread(ranked: Sequence[T], most: int) -> list[T]:
    """At most so many of them: a quarter are the first, the others lie evenly over the rest."""
    if len(ranked) <= most:
        return list(ranked)
    best, rest = list(ranked[: most // 4]), ranked[most // 4 :]
    return [*best, *(rest[i] for i in np.linspace(0, len(rest) - 1, most - len(best)).round().astype(int))]


def thin(rows: np.ndarray, losses: np.ndarray, most: int) -> np.ndarray:
    """Evenly, with the first, the last and the lowest."""
    if len(rows) <= most:
        return rows
    kept = set(np.linspace(0, len(rows) - 1, most - 1).round().astype(int)) | {int(losses.argmin())}
    return rows[sorted(kept)]


def _samples(results: Results, by_loss: list[str], place: dict[str, int]) -> tuple[list[dict[str, Any]], list[str]]:
    table = results.samples
    there = {str(name): group for name, group in table.groupby("name", sort=False)}
    others = [name for name in there if name not in set(by_loss)]
    names = [name for name in [*by_loss, *others] if name in there]
    note = f"Samples of the best {MOST_SAMPLED} of {len(names):,} experiments are on this page; the others are in their folders."
    longest = LONGEST_SAMPLE if len(names) > 1 else None
    rows = [
        {
            "i": place[name],
            "prompt": str(prompt or ""),
            "text": text[:longest] + " …" * (len(text) > len(text[:longest])),
        }
        for name in names[:MOST_SAMPLED]
        for prompt, text in zip(there[name]["prompt"], map(str, there[name]["text"]), strict=True)
    ]
    return rows, [note] if len(names) > MOST_SAMPLED else []
