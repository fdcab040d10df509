"""The sessions of `benchmarks.live`: frames over the loopback, and while a large LoRA is fetched."""

from __future__ import annotations

import asyncio
import io
import statistics
import threading
import time
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
import uvicorn
from PIL import Image
from safetensors.torch import save_file
from starlette.applications import Starlette
from torch import nn
from websockets.asyncio.client import connect

from handler import Worker
from live.session import run
from live.wire import Closed, pack, unpack
from worker.http_app import Serving, State, new_app
from worker.http_images import Images

PROMPT = "a big red circle on a blue background"
LARGE_MB = 200


def app_of(worker: Worker) -> Starlette:
    """The worker's own server, ready."""
    serving = Serving(worker.settings, lambda: None)
    serving.state = State.READY
    return new_app(serving, Images(worker))


def as_jpeg(picture: Image.Image) -> bytes:
    """A frame as cameras send it."""
    buffer = io.BytesIO()
    picture.save(buffer, "JPEG", quality=80)
    return buffer.getvalue()


async def measure_wire(worker: Worker, seconds: float) -> dict[str, float]:
    """Frames per second and round trips of 512 pixels as JPEG both ways; encoder, steps, decoder do nothing.

    The server runs in a thread of this process, so both ends share one interpreter: worse than in use.
    """
    server = uvicorn.Server(uvicorn.Config(app_of(worker), port=0, log_level="error"))
    thread = threading.Thread(target=server.run, daemon=True)
    stream = "pipelines.live.LiveStream."
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
        patch(stream + "encode", encode),
        patch(stream + "step", step),
        patch(stream + "decode", decode),
    ):
        thread.start()
        while not server.started:
            await asyncio.sleep(0.01)
        port = server.servers[0].sockets[0].getsockname()[1]
        try:
            return await _round_trips(f"ws://127.0.0.1:{port}/live", seconds)
        finally:
            server.should_exit = True
            await asyncio.to_thread(thread.join)


async def _round_trips(url: str, seconds: float) -> dict[str, float]:
    picture = Image.effect_mandelbrot((512, 512), (-3, -2.5, 2, 2.5), 100).convert("RGB")
    data, trips = as_jpeg(picture), list[float]()
    async with connect(url, max_size=None, compression=None) as socket:
        await socket.send(pack({"prompt": PROMPT, "size": 512, "steps": 1}))
        ready = unpack(await socket.recv()).about
        sent: dict[int, float] = {}
        begun, number = time.perf_counter(), 0
        while time.perf_counter() - begun < seconds:
            while len(sent) < ready["in_flight"]:
                sent[number] = time.perf_counter()
                await socket.send(pack({"seq": number}, data))
                number += 1
            message = unpack(await socket.recv())
            if message.about["type"] == "frame":
                trips.append(1000 * (time.perf_counter() - sent.pop(message.about["seq"])))
        span = time.perf_counter() - begun
    return {
        "frames per second": round(len(trips) / span, 1),
        "round trip, median ms": round(statistics.median(trips), 1),
        "round trip, p95 ms": round(sorted(trips)[int(0.95 * (len(trips) - 1))], 1),
    }


def write_large(unet: nn.Module, folder: Path) -> Path:
    """A LoRA of 200 MB for the demo's narrow layers: of a very high rank."""
    linears = {name: m for name, m in unet.named_modules() if isinstance(m, nn.Linear)}
    numbers = sum(m.in_features + m.out_features for m in linears.values())
    rank = LARGE_MB * 1_000_000 // (4 * numbers)
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "large.safetensors"
    tensors = {}
    for name, m in linears.items():
        tensors[f"unet.{name}.lora_A.weight"] = torch.full((rank, m.in_features), 0.01)
        tensors[f"unet.{name}.lora_B.weight"] = torch.full((m.out_features, rank), 0.01)
    save_file(tensors, path)
    return path


async def measure_loading(worker: Worker, folder: Path) -> dict[str, Any]:
    """Intervals between frames while 200 MB are fetched and parsed, and without."""
    path = write_large(worker.parts.pipeline.base.unet, folder / "served")
    handler = partial(_Quiet, directory=str(path.parent))
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    url = f"http://127.0.0.1:{server.server_port}/large.safetensors"
    try:
        return await _intervals(worker, url)
    finally:
        server.shutdown()


class _Quiet(SimpleHTTPRequestHandler):
    def log_message(self, *_: Any) -> None:
        """Says nothing."""


async def _intervals(worker: Worker, url: str) -> dict[str, Any]:
    to: asyncio.Queue[bytes | None] = asyncio.Queue()
    back: asyncio.Queue[Any] = asyncio.Queue()

    async def receive() -> bytes:
        data = await to.get()
        if data is None:
            raise Closed
        return data

    async def send(data: bytes) -> None:
        back.put_nowait(unpack(data))

    async def hear() -> Any:
        while (message := await back.get()).about["type"] == "monitor":
            pass
        return message.about

    session = asyncio.create_task(run(receive, send, worker))
    to.put_nowait(pack({"prompt": PROMPT, "size": 64, "steps": 2, "loras": ["demo-stripes"]}))
    await hear()
    frame = as_jpeg(Image.new("RGB", (64, 64), "blue"))
    calm, loading = list[float](), list[float]()
    to.put_nowait(pack({}, frame))
    last, asked, errors = time.perf_counter(), False, list[str]()
    while len(calm) < 60 or not asked or len(loading) < 3:
        asks = len(calm) >= 60 and not asked
        to.put_nowait(
            pack({"loras": ["demo-stripes", {"path": url, "scale": 0}]} if asks else {}, frame)
        )
        asked = asked or asks
        about = await hear()
        now = time.perf_counter()
        (loading if "loading" in about else calm).append(1000 * (now - last))
        errors += [about["error"]] if "error" in about else []
        last = now
        if asked and not asks and "loading" not in about:
            break
    while "loading" in about:
        to.put_nowait(pack({}, frame))
        about = await hear()
        now = time.perf_counter()
        loading.append(1000 * (now - last))
        last = now
    to.put_nowait(None)
    await session
    ordered = sorted(loading) or [0.0]
    middle, p95 = statistics.median(ordered), ordered[int(0.95 * (len(ordered) - 1))]
    return {
        "frames while loading": len(loading),
        "median ms without": round(statistics.median(calm), 1),
        "median ms": round(middle, 1),
        "p95 ms": round(p95, 1),
        "p95 / median": round(p95 / middle, 2) if middle else None,
        "errors": errors,
    }
