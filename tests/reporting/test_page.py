"""The page as a file: what it holds, what it escapes, what is written beside it; and the commands that write it."""

import csv
import hashlib
import io
import json
import math
import re
from base64 import b64decode
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import pandas as pd
import pytest
from hostile import HOSTILE, hostile
from markdown_it import MarkdownIt
from scipy import stats
from synthetic import synthetic
from typer.testing import CliRunner

import nanostudy
from nanostudy.analysis.analysis import Analysis
from nanostudy.analysis.frames import Results, experiments_frame
from nanostudy.atomic import write_atomically
from nanostudy.cli.main import app
from nanostudy.errors import NanostudyError
from nanostudy.reporting import write as publishing
from nanostudy.reporting.charts.experiments import ranking_figure
from nanostudy.reporting.charts.figure import DrawingFailed
from nanostudy.reporting.sections import SECTIONS
from nanostudy.reporting.write import publish

FACTORS = {"n_embd": [128, 256], "n_head": [4, 8], "dropout": [0.1, 0.2]}


class Reader(HTMLParser):
    """Tags, their attributes, and the text of scripts."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags, self.scripts, self.inside = [], [], False
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        self.inside = tag == "script"
        if self.inside:
            self.scripts.append("")

    def handle_endtag(self, tag):
        self.inside = False

    def handle_data(self, data):
        if self.inside:
            self.scripts[-1] += data


@pytest.fixture(scope="module")
def text(written) -> str:
    return written.page.read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def page(text) -> Reader:
    return Reader(text)


def test_nothing_is_loaded_from_anywhere(page):
    for tag, attributes in page.tags:
        assert tag not in ("iframe", "object", "embed", "img", "base"), tag
        assert "src" not in attributes, tag
        if tag == "link":
            assert attributes["href"] == "data:,"
        if tag == "a":
            assert attributes["href"].startswith("#")


def test_the_policy_allows_these_scripts_alone(page):
    (policy,) = [a["content"] for tag, a in page.tags if a.get("http-equiv") == "Content-Security-Policy"]
    rules = dict(rule.strip().split(" ", 1) for rule in policy.split(";"))
    assert rules["default-src"] == "'none'"
    assert "unsafe" not in rules["script-src"]
    assert "connect-src" not in rules
    allowed = {b64decode(found) for found in re.findall(r"'sha256-([^']+)'", rules["script-src"])}
    data, *scripts = page.scripts
    assert {hashlib.sha256(script.encode()).digest() for script in scripts} == allowed
    assert len(scripts) == 2
    assert json.loads(data)["tables"]["experiments"]["rows"]


def test_names_reasons_and_samples_are_escaped(page, text):
    assert len(page.scripts) == 3  # data, Vega, the page's own: nothing began another
    assert "<img src=x" not in text
    data = json.loads(page.scripts[0])["tables"]
    assert any(HOSTILE in sample[data["samples"]["columns"].index("text")] for sample in data["samples"]["rows"])
    assert not any(name.startswith("on") for tag, attributes in page.tags for name in attributes)


def test_sections_come_in_reading_order(page):
    order = [a["id"] for tag, a in page.tags if tag == "section"]
    expected = ["answer", "experiments", "ranking", "effects", "interactions", "parallel", "curves", "gap", "costs"]
    assert order[:9] == expected
    assert order == [name for name in SECTIONS if name in order]
    identities = [a["id"] for tag, a in page.tags if "id" in a]
    assert len(identities) == len(set(identities))
    linked = {a["href"][1:] for tag, a in page.tags if tag == "a"}
    assert linked == {*order, "main"}


def test_every_figure_has_its_words_and_every_control_a_label(page):
    figures = [a for tag, a in page.tags if a.get("role") == "img"]
    assert len(figures) >= 9
    assert all(re.search(r"\d", a["aria-label"]) for a in figures)


def test_what_lies_beside_it(written):
    names = {path.name for path in written.folder.iterdir()}
    assert all(png.read_bytes().startswith(b"\x89PNG") for png in written.folder.glob("*.png"))
    assert all(svg.read_text(encoding="utf-8").startswith("<svg") for svg in written.folder.glob("*.svg"))
    assert "n_embd 128 → 256" in (written.folder / "effects.svg").read_text(encoding="utf-8")
    assert {"index.html", "report.md", "results.csv", "effects.png", "effects.svg", "curves.png"} <= names
    rows = list(csv.DictReader(io.StringIO((written.folder / "results.csv").read_text(encoding="utf-8"))))
    assert len(rows) == 16
    assert HOSTILE in rows[0]["name"]
    assert float(rows[4]["val_loss"]) == pytest.approx(hostile().experiments["val_loss"].iloc[4])
    assert {"n_embd", "seed", "flops", "status", "reason"} <= set(rows[0])
    assert not (written.folder / ".writable").exists()


def test_the_markdown_says_the_same(written):
    text = (written.folder / "report.md").read_text(encoding="utf-8")
    tokens = MarkdownIt("commonmark").parse(text)
    assert not any(token.type in ("html_block", "html_inline") for t in tokens for token in [t, *(t.children or [])])
    pictures = [t.attrs["src"] for token in tokens for t in (token.children or []) if t.type == "image"]
    assert "effects.png" in pictures
    assert all((written.folder / name).exists() for name in pictures)
    headings = [tokens[i + 1].content for i, t in enumerate(tokens) if t.type == "heading_open" and t.tag == "h2"]
    assert headings[0] == "The answer"
    page = (written.folder / "index.html").read_text(encoding="utf-8")
    assert headings == re.findall(r'<h2 id="[^"]*-title">([^<]*)</h2>', page)


@pytest.mark.parametrize(
    ("results", "said"),
    [
        (Results("none", experiments_frame([])), "No experiment is here yet."),
        (synthetic({"n_embd": [128]}, curves=True), "One GPT was trained, to a validation loss of 2.0000"),
        (synthetic(FACTORS, diverged=range(1, 9), curves=True), "none has finished"),
        (synthetic(FACTORS, waiting=range(1, 9)), "none has finished"),
    ],
    ids=["empty", "one", "diverged", "waiting"],
)
def test_little_or_nothing_still_makes_a_page(tmp_path, results, said, undrawn):
    written = publish(Analysis(results), tmp_path / "report")
    text, made = written.page.read_text(encoding="utf-8"), written.document
    assert said in text
    assert made.lede.startswith("8 experiments with" if "none" in said else said)
    diverged = (results.experiments["status"] == "diverged").any()
    assert list(made.answer.values()) == (["All 8 trainings diverged."] if diverged else [])
    assert not {"ranking", "effects", "gap", "fair"} & {section.id for section in made.sections}
    assert "nan " not in text.lower()
    assert ">None<" not in text


def test_one_choice_of_settings_is_compared_with_nothing(tmp_path, undrawn):
    analysis = Analysis(synthetic({"n_layer": [2]}, {}, seeds=(1, 2, 3), noise=0.01, curves=True))
    text = (publish(analysis, tmp_path / "report").folder / "report.md").read_text(encoding="utf-8")
    [ranking] = re.findall(r"^## Ranking\n(.*?)^## ", text, re.MULTILINE | re.DOTALL)
    assert "Fair comparisons" not in text
    assert "The standard deviation over seeds is about 0.0" in ranking
    assert "The interval of the mean rests on what differs between experiments of other seeds (n = 3;" in ranking
    best = analysis.ranking.iloc[0]
    half = stats.t.ppf(0.975, 2) * analysis.ranking["value"].std() / math.sqrt(3)
    assert [best["low"], best["high"]] == pytest.approx([best["mean"] - half, best["mean"] + half], abs=1e-9)
    caption = ranking_figure(analysis.results, analysis.ranking).caption
    assert caption == "The one choice of settings by validation loss, with 95% intervals. Ticks are the seeds."
    for comparison in ("cell", "tied", "indistinguishable", "generalisation"):
        assert comparison not in ranking


def test_without_pictures_the_page_says_why(tmp_path, monkeypatch):
    def fails(figures, tables):
        raise DrawingFailed("no memory")

    monkeypatch.setattr(publishing, "draw", fails)
    written = publish(Analysis(synthetic(FACTORS, {"n_embd": -0.1})), tmp_path / "report")
    assert "Figures could not be drawn here: no memory." in written.page.read_text(encoding="utf-8")
    assert written.undrawn == "no memory"
    assert written.figures == 0


def test_a_folder_of_something_else_is_left_alone(tmp_path):
    (tmp_path / "thesis.tex").write_text("years of work")
    with pytest.raises(NanostudyError, match="--out"):
        publish(Analysis(synthetic({"n_embd": [128]})), tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]
    (tmp_path / "index.html").write_text("<title>my own page</title>")
    with pytest.raises(NanostudyError, match="other files"):
        publish(Analysis(synthetic({"n_embd": [128]})), tmp_path)


def test_a_folder_that_cannot_be_written_is_reported(tmp_path, undrawn, monkeypatch):
    file = tmp_path / "file"
    file.write_text("")
    with pytest.raises(NanostudyError, match="--out"):
        publish(Analysis(synthetic({"n_embd": [128]})), file / "report")

    def refused(self, **_):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "mkdir", refused)
    with pytest.raises(NanostudyError, match=r"(?s)Permission denied.*--out"):
        publish(Analysis(synthetic({"n_embd": [128]})), tmp_path / "other")


def test_a_page_is_written_over(tmp_path, undrawn):
    for title in ("first", "second"):
        publish(Analysis(replace(synthetic({"n_embd": [128]}), title=title)), tmp_path / "report")
    assert "<h1>second</h1>" in (tmp_path / "report" / "index.html").read_text(encoding="utf-8")


def test_two_thousand_experiments_stay_small(tmp_path, undrawn):
    factors = {"n_embd": [64, 128, 192, 256], "n_head": [1, 2, 4, 8], "dropout": [0.0, 0.1, 0.2, 0.3, 0.4]}
    seeds, late = range(1, 26), range(321, 2001)  # most still have no result: the analysis of all is not tested here
    results = synthetic(factors, lambda s: 2 - s["n_embd"] / 1000, seeds=seeds, noise=0.02, curves=True, diverged=late)
    samples = [(name, "", "a sample " * 300) for name in results.experiments.index]
    texts = pd.DataFrame(samples, columns=["name", "prompt", "text"])
    written = publish(
        Analysis(replace(results, training=results.training.iloc[:0], samples=texts)), tmp_path / "report"
    )
    text = written.page.read_text(encoding="utf-8")
    assert len(text) < 3_000_000
    assert "Curves are drawn for 256 of 2,000 experiments" in text
    assert "Samples of the best 128 of 2,000 experiments" in text


def test_the_command_says_what_it_found_and_where(tmp_path, monkeypatch, undrawn):
    table = tmp_path / "results.csv"
    rows = [
        f"b64_L4_H4_E{e}_BS8_MI1000_D{d}_s{s},{2.2 - e / 1000},{2.3 - e / 1000 + s / 500},{0.1 + s / 500},800000.0,x"
        for e in (128, 256)
        for d in (10, 20)
        for s in (1, 2)
    ]
    head = "Experiment,Train Loss,Val Loss,Loss Gap,Total Params,Config Path"
    write_atomically(table, "\n".join([head, *rows]) + "\n")
    monkeypatch.chdir(tmp_path)
    result = CliRunner().invoke(app, ["report", str(table)])
    assert result.exit_code == 0, result.output
    assert "n_embd matters most" in " ".join(result.output.split())
    assert "report/index.html" in result.output
    assert (tmp_path / "report" / "index.html").exists()
    assert nanostudy.report(table, out=tmp_path / "again") == tmp_path / "again" / "index.html"
