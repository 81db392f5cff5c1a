"""Every refusal: what another site, another user of this computer, and a mistake may try."""

import json
import re
import socket
from pathlib import Path

import pytest
from serving import Serving, serving

from nanostudy.errors import NanostudyError, UsageError
from nanostudy.ui.security import LARGEST_BODY

JSON = {"experiments": [1], "length": 1}


@pytest.fixture(scope="module")
def ui(studied) -> Serving:
    with serving(studied) as running:
        yield running


def test_without_the_cookie_nothing_is_told(ui):
    for path in ("/", "/static/ui.js", "/api/places", "/api/1/events", "/api/1/report", "/nowhere"):
        for cookie in (
            None,
            f"nanostudy-{ui.port}=",
            f"nanostudy-{ui.port}=guess",
            ui.cookie.replace(str(ui.port), "1"),
        ):
            status, _, body = ui.ask("GET", path, Cookie=cookie)
            assert status == 403, path
            assert b"token" in body
            assert b"small" not in body
    assert ui.ask("POST", "/api/1/sample", JSON, Origin=ui.root, Content_Type="application/json")[0] == 403


def test_the_token_is_exchanged_for_a_cookie_that_no_script_and_no_other_site_can_use(ui):
    query = ui.address.split("?")[1]
    status, headers, _ = ui.ask("GET", f"/?{query}&place=1")
    assert (status, headers["location"]) == (303, "/?place=1")
    name, *flags = headers["set-cookie"].split("; ")
    assert name.startswith(f"nanostudy-{ui.port}=")
    assert query.split("=")[1] not in name
    assert {flag.lower() for flag in flags} >= {"httponly", "samesite=strict", "path=/"}
    assert not any(flag.lower().startswith("domain") for flag in flags)
    assert ui.get("/")[0] == 200
    for wrong in ("", "x", query.split("=")[1] + "x", ui.cookie.split("=")[1]):
        status, headers, _ = ui.ask("GET", f"/?token={wrong}")
        assert status == 403
        assert "set-cookie" not in headers
    assert ui.ask("GET", f"//evil.example/?{query}")[1]["location"].startswith("/evil.example")


@pytest.mark.parametrize(
    "host",
    [
        "evil.example",
        "evil.example:80",
        "127.0.0.1.evil.example",
        "",
        "localhost.evil",
        "0.0.0.0",
        "[::]",
        "2130706433",
    ],
)
def test_another_name_is_refused(ui, host):
    """As DNS rebinding would ask."""
    assert ui.get("/", Host=host)[0] == 421
    assert ui.ask("GET", f"/?{ui.address.split('?')[1]}", Host=host)[0] == 421


def test_names_of_the_loopback_and_any_port_are_known(ui):
    """The port is another behind `ssh -L`."""
    for host in ("localhost", "LOCALHOST:9999", f"127.0.0.1:{ui.port}", "[::1]:80"):
        assert ui.get("/", Host=host)[0] == 200


def test_two_hosts_are_none(ui):
    with socket.create_connection(("127.0.0.1", ui.port)) as connection:
        connection.sendall(b"GET / HTTP/1.1\r\nHost: localhost\r\nHost: evil.example\r\nConnection: close\r\n\r\n")
        assert re.match(rb"HTTP/1.1 4(00|21) ", connection.recv(4096))


def test_a_post_from_elsewhere_is_refused(ui):
    there = f"127.0.0.1:{ui.port}"
    for origin in (
        None,
        "null",
        "http://evil.example",
        f"http://localhost:{ui.port}",
        "http://127.0.0.1:1",
        f"ftp://{there}",
        f"http://{there}.evil.example",
    ):
        assert ui.post("/api/1/sample", JSON, Origin=origin)[0] == 403, origin
    for site in ("cross-site", "same-site", "none"):
        assert ui.post("/api/1/sample", JSON, Sec_Fetch_Site=site)[0] == 403
    assert ui.post("/api/1/sample", JSON, Sec_Fetch_Site="same-origin")[0] == 200
    assert ui.post("/api/1/sample", JSON, Host="localhost:9", Origin="http://localhost:9")[0] == 200


@pytest.mark.parametrize(
    "kind", [None, "text/plain", "application/x-www-form-urlencoded", "multipart/form-data", "application/jsonx"]
)
def test_a_post_that_is_no_json_is_refused(ui, kind):
    """What a form of another site could send."""
    assert ui.post("/api/1/sample", JSON, Content_Type=kind)[0] == 403


def test_every_answer_forbids_the_same(ui):
    answers = [
        ui.get("/"), ui.get("/static/ui.js"), ui.get("/nowhere"), ui.get("/", Host="evil.example"), ui.ask("GET", "/"),
        ui.post("/api/1/sample", JSON), ui.post("/api/1/sample", {}), ui.post("/api/1/sample", JSON, Origin="null"),
    ]  # fmt: skip
    assert {status for status, _, _ in answers} == {200, 400, 403, 404, 421}
    for _, headers, _ in answers:
        policy = dict(part.split(" ", 1) for part in headers["content-security-policy"].split("; "))
        assert policy == {
            **{"default-src": "'none'", "script-src": "'self'", "style-src": "'self'", "connect-src": "'self'"},
            **{"img-src": "'self' data:", "base-uri": "'none'", "form-action": "'none'", "frame-ancestors": "'none'"},
        }
        assert headers["cache-control"] == "no-store"
        assert headers["x-content-type-options"] == "nosniff"
        assert headers["x-frame-options"] == "DENY"
        assert "server" not in headers
        assert not any(name.startswith("access-control") for name in headers)


