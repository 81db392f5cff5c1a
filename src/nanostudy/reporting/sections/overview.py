"""What was run and on what: the first sentence and figures of many results, their table, their machines."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pandas as pd

from nanostudy.analysis.frames import Results, known, levels
from nanostudy.measures import MEASURES, NATS
from nanostudy.reporting.charts.marks import varying
from nanostudy.reporting.document import Blocks, Experiments, Grid, Prose
from nanostudy.reporting.findings import Findings
from nanostudy.reporting.phrases import amount, number, short
from nanostudy.reporting.sections import pair
from nanostudy.text import brief_value, counted, digits, duration, listed, value_text

MOST_RUNS = 16  # that are listed each with its machine; more are put together by machine
MOST_LEVELS = 6  # of a setting, that the first sentence names


def lede(f: Findings) -> str:
    """One plain sentence."""
    results = f.results
    table, finished = results.experiments, results.finished
    if table.empty:
        return "No experiment is here yet."
    if f.pair:
        return pair.lede(f)
    axes = varying(results) if len(finished) > 1 else list(results.factors)
    of = f" with {listed([f'{name} {_levels(table[name])}' for name in axes])}" if axes else ""
    texts = [facts.name for facts in results.corpora.values()]
    on = f" on {listed(texts)}" if texts else ""
    if finished.empty:
        return f"{counted(len(table), 'experiment')}{of}{on}: none has finished."
    best = finished.sort_values("val_loss", kind="stable").iloc[0]
    reached = f"a validation loss of {number(float(best['val_loss']))} nats per token"
    if len(table) == 1:
        return f"One GPT was trained{on}, to {reached}."
    some = f"{len(finished):,} of {len(table):,}" if len(finished) < len(table) else f"{len(table):,}"
    through = f" with {listed([f'{name} {brief_value(best[name])}' for name in axes])}" if axes else ""
    if len(finished) == 1:
        return f"One of {len(table):,} GPTs{on} has finished{through}: it reaches {reached}."
    return f"Of {some} GPTs trained{on}{of}, the best reaches {reached}{through}."


def _levels(column: pd.Series) -> str:
    values = levels(column)
    if len(values) > MOST_LEVELS:
        return f"from {brief_value(values[0])} to {brief_value(values[-1])} ({len(values)} levels)"
    return "/".join(map(value_text, values))


def totals(results: Results) -> dict[str, str]:
    """Of all experiments together, where it is known."""
    table, finished = results.experiments, results.finished
    facts = {"experiments finished": f"{len(finished):,} of {len(table):,}"}
    if len(finished):
        facts[f"lowest {MEASURES['val_loss'].axis}"] = amount(finished["val_loss"].min(), "val_loss")
    run = table[table["status"] != "waiting"]
    sizes = run["parameters"].dropna()
    if len(sizes):
        facts["parameters"] = "–".join(dict.fromkeys((short(sizes.min()), short(sizes.max()))))
    titles = {
        "tokens": "tokens trained on, in all",
        "flops": "arithmetic, in all",
        "seconds": "time, all trainings added up",
    }
    for name, title in titles.items():
        if total := float(run[name].sum()):
            facts[title] = amount(total, name)
    return facts


# --- all experiments


def experiments(f: Findings) -> Blocks:
    """Columns are names, losses, settings that vary, and what else was measured; stars and notes where there are any."""
    rows = f.data.experiments
    if f.training or not rows:
        return []
    measured = [name for name in MEASURES if any(row.get(name) is not None for row in rows)]
    losses = sorted((name for name in measured if MEASURES[name].unit == NATS), key=lambda name: name != "val_loss")
    others = [name for name in measured if name not in losses]
    stars, notes = ([mark] if any(row.get(mark) for row in rows) else [] for mark in ("star", "note"))
    names = [*stars, "name", *losses, *f.data.settings, *others, "status", *notes]
    columns = [(name, _heading(name)) for name in names]
    return [
        Prose("Losses are in nats per token."),
        Experiments(columns, [*f.results.factors, "part", "status"], _example(f)),
    ]


def _example(f: Findings) -> str:
    """An expression that keeps some of these experiments."""
    losses = f.results.finished["val_loss"]
    axes = [name for name in varying(f.results) if len(levels(f.results.finished[name])) <= MOST_LEVELS]
    below = [f"val_loss < {losses.median():.3g}"] if len(losses) > 1 else []
    value = value_text(f.results.finished[axes[-1]].iloc[0]) if axes else ""
    return " and ".join([*below, *([f"{axes[-1]} == {value}"] if axes else [])]) or "status == finished"


def _heading(name: str) -> str:
    if name in MEASURES:
        return MEASURES[name].heading or MEASURES[name].title
    return {"star": "★", "name": "experiment"}.get(name, name)


# --- machines


def machines(f: Findings) -> Blocks:
    """Sizes, machines and speed: of each run where there are few, by machine where there are many."""
    table = f.results.experiments
    table = table[table["seconds"].notna() | table["device"].notna()]
    if f.training or table.empty:
        return []
    table = table.assign(speed=table["tokens"] / table["seconds"])
    text = "Tokens per second are over the whole training, evaluations included. Members of one stack share its time."
    return [_each_training(table) if len(table) <= MOST_RUNS else _by_machine(table), Prose(text)]


def _each_training(table: pd.DataFrame) -> Grid:
    rows = [
        {
            "experiment": name,
            "parameters": _or_empty(row["parameters"], _whole),
            "machine": _machine(row),
            "stacked": _or_empty(row["members"], _whole),
            "updates": _or_empty(row["updates"], _whole),
            "epochs": _or_empty(row["epochs"], digits),
            "time": _or_empty(row["seconds"], duration),
            "tokens/s": _or_empty(row["speed"], digits),
        }
        for name, row in table.iterrows()
    ]
    return Grid("Each training", rows)


def _by_machine(table: pd.DataFrame) -> Grid:
    names = ["device", "device_name", "precision", "threads", "members"]
    keys = table[names].astype(object).where(table[names].notna(), None).map(str)
    rows = [
        {
            "machine": _machine(group.iloc[0]),
            "stacked": _or_empty(group["members"].iloc[0], _whole),
            "experiments": len(group),
            "tokens/s, median": _or_empty(group["speed"].median(), digits),
            "time, added up": duration(float(group["seconds"].sum())),
        }
        for _, group in table.groupby([keys[name] for name in names], sort=False)
    ]
    return Grid("Machines and stacks", rows)


def _machine(row: pd.Series) -> str:
    threads = _or_empty(row["threads"], lambda value: counted(int(value), "thread"))
    parts = [row["device"], row["device_name"], row["precision"], threads or None]
    return ", ".join(str(part) for part in parts if known(part)) or "not known"


def _or_empty(value: Any, text: Callable[[Any], str]) -> str:
    return text(value) if known(value) else ""


def _whole(value: float) -> str:
    return f"{int(value):,}"
