"""The five sentences: stated where the numbers support them, and honest where they do not."""

import math
import re
from dataclasses import replace

import pandas as pd
import pytest
from scipy import stats
from synthetic import synthetic

from nanostudy.analysis.analysis import Analysis
from nanostudy.analysis.frames import Results
from nanostudy.reporting.phrases import amount, interval, share_text, short, signed
from nanostudy.reporting.sections import document
from nanostudy.reporting.sections.answer import (
    claims_hold,
    how_it_generalises,
    longer_windows,
    what_does_not,
    what_matters,
    which_model,
)

FACTORS = {"n_embd": [128, 256], "n_head": [4, 8], "dropout": [0.1, 0.2]}


def analysis(effects, **settings) -> Analysis:
    return Analysis(synthetic(FACTORS, effects, **{"seeds": (1, 2, 3), "noise": 0.004, **settings}))


def test_an_effect_that_is_there_is_stated_with_its_interval():
    found = analysis({"n_embd": -0.2, "dropout": 0.05})
    text = what_matters(found)
    row = found.effects.table.query("term == 'n_embd'").iloc[0]
    assert text.startswith("n_embd matters most: going from 128 to 256 lowers the validation loss by 0.")
    assert f"{-row['effect']:.3f} nats per token (95% interval for all at once {-row['together_high']:.3f} to" in text
    assert "dropout 0.1 → 0.2 by +0.0" in text
    assert "has an effect, too" in text
    assert "n_head" not in text


def test_an_effect_that_is_not_there_is_not_stated():
    found = analysis({})
    text = what_matters(found)
    assert text.startswith("No setting's effect differs from zero (95% for all at once): the largest estimate, ")
    assert "matters most" not in text
    assert "indistinguishable from no effect (95% for all at once)" in what_does_not(found)


def test_a_setting_that_does_nothing_is_named_as_such():
    text = what_does_not(analysis({"n_embd": -0.2, "dropout": 0.05}))
    assert text.startswith("n_head 4 → 8 by ")
    assert "is indistinguishable from no effect (95% for all at once)" in text
    assert "n_embd 128" not in text


def test_settings_that_act_together_are_named_only_where_they_do():
    together = what_does_not(analysis({"n_embd": -0.2, "dropout": 0.1, "n_head": 0.1, "n_embd x dropout": 0.08}))
    assert re.search(
        r"Some act together \(95% for all at once\): n_embd 128 → 256 by −0.2[78]\d at dropout 0.1 and −0.1[12]\d at 0.2, "
        r"a difference of \+0.1[56]\d \(",
        together,
    )
    assert together.startswith("Every setting that was varied has an effect")
    apart = what_does_not(analysis({"n_embd": -0.2}, draw=2))
    assert "no two settings can be said to act together" in apart


def test_near_ties_are_undecided():
    text = what_matters(analysis({"n_embd": -0.208, "dropout": 0.21}, seeds=(1, 2, 3, 4)))
    assert text.startswith(
        "dropout and n_embd matter most, and which of them more is undecided: dropout 0.1 → 0.2 by +0.2"
    )
    assert "matters most" not in text
    assert "n_embd matters" in what_matters(analysis({"n_embd": -0.2}, seeds=(1, 2, 3, 4)))


def test_two_seeds_cannot_tell():
    text = what_matters(analysis({"n_embd": -0.02, "dropout": 0.02}, seeds=(1, 2), noise=0.01))
    assert text.startswith("Two seeds cannot tell which settings matter: the largest estimate, ")


def test_an_effect_that_goes_with_the_seed_is_not_called_nil():
    results = synthetic({"n_layer": [2, 4], "n_head": [1, 2], "n_embd": [64, 128]}, {"n_embd": -0.5}, noise=0.005)
    results.experiments["seed"] = results.experiments["n_embd"].map({64: 1, 128: 9})
    analysis = Analysis(results)
    text = what_matters(analysis)
    assert text.startswith("Two seeds cannot tell which settings matter: the largest estimate, n_embd 64 → 128, ")
    assert text.endswith(" (no interval) nats per token.")
    nil, *rest = what_does_not(analysis).split("; ")
    assert "n_embd" not in nil
    assert rest[0] == "whether n_embd has an effect cannot be said"
    assert "how sure that is cannot be said" in which_model(analysis)


