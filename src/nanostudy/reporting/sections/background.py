"""How results were judged and how to do it again: published claims, method and caveats, commands and checksums."""

from __future__ import annotations

import shlex
from typing import Any

from nanostudy.analysis.frames import OURS, WITHOUT_EFFECT, Results, levels
from nanostudy.reporting.charts.figure import each
from nanostudy.reporting.document import Blocks, Bullets, Claim, Claims, Grid, Prose, Source
from nanostudy.reporting.findings import Findings
from nanostudy.reporting.next_steps import decision
from nanostudy.reporting.phrases import number
from nanostudy.reporting.sections.answer import VERDICTS
from nanostudy.settings import FIELDS
from nanostudy.text import value_text

MACHINE = {  # a column of provenance's machines, and its heading
    **{
        "device": "device",
        "device_name": "name",
        "precision": "precision",
        "compiled": "compiled",
        "platform": "platform",
    },
    **{"python": "Python", "torch": "PyTorch", "experiments": "experiments"},
}


def claims(f: Findings) -> Blocks:
    verdicts = f.analysis.verdicts
    tested, against, counted = (
        verdicts["verdict"].isin(kinds) for kinds in (VERDICTS, ["contradicts itself"], ["arithmetic"])
    )
    kinds = (
        ("Claims that these results test", verdicts[tested], False),
        ("Claims that contradict themselves or each other", verdicts[against], True),
        ("Claims that arithmetic decides, whatever was run", verdicts[counted], True),
        ("Claims that these results do not test, or none can", verdicts[~tested & ~against & ~counted], True),
    )
    return [
        Claims(f"{caption}: {len(table)}", [_claim(row) for row in each(table)], folded)
        for caption, table, folded in kinds
        if len(table)
    ]


def _claim(row: Any) -> Claim:
    ours = row.ours
    if ours:
        ours += f" ({number(row.low)} to {number(row.high)})" if row.low == row.low else ""
        ours += f", n = {row.n:,}" if row.n else ""
    return Claim(row.verdict, row.statement, row.published, ours, row.why, row.setting, row.source)


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
    shared = [] if f.training else shared_settings(results)
    grid = Grid("Settings that all experiments share", ("setting", "value", "meaning"), shared, folded=True)
    return [Bullets(lines), caution, Bullets(list(caveats)), grid]


def shared_settings(results: Results) -> list[tuple[str, str, str]]:
    """With one known value in all experiments."""
    rows = []
    for name, field in FIELDS.items():
        if name not in WITHOUT_EFFECT and name != "seed" and name in results.experiments:
            values = levels(results.experiments[name])
            if len(values) == 1:
                rows.append((name, value_text(values[0]), field.meaning))
    return rows


def reproduce(f: Findings) -> Blocks:
    """The command, the definition, the versions, machines and checksums."""
    provenance = f.results.provenance
    read = [provenance, *(other.provenance for other in f.results.others)]
    if f.training:
        text = "`settings.yaml` lies in the run's folder. There, this trains it again, in a folder beside it:"
        blocks: Blocks = [
            Prose(text),
            Source("nanostudy train settings.yaml --out ../again\nnanostudy report ../again"),
        ]
    else:
        blocks = []
        if provenance.get("command"):
            blocks += [
                Prose("The same trainings, with the same settings and seeds:"),
                Source(str(provenance["command"])),
            ]
        paths = [str(path) for one in read for path in one.get("paths", ())]
        if paths:
            blocks += [Prose("This report again, from its results:"), Source(f"nanostudy report {shlex.join(paths)}")]
    checksums = [row for one in read for row in one.get("checksums", {}).items()]
    blocks.append(Grid("Checksums, SHA-256", ("of", "checksum"), checksums))
    versions = [(one.get("nanostudy", ""), one.get("numerics_version", "")) for one in provenance.get("versions", [])]
    machines = [tuple(str(m.get(key, "") or "") for key in MACHINE) for m in provenance.get("machines", [])]
    if not f.training:
        blocks.append(Grid("Versions", ("nanostudy", "numerics"), versions))
        blocks.append(Grid("Machines", tuple(MACHINE.values()), machines))
    if provenance.get("definition", "").strip() not in str(provenance.get("command", "")):
        blocks += [Prose("The study's definition:"), Source(str(provenance["definition"]).strip())]
    return blocks


def what_next(f: Findings) -> Blocks:
    """How many seeds would decide between the best settings."""
    return [Prose(decision(f.analysis.seeds))] if f.compares and f.results.factors else []
