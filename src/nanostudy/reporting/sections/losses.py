"""Losses over time and against cost: curves, gaps, fronts, parts, comparisons at equal budgets, scaling."""

from __future__ import annotations

from itertools import zip_longest

import pandas as pd

from nanostudy.analysis import curves as curve
from nanostudy.analysis.equal_budget import Budget, Cost
from nanostudy.analysis.frames import known
from nanostudy.measures import MEASURES
from nanostudy.reporting.charts import losses as charts
from nanostudy.reporting.charts.experiments import parts_figure, ranked_cells
from nanostudy.reporting.charts.figure import Figure, each
from nanostudy.reporting.charts.training import training_figure
from nanostudy.reporting.document import Blocks, Bullets, Grid, Prose
from nanostudy.reporting.findings import Findings, Training
from nanostudy.reporting.phrases import amount, ends, number, short, signed
from nanostudy.text import counted, digits, duration

BUDGETS: tuple[Budget, ...] = ("context", "updates", "tokens", "arithmetic", "time")
COSTS: tuple[Cost, ...] = ("parameters", "flops", "seconds")
PLACES = ("first", "second", "third")
MOST_ROWS = 40  # of a small table


def curves(f: Findings) -> Blocks:
    if f.training:
        return [_curve_of(f.training)]
    figure = charts.curves_figure(f.results.corpora.values(), f.data.curves, f.data.batches, f.colour)
    if figure is None:
        return []
    table = f.analysis.overfitting
    table = table[table["overfits"].fillna(False).astype(bool)].sort_values("rise", ascending=False)
    rows = [
        {
            "experiment": row.name,
            "best update": int(row.best_step),
            "last update": int(row.last_step),
            "lowest": number(row.best_val_loss),
            "at the end": number(row.val_loss),
            "rise": signed(row.rise, 4),
        }
        for row in each(table.head(MOST_ROWS))
    ]
    caption = "Those that overfit: their best weights came before the end"
    notes = Bullets([text for text in (_overfitting(f), _plateaus(f), _stability(f)) if text])
    return [figure, notes, Grid(caption, rows, folded=True)]


def _curve_of(t: Training) -> Figure | None:
    course = f" {curve.course(t.evaluations)}" if t.evaluations else ""
    return training_figure(
        t.evaluations,
        t.log,
        f"{t.corpus['name']}: {t.model()}. {t.length()}.",
        f"Losses against updates.{course}",
        entropy=t.entropy,
        grad_clip=t.experiment.grad_clip,
    )


def _overfitting(f: Findings) -> str:
    table = f.analysis.overfitting
    if table.empty:
        return ""
    judged = table[table["overfits"].notna()]
    if judged.empty:
        return "Overfitting: no training can be judged: none has ended with a curve."
    over, early = int(judged["overfits"].sum()), int((judged["best_step"] < judged["last_step"]).sum())
    left = len(table) - len(judged)
    return (
        f"Overfitting: {over or 'none'} of {len(judged):,} end more than 1% above their lowest validation loss while the "
        f"training loss falls; the best evaluation came before the last in {early or 'none'}."
        + (f" {counted(left, 'training')} without a curve or an end cannot be judged." if left else "")
    )


def _plateaus(f: Findings) -> str:
    table = f.analysis.convergence
    steps = pd.to_numeric(table["plateau"], errors="coerce").dropna()
    if table.empty:
        return ""
    if steps.empty:
        return f"Convergence: no plateau in any of {counted(len(table), 'training')}; all losses were still falling."
    median = f"{steps.median():,.0f}"
    return f"Convergence: {len(steps):,} of {len(table):,} reached a plateau, at update {median} in the median."


def _stability(f: Findings) -> str:
    table = f.analysis.stability
    if table.empty:
        return ""
    diverged, spiked = int(table["diverged"].sum()), int((table["spikes"] > 0).sum())
    largest = pd.to_numeric(table["largest_norm"], errors="coerce").max()
    norm = f"; the largest norm was {digits(float(largest))}" if known(largest) else ""
    return f"Stability: {diverged or 'none'} diverged; {spiked or 'none'} had spikes of the gradient norm{norm}."


def gap(f: Findings) -> Blocks:
    return [charts.gap_figure(f.results, f.data.curves, f.colour)]


def costs(f: Findings) -> Blocks:
    fronts: dict[str, pd.DataFrame] = {cost: f.analysis.pareto(cost) for cost in COSTS}
    figure = charts.pareto_figure(fronts, f.colour)
    if figure is None:
        return []
    blocks: Blocks = [figure]
    for cost, table in fronts.items():
        front = table[(table["on_front"] | table["near_front"]).astype(bool)].sort_values("cost").head(MOST_ROWS)
        rows = [
            {
                "settings": charts.front_label(row),
                "seeds": row.n,
                MEASURES[cost].title: amount(row.cost, cost),
                f"mean {MEASURES['val_loss'].title}": number(row.val_loss),
                "front": "on" if row.on_front else "near",
            }
            for row in each(front)
        ]
        blocks.append(Grid(f"The front against {MEASURES[cost].title}", rows, folded=True))
    return blocks


def parts(f: Findings) -> Blocks:
    means = f.analysis.part_means
    figure = parts_figure(means, f.colour)
    if figure is None:
        return []
    rows = [
        {
            "part": row.part,
            "finished": row.n,
            "settings": row.cells,
            "diverged": row.diverged,
            "mean": number(row.mean),
            "95% interval (seeds)": ends(row.low, row.high),
            "lowest single one": f"{number(row.best)} ({row.best_name})",
        }
        for row in each(means)
    ]
    return [figure, Grid("The parts' validation losses", rows)]


def fair(f: Findings) -> Blocks:
    """The first places at every common budget, and what was done to compare them."""
    if not f.compares:
        return []
    rows, notes = [], []
    for at in BUDGETS:
        table = f.analysis.equal_budget(at)
        if table.attrs.get("explanation"):
            notes.append(f"Equal {at}: {table.attrs['explanation']}")
        cells = ranked_cells(f.results, table)[0] if len(table) else table
        if len(cells) < 2:  # nothing to compare
            continue
        first = [f"{row.label} ({number(row.mean)}, n = {row.n})" for row in each(cells.head(len(PLACES)))]
        tied = f"{int(cells['tied'].sum()) - 1:,} of {len(cells) - 1:,}"
        rows.append(
            {
                "at": f"equal {at}",
                "budget": _budget(at, float(table["at"].iloc[0])),
                **dict(zip_longest(PLACES, first, fillvalue="")),
                "indistinguishable from the first (95%)": tied if cells["low"].notna().any() else "not known",
            }
        )
    if not rows:
        return []
    why = "A longer training, a wider model or a longer context may lower the loss by itself. At an equal budget, who is first?"
    return [Prose(why), Grid("First places at equal budgets, by mean losses over seeds", rows), Bullets(notes)]


def _budget(at: str, budget: float) -> str:
    if at == "time":
        return duration(budget)
    if at == "arithmetic":
        return f"{short(budget)}FLOP"
    return f"{budget:,.0f} {'tokens' if at == 'context' else at}"


def scaling(f: Findings) -> Blocks:
    fits = f.analysis.scaling if f.compares else {}
    figure = charts.scaling_figure(f.results, fits, f.colour)
    if figure is None:
        return []
    lines = [f"Loss against {against}: {charts.fit_text(fit)}" for against, fit in fits.items()]
    return [figure, Bullets(lines)]
