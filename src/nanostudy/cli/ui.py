"""The command that shows studies and runs in a browser: parse, call, print."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def ui(
    folders: Annotated[
        list[Path] | None,
        typer.Argument(
            help="Studies (folders or names), run folders, or folders of these. Default: studies and runs here."
        ),
    ] = None,
    port: Annotated[int | None, typer.Option(min=1, max=65535, help="Default: 8765, or a free one.")] = None,
    host: Annotated[str, typer.Option(help="The address to listen at; another one needs --allow-host.")] = "127.0.0.1",
    allow_host: Annotated[
        list[str] | None, typer.Option(help="A name under which other computers know this one; may be given again.")
    ] = None,
    open: Annotated[bool, typer.Option("--open", help="Open it in this computer's browser.")] = False,
) -> None:
    """Show studies and runs in a browser, while they run and after, and prompt their models side by side."""
    import webbrowser

    from nanostudy.ui.serve import serve

    def say(address: str) -> None:
        print(f"ui       {address}\n         Ctrl-C ends it; trainings go on without it", flush=True)
        if open:
            webbrowser.open(address)

    serve(folders or [], host=host, port=port, names=allow_host or [], say=say)