def test_it_can_change_nothing(ui):
    for method in ("PUT", "DELETE", "PATCH", "OPTIONS", "POST"):
        for path in ("/", "/api/places", "/api/1/events", "/static/ui.js"):
            status, headers, _ = ui.ask(
                method, path, b"{}", Cookie=ui.cookie, Origin=ui.root, Content_Type="application/json"
            )
            assert status == 405, (method, path)
            assert "access-control-allow-origin" not in headers


def test_a_socket_of_the_web_is_refused(ui):
    status, _, _ = ui.get(
        "/",
        Connection="Upgrade",
        Upgrade="websocket",
        Sec_WebSocket_Version="13",
        Sec_WebSocket_Key="AAAAAAAAAAAAAAAAAAAAAA==",
    )
    assert status in (200, 403)  # an ordinary answer: no socket


@pytest.mark.parametrize(
    "name",
    [
        "../server.py",
        "..%2fserver.py",
        "%2e%2e/server.py",
        "ui.html",
        "page.html",
        "ui.py",
        "x.js",
        "ui.js%00",
        "/etc/passwd",
    ],
)
def test_no_other_file_is_served(ui, name):
    assert ui.get(f"/static/{name}")[0] == 404


@pytest.mark.parametrize("place", ["0", "2", "-1", "1x", "..", "%2e%2e", "99999999999999999999"])
def test_places_have_numbers(ui, place):
    assert ui.get(f"/api/{place}/report")[0] in (404, 409)
    assert ui.post(f"/api/{place}/sample", JSON)[0] in (404, 409)


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        ({}, "experiments are numbers"),
        ([1], "a request is an object"),
        ({"experiments": []}, "one at least"),
        ({"experiments": ["../../etc"]}, "are numbers"),
        ({"experiments": [True]}, "are numbers"),
        ({"experiments": [1, 1]}, "different"),
        ({"experiments": list(range(1, 66))}, "at most 64"),
        ({"experiments": [9]}, "no experiment 9"),
        ({"experiments": [1], "prompt": "a" * 2001}, "2,000 characters"),
        ({"experiments": [1], "prompt": 5}, "prompt is a text"),
        ({"experiments": [1], "prompt": "é"}, "does not know the character"),
        ({"experiments": [1], "length": 2001}, "length is a whole number from 1 to 2,000"),
        ({"experiments": [1], "length": 0}, "length"),
        ({"experiments": [1], "seed": -1}, "seed"),
        ({"experiments": [1], "temperature": -1}, "temperature"),
        ({"experiments": [1], "temperature": "hot"}, "numbers, or null"),
        ({"experiments": [1], "top_p": 2}, "top_p"),
        ({"experiments": [1], "top_k": 0}, "top_k"),
        ({"experiments": [1], "exact": True}, "no 'exact'"),
        ({"experiments": [1], "which": "../../x"}, "no 'which'"),
    ],
)  # fmt: skip
def test_what_cannot_be_written_is_refused_in_words(ui, content, problem):
    status, _, body = ui.post("/api/1/sample", content)
    assert status == 400
    assert problem.lower() in json.loads(body)["problem"].lower()


@pytest.mark.parametrize(
    "body",
    [b"", b"{", b'{"experiments": [NaN]}', b'{"experiments": [1], "temperature": Infinity}', b"[" * 60_000, b"\xff"],
)
def test_what_is_no_json_is_refused(ui, body):
    assert ui.post("/api/1/sample", body)[0] == 400


def test_a_large_body_is_refused(ui):
    assert ui.post("/api/1/sample", b" " * (LARGEST_BODY + 1))[0] == 413
    assert ui.get("/")[0] == 200


def test_only_this_computer_is_served_unless_names_are_given(studied):
    with pytest.raises(UsageError, match="--allow-host"), serving(studied, host="0.0.0.0"):
        pass
    with serving(studied) as local:
        assert local.server.config.app.names == {"127.0.0.1", "localhost", "[::1]"}
    with serving(studied, host="0.0.0.0", names=["lab.example"]) as shared:
        assert shared.address.startswith("http://lab.example:")
        assert shared.get("/", Host="LAB.example:80")[0] == 200
        assert shared.get("/", Host="evil.example")[0] == 421


def test_it_listens_to_the_loopback_alone(ui):
    [bound] = {sock.getsockname()[0] for server in ui.server.servers for sock in server.sockets}
    assert bound == "127.0.0.1"


def test_a_port_that_is_taken_is_said(studied, ui):
    with pytest.raises(NanostudyError, match="--port"), serving(studied, port=ui.port):
        pass


def test_a_folder_that_is_no_study_is_refused(tmp_path):
    with pytest.raises(UsageError, match="no study's folder"), serving(tmp_path):
        pass


def test_weights_that_are_no_safetensors_are_not_opened(studied, tmp_path):
    import shutil

    shutil.copytree(studied, tmp_path / "small")
    [name] = [
        folder.name
        for folder in (tmp_path / "small").iterdir()
        if folder.is_dir() and "E8" in folder.name and folder.name.endswith("D0_s1")
    ]
    (tmp_path / "small" / name / "best.safetensors").write_bytes(b"\x80\x04cos\nsystem\n(S'touch /tmp/opened'\ntR.")
    with serving(tmp_path / "small") as ui:
        status, _, body = ui.post("/api/1/sample", JSON)
        assert status == 409
        assert "damaged" in json.loads(body)["problem"]
        assert not Path("/tmp/opened").exists()
