"""The server: its pages, what it tells while a study runs, and what it lets a browser ask. It starts, stops and deletes nothing.

Stores are read by one thread, reports made by another, samples written by two: the server answers meanwhile.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import math
import re
import threading
import time
from collections import defaultdict
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from importlib import resources
from typing import Any, TypeVar

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request as HTTPRequest
from starlette.responses import HTMLResponse, JSONResponse, Response, StreamingResponse
from starlette.routing import Route
from starlette.types import ASGIApp

from nanostudy.errors import NanostudyError, UsageError
from nanostudy.ui.blind import Tally
from nanostudy.ui.live import EVERY, Place, Places, State, changes, chosen
from nanostudy.ui.playground import AT_ONCE, MOST_TEXTS, Playground, Request, are_numbers
from nanostudy.ui.security import Guard, Keys

T = TypeVar("T")

QUIET = 15.0  # seconds after which a watcher gets a sign of life, so that no proxy closes the connection
PROVISIONAL_SHARE = 20  # effects so far take at most 1 / 20 of the time
MOMENT = 0.02  # seconds for which lines are gathered
KINDS = {"js": "text/javascript", "css": "text/css"}
FOLDERS = (
    ("nanostudy.ui", "static"),
    ("nanostudy.reporting", "template"),
)  # packages, and their folders of files for browsers


class Server:
    """What the routes share."""

    def __init__(self, places: Places) -> None:
        self.places, self.playground = places, Playground()
        self.reader, self.reporter, self.writers = (ThreadPoolExecutor(threads) for threads in (1, 1, AT_ONCE))
        self.tallies: defaultdict[int, Tally] = defaultdict(Tally)
        self.effects: dict[int, State | None] = {}  # so far, by place
        # by place: how many had finished when the last ones were made, and when the next may be
        self.effects_due: defaultdict[int, tuple[int, float]] = defaultdict(lambda: (1, 0.0))
        self.reports: dict[int, tuple[Any, State]] = {}  # with what they were made from
        self.bundle = ""
        self.ending: Callable[[], bool] = lambda: False  # so that no watcher keeps it

    async def read(self, work: Callable[[], T]) -> T:
        return await asyncio.get_running_loop().run_in_executor(self.reader, work)

    async def report(self, work: Callable[[Any], T]) -> T:
        """`work` gets the module of reports. The thread imports it, which takes a while."""

        def with_reports() -> T:
            from nanostudy.ui import reports

            return work(reports)

        return await asyncio.get_running_loop().run_in_executor(self.reporter, with_reports)

    async def place(self, request: HTTPRequest) -> Place:
        return await self.read(lambda: self.places[int(request.path_params["place"])])

    async def content(self, request: HTTPRequest) -> Any:
        """A request's JSON. Raises UsageError."""
        try:
            return json.loads(await request.body(), parse_constant=_no_number)
        except (ValueError, RecursionError):
            raise UsageError("This is no JSON.") from None

    # --- pages and files

    async def page(self, request: HTTPRequest) -> Response:
        return HTMLResponse((resources.files("nanostudy.ui") / "static" / "ui.html").read_text(encoding="utf-8"))

    async def file(self, request: HTTPRequest) -> Response:
        name = request.path_params["name"]
        match = re.fullmatch(r"[a-z]+\.(js|css)", name)
        for package, folder in FOLDERS:
            path = resources.files(package) / folder / name
            if match and path.is_file():
                return Response(path.read_bytes(), media_type=KINDS[match[1]])
        raise HTTPException(404)

    async def drawing(self, request: HTTPRequest) -> Response:
        """The scripts that draw figures, which the package altair has."""
        self.bundle = self.bundle or await self.report(lambda reports: reports.scripts())
        return Response(self.bundle, media_type=KINDS["js"])

    # --- what there is, and how it goes

    async def list(self, request: HTTPRequest) -> Response:
        return JSONResponse(await self.read(lambda: [place.brief() for place in self.places.find()]))

    async def events(self, request: HTTPRequest) -> Response:
        return StreamingResponse(self.watch(await self.place(request)), media_type="text/event-stream")

    async def watch(self, place: Place) -> AsyncIterator[str]:
        """Server-sent events: a whole `state`, then `changes` of it; `effects` so far; a `problem` where it cannot be read."""
        before: State | None = None
        effects: State | None = None
        problem, sent_at = "", time.monotonic()
        while not self.ending():
            events: list[tuple[str, Any]] = []
            try:
                now = await self.read(place.state)
                if before is None or len(before["rows"]) != len(now["rows"]) or problem:
                    events.append(("state", now))
                elif now is not before and (new := changes(before, now)):
                    events.append(("changes", new))
                before, problem = now, ""
                self.begin_effects(place, now)
            except NanostudyError as error:
                if str(error) != problem:
                    problem = str(error)
                    events.append(("problem", problem))
            if (so_far := self.effects.get(place.number)) is not effects:
                effects = so_far
                events.append(("effects", effects))
            if events or time.monotonic() - sent_at > QUIET:
                sent_at = time.monotonic()
                yield "".join(f"event: {name}\ndata: {_json(value)}\n\n" for name, value in events) or ": alive\n\n"
            await asyncio.sleep(EVERY)

    def begin_effects(self, place: Place, state: State) -> None:
        """Computes the effects so far in another thread, where more has finished since, and seldom enough."""
        finished = state["counts"].get("finished", 0)
        before, due = self.effects_due[place.number]
        if state["state"] != "running" or finished <= before or time.monotonic() < due:
            return
        self.effects_due[place.number] = finished, math.inf
        self.reporter.submit(self.make_effects, place, finished)

    def make_effects(self, place: Place, finished: int) -> None:
        from nanostudy.ui.reports import effects_so_far

        begun = time.thread_time()
        with contextlib.suppress(NanostudyError):  # such as a file that is being replaced
            self.effects[place.number] = effects_so_far(place.path)
        self.effects_due[place.number] = finished, time.monotonic() + PROVISIONAL_SHARE * (time.thread_time() - begun)

    async def results(self, request: HTTPRequest) -> Response:
        """The report's sections, made again where the store changed; while a study runs, its table and curves."""
        place = await self.place(request)
        state, key = await self.read(lambda: (place.state(), place.version))

        def made(reports: Any) -> State:
            if state["state"] in ("running", "waiting"):
                return reports.live(state)
            if self.reports.get(place.number, (None,))[0] != key:
                self.reports[place.number] = key, reports.report(place.path)
            return self.reports[place.number][1]

        return Response(_json(await self.report(made)), media_type="application/json")

    # --- the playground

    async def sample(self, request: HTTPRequest) -> Response:
        """JSON lines (see Playground.write) until all is written or the browser closes the connection."""
        place, wanted = await self.place(request), Request.of(await self.content(request))
        return await self.streamed(await self.lines(place, wanted))

    async def compare(self, request: HTTPRequest) -> Response:
        """As `sample`, of two of the models, which are called left and right."""
        place, wanted = await self.place(request), Request.of(await self.content(request))
        key, pair = self.tallies[place.number].draw(wanted.experiments)
        lines = await self.lines(place, replace(wanted, experiments=(pair.left, pair.right)))
        sides = {pair.left: "left", pair.right: "right"}

        def blind() -> Iterator[State]:
            next(lines)  # numbers of the texts
            yield {"comparison": key}
            for line in lines:
                if "experiments" in line:
                    line["experiments"] = [sides[number] for number in line["experiments"]]
                yield line

        return await self.streamed(blind())

    async def answer(self, request: HTTPRequest) -> Response:
        """Who wrote what, once the answer is in, and the tally."""
        place, content = await self.place(request), await self.content(request)
        if not isinstance(content, dict) or set(content) != {"comparison", "better"}:
            raise UsageError("An answer has a comparison and says which is better.")
        pair = self.tallies[place.number].answer(str(content["comparison"]), content["better"])
        return JSONResponse({"left": pair.left, "right": pair.right, "tally": await self.summary(place)})

    async def tally(self, request: HTTPRequest) -> Response:
        return JSONResponse(await self.summary(await self.place(request)))

    async def summary(self, place: Place) -> State:
        losses = {row["id"]: row["val_loss"] for row in (await self.read(place.state))["rows"]}
        return await self.report(lambda _: self.tallies[place.number].summary(losses))

    async def share(self, request: HTTPRequest) -> Response:
        """Today's page with texts that were written here, by their numbers, as a file to keep."""
        place, content = await self.place(request), await self.content(request)
        numbers = content.get("texts") if isinstance(content, dict) else None
        if not are_numbers(numbers) or len(numbers) > MOST_TEXTS:
            raise UsageError("texts are numbers of texts that were written here.")
        texts = [self.playground.texts[number] for number in numbers if number in self.playground.texts]
        if len(texts) < len(numbers):
            raise UsageError("Some of these texts are forgotten: write them again, then share.")
        names = {row["id"]: row["name"] for row in (await self.read(place.state))["rows"]}
        named = [
            {"name": names[one.experiment], "prompt": one.prompt, "text": one.text}
            for one in texts
            if one.experiment in names
        ]
        page = await self.report(lambda reports: reports.static_page(place.path, named))
        return HTMLResponse(page, headers={"content-disposition": 'attachment; filename="report.html"'})

    async def lines(self, place: Place, wanted: Request) -> Iterator[State]:
        state = await self.read(place.state)
        folders = {row["id"]: place.folder(row["name"]) for row in chosen(state, wanted.experiments)}
        return self.playground.write(wanted, folders)

    async def streamed(self, lines: Iterator[State]) -> Response:
        """Takes turns with other requests. What is wrong from the beginning is an answer of its own."""
        lock = threading.Lock()

        def some() -> list[State]:
            """The next lines: as many as come within a moment."""
            with lock:
                begun, taken = time.monotonic(), []
                for line in lines:
                    taken.append(line)
                    if time.monotonic() - begun > MOMENT:
                        break
                return taken

        def close() -> None:
            with lock:
                lines.close()  # type: ignore[attr-defined]

        loop = asyncio.get_running_loop()
        first = await loop.run_in_executor(self.writers, some)

        async def text() -> AsyncIterator[str]:
            taken = first
            try:
                while taken:
                    yield "".join(f"{_json(line)}\n" for line in taken)
                    taken = await loop.run_in_executor(self.writers, some)
                yield '{"end":true}\n'
            except NanostudyError as problem:
                yield f"{_json({'problem': str(problem)})}\n"
            finally:
                self.writers.submit(close)

        return StreamingResponse(text(), media_type="application/x-ndjson")


def app(server: Server, keys: Keys, names: Sequence[str] = ()) -> ASGIApp:
    """`names`: of this computer, under which browsers may ask for it."""
    here = "/api/{place:int}"
    routes = [
        Route("/", server.page),
        Route("/static/{name}", server.file),
        Route("/static/draw/vega.js", server.drawing),
        Route("/api/places", server.list),
        Route(f"{here}/events", server.events),
        Route(f"{here}/report", server.results),
        Route(f"{here}/tally", server.tally),
        *(
            Route(f"{here}/{name}", getattr(server, name), methods=["POST"])
            for name in ("sample", "compare", "answer", "share")
        ),
    ]
    return Guard(Starlette(routes=routes, exception_handlers={NanostudyError: _wrong}), keys, names)


async def _wrong(request: HTTPRequest, problem: Exception) -> Response:
    return JSONResponse({"problem": str(problem)}, 400 if isinstance(problem, UsageError) else 409)


def _json(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False, separators=(",", ":"), allow_nan=False)


def _no_number(text: str) -> Any:
    raise ValueError(f"{text} is no JSON")
