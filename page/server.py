"""The page's own server: files, and an API for the browser. It listens on this machine alone.

Whoever asks must be the page itself: the Host is this server's, and the Origin, where a browser sends one, is
too. So neither another site nor a name that was made to lead here can use the key.
"""

from __future__ import annotations

import asyncio
import io
import json
import re
from collections.abc import Awaitable, Callable, Mapping
from pathlib import Path
from typing import Any

from PIL import Image
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import FileResponse, JSONResponse, Response
from starlette.routing import Mount, Route, WebSocketRoute
from starlette.staticfiles import StaticFiles
from starlette.types import ASGIApp, Message, Receive, Scope, Send
from starlette.websockets import WebSocket

from live.wire import Closed
from page.backend import Backend, HasLive, Json, PageError
from worker.http.socket import Socket
from worker.pictures.embedded import text_of
from worker.pictures.parameters import read

STATIC = Path(__file__).parent / "static"

MAX_JOB, MAX_PICTURE = 20 << 20, 60 << 20
"""Bytes of a job, as RunPod allows, and of a picture that is dropped."""

MAX_REASON = 123
"""Bytes of the reason why a WebSocket is closed, by its protocol."""

MAX_PIXELS = 200_000_000

EXACT = 2**53 - 1
"""The largest whole number that JavaScript keeps; a larger one comes and goes as text."""

HEADERS = {
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; "
    "img-src 'self' data: blob:; media-src 'self' blob:; connect-src 'self'; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Permissions-Policy": "camera=(self), display-capture=(self), microphone=(), geolocation=()",
    "Cache-Control": "no-store",
}
"""What every answer says. No script and no style stands in the document itself."""

SAFE = ("GET", "HEAD")

LINK = ("navigate", "document")
"""What a browser says of itself when a person follows a link to here: the other site sees nothing of it."""


class NotThePage(PageError):
    """The request does not come from the page."""

    code = "NOT_THE_PAGE"
    status = 403


class BadRequest(PageError):
    """What the browser sent cannot be used."""

    code = "INVALID_INPUT"
    status = 400


class Guard:
    """Lets only the page itself ask, and puts `HEADERS` on every answer."""

    def __init__(self, app: ASGIApp, hosts: frozenset[str]) -> None:
        """`hosts`: the values of Host that mean this server, such as `127.0.0.1:7860`."""
        self._app, self._hosts = app, hosts

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Passes a request on, or refuses it."""
        if scope["type"] == "lifespan":
            await self._app(scope, receive, send)
            return

        async def guarded(message: Message) -> None:
            if message["type"] == "http.response.start":
                ours = [(name.lower().encode(), text.encode()) for name, text in HEADERS.items()]
                names = {name for name, _ in ours}
                rest = [pair for pair in message.get("headers", []) if pair[0] not in names]
                message = {**message, "headers": [*rest, *ours]}
            await send(message)

        headers = {
            name.decode("latin-1"): text.decode("latin-1") for name, text in scope["headers"]
        }
        if fault := self._fault(scope, headers):
            if scope["type"] == "websocket":
                await send({"type": "websocket.close", "code": 1008})
            else:
                await _refusal(NotThePage(fault))(scope, receive, guarded)
            return
        await self._app(scope, receive, guarded)

    def _fault(self, scope: Scope, headers: Mapping[str, str]) -> str | None:
        """Why a request is not the page's; None if it is."""
        if headers.get("host", "") not in self._hosts:
            return "the address is not the page's own"
        origin, site = headers.get("origin"), headers.get("sec-fetch-site", "none")
        changes = scope["type"] == "websocket" or scope["method"] not in SAFE
        if origin is None and changes:
            return "the request names no origin"
        if origin is not None and origin not in {f"http://{host}" for host in self._hosts}:
            return "the request comes from another site"
        followed = (headers.get("sec-fetch-mode"), headers.get("sec-fetch-dest"))
        if site not in ("none", "same-origin") and (changes or followed != LINK):
            return "the request comes from another site"
        return None


