"""A load-balancing endpoint: each request goes straight to the HTTP server of a healthy worker.

What it does follows https://docs.runpod.io/serverless/load-balancing/overview.
"""

from __future__ import annotations

import asyncio
import hmac
import logging
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable, Iterable
from contextlib import ExitStack, asynccontextmanager, suppress
from dataclasses import dataclass
from typing import NamedTuple

import aiohttp
from starlette.datastructures import Headers
from starlette.requests import Request
from starlette.types import Message, Receive, Scope, Send
from starlette.websockets import WebSocket

from emulator.bodies import Json, read
from emulator.job import MB
from emulator.workers import Worker, WorkerPool

log = logging.getLogger(__name__)

PAYLOAD = 30 * MB
"""Bytes that a request or an answer may have."""

REQUEST_LIMIT, NO_WORKER = 330.0, 120.0
"""Seconds after which a request is cut off, and for which it waits for a healthy worker."""

LOOK, LOOKING = 0.2, 10.0
"""Seconds between two looks at a worker's /ping, and that one may take."""

AFFINITY = "x-runpod-worker-id"
"""The header by which an answer names its worker, and a request asks for the same one."""

OF_ONE_HOP = {"connection", "keep-alive", "transfer-encoding", "upgrade", "host", "content-length"}


@dataclass(frozen=True)
class Rules:
    """How the endpoint treats requests."""

    key: str | None = None
    """What clients must send as Bearer; None for nothing."""
    request_limit: float = REQUEST_LIMIT
    no_worker: float = NO_WORKER


class Refused(Exception):
    """The endpoint answers a request itself."""

    def __init__(self, status: int, text: str) -> None:
        self.status = status
        super().__init__(text)


class Taken(NamedTuple):
    """A worker that a request was given."""

    worker: Worker
    ended: Callable[[], object]
    """The worker has answered: the request no longer counts as under way, whatever its client still reads."""


