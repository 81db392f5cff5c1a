"""Who may ask the server what: the token, the cookie, the names it answers to, and what every answer forbids a browser.

As Jupyter's: the printed address has a token, which a browser exchanges for a cookie that no script and no other site can use.
"""

from __future__ import annotations

import secrets
from collections.abc import Collection
from dataclasses import dataclass, field
from urllib.parse import parse_qsl, urlencode, urlsplit

from starlette.datastructures import Headers, MutableHeaders
from starlette.requests import cookie_parser
from starlette.responses import PlainTextResponse, RedirectResponse, Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

LOCAL = ("127.0.0.1", "localhost", "[::1]")
LARGEST_BODY = 2**16  # bytes of a request
POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data:; connect-src 'self'; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
HEADERS = {
    "content-security-policy": POLICY,
    "cache-control": "no-store",
    "x-content-type-options": "nosniff",
    "x-frame-options": "DENY",
    "referrer-policy": "same-origin",
    "cross-origin-opener-policy": "same-origin",
    "cross-origin-resource-policy": "same-origin",
}
CLOSED = "This page is for whoever started it. Open the address that `nanostudy ui` printed: it has a token.\n"


@dataclass(frozen=True)
class Keys:
    """Two secrets: one is in the printed address, the other in the cookie that it is exchanged for."""

    port: int  # cookies are shared by all ports of a name, so each has its own
    token: str = field(default_factory=lambda: secrets.token_urlsafe(32))
    cookie: str = field(default_factory=lambda: secrets.token_urlsafe(32))

    @property
    def cookie_name(self) -> str:
        return f"nanostudy-{self.port}"


class Guard:
    """Lets through to `app` what has the cookie and comes from the app's own pages."""

    def __init__(self, app: ASGIApp, keys: Keys, names: Collection[str] = ()) -> None:
        """`names`: of this computer, without a port, besides those of the loopback."""
        self.app, self.keys, self.names = app, keys, {name.lower() for name in (*LOCAL, *names)}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            await self.app(scope, receive, send)
            return
        if scope["type"] != "http":  # there is no WebSocket here
            await send({"type": "websocket.close", "code": 1008})
            return

        async def send_sealed(message: Message) -> None:
            if message["type"] == "http.response.start":
                MutableHeaders(scope=message).update(HEADERS)
            await send(message)

        refused = self.refusal(scope)
        await (refused or self.app)(scope, limited(receive), send_sealed)

    def refusal(self, scope: Scope) -> Response | None:
        """What is answered instead of the app; None where it may answer."""
        headers = Headers(scope=scope)
        if len(headers.getlist("host")) != 1 or _name(headers["host"]) not in self.names:
            # another site's name that was made to point here, as in DNS rebinding
            return PlainTextResponse("This server has another name; --allow-host adds one.\n", 421)
        if token := self.given_token(scope):
            return self.exchange(scope, token)
        if not _same(cookie_parser(headers.get("cookie", "")).get(self.keys.cookie_name, ""), self.keys.cookie):
            return PlainTextResponse(CLOSED, 403)
        if scope["method"] in ("GET", "HEAD"):
            return None
        if not headers.get("content-length", "0").isdigit() or int(headers.get("content-length", "0")) > LARGEST_BODY:
            return PlainTextResponse("This is too long.\n", 413)
        return _foreign(headers)

    def given_token(self, scope: Scope) -> str | None:
        query = dict(parse_qsl(scope["query_string"].decode("latin-1")))
        return query.get("token") if scope["method"] == "GET" else None

    def exchange(self, scope: Scope, token: str) -> Response:
        """The cookie, and the address without its token, so that no history has it."""
        if not _same(token, self.keys.token):
            return PlainTextResponse(CLOSED, 403)
        query = [(key, value) for key, value in parse_qsl(scope["query_string"].decode("latin-1")) if key != "token"]
        place = "/" + scope["path"].lstrip("/")  # never //another.site
        answer = RedirectResponse(place + (f"?{urlencode(query)}" if query else ""), 303)
        answer.set_cookie(self.keys.cookie_name, self.keys.cookie, httponly=True, samesite="strict")
        return answer


def limited(receive: Receive) -> Receive:
    """A request's body up to LARGEST_BODY; a longer one ends the connection."""
    left = LARGEST_BODY

    async def receive_some() -> Message:
        nonlocal left
        message = await receive()
        left -= len(message.get("body", b""))
        return message if left >= 0 else {"type": "http.disconnect"}

    return receive_some


def _foreign(headers: Headers) -> Response | None:
    """Refuses a POST that no page of this server made: browsers name the page's origin, and ask first where a page sends JSON elsewhere."""
    origin = urlsplit(headers.get("origin", "null"))
    own = origin.netloc.lower() == headers["host"].lower() and origin.scheme in ("http", "https")
    if not own or headers.get("sec-fetch-site", "same-origin") != "same-origin":
        return PlainTextResponse("Only this server's own pages may ask for this.\n", 403)
    if headers.get("content-type", "").partition(";")[0].strip().lower() != "application/json":
        return PlainTextResponse("Send JSON (application/json).\n", 403)
    return None


def _name(host: str) -> str:
    """A Host header's name, without its port: behind `ssh -L` that may be any."""
    name, colon, port = host.lower().rpartition(":")
    return name if colon and port.isdigit() else host.lower()


def _same(a: str, b: str) -> bool:
    """In a time that says nothing about where they differ."""
    return secrets.compare_digest(a.encode(), b.encode())
