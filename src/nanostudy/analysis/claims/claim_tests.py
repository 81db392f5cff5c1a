"""The tests of claims: pure functions of a claim's settings (any of which a run may have), its parameters (claims.yaml) and the evidence."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import pandas as pd

from nanostudy.analysis import curves as curve
from nanostudy.analysis.claims.evidence import Evidence, Settings, matches
from nanostudy.analysis.claims.judging import (
    INITIAL_LOSSES,
    LOSSES,
    ONE_RUN,
    SHARES,
    Judgement,
    Verdict,
    compare,
    evaluation_variance,
    inside,
    interval,
    lower,
)
from nanostudy.analysis.sample_quality import quality_against_loss, rank_correlation
from nanostudy.model.config import GPTConfig, count_parameters
from nanostudy.settings import Experiment
from nanostudy.text import duration

Parameters = Mapping[str, Any]
Test = Callable[[Sequence[Settings], Parameters, Evidence], Judgement]

VOCABULARY = 65  # of tiny Shakespeare, which all of these claims are about
VAL_TOKENS = 111_540
# The noise between seeds, where it was measured before; the published figures of these are estimates from random batches.
KNOWN = {**dict.fromkeys(("train_loss", "val_loss", "best_val_loss", "gap"), LOSSES), "initial_loss": INITIAL_LOSSES}
# Tests of means, which a diverged run has no part in
STATISTICAL = ("measure", "lower", "curve", "writes", "loss_and_samples")


# --- figures of runs


def measure(alternatives: Sequence[Settings], parameters: Parameters, evidence: Evidence) -> Judgement:
    """A number of the runs that match: their mean against the published value, or range."""
    name, value, machine = parameters["measure"], parameters["value"], parameters.get("machine")
    runs = evidence.finished(alternatives)
    if machine:
        alone, why = evidence.on(machine, runs)
        if alone.empty and not (runs.empty and machine == "cpu"):
            return Judgement("not tested", why=why)
        runs = alone
    values = _values(runs, name, evidence)
    if values.empty:
        return evidence.absent(alternatives)
    before, evaluation = KNOWN.get(name), 0.0
    if before:
        tokens = parameters.get("batches", 0) * min(s["batch_size"] * s["block_size"] for s in alternatives)
        evaluation = evaluation_variance(tokens, name, VAL_TOKENS)
    digits = ".0f" if name == "seconds" else ".4f" if before else ".3g"
    judgement = compare(
        list(values), value, parameters["half_unit"], evaluation, before, parameters.get("better"), digits
    )
    if name == "seconds":
        judgement = replace(judgement, ours=duration(float(values.mean())))
    if math.isnan(judgement.low):
        return judgement
    half = (judgement.high - judgement.low) / 2
    why = f"Another such run is published within {half:.2g} of our mean with 95%, by the luck of its seed, evaluation and rounding."
    return replace(judgement, why=f"{why} {judgement.why}".strip())


def _values(runs: pd.DataFrame, name: str, evidence: Evidence) -> pd.Series:
    if name == "initial_loss":
        values = evidence.initial_losses.reindex(runs.index)
    elif name == "updates_per_second":
        values = runs["updates"] / runs["seconds"]
    else:
        values = runs[name]
    return values.dropna()


def count(alternatives: Sequence[Settings], parameters: Parameters, _: Evidence) -> Judgement:
    """The number of parameters, which follows from the settings: with or without position embeddings, as sources differ."""
    counts = count_parameters(GPTConfig.of(Experiment(**alternatives[0]), VOCABULARY))
    both = f"{counts.total:,} parameters, {counts.without_positions:,} without position embeddings"
    nearest = min((counts.total, counts.without_positions), key=lambda number: abs(number - parameters["value"]))
    fits = abs(nearest - parameters["value"]) <= parameters["half_unit"]
    ours = f"{nearest:,}" if nearest == counts.total else f"{nearest:,} without position embeddings"
    why = f"Counted from the settings: {both}. nanoGPT counts the latter."
    return Judgement("arithmetic" if fits else "contradicts itself", ours, why=why)


def is_lower(alternatives: Sequence[Settings], parameters: Parameters, evidence: Evidence) -> Judgement:
    """Whether runs of the first settings have a lower mean than those of the second."""
    name = parameters["measure"]
    sides: list[list[float]] = []
    for settings in alternatives:
        runs = evidence.finished([settings])
        values = (runs[name] if name in runs else evidence.quality[name].reindex(runs.index)).dropna()
        if values.empty:
            return evidence.absent([settings])
        sides.append([float(value) for value in values.to_numpy()])
    return lower(sides[0], sides[1], KNOWN.get(name))


# --- curves


def falls(alternatives: Sequence[Settings], parameters: Parameters, evidence: Evidence) -> Judgement:
    """The share of the whole fall of the lowest validation loss so far that comes after one update and until another, by the last
    evaluations before these.
    """
    shares, spans = [], set()
    for rows in evidence.curves(alternatives):
        if rows[-1]["step"] >= parameters["until"] and curve.improvement(rows) > 0:
            so_far = [[row for row in rows if row["step"] <= parameters[key]] for key in ("after", "until")]
            start, end = (min(row["val_loss"] for row in part) for part in so_far)
            shares.append((start - end) / curve.improvement(rows))
            spans.add(tuple(int(part[-1]["step"]) for part in so_far))
    if not shares:
        return evidence.absent(alternatives)
    mean, low, high = interval(shares, SHARES)
    verdict = inside(low, high, parameters.get("least", -math.inf), parameters.get("most", math.inf))
    ours = f"{mean:.0%} of the fall"
    if len(spans) == 1:
        ((first, last),) = spans
        ours += f", from update {first:,} to {last:,}"
    return Judgement(verdict, ours, len(shares), low, high)


# --- samples


def writes(alternatives: Sequence[Settings], parameters: Parameters, evidence: Evidence) -> Judgement:
    """Whether all of some measures of the samples are at least so much, in the mean over runs."""
    runs = evidence.finished(alternatives)
    table = evidence.quality.reindex(runs.index)[list(parameters["measures"])].dropna()
    if table.empty:
        return evidence.absent(alternatives)
    ours = ", ".join(f"{name} {value:.0%}" for name, value in table.mean().items())
    if len(table) < 2:
        return Judgement("undecided", ours, len(table), why=ONE_RUN)
    kinds = {inside(*interval(list(table[name]))[1:], parameters["least"]) for name in table}
    worst_first: tuple[Verdict, ...] = ("not reproduced", "undecided", "reproduced")
    verdict = next(kind for kind in worst_first if kind in kinds)
    return Judgement(verdict, ours, len(table))


def loss_and_samples(alternatives: Sequence[Settings], parameters: Parameters, evidence: Evidence) -> Judgement:
    """Whether a measure of the samples falls as the validation loss rises: its rank correlation's interval is below 0."""
    table = evidence.quality[evidence.quality.index.isin(evidence.finished(alternatives).index)]
    row = quality_against_loss(evidence.results, table).to_dict("index")[parameters["measure"]]
    why = f"Spearman's rank correlation of {parameters['measure']} with the validation loss."
    n, low, high = int(row["n"]), row["low"], row["high"]
    if not n:
        return evidence.absent(alternatives)
    if math.isnan(low):
        return Judgement("undecided", n=n, why=f"{why} Too few models, or all alike: {n}.")
    return Judgement(inside(low, high, most=0.0), f"rank correlation {row['rho']:.2f}", n, low, high, why)


