"""Published claims: the file's shape, the arithmetic of verdicts, and every verdict on results whose answers are known."""

import math
import statistics
from dataclasses import replace
from typing import get_args

import numpy as np
import pandas as pd
import pytest
from scipy import stats
from synthetic import synthetic

from nanostudy.analysis.claims.claim_tests import TESTS, cells
from nanostudy.analysis.claims.claims import VERDICTS, judge, read_claims, verdicts
from nanostudy.analysis.claims.evidence import Evidence
from nanostudy.analysis.claims.judging import (
    LOSSES,
    Noise,
    Verdict,
    compare,
    contradiction,
    evaluation_variance,
    inside,
    interval,
    lower,
    spread,
)
from nanostudy.analysis.frames import CorpusFacts, Results, experiments_frame
from nanostudy.analysis.results import read_results
from nanostudy.data.texts import SHAKESPEARE_SHA256
from nanostudy.settings import FIELDS

CLAIMS = {claim.id: claim for claim in read_claims()}
MACHINE = {"device": "cpu", "device_name": "Intel(R) Xeon(R) Processor"}
GRID = CLAIMS["grid-shallow-small"].settings[0]
PARTS = ((64, 4), (64, 6), (128, 4), (128, 6))


def runs(claim, *changes, curve=None, machine=MACHINE):
    """Results of finished runs with a claim's settings (its first set), a mapping of changes each."""
    settings = CLAIMS[claim].settings[0]
    records = [
        {
            "id": place, "name": f"run{place}", "status": "finished", "source": "nanostudy", "seed": place, **settings,
            "updates": settings["max_iters"], "device": machine["device"], "members": 1, "corpus_sha256": SHAKESPEARE_SHA256, **change,
        }
        for place, change in enumerate(changes, start=1)
    ]  # fmt: skip
    results = Results("runs", experiments_frame(records), provenance={"machines": [machine]})
    if curve is None:
        return results
    rows = [(record["name"], step, 0, 0, loss, loss) for record in records for step, loss in curve.items()]
    return replace(results, evaluations=pd.DataFrame(rows, columns=list(results.evaluations.columns)))


def judged(claim, results, quality=None):
    return judge(CLAIMS[claim], Evidence(results, quality))


def verdict(claim, results, quality=None):
    return judged(claim, results, quality).verdict


# --- the file


def test_every_claim_is_whole():
    keys = {"measure", "value", "half_unit", "batches", "machine", "better", "least", "most", "after", "until"}
    keys |= {"measures", "because", "train", "val", "gap"}
    for claim in CLAIMS.values():
        assert claim.test in TESTS
        assert all(isinstance(text, str) and text for text in (claim.statement, claim.source, claim.published)), (
            claim.id
        )
        assert set(claim.parameters) <= keys, claim.id
        assert all(set(settings) <= set(FIELDS) for settings in claim.settings), claim.id
        assert set(claim.implied or ("times", "over", "says")) == {"times", "over", "says"}
    assert len(CLAIMS) == len(read_claims())


def test_every_test_has_a_claim():
    assert {claim.test for claim in CLAIMS.values()} == set(TESTS)


def test_settings_name_what_the_presets_and_studies_train():
    from nanostudy.settings_files import experiment_and_resources, read_settings

    for preset, claim in {
        "shakespeare-cpu": "report-cpu-val-loss",
        "shakespeare-gpu": "report-a100-val-loss",
        "nanogpt-cpu": "readme-cpu-val-loss",
        "nanogpt-gpu": "readme-gpu-val-loss",
    }.items():
        experiment, _ = experiment_and_resources(read_settings(preset))
        settings = {name: "none" if value is None else value for name, value in experiment.as_dict().items()}
        results = Results(
            "one", experiments_frame([{"name": "one", "status": "finished", "val_loss": 1.0, **settings}])
        )
        assert list(Evidence(results).finished(CLAIMS[claim].settings).index) == ["one"], preset


def test_the_row_is_matched_as_the_study_writes_it():
    # the study leaves lr_decay_iters to its default, which is max_iters
    two = [{"lr_decay_iters": "none", "val_loss": loss} for loss in (2.23, 2.24)]
    assert verdict("grid-row-val-loss", runs("grid-row-val-loss", *two)) == "reproduced"
    two = [{"min_lr": "none", "val_loss": loss} for loss in (1.88, 1.89)]  # a tenth of the learning rate
    assert verdict("readme-cpu-val-loss", runs("readme-cpu-val-loss", *two)) == "reproduced"
    results = runs("grid-row-val-loss", {"lr_decay_iters": 2000, "val_loss": 2.23})
    assert verdict("grid-row-val-loss", results) == "not tested"


