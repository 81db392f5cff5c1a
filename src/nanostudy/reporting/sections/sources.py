"""The same effect in several sources: a figure, where they disagree, and what else they do not have alike."""

from __future__ import annotations

from nanostudy.analysis.sources import Sources
from nanostudy.reporting.charts.figure import each
from nanostudy.reporting.charts.sources import change, sources_figure
from nanostudy.reporting.document import Blocks, Bullets, Grid
from nanostudy.reporting.findings import Findings
from nanostudy.reporting.phrases import ends, interval, signed
from nanostudy.text import counted, listed, plain

MOST_NAMED = 6  # disagreements in a sentence


def sources(f: Findings) -> Blocks:
    found = f.analysis.sources if f.compares else None
    if found is None:
        return []
    rows = [
        (change(row), row.source, signed(row.effect, 4), ends(row.low, row.high, signed), int(row.n))
        for row in each(found.effects)
    ]
    header = ("change", "source", "effect, nats per token", "95% interval", "experiments")
    pairs = [
        (
            change(row),
            f"{row.source} − {row.other}",
            signed(-row.difference, 4),
            ends(-row.high, -row.low, signed),
            _word(row),
        )
        for row in each(found.differences)
    ]
    names = ("change", "between", "difference", "95% interval, for all at once", "they disagree")
    unlike = [tuple(row) for row in found.settings.itertuples(index=False, name=None)]
    caption = "What the sources do not have alike, from which a disagreement may come"
    return [
        sources_figure(found),
        Bullets(sentences_of(found)),
        Grid("The same effect in each source", header, rows, folded=True),
        Grid("Between two sources", names, pairs, folded=True),
        Grid(caption, [str(name) for name in found.settings], unlike) if unlike else None,
    ]


def notes(f: Findings) -> list[str]:
    """That sources disagree, which a reader of what all say together must know."""
    found = f.analysis.sources if f.compares else None
    return sentences_of(found)[:1] if found is not None and found.differences["disagree"].any() else []


def _word(row: object) -> str:
    known = row.low == row.low  # type: ignore[attr-defined]
    return ("yes" if row.disagree else "no") if known else "not known"  # type: ignore[attr-defined]


def sentences_of(found: Sources) -> list[str]:
    """Where the sources disagree beyond noise, where they do not, and where nothing can be said."""
    table = found.differences
    known = table[table["low"].notna()]
    apart = known[known["disagree"]].sort_values(
        "difference", key=lambda column: column.abs(), ascending=False, kind="stable"
    )
    lines = []
    if len(apart):
        there = {(change(row), row.source): signed(row.effect) for row in each(found.effects)}
        texts = [
            f"{change(row)} by {there[change(row), row.source]} in {plain(row.source)} and by {there[change(row), row.other]} in "
            f"{plain(row.other)}, apart by {interval(row.difference, row.low, row.high)}"
            for row in each(apart)
        ]
        more = f"; and {len(texts) - MOST_NAMED} more" if len(texts) > MOST_NAMED else ""
        lines.append(
            f"The sources disagree beyond noise (95% for all at once): {'; '.join(texts[:MOST_NAMED])}{more}, in nats per token."
        )
    if len(known) > len(apart):
        rest = len(known) - len(apart)
        what = "effect" if len(found.names) == 2 else "comparison"
        lines.append(f"No disagreement beyond noise is seen in {rest:,} of {counted(len(known), what)}.")
    if len(table) > len(known):
        bare = sorted(
            {name for name in found.names if found.effects.loc[found.effects["source"] == name, "low"].isna().all()}
        )
        lines.append(f"Whether the others disagree is not known: {listed(bare) or 'a source'} shows no noise.")
    return lines