def new_app(backend: Backend, port: int) -> ASGIApp:
    """The page over a backend, for the port that it is reached by."""

    def of_job(ask: Callable[[str], Awaitable[Json]]) -> Callable[[Request], Awaitable[Response]]:
        async def answer(request: Request) -> Response:
            return _json(await ask(request.path_params["job_id"]))

        return answer

    async def index(_: Request) -> Response:
        return FileResponse(STATIC / "index.html")

    async def about(_: Request) -> Response:
        return _json({**backend.about(), "live": isinstance(backend, HasLive)})

    async def run(request: Request) -> Response:
        return _json(await backend.run(_job_of(await _body(request, MAX_JOB))))

    async def health(_: Request) -> Response:
        return _json(await backend.health())

    app = Starlette(
        routes=[
            Route("/", index),
            Route("/api/about", about),
            Route("/api/health", health),
            Route("/api/run", run, methods=["POST"]),
            Route("/api/read", read_picture, methods=["POST"]),
            Route("/api/status/{job_id}", of_job(backend.status)),
            Route("/api/stream/{job_id}", of_job(backend.stream), methods=["POST"]),
            Route("/api/cancel/{job_id}", of_job(backend.cancel), methods=["POST"]),
            WebSocketRoute("/api/live", live_socket(backend)),
            Mount("/static", StaticFiles(directory=STATIC)),
        ],
        exception_handlers={PageError: _failed, HTTPException: _failed, Exception: _failed},
    )
    return Guard(app, frozenset({f"127.0.0.1:{port}", f"localhost:{port}"}))


def live_socket(backend: Backend) -> Callable[[WebSocket], Awaitable[None]]:
    """The browser's end of a session of live frames; why there is none is the reason of its closing."""

    async def serve(socket: WebSocket) -> None:
        await socket.accept()
        browser, reason = Socket(socket), ""
        if not isinstance(backend, HasLive):
            reason = "this backend has no live frames"
        else:
            try:
                await backend.live(browser.receive, browser.send)
            except PageError as error:
                reason = str(error).encode()[:MAX_REASON].decode(errors="ignore")
            except Closed:
                return
        await browser.close(1011 if reason else 1000, reason)

    return serve


async def read_picture(request: Request) -> Response:
    """The request that a picture was drawn with, from the text in it, and the hashes that it names."""
    body = await _body(request, MAX_PICTURE)
    return _json(await asyncio.to_thread(_read, body))


def _read(body: bytes) -> Json:
    try:
        with Image.open(io.BytesIO(body), formats=("PNG", "JPEG", "WEBP")) as picture:
            if picture.width * picture.height > MAX_PIXELS:
                raise BadRequest("the picture is too large")
            text = text_of(picture)
    except BadRequest:
        raise
    except Exception as error:
        raise BadRequest("this is no PNG, JPEG or WebP picture") from error
    if not text:
        raise BadRequest(
            "the picture holds no parameters", "Some sites and programs take them out."
        )
    found = read(text)
    return {
        "input": found.input,
        "hashes": found.hashes,
        "unused": found.unused,
        "warnings": found.warnings,
    }


async def _body(request: Request, limit: int) -> bytes:
    pieces, size = [], 0
    async for piece in request.stream():
        size += len(piece)
        if size > limit:
            raise BadRequest(f"it is over {limit >> 20} MB", "Send less at once.")
        pieces.append(piece)
    return b"".join(pieces)


def _job_of(body: bytes) -> Json:
    """What the browser may send for a job: its input, and its policy."""
    try:
        job = json.loads(body)
    except (ValueError, RecursionError) as error:
        raise BadRequest("the body is no JSON") from error
    if not isinstance(job, dict) or not isinstance(job.get("input"), dict):
        raise BadRequest("input is missing")
    given = job["input"]
    if isinstance(seed := given.get("seed"), str) and re.fullmatch(r"-?\d{1,20}", seed):
        given["seed"] = int(seed)
    return {name: job[name] for name in ("input", "policy") if name in job}


def _seeds_as_texts(value: Any) -> Any:
    """The value with each whole number that JavaScript would round as text: seeds may have 64 bits."""
    if isinstance(value, dict):
        return {name: _seeds_as_texts(one) for name, one in value.items()}
    if isinstance(value, list):
        return [_seeds_as_texts(one) for one in value]
    return str(value) if type(value) is int and abs(value) > EXACT else value


def _json(value: Any, status: int = 200) -> Response:
    # In ASCII, since an answer may hold half a surrogate pair, which UTF-8 cannot say.
    text = json.dumps(_seeds_as_texts(value), separators=(",", ":"))
    return Response(text, status, media_type="application/json")


def _refusal(error: PageError) -> Response:
    return JSONResponse({"error": str(error)}, error.status)


async def _failed(_: Request, error: Exception) -> Response:
    if isinstance(error, PageError):
        return _refusal(error)
    if isinstance(error, HTTPException):
        return _json({"error": f"HTTP_{error.status_code}: {error.detail}."}, error.status_code)
    return _json({"error": "INTERNAL: the page's server failed; its log says why."}, 500)
