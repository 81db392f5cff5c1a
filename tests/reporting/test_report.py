"""The report of one run, on folders of every kind, and its figure."""

import html
import json
import math
import re
import struct
import zlib

import numpy as np
import pytest
from conftest import cpu, jobs_of, record_again, small
from markdown_it import MarkdownIt
from synthetic import evaluations, log

from nanostudy.errors import NanostudyError
from nanostudy.reporting import write
from nanostudy.reporting.charts import figure as figure_module
from nanostudy.reporting.charts import training as figures
from nanostudy.reporting.charts.figure import Drawn, draw, look
from nanostudy.reporting.write import publish_run
from nanostudy.result import finite
from nanostudy.text import duration, plain
from nanostudy.training.recorder import Recorder
from nanostudy.training.run_folder import EVALUATION_COLUMNS, TRAINING_COLUMNS, read_rows
from nanostudy.training.train import train


@pytest.mark.parametrize(
    ("seconds", "words"),
    [(2.54, "2.5 s"), (59.96, "1 min 00 s"), (754, "12 min 34 s"), (3599.6, "1 h 00 min"), (11100, "3 h 05 min")],
)
def test_durations(seconds, words):
    assert duration(seconds) == words


@pytest.mark.parametrize(
    "text", ["run `a b_c <i>` <b> *x* [y](z) _d_", "a`b <i> `c <b>`", "``<i>`` <b>", "`a``<i>`", "\\`<i>` `"]
)
def test_in_markdown_a_sentence_shows_its_commands_as_code_and_all_else_as_it_is(text):
    rendered = MarkdownIt("commonmark").render(plain(text))
    assert re.sub(r"</?(p|code)>|`", "", rendered).strip() == html.escape(text).replace("`", "").strip()
    assert ("<code>a b_c" in rendered) == text.startswith("run")


# --- reports


@pytest.fixture(scope="module")
def finished(corpus, tmp_path_factory):
    """A run folder as a training leaves it."""
    folder, machine, e = tmp_path_factory.mktemp("run"), cpu(), small(max_iters=60, eval_interval=10)
    recorder = Recorder(folder, e, "0123456789abcdef", corpus, machine)
    recorder.claim({})
    for event in train(jobs_of(e), corpus, machine, folder / "checkpoint.safetensors"):
        recorder.record(event)
    return folder


@pytest.fixture
def folder(finished, tmp_path):
    """A copy that a test may change: `change` sets entries of run.json, `table` replaces a table."""
    for name in ("run.json", "training.csv", "evaluations.csv"):
        (tmp_path / name).write_bytes((finished / name).read_bytes())
    return tmp_path


@pytest.fixture
def words(folder, monkeypatch):
    """The same, for tests of the report's words alone: the figure is built, and its picture left out."""
    pictures = lambda figures, tables: Drawn({figure.id: (b"a picture", "<svg/>") for figure in figures}, "", {})  # noqa: E731
    monkeypatch.setattr(write, "draw", pictures)
    return folder


def change(folder, drop=(), **entries):
    metadata = json.loads((folder / "run.json").read_text())
    metadata = {key: value for key, value in {**metadata, **entries}.items() if key not in drop}
    record_again(folder, metadata)


def table(folder, name, columns, rows):
    """The table, and what run.json records of it."""
    lines = [",".join(columns), *(",".join(str(row[column]) for column in columns) for row in rows)]
    (folder / name).write_text("\n".join(lines) + "\n")
    metadata = json.loads((folder / "run.json").read_text())
    there = [{key: finite(value) for key, value in row.items()} for row in read_rows(folder / "evaluations.csv")]
    best = min((row for row in there if row["val_loss"] is not None), key=lambda row: row["val_loss"], default=None)
    recorded = {"initial": there[0] if there else None, "final": there[-1] if there else None, "best": best}
    if metadata["status"] == "diverged":
        recorded["final"] = None
    change(folder, **(recorded if metadata["status"] != "unfinished" else {}))


def report_of(folder) -> str:
    written = publish_run(folder)
    assert written.page == folder / "report" / "index.html"
    assert all(path.is_file() for path in (written.page, *written.beside))
    return (folder / "report.md").read_text(encoding="utf-8")


def cells(report) -> dict[str, str]:
    """First cell to second, of every table."""
    return dict(re.findall(r"^\| ([^|]+) \| ([^|]+) \|", report, re.M))