# --- the arithmetic


def test_interval_of_a_textbook():
    # five weights: mean 5, standard deviation sqrt(2.5), t(0.975; 4) = 2.776
    mean, low, high = interval([3, 4, 5, 6, 7])
    assert mean == 5
    assert (low, high) == (
        pytest.approx(5 - 2.776445 * math.sqrt(0.5), abs=1e-6),
        pytest.approx(5 + 2.776445 * math.sqrt(0.5), abs=1e-6),
    )
    assert math.isnan(interval([3.0])[1])


def test_the_noise_between_seeds_is_what_is_seen_and_what_was_known():
    assert spread([3, 4, 5, 6, 7]) == (2.5, 4)
    assert spread([3.0])[1] == 0
    # Smyth (2004): (4 x 2.5 + 2 x 1) / (4 + 2)
    assert spread([3, 4, 5, 6, 7], Noise(1, 2)) == (pytest.approx(2.0), 6)
    assert spread([3.0], Noise(0.5, 2)) == (pytest.approx(0.25), 2)


def test_a_figure_against_a_prediction_interval_by_hand():
    # variance 0.0001 between seeds, once for the published run and a third for our mean; t(0.975; 2) = 4.302653
    found = compare([1.70, 1.71, 1.72], 1.75, 0.0)
    half = 4.302653 * math.sqrt(0.0001 * (1 + 1 / 3))
    assert (found.low, found.high) == (pytest.approx(1.71 - half, abs=1e-6), pytest.approx(1.71 + half, abs=1e-6))
    assert found.verdict == "reproduced"
    # evaluation and rounding have variances 0.0004 and 0.01^2 / 3, and the degrees of freedom are Satterthwaite's
    found = compare([1.70, 1.71, 1.72], 1.75, 0.01, 0.0004)
    seeds, total = 0.0001 * 4 / 3, 0.0001 * 4 / 3 + 0.0004 + 0.0001 / 3
    half = stats.t.ppf(0.975, 2 * (total / seeds) ** 2) * math.sqrt(total)
    assert found.high - 1.71 == pytest.approx(half)


@pytest.mark.parametrize(
    ("ours", "better", "expected"),
    [
        ([1.72, 1.721, 1.719], "lower", "reproduced"),
        ([1.70, 1.701, 1.702], "lower", "better"),
        ([1.70, 1.701, 1.702], "higher", "not reproduced"),
        ([1.70, 1.701, 1.702], None, "not reproduced"),
        ([1.74, 1.741, 1.742], "higher", "better"),
        ([1.60, 1.72, 1.84], "lower", "undecided"),  # its interval holds everything
        ([1.72], "lower", "undecided"),  # by chance or not
        ([1.60], "lower", "undecided"),
    ],
)
def test_verdicts_on_a_figure(ours, better, expected):
    assert compare(ours, 1.72, 0.005, better=better).verdict == expected


def test_one_run_is_decided_where_no_noise_that_was_ever_seen_explains_it():
    assert compare([1.553], 1.72, 0.005, before=LOSSES, better="lower").verdict == "better"
    assert compare([1.9], 1.72, 0.005, before=LOSSES, better="lower").verdict == "not reproduced"
    for close in (1.70, 1.72, 1.74):
        found = compare([close], 1.72, 0.005, before=LOSSES, better="lower")
        assert found.verdict == "undecided"
        assert "by chance" in found.why
    # t(0.975; 2) = 4.302653 times 0.012 times the root of 2
    found = compare([1.7], 1.72, 0.0, before=LOSSES)
    assert found.high == pytest.approx(1.7 + 4.302653 * 0.012 * math.sqrt(2), abs=1e-6)


def test_seeds_without_noise_are_held_to_the_rounding():
    # 4.6 - 0.005 is a little more than 4.595 in binary, 1.72 + 0.005 a little less than 1.725
    assert compare([4.595, 4.595], 4.6, 0.005).verdict == "reproduced"
    assert compare([1.725, 1.725], 1.72, 0.005).verdict == "reproduced"
    assert compare([1.73, 1.73], 1.72, 0.005).verdict == "not reproduced"


