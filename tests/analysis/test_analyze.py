"""nanostudy.analyze: one call, everything from it."""

import subprocess
import sys

import pandas as pd
import pytest
from synthetic import synthetic

import nanostudy
from nanostudy.analysis.analysis import Analysis
from nanostudy.analysis.effects import Effects, effects
from nanostudy.analysis.frames import Results, experiments_frame
from nanostudy.analysis.ranking import ranking
from nanostudy.analysis.scaling import Refusal
from nanostudy.errors import UsageError

FACTORS = {"n_layer": [2, 4], "n_embd": [64, 128], "dropout": [0.0, 0.2]}
MEMBERS = (
    "effects",
    "gap_effects",
    "ranking",
    "generalisation",
    "text_error",
    "overfitting",
    "stability",
    "convergence",
    "scaling",
)
RESULTS = {
    "no row": Results("none", experiments_frame([])),
    "nothing finished": synthetic(FACTORS, waiting=range(1, 9)),
    "all diverged": synthetic(FACTORS, seeds=(1, 2), diverged=range(1, 17), curves=True),
    "one": synthetic({}, curves=True),
    "two": synthetic({"dropout": [0.0, 0.2]}, {"dropout": 0.1}, curves=True),
    "little known": Results(
        "table", experiments_frame([{"name": "a", "status": "finished", "val_loss": 2.0}, {"name": "b"}])
    ),
}


@pytest.mark.parametrize("what", RESULTS)
def test_every_part_has_an_answer_for_every_study(what):
    found = Analysis(RESULTS[what])
    for member in MEMBERS:
        assert getattr(found, member) is not None
    for at in ("context", "updates", "tokens", "arithmetic", "time"):
        assert found.equal_budget(at).attrs["explanation"]
    for cost in ("parameters", "flops", "seconds"):
        assert {"name", "cost", "val_loss", "on_front"} <= set(found.pareto(cost))
    finished = len(found.results.finished)
    assert found.effects.n == finished == len(found.ranking)
    assert not found.effects.importance["clear"].any()
    assert found.effects.explanation
    assert isinstance(found.scaling["tokens"], Refusal)


def test_parts_are_those_of_the_modules():
    results = synthetic(FACTORS, {"dropout": 0.1}, seeds=(1, 2), noise=0.01, curves=True)
    found = Analysis(results)
    assert isinstance(found.effects, Effects)
    pd.testing.assert_frame_equal(found.effects.table, effects(results).table)
    pd.testing.assert_frame_equal(found.gap_effects.table, effects(results, "gap").table)
    pd.testing.assert_frame_equal(found.generalisation, ranking(results, "gap"))
    assert found.effects is found.effects
    assert len(found.cell_means("dropout", "n_embd")) == 4
    assert len(found.convergence) == 16


def test_a_mistake_is_a_usage_error(tmp_path):
    with pytest.raises(UsageError, match="holds neither a study nor a run nor a table"):
        nanostudy.analyze(tmp_path)


def test_help_waits_for_no_table_library():
    code = "import sys, nanostudy, nanostudy.cli.main; sys.exit(any(m in sys.modules for m in ('pandas', 'scipy', 'statsmodels')))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
