"""What a report says of settings that are numbers, in searches and sweeps: what matters, which values are best, their curves."""

from __future__ import annotations

import pandas as pd

from nanostudy.analysis.analysis import Analysis
from nanostudy.analysis.forest import SHUFFLES
from nanostudy.analysis.frames import known
from nanostudy.analysis.shapes import Shapes
from nanostudy.reporting.charts.figure import each
from nanostudy.reporting.charts.marks import varying
from nanostudy.reporting.charts.numbers import curves_figure
from nanostudy.reporting.document import Blocks, Grid, Prose
from nanostudy.reporting.findings import Findings
from nanostudy.reporting.phrases import are, number, rounded, short
from nanostudy.text import counted, listed

MOST_NAMED = 3  # settings that a sentence names
MISSES = 0.05  # the p below which curves are said to miss something


def what_matters(shapes: Shapes) -> str:
    table = shapes.changes
    if table.empty:
        return shapes.explanation
    sure = f"95% for {_all(len(table))}"
    if shapes.seed:
        sure += f"; what another seed than {shapes.seed} would change is in no interval"
    clear = table[table["clear"]]
    if clear.empty:
        first = table.iloc[0]
        if not known(first["high"]):
            return "No setting's effect can be said to differ from zero: these experiments do not show how large the noise is."
        return (
            f"No setting's effect differs from zero: the largest estimate is {first['factor']}'s, "
            f"{number(first['change'], 3)} nats per token between {rounded(first['at_highest'])} and {rounded(first['at_lowest'])}, "
            f"and up to {number(first['high'], 3)} agrees with the results ({sure})."
        )
    first, others = clear.iloc[0], clear.iloc[1:]
    words = (
        f"from {rounded(first['at_highest'])} to {rounded(first['at_lowest'])} it lowers the validation loss by "
        f"{_change(first)} nats per token"
    )
    then = [f"{row['factor']} {_step(row)} by {_change(row)}" for _, row in others.iterrows()]
    if shapes.leader or len(table) + len(shapes.inseparable) == 1:
        most = f"matters most: {words}, more than any other setting" if len(table) > 1 else f"matters: {words}"
        return f"{first['factor']} {most} ({sure}){f'; then {listed(then, MOST_NAMED)}' if then else ''}."
    if not then:
        return f"{first['factor']} matters: {words}; whether another setting matters more is undecided ({sure})."
    names = listed([str(name) for name in clear["factor"]], MOST_NAMED)
    each_by = [f"{first['factor']} {_step(first)} lowers the validation loss by {_change(first)} nats per token", *then]
    return f"{names} matter, and which matters most is undecided: {listed(each_by, MOST_NAMED)} ({sure})."


def _all(settings: int) -> str:
    return "all of its values at once" if settings == 1 else f"all {settings} settings at once"


def _change(row: pd.Series) -> str:
    return f"{number(row['change'], 3)} ({number(row['low'], 3)} to {number(row['high'], 3)})"


def _step(row: pd.Series) -> str:
    return f"{rounded(row['at_highest'])} → {rounded(row['at_lowest'])}"


def what_does_not(shapes: Shapes) -> str:
    table = shapes.changes
    if table.empty:
        return ""
    bounds = [
        f"{row.factor} (by at most {number(row.high, 3)})" if known(row.high) else str(row.factor)
        for row in each(table[~table["clear"]])
    ]
    if bounds:
        text = f"Whether {listed(bounds)} {are(len(bounds), 'has', 'have')} any effect is undecided"
    elif shapes.inseparable or len(table) > 1:
        text = f"Every setting that {'can be judged' if shapes.inseparable else 'was varied'} has an effect"
    else:
        text = "It is the only setting that was varied"
    if bounds or len(table) > 1:
        text += f" (95% for {_all(len(table))})"
    if shapes.inseparable:
        text += f"; {listed(shapes.inseparable)} cannot be separated from other settings by these experiments"
    if not known(shapes.misfit):
        return f"{text}; whether settings act together cannot be tested."
    if shapes.misfit < MISSES:
        return f"{text}; the fitted curves miss something (p = {shapes.misfit:.2g}): settings that act together, or bends of another form."
    together = " or that settings act together" if len(table) > 1 else ""
    return f"{text}; no sign that the curves miss a bend{together} (p = {shapes.misfit:.2f})."