def test_a_range():
    assert compare([0.09, 0.091], (0.08, 0.1), 0.005).verdict == "reproduced"
    assert compare([0.14, 0.141], (0.08, 0.1), 0.005, better="higher").verdict == "better"
    assert compare([0.04, 0.041], (0.08, 0.1), 0.005, better="higher").verdict == "not reproduced"


def test_the_noise_of_the_evaluation():
    # 200 batches of 8 x 128 tokens: a standard error of 1.5 / sqrt(204,800) = 0.0033146
    tokens = 200 * 8 * 128
    assert evaluation_variance(tokens, "val_loss", 111_540) == pytest.approx(0.0033146**2, rel=1e-4)
    ours = 1.5**2 / 111_540 * 8 / 9
    assert evaluation_variance(tokens, "train_loss", 111_540) == pytest.approx(0.0033146**2 + ours, rel=1e-4)
    assert evaluation_variance(tokens, "gap", 111_540) == pytest.approx(2 * 0.0033146**2 + ours, rel=1e-4)
    assert evaluation_variance(0, "val_loss", 111_540) == 0


def test_the_noise_of_the_evaluation_is_that_of_random_batches():
    draw = np.random.default_rng(0)
    windows = 2.23 + 1.5 / math.sqrt(128) * draw.standard_normal(871)  # the validation split, one mean a window
    reach = 1.959964 * math.sqrt(evaluation_variance(200 * 8 * 128, "val_loss", 111_540))
    apart = [abs(draw.choice(windows, 1600).mean() - windows.mean()) for _ in range(1000)]
    assert statistics.fmean(distance <= reach for distance in apart) == pytest.approx(0.95, abs=0.02)


def test_an_interval_against_bounds():
    assert inside(0.6, 0.9, 0.5) == "reproduced"
    assert inside(0.4, 0.6, 0.5) == "undecided"
    assert inside(0.3, 0.4, 0.5) == "not reproduced"
    assert inside(0.1, 0.2, 0.01, 0.5) == "reproduced"
    assert inside(0.6, 0.7, 0.01, 0.5) == "not reproduced"
    assert inside(math.nan, math.nan, 0.5) == "undecided"


def test_contradictions():
    assert contradiction((0.08, 0.1), 0.005, [2000], [2700]) == pytest.approx(0.7407, abs=1e-4)
    assert contradiction((3.5, 3.5), 0.25, [6000], [1800]) is None  # 3.33
    assert contradiction((0.08, 0.1), 0.005, [2000], [45 * 60 * 8]) is None


def test_lower_by_welch():
    # means 1 and 3, variances 1 each over 3: se = sqrt(2/3), df = 4, t = 2.776: -2 +- 2.267
    found = lower([0, 1, 2], [2, 3, 4])
    assert (found.low, found.high) == (pytest.approx(-4.2668, abs=1e-3), pytest.approx(0.2668, abs=1e-3))
    assert found.verdict == "undecided"
    assert lower([0.0, 0.1, 0.2], [2.0, 2.1, 2.2]).verdict == "reproduced"
    assert lower([2.0, 2.1, 2.2], [0.0, 0.1, 0.2]).verdict == "not reproduced"
    # variances 1 over 3 and 100 over 2: se = sqrt(1/3 + 50), df = 1.0133 (pooled: 3)
    assert lower([0, 1, 2], [20, 34.142135623730951]).high == pytest.approx(
        -26.0710678 + stats.t.ppf(0.975, (1 / 3 + 50) ** 2 / ((1 / 3) ** 2 / 2 + 50**2)) * math.sqrt(1 / 3 + 50)
    )
    assert lower([1.4], [1.7]).verdict == "undecided"
    assert "more seeds" in lower([1.4], [1.7, 1.8]).why
    assert lower([1.0, 1.0], [2.0, 2.0]).verdict == "reproduced"
    assert lower([1.0, 1.0], [1.0, 1.0]).verdict == "undecided"
    # what is known of the noise decides between single runs: t(0.975; 4) = 2.776 times 0.012 times the root of 2
    one = lower([1.4], [1.7], LOSSES)
    assert (one.verdict, one.high) == ("reproduced", pytest.approx(-0.3 + 2.776445 * 0.012 * math.sqrt(2), abs=1e-6))
    assert lower([1.69], [1.7], LOSSES).verdict == "undecided"


# --- figures of runs


