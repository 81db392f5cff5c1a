"""The error of a finite text: against independent texts of one generator, known long-run variances and a block bootstrap."""

import itertools
import math
from dataclasses import replace

import numpy as np
import pytest
from scipy import fft, stats
from synthetic import synthetic

from nanostudy.analysis.effects import effects
from nanostudy.analysis.ranking import ranking
from nanostudy.analysis.text_error import COSINES, TextErrors, difference, margin, text_error, text_errors, waves_of
from nanostudy.data.playhouse import write_plays
from nanostudy.training.window_losses import Windows, write_window_losses


def windows_of(losses: np.ndarray, context: int) -> Windows:
    """From each target's loss."""
    starts = np.arange(0, len(losses), context)
    sums, counts = np.add.reduceat(losses, starts), np.diff(np.append(starts, len(losses)))
    return Windows.of(sums, counts, context)


def variance(losses: np.ndarray, context: int = 64) -> float:
    return float(np.square(waves_of(windows_of(losses, context))).mean())


def autoregressive(n: int, phi: float, draw: np.random.Generator) -> np.ndarray:
    noise = draw.standard_normal(n + 1000)
    series = np.zeros(n + 1000)
    for i in range(1, n + 1000):
        series[i] = phi * series[i - 1] + noise[i]
    return series[1000:]


# --- the estimate


def test_waves_are_a_cosine_transform():
    losses = np.random.default_rng(1).gamma(2.0, size=96 * 64)
    means = losses.reshape(96, 64).mean(axis=1)
    cosines = fft.dct(means - means.mean(), 2)[1 : COSINES + 1] / 2
    assert waves_of(windows_of(losses, 64)) == pytest.approx(math.sqrt(2) / 96 * cosines, abs=1e-6)


def test_the_windows_length_does_not_matter():
    losses = 2 + autoregressive(64 * 500 + 17, 0.9, np.random.default_rng(2))
    waves = [waves_of(windows_of(losses, context)) for context in (16, 32, 64, 100)]
    for one, other in itertools.combinations(waves, 2):
        assert one == pytest.approx(other, abs=0.02 * float(np.abs(waves[0]).max()))


def test_the_variance_is_the_long_runs_and_a_block_bootstraps():
    """Of windows that follow one another: iid would be three times too small a standard error."""
    draw, n, phi = np.random.default_rng(3), 1000, 0.8
    ours, bootstrapped = [], []
    for _ in range(100):
        windows = autoregressive(n, phi, draw)
        ours.append(float(np.square(waves_of(Windows(windows.astype(np.float32), 64, 64))).mean()))
        blocks = n // 14
        starts = draw.integers(0, n - blocks + 1, (100, 14))
        means = np.lib.stride_tricks.sliding_window_view(windows, blocks).mean(axis=1)[starts].mean(axis=1)
        bootstrapped.append(means.var(ddof=1))
    truth = 1 / (1 - phi) ** 2 / n
    assert np.mean(ours) == pytest.approx(truth, rel=0.12)
    assert np.mean(bootstrapped) == pytest.approx(np.mean(ours), rel=0.2)  # blocks lose a little at their ends


@pytest.mark.parametrize("df", [1, 2, 7, 105])
@pytest.mark.parametrize("ratio", [0.1, 1.0, 10.0])
def test_seeds_and_text_together(df, ratio):
    """At least 95%, and no more than 99%, whatever the share of each. A pooled t with Satterthwaite's degrees covers 88% at df = 1."""
    draw, count = np.random.default_rng(4), 20_000
    errors = draw.standard_normal(count) + math.sqrt(ratio) * draw.standard_normal(count)
    of_seeds, of_text = draw.chisquare(df, count) / df, ratio * draw.chisquare(COSINES, (count, 1)) / COSINES
    half = margin(of_seeds, df, of_text)
    assert 0.945 <= (np.abs(errors) <= half).mean() <= 0.99
    assert (half >= stats.t.ppf(0.975, df) * np.sqrt(of_seeds)).all()
    assert margin(4.0, df, np.zeros((1, 1))) == pytest.approx(2 * stats.t.ppf(0.975, df))


# --- coverage


def character_models(orders: tuple[int, ...]):
    """Nats of each character, given as many before it, by counts in a text of the generator's own."""
    text, _ = write_plays(10_000, 150_000)
    alphabet = {c: i for i, c in enumerate(sorted(set(text)))}
    size = len(alphabet) + 1

    def keys(content: str, order: int) -> np.ndarray:
        ids = np.array([alphabet.get(c, size - 1) for c in content])
        return sum(np.roll(ids, back) * size**back for back in range(order + 1))[order:]

    def model(order: int):
        counts = np.bincount(keys(text, order), minlength=size ** (order + 1)).reshape(-1, size) + 0.05
        table = -np.log(counts / counts.sum(axis=1, keepdims=True)).ravel()
        return lambda content: table[keys(content, order)]

    return [model(order) for order in orders]


def coverage(texts: int, characters: int, context: int) -> dict[str, float]:
    """How often 95% intervals hold what the mean over all these independent texts is."""
    models = character_models((1, 2))
    found: dict[str, list[tuple[float, float]]] = {"loss": [], "difference": [], "gap": []}
    for seed in range(texts):
        pieces = []
        for other in (seed, texts + seed):
            text, _ = write_plays(other, characters)
            pieces.append([windows_of(model(text)[-characters + 2 :], context) for model in models])
        (first, second), (trained, _) = pieces
        losses = TextErrors({"first": waves_of(first)[None], "second": waves_of(second)[None]}, "")
        gaps = TextErrors({"gap": np.stack([waves_of(first), -waves_of(trained)])}, "")
        for what, value, errors, weights in (
            ("loss", first.mean, losses, {"first": 1.0}),
            ("difference", first.mean - second.mean, losses, {"first": 1.0, "second": -1.0}),
            ("gap", first.mean - trained.mean, gaps, {"gap": 1.0}),
        ):
            variances = errors.of_contrasts(list(weights), np.array([list(weights.values())]))
            found[what].append((value, float(margin(0.0, 1, variances)[0])))
    rates = {}
    for what, pairs in found.items():
        values, halves = np.array(pairs).T
        truth = 0.0 if what == "gap" else values.mean()
        rates[what] = float((np.abs(values - truth) <= halves).mean())
    return rates


