"""Like for like: rankings at an equal budget (context, updates, tokens, arithmetic or time), and Pareto fronts of loss and cost."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Literal, get_args

import numpy as np
import pandas as pd

from nanostudy.analysis.divergence import unreliable
from nanostudy.analysis.frames import AT_CONTEXT, MACHINE, Results
from nanostudy.analysis.ranking import ranking
from nanostudy.errors import UsageError
from nanostudy.text import counted, digits, duration, listed

Budget = Literal["context", "updates", "tokens", "arithmetic", "time"]
Cost = Literal["parameters", "flops", "seconds"]

SPENT = {"updates": "step", "tokens": "tokens", "arithmetic": "tokens", "time": "seconds"}  # the evaluations' column
CLOSE = 1e-9  # relative: an evaluation this near the budget is at the budget


def equal_budget(results: Results, at: Budget) -> pd.DataFrame:
    """The ranking (columns RANKING) by the validation loss at an equal budget, with `at` (the budget) and `interpolated`.

    attrs["explanation"] says how, and attrs["basis"] what noise the intervals and ties are judged by.

    "context": losses scored in windows of the longest length that all experiments share. Otherwise: each curve's loss at the
    largest budget that all reached, on straight lines between evaluations. Schedules are made for each run's own length: at an
    earlier budget a longer run's learning rate is still high, which the explanation says. Raises UsageError.
    """
    if at not in get_args(Budget):
        raise UsageError(f"There is no comparison at equal {at!r}: {', '.join(get_args(Budget))}.")
    table = results.finished
    if not len(table):
        return _ranked(results, [], "No experiment has finished.")
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
        return _ranked(results, [], why)
    own = sorted({int(size) for size in table["block_size"] if size is not None})
    note = f"Validation loss in windows of {context} tokens, the longest that all experiments were scored at"
    note += "." if own == [context] else f"; their own contexts are {', '.join(map(str, own))}."
    by = f"{AT_CONTEXT}{context}"
    return _ranked(results, [(name, loss, context, False) for name, loss in table[by].items()], note, by)


def _at_budget(results: Results, table: pd.DataFrame, at: Budget) -> pd.DataFrame:
    curves = _curves(results, table, at)
    if not curves:
        return _ranked(results, [], f"None of the {counted(len(table), 'experiment')} has a curve over {at}.")
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
    return _ranked(results, rows, " ".join(note for note in notes if note))


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


def _ranked(
    results: Results, rows: Sequence[tuple[object, float, float, bool]], explanation: str, by: str = "val_loss"
) -> pd.DataFrame:
    """Ranks the values as the experiments' measure `by`."""
    values = pd.DataFrame(rows, columns=["name", "value", "at", "interpolated"]).set_index("name")
    experiments = results.experiments.assign(**{by: values["value"].reindex(results.experiments.index).astype(float)})
    table = ranking(replace(results, experiments=experiments), by)
    table = table.assign(**{name: table["name"].map(values[name]) for name in ("at", "interpolated")})
    table.attrs["explanation"] = explanation
    return table


def pareto(results: Results, cost: Cost = "parameters") -> pd.DataFrame:
    """name (of the settings' experiment with the lowest loss), cell, n, cost, val_loss (means over seeds), on_front, near_front.

    On the front no other settings are as cheap and as good, and better in one of the two; near it are those whose difference from
    the best of the same cost or a lower one is within its own 95% interval. Settings that diverged with a seed are left out. By
    cost, then loss. attrs["explanation"] says why `seconds` cannot be compared, where that is so.
    """
    table = results.finished
    table = table[np.isfinite(table[cost].to_numpy(dtype=float))]
    ranked = ranking(replace(results, experiments=results.experiments.loc[table.index]))
    ranked = ranked[~ranked["name"].isin(unreliable(results))]
    rows = ranked.assign(cell=ranked["name"].map(results.cells()), cost=ranked["name"].map(table[cost].astype(float)))
    rows["cost"] = rows.groupby("cell")["cost"].transform("mean")
    rows = rows.drop_duplicates("cell").rename(columns={"mean": "val_loss"})
    rows = rows.sort_values(["cost", "val_loss"], kind="stable", ignore_index=True)
    better = rows["val_loss"] < rows["val_loss"].cummin().shift(fill_value=math.inf)
    rows["on_front"] = better.groupby([rows["cost"], rows["val_loss"]]).transform("any").astype(bool)  # equals, too
    best = rows["val_loss"].cummin()
    half = rows["high"] - rows["val_loss"]
    of_best = half.where(better).ffill()
    apart = rows["val_loss"] - best > np.hypot(half, of_best)
    rows["near_front"] = half.notna() & ~apart & ~rows["on_front"]
    rows = rows[["name", "cell", "n", "cost", "val_loss", "on_front", "near_front"]]
    rows.attrs["explanation"] = incomparable_times(table) if cost == "seconds" else ""
    return rows


def incomparable_times(table: pd.DataFrame) -> str:
    """Why times cannot be compared; empty where they can."""
    differing = [name for name in (*MACHINE, "members") if table[name].nunique(dropna=False) > 1]
    if not differing:
        return ""
    values = [f"{name} ({', '.join(sorted({str(v) for v in table[name]}))})" for name in differing]
    return f"Times are not like for like: the experiments differ in {listed(values)}. Members of a stack share their seconds."