def test_a_fraction_names_what_it_cannot_separate():
    factors = {"n_layer": [2, 4], "n_embd": [64, 128], "dropout": [0.0, 0.2]}
    kept = lambda s: sum((s["n_layer"] == 4, s["n_embd"] == 128, s["dropout"] > 0)) % 2 == 1  # noqa: E731
    together = lambda s: 2 + 0.047 * (1 if (s["n_layer"] == 4) == (s["n_embd"] == 128) else -1)  # noqa: E731
    text = what_matters(Analysis(synthetic(factors, together, seeds=(1, 2, 3, 4), noise=0.001, keep=kept)))
    assert text.startswith(
        "dropout, or n_layer × n_embd, which these experiments cannot separate from it, matters most"
    )


def test_a_setting_harmless_on_average_that_costs_at_the_best_settings():
    loss = lambda s: 2 - 0.2 * (s["n_embd"] == 256) + (s["n_head"] == 8) * (0.1 if s["n_embd"] == 256 else -0.12)  # noqa: E731
    text = what_matters(Analysis(synthetic(FACTORS, loss, seeds=(1, 2, 3, 4), noise=0.002)))
    assert re.search(r"At the best settings n_head 4 → 8 changes it by \+0\.\d+ \(.*\), on average by −0\.01", text)


def test_the_model_to_use_comes_with_what_is_indistinguishable():
    same = which_model(analysis({"n_embd": -0.5}))
    assert "n_embd 256" in same
    assert "lowest mean validation loss" in same
    assert "over 3 seeds" in same
    assert "3 of the 7 other settings are indistinguishable from it (95%)" in same
    apart = which_model(analysis({"n_embd": -0.5, "n_head": -0.2, "dropout": 0.2}))
    assert "it differs from all 7 other settings at 95%" in apart


def test_the_lowest_of_several_is_called_optimistic_and_corrected():
    luck = Analysis(synthetic({"dropout": [0.0, 0.1, 0.2, 0.3]}, seeds=(1, 2, 3), noise=0.02, draw=2))
    text = which_model(luck)
    assert (
        "That mean was chosen as the lowest of 4, so it is optimistic: on seeds that did not choose it, it is" in text
    )
    assert f"it is {luck.best_unbiased:.4f}." in text
    clear = which_model(Analysis(synthetic({"dropout": [0.0, 0.2]}, {"dropout": 0.3}, seeds=(1, 2, 3), noise=0.01)))
    assert "Luck hardly flatters it: whichever seed is left out, the others choose the same settings." in clear
    single = which_model(Analysis(synthetic(FACTORS, {"n_embd": -0.1}, noise=0.02)))
    assert "That loss was chosen as the lowest of 8, so it is optimistic." in single


def test_the_last_section_says_what_would_decide():
    made = document(Analysis(synthetic({"dropout": [0.0, 0.1]}, seeds=(1, 2, 3), noise=0.02, draw=2)))
    assert made.sections[-1].title == "What to run next"
    assert made.sections[-1].blocks[0].text.startswith("To decide between dropout 0")


def test_the_smallest_of_the_tied_is_offered():
    text = which_model(analysis({"dropout": 0.3}, draw=3))
    assert "128" in text
    assert "the smallest of which has" in text or "n_embd 128" in text


def test_without_noise_nothing_is_said_to_be_sure():
    single = Analysis(synthetic({"n_embd": [128, 256]}, {"n_embd": -0.2}))
    assert "how sure that is cannot be said" in which_model(single)
    assert "matters most" not in what_matters(single)


def test_an_answer_leaves_out_what_it_cannot_say():
    made = document(Analysis(synthetic(FACTORS, {"n_embd": -0.1})))
    assert list(made.answer)[:3] == [
        "What matters",
        "What does not, and what acts together",
        "Which model to use",
    ]
    assert all(text.endswith(".") for text in made.answer.values())
    assert not any("nan" in text.split() for text in made.answer.values())


def test_overfitting_is_counted():
    results = synthetic(FACTORS, {"n_embd": -0.1}, curves=True)
    assert "none of 8 trainings overfit" in how_it_generalises(Analysis(results))
    curves = results.evaluations.copy()
    name = curves["name"].iloc[0]
    last = curves[curves["name"] == name].index[-1]
    curves.loc[last, "val_loss"] = 3.9
    assert "1 of 8 trainings overfit" in how_it_generalises(Analysis(replace(results, evaluations=curves)))