def sample_length(alternatives: Sequence[Settings], parameters: Parameters, evidence: Evidence) -> Judgement:
    """Whether every run has a sample, and each sample so many characters."""
    runs, rows = evidence.finished(alternatives), evidence.results.samples
    rows = rows[rows["name"].isin(runs.index)]
    if rows.empty:
        return evidence.absent(alternatives) if runs.empty else Judgement("not reproduced", "no sample", len(runs))
    shortest = min(len(text.removesuffix("\n")) for text in rows["text"])
    holds = shortest >= parameters["least"] and rows["name"].nunique() == len(runs)
    return Judgement("reproduced" if holds else "not reproduced", f"{shortest:,} characters", len(runs))


# --- the grid


def cells(settings: Settings) -> list[tuple[Any, ...]]:
    """The combinations of the settings' values; the last varies fastest."""
    return list(itertools.product(*(value if isinstance(value, list) else [value] for value in settings.values())))


def _by_cell(settings: Settings, table: pd.DataFrame) -> list[tuple[int, dict[Any, Any]]]:
    """(the number of its cell, from 1; the experiment), of the experiments that match."""
    numbers = {cell: number for number, cell in enumerate(cells(settings), start=1)}
    rows = [row for row in table.to_dict("records") if matches(row, settings)]
    return [(numbers[tuple(row[name] for name in settings)], row) for row in rows]