def test_a_published_loss():
    once = judged("report-cpu-val-loss", runs("report-cpu-val-loss", {"val_loss": 1.722}))
    assert once.verdict == "undecided"
    assert "`nanostudy train shakespeare-cpu seed=2` adds a run" in once.why
    twice = runs("report-cpu-val-loss", {"val_loss": 1.722}, {"val_loss": 1.73})
    assert verdict("report-cpu-val-loss", twice) == "reproduced"
    better = judged("report-cpu-val-loss", runs("report-cpu-val-loss", {"val_loss": 1.553}))
    assert (better.verdict, better.ours, better.n) == ("better", "1.5530", 1)
    assert "nanostudy train" not in better.why
    assert verdict("report-cpu-val-loss", runs("report-cpu-val-loss", {"val_loss": 1.84})) == "not reproduced"
    several = runs("report-cpu-val-loss", {"val_loss": 1.55}, {"val_loss": 1.56}, {"val_loss": 1.57})
    found = judged("report-cpu-val-loss", several)
    rest = 1.5**2 / (200 * 64 * 256) + 0.005**2 / 3
    by_hand = compare([1.55, 1.56, 1.57], 1.72, 0.0, rest, LOSSES)
    assert (found.verdict, found.low) == ("better", pytest.approx(by_hand.low))


@pytest.mark.parametrize("setting", CLAIMS["report-cpu-val-loss"].settings[0])
def test_every_named_setting_must_be_equal(setting):
    value = CLAIMS["report-cpu-val-loss"].settings[0][setting]
    other = f"{value}x" if isinstance(value, str) else (not value) if isinstance(value, bool) else value * 2 + 1
    results = runs("report-cpu-val-loss", {setting: other, "val_loss": 1.5})
    assert verdict("report-cpu-val-loss", results) == "not tested"


def test_runs_without_a_result():
    assert verdict("report-cpu-val-loss", runs("report-cpu-val-loss", {"status": "waiting"})) == "not tested"
    diverged = judged("report-cpu-val-loss", runs("report-cpu-val-loss", {"status": "diverged"}))
    assert (diverged.verdict, diverged.n) == ("not reproduced", 1)
    half = runs("report-cpu-val-loss", {"status": "diverged"}, {"status": "running"})
    assert verdict("report-cpu-val-loss", half) == "not tested"
    assert "nanostudy train shakespeare-cpu" in judged("report-cpu-val-loss", half).why
    survived = runs("report-cpu-val-loss", {"status": "diverged"}, {"val_loss": 1.72}, {"val_loss": 1.73})
    found = judged("report-cpu-val-loss", survived)
    assert found.verdict == "undecided"
    assert "1 of 3 runs with these settings diverged" in found.why


def test_a_table_that_does_not_tell_the_settings(tmp_path):
    path = tmp_path / "results.csv"
    path.write_text("Experiment,Val Loss\nb128_L4_H4_E128_BS8_MI1000_D10_s1,2.2313\n")
    found = judged("grid-row-val-loss", read_results([path]))
    assert found.verdict == "not tested"
    assert (
        "1 row of the table may have these settings, but it does not give corpus, tokenizer, gradient_accumulation_steps"
        in found.why
    )


def test_the_initial_loss():
    results = runs("report-cpu-initial-loss", {"val_loss": 1.6}, curve={0: 4.21, 2000: 1.6})
    found = judged("report-cpu-initial-loss", results)
    assert (found.verdict, found.ours) == ("not reproduced", "4.2100")
    assert "ln 65 = 4.17" in found.why
    assert verdict("report-cpu-initial-loss", runs("report-cpu-initial-loss", {"val_loss": 1.6})) == "not tested"
    lecture = runs("report-cpu-initial-loss", {"val_loss": 1.6}, {"val_loss": 1.6}, curve={0: 4.603, 2000: 1.6})
    assert verdict("report-cpu-initial-loss", lecture) == "reproduced"