def test_a_finished_run(words):
    report, run = report_of(words), json.loads((words / "run.json").read_text())
    sections = [
        "Observations",
        "Curves",
        "Metrics",
        "Evaluations",
        "Model",
        "Corpus",
        "Settings",
        "Environment",
        "Hardware",
    ]
    assert re.findall("^## (.+)$", report, re.M) == [*sections, "Method and caveats", "How to reproduce it"]
    page = (words / "report" / "index.html").read_text(encoding="utf-8")
    assert re.findall("<h2[^>]*>(.+)</h2>", page) == re.findall("^## (.+)$", report, re.M)
    first, final, best = run["initial"], run["final"], run["best"]
    assert f"The validation loss went from {first['val_loss']:.4f} to {final['val_loss']:.4f}" in report
    found = cells(report)
    assert f"validation {final['val_loss']:.4f}, training {final['train_loss']:.4f}" in found["final losses, update 60"]
    assert f"validation {best['val_loss']:.4f}" in found[f"best losses, update {best['step']}"]
    assert found["updates"] == "60 of 60"
    assert (found["tokens"], found["epochs"]) == ("1,920", "1.42")  # 60 updates of 4 x 8; 1,350 in the split
    assert found["text"].startswith("small.txt")
    assert found["SHA-256"] == run["corpus"]["sha256"]
    assert found["lr_decay_iters"] == "none: 60 (max_iters)"
    assert found["min_lr"] == "none: 0.0001 (learning_rate / 10)"
    assert found["parameters, all"] == f"{run['parameters']['total']:,}"
    vocabulary = len(run["corpus"]["tokenizer"]["characters"])
    assert f"costs ln {vocabulary} = {math.log(vocabulary):.4f} nats" in report
    assert len(re.findall(r"^\| \d+( \(best\))? \| [\d,]+ \| ", report, re.M)) == 7
    assert "](curve.png)" in report


def test_a_report_is_the_same_when_written_again(folder):
    first = report_of(folder), (folder / "curve.png").read_bytes()
    assert (report_of(folder), (folder / "curve.png").read_bytes()) == first
    assert sorted(path.name for path in folder.iterdir()) == [
        "curve.png", "curve.svg", "evaluations.csv", "report", "report.md", "run.json", "training.csv",
    ]  # fmt: skip
    assert sorted(path.name for path in (folder / "report").iterdir()) == ["index.html", "results.csv"]


def test_diverged_at_once(folder):
    """No evaluation, one row of the log, and nothing in it that can be drawn."""
    nothing = {"initial": None, "final": None, "best": None, "context_losses": {}, "updates": 0, "skipped_updates": 1}
    change(folder, **nothing, tokens=32, seconds=0.1, status="diverged", diverged="the loss was not finite")
    table(folder, "evaluations.csv", EVALUATION_COLUMNS, [])
    table(folder, "training.csv", TRAINING_COLUMNS, [{**log(math.nan)[0], "step": 1, "loss": math.nan}])
    report = report_of(folder)
    assert report.split("\n\n")[1].startswith("> The training diverged: the loss was not finite.")
    assert "It was never evaluated." in report
    assert "## Curves" not in report
    assert "No finite gradient norm was logged." in report
    assert not (folder / "curve.png").exists()
    assert "curve.png" not in report


def test_diverged_later(folder):
    state = {"status": "diverged", "diverged": "the loss was not finite", "updates": 24, "skipped_updates": 6}
    change(folder, **state, tokens=960, seconds=1.0, context_losses={})
    table(folder, "evaluations.csv", EVALUATION_COLUMNS, evaluations(4.0, 3.0, 3.5, interval=10))
    rising = [{**row, "loss": loss} for row, loss in zip(log(1, 1, 9e9), (3.4, 5e8, math.inf), strict=True)]
    table(folder, "training.csv", TRAINING_COLUMNS, rising)
    report = report_of(folder)
    assert "for 30 updates (6 skipped) in 1.0 s: 960 tokens" in report
    assert cells(report)["updates skipped, their gradient not being finite"] == "6"
    assert "last losses, update 20" in report
    assert "final losses" not in report
    assert (folder / "curve.png").exists()


def test_an_evaluation_that_is_not_finite_is_left_out_and_said(words):
    table(words, "evaluations.csv", EVALUATION_COLUMNS, evaluations(4.0, 3.0, math.inf, math.nan))
    report = report_of(words)
    assert "went from 4.0000 to 3.0000 nats" in report
    assert "Left out, their loss not being finite: 2." in report


# what run.json has of a training that has ended
AT_THE_END = (
    "updates",
    "skipped_updates",
    "tokens",
    "seconds",
    "initial",
    "final",
    "best",
    "context_losses",
    "diverged",
)


def test_one_evaluation_of_an_unfinished_run(folder):
    change(folder, drop=AT_THE_END, status="unfinished")
    table(folder, "evaluations.csv", EVALUATION_COLUMNS, evaluations(4.0))
    table(folder, "training.csv", TRAINING_COLUMNS, [])
    report = report_of(folder)
    assert "> The training has not finished: 0 of 60 updates." in report
    assert "The only evaluation, at update 0, measured validation 4.0000, training 4.0000 nats per token" in report
    assert "One evaluation is no curve" in report
    assert "speed" not in report
    assert (folder / "curve.png").exists()


