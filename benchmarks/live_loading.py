"""The intervals between a session's frames while a LoRA of 200 MB is fetched and parsed."""

from __future__ import annotations

import asyncio
import statistics
import threading
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass, field
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from safetensors.torch import save_file
from torch import nn

from benchmarks.live_wire import PROMPT, as_jpeg
from handler import Worker
from live.session import run
from live.wire import Closed, pack, unpack

MB = 1_000_000
LARGE_MB = 200
LOADS = 3
"""Files that are fetched, one after the other: each is parsed while few frames are drawn."""
CALM = 100
"""Frames before the first one is asked for."""


async def measure_loading(worker: Worker, folder: Path, megabytes: int) -> dict[str, Any]:
    """Figures over all intervals in which a file was fetched or parsed, and over those after its last byte.

    The file's server sends a megabyte for each frame, so that there are as many intervals as megabytes.
    """
    served = folder / "served"
    served.mkdir(parents=True, exist_ok=True)
    fetching, parsing, cache = list[float](), list[float](), worker.parts.library.cache
    with _serving(served) as (url, pace):
        async with _session(worker) as client:
            calm = [await client.frame() for _ in range(CALM)]
            for number in range(LOADS):
                path = served / f"large-{number}.safetensors"
                write_large(worker.parts.pipeline.base.unet, path, megabytes, number)
                pace.begin()
                wanted = [{"path": "demo-stripes"}, {"path": f"{url}/{path.name}", "scale": 0}]
                await client.frame({"loras": wanted})
                while client.loading:
                    was_sent = pace.sent.is_set()
                    pace.frames.release()
                    (parsing if was_sent else fetching).append(await client.frame())
                await client.frame({"loras": ["demo-stripes"]})
                path.unlink()
    for adapter in cache.shelf.adapters():
        if (adapter.weights or "").startswith("large-"):
            cache.delete(adapter.weights or "")
    return {
        "files": LOADS,
        "megabytes each": megabytes,
        "median ms without": round(statistics.median(calm), 1),
        **_figures(fetching + parsing, "while fetched and parsed"),
        **_figures(parsing, "after the last byte"),
        "errors": client.errors,
    }


def _figures(intervals: list[float], when: str) -> dict[str, Any]:
    ordered = sorted(intervals) or [0.0]
    middle, p95 = statistics.median(ordered), ordered[int(0.95 * (len(ordered) - 1))]
    return {
        f"intervals {when}": len(intervals),
        f"median ms {when}": round(middle, 1),
        f"p95 ms {when}": round(p95, 1),
        f"p95 / median {when}": round(p95 / middle, 2) if middle else None,
    }


def write_large(unet: nn.Module, path: Path, megabytes: int, number: int) -> None:
    """A LoRA of so many megabytes for the demo's narrow layers, of a very high rank; each number has its own
    content."""
    linears = {name: m for name, m in unet.named_modules() if isinstance(m, nn.Linear)}
    numbers = sum(m.in_features + m.out_features for m in linears.values())
    rank, value = megabytes * MB // (4 * numbers), 0.01 + 0.001 * number
    tensors = {}
    for name, m in linears.items():
        tensors[f"unet.{name}.lora_A.weight"] = torch.full((rank, m.in_features), value)
        tensors[f"unet.{name}.lora_B.weight"] = torch.full((m.out_features, rank), value)
    save_file(tensors, path)


# --- the server ------------------------------------------------------------------------------------


@dataclass
class Pace:
    """How fast a file is sent."""

    frames: threading.Semaphore = field(default_factory=lambda: threading.Semaphore(0))
    """Released once for each frame: a megabyte may be sent."""
    sent: threading.Event = field(default_factory=threading.Event)
    """Set after the last byte."""

    def begin(self) -> None:
        """For the next file."""
        self.frames, self.sent = threading.Semaphore(0), threading.Event()


class _Paced(SimpleHTTPRequestHandler):
    def __init__(self, *given: Any, pace: Pace, **options: Any) -> None:
        self._pace = pace
        super().__init__(*given, **options)

    def copyfile(self, source: Any, outputfile: Any) -> None:
        """Sends a megabyte for each frame."""
        while piece := source.read(MB):
            self._pace.frames.acquire()
            outputfile.write(piece)
        self._pace.sent.set()

    def log_message(self, *_: Any) -> None:
        """Says nothing."""


@contextmanager
def _serving(folder: Path) -> Iterator[tuple[str, Pace]]:
    pace = Pace()
    handler = partial(_Paced, directory=str(folder), pace=pace)
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}", pace
    finally:
        server.shutdown()


# --- the client ------------------------------------------------------------------------------------


class _Client:
    """One end of a session in this event loop, which sends a frame when the one before is answered."""

    def __init__(self) -> None:
        self._to: asyncio.Queue[bytes | None] = asyncio.Queue()
        self._back: asyncio.Queue[Any] = asyncio.Queue()
        self._picture = as_jpeg(Image.new("RGB", (64, 64), "blue"))
        self._last = time.perf_counter()
        self.loading = False
        """Whether the last answer said that a LoRA is being fetched."""
        self.errors: list[str] = []

    async def receive(self) -> bytes:
        """For the session."""
        if (data := await self._to.get()) is None:
            raise Closed
        return data

    async def send(self, data: bytes) -> None:
        """For the session."""
        self._back.put_nowait(unpack(data))

    def say(self, about: dict[str, Any] | None, picture: bytes = b"") -> None:
        """Sends a message; None leaves."""
        self._to.put_nowait(None if about is None else pack(about, picture))

    async def hear(self) -> dict[str, Any]:
        """The next message that is no monitor's."""
        while (message := await self._back.get()).about["type"] == "monitor":
            pass
        return dict(message.about)

    async def frame(self, change: dict[str, Any] | None = None) -> float:
        """Sends a frame and waits for it; the milliseconds since the one before."""
        self.say(change or {}, self._picture)
        about = await self.hear()
        self.loading = "loading" in about
        self.errors += [about["error"]] if "error" in about else []
        before, self._last = self._last, time.perf_counter()
        return 1000 * (self._last - before)


@asynccontextmanager
async def _session(worker: Worker) -> AsyncIterator[_Client]:
    client = _Client()
    session = asyncio.create_task(run(client.receive, client.send, worker))
    client.say({"prompt": PROMPT, "size": 64, "steps": 2, "loras": ["demo-stripes"]})
    await client.hear()
    await client.frame()
    yield client
    client.say(None)
    await session
