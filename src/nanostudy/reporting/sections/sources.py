"""The same effect in several sources: a figure, where they disagree, and what else they do not have alike."""

from __future__ import annotations

from nanostudy.analysis.frames import known
from nanostudy.analysis.sources import Sources
from nanostudy.reporting.charts.factors import change_of, sources_figure
from nanostudy.reporting.charts.figure import each, records
from nanostudy.reporting.document import Blocks, Bullets, Grid
from nanostudy.reporting.findings import Findings
from nanostudy.reporting.phrases import are, ends, interval, signed
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
            "sources": f"{row.source}, {row.other}",
            "effects on the settings of both": f"{signed(row.effect, 4)}, {signed(row.other_effect, 4)}"
            if known(row.effect)
            else "",
            "settings": row.settings,
            "second minus first": signed(row.difference, 4),
            "95% interval, for all at once": ends(row.low, row.high, signed),
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
        texts = [
            f"{change_of(row)} by {signed(row.effect)} in {row.source} and by {signed(row.other_effect)} in {row.other}, a difference of "
            f"{interval(row.difference, row.low, row.high)}"
            for row in each(apart)
        ]
        more = f"; and {len(texts) - MOST_NAMED} more" if len(texts) > MOST_NAMED else ""
        lines.append(
            "The sources disagree beyond noise, each two on the settings that both were run with (95% for all at once): "
            f"{'; '.join(texts[:MOST_NAMED])}{more}, in nats per token."
        )
    if rest := len(judged) - len(apart):
        what = "effect" if len(found.names) == 2 else "comparison"
        lines.append(f"No disagreement beyond noise is seen in {rest:,} of {counted(len(judged), what)}.")
    if not found.one_unit:
        units = "; ".join(f"{name}: {listed(sorted(kinds))}" for name, kinds in found.tokenizers.items() if kinds)
        lines.append(f"Losses per token of different tokenizers are not compared ({units}).")
    if len(table) > len(judged):
        noisy = set(found.effects.dropna(subset=["low"])["source"])
        bare = [name for name in found.names if name not in noisy]
        why = (
            f"{listed(bare)} {are(len(bare), 'has', 'have')} no estimate of the noise"
            if bare
            else "too few settings were run in both"
        )
        lines.append(f"Whether the others disagree is not known: {why}.")
    return lines
