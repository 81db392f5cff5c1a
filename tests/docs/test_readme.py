"""The README is held to the code: its commands exist, its Python runs, its picture of the house is true."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from pathlib import Path

import click
import pytest
import typer.main

from nanostudy.cli.main import app
from nanostudy.settings import FIELDS
from nanostudy.settings_files import preset_names

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"```(\w*)\n(.*?)```", README, re.DOTALL)


def commands() -> list[list[str]]:
    """Every call of nanostudy in a block of commands, without its comment."""
    lines = [line.removeprefix("$ ") for language, text in BLOCKS if not language for line in text.splitlines()]
    parts = [part.strip() for line in lines for part in line.split("&&")]
    return [shlex.split(part, comments=True) for part in parts if part.startswith("nanostudy ")]


def find(words: list[str]) -> tuple[click.Command, list[str]]:
    command: click.Command = typer.main.get_command(app)
    while hasattr(command, "commands") and words and words[0] in command.commands:
        command, words = command.commands[words[0]], words[1:]
    return command, words


@pytest.mark.parametrize("words", commands(), ids=" ".join)
def test_a_command_of_the_readme_is_one_that_exists(words: list[str]) -> None:
    command, rest = find(words[1:])
    assert not hasattr(command, "commands"), f"{words} names no command"
    command.make_context(words[0], list(rest), resilient_parsing=False)  # raises where an option is unknown
    for word in rest:
        if re.fullmatch(r"[a-z_]+=.*", word):
            assert all(key in (*FIELDS, "track") for key in re.findall(r"(\w+)=", word))


def test_every_command_is_in_the_readme() -> None:
    told = {tuple(words[1:3]) for words in commands()}
    for name, command in typer.main.get_command(app).commands.items():
        inner = getattr(command, "commands", {None: None})
        for sub in inner:
            call = f"{name} {sub}" if sub else name
            assert any(" ".join(words).startswith(call) for words in told) or call in README, f"{call} is undocumented"


def test_the_presets_named_in_the_readme_exist() -> None:
    named = {words[2] for words in commands() if words[1] == "train" and re.fullmatch(r"[a-z]+(-[a-z]+)?", words[2])}
    assert named
    assert named <= set(preset_names())


def test_the_python_of_the_readme_runs(tmp_path: Path) -> None:
    (code,) = [text for language, text in BLOCKS if language == "python"]
    smaller = (
        code.replace("max_iters=2000", "max_iters=2, corpus='playhouse', sample_tokens=5")
        .replace("count=3", "count=2, tokens=5")
        .replace('{"max_iters": "200"}', '{"max_iters": "2", "corpus": "playhouse", "sample_tokens": "5"}')
    )
    assert len(re.findall('tokens[^ ]* ?[=:] ?["]?5', smaller)) == 3, "the example changed: make it small here again"
    done = subprocess.run([sys.executable, "-c", smaller], cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert "ROMEO:" in done.stdout


def test_the_house_in_the_readme_is_the_house() -> None:
    (tree,) = [text for language, text in BLOCKS if not language and text.startswith("src/nanostudy/")]
    package = ROOT / "src" / "nanostudy"
    modules = {path.name for path in package.rglob("*.py") if not path.name.startswith("__")}
    assert modules == set(re.findall(r"\b\w+\.py\b", tree))


def test_the_gate_runs_the_readmes_test_command() -> None:
    gate = (ROOT / ".ci" / "run").read_text(encoding="utf-8")
    (line,) = [text.strip() for _, text in BLOCKS if "./check" in text]
    for command in line.split(" && "):
        assert re.search(f"^{re.escape(command)}$", gate, re.MULTILINE), f"{command} is not in the gate"