def verdicts(*rows):
    table = pd.DataFrame(rows, columns=["verdict", "n"])
    found = Analysis(synthetic({"n_embd": [128]}))
    found.__dict__["verdicts"] = table  # where the cached property keeps it
    return claims_hold(found)


def test_claims_that_experiments_test_are_counted_and_arithmetic_is_not():
    assert verdicts(("reproduced", 4), ("reproduced", 1), ("not reproduced", 2), ("better", 3), ("arithmetic", 0)) == (
        "Of 4 published claims that these experiments test, 2 are reproduced, 1 is bettered and 1 is not reproduced."
    )
    assert verdicts(("contradicts itself", 0), ("not tested", 0)) == ""
    assert verdicts(("not tested", 0), ("arithmetic", 0)) == (
        "These experiments test none of them; 1 follows from arithmetic."
    )


def test_numbers_in_words():
    assert signed(-0.0312) == "−0.031"
    assert signed(0.00001) == "0"
    assert interval(-0.2, -0.21, -0.19) == "−0.200 (−0.210 to −0.190)"
    assert interval(-0.2, float("nan"), float("nan")) == "−0.200 (no interval)"
    assert [short(value) for value in (804096, 3_181_056, 999_960, 4.6e14, 12)] == [
        "804 k",
        "3.18 M",
        "1 M",
        "460 T",
        "12",
    ]
    assert [
        amount(*pair) for pair in ((2.3, "val_loss"), (804_096.0, "parameters"), (4.6e14, "flops"), (754.0, "seconds"))
    ] == [
        *("2.3000", "804 k", "460 TFLOP", "12 min 34 s"),
    ]


# --- contexts, texts, the test part


def with_contexts(results: Results, longer: float = -0.03) -> Results:
    """Losses in windows of 32 and 64 tokens: those of block_size 64 read longer windows, which alone gives `longer`."""
    table = results.experiments.copy()
    long = table["block_size"] == 64
    table["val_loss_at_32"] = table["val_loss"].where(~long, table["val_loss"] - longer)
    table["val_loss_at_64"] = table["val_loss"].where(long)
    return replace(results, experiments=table)


def test_the_effect_of_block_size_says_what_the_longer_window_alone_gives():
    factors = {"block_size": [32, 64], "n_embd": [64, 128], "dropout": [0.0, 0.2]}
    results = synthetic(factors, {"block_size": -0.1, "n_embd": -0.05}, seeds=(1, 2, 3), noise=0.003)
    whole, scored = Analysis(results), Analysis(with_contexts(results))
    text = what_matters(scored)
    assert "block_size" in text
    effect, same = (
        one.table.query("term == 'block_size'")["effect"].iloc[0]
        for one in (whole.effects, scored.equal_windows.effects)
    )
    assert same == pytest.approx(effect + 0.03)
    after = longer_windows(scored, text)
    assert after.startswith(f" In windows of 32 tokens for all, block_size 32 → 64 by {signed(same)} (")
    assert after.endswith("the rest of its effect comes from evaluating in longer windows.")
    assert "comes from evaluating in longer windows; how large it is was not scored" in longer_windows(
        whole, what_matters(whole)
    )
    assert longer_windows(scored, "n_embd matters") == ""
    answer = document(scored).answer
    assert text + after in answer.values()
    assert "block_size" in answer["Which model to use"]
    assert "the rest of its effect" not in answer["Which model to use"]


def test_the_best_settings_are_compared_in_equal_windows():
    factors = {"block_size": [32, 64], "n_embd": [64, 128]}
    results = synthetic(factors, {"block_size": -0.02, "n_embd": -0.2}, seeds=(1, 2, 3), noise=0.001)
    still = which_model(Analysis(with_contexts(results, -0.01)))
    assert "in windows of 32 tokens for all, it still has the lowest, 1." in still
    other = which_model(Analysis(with_contexts(results, -0.05)))
    assert other.startswith("n_embd 128, block_size 64 has the lowest")
    assert "in windows of 32 tokens for all, n_embd 128, block_size 32 has the lowest, 1." in other


