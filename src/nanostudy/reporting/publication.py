"""A study's findings as a small folder to publish: tables of results, the page, the answer, curves, samples; no weights.

README.md      the answer, the claims, and the same effects in other sources
index.html     the page
PART.csv       results in the published study's format, one file per part
curves.csv     each experiment's evaluations, thinned
samples/       the samples of ten models: the best, and others spread over the ranking
"""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd

from nanostudy.analysis.analysis import Analysis
from nanostudy.analysis.frames import Results
from nanostudy.analysis.results import read_results
from nanostudy.atomic import whole_folder, write_atomically
from nanostudy.errors import NanostudyError
from nanostudy.reporting.charts.factors import change_of
from nanostudy.reporting.charts.figure import DrawingFailed, each, scripts
from nanostudy.reporting.data import names_by_loss, spread, thin
from nanostudy.reporting.document import Document
from nanostudy.reporting.html import page
from nanostudy.reporting.phrases import ends, interval, signed
from nanostudy.reporting.sections import document
from nanostudy.reporting.sections.background import ours
from nanostudy.reporting.sections.sources import sentences_of
from nanostudy.study.export import results_csv
from nanostudy.study.store import FILE, Store
from nanostudy.text import counted, plain, table

MOST_BYTES = 8_000_000
MOST_POINTS = 12  # of a curve
MOST_SAMPLED = 10  # models


def publish_findings(path: Path, to: Path, beside: Sequence[Path] = ()) -> list[str]:
    """Writes the folder `to`, in place of an earlier one, and returns lines that say what is in it. `beside` are tables and studies
    of others, whose effects stand beside the study's. Raises NanostudyError, also where it would be larger than MOST_BYTES.
    """
    results = _with_others(read_results([path]), beside)
    with Store.read(path / FILE) as store:
        rows = [row for row in store.rows() if row.status == "finished"]
    if not rows:
        raise NanostudyError(f"{path} has no finished experiment to publish yet.")
    analysis = Analysis(results)
    report = document(analysis)
    bundle = undrawn = ""
    try:
        bundle = scripts()
    except DrawingFailed as problem:
        undrawn = str(problem)
    parts = {str(part): [row for row in rows if row.part == part] for part in dict.fromkeys(row.part for row in rows)}
    files = {
        "README.md": _readme(analysis, report, to, beside),
        "index.html": page(report, bundle, undrawn),
        **{f"{part}.csv": results_csv(own) for part, own in parts.items()},
        "curves.csv": _curves(results),
        **_samples(results),
    }
    size = sum(len(text.encode()) for text in files.values())
    if size > MOST_BYTES:
        raise NanostudyError(
            f"These findings would be {size:,} bytes, and {MOST_BYTES:,} at most are published. Nothing was written."
        )
    with whole_folder(to, overwrite=True, replace=_replaceable(to)) as place:
        for name, text in files.items():
            (place / name).parent.mkdir(exist_ok=True)
            write_atomically(place / name, text)
    counts = [f"{part} {len(own)}" for part, own in parts.items()]
    return [
        f"results  {counted(len(rows), 'experiment')} of {len(results.experiments):,}: {', '.join(counts)}",
        f"page     {to / 'index.html'}",
        f"answer   {to / 'README.md'}",
        f"size     {size:,} bytes in {counted(len(files), 'file')}",
    ]


def _with_others(results: Results, beside: Sequence[Path]) -> Results:
    """The study's, and beside it the results of others, be they studies, too: the answer is of this study alone."""
    if not beside:
        return results
    first = read_results(beside)
    return replace(results, others=(replace(first, others=()), *first.others))


def _replaceable(to: Path) -> bool:
    """Whether there is nothing, or an earlier publication alone. Raises NanostudyError at a folder with other files."""
    there = {path.name for path in to.iterdir()} if to.is_dir() else set()
    other = {name for name in there if name not in ("README.md", "index.html", "samples") and not name.endswith(".csv")}
    if other or (there and "index.html" not in there):
        raise NanostudyError(f"{to} holds other files. Name another folder with --to; nothing was changed.")
    return bool(there)