def test_speed_is_a_claim_about_a_machine():
    a100 = {"device": "cuda", "device_name": "NVIDIA A100-SXM4-40GB"}
    done = {"val_loss": 1.4, "seconds": 1000.0}
    twice = [done, {**done, "seconds": 1001.0}]
    assert verdict("report-a100-time", runs("report-a100-time", done)) == "not tested"
    assert verdict("report-a100-time", runs("report-a100-time", *twice, machine=a100)) == "better"
    assert verdict("report-a100-time", runs("report-a100-time", done, machine=a100)) == "undecided"
    assert verdict("report-p100-time", runs("report-a100-time", done, machine=a100)) == "not tested"
    slow = runs("report-a100-time", *({**done, "seconds": seconds} for seconds in (4000.0, 4010.0)), machine=a100)
    assert verdict("report-a100-time", slow) == "not reproduced"
    assert verdict("report-a100-speed", slow) == "not reproduced"
    stacked = runs("report-a100-time", {**done, "members": 4}, machine=a100)
    assert verdict("report-a100-time", stacked) == "not tested"
    some = judged(
        "report-a100-time", runs("report-a100-time", done, {**done, "seconds": 9.0, "members": 4}, machine=a100)
    )
    assert (some.ours, some.n) == ("16 min 40 s", 1)
    two = runs("report-a100-time", done, machine=a100)
    two = replace(two, provenance={"machines": [a100, {"device": "cuda", "device_name": "NVIDIA H200"}]})
    assert verdict("report-a100-time", two) == "not tested"  # which of them it was is not known
    cpu = ({"val_loss": 1.5, "seconds": seconds} for seconds in (2627.0, 2640.0))
    assert verdict("report-cpu-time", runs("report-cpu-time", *cpu)) == "reproduced"
    shared = judged(
        "report-cpu-time", runs("report-cpu-time", *({"val_loss": 1.5, "seconds": 3600.0, "threads": 1} for _ in "ab"))
    )
    assert shared.verdict == "not tested"
    assert "a thread each" in shared.why
    on_gpu = runs("report-cpu-time", {"val_loss": 1.5, "seconds": 100.0}, machine=a100)
    assert verdict("report-cpu-time", on_gpu) == "not tested"
    assert verdict("report-cpu-time", synthetic({"n_layer": [1, 2]})) == "not tested"


def test_what_contradicts_itself_does_so_whatever_was_run():
    results = runs("report-cpu-speed", {"val_loss": 1.5, "seconds": 4000.0})
    for found in (judged("report-cpu-speed", results), judged("report-cpu-speed", synthetic({"n_layer": [1, 2]}))):
        assert found.verdict == "contradicts itself"
        assert "0.74 a second" in found.why
    assert judged("report-cpu-speed", results).ours == "0.5"
    assert "ends after 2,000 iterations" in judged("report-plateau-everywhere", results).why
    assert verdict("report-plateau-everywhere", results) == "contradicts itself"


def test_what_rests_on_code_that_is_not_the_sources_contradicts_nothing():
    results = synthetic({"n_layer": [1, 2]})
    for claim in ("report-speed-up", "grid-learning-rate", "grid-batch", "grid-seed", "grid-last-evaluation"):
        assert verdict(claim, results) == "not tested"
    assert "3.5 / 0.08 = 44" in judged("report-speed-up", results).why


def test_parameters_are_arithmetic():
    results = synthetic({"n_layer": [1, 2]})
    small, large, row = (
        judged(f"{name}", results)
        for name in ("report-parameters-small", "report-parameters-large", "grid-row-parameters")
    )
    assert (small.verdict, large.verdict, row.verdict) == ("arithmetic",) * 3
    assert (small.ours, large.ours, row.ours) == (
        "3,192,832 without position embeddings",
        "10,795,776",
        "795,904 without position embeddings",
    )
    assert small.n == 0
    claim = CLAIMS["report-parameters-small"]
    other = replace(claim, parameters={**claim.parameters, "value": 3.4e6})
    assert judge(other, Evidence(results)).verdict == "contradicts itself"


def both(small, large):
    """Results with runs of the two sizes of the report, of these losses."""
    pieces = [
        runs("report-cpu-val-loss", *({"val_loss": loss, "name": f"small{loss}"} for loss in small)),
        runs("report-a100-val-loss", *({"val_loss": loss, "name": f"large{loss}"} for loss in large)),
    ]
    return replace(pieces[0], experiments=pd.concat([piece.experiments for piece in pieces]))


def test_the_larger_model():
    assert verdict("report-larger-is-better", both([1.7], [1.4])) == "reproduced"
    assert verdict("report-larger-is-better", both([1.4], [1.7])) == "not reproduced"
    assert verdict("report-larger-is-better", both([1.43], [1.42])) == "undecided"
    assert verdict("report-larger-is-better", both([1.7], [])) == "not tested"


# --- curves


