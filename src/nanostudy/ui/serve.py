"""Starts the server: on this computer alone, unless names are given under which others may reach it."""

from __future__ import annotations

import contextlib
import importlib.util
import os
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nanostudy.errors import NanostudyError, UsageError

if TYPE_CHECKING:
    import uvicorn

HOST, PORT = "127.0.0.1", 8765
PATIENCE = 20.0  # seconds for the server to start
NICENESS = 10  # of a server beside a study, which must not wait for it


def serve(
    folders: Sequence[Path], *, say: Callable[[str], None] = print, until_closed: bool = False, **how: Any
) -> None:
    """Serves until Ctrl-C, or until its standard input ends; `say` gets the address. Otherwise as `make`."""
    server, bound, address = make(folders, **how)
    with bound:
        if until_closed:
            threading.Thread(target=_watch_input, args=(server,), daemon=True).start()
        say(address)
        with contextlib.suppress(KeyboardInterrupt):
            server.run(sockets=[bound])


def make(
    folders: Sequence[Path],
    *,
    host: str = HOST,
    port: int | None = None,
    names: Sequence[str] = (),
    begin: Path | None = None,
) -> tuple[uvicorn.Server, socket.socket, str]:
    """A server of these studies and runs, its socket, and its address with the token.

    `names` are this computer's, as others know it; `begin` is a study that may not be there yet. Raises UsageError, NanostudyError.
    """
    if host not in (HOST, "localhost") and not names:
        raise UsageError(
            f"--host {host} lets other computers ask. Say under which name they know this one, so that no page of another site "
            f"can send them here: --allow-host {socket.gethostname()}, for example."
        )
    check_installed()
    import uvicorn

    from nanostudy.ui.live import Places
    from nanostudy.ui.security import Keys
    from nanostudy.ui.server import Server, app

    server = Server(Places(folders, begin))
    bound = _bound(host, port)
    keys = Keys(bound.getsockname()[1])
    config = uvicorn.Config(
        app(server, keys, names),
        log_level="warning",
        access_log=False,  # addresses may hold the token
        server_header=False,
        lifespan="off",
        ws="none",
        proxy_headers=False,
        timeout_graceful_shutdown=2,
    )
    running = uvicorn.Server(config)
    server.ending = lambda: running.should_exit
    return running, bound, f"http://{names[0] if names else HOST}:{keys.port}/?token={keys.token}"


def check_installed() -> None:
    """Raises UsageError."""
    if missing := [name for name in ("starlette", "uvicorn") if importlib.util.find_spec(name) is None]:
        raise UsageError(f"The ui needs {' and '.join(missing)}: pip install 'nanostudy[ui]'")


def _bound(host: str, port: int | None) -> socket.socket:
    """A socket at this port; where none is named, at the usual one, or at any that is free."""
    for choice in (PORT, 0) if port is None else (port,):
        bound = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET)
        if os.name == "posix":  # elsewhere it would let two programs share a port
            bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            bound.bind((host, choice))
            bound.listen()  # who has the address may ask at once, and waits until the server runs
            return bound
        except (OSError, OverflowError) as problem:
            bound.close()
            reason = problem
    raise NanostudyError(f"No server can listen at {host}:{port or PORT}: {reason}. Choose another --port.")


def _watch_input(server: uvicorn.Server) -> None:
    with contextlib.suppress(OSError):
        while sys.stdin.buffer.read(4096):
            pass
    server.should_exit = True


@contextlib.contextmanager
def beside(path: Path) -> Iterator[str]:
    """A server in a process of its own, for a study that is about to run: yields its address. It ends with the block."""
    check_installed()
    code = (
        f"import os, sys; sys.path.append({str(Path(__file__).parents[2])!r})\n"
        f"if hasattr(os, 'nice'): os.nice({NICENESS})\n"
        f"from pathlib import Path\nfrom nanostudy.ui.serve import serve\n"
        f"serve([], begin=Path({str(path.absolute())!r}), say=lambda text: print(text, flush=True), until_closed=True)"
    )
    process = subprocess.Popen(
        [sys.executable, "-P", "-c", code],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        start_new_session=True,  # Ctrl-C is for the study
        creationflags=getattr(subprocess, "CREATE_NEW_PROCESS_GROUP", 0),
    )
    try:
        assert process.stdout
        address = process.stdout.readline().strip()
        if not address:
            raise NanostudyError("The ui did not start; what it said stands above. The study runs without --ui.")
        yield address
    finally:
        assert process.stdin
        process.stdin.close()
        try:
            process.wait(timeout=5)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
