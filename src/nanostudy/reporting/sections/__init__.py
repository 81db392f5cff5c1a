"""The sections of a document in reading order; each makes itself from the findings, or nothing where it has nothing to say."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from altair.utils.schemapi import debug_mode

from nanostudy.analysis.analysis import Analysis
from nanostudy.reporting.document import Blocks, Document, Section
from nanostudy.reporting.findings import Findings, Training, findings_of
from nanostudy.reporting.sections import background, factors, losses, numbers, overview, pair, run, samples, sources
from nanostudy.reporting.sections.answer import answer


def of_run(make: Callable[[Training], Blocks]) -> Callable[[Findings], Blocks]:
    return lambda f: make(f.training) if f.training else []


def of_many(make: Callable[[Findings], Blocks]) -> Callable[[Findings], Blocks]:
    """What two experiments alone have no use for."""
    return lambda f: [] if f.pair else make(f)


SECTIONS: Mapping[str, tuple[str, Callable[[Findings], Blocks]]] = {
    "answer": ("The answer", answer),
    "observations": ("Observations", of_run(run.observations)),
    "experiments": ("All experiments", overview.experiments),
    "ranking": ("Ranking", of_many(factors.ranking)),
    "curves-of-numbers": ("How the loss runs along each setting", of_many(numbers.curves)),
    "effects": ("What each setting does", of_many(factors.effects)),
    "interactions": ("How settings act together", of_many(factors.interactions)),
    "parallel": ("Every experiment through its settings", of_many(factors.parallel)),
    "curves": ("Curves", losses.curves),
    "gap": ("Loss gap", losses.gap),
    "metrics": ("Metrics", run.metrics),
    "evaluations": ("Evaluations", of_run(run.evaluations)),
    "costs": ("What a lower loss costs", of_many(losses.costs)),
    "parts": ("The parts compared", losses.parts),
    "sources": ("The same effect in each source", of_many(sources.sources)),
    "fair": ("Fair comparisons", of_many(losses.fair)),
    "machines": ("Sizes, machines and speed", overview.machines),
    "scaling": ("Scaling", of_many(losses.scaling)),
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
    "next": ("What to run next", of_many(background.what_next)),
}


def document(analysis: Analysis) -> Document:
    results, findings = analysis.results, findings_of(analysis)
    with debug_mode(False):  # checking every row of data against a schema takes long; the tests do it
        blocks = {name: [block for block in make(findings) if block] for name, (_, make) in SECTIONS.items()}
    training = findings.training
    return Document(
        title=pair.title(findings) if findings.pair else results.title,
        lede=run.lede(training) if training else overview.lede(findings),
        facts=run.totals(results.experiments.iloc[0]) if training else overview.totals(results),
        notes=run.notes(training) if training else [*results.notes, *sources.notes(findings)],
        sections=[Section(name, SECTIONS[name][0], content) for name, content in blocks.items() if content],
        data=findings.data,
    )
