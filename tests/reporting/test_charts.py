"""Figures: what they draw, their words, and that every one is a valid specification that draws."""

import json
import math
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
from synthetic import search, synthetic

from nanostudy.analysis.analysis import Analysis
from nanostudy.analysis.forest import Forest
from nanostudy.analysis.frames import CorpusFacts
from nanostudy.analysis.sources import Sources
from nanostudy.reporting.charts import factors as factor_charts
from nanostudy.reporting.charts import figure as figure_module
from nanostudy.reporting.charts import losses as loss_charts
from nanostudy.reporting.charts import numbers as number_charts
from nanostudy.reporting.charts.experiments import ranking_figure
from nanostudy.reporting.charts.figure import BLUE, GREY, draw, look
from nanostudy.reporting.charts.marks import colourings
from nanostudy.reporting.data import FEWEST_POINTS, MOST_CURVES, MOST_POINTS, data_of, spread
from nanostudy.reporting.sections import document

FACTORS = {"n_embd": [128, 256], "n_head": [4, 8], "dropout": [0.1, 0.2]}
EFFECTS = {"n_embd": -0.2, "dropout": 0.05, "n_embd x dropout": -0.03}


def study(**settings) -> Analysis:
    return Analysis(synthetic(FACTORS, EFFECTS, **{"seeds": (1, 2), "noise": 0.005, "curves": True, **settings}))


@pytest.fixture(scope="module")
def made():
    return document(study())


@pytest.fixture(scope="module")
def figures(made):
    return {figure.id: figure for figure in made.figures}


def test_every_figure_is_valid_vega_lite(figures):
    assert {"ranking", "effects", "interactions", "parallel", "curves", "gap", "pareto", "scaling"} <= set(figures)
    for figure in figures.values():
        for panel in figure.panels:
            panel.chart.to_dict()  # checked against the schema


def test_a_rule_has_no_symbols(figures):
    """Vega-Lite draws one at the beginning of a rule that inherits a shape."""
    for figure in figures.values():
        for panel in figure.panels:
            for layer in panel.chart.to_dict().get("layer", []):
                assert "rule" not in str(layer.get("mark")) or "shape" not in layer.get("encoding", {}), figure.id


def titles(spec) -> list:
    """Of all axes that show one."""
    if isinstance(spec, list):
        return [title for one in spec for title in titles(one)]
    if not isinstance(spec, dict):
        return []
    found = [spec["encoding"][channel] for channel in ("x", "y") if channel in spec.get("encoding", {})]
    here = [one for one in found if one.get("type") == "quantitative" and one.get("axis", {}) is not None]
    return [one.get("title") for one in here if "title" in one] + titles(
        [v for k, v in spec.items() if k != "encoding"]
    )


def test_every_axis_of_numbers_has_a_unit(figures):
    units = (
        "nats per token",
        "updates",
        "parameters",
        "FLOP",
        "seconds",
        "tokens",
        "%",
        "deviations",
        "characters",
    )
    for name, figure in figures.items():
        shown = titles(figure.for_page())
        assert shown or name == "parallel", name
        for title in shown:
            assert any(unit in title for unit in units), f"{name}: {title}"


def test_the_effects_plot_says_what_is_clear(figures):
    figure = figures["effects"]
    assert "n_embd 128 → 256: −0.2" in figure.alternative
    assert "n_head 4 → 8" not in figure.alternative


def test_the_entropy_floor_is_drawn_where_it_is_known():
    analysis = study()
    facts = CorpusFacts("playhouse", "0" * 64, "playhouse", "char", 1000, 1.2345)
    known = replace(analysis.results, corpora={facts.sha256: facts})
    data = data_of(known, ["n_embd"])
    figure = loss_charts.curves_figure([facts], data.curves, data.batches, "n_embd")
    assert "1.2345" in figure.caption
    assert "entropy of playhouse" in json.dumps(figure.for_page())
    assert figure.parameters["floor"] is False
    without = loss_charts.curves_figure([], data.curves, data.batches, "n_embd")
    assert "entropy" not in json.dumps(without.for_page())


def test_panels_share_the_documents_tables(made, figures):
    for name in ("curves", "gap", "pareto"):
        size = len(json.dumps(figures[name].for_page()))
        assert size < 30_000, name
        whole = figures[name].for_print(made.data.tables)
        assert len(whole["datasets"]["experiments"]) == 16