def test_intervals_cover_other_texts():
    """Three standard errors of a rate of 95% in 100 texts are 6.5%."""
    rates = coverage(texts=100, characters=12_000, context=64)
    assert all(rate >= 0.95 - 0.065 for rate in rates.values()), rates


@pytest.mark.soak
def test_intervals_cover_other_texts_at_their_rate():
    """Two standard errors of a rate of 95% in 600 texts are 1.8%. Texts as long as tiny Shakespeare's validation split."""
    rates = coverage(texts=600, characters=111_000, context=64)
    print(rates)
    assert all(0.932 <= rate <= 0.985 for rate in rates.values()), rates


# --- in rankings


def with_windows(results, folder, draw, *, own=0.0, apart=0.3, windows=640):
    """The results with window losses: scenes that all models find hard alike, and what each (`own`) and each cell finds hard."""
    table, cells = results.experiments.copy(), results.cells()
    scenes = {"val": np.repeat(draw.standard_normal(20), windows // 20), "train": draw.standard_normal(windows)}
    of_cell = {cell: np.repeat(draw.standard_normal(20), windows // 20) for cell in cells}
    for name, row in table.iterrows():
        losses = {}
        for split, shared in scenes.items():
            wave = apart * shared + own * of_cell[cells[name]] + 0.02 * draw.standard_normal(windows)
            losses[split] = Windows((row[f"{split}_loss"] + wave - wave.mean()).astype(np.float32), 64, 64)
        (folder / str(name)).mkdir()
        write_window_losses(folder / str(name), losses, "")
    table["folder"] = [str(folder / str(name)) for name in table.index]
    return replace(results, experiments=table)


def small_gaps(noise: float = 0.001):
    results = synthetic({"n_layer": [1, 2], "n_embd": [64, 128]}, {"n_embd": -0.2}, seeds=(1, 2, 3), noise=0.01, draw=5)
    draw, table = np.random.default_rng(6), results.experiments.copy()
    table["train_loss"] = table["val_loss"] - noise * draw.standard_normal(len(table))
    table.loc[table["n_layer"] == 2, "train_loss"] += 0.004
    table["gap"] = table["val_loss"] - table["train_loss"]
    return replace(results, experiments=table)


def test_what_the_text_alone_could_separate_is_tied(tmp_path):
    """Gaps of -0.004 and 0: seeds tell them apart, this text does not."""
    results = small_gaps(0.0001)
    without = ranking(results, "gap")
    assert without.attrs["tied_cells"] == 2
    assert "leave out the error of a finite text" in without.attrs["basis"]
    table = ranking(with_windows(results, tmp_path, np.random.default_rng(7), own=0.05), "gap")
    assert table.attrs["tied_cells"] == 4
    assert "contain the error of a finite text" in table.attrs["basis"]
    assert ((table["low"] <= table["value"]) & (table["value"] <= table["high"])).all()
    assert (table["se"] > 2 * without["se"].max()).all()


def test_what_the_text_does_to_all_alike_cancels_in_comparisons(tmp_path):
    """A loss is uncertain by what is hard for all, a paired difference is not."""
    results = with_windows(small_gaps(), tmp_path, np.random.default_rng(8))
    table = ranking(results)
    assert table.attrs["tied_cells"] == ranking(small_gaps()).attrs["tied_cells"] == 2
    names = list(results.finished.index)
    value, low, high = difference(results, names[0], names[-1])
    assert value == pytest.approx(results.finished["val_loss"].iloc[0] - results.finished["val_loss"].iloc[-1])
    each = text_error(results)
    assert low < value < high
    assert (high - low) < (each["high"] - each["low"]).min() / 3


def test_without_windows_nothing_is_said_of_the_text():
    results = small_gaps()
    table = text_error(results)
    assert table["se"].isna().all()
    assert "not known of any" in table.attrs["explanation"]
    assert math.isnan(difference(results, *results.finished.index[:2])[1])


def test_windows_of_some_are_counted(tmp_path):
    results = with_windows(small_gaps(), tmp_path, np.random.default_rng(9))
    first = results.finished["folder"].iloc[0]
    for path in tmp_path.glob(f"{first.rpartition('/')[2]}/*"):
        path.unlink()
    assert "not known of 1 of 12 experiments" in text_errors(results).explanation


def test_effects_contain_the_error_of_the_text(tmp_path):
    """What models of other settings find hard widens their effects; what all find hard does not; nothing narrows them."""
    plain = small_gaps()
    without = effects(plain).table
    for own, folder in ((0.0, tmp_path / "alike"), (0.3, tmp_path / "apart")):
        folder.mkdir()
        found = effects(with_windows(plain, folder, np.random.default_rng(10), own=own))
        assert "contain the error of a finite text" in found.explanation
        table = found.table
        assert list(table["effect"]) == pytest.approx(list(without["effect"]))
        wider = (table["high"] - table["low"]) / (without["high"] - without["low"])
        assert (wider >= 1).all()
        assert (wider.max() < 1.2) == (own == 0.0)
        assert ((table["p"] < 0.05) == table["clear"]).all()
        assert (table["p"] >= without["p"] - 1e-12).all()
