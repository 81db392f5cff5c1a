"""Every notebook runs from top to bottom, at a size that takes seconds, and so does the example script."""

from __future__ import annotations

import importlib.util
import json
import re
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import ModuleType

import nbformat
import pytest
from conftest import write_text
from jupyter_client.manager import KernelManager
from nbclient import NotebookClient
from nbformat import NotebookNode
from nbformat.v4 import new_code_cell, new_notebook

import nanostudy
from nanostudy import api, view, workspace
from nanostudy.training.events import Event, Logged
from nanostudy.view import FIRST_LINES, MOST_LINES, Cell

ROOT = Path(__file__).parents[2]
NOTEBOOKS = sorted(ROOT.glob("notebooks/*.ipynb"))
LARGEST = 16_000  # bytes of a notebook
TINY = {
    **{"corpus": "small.txt", "n_layer": 1, "n_head": 2, "n_embd": 16, "block_size": 32, "batch_size": 2},
    **{"max_iters": 40, "warmup_iters": 5, "eval_interval": 20, "sample_tokens": 20},
}
STUDY = """
description: two settings of two parts
settings: {corpus: CORPUS, n_layer: 1, n_head: 2, n_embd: 16, batch_size: 2, max_iters: 6, warmup_iters: 1, eval_interval: 3}
sample_tokens: 20
parts: {short: {block_size: 16}, long: {block_size: 32}}
grid: {dropout: [0.0, 0.1], learning_rate: [1.0e-3, 1.0e-2]}
"""


Run = Callable[..., NotebookNode]


class Stop(Exception):
    pass


def read(name: str) -> NotebookNode:
    return nbformat.read(ROOT / "notebooks" / f"{name}.ipynb", as_version=4)


def code(book: NotebookNode) -> list[NotebookNode]:
    return [cell for cell in book.cells if cell.cell_type == "code"]


def with_parameters(book: NotebookNode, values: Mapping[str, object]) -> NotebookNode:
    """The first code cell with these values; each must be a parameter that it has."""
    first = code(book)[0]
    for name in values:
        assert re.search(rf"\b{name}\b.* = ", first.source), f"{name} is no parameter"
    first.source += "\n" + "\n".join(f"{name} = {value!r}" for name, value in values.items())
    return book


@pytest.fixture(scope="module")
def run() -> Iterator[Run]:
    """Executes the notebook of a name in a folder, with parameters; raises where a cell does.

    All share a kernel, which imports torch once; what one defined is gone before the next.
    """
    kernel = KernelManager(kernel_name="python3")

    def execute(name: str, folder: Path, **values: object) -> NotebookNode:
        book = with_parameters(read(name), values)
        code(book)[0].source += f"\nimport os\nos.chdir({str(folder)!r})"
        fresh = new_notebook(cells=[new_code_cell("%reset -f")], metadata=book.metadata)
        for one in (fresh, book):
            NotebookClient(one, km=kernel, timeout=120).execute()
        return book

    yield execute
    kernel.shutdown_kernel(now=True)


def shown(cell: NotebookNode) -> str:
    """All that a cell shows, as text and as HTML."""
    texts = [
        output.get("text", "") + "".join(str(v) for v in output.get("data", {}).values()) for output in cell.outputs
    ]
    return "\n".join(texts)


def cell_with(book: NotebookNode, text: str) -> NotebookNode:
    (found,) = [cell for cell in code(book) if text in cell.source]
    return found


# --- as they are kept


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_is_whole_small_and_without_outputs(path: Path) -> None:
    book = nbformat.read(path, as_version=4)
    nbformat.validate(book)
    raw = json.loads(path.read_text(encoding="utf-8"))
    ids = [cell.get("id") for cell in raw["cells"]]
    assert len(set(ids)) == len(ids)
    assert None not in ids
    assert all(cell.outputs == [] and cell.execution_count is None for cell in code(book))
    assert book.metadata.kernelspec.name == "python3"
    assert path.stat().st_size < LARGEST
    assert code(book)[0].metadata.tags == ["parameters"]
    assert [cell for cell in code(book) if "%pip" in cell.source] == [code(book)[1]]


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_says_what_to_set_where_pip_finds_nothing(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = code(nbformat.read(path, as_version=4))[1].source
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ImportError, match=r"SOURCE = 'nowhere'\. Set SOURCE in the first cell"):
        exec(re.sub(r"%pip .*", "pass", source), {"SOURCE": "nowhere"})  # %pip does not raise, either


def test_there_are_three() -> None:
    assert [path.stem for path in NOTEBOOKS] == ["study", "train", "visualization"]


def test_training_has_its_seven_sections() -> None:
    headings = [
        line for cell in read("train").cells if cell.cell_type == "markdown" for line in cell.source.splitlines()
    ]
    assert [line[3:5] for line in headings if line.startswith("## ")] == [f"{i}." for i in range(1, 8)]