def test_nothing_but_metadata(words):
    change(words, drop=AT_THE_END, status="unfinished")
    (words / "evaluations.csv").unlink()
    (words / "training.csv").unlink()
    assert "It was never evaluated." in report_of(words)


def test_entropy_of_a_byte_tokenizer_is_told_per_character(words):
    """A character of two tokens: 1.5 nats per character are 0.75 a token."""
    corpus = json.loads((words / "run.json").read_text())["corpus"]
    corpus["tokenizer"] = {"kind": "byte", "characters": ""}
    corpus["val"] = {"tokens": 200, "characters": 100, "entropy_nats_per_character": 1.5}
    change(words, corpus=corpus, context_losses={"8": 0.9})
    table(words, "evaluations.csv", EVALUATION_COLUMNS, evaluations(4.0, 1.0, 0.8))
    report = report_of(words)
    assert "is 0.1000 nats per character above the entropy of the validation text, 1.5000." in report
    assert "ln 256 = 5.5452" in report
    assert "| 8 | 0.9000 | 2.5969 |" in report  # 0.9 nats per token are 1.8 a character, and 1.8 / ln 2 bits
    assert "| tokenizer | byte: 256 different tokens |" in report


def test_a_note_on_the_text_comes_first(words):
    corpus = json.loads((words / "run.json").read_text())["corpus"]
    change(words, corpus={**corpus, "requested": "auto", "note": "Another *text*\nstands in: <b>look</b>."})
    report = report_of(words)
    tokens = MarkdownIt().parse(report)
    assert [token.type for token in tokens[:7]] == [
        "heading_open", "inline", "heading_close", "blockquote_open", "paragraph_open", "inline", "paragraph_close",
    ]  # fmt: skip
    assert {child.type for child in tokens[5].children} <= {"text", "text_special"}
    assert "".join(c.content for c in tokens[5].children) == "About the text: Another *text* stands in: <b>look</b>."
    assert "requested: auto" in report


HOSTILE = (
    "KING:\n```\n# not a heading\n~~~\n````` five\n<script>alert(1)</script>\n"
    "</details> | a | b |\n\x1b[31mred\x00\r\n```"
)


def test_a_sample_cannot_leave_its_block(words):
    (words / "sample.txt").write_bytes(HOSTILE.encode() + b"\xff\n")
    tokens = MarkdownIt().enable("table").parse(report_of(words))
    headings = [tokens[i + 1].content for i, token in enumerate(tokens) if token.type == "heading_open"]
    assert "Samples" in headings
    fence = tokens[[token.content for token in tokens].index("Samples") + 5]
    assert fence.type == "fence"
    shown = HOSTILE.replace("\x1b", "\ufffd").replace("\x00", "\ufffd").replace("\r\n", "\n")
    assert fence.content == shown + "\ufffd\n"
    assert not any(token.type.startswith("html") for token in tokens)


def test_names_and_settings_cannot_break_a_table(words):
    metadata = json.loads((words / "run.json").read_text())
    name = "a|b `c` <i>__d__</i> [x](y).txt"
    corpus = {**metadata["corpus"], "name": name, "requested": name}
    change(words, corpus=corpus, settings={**metadata["settings"], "corpus": name})
    tokens = MarkdownIt().enable("table").parse(report_of(words))
    shown = ["".join(child.content for child in token.children) for token in tokens if token.type == "inline"]
    assert shown.count(name.replace("`", "")) == 3  # corpus, setting, checksum; `c` is code
    assert not any(child.type == "html_inline" for token in tokens for child in token.children or ())


def test_a_long_table_is_shortened_and_says_so(words):
    losses = [4.0 - 0.01 * i for i in range(150)] + [3.0] * 50
    table(words, "evaluations.csv", EVALUATION_COLUMNS, evaluations(*losses, interval=1))
    report = report_of(words)
    assert "These are 42 of 200; evaluations.csv has all." in report  # every fifth, the best and the last
    assert "| 149 (best) |" in report


def test_a_folder_without_a_run(tmp_path):
    with pytest.raises(NanostudyError, match=r"run\.json"):
        publish_run(tmp_path)
    assert not list(tmp_path.iterdir())


# --- the picture