def test_convergence():
    fast = {0: 4.2, 400: 2.0, 600: 1.9, 2000: 1.6, 4000: 1.55, 6000: 1.57}
    slow = {0: 4.2, 400: 3.8, 600: 3.2, 2000: 2.2, 4000: 2.0, 6000: 1.6}
    at_once = {0: 4.2, 400: 1.6, 2000: 1.59, 4000: 1.59, 6000: 1.7}
    results = {
        name: runs("report-plateau", *[{"val_loss": 1.6}] * 6, curve=c)
        for name, c in [("fast", fast), ("slow", slow), ("at once", at_once)]
    }

    def of(claim):
        return {name: verdict(claim, one) for name, one in results.items()}

    assert of("report-falls-fast") == {"fast": "reproduced", "slow": "not reproduced", "at once": "reproduced"}
    assert of("report-refines") == {"fast": "reproduced", "slow": "not reproduced", "at once": "not reproduced"}
    assert of("report-plateau") == {"fast": "reproduced", "slow": "not reproduced", "at once": "reproduced"}
    assert of("report-longer") == {"fast": "reproduced", "slow": "reproduced", "at once": "undecided"}
    # by update 500 the last evaluation is that of 400: (4.2 - 2.0) / 2.65
    assert judged("report-falls-fast", results["fast"]).ours == "83% of the fall, from update 0 to 400"
    # the lowest loss counts, whatever comes after it: 0.05 / 2.65, by t(0.975; 7) and the noise that is known
    found = judged("report-longer", results["fast"])
    assert found.ours == "2% of the fall, from update 2,000 to 6,000"
    assert found.low == pytest.approx(0.05 / 2.65 - 2.364624 * math.sqrt(2 * 0.01**2 / 7 / 6), abs=1e-6)


def test_a_curve_that_ends_before_tells_nothing():
    short = runs("report-cpu-val-loss", {"val_loss": 1.6}, curve={0: 4.2, 400: 2.0})
    assert verdict("report-falls-fast", short) == "not tested"
    assert (
        verdict("report-plateau", runs("report-plateau", {"val_loss": 1.6}, curve={0: 4.2, 2000: 1.6})) == "not tested"
    )
    assert verdict("report-falls-fast", runs("report-cpu-val-loss", {"val_loss": 1.6})) == "not tested"


# --- writing


def table(**columns):
    return pd.DataFrame(columns, index=[f"run{place}" for place in range(1, 1 + len(next(iter(columns.values()))))])


def test_what_the_larger_model_learns():
    results = runs("report-large-learns", {"val_loss": 1.4})
    assert (
        verdict("report-large-learns", results, table(speakers_real=[0.9], dialogue_well_formed=[0.8])) == "undecided"
    )
    results = runs("report-large-learns", *[{"val_loss": 1.4}] * 3)
    for speakers, expected in [
        ([0.9, 0.92, 0.94], "reproduced"),
        ([0.3, 0.32, 0.34], "not reproduced"),
        ([0.3, 0.6, 0.9], "undecided"),
    ]:
        found = table(speakers_real=speakers, dialogue_well_formed=[0.8, 0.8, 0.8])
        assert verdict("report-large-learns", results, found) == expected
    assert (
        verdict("report-large-learns", results, table(speakers_real=[math.nan], dialogue_well_formed=[0.8]))
        == "not tested"
    )


def test_the_smaller_model_is_noisier():
    results = both([1.7, 1.71], [1.4, 1.41])
    words = pd.DataFrame(
        {"words_real": [0.8, 0.81, 0.9, 0.91]}, index=["small1.7", "small1.71", "large1.4", "large1.41"]
    )
    assert verdict("report-small-noisier", both([1.7], [1.4]), words) == "undecided"
    assert verdict("report-small-noisier", results, words) == "reproduced"
    assert verdict("report-small-noisier", results, 1 - words) == "not reproduced"
    assert verdict("report-small-noisier", results, words.iloc[:2]) == "not tested"


@pytest.mark.parametrize(("slope", "expected"), [(-0.1, "reproduced"), (0.1, "not reproduced"), (0.0, "undecided")])
def test_lower_loss_goes_with_better_samples(slope, expected):
    results = both(np.linspace(1.7, 1.8, 6), np.linspace(1.4, 1.5, 6))
    losses = results.experiments["val_loss"]
    found = judged("report-loss-and-samples", results, measures(slope * losses))
    assert (found.verdict, found.n) == (expected, 12)


