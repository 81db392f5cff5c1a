"""The command that writes text with trained models: one, or several side by side."""

from __future__ import annotations

import itertools
import shutil
import sys
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

import nanostudy
from nanostudy.cli.options import options
from nanostudy.errors import UsageError
from nanostudy.settings import SamplingParams
from nanostudy.text import printable
from nanostudy.validation import settings_of

if TYPE_CHECKING:
    from nanostudy.run import Run

FILE = "FILE:"  # begins a prompt that is a file's path
LARGEST_PROMPT = 2**20  # bytes
GAP, NARROWEST = 3, 22  # characters between columns, and of a column: below that, texts follow one another


@options([*settings_of(SamplingParams), "device"])
def sample(
    runs: Annotated[
        list[str],
        typer.Argument(
            help="A run folder, a weights file, a study (its best), or STUDY/NUMBER. Several: side by side."
        ),
    ],
    prompt: Annotated[
        str | None, typer.Option(help="What the text goes on from, or FILE:PATH, a text file. Default: a new line.")
    ] = None,
    count: Annotated[int, typer.Option("-n", "--count", min=1, max=10_000, help="How many samples.")] = 1,
    tokens: Annotated[int, typer.Option(min=0, max=10**6, help="New tokens of each sample.")] = 500,
    seed: Annotated[int, typer.Option(min=0, help="The same seed gives the same text.")] = 1,
    which: Annotated[str, typer.Option(help="best or last weights.")] = "best",
    **sampling: Any,
) -> None:
    """Write text with a trained model, with the best of a study, or with several side by side."""
    prompt, device = _prompt(prompt), sampling.pop("device")
    loaded = [nanostudy.load(run, which, device) for run in runs]
    sampling["top_k"] = sampling["top_k"] or None
    for run, given in zip(loaded, runs, strict=True):
        if run.folder != Path(given):
            print(f"{given} is {run.folder}", file=sys.stderr)
    for block_size in {run.experiment.block_size for run in loaded}:
        if len(prompt or "") + tokens > block_size:
            window = f"re-reads the last {max(1, block_size // 2)} tokens (--exact slides)"
            how = "slides exactly, at full cost" if sampling["exact"] else window
            print(f"past its context of {block_size} tokens the model {how}", file=sys.stderr)
    if len(loaded) == 1 and count == 1:
        for piece in itertools.chain([prompt or ""], loaded[0].stream(prompt, tokens, seed, **sampling)):
            print(piece, end="", flush=True)
        print()
        return
    written = [run.sample(prompt, count, tokens, seed, **sampling) for run in loaded]
    for i, texts in enumerate(zip(*written, strict=True), start=1):
        if count > 1:
            print(f"--- {i}")
        print(texts[0] if len(texts) == 1 else side_by_side([_title(run) for run in loaded], texts))


def _title(run: Run) -> str:
    loss = run.summary.get("lowest", "").split(" ")[0]
    return f"{run.short_name}{f', val {loss}' if loss else ''}"


def side_by_side(titles: Sequence[str], texts: Sequence[str]) -> str:
    """In columns of the terminal; one after another where it has no room for columns."""
    width = (shutil.get_terminal_size().columns + GAP) // len(texts) - GAP
    if width < NARROWEST:
        return "\n\n".join(f"--- {title}\n{text}" for title, text in zip(titles, texts, strict=True))
    heads = [textwrap.wrap(title, width) for title in titles]
    tallest = max(map(len, heads))
    bodies = [[textwrap.wrap(line, width) or [""] for line in printable(text).splitlines()] for text in texts]
    columns = [
        [*[""] * (tallest - len(head)), *head, "-" * width, *itertools.chain(*body)]
        for head, body in zip(heads, bodies, strict=True)
    ]
    rows = itertools.zip_longest(*columns, fillvalue="")
    return "\n".join((" " * GAP).join(cell.ljust(width) for cell in row).rstrip() for row in rows)


def _prompt(text: str | None) -> str | None:
    """The text, or that of the file which FILE:PATH names, as nanoGPT's sample.py reads it."""
    from nanostudy.reading import read_text

    if not text or not text.startswith(FILE):
        return text
    path = Path(text.removeprefix(FILE))
    try:
        return read_text(path, LARGEST_PROMPT)
    except OSError as problem:
        raise UsageError(f"--prompt {FILE}{path}: there is no such file to read ({problem.strerror}).") from None
