"""Sample quality: counts on texts whose answers are plain to see, copied passages against brute force, rank correlations."""

import hashlib
import math
import random
import time
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
from conftest import needs_shakespeare
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats
from synthetic import synthetic

from nanostudy.analysis.frames import CorpusFacts
from nanostudy.analysis.sample_quality import (
    QUALITY,
    Reference,
    quality,
    quality_against_loss,
    rank_correlation,
    share_interval,
)
from nanostudy.analysis.verbatim import longest_verbatim
from nanostudy.data.texts import find_text

PLAY = "\n\n".join(
    f"{name}:\n{line}"
    for name, line in [
        ("ROMEO", "What light is this?"),
        ("First Citizen", "You are all resolv'd.\nSpeak, speak."),
        ("JULIET", "O Romeo, where art thou?"),
    ]
    * 4
)


def shares(sample, prompt="", text=PLAY):
    return Reference.of(text).measure(sample, prompt)


# --- words


def test_words_of_the_training_text_are_real_whatever_their_case():
    measured = shares("speak THOU resolv'd resolv glorbl art thou.")
    assert (measured.real_words, measured.words) == (5, 7)  # resolv and glorbl are not


def test_words_that_were_cut_do_not_count():
    assert shares("art tho").words == 1  # tho, at the end, may have become thou
    assert shares("art tho\n").words == 1  # the file's last line ends; the model's did not
    assert shares("ROthou art.", prompt="RO").words == 1  # thou went on from RO
    assert shares("ROMEO:thou art.", prompt="ROMEO:").words == 2


def test_the_prompt_is_left_out():
    with_it = shares("ROMEO:\nart thou? ", prompt="ROMEO:")
    assert (with_it.words, with_it.real_words, with_it.characters) == (2, 2, len("\nart thou? "))
    assert with_it == shares("\nart thou? ", prompt="ROMEO:")


# --- speakers and dialogue


def test_speakers_are_those_of_the_text():
    assert Reference.of(PLAY).speakers == {"ROMEO", "First Citizen", "JULIET"}
    sample = "ROMEO:\nyes\n\nROMEO:\nart\n\nRomeo:\nart\n\nKING:\nthou\n\nno speaker: here\nx\n\nJULIET:\nw"
    measured = shares(sample)
    assert (measured.real_speakers, measured.speakers) == (2, 4)  # the first block does not count, as it may be cut


def test_a_speaker_line_stands_alone_after_a_blank_line():
    assert shares("x\n\nart\nROMEO:\nthou\n\nx").speakers == 0
    assert shares("x\n\nROMEO: art\n\nx").speakers == 0
    assert shares("x\n \t\n\nROMEO:\nart\n\nx").speakers == 1
    assert shares("x\n\nart\n\nROMEO:").speakers == 0  # may have gone on: "ROMEO: art"
    assert shares("x\n\nart\n\nROMEO:\nth").speakers == 1


def test_well_formed_blocks():
    sample = "cut\n\nROMEO:\nart\nthou\n\nROMEO:\n\nart thou\n\nANYONE:\n :\n\nROMEO: art\n\ncut:\ncut"
    measured = shares(sample)
    assert (measured.well_formed, measured.blocks) == (2, 5)


def test_a_sample_that_goes_on_from_a_new_line_may_begin_with_a_block():
    assert shares("\nROMEO:\nart\n\nx").blocks == 1
    assert shares("ROMEO:\nart\n\nx").blocks == 0
    assert shares("\nart\n\nx", prompt="ROMEO:").blocks == 0
    assert shares("\n\nROMEO:\nart\n\nx", prompt="KING.").blocks == 1


def test_prose_has_no_speakers():
    prose = "\n\n".join(["It was a night like any other.", "Note:\nthe wind rose."] * 6 + ["And so on."])
    measured = shares("x\n\nNote:\nthe wind.\n\nx", text=prose)
    assert (measured.speakers, measured.blocks, measured.words) == (0, 0, 4)
    assert math.isnan(measured.shares()["speakers_real"])
    assert math.isnan(measured.shares()["dialogue_well_formed"])


def test_too_little_dialogue_is_none():
    assert not Reference.of("\n\n".join(PLAY.split("\n\n")[:9])).speakers
    assert Reference.of("\n\n".join(PLAY.split("\n\n")[:10])).speakers