def measures(values):
    names = ("words_real", "speakers_real", "dialogue_well_formed", "longest_copied")
    return pd.DataFrame(dict.fromkeys(names, values))


@pytest.mark.parametrize("models", [4, 5])
def test_a_perfect_relation_of_few_models_decides_nothing(models):
    results = both(np.linspace(1.7, 1.8, models - 2), (1.4, 1.41))
    found = judged("report-loss-and-samples", results, measures(-results.experiments["val_loss"]))
    assert (found.verdict, found.n) == ("undecided", models)


def test_a_weak_relation_decides_nothing():
    results = both((1.8, 1.75, 1.7), (1.5, 1.45, 1.4))
    words = pd.Series([0.3, 0.1, 0.2, 0.5, 0.2, 0.4], index=results.experiments.index)
    found = judged("report-loss-and-samples", results, measures(words))
    assert found.low < 0 < found.high
    assert found.verdict == "undecided"


def test_the_length_of_samples():
    results = runs("report-plateau", {"val_loss": 1.7}, {"val_loss": 1.7})
    for lengths, expected in [
        ((500, 500), "reproduced"),
        ((500, 499), "not reproduced"),
        ((500,), "not reproduced"),
        ((), "not reproduced"),
    ]:
        samples = pd.DataFrame(
            [(f"run{i}", "", "x" * n + "\n") for i, n in enumerate(lengths, 1)], columns=["name", "prompt", "text"]
        )
        assert verdict("report-sample-length", replace(results, samples=samples)) == expected


# --- the grid


def grid(parts=PARTS, **changes):
    axes = {name: values for name, values in GRID.items() if isinstance(values, list)}
    fixed = {"corpus": "shakespeare", **changes}
    pieces = [synthetic(axes, seeds=None, block_size=b, n_layer=n, **fixed).experiments for b, n in parts]
    names = [piece.rename(index=lambda name, part=part: f"{name}{part}") for part, piece in enumerate(pieces)]
    return Results("grid", pd.concat(names).assign(corpus_sha256=SHAKESPEARE_SHA256))


def test_the_cells_of_the_grid():
    assert len(cells(CLAIMS["grid-experiments"].settings[0])) == 128
    first, second = (dict(zip(GRID, cell, strict=True)) for cell in cells(GRID)[:2])
    assert first == {
        "block_size": 64,
        "n_layer": 4,
        "n_head": 4,
        "n_embd": 128,
        "batch_size": 8,
        "max_iters": 1000,
        "dropout": 0.1,
    }
    assert second == {**first, "dropout": 0.2}


COUNTS = ("grid-experiments", "grid-shallow-small", "grid-deep-small", "grid-shallow-large")


def test_how_many_experiments_a_grid_has_is_a_product():
    """Runs of ours say nothing of how many others made."""
    results = grid()
    assert len(results.experiments) == 128
    expected = {**dict.fromkeys((*COUNTS, "grid-order"), "arithmetic"), "grid-deep-large": "not tested"}
    assert {claim: verdict(claim, results) for claim in expected} == expected
    assert judged("grid-experiments", results).ours == "128; 128 finished here"
    some = grid(PARTS[:1], waiting=[32])
    assert {verdict(claim, some) for claim in COUNTS} == {"arithmetic"}
    assert judged("grid-experiments", some).ours == "128; 31 finished here"
    assert judged("grid-shallow-small", some).ours == "32; 31 finished here"


def test_another_order_or_other_seeds():
    results = grid(PARTS[:1])
    reversed_ids = results.experiments.assign(id=list(range(32, 0, -1)))
    assert verdict("grid-order", replace(results, experiments=reversed_ids)) == "not reproduced"
    one_seed = results.experiments.assign(seed=1337)
    assert judged("grid-order", replace(results, experiments=one_seed)).ours == "0 of 32 in their places"
    assert verdict("grid-order", synthetic({"n_layer": [1, 2]})) == "not tested"
    some = replace(results, experiments=results.experiments.iloc[:31])  # another study that shares cells with the grid
    assert verdict("grid-order", some) == "not tested"


def test_the_gap():
    results = grid(PARTS[:1])
    assert verdict("grid-gap", results) == "arithmetic"
    claim = CLAIMS["grid-gap"]
    published = replace(claim, parameters={**claim.parameters, "gap": 0.03})
    assert judge(published, Evidence(results)).verdict == "contradicts itself"


