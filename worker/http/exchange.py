"""One request to the server and its answer: whole, or as server-sent events."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncIterator, Coroutine, Mapping
from contextlib import asynccontextmanager
from typing import Any, TypeVar

from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from lora.errors import CodedError
from validation import InvalidInput
from worker.http.errors import BodyTooLarge, Busy, ending
from worker.openai_answers import error_answer, status_of
from worker.pictures.outputs import sendable

Result = TypeVar("Result")

BEAT = 15.0
"""Seconds of silence after which a stream has a comment: proxies cut a connection that says nothing."""

PATIENCE = 60.0
"""Seconds that a client may take to send, or to take, each piece; then it counts as gone."""


EVENTS = [
    (b"content-type", b"text/event-stream; charset=utf-8"),
    (b"cache-control", b"no-cache"),
    (b"x-accel-buffering", b"no"),  # nginx and its like must not hold events back
]
"""Headers of a stream."""


class Json(Response):
    """A value as JSON, in ASCII."""

    media_type = "application/json"

    def render(self, content: Any) -> bytes:
        """The bytes."""
        return json.dumps(sendable(content), allow_nan=False).encode()


class Exchange:
    """A request that came, and what is sent back."""

    def __init__(self, scope: Scope, receive: Receive, send: Send) -> None:
        self.request = Request(scope, receive)
        self.wants_events = False
        """Whether the answer, too, is an event; else it is JSON."""
        self.status = 0
        """The answer's HTTP status, once it has begun."""
        self._scope, self._receive, self._send = scope, receive, send
        self._streams, self._writing = False, asyncio.Lock()
        self._last = time.monotonic()

    def prefers_events(self) -> bool:
        """Whether the client says that it takes server-sent events."""
        return "text/event-stream" in self.request.headers.get("accept", "")

    async def read(self, limit_mb: float) -> dict[str, Any]:
        """The body, which is a JSON object. Raises: BodyTooLarge; InvalidInput; ClientDisconnect."""
        told, limit = self.request.headers.get("content-length", ""), limit_mb * 1e6
        size, body = int(told) if told.isdecimal() else 0, bytearray()
        stream = self.request.stream()
        while size <= limit:
            async with _patiently():
                piece = await anext(stream, None)
            if piece is None:
                return _object(body)
            body += piece
            size = max(size, len(body))
        raise BodyTooLarge(
            f"the body is over the limit of {limit_mb:g} MB", "Name pictures by URLs."
        )

    async def answer(self, content: Mapping[str, Any], status: int = 200) -> None:
        """Sends the whole answer."""
        if self.wants_events or self._streams:
            await self.event("answer", content)
            await self.close()
        else:
            await self.respond(Json(content, status))

    async def fail(self, error: CodedError) -> None:
        """Sends an error: by its status, or as an event where the answer has begun."""
        await self.refuse(error_answer(error), after=error.after if isinstance(error, Busy) else 0)

    async def refuse(self, body: Mapping[str, Any], after: int = 0) -> None:
        """Sends an error in OpenAI's shape. `after`: the seconds after which to ask again, if not 0."""
        if self._streams:
            await self.event("error", body)
            await self.close()
            return
        status = status_of(body["error"]["code"])
        headers = {"Retry-After": str(after or 1)} if status in (429, 503) else {}
        if status == 401:
            headers["WWW-Authenticate"] = "Bearer"
        await self.respond(Json(body, status, headers))

    async def respond(self, response: Response) -> None:
        """Sends a response."""
        self.status = response.status_code
        await response(self._scope, self._receive, self._send)

    async def event(self, name: str, value: Any) -> None:
        """Sends one server-sent event."""
        await self.write(f"event: {name}\ndata: {json.dumps(sendable(value))}\n\n")

    async def write(self, text: str) -> None:
        """Sends text of server-sent events, and before the first the head of the answer.

        Raises: ClientDisconnect if the client does not take it.
        """
        async with self._writing, _patiently():
            self._last = time.monotonic()
            if not self._streams:
                self._streams, self.status = True, 200
                await self._send({"type": "http.response.start", "status": 200, "headers": EVENTS})
            body = text.encode(errors="replace")
            await self._send({"type": "http.response.body", "body": body, "more_body": True})

    async def close(self) -> None:
        """Ends the events."""
        async with self._writing, _patiently():
            await self._send({"type": "http.response.body", "body": b"", "more_body": False})

    async def while_connected(
        self, work: Coroutine[Any, Any, Result], *, beats: bool = False
    ) -> Result:
        """What the work returns or raises. It is cancelled, and waited for, if the client hangs up, or if
        this task is cancelled.

        `beats`: silence is broken by a comment, which begins the events. Call it once the body is read.
        """
        task, gone = asyncio.create_task(work), asyncio.create_task(self._gone())
        try:
            while not (task.done() or gone.done()):
                await asyncio.wait({task, gone}, timeout=BEAT, return_when="FIRST_COMPLETED")
                if beats and not task.done() and time.monotonic() - self._last >= BEAT:
                    await self.write(": waiting\n\n")
        except asyncio.CancelledError:  # the server ends; the client is still told how its work did
            if this := asyncio.current_task():
                this.uncancel()
        finally:
            hung_up = gone.done()
            gone.cancel()
            if not task.done():
                task.cancel()
                await asyncio.wait({task})
        if not task.cancelled():
            return task.result()
        raise ClientDisconnect if hung_up else ending()

    async def _gone(self) -> None:
        while (await self._receive())["type"] != "http.disconnect":
            pass


@asynccontextmanager
async def _patiently() -> AsyncIterator[None]:
    """Raises: ClientDisconnect if the block takes longer than `PATIENCE`."""
    try:
        async with asyncio.timeout(PATIENCE):
            yield
    except TimeoutError:
        raise ClientDisconnect from None


def _object(body: bytearray) -> dict[str, Any]:
    try:
        value = json.loads(body)
    except (ValueError, RecursionError):
        raise InvalidInput("the body is no JSON", "docs/http.md shows requests.") from None
    if not isinstance(value, dict):
        raise InvalidInput("the body is no JSON object", "docs/http.md shows requests.")
    return value
