"""The command that decides whether a change is kept: parse, call, print."""

from __future__ import annotations

import contextlib
import shlex
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from nanostudy.cli.options import RUN, options, stopped_at_once

EXIT_CODES = {"KEEP": 0, "DISCARD": 3, "UNDECIDED": 4}  # 1 and 2 are failures and wrong usage


@options(RUN)
def judge(
    a: Annotated[
        str, typer.Argument(help="A recipe: a preset, a settings file, a run folder, or 'quickstart dropout=0.1'.")
    ],
    b: Annotated[list[str], typer.Argument(help="Another recipe, or setting=value ... to change in the first.")],
    seeds: Annotated[int, typer.Option(min=2, help="Of each recipe, the same for both.")] = 8,
    margin: Annotated[
        float,
        typer.Option(help="The least improvement worth keeping, in nats per token; below 0: how much worse B may be."),
    ] = 0.005,
    most: Annotated[
        int | None, typer.Option(help="While undecided, go on with twice as many seeds, up to so many.")
    ] = None,
    out: Annotated[Path | None, typer.Option(help="The folder. Default: judgements/ and a name.")] = None,
    json: Annotated[bool, typer.Option("--json", help="For a program; progress goes to standard error.")] = False,
    **given: Any,
) -> None:
    """Train two recipes with the same seeds and say whether the second is to be kept: KEEP, DISCARD or UNDECIDED.

    Exit codes: KEEP 0, DISCARD 3, UNDECIDED 4. Run it again with more seeds to go on.
    """
    from nanostudy import referee
    from nanostudy.study.listing import as_json

    second = b[0] if len(b) == 1 else shlex.join(b)
    with contextlib.redirect_stdout(sys.stderr) if json else contextlib.nullcontext(), stopped_at_once():
        verdict = referee.judge(a, second, seeds=seeds, margin=margin, most=most, out=out, **given)
    if json:
        print(as_json(referee.as_record(verdict)))
    else:
        print("\n".join(["", f"A         {verdict.a}", f"B         {verdict.b}", *verdict.lines()]))
    raise typer.Exit(EXIT_CODES[verdict.verdict])
