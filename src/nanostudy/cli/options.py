"""Arguments and options that several commands take; those of settings.py are generated from its declarations."""

from __future__ import annotations

import contextlib
import shutil
import sys
import textwrap
from collections.abc import Callable, Iterable, Iterator
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any, TypeVar

import typer

from nanostudy.errors import Interrupted
from nanostudy.settings import RUN_OPTIONS, SETTINGS
from nanostudy.text import printable
from nanostudy.validation import Setting, takes

F = TypeVar("F", bound=Callable[..., Any])
RUN = [name for name in RUN_OPTIONS if name != "save_every"]  # of commands that run a study


class Form(StrEnum):
    """How a listing is printed."""

    table = "table"
    csv = "csv"
    json = "json"


class Layout(StrEnum):
    """How a study is exported."""

    published = "published"
    findings = "findings"


def report_width() -> int:
    """Of running text: no wider than reads well."""
    return min(100, shutil.get_terminal_size().columns)


def print_paragraph(text: str, indent: str = "") -> None:
    """Wrapped, and an empty line after it."""
    print(textwrap.fill(text, report_width(), initial_indent=indent, subsequent_indent=indent) + "\n")


def show(line: str) -> None:
    """Prints a line of words, which a terminal gets wrapped between them; what somebody else wrote does nothing to it."""
    text = printable(line)
    if sys.stdout.isatty():
        wrap = textwrap.TextWrapper(report_width(), break_long_words=False, break_on_hyphens=False)
        text = text if len(text) <= report_width() else wrap.fill(text)
    print(text)


@contextlib.contextmanager
def stopped_at_once() -> Iterator[None]:
    """Around a training: the second Ctrl-C, which waits for no checkpoint, ends it in a message, too."""
    try:
        yield
    except KeyboardInterrupt:
        raise Interrupted("stopped at once, without saving; every checkpoint before is whole.") from None


def presets_like(incomplete: str) -> list[str]:
    from nanostudy.settings_files import preset_names

    return _like(incomplete, preset_names(), "settings.yaml")


def studies_like(incomplete: str) -> list[str]:
    from nanostudy.study.definition import study_names

    return _like(incomplete, study_names(), "study.yaml")


def _like(incomplete: str, names: list[str], file: str) -> list[str]:
    """What a shell may complete a word to: names, folders of studies or runs, and YAML files."""
    places = [path.parent for path in Path().glob(f"*/*/{file}")]
    files = [path for pattern in ("*.yaml", "*.yml") for path in Path().glob(pattern)]
    return [word for word in [*names, *map(str, [*places, *files])] if word.startswith(incomplete)]


Source = Annotated[
    str,
    typer.Argument(
        help="A study (nanostudy study list), a study file (YAML), or a study's folder.", autocompletion=studies_like
    ),
]
Axes = Annotated[list[str] | None, typer.Argument(help="setting=a,b,c ... adds or replaces an axis.")]
FOLDER = "A study's folder, or the name of a study in its default folder."


def _existing(name: str) -> Path:
    from nanostudy.study.definition import existing_folder

    return existing_folder(str(name))


Folder = Annotated[Path, typer.Argument(help=FOLDER, autocompletion=studies_like, callback=_existing)]
Out = Annotated[Path | None, typer.Option(help="The study's folder. Default: studies/ and its name.")]
Part = Annotated[list[str] | None, typer.Option(help="Only this part; may be given again.")]
Only = Annotated[
    str | None,
    typer.Option(help="Only experiments like this: 'n_embd=256,dropout=0.1'. The same setting twice: either."),
]
Format = Annotated[Form, typer.Option(help="For a person, or for a program.", show_default=False)]
Json = Annotated[bool, typer.Option("--json", help="For a program.")]
Difference = Annotated[float, typer.Option(help="Of validation losses, in nats per token.")]
Corpus = Annotated[str, typer.Argument(help="A corpus, or a path.")]
Tokenizer = Annotated[str, typer.Option(help=SETTINGS["tokenizer"].meaning)]
Loss = Annotated[str, typer.Option(help="In a table: the column of the validation loss, of which less is better.")]
Name = Annotated[str, typer.Option(help="In a table: the column of the experiments' names.")]
Factors = Annotated[str, typer.Option(help="In a table: the columns of what was varied, as A,B.")]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace files of the same names.")]


def columns(loss: str, name: str, factors: str) -> dict[str, Any]:
    """Of a table, as the Python interface takes them."""
    return {"loss": loss, "name": name, "factors": [one.strip() for one in factors.split(",") if one.strip()]}


def options(names: Iterable[str]) -> Callable[[F], F]:
    """Gives a command that takes **options these settings as options."""
    return takes([SETTINGS[name] for name in names], _option)


def _option(setting: Setting) -> Any:
    flag = f"--{setting.name.replace('_', '-')}"
    return Annotated[setting.hint, typer.Option(flag, help=f"{setting.meaning}.")]
