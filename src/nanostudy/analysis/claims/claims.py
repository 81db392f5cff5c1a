"""Published claims (claims.yaml) and the verdicts that results allow."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cache
from importlib import resources
from typing import Any

import pandas as pd

from nanostudy.analysis.claims.claim_tests import TESTS
from nanostudy.analysis.claims.evidence import Evidence, Settings
from nanostudy.analysis.claims.judging import Judgement, contradiction
from nanostudy.analysis.frames import Results, shown
from nanostudy.settings_files import parse_yaml

COLUMNS = (
    *("claim", "statement", "source", "setting", "published"),
    *("verdict", "ours", "n", "low", "high", "why"),
)


@dataclass(frozen=True)
class Claim:
    id: str
    statement: str
    source: str  # the title of what it stands in
    published: str  # as it stands there
    settings: tuple[Settings, ...]  # of a run that tests it: one of these; none: it needs no certain run
    test: str
    parameters: Mapping[str, Any] = field(default_factory=dict)  # of the test
    implied: Mapping[str, Any] | None = None  # other figures of the source that the value must agree with
    note: str = ""
    make: str = ""  # a preset or study that makes a run which tests it

    @property
    def setting(self) -> str:
        """In words."""
        texts = (", ".join(f"{name}={shown(value)}" for name, value in one.items()) for one in self.settings)
        return "; or ".join(texts) or "any"

    @property
    def value(self) -> tuple[float, float]:
        value = self.parameters["value"]
        return (value[0], value[1]) if isinstance(value, list) else (value, value)


@cache
def read_claims() -> tuple[Claim, ...]:
    """Those that come along."""
    text = (resources.files("nanostudy.analysis.claims") / "claims.yaml").read_text(encoding="utf-8")
    file = parse_yaml(text, "claims.yaml")
    return tuple(_claim(one, file["sources"], file["settings"]) for one in file["claims"])


def _claim(one: Mapping[str, Any], sources: Mapping[str, str], sets: Mapping[str, Settings]) -> Claim:
    own = ("id", "statement", "published", "test", "implied", "note", "make")
    named = one["settings"] if isinstance(one["settings"], list) else [one["settings"]] if one["settings"] else []
    parameters = {key: value for key, value in one.items() if key not in (*own, "source", "settings")}
    told = {key: one[key] for key in own if key in one}
    return Claim(
        source=sources[one["source"]], settings=tuple(sets[name] for name in named), parameters=parameters, **told
    )


def verdicts(
    results: Results, quality: pd.DataFrame | None = None, claims: Sequence[Claim] | None = None
) -> pd.DataFrame:
    """COLUMNS, a row a claim in the order of claims.yaml. `quality` is writing.quality's table, if it is there already."""
    evidence = Evidence(results, quality)
    rows = []
    for claim in read_claims() if claims is None else claims:
        found = judge(claim, evidence)
        about = (claim.id, claim.statement, claim.source, claim.setting, claim.published)
        rows.append((*about, found.verdict, found.ours, found.n, found.low, found.high, found.why))
    return pd.DataFrame(rows, columns=list(COLUMNS))


def judge(claim: Claim, evidence: Evidence) -> Judgement:
    """What the test says, unless the source's own figures contradict the claim: then that."""
    found = TESTS[claim.test](claim.settings, claim.parameters, evidence)
    made = (
        f"`nanostudy {_command(claim.make)}` makes what tests it." if claim.make and found.verdict == "not run" else ""
    )
    found = replace(found, why=" ".join(text for text in (found.why, made, claim.note) if text))
    if claim.implied is None:
        return found
    figures = claim.implied
    instead = contradiction(claim.value, claim.parameters["half_unit"], figures["times"], figures["over"])
    if instead is None:
        return found
    because = figures["told"].format(instead)
    ours = f" Ours: {found.why}" if found.n and found.why else ""
    return replace(found, verdict="contradicts itself", why=f"{because}{ours}")


def _command(make: str) -> str:
    return f"study run {make}" if make.startswith("shakespeare-grid") else f"train {make}"