def test_a_stated_loss_has_an_interval_over_what_it_is_over():
    results = synthetic(FACTORS, {"n_embd": -0.5}, seeds=(1, 2, 3), noise=0.01)
    text = which_model(Analysis(results))
    [low, high] = [float(end) for end in re.search(r"95% interval (\S+) to (\S+) over seeds\)", text).groups()]
    rows = Analysis(results).ranking
    best = rows.sort_values("mean", kind="stable").iloc[0]
    own = rows[rows["mean"] == best["mean"]]["value"]
    ends = stats.t.interval(0.95, 2, own.mean(), own.std() / math.sqrt(3))
    assert [low, high] == pytest.approx(ends, abs=1e-4)


def test_seeds_of_one_setting_are_compared_with_nothing():
    """Others may have begun: what they vary is no factor of what has ended."""
    results = synthetic({"n_layer": [2, 4]}, {}, seeds=(1, 2, 3), noise=0.01)
    table = results.experiments.copy()
    table.loc[table["n_layer"] == 4, ["status", "val_loss"]] = ["running", math.nan]
    answer = document(Analysis(replace(results, experiments=table))).answer
    assert (
        answer["What matters"]
        == "No setting varies between the experiments that finished, so none can be said to matter."
    )
    assert answer["Which model to use"].startswith("There is one choice of settings, with a mean validation loss of ")
    assert "over 3 seeds" in answer["Which model to use"]


def test_the_test_part_confirms_and_does_not_choose():
    results = synthetic(FACTORS, {"n_embd": -0.5}, seeds=(1, 2), noise=0.01)
    plain = which_model(Analysis(results))
    assert "test part" not in plain
    table = results.experiments.copy()
    table["test_loss"] = 3.0 - table["val_loss"]
    text = which_model(Analysis(replace(results, experiments=table)))
    assert text.partition(";")[0] == plain.partition(";")[0]
    means = Analysis(results).ranking["mean"].min()
    assert f"on the test part, which no choice has read, its loss is {3.0 - means:.4f} (95% interval" in text


def test_shares_of_few_are_counts():
    row = {"speakers_real": 0.0, "speakers": 2, "speakers_real_low": 0.0, "speakers_real_high": 0.658}
    assert share_text(row, "speakers_real") == "0 of 2 (0% to 66%)"
    row = {"words_real": 0.46, "words": 62, "words_real_low": 0.34, "words_real_high": 0.58}
    assert share_text(row, "words_real") == "46% (34% to 58%, n = 62)"


def test_two_runs_are_compared_with_each_other():
    results = synthetic({"n_embd": [128, 256]}, {"n_embd": -0.2}, curves=True)
    made = document(Analysis(results))
    better, other = (f"{loss:.4f}" for loss in sorted(results.experiments["val_loss"]))
    assert made.title == "E256 against E128"
    assert made.lede == (
        f"E256 reaches a validation loss of {better} nats per token, and E128 one of {other}, by one training each."
    )
    first, second, *_, last = made.answer.values()
    assert list(made.answer)[:2] == ["Which is better", "What differs between them"]
    assert first == "E256 has the lower validation loss, by 0.2000 nats per token."
    assert "n_embd 256 and 128" in second
    assert "judge" in last
    there = {section.id for section in made.sections}
    assert {"answer", "experiments", "curves"} <= there
    assert not {"ranking", "effects", "interactions", "parallel", "fair", "scaling", "next"} & there


def test_two_seeds_of_one_setting_differ_by_noise():
    made = document(Analysis(synthetic({"n_embd": [128]}, seeds=(1, 2), noise=0.01)))
    assert made.title in ("s1 against s2", "s2 against s1")
    assert "noise" in made.answer["What this cannot say"]


def test_the_answer_begins_with_its_figure_and_what_the_best_writes():
    results = synthetic(FACTORS, {"n_embd": -0.1}, seeds=(1, 2), noise=0.01)
    best = str(results.finished["val_loss"].idxmin())
    samples = pd.DataFrame([(best, "", "To be\nor not")], columns=["name", "prompt", "text"])
    made = document(Analysis(replace(results, samples=samples)))
    figure, quote, answer = made.sections[0].blocks
    assert figure.id == "effects"
    assert quote.text == "To be\nor not"
    assert len(answer.texts) >= 3
    assert made.lede.count(". ") == 0
    shown = [block.id for section in made.once for block in section.blocks if hasattr(block, "alternative")]
    assert len(shown) == len(set(shown))
