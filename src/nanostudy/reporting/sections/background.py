"""What was run and on what, how it was judged, and how to do it again: the page's first and last sections."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import pandas as pd

from nanostudy.analysis.analysis import Analysis
from nanostudy.analysis.frames import WITHOUT_EFFECT, Results, levels
from nanostudy.reporting.answer import varying
from nanostudy.reporting.document import Block, Bullets, Grid, Missing, Prose, Section, Source
from nanostudy.reporting.page_data import PageData
from nanostudy.reporting.phrases import level_text, listed, setting_text, short
from nanostudy.settings import FIELDS
from nanostudy.text import counted, digits, duration

MOST_RUNS = 16  # that are listed each with its machine; more are put together by machine
MOST_LEVELS = 6  # of a setting, that the first sentence names


def lede(results: Results) -> str:
    """What was run and on what."""
    table, finished = results.experiments, results.finished
    total, done = len(table), len(finished)
    if not total:
        return "No experiment is here yet."
    told = ("One experiment" if total == 1 else f"{total:,} experiments") + (
        ", all finished" if done == total > 1 else ""
    )
    axes = varying(results) if done > 1 else list(results.factors)
    if axes:
        told += f", with {listed([f'{setting_text(name)} {_levels(table[name])}' for name in axes])}"
    return f"{told}. {_surroundings(results)}".strip()


def _levels(column: pd.Series) -> str:
    found = levels(column)
    if len(found) > MOST_LEVELS:
        return f"from {level_text(found[0])} to {level_text(found[-1])} ({len(found)} levels)"
    return "/".join(level_text(value) for value in found)


def _surroundings(results: Results) -> str:
    texts = [f"{facts.name} ({short(facts.train_tokens)} training tokens)" for facts in results.corpora.values()]
    machines = results.provenance.get("machines") or []
    kinds = dict.fromkeys(
        f"a {str(m['device']).upper() if m['device'] != 'cuda' else 'GPU'} ({m['device_name']}, {m['precision']})"
        for m in machines
        if m.get("device")
    )
    if not texts and not kinds:
        return "Where and on what text they were trained is not known." if len(results.experiments) else ""
    on = f"on {listed(texts)}" if texts else "on a text that is not known"
    return f"Each trained a GPT {on}{f', on {listed(list(kinds))}' if kinds else ''}."


def totals(results: Results) -> list[tuple[str, str]]:
    """Of all experiments together, where it is known."""
    table, finished = results.experiments, results.finished
    told = [("experiments finished", f"{len(finished):,} of {len(table):,}")]
    if len(finished):
        told.append(("lowest validation loss, nats per token", f"{finished['val_loss'].min():.4f}"))
    run = table[table["status"] != "waiting"]
    sizes = sorted(run["parameters"].dropna())
    if len(sizes):
        ends = dict.fromkeys((short(sizes[0]), short(sizes[-1])))
        told.append(("parameters", "–".join(ends)))
    seconds, flops, tokens = (run[column].dropna().sum() for column in ("seconds", "flops", "tokens"))
    if tokens:
        told.append(("tokens trained on, in all", short(float(tokens))))
    if flops:
        told.append(("arithmetic, in all", f"{short(float(flops))}FLOP"))
    if seconds:
        told.append(("time, all trainings added up", duration(float(seconds))))
    return told


# --- machines


def machines(analysis: Analysis, data: PageData) -> Section:
    """Sizes, machines and speed: of each run where there are few, by machine where there are many."""
    title = "Sizes, machines and speed"
    table = analysis.results.experiments
    run = table[table["seconds"].notna() | table["device"].notna()]
    if run.empty:
        return Section("machines", title, [Missing("On what these experiments ran, and how fast, is not known.")])
    speed = pd.to_numeric(run["tokens"], errors="coerce") / pd.to_numeric(run["seconds"], errors="coerce")
    run = run.assign(speed=speed)
    told = "Tokens a second are over the whole training, evaluations included. Members of one stack share its time."
    if len(run) <= MOST_RUNS:
        rows = [_run(str(name), row) for name, row in run.iterrows()]
        each = ("experiment", "parameters", "machine", "stacked", "updates", "epochs", "time", "tokens/s")
        return Section("machines", title, [Grid("Each training", each, rows), Prose(told)])
    names = ["device", *(["device_name"] if "device_name" in run else []), "precision", "threads", "members"]
    keys = run[names].astype(object).where(run[names].notna(), None)
    kinds: list[tuple[Any, ...]] = []
    for _, group in run.groupby([keys[name].map(str) for name in names], sort=False):
        row = group.iloc[0]
        kinds.append(
            (
                _machine(row),
                _whole(row["members"]),
                len(group),
                digits(group["speed"].median()) if group["speed"].notna().any() else "",
                duration(float(group["seconds"].sum())),
            )
        )
    header = ("machine", "stacked", "experiments", "tokens/s, median", "time, added up")
    return Section("machines", title, [Grid("Machines and stacks", header, kinds), Prose(told)])


def _run(name: str, row: pd.Series) -> tuple[str, ...]:
    amounts = [_whole(row[key]) for key in ("parameters", "members", "updates")]
    epochs = "" if math.isnan(row["epochs"]) else digits(row["epochs"])
    time = "" if math.isnan(row["seconds"]) else duration(row["seconds"])
    speed = "" if math.isnan(row["speed"]) else digits(row["speed"])
    return (name, amounts[0], _machine(row), amounts[1], amounts[2], epochs, time, speed)


def _machine(row: pd.Series) -> str:
    parts = [
        row["device"],
        row.get("device_name"),
        row["precision"],
        counted(int(row["threads"]), "thread") if _whole(row["threads"]) else None,
    ]
    return ", ".join(str(part) for part in parts if part is not None and part == part) or "not known"


def _whole(value: Any) -> str:
    return "" if value is None or value is pd.NA or value != value else f"{int(value):,}"


# --- method


def method(analysis: Analysis, data: PageData) -> Section:
    results, effects = analysis.results, analysis.effects
    told = [
        "Losses are mean cross entropies in nats per token, over the whole validation split in fixed windows, and over as many "
        "windows of the training split; they draw nothing at random.",
        "Intervals are 95%. They tell how far the same settings may differ by the luck of the draw of weights, batches and "
        "dropout, not how another text or another range of settings would turn out.",
        "Each effect has its own interval: of twenty that do nothing, one is expected to seem to do something.",
    ]
    told += [f"Effects: {effects.explanation}"] if effects.explanation else []
    if (results.experiments["source"] == "table").any():
        told.append(
            "Some results come from tables: how they were evaluated, on what machine and in how many updates is what the table "
            "says, or not known, and their last digits may be rounded."
        )
    fixed = fixed_settings(results)
    blocks: list[Block] = [Bullets(told)]
    caveats = [*results.notes, *effects.missing, *data.left_out]
    if caveats:
        blocks += [Prose("To be kept in mind:"), Bullets(list(dict.fromkeys(caveats)))]
    if fixed:
        blocks.append(Grid("Settings that all experiments share", ("setting", "value", "meaning"), fixed, folded=True))
    return Section("method", "Method and caveats", blocks)


def fixed_settings(results: Results) -> list[tuple[str, str, str]]:
    """With one known value in all experiments."""
    rows = []
    for name, field in FIELDS.items():
        if name in WITHOUT_EFFECT or name == "seed" or name not in results.experiments:
            continue
        found = levels(results.experiments[name])
        if len(found) == 1:
            rows.append((name, level_text(found[0]), field.meaning))
    return rows


# --- again


def again(analysis: Analysis, data: PageData) -> Section:
    """The command, the definition, the versions, machines and checksums."""
    known = analysis.results.provenance
    blocks: list[Block] = []
    if known.get("command"):
        blocks += [Prose("The same trainings, with the same settings and seeds:"), Source(str(known["command"]))]
    paths = [str(path) for path in known.get("paths", [])]
    if paths:
        blocks += [Prose("This page again, from its results:"), Source(report_command(paths))]
    if known.get("checksums"):
        blocks.append(Grid("Checksums, SHA-256", ("of", "checksum"), list(known["checksums"].items())))
    versions = [(one.get("nanostudy", ""), one.get("numerics_version", "")) for one in known.get("versions", [])]
    if versions:
        blocks.append(Grid("Versions", ("nanostudy", "numerics"), versions))
    found = [
        tuple(
            str(m.get(key, "") or "")
            for key in ("device", "device_name", "precision", "platform", "python", "torch", "experiments")
        )
        for m in known.get("machines", [])
    ]
    if found:
        header = ("device", "name", "precision", "platform", "Python", "PyTorch", "experiments")
        blocks.append(Grid("Machines", header, found))
    if known.get("definition"):
        blocks += [Prose("The study's definition:"), Source(str(known["definition"]).strip())]
    if not blocks:
        blocks.append(Missing("Where these results come from was not recorded."))
    return Section("reproduce", "How to reproduce it", blocks)


def report_command(paths: Sequence[str]) -> str:
    import shlex

    return f"nanostudy report {shlex.join(paths)}"
