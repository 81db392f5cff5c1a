"""Writes docs/command-line.md and docs/settings.md from the commands and the declared settings: `python -m nanostudy.cli.reference`."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import typer.main

from nanostudy.cli.main import app
from nanostudy.settings import FIELDS, SamplingParams, Where, names_of
from nanostudy.text import plain, value_text
from nanostudy.validation import TYPES, Kind, Setting, settings_of

AGAIN = "This page is generated; `python -m nanostudy.cli.reference` writes it again."
KINDS: dict[Kind, str] = {
    "data": "What is read",
    "shape": "Sizes of tensors: members of one stack share them",
    "number": "Numbers that may differ within a stack",
    "record": "What is written down; no part of an experiment's identity",
}

EXPERIMENTS = """
## Experiments

In a settings file `setting: value`, on the command line `setting=value`,
in a study file under `settings:` or `grid:`, in Python `Experiment(setting=value)`."""
WHERE_AND_HOW = """
## Where and how

Options of `nanostudy study run` (`save_every` in Python alone), keywords in Python; the first four and `track`
may stand in a settings file, too. They change no experiment's identity."""
SAMPLING = """
## Sampling

Options of `nanostudy sample`, keywords of `Run.sample` in Python."""


def command_line() -> str:
    """Every command with its arguments and options, as Markdown."""
    lines = ["# Command line", "", AGAIN]
    for words, command in _commands("nanostudy", typer.main.get_command(app)):
        arguments = [p for p in command.params if p.param_type_name == "argument"]
        usage = [words, *map(_usage, arguments), *["[options]"] * (len(command.params) > len(arguments))]
        lines += ["", f"## {words}", "", str(command.help), "", "```text", " ".join(usage), "```"]
        rows = [(_spelling(p), _default(p), p.help or "") for p in command.params if p.name != "help"]
        lines += _table(("argument or option", "default", "meaning"), rows) if rows else []
    return "\n".join(lines) + "\n"


def settings() -> str:
    """Every setting with its type, default, range and meaning, as Markdown."""
    lines = ["# Settings", "", AGAIN, EXPERIMENTS]
    for kind, title in KINDS.items():
        lines += ["", f"### {title}", *_settings(FIELDS[name] for name in names_of(kind))]
    lines += [WHERE_AND_HOW, *_settings(settings_of(Where).values())]
    return "\n".join([*lines, SAMPLING, *_settings(settings_of(SamplingParams).values())]) + "\n"


def _commands(words: str, command: Any) -> Iterator[tuple[str, Any]]:
    for name, inner in getattr(command, "commands", {}).items():
        yield from _commands(f"{words} {name}", inner)
    if not hasattr(command, "commands"):
        yield words, command


def _usage(argument: Any) -> str:
    name = argument.name.upper() + ("..." if argument.nargs == -1 else "")
    return name if argument.required else f"[{name}]"


def _spelling(param: Any) -> str:
    return ", ".join(param.opts) if param.param_type_name == "option" else param.name.upper()


def _default(param: Any) -> str:
    value = getattr(param.default, "value", param.default)
    return "" if param.required or value is None or value is False or callable(value) else value_text(value)


def _settings(settings: Iterable[Setting]) -> list[str]:
    rows = [(s.name, TYPES[s.base], value_text(s.default), s.bounds(), s.meaning) for s in settings]
    return _table(("setting", "type", "default", "range", "meaning"), rows)


def _table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    cells = [" | ".join([f"`{name}`", *map(plain, rest)]) for name, *rest in rows]
    return ["", f"| {' | '.join(header)} |", "|---" * len(header) + "|", *(f"| {row} |" for row in cells)]


PAGES = {"command-line.md": command_line, "settings.md": settings}


def main() -> None:
    docs = Path(sys.argv[1] if len(sys.argv) > 1 else "docs")
    for name, page in PAGES.items():
        (docs / name).write_text(page(), encoding="utf-8", newline="\n")


if __name__ == "__main__":
    main()