class Balancer:
    """The endpoint as an ASGI application. `watch` must run beside it."""

    def __init__(self, pool: WorkerPool, rules: Rules) -> None:
        self._pool, self._rules = pool, rules
        self._healthy: set[str] = set()
        self._under_way: Counter[str] = Counter()

    async def watch(self) -> None:
        """Looks at each worker's /ping, time and again: 200 is healthy, everything else gets no requests."""
        timeout = aiohttp.ClientTimeout(LOOKING)
        async with aiohttp.ClientSession(timeout=timeout) as session:
            while True:
                for worker in list(self._pool.workers.values()):
                    await self._look(session, worker)
                self._healthy &= set(self._pool.workers)
                await asyncio.sleep(LOOK)

    async def _look(self, session: aiohttp.ClientSession, worker: Worker) -> None:
        status = 0
        with suppress(aiohttp.ClientError, TimeoutError):
            async with session.get(f"{_address(worker)}/ping") as response:
                status = response.status
        if status == 200 and self._pool.takes(worker.id):
            self._pool.heard_of(worker.id)
            self._healthy.add(worker.id)
        elif worker.id in self._healthy:
            self._healthy.discard(worker.id)
            log.info("%s is not healthy any more (%d)", worker.id, status)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Passes one request, or one WebSocket, to a worker."""
        try:
            self._check_key(Headers(scope=scope))
            async with self._chosen(Headers(scope=scope)) as taken:
                if scope["type"] == "websocket":
                    await self._pass_socket(WebSocket(scope, receive, send), taken)
                else:
                    await self._pass_request(scope, receive, send, taken)
        except Refused as refused:
            answer = Json({"error": str(refused)}, refused.status)
            if scope["type"] == "websocket":
                await WebSocket(scope, receive, send).send_denial_response(answer)
            else:
                await answer(scope, receive, send)

    def _check_key(self, headers: Headers) -> None:
        sent, key = headers.get("authorization", ""), self._rules.key
        if key and not hmac.compare_digest(sent.encode(), f"Bearer {key}".encode()):
            raise Refused(401, "unauthorized")

    @asynccontextmanager
    async def _chosen(self, headers: Headers) -> AsyncIterator[Taken]:
        """The worker that the request asks for, else the one with the fewest requests."""
        deadline = time.monotonic() + self._rules.no_worker
        while not (ids := [name for name in self._healthy if self._pool.takes(name)]):
            if time.monotonic() > deadline:
                raise Refused(400, "no workers available")
            await asyncio.sleep(LOOK / 4)
        wanted = headers.get(AFFINITY)
        name = wanted if wanted in ids else min(sorted(ids), key=lambda one: self._under_way[one])
        with ExitStack() as counted:
            self._under_way[name] += 1
            counted.callback(self._under_way.subtract, [name])
            yield Taken(self._pool.workers[name], counted.close)

    # --- requests -------------------------------------------------------------------------------

    async def _pass_request(self, scope: Scope, receive: Receive, send: Send, taken: Taken) -> None:
        request = Request(scope, receive)
        body, size = await read(request, PAYLOAD)
        if size > PAYLOAD:
            raise Refused(413, f"the payload has {size / MB:.1f} MB; {PAYLOAD // MB} are allowed")
        passing = asyncio.create_task(self._through(request, body, taken, send))
        gone = asyncio.create_task(_gone(receive))
        limit = self._rules.request_limit
        await asyncio.wait({passing, gone}, timeout=limit, return_when="FIRST_COMPLETED")
        gone.cancel()
        if passing.done():
            return passing.result()
        late = not gone.done()
        passing.cancel()
        (end,) = await asyncio.gather(passing, return_exceptions=True)
        if late and isinstance(end, _NotBegun):
            raise Refused(524, f"the request was cut off after {limit:g} s")
        if late:
            raise ConnectionResetError(
                "cut off"
            )  # so that the connection is closed in the answer's midst
        return None

    async def _through(self, request: Request, body: bytes, taken: Taken, send: Send) -> None:
        """Raises: Refused; _NotBegun if it is cancelled before the answer has begun."""
        begun, worker = False, taken.worker
        url = f"{_address(worker)}{request.url.path}"
        url += f"?{request.url.query}" if request.url.query else ""
        timeout = aiohttp.ClientTimeout(total=None)
        session = aiohttp.ClientSession(timeout=timeout, auto_decompress=False)
        try:
            async with (
                session,
                session.request(
                    request.method,
                    url,
                    data=body or None,
                    headers=_passed_on(request.headers.items()),
                    allow_redirects=False,
                ) as answer,
            ):
                if (answer.content_length or 0) > PAYLOAD:
                    raise Refused(502, f"the answer is over {PAYLOAD // MB} MB")
                begun, left = True, answer.content_length
                if left == 0:
                    taken.ended()
                await send(_head(answer, worker))
                async for piece in answer.content.iter_any():
                    if left is not None and (left := left - len(piece)) == 0:
                        taken.ended()  # before its client can know, whose next request finds it so
                    await send({"type": "http.response.body", "body": piece, "more_body": True})
                taken.ended()
                await send({"type": "http.response.body", "body": b"", "more_body": False})
        except aiohttp.ClientError as error:
            if begun:
                raise
            raise Refused(502, f"{worker.id} does not answer: {type(error).__name__}") from error
        except asyncio.CancelledError:
            raise (asyncio.CancelledError() if begun else _NotBegun()) from None

    # --- WebSockets -----------------------------------------------------------------------------

    async def _pass_socket(self, socket: WebSocket, taken: Taken) -> None:
        worker = taken.worker
        url = f"{_address(worker)}{socket.url.path}"
        own = {name for name, _ in socket.headers.items() if name.startswith("sec-websocket-")}
        headers = [(n, v) for n, v in _passed_on(socket.headers.items()) if n not in own]
        async with aiohttp.ClientSession() as session:
            try:
                inner = await session.ws_connect(url, headers=headers, max_msg_size=PAYLOAD)
            except aiohttp.WSServerHandshakeError as error:
                raise Refused(error.status, f"{worker.id} refuses the socket") from error
            except aiohttp.ClientError as error:
                raise Refused(502, f"{worker.id} does not answer") from error
            async with inner:
                await socket.accept(headers=[(AFFINITY.encode(), worker.id.encode())])
                both = {
                    asyncio.create_task(_to_worker(socket, inner)),
                    asyncio.create_task(_to_client(inner, socket)),
                }
                limit = self._rules.request_limit
                await asyncio.wait(both, timeout=limit, return_when="FIRST_COMPLETED")
                for task in both:
                    task.cancel()
                await asyncio.gather(*both, return_exceptions=True)
                taken.ended()
                with suppress(RuntimeError):  # the client has closed it
                    await socket.close(inner.close_code or 1001)


class _NotBegun(Exception):
    """The worker had not begun its answer."""


def _address(worker: Worker) -> str:
    return f"http://127.0.0.1:{worker.port}"


def _passed_on(headers: Iterable[tuple[str, str]]) -> list[tuple[str, str]]:
    return [(name, value) for name, value in headers if name.lower() not in OF_ONE_HOP]


def _head(answer: aiohttp.ClientResponse, worker: Worker) -> Message:
    headers = _passed_on(answer.headers.items())
    if answer.content_length is not None:
        headers.append(("content-length", str(answer.content_length)))
    raw = [(n.lower().encode(), v.encode()) for n, v in [*headers, (AFFINITY, worker.id)]]
    return {"type": "http.response.start", "status": answer.status, "headers": raw}


async def _gone(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


async def _to_worker(socket: WebSocket, inner: aiohttp.ClientWebSocketResponse) -> None:
    while (message := await socket.receive())["type"] != "websocket.disconnect":
        if (text := message.get("text")) is not None:
            await inner.send_str(text)
        else:
            await inner.send_bytes(message["bytes"])


async def _to_client(inner: aiohttp.ClientWebSocketResponse, socket: WebSocket) -> None:
    async for message in inner:
        if message.type is aiohttp.WSMsgType.TEXT:
            await socket.send_text(message.data)
        else:
            await socket.send_bytes(message.data)
