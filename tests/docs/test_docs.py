"""The README and docs are held to the code: every command and Python block is run, every link and name exists.

Each page is run from top to bottom in a folder of its own, with a corpus, trainings and models made small. A block that is not run
says why: `<!-- not run: REASON -->` stands before it. Its commands, and those for machines that are not here, are only parsed.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import re
import shutil
import sys
import tomllib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import typer.main
from commands import call
from conftest import without_report
from markdown import FINDINGS, PAGES, ROOT, Block, anchors, blocks, links, prose
from module_tree import PAGE, SOURCE, first_line, modules, spine_lines, with_tree

from nanostudy import api, device  # noqa: F401 (what the commands call is imported before it is made small)
from nanostudy.cli import main as cli
from nanostudy.cli.judge import EXIT_CODES
from nanostudy.data import texts
from nanostudy.model import sample
from nanostudy.reporting import write as figure
from nanostudy.settings import IN_FILES
from nanostudy.settings_files import experiment_and_resources
from nanostudy.study import definition, pool
from nanostudy.training import evaluation, train
from nanostudy.training.train import Job
from nanostudy.yaml_input import parse_yaml

README = ROOT / "README.md"
LANGUAGES = ("sh", "console", "python", "yaml", "text")
GENERATED = ("command-line.md", "settings.md")
ELSEWHERE = (  # options and settings of machines and packages that are not here: such a command is parsed and not run
    *("--executor ray", "track=wandb", "track=mlflow", "--track wandb", "--track mlflow"),
)
PLAYS = "ROMEO:\nThe sea is a song.\n\nJULIET:\nAnd no one hears it, 0123456789 QWXZKPVBGFHYDS!?-';,&$\n\n"
NANOGPT_CONFIG = "out_dir = 'out-x'\nblock_size = 16\ndataset = 'shakespeare_char'\nn_layer = 1\nn_head = 2\nn_embd = 16\nbatch_size = 4\n"


# --- a small world


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A folder with what the pages take for granted. While it is used, trainings take two updates and texts ten tokens."""
    folder = tmp_path_factory.mktemp("world")
    plays = folder / "corpora" / texts.SHAKESPEARE_FILE
    plays.parent.mkdir()
    plays.write_text(PLAYS * 30, encoding="utf-8")
    with pytest.MonkeyPatch.context() as patch, without_report():
        patch.setenv("NANOSTUDY_CORPORA", str(plays.parent))
        patch.setattr(texts, "SHAKESPEARE_SHA256", texts.find_text(str(plays)).sha256)
        make_small(patch)
        home = folder / "home"
        for name in ("my.txt", "path/to/text.txt"):
            (home / name).parent.mkdir(parents=True, exist_ok=True)
            (home / name).write_text(PLAYS * 30, encoding="utf-8")
        (home / "config").mkdir()
        (home / "config" / "train_shakespeare_char.py").write_text(NANOGPT_CONFIG, encoding="utf-8")
        patch.chdir(home)
        succeed("train", "quickstart")
        succeed("study", "run", "quickstart")
        succeed("convert", "runs/quickstart", "--to", "nanogpt", "--out", "out-shakespeare-char")
        for name in ("anna.csv", "ben.csv", "theirs.csv"):
            shutil.copy("studies/quickstart/results.csv", name)
        shutil.copytree(FINDINGS, "docs/findings")
        yield home


def make_small(patch: pytest.MonkeyPatch) -> None:
    """Two updates, ten tokens, one thread, no worker processes, a short calibration, no drawing. Settings are recorded as they are."""
    begin, make_pool, generate, draw = train._Training.__init__, pool.make_pool, sample.generate, figure.draw
    few = {"max_iters": 2, "eval_interval": 2, "batch_size": 2, "gradient_accumulation_steps": 1}

    def begin_small(self: object, jobs: Sequence[Job], *more: object, **named: object) -> None:
        smaller = [
            replace(
                job,
                experiment=replace(job.experiment, **{k: min(v, getattr(job.experiment, k)) for k, v in few.items()}),
            )
            for job in jobs
        ]
        begin(self, smaller, *more, **named)

    def generate_few(params, shape, prompt, seeds, count, tokens, *more):  # type: ignore[no-untyped-def]
        return generate(params, shape, prompt, seeds, count, min(tokens, 10), *more)

    def undrawn(*_: object) -> None:
        raise figure.DrawingFailed("not drawn in this test")

    patch.setattr(train._Training, "__init__", begin_small)
    text = definition.study_text
    patch.setattr(definition, "study_text", lambda name: text(name).replace("n_embd: [128, 256]", "n_embd: [16, 32]"))
    patch.setitem(evaluation.TOKENS, "cpu", 256)
    patch.setattr(pool, "CALIBRATION_SECONDS", 0.01)
    patch.setattr(os, "fsync", lambda file: None)
    everywhere(patch, device.available_cores, lambda: 1)
    everywhere(patch, make_pool, lambda where, *more: make_pool(replace(where, executor="inline", workers=None), *more))
    everywhere(patch, generate, generate_few)
    everywhere(patch, draw, undrawn)


