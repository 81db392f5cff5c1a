"""The same effect in several sources: a figure, where they disagree, and what else they do not have alike."""

from __future__ import annotations

from nanostudy.analysis.frames import known
from nanostudy.analysis.sources import Sources
from nanostudy.reporting.charts.factors import change_of, sources_figure
from nanostudy.reporting.charts.figure import each, records
from nanostudy.reporting.document import Blocks, Bullets, Grid
from nanostudy.reporting.findings import Findings
from nanostudy.reporting.phrases import ends, interval, signed
from nanostudy.text import counted, listed

MOST_NAMED = 6  # disagreements in a sentence


def sources(f: Findings) -> Blocks:
    found = f.analysis.sources if f.compares else None
    if found is None:
        return []
    rows = [
        {
            "change": change_of(row),
            "source": row.source,
            "effect, nats per token": signed(row.effect, 4),
            "95% interval": ends(row.low, row.high, signed),
            "experiments": int(row.n),
        }
        for row in each(found.effects)
    ]
    pairs = [
        {
            "change": change_of(row),
            "between": f"{row.source} − {row.other}",
            "difference": signed(-row.difference, 4),
            "95% interval, for all at once": ends(-row.high, -row.low, signed),
            "they disagree": ("yes" if row.disagree else "no") if known(row.low) else "not known",
        }
        for row in each(found.differences)
    ]
    unlike = "What the sources do not have alike, from which a disagreement may come"
    return [
        sources_figure(found),
        Bullets(sentences_of(found)),
        Grid("The same effect in each source", rows, folded=True),
        Grid("Between two sources", pairs, folded=True),
        Grid(unlike, records(found.settings)),
    ]


def notes(f: Findings) -> list[str]:
    """That sources disagree, which a reader of one source's answer must know."""
    found = f.analysis.sources if f.compares else None
    apart = int(found.differences["disagree"].sum()) if found is not None else 0
    if found is None or not apart:
        return []
    judged = counted(int(found.differences["low"].notna().sum()), "comparison")
    return [f"The sources disagree beyond noise in {apart:,} of {judged} (95% for all at once)."]


def sentences_of(found: Sources) -> list[str]:
    """Where the sources disagree beyond noise, where they do not, and where nothing can be said."""
    table = found.differences
    judged = table[table["low"].notna()]
    apart = judged[judged["disagree"]].sort_values("difference", key=abs, ascending=False, kind="stable")
    apart = apart.sort_values("source", key=lambda names: names != found.names[0], kind="stable")  # the answer's first
    lines = []
    if len(apart):
        there = {(change_of(row), row.source): signed(row.effect) for row in each(found.effects)}
        texts = [
            f"{what} by {there[what, row.source]} in {row.source} and by {there[what, row.other]} in "
            f"{row.other}, apart by {interval(row.difference, row.low, row.high)}"
            for row in each(apart)
            for what in [change_of(row)]
        ]
        more = f"; and {len(texts) - MOST_NAMED} more" if len(texts) > MOST_NAMED else ""
        lines.append(
            f"The sources disagree beyond noise (95% for all at once): {'; '.join(texts[:MOST_NAMED])}{more}, in nats per token."
        )
    if rest := len(judged) - len(apart):
        what = "effect" if len(found.names) == 2 else "comparison"
        lines.append(f"No disagreement beyond noise is seen in {rest:,} of {counted(len(judged), what)}.")
    if len(table) > len(judged):
        noisy = set(found.effects.dropna(subset=["low"])["source"])
        bare = sorted(set(found.names) - noisy)
        lines.append(f"Whether the others disagree is not known: {listed(bare) or 'a source'} shows no noise.")
    return lines
