"""The sections about losses over time and against cost: curves, gaps, fronts, parts, fair comparisons."""

from __future__ import annotations

from typing import Any

import pandas as pd

from nanostudy.analysis.analysis import Analysis
from nanostudy.analysis.equal_budget import Budget, Cost
from nanostudy.reporting.charts import charts
from nanostudy.reporting.charts import curves as curve_charts
from nanostudy.reporting.charts.figure import each
from nanostudy.reporting.document import (
    Block,
    Bullets,
    Grid,
    Missing,
    Prose,
    Section,
    Shown,
    figure_or_reason,
)
from nanostudy.reporting.page_data import PageData
from nanostudy.reporting.phrases import amount, nats, quantity, short, signed
from nanostudy.text import counted, digits, duration

BUDGETS: dict[Budget, str] = {
    "context": "equal context",
    "updates": "equal updates",
    "tokens": "equal tokens",
    "arithmetic": "equal arithmetic",
    "time": "equal time",
}
COSTS: tuple[Cost, ...] = ("parameters", "flops", "seconds")
FIRST_PLACES = 3
MOST_ROWS = 40  # of a small table


def curves(analysis: Analysis, data: PageData) -> Section:
    results = analysis.results
    figure = curve_charts.curves_figure(results, data.curves, data.colourings[0])
    if isinstance(figure, str):
        return Section("curves", "Curves", [Missing(figure)])
    blocks: list[Block] = [Shown(figure, colours=True, whole=curve_charts.tops(results, data.curves))]
    blocks.append(Bullets([*_overfitting(analysis), *_plateaus(analysis), *_stability(analysis)]))
    over = analysis.overfitting
    some = over[over["overfits"].fillna(False).astype(bool)].sort_values("rise", ascending=False) if len(over) else over
    if len(some):
        rows = [
            (r.name, int(r.best_step), int(r.last_step), nats(r.best_val_loss), nats(r.val_loss), signed(r.rise, 4))
            for r in named(some.head(MOST_ROWS))
        ]
        header = ("experiment", "best update", "last update", "lowest", "at the end", "rise")
        blocks.append(Grid("Those that overfit: their best weights came before the end", header, rows, folded=True))
    return Section("curves", "Curves", blocks)


def named(table: pd.DataFrame) -> Any:
    """Rows with a field `name`, whether it is a column or the index."""
    return (table if "name" in table.columns else table.reset_index(names="name")).itertuples(name="Row")


def _overfitting(analysis: Analysis) -> list[str]:
    table = analysis.overfitting
    if table.empty:
        return ["Overfitting cannot be judged without curves."]
    over, early = table[table["overfits"].fillna(False).astype(bool)], (table["best_step"] < table["last_step"]).sum()
    told = f"Overfitting: {len(over) or 'none'} of {len(table):,} end more than 1% above their lowest validation loss while the training loss falls"
    return [f"{told}; the best evaluation came before the last in {int(early) or 'none'}."]


def _plateaus(analysis: Analysis) -> list[str]:
    table = analysis.convergence
    if table.empty:
        return []
    steps = pd.to_numeric(table["plateau"], errors="coerce").dropna()
    if steps.empty:
        return [
            f"Convergence: no plateau in any of {counted(len(table), 'training')}; all were still falling, as far as can be told."
        ]
    return [
        f"Convergence: {len(steps):,} of {len(table):,} reached a plateau, at update {steps.median():,.0f} in the median."
    ]


def _stability(analysis: Analysis) -> list[str]:
    table = analysis.stability
    if table.empty:
        return ["Stability cannot be judged without training logs."]
    spikes, diverged = pd.to_numeric(table["spikes"], errors="coerce"), int(table["diverged"].astype(bool).sum())
    worst = pd.to_numeric(table["largest_norm"], errors="coerce")
    told = (
        f"Stability: {diverged or 'none'} diverged; {int((spikes > 0).sum()) or 'none'} had spikes of the gradient norm"
    )
    if worst.notna().any():
        told += f"; the largest norm was {digits(float(worst.max()))}"
    return [f"{told}."]


def gap(analysis: Analysis, data: PageData) -> Section:
    figure = curve_charts.gap_figure(analysis.results, data.curves, data.colourings[0])
    return Section("gap", "Loss gap", figure_or_reason(figure, colours=True))


def costs(analysis: Analysis, data: PageData) -> Section:
    fronts: dict[str, pd.DataFrame] = {cost: analysis.pareto(cost) for cost in COSTS}
    figure = curve_charts.pareto_figure(analysis.results, fronts, data.colourings[0])
    blocks = figure_or_reason(figure, colours=True)
    if isinstance(figure, str):
        return Section("costs", "What a lower loss costs", blocks)
    for cost, table in fronts.items():
        front = table[table["on_front"].astype(bool)].sort_values("cost")
        rows = [(row.name, amount(row.cost, cost), nats(row.val_loss)) for row in named(front.head(MOST_ROWS))]
        header = ("experiment", quantity(cost)[0], "validation loss")
        blocks += [Grid(f"The front against {quantity(cost)[0]}", header, rows, folded=True)] if rows else []
    return Section("costs", "What a lower loss costs", blocks)


def parts(analysis: Analysis, data: PageData) -> Section:
    means = analysis.part_means
    blocks = figure_or_reason(charts.parts_figure(analysis.results, means, data.colourings[0]), colours=True)
    if len(means) > 1:
        rows = [
            (row.part, row.n, nats(row.mean), _ends(row.low, row.high), nats(row.best), row.best_name)
            for row in each(means)
        ]
        header = ("part", "finished", "mean", "95% interval", "lowest", "by")
        blocks.append(Grid("The parts' validation losses", header, rows))
    return Section("parts", "The parts compared", blocks)


def _ends(low: float, high: float) -> str:
    return "not known" if low != low else f"{nats(low)} to {nats(high)}"


def fair(analysis: Analysis, data: PageData) -> Section:
    """The first places at every common budget, and what was done to compare them."""
    rows, told = [], []
    for at, name in BUDGETS.items():
        table = analysis.equal_budget(at)
        if table.empty:
            told.append(f"{name.capitalize()}: {table.attrs.get('explanation') or 'not known of these experiments.'}")
            continue
        table = table.sort_values("value", kind="stable")
        shown = _budget(at, float(table["at"].iloc[0]))
        first = [f"{row.name} ({nats(row.value)})" for row in named(table.head(FIRST_PLACES))]
        rows.append((name, shown, *first, *[""] * (FIRST_PLACES - len(first))))
        told.append(f"{name.capitalize()}: {table.attrs.get('explanation', '')}")
    if not rows:
        return Section(
            "fair", "Fair comparisons", [Missing("No common budget is known of these experiments."), Bullets(told)]
        )
    why = "A longer training, a wider model or a longer context lowers the loss by itself. At an equal budget, who is first?"
    header = ("at", "budget", "first", "second", "third")
    return Section(
        "fair", "Fair comparisons", [Prose(why), Grid("First places at equal budgets", header, rows), Bullets(told)]
    )


def _budget(at: str, budget: float) -> str:
    if at == "time":
        return duration(budget)
    if at == "arithmetic":
        return f"{short(budget)}FLOP"
    return f"{budget:,.0f} {'tokens' if at == 'context' else at}"