def best_values(shapes: Shapes) -> str:
    """Where the curves are lowest. An optimum is stated only where the curve falls before it and rises after it."""
    texts, unknown = [], []
    for row in each(shapes.optima):
        lowest, highest = rounded(row.lowest), rounded(row.highest)
        if row.where == "inside":
            interval = f"95% interval {rounded(row.low)} to {rounded(row.high)}; run from {lowest} to {highest}"
            texts.append(f"{row.factor} is best near {rounded(row.best)} ({interval})")
        elif row.where in ("highest end", "lowest end"):
            way = (
                f"falls up to its highest value, {highest}"
                if row.where == "highest end"
                else f"rises from its lowest value, {lowest}"
            )
            texts.append(f"{row.factor} has no optimum inside its range: the loss {way}")
        else:
            unknown.append(str(row.factor))
    if unknown:
        texts.append(f"where {listed(unknown)} {are(len(unknown))} best cannot be told from these experiments")
    if not texts:
        return ""
    text = "; ".join(texts)
    doubt = ", as far as parabolas describe it, which the test doubts" if shapes.misfit < MISSES else ""
    return f"{text if not text.startswith('where') else text[:1].upper() + text[1:]}{doubt}."


def lowest_of_search(analysis: Analysis) -> str:
    """The lowest loss of configurations that were run once each, and how much of that the curves expect again."""
    shapes, table, results = analysis.shapes, analysis.results.finished, analysis.results
    name = str(table["val_loss"].idxmin())
    best = table.loc[name]
    through = ", ".join(f"{setting} {rounded(best[setting])}" for setting in varying(results))
    loss, size = (float(str(best[measure])) for measure in ("val_loss", "parameters"))
    sized = f", with {short(size)} parameters" if known(size) else ""
    text = (
        f"{name} ({through}) has the lowest validation loss of {counted(shapes.configurations, 'configuration')}, each run "
        f"once: {number(loss)} nats per token{sized}. The lowest of many is flattered by luck"
    )
    expected, low, high = shapes.expected
    if not known(expected):
        return f"{text}: run the best few again with other seeds."
    doubt = ", which miss something" if shapes.misfit < MISSES else ""
    return (
        f"{text}: the fitted curves{doubt} expect {number(expected)} of these settings (95% interval {number(low)} to {number(high)}). "
        "Run the best few again with other seeds."
    )


def curves(f: Findings) -> Blocks:
    shapes = f.analysis.shapes
    if shapes.changes.empty:
        return [Prose(shapes.explanation)] if shapes.explanation else []
    forest = f.analysis.forest
    changes = [
        {
            "setting": row.factor,
            "largest change, nats per token": number(row.change),
            "95% interval, all at once": f"{number(row.low)} to {number(row.high)}",
            "lowest loss at": rounded(row.at_lowest),
            "highest loss at": rounded(row.at_highest),
            "p, all at once": f"{row.p:.2g}",
            "degrees of freedom": f"{row.df:.1f}",
        }
        for row in each(shapes.changes)
    ]
    shares = [
        {
            "setting": row.factor,
            "share of the variance": f"{row.share:.0%}",
            "by chance": f"{row.by_chance:.0%}",
            "p": f"{row.p:.2f}",
        }
        for row in each(forest.table)
    ]
    about = (
        f"The forests predict {max(0.0, forest.predicted):.0%} of the variance of experiments that they have not seen (n = {forest.n}). "
        f"A setting's share is what they lose where its values are shuffled; chance alone reaches the share beside it in one of "
        f"{SHUFFLES + 1} studies."
    )
    return [
        curves_figure(f.results, shapes, forest),
        Prose(shapes.explanation),
        Grid("How much each setting changes the validation loss", changes),
        Prose(about) if shares else None,
        Grid("Permutation importance in random forests", shares),
    ]
