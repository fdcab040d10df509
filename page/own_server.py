"""A worker that is reached by a server of its own (`WORKER_SERVE=http`): jobs, and live frames."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from typing import Any
from urllib.parse import urlsplit

import aiohttp

from live.wire import Receive, Send
from page.backend import (
    EndpointRefused,
    EndpointUnreachable,
    Json,
    as_json,
    checked_url,
    error_of,
    without_key,
)
from page.jobs import Jobs, Running

LIVE_MESSAGE = 32 << 20
"""Most bytes of a live message."""

LONG = aiohttp.ClientTimeout(total=None, connect=15, sock_read=120)
"""A job may take long; the server breaks its silence every 15 s."""


class OwnServer(Jobs):
    """Asks a worker's `/generate`, and its `/live`. The key is sent there and shown to nobody."""

    def __init__(self, url: str, key: str = "") -> None:
        """Raises: AddressInvalid."""
        super().__init__()
        self.url, self._key = checked_url(url, key), key
        self._session: aiohttp.ClientSession | None = None

    async def answer(self, job: Running, given: Json) -> Any:
        """The worker's answer. Raises: EndpointRefused, EndpointUnreachable."""
        body = {name: value for name, value in given.items() if name != "id"}
        options = as_json(body)
        options["headers"]["Accept"] = "text/event-stream"
        try:
            async with self._opened().post(
                f"{self.url}/generate", allow_redirects=False, **options
            ) as answer:
                if answer.status != 200:
                    raise await error_of(answer, self._key)
                return await self._events(job, answer)
        except (aiohttp.ClientError, TimeoutError, OSError) as error:
            raise unreachable(self.url, error) from error

    async def _events(self, job: Running, answer: aiohttp.ClientResponse) -> Any:
        """Takes progress and pieces as they come, and returns the answer, or all pieces."""
        pieces = []
        async for name, data in events(answer.content):
            text = without_key(data.encode(), self._key).decode()
            if name == "progress":
                await job.progress(json.loads(text))
            elif name == "answer":
                return json.loads(text)
            elif name == "error":
                return {"error": json.dumps(json.loads(text)["error"])}
            else:
                piece = f"data: {text}\n\n"
                pieces.append(piece)
                job.news.append(piece)
        if not pieces:
            raise EndpointUnreachable("the worker hung up without an answer", "Is it still there?")
        return pieces

    async def live(self, receive: Receive, send: Send) -> None:
        """Passes a session's messages on, with the key.

        Raises: EndpointRefused, EndpointUnreachable; Closed.
        """
        worker = await self._connected()
        sides = (_up(receive, worker), _down(worker, send))
        tasks = [asyncio.create_task(side) for side in sides]
        try:
            done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
            for one in done:
                one.result()
        except (aiohttp.ClientError, OSError) as error:
            raise unreachable(self.url, error) from error
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            await worker.close()

    async def _connected(self) -> aiohttp.ClientWebSocketResponse:
        try:
            return await self._opened().ws_connect(
                f"{self.url}/live", max_msg_size=LIVE_MESSAGE, heartbeat=20
            )
        except aiohttp.WSServerHandshakeError as error:
            raise EndpointRefused(
                f"the worker serves no live frames (HTTP {error.status})",
                "It takes WORKER_SERVE=http, and a worker for pictures.",
            ) from error
        except (aiohttp.ClientError, TimeoutError, OSError) as error:
            raise unreachable(self.url, error) from error

    def about(self) -> Json:
        """What the page shows of it."""
        return {"kind": "server", "name": urlsplit(self.url).netloc, "url": self.url}

    async def close(self) -> None:
        """Ends all jobs and connections."""
        await super().close()
        if self._session:
            await self._session.close()

    def _opened(self) -> aiohttp.ClientSession:
        if self._session is None:
            headers = {"Authorization": f"Bearer {self._key}"} if self._key else {}
            self._session = aiohttp.ClientSession(timeout=LONG, headers=headers)
        return self._session


async def _up(receive: Receive, worker: aiohttp.ClientWebSocketResponse) -> None:
    while True:
        data = await receive()
        if isinstance(data, str):
            await worker.send_str(data)
        else:
            await worker.send_bytes(data)


async def _down(worker: aiohttp.ClientWebSocketResponse, send: Send) -> None:
    async for message in worker:
        if message.type is aiohttp.WSMsgType.ERROR:  # such as a message over LIVE_MESSAGE
            raise aiohttp.ClientError
        await send(message.data)


def unreachable(url: str, error: Exception) -> EndpointUnreachable:
    """The error for an address that does not answer."""
    return EndpointUnreachable(
        f"{urlsplit(url).netloc} cannot be reached ({type(error).__name__})",
        "Is the address right, and does the worker run?",
    )


async def events(stream: aiohttp.StreamReader) -> AsyncIterator[tuple[str, str]]:
    """The name (empty if it has none) and the data of each server-sent event."""
    left = b""
    async for piece in stream.iter_any():
        *whole, left = (left + piece).split(b"\n\n")
        for block in whole:
            lines = block.decode(errors="replace").split("\n")
            named = [line[7:] for line in lines if line.startswith("event: ")]
            data = [line[6:] for line in lines if line.startswith("data: ")]
            if data:
                yield (named or [""])[0], "\n".join(data)
        await asyncio.sleep(0)