def factorial(alternatives: Sequence[Settings], parameters: Parameters, evidence: Evidence) -> Judgement:
    """Whether the settings make so many experiments, which is a product; beside it, how many of them finished here."""
    (settings,) = alternatives
    total = len(cells(settings))
    done = len({number for number, _ in _by_cell(settings, evidence.finished(alternatives))})
    holds = total >= parameters["least"]
    return Judgement("arithmetic" if holds else "contradicts itself", f"{total:,}; {done:,} finished here")


def order(alternatives: Sequence[Settings], _: Parameters, evidence: Evidence) -> Judgement:
    """Whether in each whole part an experiment's seed is its number, and ids are in order of the numbers."""
    right = total = 0
    for settings in alternatives:
        rows = _by_cell(settings, evidence.experiments)
        if len({number for number, _ in rows}) == len(cells(settings)):
            ids = [row["id"] for _, row in sorted(rows, key=lambda item: (item[0], item[1]["id"]))]
            right += sum(row["seed"] == number for number, row in rows) if ids == sorted(ids) else 0
            total += len(rows)
    if not total:
        return Judgement("not tested", why="No part of the grid is here as a whole.")
    return Judgement("arithmetic" if right == total else "not reproduced", f"{right} of {total} in their places")


def gap(_: Sequence[Settings], parameters: Parameters, __: Evidence) -> Judgement:
    """Whether the published gap is the difference of the published losses."""
    implied = round(parameters["val"] - parameters["train"], 4)
    if implied != parameters["gap"]:
        return Judgement("contradicts itself", why=f"The losses give {implied:.4f}.")
    return Judgement("arithmetic", f"{implied:.4f}")


def parameters_and_loss(alternatives: Sequence[Settings], _: Parameters, evidence: Evidence) -> Judgement:
    """No direction was published, so there is no verdict; ours stands beside it."""
    table = evidence.finished(alternatives)
    row = rank_correlation(table["parameters"].to_numpy(), table["val_loss"].to_numpy())
    why = "Neither a figure nor a direction was published."
    if math.isnan(row["rho"]):
        return Judgement("not tested", n=int(row["n"]), why=why)
    ours = f"rank correlation {row['rho']:.2f}"
    return Judgement("not tested", ours, int(row["n"]), row["low"], row["high"], why)


def untestable(_: Sequence[Settings], parameters: Parameters, __: Evidence) -> Judgement:
    return Judgement("not tested", why=parameters.get("because", ""))


TESTS: dict[str, Test] = {
    "measure": measure,
    "parameters": count,
    "lower": is_lower,
    "curve": falls,
    "writes": writes,
    "loss_and_samples": loss_and_samples,
    "sample_length": sample_length,
    "factorial": factorial,
    "order": order,
    "gap": gap,
    "parameters_and_loss": parameters_and_loss,
    "untestable": untestable,
}