def decode(picture: bytes) -> np.ndarray:
    """Pixels (height, width, 4) of an 8-bit RGBA PNG (RFC 2083)."""
    assert picture[:8] == b"\x89PNG\r\n\x1a\n"
    width, height, *kind = struct.unpack(">IIBBBBB", picture[16:29])
    assert kind == [8, 6, 0, 0, 0]
    data, place = b"", 8
    while place < len(picture):
        size, name = struct.unpack(">I4s", picture[place : place + 8])
        data += picture[place + 8 : place + 8 + size] if name == b"IDAT" else b""
        place += size + 12
    lines, image, above = zlib.decompress(data), b"", bytes(4 * width)
    for start in range(0, height * (4 * width + 1), 4 * width + 1):
        method, line = lines[start], bytearray(lines[start + 1 : start + 1 + 4 * width])
        for i in range(len(line)):
            left, up, corner = (line[i - 4], above[i], above[i - 4]) if i >= 4 else (0, above[i], 0)
            paeth = min((left, up, corner), key=lambda near: abs(left + up - corner - near)) if method == 4 else 0
            line[i] = (line[i] + (0, left, up, (left + up) // 2, paeth)[method]) % 256
        image, above = image + line, line
    return np.frombuffer(image, np.uint8).reshape(height, width, 4).astype(int)


def share_of(pixels: np.ndarray, colour: str) -> float:
    """Of the pixels, those of this colour, or of at least a quarter of it mixed with white, as the edges of lines are."""
    ink, full = 255 - pixels[..., :3], 255 - np.array([*bytes.fromhex(colour[1:])])
    part = ink @ full / (full @ full)
    return float(((part > 0.25) & (np.abs(ink - part[..., None] * full).max(-1) < 6)).mean())


def test_the_picture_shows_every_line(monkeypatch):
    monkeypatch.setattr(figure_module, "PRINT_SCALE", 0.5)
    rows = evaluations(4.0, 3.0, 2.5, 2.4, train_losses=[4.0, 2.8, 2.2, 1.9])
    training = [{**row, "loss": 3.9 - 0.05 * i} for i, row in enumerate(log(*[1.0, 2.0] * 15))]
    figure = figures.training_figure(rows, training, "of a test", entropy=1.1, grad_clip=1.5)
    pixels = decode(draw([figure], {}).pictures["curve"][0])
    assert 425 < pixels.shape[1] < 475
    assert 325 < pixels.shape[0] < 475
    assert len(np.unique(pixels.reshape(-1, 4), axis=0)) > 100
    for colour in (*(colour for _, colour, *_ in figures.LINES.values()), look("light", "")["axis"]["labelColor"]):
        assert share_of(pixels, colour) > 0.0005, colour


def words_of(figure) -> str:
    return json.dumps(figure.for_print({}))


def test_the_picture_says_what_it_shows():
    rows = evaluations(4.0, 3.0, 2.5, 2.6, train_losses=[4.0, 2.8, 2.2, 1.9])
    words = words_of(figures.training_figure(rows, log(1.0, 2.0), "of a test", entropy=1.1, grad_clip=0.5))
    for expected in (
        "of a test", "updates", "loss, nats per token", "lowest: 2.5000 at update 200", "loss gap, nats per token",
        "entropy of the validation text: 1.1000", "dashed: clipped to 0.5",
    ):  # fmt: skip
        assert expected in words
    assert words.count('"type": "point"') == 3  # two of losses and the ring
    plain = words_of(figures.training_figure(rows, []))
    assert "entropy of" not in plain
    assert "gradient" not in plain


@pytest.mark.parametrize(("clip", "drawn"), [(0.5, True), (3.0, True), (0.0, False), (1e9, False), (1e-9, False)])
def test_the_bound_of_the_gradient_is_drawn_where_it_leaves_the_norms_readable(clip, drawn):
    panel = figures.training_figure([], log(1.0, 2.0), grad_clip=clip).for_print({})["concat"][-1]
    low, high = panel["layer"][-1]["encoding"]["y"]["scale"]["domain"]
    assert len(panel["layer"]) == 1 + drawn
    assert low < 1.0
    assert high > 2.0
    assert low < clip < high or not drawn
    assert high / low < 30


def test_a_long_log_is_drawn_as_means_and_says_so():
    training = log(*[1.0] * (figures.MOST_POINTS * 2 + 1))
    words = words_of(figures.training_figure([], training))
    assert "training batches, means of 3 rows" in words
    assert words.count('"what": "training batches') == math.ceil(len(training) / 3)


def test_nothing_to_draw():
    assert figures.training_figure(evaluations(math.nan, math.inf), [{**log(1.0)[0], "loss": math.inf}]) is None


@pytest.mark.parametrize(
    ("low", "high", "ticks"),
    [
        (1.7, 4.3, [2, 2.5, 3, 3.5, 4]),
        (0.55, 4.3, [0.6, 0.8, 1, 1.5, 2, 2.5, 3, 4]),
        (1.48, 1.53, [1.48, 1.49, 1.5, 1.51, 1.52, 1.53]),
        (0.004, 5.0, [0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5]),
    ],
)
def test_ticks_are_round(low, high, ticks):
    found = figures.log_ticks(low, high, most=10)
    assert found == pytest.approx(ticks)
