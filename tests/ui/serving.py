"""A server of the ui in this process, and plain requests to it."""

import contextlib
import http.client
import json
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit

import uvicorn
import yaml
from conftest import SMALL, Silent, write_text

from nanostudy import api
from nanostudy.settings import Resources
from nanostudy.ui.serve import make

RESOURCES = Resources(device="cpu", precision="fp32", threads=1)


def write_study(folder: Path, **settings) -> Path:
    """A study file of two shapes and eight experiments."""
    usual = {
        **{key: SMALL[key] for key in SMALL if key != "n_embd"},
        "eval_interval": 10,
        "corpus": str(write_text(folder / "text.txt")),
    }
    grid = {"n_embd": [8, 16], "dropout": [0.0, 0.2]}
    study = {"settings": {**usual, **settings}, "grid": grid, "seeds": [1, 2], "sample_tokens": 8}
    path = folder / "small.yaml"
    path.write_text(yaml.safe_dump(study), encoding="utf-8")
    return path


def studied_in(folder: Path) -> Path:
    api.run_study(write_study(folder), folder / "small", executor="inline", resources=RESOURCES, listener=Silent())
    return folder / "small"


@dataclass
class Serving:
    """`address` has the token; `cookie` is what it is exchanged for."""

    address: str
    server: uvicorn.Server

    @property
    def port(self) -> int:
        return urlsplit(self.address).port

    @property
    def root(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def ask(self, method: str, path: str, body=None, **headers: str | None) -> tuple[int, dict[str, str], bytes]:
        """Status, headers and body. Headers with None are left out."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=30)
        sent = {"Host": f"127.0.0.1:{self.port}"} | {key.replace("_", "-"): value for key, value in headers.items()}
        with contextlib.closing(connection):
            connection.putrequest(method, path, skip_host=True)
            content = body if isinstance(body, bytes) or body is None else json.dumps(body).encode()
            for key, value in sent.items():
                if value is not None:
                    connection.putheader(key, value)
            if content is not None:
                connection.putheader("Content-Length", str(len(content)))
            connection.endheaders(content)
            answer = connection.getresponse()
            return answer.status, {key.lower(): value for key, value in answer.getheaders()}, answer.read()

    @property
    def cookie(self) -> str:
        status, headers, _ = self.ask("GET", f"/?{urlsplit(self.address).query}")
        assert status == 303
        return headers["set-cookie"].split(";")[0]

    def get(self, path: str, **headers: str | None) -> tuple[int, dict[str, str], bytes]:
        return self.ask("GET", path, **{"Cookie": self.cookie, **headers})

    def post(self, path: str, body, **headers: str | None) -> tuple[int, dict[str, str], bytes]:
        usual = {"Cookie": self.cookie, "Origin": self.root, "Content_Type": "application/json"}
        return self.ask("POST", path, body, **{**usual, **headers})

    def json(self, path: str):
        status, _, body = self.get(path)
        assert status == 200, body
        return json.loads(body)


@contextlib.contextmanager
def serving(*folders: Path, **how) -> Iterator[Serving]:
    server, bound, address = make(folders, **{"port": 0, **how})
    thread = threading.Thread(target=server.run, kwargs={"sockets": [bound]}, daemon=True)
    thread.start()
    while not server.started:
        time.sleep(0.01)
    try:
        yield Serving(address, server)
    finally:
        server.should_exit = True
        thread.join(10)
        bound.close()
        assert not thread.is_alive()
