"""The worker's own server in `benchmarks.live`: frames over the loopback, sessions after one that broke."""

from __future__ import annotations

import asyncio
import io
import statistics
import threading
import time
from collections.abc import Awaitable, Callable
from contextlib import ExitStack, suppress
from typing import Any
from unittest.mock import patch

import torch
import uvicorn
from PIL import Image
from websockets.asyncio.client import ClientConnection, connect
from websockets.exceptions import ConnectionClosed

from handler import Worker
from live.wire import Message, pack, unpack
from worker.http.app import Serving, State, new_app
from worker.http.images import Images

PROMPT = "a big red circle on a blue background"
STREAM = "pipelines.live.LiveStream."
START = {"prompt": PROMPT, "size": 64, "steps": 2}


class Site:
    """The worker's own server in a thread of this process: both ends share one interpreter, unlike in use."""

    def __init__(self, worker: Worker) -> None:
        serving = Serving(worker.settings, lambda: None)
        serving.state = State.READY
        config = uvicorn.Config(new_app(serving, Images(worker)), port=0, log_level="error")
        self._server = uvicorn.Server(config)
        self._thread = threading.Thread(target=self._server.run, daemon=True)

    def __enter__(self) -> str:
        """The address of its sessions."""
        self._thread.start()
        while not self._server.started:
            time.sleep(0.01)
        port = self._server.servers[0].sockets[0].getsockname()[1]
        return f"ws://127.0.0.1:{port}/live"

    def __exit__(self, *_: object) -> None:
        self.end()

    def end(self) -> None:
        """Ends it in order, as SIGTERM does."""
        self._server.should_exit = True
        self._thread.join()


def as_jpeg(picture: Image.Image) -> bytes:
    """A frame as cameras send it."""
    buffer = io.BytesIO()
    picture.save(buffer, "JPEG", quality=80)
    return buffer.getvalue()


async def hear(socket: ClientConnection) -> Message:
    """The next message that is no monitor's."""
    while (message := unpack(await socket.recv())).about["type"] == "monitor":
        pass
    return message


# --- without a model -------------------------------------------------------------------------------


async def measure_wire(worker: Worker, seconds: float) -> dict[str, float]:
    """Frames per second and round trips of 512 pixels as JPEG both ways; the model does nothing."""
    last: list[Image.Image] = []

    def encode(self: Any, picture: Image.Image) -> torch.Tensor:
        last[:] = [picture]
        return torch.zeros(1, 4, 64, 64)

    def step(self: Any, frames: Any) -> None:
        for frame in frames:
            frame.step += 1

    def decode(self: Any, latents: torch.Tensor) -> Image.Image:
        return last[0] if last else Image.new("RGB", (512, 512))

    with (
        patch(STREAM + "encode", encode),
        patch(STREAM + "step", step),
        patch(STREAM + "decode", decode),
        Site(worker) as url,
    ):
        return await _round_trips(url, seconds)


async def _round_trips(url: str, seconds: float) -> dict[str, float]:
    picture = Image.effect_mandelbrot((512, 512), (-3, -2.5, 2, 2.5), 100).convert("RGB")
    data, trips = as_jpeg(picture), list[float]()
    async with connect(url, max_size=None, compression=None) as socket:
        await socket.send(pack({"prompt": PROMPT, "size": 512, "steps": 1}))
        ready = (await hear(socket)).about
        sent: dict[int, float] = {}
        begun, number = time.perf_counter(), 0
        while time.perf_counter() - begun < seconds:
            while len(sent) < ready["in_flight"]:
                sent[number] = time.perf_counter()
                await socket.send(pack({"seq": number}, data))
                number += 1
            message = await hear(socket)
            trips.append(1000 * (time.perf_counter() - sent.pop(message.about["seq"])))
        span = time.perf_counter() - begun
    return {
        "frames per second": round(len(trips) / span, 1),
        "round trip, median ms": round(statistics.median(trips), 1),
        "round trip, p95 ms": round(sorted(trips)[int(0.95 * (len(trips) - 1))], 1),
    }


# --- after a session that broke --------------------------------------------------------------------

Fate = Callable[[Site, ClientConnection, bytes], Awaitable[None]]
"""What befalls a session of this site, by its socket, with a picture to send."""


async def measure_recovery(worker: Worker, rounds: int) -> dict[str, Any]:
    """Milliseconds from what befell a session until the next one's first frame is here: median and longest.

    The next one connects, says its first message and sends a frame; as long as the place is taken, it does so
    again. At SIGTERM the server ends in order. Another one over the same worker is asked then, so the start
    of a process is not in it.
    """
    figures, picture = dict[str, Any](), as_jpeg(Image.new("RGB", (64, 64), "blue"))
    for name, befall in FATES.items():
        times = [await _recovery(worker, befall, picture) for _ in range(rounds)]
        figures[name] = {"median ms": round(statistics.median(times)), "max ms": round(max(times))}
    return figures


async def _recovery(worker: Worker, befall: Fate, picture: bytes) -> float:
    with ExitStack() as sites:
        site = Site(worker)
        url = sites.enter_context(site)
        async with connect(url, max_size=None) as socket:
            await socket.send(pack({**START, "loras": ["demo-stripes"]}))
            await hear(socket)
            for _ in range(2):
                await socket.send(pack({}, picture))
            begun = time.perf_counter()
            await befall(site, socket, picture)
        if befall is _sigterm:
            url = sites.enter_context(Site(worker))
        await _first_frame(url, picture)
        return 1000 * (time.perf_counter() - begun)


async def _first_frame(url: str, picture: bytes) -> None:
    """Asks again as long as the place is taken."""
    while True:
        with suppress(ConnectionClosed):
            async with connect(url, max_size=None) as socket:
                await socket.send(pack(START))
                if (await hear(socket)).about["type"] == "ready":
                    await socket.send(pack({}, picture))
                    await hear(socket)
                    return


async def _left(site: Site, socket: ClientConnection, picture: bytes) -> None:
    pass


async def _killed(site: Site, socket: ClientConnection, picture: bytes) -> None:
    socket.transport.abort()


async def _bad_frame(site: Site, socket: ClientConnection, picture: bytes) -> None:
    await socket.send(pack({}, b"no picture"))
    await _error(socket)


async def _failed_step(site: Site, socket: ClientConnection, picture: bytes) -> None:
    with patch(STREAM + "step", side_effect=RuntimeError):
        await socket.send(pack({}, picture))
        await _error(socket)


async def _sigterm(site: Site, socket: ClientConnection, picture: bytes) -> None:
    await asyncio.to_thread(site.end)


async def _error(socket: ClientConnection) -> None:
    """Waits for a frame's error. Raises: ConnectionClosed."""
    while "error" not in (await hear(socket)).about:
        pass


FATES: dict[str, Fate] = {
    "nothing": _left,
    "a killed client": _killed,
    "a bad frame": _bad_frame,
    "an exception in a step": _failed_step,
    "SIGTERM": _sigterm,
}
"""What befalls a session, and how."""