# --- executed


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory, run: Run) -> tuple[Path, NotebookNode]:
    """train.ipynb, in a folder in which another session had stopped half-way; without an answer from any network."""
    folder = tmp_path_factory.mktemp("train")
    settings = {**TINY, "corpus": str(write_text(folder / "small.txt", 20_000)), "log_interval": 1}
    experiment = nanostudy.preset("quickstart", **settings)

    def stop(event: Event) -> None:
        if isinstance(event, Logged) and event.step == 30:
            raise Stop

    with pytest.raises(Stop):
        nanostudy.train(experiment, folder / "nanostudy-work" / "tiny", save_every=0.0, listen=stop)
    return folder, run("train", folder, PRESET="quickstart", SETTINGS=settings, NAME="tiny", PROMPT="the ", TOKENS=30)


def test_training_goes_on_where_a_session_ended(trained: tuple[Path, NotebookNode]) -> None:
    folder, book = trained
    told = shown(cell_with(book, "nanostudy.train("))
    assert re.search(r"resumed after update (2\d|30)\b", told)
    assert "trained 40 updates" in told
    loaded = nanostudy.load(folder / "nanostudy-work" / "tiny")
    assert loaded.metadata["status"] == "finished"
    assert list(loaded.training["step"]) == list(range(1, 41))
    assert (folder / "nanostudy-work" / "tiny.zip").is_file()


def test_progress_is_one_output_that_is_rewritten(trained: tuple[Path, NotebookNode]) -> None:
    _, book = trained
    outputs = cell_with(book, "nanostudy.train(").outputs
    assert [output.output_type for output in outputs] == ["display_data", "execute_result"]
    assert re.search(r"<pre.*update     40   train \d", outputs[0].data["text/html"], re.DOTALL)
    assert "<progress" not in outputs[0].data["text/html"], "the bar goes with the training"
    assert "validation loss" in outputs[1].data["text/html"]
    assert not any("\x1b" in shown(cell) for cell in code(book))


def test_training_shows_its_curve_its_losses_and_its_text(trained: tuple[Path, NotebookNode]) -> None:
    folder, book = trained
    (chart,) = cell_with(book, "run.curve()").outputs
    assert chart.data["image/svg+xml"].startswith("<svg"), "a picture, which needs no network"
    loaded = nanostudy.load(folder / "nanostudy-work" / "tiny")
    (table,) = cell_with(book, "run.evaluations").outputs
    assert f"{loaded.evaluations['val_loss'].iloc[-1]:.4f}"[:5] in table.data["text/html"]
    assert loaded.sample("the ", count=2, tokens=30, seed=1)[1] in shown(cell_with(book, "run.sample("))
    assert f"{nanostudy.count_parameters(loaded.experiment):,} parameters" in shown(cell_with(book, "count_parameters"))


@pytest.fixture(scope="module")
def parts(tmp_path_factory: pytest.TempPathFactory, run: Run) -> tuple[Path, list[NotebookNode]]:
    """study.ipynb as two people run it, a part each, on one shared drive."""
    folder = tmp_path_factory.mktemp("study")
    corpus = write_text(folder / "small.txt", 20_000)
    (folder / "mine.yaml").write_text(STUDY.replace("CORPUS", str(corpus)), encoding="utf-8")
    books = [run("study", folder, STUDY="mine.yaml", PART=part, WORKERS=1) for part in ("short", "long")]
    return folder, books


def test_each_runs_their_part(parts: tuple[Path, list[NotebookNode]]) -> None:
    folder, books = parts
    for part, book in zip(("short", "long"), books, strict=True):
        cell = cell_with(book, "nanostudy.run_study(")
        assert [output.output_type for output in cell.outputs] == ["display_data", "stream"]
        assert "[4/4]" in cell.outputs[0].data["text/html"]
        assert cell.outputs[1].text == "4 of 4 finished\n"
        assert (folder / "nanostudy-work" / f"mine-{part}.zip").is_file()
    assert not any("\x1b" in shown(cell) for book in books for cell in code(book))


def test_the_parts_merge(parts: tuple[Path, list[NotebookNode]], tmp_path: Path) -> None:
    folder, _ = parts
    nanostudy.merge_study([folder / "nanostudy-work" / f"mine-{part}" for part in ("short", "long")], tmp_path / "all")
    assert len(nanostudy.analyze(tmp_path / "all").ranking) == 8


def test_the_analyses_are_shown_inline(parts: tuple[Path, list[NotebookNode]], run: Run) -> None:
    folder, _ = parts
    book = run("visualization", folder)
    assert "What matters" in shown(cell_with(book, "analysis = nanostudy.analyze"))
    said = {cell.source.split('"')[1]: cell for cell in code(book) if cell.source.startswith("analysis.section(")}
    assert list(said) == ["ranking", "effects", "interactions", "curves", "gap", "costs", "claims", "samples"]
    for name in ("ranking", "effects", "curves", "gap", "costs"):
        charts = [output for output in said[name].outputs if "image/svg+xml" in output.data]
        assert charts, f"{name} has no chart"
    names = nanostudy.analyze(*sorted((folder / "nanostudy-work").glob("mine-*[a-z]/"))).ranking["name"]
    assert str(names.iloc[0]) in shown(said["samples"])
    assert "Ranking" in shown(said["ranking"])
    assert (folder / "nanostudy-work" / "report" / "index.html").is_file() or list(
        (folder / "nanostudy-work" / "report").glob("*.html")
    )


