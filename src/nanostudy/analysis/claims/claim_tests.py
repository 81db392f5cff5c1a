"""A test for each kind of claim: pure functions of the claim's settings (any of them will do; none: all experiments), the
test's parameters (claims.yaml) and the evidence.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import pandas as pd

from nanostudy.analysis import curves as curve
from nanostudy.analysis.claims.evidence import Evidence, Settings, equal
from nanostudy.analysis.claims.judging import NO_INTERVAL, Judgement, compare, interval, loss_tolerance, lower
from nanostudy.analysis.frames import CorpusFacts
from nanostudy.analysis.sample_quality import quality_against_loss, rank_correlation
from nanostudy.data.texts import SHAKESPEARE_SHA256
from nanostudy.model.config import GPTConfig, count_parameters
from nanostudy.settings import Experiment

Parameters = Mapping[str, Any]
Test = Callable[[Sequence[Settings], Parameters, Evidence], Judgement]

VOCABULARY = 65  # of the corpus that all of these claims are about
VAL_TOKENS = 111_540
NOISY = ("train_loss", "val_loss", "best_val_loss", "gap", "initial_loss")  # what is estimated from random batches
GRID = {  # the published grid, a part being a block_size and an n_layer; the last varies fastest
    "n_head": (4, 8),
    "n_embd": (128, 256),
    "batch_size": (8, 16),
    "max_iters": (1000, 2000),
    "dropout": (0.1, 0.2),
}
PARTS = tuple(itertools.product((64, 128), (4, 6)))
CELLS = list(itertools.product(*GRID.values()))


# --- figures of runs


def measure(alternatives: Sequence[Settings], parameters: Parameters, evidence: Evidence) -> Judgement:
    """A figure of the runs that match: their mean against the published value, or range."""
    name, value, machine = parameters["measure"], parameters["value"], parameters.get("machine")
    runs = evidence.finished(alternatives)
    if machine:
        alone, why = evidence.on(machine, runs)
        if alone.empty and not (runs.empty and machine == "cpu"):
            return Judgement("not testable here", why=why)
        runs = alone
    values = _values(runs, name, evidence)
    if values.empty:
        return evidence.absent(alternatives)
    tolerance = parameters["half_unit"]
    if name in NOISY:
        drawn = (s["batch_size"] * s["block_size"] for s in alternatives)
        tokens = parameters.get("batches", 0) * min(drawn)
        tolerance = loss_tolerance(tolerance, tokens, name, VAL_TOKENS)
    ends = tuple(value) if isinstance(value, list) else (value, value)
    shown = ".0f" if name == "seconds" else ".4f" if name in NOISY else ".3g"
    found = compare(list(values), (ends[0], ends[1]), tolerance, parameters.get("better"), shown)
    noise = ": its rounding and evaluation noise" if tolerance > parameters["half_unit"] else ""
    why = f"Within {tolerance:.2g} of the published figure counts as reproduced{noise}. {found.why}"
    return replace(found, why=why.strip())


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
    meant = (counts.total, counts.without_positions)
    fits = any(abs(number - parameters["value"]) <= parameters["half_unit"] for number in meant)
    why = f"Counted from the settings: {both}. nanoGPT counts the latter."
    nearest = min(meant, key=lambda number: abs(number - parameters["value"]))
    return Judgement("reproduced" if fits else "not reproduced", f"{nearest:,}", why=why)


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
    return lower(sides[0], sides[1])


# --- curves


def falls(alternatives: Sequence[Settings], parameters: Parameters, evidence: Evidence) -> Judgement:
    """The share of the whole fall of the validation loss that comes after one update and until another."""
    shares = []
    for rows in evidence.curves(alternatives):
        if rows[-1]["step"] >= parameters["until"] and curve.improvement(rows) > 0:
            at = [
                max((row for row in rows if row["step"] <= step), key=lambda row: row["step"])
                for step in _ends(parameters)
            ]
            shares.append((at[0]["val_loss"] - at[1]["val_loss"]) / curve.improvement(rows))
    if not shares:
        return evidence.absent(alternatives)
    mean, low, high = interval(shares)
    holds = parameters["least"] <= mean <= parameters.get("most", math.inf)
    return Judgement(
        "reproduced" if holds else "not reproduced",
        *(f"{mean:.0%} of the fall", len(shares), low, high),
        "" if len(shares) > 1 else NO_INTERVAL,
    )


def _ends(parameters: Parameters) -> tuple[int, int]:
    return parameters["after"], parameters["until"]


def plateau(alternatives: Sequence[Settings], parameters: Parameters, evidence: Evidence) -> Judgement:
    """Whether a plateau begins by an update, in most of the runs that go on after it."""
    found = [curve.plateau(rows) for rows in evidence.curves(alternatives) if rows[-1]["step"] > parameters["by"]]
    if not found:
        return evidence.absent(alternatives)
    begun = [step for step in found if step is not None]
    holds = sum(step <= parameters["by"] for step in begun) * 2 > len(found)
    ours = f"begins at {min(begun):,}" + (f" to {max(begun):,}" if max(begun) > min(begun) else "") if begun else "none"
    return Judgement("reproduced" if holds else "not reproduced", ours, len(found))


# --- writing


def writes(alternatives: Sequence[Settings], parameters: Parameters, evidence: Evidence) -> Judgement:
    """Whether all of some measures of the samples are at least so much, in the mean over runs."""
    runs = evidence.finished(alternatives)
    table = evidence.quality.reindex(runs.index)[list(parameters["measures"])].dropna()
    if table.empty:
        return evidence.absent(alternatives)
    means = table.mean()
    ours = ", ".join(f"{name} {value:.0%}" for name, value in means.items())
    return Judgement("reproduced" if (means >= parameters["least"]).all() else "not reproduced", ours, len(table))


def loss_and_samples(_: Sequence[Settings], parameters: Parameters, evidence: Evidence) -> Judgement:
    """Whether a measure of the samples falls as the validation loss rises: its rank correlation's interval is below 0."""
    row = quality_against_loss(evidence.results, evidence.quality).to_dict("index")[parameters["measure"]]
    why = f"Spearman's rank correlation of {parameters['measure']} with the validation loss."
    n, low, high = int(row["n"]), row["low"], row["high"]
    if math.isnan(low):
        return Judgement("not run", n=n, why=f"{why} Too few models, or all alike: {n}.")
    ours = f"rank correlation {row['rho']:.2f}"
    return Judgement("reproduced" if high < 0 else "not reproduced", ours, n, low, high, why)


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