def everywhere(patch: pytest.MonkeyPatch, function: Callable[..., object], other: Callable[..., object]) -> None:
    """In each module that imports the function by its name."""
    for name, module in list(sys.modules.items()):
        if name.startswith("nanostudy") and getattr(module, function.__name__, None) is function:
            patch.setattr(module, function.__name__, other)


def succeed(*words: str) -> str:
    """What a command prints."""
    told = call(*words)
    assert told.code in (EXIT_CODES.values() if words[0] == "judge" else (0,)), f"nanostudy {' '.join(words)}: {told}"
    return told.out


# --- blocks are run


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_what_a_page_shows_runs(page: Path, world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shutil.copytree(world, tmp_path / "here")
    monkeypatch.chdir(tmp_path / "here")
    names: dict[str, object] = {}
    for block in blocks(page):
        if block.language == "yaml" and block.reason is None:
            put_yaml(block)
    for block in blocks(page):
        if block.language == "python" and block.reason is None:
            with contextlib.redirect_stdout(io.StringIO()):
                exec(compile(block.text, str(block), "exec"), names)
        elif block.language in ("sh", "console"):
            for words in block.commands():
                run(words, block)


def put_yaml(block: Block) -> None:
    """A study or settings file under the name in its first line, checked."""
    named = re.match(r"# (\S+\.yaml)\n", block.text)
    assert named, f"{block}: the first line must be the file's name as a comment"
    if re.search(r"^(grid|parts):", block.text, re.MULTILINE):
        definition.parse_studies(block.text, named[1])
    else:
        experiment_and_resources(parse_yaml(block.text, named[1]))
    Path(named[1]).write_text(block.text, encoding="utf-8")


def run(words: list[str], block: Block) -> None:
    """Runs a command of nanostudy's, checks one of another program. An unknown program is a failure."""
    program, *rest = words
    if program != "nanostudy":
        assert program in CHECKS, f"{block}: these tests do not know the program {program}"
        CHECKS[program](rest)
    elif block.reason or any(option in " ".join(words) for option in ELSEWHERE):
        parse(rest)
    else:
        assert succeed(*rest), f"{block}: {' '.join(words)} prints nothing"


def parse(words: list[str]) -> None:
    """Raises where a command, an option or a setting is unknown."""
    command: Any = typer.main.get_command(cli.app)  # of typer's own copy of click, or of click
    while hasattr(command, "commands"):
        command, words = command.commands[words[0]], words[1:]
    given = command.make_context("nanostudy", list(words)).params
    for word in [*(given.get("assignments") or ()), *(given.get("axes") or ())]:  # where an unknown option ends, too
        assert word.removeprefix("--").partition("=")[0] in IN_FILES, f"{word} is no option and no setting"


def check_pip(words: list[str]) -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    assert words[0] == "install"
    extras = re.findall(r"\.\[(.*?)\]", " ".join(words))
    assert set(extras) <= set(project["optional-dependencies"])
    assert extras or words[1] in (".", "torch")


def check_torchrun(words: list[str]) -> None:
    from torch.distributed.run import get_args_parser

    at = words.index("-m")
    assert words[at + 1] == "nanostudy"
    get_args_parser().parse_args([*words[:at], "script"])
    parse(words[at + 2 :])


def check_ray(words: list[str]) -> None:
    scripts = pytest.importorskip("ray.scripts.scripts")
    scripts.cli.commands[words[0]].make_context("ray", list(words[1:]))


def check_sbatch(words: list[str]) -> None:
    at = next(i for i, word in enumerate(words) if word.endswith(".sh"))
    assert (ROOT / words[at]).is_file()
    parse(["study", "run", *words[at + 1 :]])


def check_python(words: list[str]) -> None:
    script = ROOT / words[0]
    options = [word for word in words[1:] if word.startswith("--")]
    assert all(f'"{option}"' in script.read_text(encoding="utf-8") for option in options)


def check_gate(words: list[str]) -> None:
    assert not words
    assert os.access(ROOT / "check", os.X_OK)


CHECKS = {
    "pip": check_pip,
    "torchrun": check_torchrun,
    "ray": check_ray,
    "sbatch": check_sbatch,
    "python": check_python,
    "./check": check_gate,
    "tensorboard": lambda words: None,
}


# --- nothing is left out


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_no_block_is_left_out_without_a_reason(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    shown = blocks(page)
    assert len(re.findall("^ *```", text, re.MULTILINE)) == 2 * len(shown), "a block that these tests do not see"
    assert len(re.findall("<!-- not run:", text)) == sum(block.reason is not None for block in shown)
    for block in shown:
        assert block.language in LANGUAGES, f"{block}: name one of {', '.join(LANGUAGES)}"
        assert block.reason is None or len(block.reason) > 10, block
        hidden = re.search(r"^(\$ |nanostudy |pip |python )", block.text, re.MULTILINE)
        assert block.language != "text" or not hidden or page.name in GENERATED, (
            f"{block} holds a command: make it sh or console"
        )
        assert block.language != "console" or block.commands(), f"{block} holds no command"


def test_every_command_is_run_on_some_page() -> None:
    pages = [page for page in PAGES if page.name not in GENERATED]
    shown = {" ".join(words[1:]) for page in pages for block in blocks(page) for words in block.commands()}
    for name, command in typer.main.get_command(cli.app).commands.items():  # type: ignore[attr-defined]
        for sub in getattr(command, "commands", {"": None}):
            call = f"{name} {sub}".strip()
            assert any(words.startswith(call) for words in shown), f"`nanostudy {call}` is on no page"


# --- what the pages name exists


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_links_and_anchors_lead_somewhere(page: Path) -> None:
    for link in links(page):
        if re.match(r"https?://", link):
            continue
        path, _, anchor = link.partition("#")
        target = (page.parent / path).resolve() if path else page
        assert target.exists(), f"{page.name}: {link}"
        assert not anchor or anchor in anchors(target), f"{page.name}: {link}"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_functions_and_tests_that_a_page_names_exist(page: Path) -> None:
    for file, name in re.findall(r"`([\w/.]+\.py)::(\w+)`", prose(page)):
        path = ROOT / file if file.startswith("tests/") else SOURCE / file
        assert path.is_file(), f"{page.name}: {file}"
        defined = rf"^(?:def|class) {name}\b|^{name}\b.* = "
        assert re.search(defined, path.read_text(encoding="utf-8"), re.MULTILINE), f"{page.name}: {file}::{name}"


def test_every_page_and_picture_is_referred_to() -> None:
    named = {(page.parent / link.partition("#")[0]).resolve() for page in PAGES for link in links(page)}
    for path in (ROOT / "docs").iterdir():
        place = path.resolve()
        assert any(place in (one, *one.parents) for one in named), f"nothing refers to {path.name}"


# --- files


def test_every_file_and_column_is_described(world: Path) -> None:
    words = set(re.findall(r"`([^`]+)`", (ROOT / "docs" / "files.md").read_text(encoding="utf-8")))
    run, study = world / "runs" / "quickstart", world / "studies" / "quickstart"
    columns = [(run / name).read_text(encoding="utf-8").splitlines()[0] for name in ("training.csv", "evaluations.csv")]
    columns.append((study / "results.csv").read_text(encoding="utf-8").splitlines()[0])
    keys = {*json.loads((run / "run.json").read_text(encoding="utf-8")), *",".join(columns).split(",")}
    files = {path.name for path in (*run.iterdir(), *study.iterdir(), *next(study.glob("b*/")).iterdir())}
    files -= {path.name for path in study.iterdir() if path.is_dir()}
    assert keys - words - set(IN_FILES) == set()
    assert files - words == set()


# --- the README


def test_the_readme_is_one_page() -> None:
    assert len(README.read_text(encoding="utf-8").splitlines()) <= 150


def test_the_gate_runs_the_readmes_commands() -> None:
    gate = (ROOT / ".ci" / "run").read_text(encoding="utf-8")
    (line,) = [text for block in blocks(README) for text in block.text.splitlines() if "./check" in text]
    for command in line.split(" && "):
        assert re.search(f"^{re.escape(command)}$", gate, re.MULTILINE), f"{command} is not in the gate"


def test_the_set_up_is_on_the_first_screen() -> None:
    first = README.read_text(encoding="utf-8").splitlines()[:25]
    torch = next(i for i, line in enumerate(first) if line.startswith("pip install torch --index-url"))
    assert first[torch + 1] == "pip install . && nanostudy study run quickstart"


# --- the tree


def test_every_module_says_what_is_behind_its_door() -> None:
    for path in modules(SOURCE):
        assert first_line(path) or path.name == "__main__.py", path


def test_the_tree_is_that_of_the_code() -> None:
    page = PAGE.read_text(encoding="utf-8")
    assert page == with_tree(page), "stale: run `python tests/docs/module_tree.py`"


@pytest.mark.parametrize("page", [README, PAGE], ids=lambda page: page.stem)
def test_the_spine_is_as_long_as_it_is_said_to_be(page: Path) -> None:
    (said,) = re.findall(r"about ([\d,]+) lines", page.read_text(encoding="utf-8"), re.IGNORECASE)
    assert spine_lines() == pytest.approx(int(said.replace(",", "")), rel=0.05)