def _curves(results: Results) -> str:
    kept = [
        curve.iloc[thin(np.arange(len(curve)), curve["val_loss"].to_numpy(), MOST_POINTS)]
        for name, curve in results.evaluations.groupby("name", sort=False)
        if name in results.finished.index
    ]
    whole = pd.concat(kept) if kept else results.evaluations
    whole = whole[["name", "step", "train_loss", "val_loss"]].astype({"step": int}).round(4)
    text: str = whole.to_csv(index=False, lineterminator="\n")
    return text


def _samples(results: Results) -> dict[str, str]:
    texts = results.samples.groupby("name")
    sampled = [name for name in names_by_loss(results) if name in texts.groups]
    files = {}
    for name in spread(sampled, MOST_SAMPLED):
        pieces = [f"{row.prompt}{row.text}" for row in each(texts.get_group(name))]
        files[f"samples/{name.replace('=', '-')}.txt"] = "\n\n---\n\n".join(pieces) + "\n"
    return files


# --- in words


def _readme(analysis: Analysis, report: Document, to: Path, beside: Sequence[Path]) -> str:
    again = f"{analysis.results.title}-again"  # the folder of provenance's command
    words = ["nanostudy", "study", "export", again, "--layout", "findings", "--to", _place(to)]
    words += [word for one in beside for word in ("--beside", _place(one))]
    made = [str(analysis.results.provenance.get("command", "")), shlex.join(words)]
    lines = [f"# {report.title}", "", report.lede, ""]
    lines += [f"- {note}" for note in report.notes] + [""] * bool(report.notes)
    for number, (about, text) in enumerate(report.answer.items(), start=1):
        lines += [f"{number}. **{about}.** {plain(text)}"]
    lines += ["", *_claims(analysis), *_sources(analysis)]
    lines += ["## Made by", "", "```sh", *filter(None, made), "```", ""]
    return "\n".join(lines)


def _place(path: Path) -> str:
    """As a reader can write it: without the folders of the machine on which it was."""
    return path.name if path.is_absolute() else path.as_posix()


def _claims(analysis: Analysis) -> list[str]:
    verdicts = analysis.verdicts
    if verdicts.empty:
        return []
    tested = verdicts[verdicts["verdict"] != "not tested"]
    contradicts = "contradicts itself"
    rows = [
        (row.verdict, row.statement, row.published, row.why if row.verdict == contradicts else ours(row))
        for row in each(tested)
    ]
    untested = len(verdicts) - len(tested)
    more = [f"These experiments do not test {counted(untested, 'other claim')}.", ""] if untested else []
    return ["## Published claims", "", *table(("verdict", "claim", "published", "ours"), rows), "", *more]


def _sources(analysis: Analysis) -> list[str]:
    found = analysis.sources
    if found is None:
        return []
    by_change: dict[str, dict[str, str]] = {}
    for row in each(found.effects):
        by_change.setdefault(change_of(row), {})[row.source] = interval(row.effect, row.low, row.high, 4)
    rows = [(what, *(texts.get(name, "") for name in found.names)) for what, texts in by_change.items()]
    differences = [
        (
            change_of(row),
            f"{row.source}, {row.other}",
            row.settings,
            f"{signed(row.effect, 4)}, {signed(row.other_effect, 4)}",
            signed(row.difference, 4),
            ends(row.low, row.high, signed),
        )
        for row in each(found.differences)
        if row.disagree
    ]
    lines = ["## The same effects in other sources", "", "Nats per token, with 95% intervals.", ""]
    lines += [*table(("change", *found.names), rows), "", *(f"- {plain(text)}" for text in sentences_of(found)), ""]
    if differences:
        heads = (
            "change",
            "sources",
            "settings of both",
            "effects on these",
            "second minus first",
            "95% for all at once",
        )
        lines += [*table(heads, differences), ""]
    if len(found.settings):
        rows_unlike = list(found.settings.itertuples(index=False, name=None))
        lines += ["What the sources do not have alike:", "", *table([str(c) for c in found.settings], rows_unlike), ""]
    return lines
