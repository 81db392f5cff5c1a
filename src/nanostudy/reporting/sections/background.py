"""How results were judged and how to do it again: published claims, method and caveats, commands and checksums."""

from __future__ import annotations

import shlex
from typing import Any

from nanostudy.analysis.frames import OURS, known, levels
from nanostudy.reporting.charts.figure import each
from nanostudy.reporting.data import shared
from nanostudy.reporting.document import Blocks, Bullets, Claim, Claims, Grid, Prose, Source
from nanostudy.reporting.findings import Findings
from nanostudy.reporting.next_steps import decision
from nanostudy.reporting.phrases import number
from nanostudy.reporting.sections.answer import VERDICTS
from nanostudy.settings import FIELDS
from nanostudy.text import value_text

MACHINE = {  # a column of provenance's machines by its heading
    "device": "device",
    "name": "device_name",
    "precision": "precision",
    "threads": "threads",
    "compiled": "compiled",
    "platform": "platform",
    "Python": "python",
    "PyTorch": "torch",
    "experiments": "experiments",
}


def claims(f: Findings) -> Blocks:
    titles = {
        **dict.fromkeys(VERDICTS, "Claims that these results test"),
        "contradicts itself": "Claims that contradict themselves or each other",
        "arithmetic": "Claims that arithmetic decides, whatever was run",
    }
    others = "Claims that these results do not test, or none can"
    kinds: dict[str, list[Claim]] = {title: [] for title in (*titles.values(), others)}
    for row in each(f.analysis.verdicts):
        kinds[titles.get(row.verdict, others)].append(_claim(row))
    first = next(iter(kinds))
    return [Claims(f"{title}: {len(those)}", those, title != first) for title, those in kinds.items() if those]


def _claim(row: Any) -> Claim:
    return Claim(row.verdict, row.statement, row.published, ours(row), row.why, row.setting, row.source)


def ours(row: Any) -> str:
    """What a verdict rests on, with its interval and the number of runs."""
    if not row.ours:
        return ""
    within = f" ({number(row.low)} to {number(row.high)})" if known(row.low) else ""
    return f"{row.ours}{within}{f', n = {row.n:,}' if row.n else ''}"


def method(f: Findings) -> Blocks:
    results, effects = f.results, f.analysis.effects
    if results.experiments.empty:
        return []
    lines = [
        "Losses are mean cross entropies in nats per token, over the whole validation split in fixed windows, and over as many "
        "windows of the training split; they draw nothing at random."
    ]
    read = levels(results.experiments["eval_tokens"]) if "eval_tokens" in results.experiments else []
    if tokens := [f"{int(value):,}" for value in read if value != "none"]:
        lines.append(
            f"Some evaluations before the last read a fixed subset of each split, of {' or '.join(tokens)} tokens "
            "(eval_tokens): points of curves and lowest losses may differ from exact ones. Final losses are exact."
        )
    if f.compares:
        lines += [
            "Intervals are 95%. They say how far the same settings may differ by the luck of the draw of weights, batches and "
            "dropout, not how another text or another range of settings would turn out.",
            "In tables and figures each effect has its own interval: of twenty that do nothing, one is expected to seem to do something. "
            "The answer's sentences hold at 95% for all that were searched together.",
        ]
        lines += [f"Effects: {effects.explanation}"] if effects.explanation else []
    if (results.experiments["source"] != OURS).any():
        lines.append(
            "Some results come from tables: how they were evaluated, on what machine and in how many updates is what the table "
            "says, or not known, and their last digits may be rounded."
        )
    notes = () if f.training else results.notes
    caveats = dict.fromkeys([*notes, *(effects.missing if f.compares else ()), *f.data.left_out])
    caution = Prose("To be kept in mind:") if caveats else None
    alike = [
        {"setting": name, "value": value_text(value), "meaning": FIELDS[name].meaning}
        for name, value in ({} if f.training else shared(results)).items()
    ]
    return [
        Bullets(lines),
        caution,
        Bullets(list(caveats)),
        Grid("Settings that all experiments share", alike, folded=True),
    ]


def reproduce(f: Findings) -> Blocks:
    """The command, the definition, the versions, machines and checksums."""
    provenance = f.results.provenance
    read = [provenance, *(other.provenance for other in f.results.others)]
    sources, tables = {}, []
    if f.training:
        text = "`settings.yaml` lies in the run's folder. There, this trains it again, in a folder beside it:"
        sources[text] = "nanostudy train settings.yaml --out ../again\nnanostudy report ../again"
    else:
        if provenance.get("command"):
            sources["The same trainings, with the same settings and seeds:"] = str(provenance["command"])
        paths = [str(path) for one in read for path in one.get("paths", ())]
        if paths:
            sources["This report again, from its results:"] = f"nanostudy report {shlex.join(paths)}"
        versions = [
            {"nanostudy": one.get("nanostudy", ""), "numerics": one.get("numerics_version", "")}
            for one in provenance.get("versions", [])
        ]
        machines = [
            {heading: str(machine.get(key) or "") for heading, key in MACHINE.items()}
            for machine in provenance.get("machines", [])
        ]
        tables = [Grid("Versions", versions), Grid("Machines", machines)]
    checksums = [{"of": name, "checksum": sha} for one in read for name, sha in one.get("checksums", {}).items()]
    blocks: Blocks = [block for text, source in sources.items() for block in (Prose(text), Source(source))]
    blocks += [Grid("Checksums, SHA-256", checksums), *tables]
    if provenance.get("definition", "").strip() not in str(provenance.get("command", "")):
        blocks += [Prose("The study's definition:"), Source(str(provenance["definition"]).strip())]
    return blocks


def what_next(f: Findings) -> Blocks:
    """How many seeds would decide between the best settings."""
    return [Prose(decision(f.analysis.seeds))] if f.compares and f.results.factors else []
