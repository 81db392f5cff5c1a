"""The published claims (claims.yaml) whose settings were run on tiny Shakespeare, and a verdict on each."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cache
from importlib import resources
from typing import Any

import pandas as pd

from nanostudy.analysis.claims.claim_tests import STATISTICAL, TESTS
from nanostudy.analysis.claims.evidence import DIVERGED, Evidence, Settings
from nanostudy.analysis.claims.judging import Judgement, contradiction
from nanostudy.analysis.frames import Results
from nanostudy.text import listed, value_text
from nanostudy.yaml_input import parse_yaml

VERDICTS = (*("claim", "statement", "source", "setting", "published"), *("verdict", "ours", "n", "low", "high", "why"))


@dataclass(frozen=True)
class Claim:
    id: str
    statement: str
    source: str  # its title
    published: str  # the source's words
    settings: tuple[Settings, ...]  # of the runs that it is about: any of these (of the test `lower`: all)
    test: str
    parameters: Mapping[str, Any] = field(default_factory=dict)  # of the test
    implied: Mapping[str, Any] | None = None  # other figures of the source that the value must agree with
    note: str = ""
    make: str = ""  # the preset or study that makes a run which tests it

    @property
    def setting(self) -> str:
        """In words."""

        def text(value: Any) -> str:
            some = value if isinstance(value, list) else [value]
            return listed([value_text(one) for one in some], conjunction="or")

        return "; or ".join(", ".join(f"{name}={text(value)}" for name, value in one.items()) for one in self.settings)

    def applies(self, evidence: Evidence) -> bool:
        """Whether the runs that it is about were made."""
        return (all if self.test == "lower" else any)(evidence.was_run(settings) for settings in self.settings)


@cache
def read_claims() -> tuple[Claim, ...]:
    """Those of claims.yaml."""
    text = (resources.files("nanostudy.analysis.claims") / "claims.yaml").read_text(encoding="utf-8")
    file = parse_yaml(text, "claims.yaml")
    claims = []
    for one in file["claims"]:
        names = one["settings"] if isinstance(one["settings"], list) else [one["settings"]]
        settings = tuple(file["settings"][name] for name in names)
        own = {key: one[key] for key in Claim.__dataclass_fields__ if key in one}
        parameters = {key: value for key, value in one.items() if key not in own}
        own |= {"source": file["sources"][one["source"]], "settings": settings}
        claims.append(Claim(**own, parameters=parameters))
    return tuple(claims)


def verdicts(results: Results, quality: pd.DataFrame | None = None) -> pd.DataFrame:
    """Columns VERDICTS, one row per claim that applies, in the order of claims.yaml. `quality`: sample_quality.quality's table."""
    evidence = Evidence(results, quality)
    rows = []
    for claim in read_claims():
        if claim.applies(evidence):
            one = judge(claim, evidence)
            about = (claim.id, claim.statement, claim.source, claim.setting, claim.published)
            rows.append((*about, one.verdict, one.ours, one.n, one.low, one.high, one.why))
    return pd.DataFrame(rows, columns=list(VERDICTS))


def judge(claim: Claim, evidence: Evidence) -> Judgement:
    """The test's judgement, unless the source's own figures contradict the claim, or some of the runs diverged."""
    judgement = TESTS[claim.test](claim.settings, claim.parameters, evidence)
    lost = evidence.diverged(claim.settings) if claim.test in STATISTICAL and "machine" not in claim.parameters else 0
    if lost and judgement.n > 0 and judgement.ours != DIVERGED:
        why = f"{lost} of {lost + judgement.n} runs with these settings diverged: a mean over the others says nothing of them."
        judgement = replace(judgement, verdict="undecided", why=why)
    judgement = replace(judgement, why=" ".join(filter(None, (judgement.why, _hint(claim, judgement), claim.note))))
    if claim.implied is None:
        return judgement
    figures = claim.implied
    instead = contradiction(claim.parameters["value"], claim.parameters["half_unit"], figures["times"], figures["over"])
    if instead is None:
        return judgement
    ours = f" Ours: {judgement.why}" if judgement.n and judgement.why else ""
    return replace(judgement, verdict="contradicts itself", why=f"{figures['says'].format(instead)}{ours}")


def _hint(claim: Claim, judgement: Judgement) -> str:
    """The command that makes a run for it, or one more, where that would tell; on this machine, if the claim names one."""
    if not claim.make or claim.parameters.get("machine", "cpu") != "cpu":
        return ""
    study = claim.make.startswith("shakespeare-grid")
    if judgement.verdict == "not tested":
        return f"`nanostudy {'study run' if study else 'train'} {claim.make}` makes a run that tests it."
    more = judgement.verdict == "undecided" and not study
    return f"`nanostudy train {claim.make} seed=2` adds a run, and so does every other seed." if more else ""
