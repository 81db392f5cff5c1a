"""Like for like: losses in windows of one length, and losses after equal updates, tokens, arithmetic or time."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal

import numpy as np
import pandas as pd

from nanostudy.analysis.frames import AT_CONTEXT, Results
from nanostudy.analysis.ranking import apart_in_time
from nanostudy.errors import UsageError
from nanostudy.text import counted, digits, duration

At = Literal["context", "updates", "tokens", "arithmetic", "time"]

BUDGETS = ("context", "updates", "tokens", "arithmetic", "time")
CLOSE = 1e-9  # of a budget: an evaluation as near as this is at it


def fair(results: Results, at: At) -> pd.DataFrame:
    """name, value (validation loss), at (the budget), interpolated; index `place` from 1. attrs["explanation"] in words.

    "context": scored in windows of the longest length that all have. Otherwise: where each curve is at the largest budget that
    all reached, straight lines between evaluations. Schedules were made for each run's own length: at an earlier budget the
    learning rate of a longer run is still high, which the explanation says.
    """
    if at not in BUDGETS:
        raise UsageError(f"There is no comparison at equal {at!r}: {', '.join(BUDGETS)}.")
    table = results.finished
    if not len(table):
        return _ranked([], "No experiment has finished.")
    return _at_context(results, table) if at == "context" else _at_budget(results, table, at)


def _at_context(results: Results, table: pd.DataFrame) -> pd.DataFrame:
    scored = [
        context for context in results.contexts if np.isfinite(table[f"{AT_CONTEXT}{context}"].astype(float)).all()
    ]
    if not scored:
        known = (
            sum(table[[f"{AT_CONTEXT}{c}" for c in results.contexts]].notna().any(axis=1)) if results.contexts else 0
        )
        return _ranked(
            [],
            f"Scored at fixed contexts: {known} of {counted(len(table), 'experiment')}, and at none that all share.",
        )
    context = max(scored)
    own = sorted({int(size) for size in table["block_size"] if size is not None})
    told = f"Validation loss in windows of {context} tokens, the longest that all experiments were scored at"
    told += "." if own == [context] else f"; their own contexts are {', '.join(map(str, own))}."
    return _ranked([(name, loss, context, False) for name, loss in table[f"{AT_CONTEXT}{context}"].items()], told)


def _at_budget(results: Results, table: pd.DataFrame, at: At) -> pd.DataFrame:
    curves = _curves(results, table, at)
    without = len(table) - len(curves)
    if not curves:
        return _ranked([], f"None of the {counted(len(table), 'experiment')} has a curve over {at}.")
    budget = min(float(spent[-1]) for spent, _ in curves.values())
    rows, extended = [], 0
    for name, (spent, losses) in curves.items():
        exact = bool(np.isclose(spent, budget, rtol=CLOSE, atol=0).any())
        if budget < spent[0]:
            continue
        extended += float(spent[-1]) > budget * (1 + CLOSE)
        rows.append((name, float(np.interp(budget, spent, losses)), budget, not exact))
    lacking = len(curves) - len(rows)
    told = [f"Validation loss after {_words(budget, at)}, the most that all experiments reached."]
    if any(row[3] for row in rows):
        told.append(f"On a straight line between two evaluations: {counted(sum(row[3] for row in rows), 'value')}.")
    if extended:
        told.append(
            f"{counted(extended, 'experiment')} went on after it, with learning rates that were not at their end yet."
        )
    if without:
        told.append(f"Left out: {counted(without, 'experiment')} without a curve.")
    if lacking:
        told.append(f"Left out: {counted(lacking, 'experiment')} first evaluated after it.")
    if at == "time":
        told += [why for why in [apart_in_time(table)] if why]
    return _ranked(rows, " ".join(told))


def _curves(results: Results, table: pd.DataFrame, at: At) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """(spent, validation loss) of each finished experiment that has a curve, ascending."""
    column = {"updates": "step", "tokens": "tokens", "arithmetic": "tokens", "time": "seconds"}[at]
    per_token = (table["flops"] / table["tokens"]).to_dict()
    found = {}
    for name, rows in results.evaluations.groupby("name", sort=False):
        if name not in table.index:
            continue
        spent, losses = rows[column].to_numpy(dtype=float), rows["val_loss"].to_numpy(dtype=float)
        if at == "arithmetic":
            spent = spent * per_token[name]
        whole = np.isfinite(spent) & np.isfinite(losses)
        if whole.any():
            found[str(name)] = spent[whole], losses[whole]
    return {name: found[name] for name in map(str, table.index) if name in found}


def _words(budget: float, at: At) -> str:
    if at == "time":
        return duration(budget)
    if at == "arithmetic":
        return f"{budget:.3g} floating-point operations of training"
    return f"{digits(budget) if not math.isclose(budget, round(budget)) else f'{round(budget):,}'} {at}"


def _ranked(rows: Sequence[tuple[object, float, float, bool]], explanation: str) -> pd.DataFrame:
    table = pd.DataFrame(rows, columns=["name", "value", "at", "interpolated"]).sort_values("value", kind="stable")
    table.index = pd.RangeIndex(1, len(table) + 1, name="place")
    table.attrs["explanation"] = explanation
    return table
