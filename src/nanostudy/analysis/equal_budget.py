"""Like for like: rankings at an equal budget (context, updates, tokens, arithmetic or time), and Pareto fronts of loss and cost."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal, get_args

import numpy as np
import pandas as pd

from nanostudy.analysis.frames import AT_CONTEXT, Results
from nanostudy.errors import UsageError
from nanostudy.text import counted, digits, duration, listed

Budget = Literal["context", "updates", "tokens", "arithmetic", "time"]
Cost = Literal["parameters", "flops", "seconds"]

SPENT = {"updates": "step", "tokens": "tokens", "arithmetic": "tokens", "time": "seconds"}  # the evaluations' column
CLOSE = 1e-9  # relative: an evaluation this near the budget is at the budget
MACHINE = ("device", "device_name", "precision", "threads", "members")


def equal_budget(results: Results, at: Budget) -> pd.DataFrame:
    """name, value (validation loss), at (the budget), interpolated; index `place` from 1. attrs["explanation"] says how.

    "context": losses scored in windows of the longest length that all experiments share. Otherwise: each curve's loss at the
    largest budget that all reached, on straight lines between evaluations. Schedules are made for each run's own length: at an
    earlier budget a longer run's learning rate is still high, which the explanation says. Raises UsageError.
    """
    if at not in get_args(Budget):
        raise UsageError(f"There is no comparison at equal {at!r}: {', '.join(get_args(Budget))}.")
    table = results.finished
    if not len(table):
        return _ranked([], "No experiment has finished.")
    return _at_context(results, table) if at == "context" else _at_budget(results, table, at)


def common_context(results: Results) -> int | None:
    """The longest windows in which all experiments were scored."""
    finished = results.finished
    return next(
        (c for c in reversed(results.contexts) if np.isfinite(finished[f"{AT_CONTEXT}{c}"].astype(float)).all()), None
    )


def _at_context(results: Results, table: pd.DataFrame) -> pd.DataFrame:
    context = common_context(results)
    if context is None:
        scored = int(table[[f"{AT_CONTEXT}{context}" for context in results.contexts]].notna().any(axis=1).sum())
        why = f"{scored} of {counted(len(table), 'experiment')} have losses at fixed contexts, and none that all share."
        return _ranked([], why)
    own = sorted({int(size) for size in table["block_size"] if size is not None})
    note = f"Validation loss in windows of {context} tokens, the longest that all experiments were scored at"
    note += "." if own == [context] else f"; their own contexts are {', '.join(map(str, own))}."
    return _ranked([(name, loss, context, False) for name, loss in table[f"{AT_CONTEXT}{context}"].items()], note)


def _at_budget(results: Results, table: pd.DataFrame, at: Budget) -> pd.DataFrame:
    curves = _curves(results, table, at)
    if not curves:
        return _ranked([], f"None of the {counted(len(table), 'experiment')} has a curve over {at}.")
    budget = min(float(spent[-1]) for spent, _ in curves.values())
    rows, longer = [], 0
    for name, (spent, losses) in curves.items():
        if budget < spent[0]:
            continue
        exact = bool(np.isclose(spent, budget, rtol=CLOSE, atol=0).any())
        longer += float(spent[-1]) > budget * (1 + CLOSE)
        rows.append((name, float(np.interp(budget, spent, losses)), budget, not exact))
    interpolated, late, without = sum(row[3] for row in rows), len(curves) - len(rows), len(table) - len(curves)
    notes = [f"Validation loss after {_budget_text(budget, at)}, the most that all experiments reached."]
    if interpolated:
        notes.append(f"Interpolated between two evaluations: {counted(interpolated, 'value')}.")
    if longer:
        learning = "so their learning rates had not yet decayed fully"
        notes.append(f"{counted(longer, 'experiment')} trained longer, {learning}.")
    if without:
        notes.append(f"Left out: {counted(without, 'experiment')} without a curve.")
    if late:
        notes.append(f"Left out: {counted(late, 'experiment')} whose first evaluation came later.")
    if at == "time":
        notes.append(incomparable_times(table))
    return _ranked(rows, " ".join(note for note in notes if note))


def _curves(results: Results, table: pd.DataFrame, at: Budget) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """(spent, validation loss), ascending, of each finished experiment with a curve."""
    flops_per_token = (table["flops"] / table["tokens"]).to_dict()
    curves = {}
    for name, rows in results.evaluations.groupby("name", sort=False):
        if name not in table.index:
            continue
        spent, losses = rows[SPENT[at]].to_numpy(dtype=float), rows["val_loss"].to_numpy(dtype=float)
        if at == "arithmetic":
            spent = spent * flops_per_token[name]
        whole = np.isfinite(spent) & np.isfinite(losses)
        if whole.any():
            curves[str(name)] = spent[whole], losses[whole]
    return {name: curves[name] for name in map(str, table.index) if name in curves}


def _budget_text(budget: float, at: Budget) -> str:
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


def pareto(results: Results, cost: Cost = "parameters") -> pd.DataFrame:
    """name, cost, val_loss, on_front: no other finished experiment is as cheap and as good, and better in one of the two.

    By cost, then loss. attrs["explanation"] says why `seconds` cannot be compared, where that is so.
    """
    table = results.finished
    table = table[np.isfinite(table[cost].to_numpy(dtype=float))]
    rows = table[[cost, "val_loss"]].rename(columns={cost: "cost"}).rename_axis("name").reset_index()
    rows = rows.sort_values(["cost", "val_loss"], kind="stable", ignore_index=True)
    better = rows["val_loss"] < rows["val_loss"].cummin().shift(fill_value=math.inf)
    rows["on_front"] = better.groupby([rows["cost"], rows["val_loss"]]).transform("any").astype(bool)  # equals, too
    rows.attrs["explanation"] = incomparable_times(table) if cost == "seconds" else ""
    return rows


def incomparable_times(table: pd.DataFrame) -> str:
    """Why times cannot be compared; empty where they can."""
    differing = [name for name in MACHINE if table[name].nunique(dropna=False) > 1]
    if not differing:
        return ""
    values = [f"{name} ({', '.join(sorted({str(v) for v in table[name]}))})" for name in differing]
    return f"Times are not like for like: the experiments differ in {listed(values)}. Members of a stack share their seconds."
