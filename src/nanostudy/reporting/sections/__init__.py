"""The sections of a document in reading order; each makes itself from the findings, or nothing where it has nothing to say."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from altair.utils.schemapi import debug_mode

from nanostudy.analysis.analysis import Analysis
from nanostudy.reporting.document import Blocks, Document, Section
from nanostudy.reporting.findings import Findings, Training, findings_of
from nanostudy.reporting.sections import background, factors, losses, numbers, overview, run, samples, sources
from nanostudy.reporting.sections.answer import answer


def of_run(make: Callable[[Training], Blocks]) -> Callable[[Findings], Blocks]:
    return lambda f: make(f.training) if f.training else []


SECTIONS: Mapping[str, tuple[str, Callable[[Findings], Blocks]]] = {
    "answer": ("The answer", answer),
    "observations": ("Observations", of_run(run.observations)),
    "experiments": ("All experiments", overview.experiments),
    "ranking": ("Ranking", factors.ranking),
    "curves-of-numbers": ("How the loss runs along each setting", numbers.curves),
    "effects": ("What each setting does", factors.effects),
    "interactions": ("How settings act together", factors.interactions),
    "parallel": ("Every experiment through its settings", factors.parallel),
    "curves": ("Curves", losses.curves),
    "gap": ("Loss gap", losses.gap),
    "metrics": ("Metrics", run.metrics),
    "evaluations": ("Evaluations", of_run(run.evaluations)),
    "costs": ("What a lower loss costs", losses.costs),
    "parts": ("The parts compared", losses.parts),
    "sources": ("The same effect in each source", sources.sources),
    "fair": ("Fair comparisons", losses.fair),
    "machines": ("Sizes, machines and speed", overview.machines),
    "scaling": ("Scaling", losses.scaling),
    "writing": ("Sample quality", samples.writing),
    "samples": ("Samples", samples.samples),
    "claims": ("Do the published claims hold?", background.claims),
    "model": ("Model", of_run(run.model)),
    "corpus": ("Corpus", of_run(run.corpus)),
    "settings": ("Settings", of_run(run.settings)),
    "environment": ("Environment", of_run(run.environment)),
    "hardware": ("Hardware", of_run(run.hardware)),
    "method": ("Method and caveats", background.method),
    "reproduce": ("How to reproduce it", background.reproduce),
    "next": ("What to run next", background.what_next),
}


def document(analysis: Analysis) -> Document:
    results, findings = analysis.results, findings_of(analysis)
    with debug_mode(False):  # checking every row of data against a schema takes long; the tests do it
        blocks = {name: [block for block in make(findings) if block] for name, (_, make) in SECTIONS.items()}
    training = findings.training
    return Document(
        title=results.title,
        lede=run.lede(training) if training else overview.lede(results),
        facts=run.totals(results.experiments.iloc[0]) if training else overview.totals(results),
        notes=run.notes(training) if training else results.notes,
        sections=[Section(name, SECTIONS[name][0], content) for name, content in blocks.items() if content],
        data=findings.data,
    )