@needs_shakespeare
def test_shakespeare_is_well_formed_dialogue_of_real_words():
    text = find_text("shakespeare").content
    reference = Reference.of(text[:1_003_854])
    assert "First Citizen" in reference.speakers
    own = reference.measure(text[:500_000]).shares()
    assert own["words_real"] == 1.0
    assert own["speakers_real"] > 0.99
    assert own["dialogue_well_formed"] > 0.97


# --- copied passages


def brute(text, source):
    return max(
        (len(text[i:j]) for i in range(len(text)) for j in range(i, len(text) + 1) if text[i:j] in source), default=0
    )


@given(st.lists(st.text("ab\n\U0001f3ad", max_size=12), max_size=4), st.text("ab\n\U0001f3ad", min_size=1, max_size=40))
def test_copied_passages_against_brute_force(texts, source):
    assert longest_verbatim(texts, source) == [brute(text, source) for text in texts]


def test_a_hash_that_collides_is_looked_up():
    # Thue-Morse words of 2048 and their complements have the same polynomial hash modulo 2^64, whatever the odd base
    word = "a"
    for _ in range(11):
        word += word.translate(str.maketrans("ab", "ba"))
    source, text = word, word.translate(str.maketrans("ab", "ba"))
    assert longest_verbatim([text], source) == [1024]


@needs_shakespeare
def test_many_samples_take_seconds():
    text = find_text("shakespeare").content
    draw = random.Random(5)
    starts = [draw.randrange(1_000_000) for _ in range(64)]
    copies = [f"#{text[start : start + 700]}#{'zq' * 500}" for start in starts]
    noise = ["".join(draw.choice(text) for _ in range(1500)) for _ in range(64)]
    began = time.perf_counter()
    lengths = longest_verbatim([*copies, *noise], text)
    assert time.perf_counter() - began < 20
    assert lengths[:64] == [700] * 64
    assert 4 <= min(lengths[64:]) <= max(lengths[64:]) < 12


# --- of results


@pytest.fixture
def written(tmp_path):
    """Four experiments on PLAY, and what three of them wrote."""
    content = PLAY + "\n\nMERCUTIO:\nA plague!"
    path = tmp_path / "play.txt"
    path.write_text(content)
    sha = hashlib.sha256(content.encode()).hexdigest()
    results = synthetic({"n_layer": [1, 2, 3, 4]}, lambda settings: 3.0 - settings["n_layer"] / 10)
    experiments = results.experiments.assign(corpus_sha256=sha)
    names = list(experiments.index)
    samples = pd.DataFrame(
        [
            (names[1], "", "art thou glorb\n"),
            (names[1], "ROMEO:", "ROMEO:\nlight light light.\n\nJULIET:\nWhat\n\nx"),
            (names[0], "", "glorb glorb glorb.\n"),
            (names[3], "", ""),
            ("a stranger", "", "art thou?"),
        ],
        columns=["name", "prompt", "text"],
    )
    facts = CorpusFacts("play", sha, str(path), "char", 1, None)
    return replace(results, experiments=experiments, samples=samples, corpora={sha: facts})


def test_quality_pools_a_models_samples(written):
    names = list(written.experiments.index)
    table = quality(written)
    assert list(table.columns) == list(QUALITY)
    assert list(table.index) == [names[0], names[1], names[3]]  # in order of the experiments
    second = table.loc[names[1]]
    assert (second["words_real"], second["words"], second["samples"]) == (1.0, 7, 2)  # the last glorb and x are cut
    assert (second["speakers_real"], second["dialogue_well_formed"], second["blocks"]) == (1.0, 1.0, 1)
    assert second["longest_copied"] == len(".\n\nJULIET:\n")
    assert second["characters"] == len("art thou glorb") + len("\nlight light light.\n\nJULIET:\nWhat\n\nx")
    assert table.loc[names[0], "words_real"] == 0.0
    empty = table.loc[names[3]]
    assert math.isnan(empty["words_real"])
    assert (empty["longest_copied"], empty["characters"], empty["samples"]) == (0, 0, 1)
    assert "1 finished experiment without a sample." in table.attrs["notes"]


def test_quality_without_the_text(written):
    (sha,) = written.corpora
    gone = replace(written, corpora={sha: replace(written.corpora[sha], requested="/nowhere")})
    for results in (gone, replace(written, corpora={})):
        table = quality(results)
        assert table["words_real"].isna().all()
        assert table["longest_copied"].isna().all()
        assert list(table["samples"]) == [1, 2, 1]
        assert "is not here" in table.attrs["notes"][0]