def _of_grid(evidence: Evidence, part: Settings) -> dict[tuple[Any, ...], dict[Any, Any]]:
    """The experiments of one part, by their place in it (from 1) and name."""
    places = {cell: place for place, cell in enumerate(CELLS, start=1)}
    found = {}
    for name, row in zip(evidence.experiments.index, evidence.rows, strict=True):
        place = places.get(tuple(row[key] for key in GRID))
        if place and all(equal(row[key], value) for key, value in part.items()):
            found[place, name] = row
    return found


def factorial(_: Sequence[Settings], parameters: Parameters, evidence: Evidence) -> Judgement:
    """Whether every cell of these parts finished (or `least`, which is all that the source claims)."""
    finished = set(evidence.results.finished.index)
    wanted = len(CELLS) * len(parameters["parts"])
    found = [_of_grid(evidence, part) for part in parameters["parts"]]
    done = sum(len({place for place, name in part if name in finished}) for part in found)
    ours = f"{done} of {wanted} finished"
    if "least" in parameters:
        verdict = "better" if done == wanted else "reproduced" if done >= parameters["least"] else "not run"
    else:
        verdict = "reproduced" if done == wanted else "not run"
    return Judgement(verdict, ours, done)  # type: ignore[arg-type]  # one of the verdicts