def test_what_was_published_without_a_direction_has_no_verdict():
    results = grid(PARTS[:1])
    table = results.experiments
    table["val_loss"] = 3.0 - table["parameters"] / 1e8
    found = judged("grid-parameters-and-loss", results)
    assert (found.verdict, found.ours, found.n) == ("not tested", "rank correlation -1.00", 32)


# --- which claims apply


def test_every_verdict_is_reached():
    losses = {"report-cpu-val-loss": (1.5,), "readme-cpu-val-loss": (1.88, 1.885), "grid-row-val-loss": (2.5,)}
    changes = [{**CLAIMS[name].settings[0], "val_loss": loss} for name, some in losses.items() for loss in some]
    results = runs("report-cpu-val-loss", {**changes[0], "seconds": 2700.0}, *changes[1:])
    found = verdicts(results)
    assert list(found.columns) == list(VERDICTS)
    assert list(found["claim"]) == [claim for claim in CLAIMS if claim in set(found["claim"])]
    assert set(found["verdict"]) == set(get_args(Verdict))
    by_claim = found.set_index("claim")["verdict"]
    assert (by_claim["report-cpu-val-loss"], by_claim["readme-cpu-val-loss"]) == ("better", "reproduced")
    assert by_claim["grid-row-val-loss"] == "not reproduced"
    assert not {"report-a100-val-loss", "report-larger-is-better", "readme-gpu-val-loss"} & set(by_claim.index)
    decided = found[found["verdict"].isin(["reproduced", "better", "not reproduced", "undecided"])]
    assert (decided["n"] >= 1).all()
    assert (found.loc[found["verdict"] == "arithmetic", "n"] == 0).all()


def toy(corpus, sha256):
    """A study of 20 updates, whatever its text."""
    results = synthetic(
        {"n_embd": [32, 64], "n_head": [1, 2]}, max_iters=20, eval_interval=10, corpus=corpus, curves=True
    )
    facts = CorpusFacts(corpus, sha256, corpus, "char", 1_003_854, None)
    return replace(results, experiments=results.experiments.assign(corpus_sha256=sha256), corpora={sha256: facts})


@pytest.mark.parametrize(
    "results",
    [
        toy("shakespeare", SHAKESPEARE_SHA256),
        toy("playhouse", "1" * 64),
        runs("report-cpu-val-loss", {"val_loss": 1.72, "corpus_sha256": "1" * 64}),  # the settings, on another text
        runs("report-cpu-val-loss", {"status": "waiting"}),
        Results("empty", experiments_frame([])),
    ],
    ids=["a toy on Shakespeare", "a toy on playhouse", "another text", "waiting", "nothing"],
)
def test_no_claim_applies(results):
    found = verdicts(results)
    assert found.empty
    assert list(found.columns) == list(VERDICTS)


def test_the_published_grids_table(tmp_path):
    """A table that names no text and few settings, in the published format."""
    lines = ["Experiment, Train Loss, Val Loss, Loss Gap, Total Params, Config Path"]
    settings = CLAIMS["grid-shallow-large"].settings[0]
    for seed, cell in enumerate(cells(settings), 1):
        one = dict(zip(settings, cell, strict=True))
        name = "b{block_size}_L{n_layer}_H{n_head}_E{n_embd}_BS{batch_size}_MI{max_iters}".format(**one)
        name = f"{name}_D{one['dropout'] * 100:.0f}_s{seed}"
        lines.append(f"{name}, {2.2018 + seed / 100:.4f}, {2.2313 + seed / 100:.4f}, 0.0295, 800000.0, one.py")
    path = tmp_path / "nanoGPT_results_shallow_large" / "results.csv"
    path.parent.mkdir()
    path.write_text("\n".join(lines))
    found = verdicts(read_results([path])).set_index("claim")
    assert set(found["source"]) == {"nanoGPT hyperparameter tuning project"}
    assert found.loc["grid-shallow-large", "verdict"] == "arithmetic"
    assert found.loc["grid-experiments", "ours"] == "128; 32 finished here"
    assert (found.loc["grid-order", "verdict"], found.loc["grid-gap", "verdict"]) == ("arithmetic", "arithmetic")
    assert (
        "but it does not give corpus, tokenizer, gradient_accumulation_steps" in found.loc["grid-row-val-loss", "why"]
    )
    assert not {"grid-shallow-small", "grid-deep-small", "grid-deep-large"} & set(found.index)