def test_quality_of_nothing():
    results = synthetic({"n_layer": [1, 2]})
    table = quality(results)
    assert (list(table.columns), len(table)) == (list(QUALITY), 0)
    assert (quality_against_loss(results, table)["n"] == 0).all()


def test_quality_against_loss(written):
    names = list(written.experiments.index)
    table = pd.DataFrame(
        {
            "words_real": [0.1, 0.3, 0.2, 0.5],
            "speakers_real": math.nan,
            "dialogue_well_formed": 1.0,
            "longest_copied": 5.0,
        },
        index=names,
    )
    found = quality_against_loss(written, table)
    # losses fall with the place, so ranks are 1 3 2 4 against 4 3 2 1: 1 - 6 (9 + 0 + 0 + 9) / 60 = -0.8
    assert found.loc["words_real", "rho"] == pytest.approx(-0.8)
    assert found.loc["words_real", "n"] == 4
    assert found.loc["speakers_real", "n"] == 0
    assert math.isnan(found.loc["longest_copied", "rho"])


def test_rank_correlation_of_a_textbook():
    # hours of television against IQ, ten people: rho = -29/165 = -0.1757...
    iq = np.array([106, 100, 86, 101, 99, 103, 97, 113, 112, 110], dtype=float)
    hours = np.array([7, 27, 2, 50, 28, 29, 20, 12, 6, 17], dtype=float)
    found = rank_correlation(iq, hours)
    assert found["rho"] == pytest.approx(-29 / 165)
    half = 1.959964 * math.sqrt((1 + (29 / 165) ** 2 / 2) / 7)
    assert found["low"] == pytest.approx(math.tanh(math.atanh(-29 / 165) - half), abs=1e-6)
    assert found["high"] == pytest.approx(math.tanh(math.atanh(-29 / 165) + half), abs=1e-6)


def test_equal_ranks_have_an_interval_too():
    found = rank_correlation(np.arange(10.0), -np.arange(10.0))
    assert (found["rho"], found["low"]) == (pytest.approx(-1), pytest.approx(-1))
    assert -1 < found["high"] < -0.9
    three = rank_correlation(np.arange(3.0), np.arange(3.0))
    assert three["rho"] == pytest.approx(1)
    assert math.isnan(three["low"])


def test_intervals_cover():
    draw = np.random.default_rng(3)
    rho = 0.6  # of a bivariate normal whose Pearson correlation is 2 sin(pi rho / 6)
    pearson = 2 * math.sin(math.pi * rho / 6)
    covered = 0
    for _ in range(1000):
        x = draw.standard_normal(30)
        y = pearson * x + math.sqrt(1 - pearson**2) * draw.standard_normal(30)
        found = rank_correlation(x, y)
        covered += found["low"] <= rho <= found["high"]
    assert 0.93 <= covered / 1000 <= 0.975


# --- intervals of shares


@pytest.mark.parametrize(("part", "whole"), [(0, 2), (2, 2), (1, 7), (33, 62), (62, 62)])
def test_a_share_has_wilsons_interval(part, whole):
    low, high = share_interval([part], [whole])
    ours = stats.binomtest(part, whole).proportion_ci(method="wilson")
    assert (low, high) == pytest.approx((ours.low, ours.high))
    assert (low, high) == pytest.approx(share_interval([part, 0], [whole, 0]))
    assert 0 <= low <= part / whole <= high <= 1


def test_a_share_of_nothing_has_no_interval():
    assert all(math.isnan(end) for end in share_interval([0, 0], [0, 0]))


@pytest.mark.parametrize(("samples", "alike"), [(1, 0.0), (2, 0.0), (8, 0.0), (8, 0.2), (20, 0.2)])
def test_intervals_of_shares_cover_at_their_rate(samples, alike):
    """Words of one sample may be alike: without the design effect, the last two cover about 80%. Wilson's is for one draw exact
    within the steps of a count."""
    draw, truth, covered = np.random.default_rng(7), 0.7, []
    for _ in range(2000):
        rates = np.full(samples, truth)
        if alike:
            rates = draw.beta(truth * (1 / alike - 1), (1 - truth) * (1 / alike - 1), samples)
        wholes = draw.integers(10, 60, samples)
        low, high = share_interval(draw.binomial(wholes, rates), wholes)
        covered.append(low <= truth <= high)
    assert (0.93 if not alike else 0.88) <= np.mean(covered) <= 0.98