def test_what_has_nothing_to_say_is_left_out():
    made = document(Analysis(synthetic(FACTORS, EFFECTS, seeds=(1, 2), noise=0.01)))
    there = {section.id for section in made.sections}
    assert {"answer", "ranking", "effects", "gap", "costs"} <= there
    assert not {"curves", "samples", "writing", "parts"} & there
    assert all(section.blocks for section in made.sections)


def test_half_normal_only_with_contrasts():
    one_each = Analysis(synthetic({**FACTORS, "batch_size": [8, 16]}, EFFECTS, seeds=None, noise=0.005))
    figure = factor_charts.half_normal_figure(one_each.effects)
    assert figure is not None
    assert "n_embd" in figure.alternative
    unbalanced = Analysis(synthetic(FACTORS, EFFECTS, seeds=(1, 2), noise=0.01, waiting=[1, 2, 3]))
    assert factor_charts.half_normal_figure(unbalanced.effects) is None


def test_curves_are_thinned_and_it_is_said():
    results = synthetic({"n_embd": [128, 256]}, {"n_embd": -0.2}, curves=True)
    names = [f"run{i}" for i in range(400)]
    table = results.experiments.iloc[[0] * 400].set_axis(pd.Index(names, name="name"))
    table["val_loss"] = np.linspace(2, 3, 400)
    curve = pd.concat([results.evaluations[results.evaluations["name"] == results.experiments.index[0]]] * 20)
    curves = pd.concat([curve.assign(name=name, step=np.arange(len(curve)) * 10) for name in names], ignore_index=True)
    data = data_of(replace(results, experiments=table, evaluations=curves), ["n_embd"])
    shown = {row["i"] for row in data.curves}
    assert len(shown) == MOST_CURVES
    assert set(range(MOST_CURVES // 4)) <= shown
    assert 399 in shown
    assert len(data.curves) <= MOST_CURVES * max(FEWEST_POINTS, MOST_POINTS // MOST_CURVES)
    assert len(data.left_out) == 2
    lowest = min(row["val_loss"] for row in data.curves if row["i"] == 0)
    assert lowest == pytest.approx(curve["val_loss"].min(), abs=1e-5)


def test_a_spread_keeps_the_first_and_the_last():
    ranked = [str(i) for i in range(1000)]
    chosen = spread(ranked, 100)
    assert len(chosen) == len(set(chosen)) == 100
    assert chosen[:25] == ranked[:25]
    assert chosen[-1] == "999"
    assert spread(ranked[:5], 100) == ranked[:5]


def test_of_many_changes_in_several_sources_the_largest_are_drawn():
    changes = [("dropout", 0.0, level / 100, source, level / 100) for level in range(1, 21) for source in ("a", "b")]
    table = pd.DataFrame(changes, columns=["factor", "reference", "level", "source", "effect"])
    table = table.assign(low=table["effect"] - 0.01, high=table["effect"] + 0.01)
    figure = factor_charts.sources_figure(Sources(table, pd.DataFrame(), pd.DataFrame(), {}))
    assert figure.alternative == "Dots with intervals: 16 changes of a setting in 2 sources."
    assert "The 4 smallest are in the table only." in figure.caption
    assert (
        len({row["what"] for rows in figure.panels[0].spec["datasets"].values() for row in rows if "what" in row}) == 16
    )


def test_colours_begin_with_what_matters():
    results = study().results
    assert colourings(results, ["dropout", "n_embd"])[:3] == ["dropout", "n_embd", "n_head"]


def luminance(colour: str) -> float:
    parts = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def contrast(a: str, b: str) -> float:
    """WCAG 2.1, relative luminance and contrast ratio."""
    high, low = sorted((luminance(a), luminance(b)), reverse=True)
    return (high + 0.05) / (low + 0.05)


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_words_and_marks_stand_out_of_the_ground(scheme):
    config = look(scheme, "sans-serif")
    ground = config["background"]
    assert contrast(config["axis"]["labelColor"], ground) > 7
    assert contrast(config["title"]["subtitleColor"], ground) > 4.5
    assert min(contrast(colour, ground) for colour in config["range"]["category"][:4]) > 2.3
    assert contrast(BLUE, ground) > 3
    assert contrast(GREY, ground) > 3


def test_a_study_without_noise_has_axes_of_finite_numbers():
    """Four experiments of a 2 x 2 grid, one each: means without intervals."""
    made = document(Analysis(synthetic({"n_embd": [64, 128], "dropout": [0.0, 0.2]}, {"n_embd": -0.2})))
    for figure in made.figures:
        for panel in figure.panels:
            assert json.dumps(panel.chart.to_dict(), allow_nan=False)
    assert "interactions" in {figure.id for figure in made.figures}


# --- axes, and figures that fail


def domains(spec):
    """The explicit ends of every axis in a specification."""
    if isinstance(spec, dict):
        domain = spec.get("domain")
        if isinstance(domain, list) and len(domain) == 2 and all(isinstance(end, (int, float)) for end in domain):
            yield tuple(domain)
        for value in spec.values():
            yield from domains(value)
    elif isinstance(spec, list):
        for value in spec:
            yield from domains(value)


@pytest.mark.parametrize("rounding", [0.0, 4.5e-16])
def test_equal_means_make_no_axis_of_the_width_of_rounding(rounding):
    """A learning rate of 0: every training ends where it began, but for the last bit. Such an axis has endless ticks."""
    flat = synthetic(FACTORS, lambda s: 4.17, seeds=(1, 2), curves=True)
    losses = 4.17 + rounding * np.arange(len(flat.experiments))
    results = replace(flat, experiments=flat.experiments.assign(val_loss=losses, train_loss=losses))
    curves = results.evaluations.assign(val_loss=4.17, train_loss=4.17)
    curves.loc[curves.index[-1], "val_loss"] += rounding
    results = replace(results, evaluations=curves)
    made = document(Analysis(results))
    assert len(made.figures) > 5
    for figure in made.figures:
        spec = figure.for_print(made.data.tables)
        for low, high in domains(spec):
            assert high - low > 1e-6 * max(abs(low), abs(high)), (figure.id, low, high)


@pytest.mark.parametrize("rounding", [0.0, 4.5e-16])
def test_neither_does_a_search_of_equal_losses(rounding):
    flat = search(20, lambda s: 4.17, noise=0.0)
    table = flat.experiments.assign(val_loss=4.17 + rounding * np.arange(20))
    results = replace(flat, experiments=table)
    none = Forest(pd.DataFrame(), pd.DataFrame(), math.nan, 20)
    figure = number_charts.curves_figure(results, Analysis(results).shapes, none)
    found = list(domains(figure.for_print({})))
    assert found
    for low, high in found:
        assert high - low > 1e-6 * high


class Unprintable(figure_module.Figure):
    def for_print(self, tables):
        return {"mark": "nonsense"}


def test_a_figure_that_fails_takes_away_itself_alone():
    ranking = ranking_figure(
        Analysis(synthetic(FACTORS, EFFECTS)).results, Analysis(synthetic(FACTORS, EFFECTS)).ranking
    )
    broken = Unprintable(**{**vars(ranking), "id": "broken"})
    drawn = draw([broken, ranking], {})
    assert set(drawn.pictures) == {"ranking"}
    assert set(drawn.problems) == {"broken"}


def test_the_drawing_executes_no_file_of_the_current_folder_and_ends(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("json", "base64", "vl_convert"):
        (tmp_path / f"{name}.py").write_text(f"open({str(tmp_path / 'executed')!r}, 'w')\n")
    monkeypatch.setattr(figure_module, "DRAW", "import base64, json; print(json.dumps({}))")
    assert figure_module._answer({}, 60) == {}
    assert not (tmp_path / "executed").exists()
    monkeypatch.setattr(figure_module, "DRAW", "import time; time.sleep(600)")
    with pytest.raises(figure_module.DrawingFailed, match=r"took longer than 0.2 s"):
        figure_module._answer({}, 0.2)


def test_a_figure_that_ends_the_process_takes_away_itself_alone(monkeypatch):
    analysis = Analysis(synthetic(FACTORS, EFFECTS))
    ranking = ranking_figure(analysis.results, analysis.ranking)
    deadly = 'if "deadly" in request["figures"]: import os; os.abort()\n'
    at = figure_module.DRAW.index("version, pictures")
    monkeypatch.setattr(figure_module, "DRAW", figure_module.DRAW[:at] + deadly + figure_module.DRAW[at:])
    drawn = draw([replace(ranking, id="deadly"), ranking], {})
    assert set(drawn.pictures) == {"ranking"}
    assert "ended with" in drawn.problems["deadly"]
