"""What the tests of live frames share: pictures that move, and a client in memory."""

from __future__ import annotations

import asyncio
import io
import math
from collections.abc import AsyncIterator, Iterable
from contextlib import asynccontextmanager
from typing import Any

from PIL import Image, ImageDraw

from handler import Worker
from live.session import run
from live.wire import Closed, Message, pack, unpack
from tests.waiting import PATIENCE

PROMPT = "a big red circle on a blue background"
SIDE = 64


def picture(number: int) -> Image.Image:
    """A red disc that wanders over blue."""
    drawn = Image.new("RGB", (SIDE, SIDE), (30, 30, 200))
    x, y = 32 + 14 * math.cos(number / 9), 32 + 14 * math.sin(number / 7)
    ImageDraw.Draw(drawn).ellipse((x - 14, y - 14, x + 14, y + 14), fill=(220, 30, 30))
    return drawn


def as_file(drawn: Image.Image, file_format: str = "PNG") -> bytes:
    buffer = io.BytesIO()
    drawn.save(buffer, file_format)
    return buffer.getvalue()


def frame(number: int, file_format: str = "PNG") -> bytes:
    return as_file(picture(number), file_format)


def pixels(message: Message) -> bytes:
    return Image.open(io.BytesIO(message.picture)).convert("RGB").tobytes()


def start(**values: Any) -> dict[str, Any]:
    return {"prompt": PROMPT, "size": SIDE, "seed": 1, "output_format": "png", **values}


class Client:
    """One end of a session that runs in this event loop."""

    def __init__(self, worker: Worker) -> None:
        self._out: asyncio.Queue[str | bytes | None] = asyncio.Queue()
        self._in: asyncio.Queue[Message] = asyncio.Queue()
        self.session = asyncio.create_task(run(self._receive, self._send, worker))
        self.monitors: list[dict[str, Any]] = []

    async def _receive(self) -> str | bytes:
        data = await self._out.get()
        if data is None:
            raise Closed
        return data

    async def _send(self, data: bytes) -> None:
        self._in.put_nowait(unpack(data))

    def say(self, about: dict[str, Any], file: bytes = b"") -> None:
        self._out.put_nowait(pack(about, file))

    def say_raw(self, data: str | bytes) -> None:
        self._out.put_nowait(data)

    def leave(self) -> None:
        self._out.put_nowait(None)

    async def hear(self) -> Message:
        """The next message that is no monitor's."""
        while True:
            message = await asyncio.wait_for(self._in.get(), PATIENCE)
            if message.about["type"] != "monitor":
                return message
            self.monitors.append(message.about)

    async def monitor(self) -> dict[str, Any]:
        while True:
            message = await asyncio.wait_for(self._in.get(), PATIENCE)
            if message.about["type"] == "monitor":
                return message.about

    async def ask(self, about: dict[str, Any], file: bytes = b"") -> Message:
        self.say(about, file)
        return await self.hear()

    async def frames(
        self, frames: Iterable[tuple[dict[str, Any], bytes]], in_flight: int = 1
    ) -> list[Message]:
        """Sends frames, so many on their way at once; the answers in the frames' order."""
        answers: list[Message] = []
        flying = 0
        for number, (about, file) in enumerate(frames):
            self.say({"seq": number, **about}, file)
            flying += 1
            if flying == in_flight:
                answers.append(await self.hear())
                flying -= 1
        answers += [await self.hear() for _ in range(flying)]
        return sorted(answers, key=lambda message: message.about["seq"])


@asynccontextmanager
async def session(worker: Worker, **values: Any) -> AsyncIterator[Client]:
    """A session that has begun; the client leaves at the end, and the session is over."""
    client = Client(worker)
    client.say(start(**values))
    ready = await client.hear()
    assert ready.about["type"] == "ready", ready.about
    client.ready = ready.about  # type: ignore[attr-defined]
    yield client
    client.leave()
    await asyncio.wait_for(client.session, PATIENCE)
