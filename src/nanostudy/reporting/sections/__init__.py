"""The sections of a document in reading order; each makes itself from the findings, or nothing where it has nothing to say."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from altair.utils.schemapi import debug_mode

from nanostudy.analysis.analysis import Analysis
from nanostudy.reporting.document import Document, Section
from nanostudy.reporting.findings import Findings, findings_of
from nanostudy.reporting.sections import background, factors, losses, overview, run, samples
from nanostudy.reporting.sections.answer import answer

SECTIONS: Mapping[str, Callable[[Findings], Section | None]] = {
    "answer": answer,
    "observations": run.observations,
    "experiments": overview.experiments,
    "ranking": factors.ranking,
    "effects": factors.effects,
    "interactions": factors.interactions,
    "parallel": factors.parallel,
    "curves": losses.curves,
    "gap": losses.gap,
    "metrics": run.metrics,
    "evaluations": run.evaluations,
    "costs": losses.costs,
    "parts": losses.parts,
    "fair": losses.fair,
    "machines": overview.machines,
    "scaling": losses.scaling,
    "writing": samples.writing,
    "samples": samples.samples,
    "claims": background.claims,
    "model": run.model,
    "corpus": run.corpus,
    "settings": run.settings,
    "environment": run.environment,
    "hardware": run.hardware,
    "method": background.method,
    "reproduce": background.reproduce,
}


def document(analysis: Analysis) -> Document:
    results, findings = analysis.results, findings_of(analysis)
    with debug_mode(False):  # checking every row of data against a schema takes long; the tests do it
        made = [section for make in SECTIONS.values() if (section := make(findings))]
    training = findings.training
    return Document(
        title=results.title,
        lede=run.lede(training) if training else overview.lede(results),
        facts=run.totals(results.experiments.iloc[0]) if training else overview.totals(results),
        notes=run.notes(training) if training else results.notes,
        sections=made,
        data=findings.data,
    )