def test_the_example_trains_and_writes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    write_text(tmp_path / "small.txt", 20_000)
    text = (ROOT / "examples" / "train_gpu.py").read_text(encoding="utf-8")
    smaller = (
        text.replace('"shakespeare-gpu" if torch.cuda.is_available() else "quickstart"', '"quickstart"')
        .replace("SETTINGS = {}", f"SETTINGS = {TINY!r}")
        .replace('"ROMEO:", 500', '"the ", 30')
    )
    assert all(change in smaller for change in ('PRESET = "quickstart"', "SETTINGS = {'corpus'", '"the ", 30'))
    monkeypatch.chdir(tmp_path)
    exec(compile(smaller, "train_gpu.py", "exec"), {"__name__": "__main__"})
    loaded = nanostudy.load(tmp_path / "nanostudy-work" / "my-gpt")
    assert loaded.sample("the ", count=2, tokens=30, seed=1)[1] in capsys.readouterr().out
    assert "vega" in (loaded.folder / "curve.html").read_text(encoding="utf-8")


# --- the pieces


@pytest.fixture
def cell(monkeypatch: pytest.MonkeyPatch) -> tuple[Cell, list[str]]:
    """A cell, and its pictures as they follow each other."""
    pictures: list[str] = []
    made = Cell()
    monkeypatch.setattr(made, "draw", lambda: pictures.append(made.as_html()))
    return made, pictures


def test_a_cell_keeps_its_first_and_its_last_lines(cell: tuple[Cell, list[str]]) -> None:
    made, pictures = cell
    for i in range(500):
        made.say(f"line {i}.")
    lines = re.sub("<.*?>", "", pictures[-1]).splitlines()
    assert len(lines) == MOST_LINES + 1
    assert lines[0] == "line 0."
    assert lines[FIRST_LINES] == f"... {500 - MOST_LINES} lines ..."
    assert lines[-1] == "line 499."


def test_a_cell_shows_text_and_no_tags(cell: tuple[Cell, list[str]]) -> None:
    made, pictures = cell
    made.say("<b>&", "bold yellow")
    made.share, made.status = 0.25, ("a < b", "<i>")
    made.draw()
    assert re.search(r'<span style="color:#\w+">&lt;b&gt;&amp;</span>', pictures[-1])
    assert 'value="0.2500"' in pictures[-1]
    assert "a &lt; b\n&lt;i&gt;" in pictures[-1]


def test_a_cell_is_not_rewritten_at_every_event(cell: tuple[Cell, list[str]], monkeypatch: pytest.MonkeyPatch) -> None:
    made, pictures = cell
    clock = [1000.0]
    monkeypatch.setattr(view.time, "monotonic", lambda: clock[0])
    made.shown_at = 1000.0
    made.progress(0.1, "early")
    assert pictures == []
    clock[0] += 0.6
    made.progress(0.2, "later")
    assert len(pictures) == 1
    assert "later" in pictures[0]


def test_results_outlast_a_session_on_colab(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    drive, mounted = ModuleType("google.colab"), []

    def mount(where: str) -> None:
        mounted.append(where)
        (Path(where) / "MyDrive").mkdir(parents=True)

    drive.drive = type("drive", (), {"mount": staticmethod(mount)})  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "google.colab", drive)
    monkeypatch.setattr(api, "DRIVE", tmp_path / "drive")
    assert workspace() == workspace() == tmp_path / "drive" / "MyDrive" / "nanostudy"
    assert workspace().is_dir()
    assert mounted == [str(tmp_path / "drive")], "once"


def test_results_outlast_a_session_on_kaggle(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("KAGGLE_KERNEL_RUN_TYPE", "Interactive")
    monkeypatch.setattr(api, "KAGGLE", tmp_path / "working")
    earlier = tmp_path / "input"
    for name in ("mine", "theirs"):
        (earlier / name).mkdir(parents=True)
        (earlier / name / "run.json").write_text("earlier")
    (tmp_path / "working" / "nanostudy" / "mine").mkdir(parents=True)
    (tmp_path / "working" / "nanostudy" / "mine" / "run.json").write_text("later")
    place = workspace(earlier)
    assert place == tmp_path / "working" / "nanostudy"
    assert (place / "mine" / "run.json").read_text() == "later", "what is there stays"
    assert (place / "theirs" / "run.json").read_text() == "earlier"
    assert sorted(path.name for path in place.iterdir()) == ["mine", "theirs"]


def test_elsewhere_results_lie_here(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("KAGGLE_KERNEL_RUN_TYPE", raising=False)
    assert workspace().resolve() == tmp_path / "nanostudy-work"
