"""The page's sections, from what was analysed: what was run, what was found, how it can be checked.

Where something cannot be said, its section says why instead.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pandas as pd

from nanostudy.analysis.analysis import Analysis
from nanostudy.reporting.answer import strongest_by_factor
from nanostudy.reporting.charts import charts
from nanostudy.reporting.charts import evidence as evidence_charts
from nanostudy.reporting.charts import factors as factor_charts
from nanostudy.reporting.charts.figure import each
from nanostudy.reporting.document import (
    Block,
    Bullets,
    Claim,
    Claims,
    Experiments,
    Grid,
    Missing,
    Prose,
    Samples,
    Section,
    figure_or_reason,
)
from nanostudy.reporting.page_data import PageData
from nanostudy.reporting.phrases import interval, nats, signed
from nanostudy.reporting.sections import curves as curve_sections
from nanostudy.reporting.sections.background import again, machines, method
from nanostudy.reporting.sections.curves import named

WRITING = {  # what is measured of samples: a plot's title, its axis
    "words_real": ("real words", "words that exist in the text, %"),
    "speakers_real": ("real speakers", "speakers that exist in the text, %"),
    "dialogue_well_formed": ("well-formed dialogue", "speeches that are well formed, %"),
    "longest_copied": ("longest copied passage", "longest passage copied, characters"),
}


def sections(analysis: Analysis, data: PageData) -> list[Section]:
    """In reading order, after what was run and the answer."""
    makers = (
        _experiments,
        _ranked,
        _effects,
        _together,
        _parallel,
        curve_sections.curves,
        curve_sections.gap,
        curve_sections.costs,
        curve_sections.parts,
        curve_sections.fair,
        machines,
        _scaling,
    )
    said = [*(make(analysis, data) for make in makers), _writing(analysis), _side_by_side(data), _claims(analysis)]
    return [*said, method(analysis, data), again(analysis, data)]


def _experiments(analysis: Analysis, data: PageData) -> Section:
    columns = [
        ("best_val_loss", "lowest validation"),
        ("best_step", "at update"),
        ("parameters", "parameters"),
        ("tokens", "tokens"),
        ("epochs", "epochs"),
        ("flops", "arithmetic, FLOP"),
        ("seconds", "time, s"),
    ]
    known = [(key, name) for key, name in columns if any(row[key] is not None for row in data.experiments)]
    if not data.experiments:
        return Section("experiments", "All experiments", [Missing("There are no experiments.")])
    how = "Losses are in nats per token. A heading sorts; ticked experiments stand out in the figures and show their samples below."
    factors = list(analysis.results.factors)
    return Section("experiments", "All experiments", [Prose(how), Experiments(factors, known)])


def _ranked(analysis: Analysis, data: PageData) -> Section:
    blocks = figure_or_reason(charts.ranking_figure(analysis.results, analysis.ranking))
    basis = analysis.ranking.attrs.get("basis")
    blocks += [Prose(str(basis))] if basis else []
    general = analysis.generalisation
    if not general.empty:
        rows = [
            (place, row["name"], signed(row["value"], 4), _range(row), "yes" if row["tied"] else "no")
            for place, row in general.head(10).iterrows()
        ]
        header = ("place", "experiment", "gap", "95% interval", "cannot be told from the first")
        blocks.append(Grid("Ranking by generalisation: the smallest loss gap", header, rows, folded=True))
    return Section("ranking", "Ranking", blocks)


def _range(row: Any) -> str:
    low, high = row["low"], row["high"]
    return "not known" if low != low or high != high else f"{signed(low, 4)} to {signed(high, 4)}"


def _effects(analysis: Analysis, data: PageData) -> Section:
    effects = analysis.effects
    blocks = figure_or_reason(factor_charts.effects_figure(effects))
    if effects.table.empty:
        return Section("effects", "What each setting does", blocks)
    blocks.append(Prose(effects.explanation))
    blocks += [Bullets(effects.missing)] if effects.missing else []
    blocks += figure_or_reason(factor_charts.half_normal_figure(effects))
    blocks += figure_or_reason(factor_charts.variance_figure(effects))
    gaps = analysis.gap_effects
    if not gaps.table.empty:
        blocks += figure_or_reason(factor_charts.effects_figure(gaps, "gap"))
    blocks.append(_effects_table(effects.table))
    return Section("effects", "What each setting does", blocks)


def _effects_table(table: pd.DataFrame) -> Grid:
    rows = [
        (
            row.what,
            signed(row.effect, 4),
            "not known" if row.low != row.low else f"{signed(row.low, 4)} to {signed(row.high, 4)}",
            "" if row.se != row.se else f"{row.se:.4f}",
            "" if row.p != row.p else ("< 0.0001" if row.p < 0.0001 else f"{row.p:.4f}"),
            "" if row.share != row.share else f"{row.share:.1%}",
        )
        for row in each(factor_charts.worded(table))
    ]
    header = ("change", "effect, nats per token", "95% interval", "standard error", "p", "share of variance")
    return Grid("All effects on the validation loss", header, rows[:200], folded=True)


def _together(analysis: Analysis, data: PageData) -> Section:
    effects, results = analysis.effects, analysis.results
    if effects.table.empty or len(results.factors) < 2:
        reason = "How settings act together needs at least two that vary."
        return Section("interactions", "How settings act together", [Missing(reason)])
    pairs = [(a, b, analysis.cell_means(a, b)) for a, b in _important_pairs(effects.table)]
    return Section(
        "interactions", "How settings act together", figure_or_reason(factor_charts.interactions_figure(pairs))
    )


def _important_pairs(table: pd.DataFrame) -> list[tuple[str, str]]:
    """By the size of the interaction; where none is estimated, of the settings with the largest effects."""
    seconds = table[(table["order"] == 2) & table["effect"].notna()]
    if len(seconds):
        order = seconds["effect"].abs().sort_values(ascending=False, kind="stable").index
        pairs = seconds.loc[order].drop_duplicates("term")
        return [(str(row.factor_a), str(row.factor_b)) for row in each(pairs)][: factor_charts.MOST_INTERACTIONS]
    first = [str(name) for name in strongest_by_factor(table)["factor_a"]][:3]
    return [(a, b) for i, a in enumerate(first) for b in first[i + 1 :]]


def _parallel(analysis: Analysis, data: PageData) -> Section:
    return Section(
        "parallel", "Every experiment through its settings", figure_or_reason(charts.parallel_figure(analysis.results))
    )


def _scaling(analysis: Analysis, data: PageData) -> Section:
    fits: Mapping[str, Any] = analysis.scaling
    figure = evidence_charts.scaling_figure(analysis.results, fits, data.colourings[0])
    blocks = figure_or_reason(figure, colours=True)
    said = [f"Loss against {against}: {evidence_charts.fit_text(fit)}" for against, fit in fits.items()]
    return Section("scaling", "Scaling", [*blocks, Bullets(said)] if said else blocks)


def _writing(analysis: Analysis) -> Section:
    quality, results = analysis.quality, analysis.results
    figure = evidence_charts.quality_figure(results, quality, WRITING)
    blocks = figure_or_reason(figure)
    if not quality.empty:
        against = analysis.quality_against_loss
        blocks += [
            Bullets(
                [
                    *quality.attrs.get("notes", ()),
                    *(quality_sentence(row) for row in each(against) if row.Index in WRITING),
                ]
            )
        ]
        order = [name for name in results.finished.sort_values("val_loss").index if name in quality.index][:10]
        rows = [(name, *_measured(quality.loc[name])) for name in order]
        header = ("experiment", "real words", "real speakers", "well-formed dialogue", "longest copied, characters")
        blocks.append(Grid("What the samples of the best are like", header, rows, folded=True))
    return Section("writing", "What they write, measured", blocks)


def _measured(row: pd.Series) -> list[str]:
    told = []
    for column, (_, axis) in WRITING.items():
        value = row[column]
        told.append("not known" if value != value else f"{value:.0%}" if axis.endswith("%") else f"{value:,.0f}")
    return told


def quality_sentence(row: Any) -> str:
    """One row of the correlations of quality with loss."""
    name = WRITING[row.Index][0] if row.Index in WRITING else str(row.Index)
    if row.rho != row.rho:
        return f"{name.capitalize()} against validation loss: too few experiments, or too much alike, to say."
    unclear = row.low != row.low or row.low <= 0 <= row.high
    told = (
        "cannot be told from none"
        if unclear
        else "the lower the loss, the more"
        if row.rho < 0
        else "the higher the loss, the more"
    )
    return f"{name.capitalize()} against validation loss: {told}; rank correlation {interval(row.rho, row.low, row.high, 2)}, n = {int(row.n)}."


def _side_by_side(data: PageData) -> Section:
    if not data.samples:
        reason = "There are no samples: a table holds none, and a run writes its own when it has finished."
        return Section("samples", "Samples side by side", [Missing(reason)])
    first = list(dict.fromkeys(sample["i"] for sample in data.samples))
    chosen = [first[0], first[len(first) // 2], first[-1]] if len(first) > 2 else first
    told = (
        "The best, the middle and the worst of those with samples, until you choose others here or in the table above."
    )
    return Section("samples", "Samples side by side", [Prose(told), Samples(list(dict.fromkeys(chosen)))])


def _claims(analysis: Analysis) -> Section:
    verdicts = analysis.verdicts
    if verdicts.empty:
        return Section(
            "claims", "Do the published claims hold?", [Missing("There are no claims to hold these results against.")]
        )
    tested = verdicts["verdict"].isin(["reproduced", "better", "not reproduced"])
    kinds = [
        ("Claims that these results test, or that arithmetic decides", verdicts[tested], False),
        (
            "Claims that contradict themselves or each other",
            verdicts[verdicts["verdict"] == "contradicts itself"],
            True,
        ),
        (
            "Claims that were not run, or cannot be tested here",
            verdicts[~tested & (verdicts["verdict"] != "contradicts itself")],
            True,
        ),
    ]
    blocks: list[Block] = []
    for caption, table, folded in kinds:
        claims = [
            Claim(
                r.verdict, r.statement, r.published, _ours(r), r.why, "" if r.setting == "any" else r.setting, r.source
            )
            for r in named(table)
        ]
        blocks += [Claims(f"{caption}: {len(claims)}", claims, folded)] if claims else []
    return Section("claims", "Do the published claims hold?", blocks)


def _ours(row: Any) -> str:
    if not row.ours:
        return ""
    known = f" ({nats(row.low)} to {nats(row.high)})" if row.low == row.low else ""
    return f"{row.ours}{known}{f', n = {row.n:,}' if row.n else ''}"
