"""Stands in for a worker with a server of its own where no real one does as asked: its `/generate`."""

from __future__ import annotations

import asyncio
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from aiohttp import web

from tests.waiting import PATIENCE, until


@dataclass
class OwnWorker:
    """What came, and what is answered."""

    key: str
    port: int = 0
    jobs: list[dict[str, Any]] = field(default_factory=list)
    hung_up: int = 0

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    async def generate(self, request: web.Request) -> web.StreamResponse:
        if request.headers.get("Authorization") != f"Bearer {self.key}":
            return web.json_response(
                {"error": {"code": "UNAUTHORIZED", "message": "no"}}, status=401
            )
        job = await request.json()
        self.jobs.append(job)
        given = job["input"]
        answer = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
        await answer.prepare(request)
        if given.get("prompt") == "wait":
            update = {"phase": "generating", "fraction": 0.5, "text": "step 1/2"}
            await answer.write(
                f"event: progress\ndata: {json.dumps(update)}\n\n: waiting\n\n".encode()
            )
            try:
                await asyncio.sleep(PATIENCE)
            finally:
                self.hung_up += 1
        if given.get("prompt") == "fail":
            body = {"error": {"code": "LORA_NOT_FOUND", "message": "nothing is there."}}
            await answer.write(f"event: error\ndata: {json.dumps(body)}\n\n".encode())
        elif "openai_input" in given:
            for piece in (
                'data: {"choices": [{"delta": {"con',
                'tent": "hi"}}]}\n\ndata: [DONE]\n\n',
            ):
                await answer.write(piece.encode())
                await asyncio.sleep(0.01)
        elif given.get("prompt") != "hang up":
            body = {"images": [], "seed": 1, "said": self.key}
            await answer.write(f"event: answer\ndata: {json.dumps(body)}\n\n".encode())
        return answer


@contextmanager
def own_worker(key: str) -> Iterator[OwnWorker]:
    worker, over = OwnWorker(key), threading.Event()

    async def serve() -> None:
        app = web.Application(client_max_size=1 << 25)
        app.add_routes([web.post("/generate", worker.generate)])
        runner = web.AppRunner(app, handler_cancellation=True, shutdown_timeout=1)
        await runner.setup()
        site = web.TCPSite(runner, "127.0.0.1", 0)
        await site.start()
        worker.port = runner.addresses[0][1]
        while not over.is_set():
            await asyncio.sleep(0.02)
        await runner.cleanup()

    thread = threading.Thread(target=lambda: asyncio.run(serve()), daemon=True)
    thread.start()
    until(lambda: worker.port)
    try:
        yield worker
    finally:
        over.set()
        thread.join(PATIENCE)