def order(_: Sequence[Settings], __: Parameters, evidence: Evidence) -> Judgement:
    """Whether in each whole part an experiment's seed is its place, and ids are in order of the places."""
    parts = [_of_grid(evidence, {"block_size": block_size, "n_layer": n_layer}) for block_size, n_layer in PARTS]
    right = total = 0
    for rows in (rows for rows in parts if len({place for place, _ in rows}) == len(CELLS)):
        ids = [row["id"] for _, row in sorted(rows.items(), key=lambda item: (item[0][0], item[1]["id"]))]
        right += sum(row["seed"] == place for (place, _), row in rows.items()) if ids == sorted(ids) else 0
        total += len(rows)
    if not total:
        return Judgement("not run", why="No part of the grid is here as a whole.")
    ours = f"{right} of {total} in their places"
    return Judgement("reproduced" if right == total else "not reproduced", ours, total)


def gap(_: Sequence[Settings], parameters: Parameters, evidence: Evidence) -> Judgement:
    """Whether the published gap is the difference of the published losses, and ours of ours."""
    implied = round(parameters["val"] - parameters["train"], 4)
    if implied != parameters["gap"]:
        return Judgement("contradicts itself", why=f"The losses give {implied:.4f}.")
    table = evidence.results.finished[["train_loss", "val_loss", "gap"]].dropna()
    if table.empty:
        return Judgement("not run", why="No run has both losses.")
    most = float((table["val_loss"] - table["train_loss"] - table["gap"]).abs().max())
    return Judgement("reproduced" if most < 1e-9 else "not reproduced", f"at most {most:.1g} apart", len(table))


def parameters_and_loss(_: Sequence[Settings], __: Parameters, evidence: Evidence) -> Judgement:
    """No direction was published, so there is no verdict; ours stands beside it."""
    table = evidence.results.finished
    row = rank_correlation(table["parameters"].to_numpy(), table["val_loss"].to_numpy())
    why = "Neither a figure nor a direction was published."
    if math.isnan(row["rho"]):
        return Judgement("not testable here", n=int(row["n"]), why=why)
    ours = f"rank correlation {row['rho']:.2f}"
    return Judgement("not testable here", ours, int(row["n"]), row["low"], row["high"], why)


# --- the corpus, and what no run can tell


def corpus(_: Sequence[Settings], parameters: Parameters, evidence: Evidence) -> Judgement:
    """A fact about the text that experiments read: from the text where it is here, else from what their runs recorded."""
    texts = evidence.results.corpora.values()
    facts = next((one for one in texts if one.sha256 == SHAKESPEARE_SHA256 or one.name == "shakespeare"), None)
    if facts is None:
        return Judgement("not run", why="No experiment read it.")
    ours = _fact(facts, parameters["fact"])
    if ours is None:
        return Judgement("not testable here", why="The text is not here, and the runs recorded no such fact.")
    shown = f"{ours:,}" if type(ours) is int else "yes" if ours is True else "no" if ours is False else str(ours)
    return Judgement("reproduced" if ours == parameters["value"] else "not reproduced", shown, 1)


def _fact(facts: CorpusFacts, fact: str) -> int | bool | str | None:
    if fact == "sha256":
        return facts.sha256
    if fact in ("train", "val", "characters") and facts.tokenizer == "char":
        recorded = {"train": facts.train_tokens, "val": facts.val_tokens}
        return recorded.get(fact, facts.train_tokens + facts.val_tokens)
    parts = facts.parts()
    if parts is None:
        return None
    sizes, text = [len(part) for part in parts], "".join(parts)
    known_of_text = {"distinct": len(set(text)), "ascii": text.isascii(), "characters": len(text)}
    return {**known_of_text, "train": sizes[0], "val": sizes[1]}[fact]


def untestable(_: Sequence[Settings], parameters: Parameters, __: Evidence) -> Judgement:
    return Judgement("not testable here", why=parameters.get("because", ""))


TESTS: dict[str, Test] = {
    "measure": measure,
    "parameters": count,
    "lower": is_lower,
    "curve": falls,
    "plateau": plateau,
    "writes": writes,
    "loss_and_samples": loss_and_samples,
    "sample_length": sample_length,
    "factorial": factorial,
    "order": order,
    "gap": gap,
    "parameters_and_loss": parameters_and_loss,
    "corpus": corpus,
    "untestable": untestable,
}
