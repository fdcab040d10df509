"""The page's server in a thread, over any backend."""

from __future__ import annotations

import asyncio
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import requests
import uvicorn

from page.backend import Backend
from page.server import new_app
from tests.waiting import PATIENCE, until


@dataclass
class Served:
    """A page that is open at `url`."""

    port: int

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def ask(self, method: str, path: str, **options: Any) -> requests.Response:
        """Asks as the page itself would, but for the headers that are given."""
        own = {"Origin": self.url} if method == "POST" else {}
        headers = {**own, **options.pop("headers", {})}
        return requests.request(
            method, self.url + path, headers=headers, timeout=PATIENCE, **options
        )

    def get(self, path: str) -> requests.Response:
        return self.ask("GET", path)

    def post(self, path: str, value: object) -> requests.Response:
        return self.ask("POST", path, json=value)


@contextmanager
def served(make: Callable[[], Backend]) -> Iterator[Served]:
    """`make` is called in the thread that serves."""
    listening = socket.create_server(("127.0.0.1", 0))
    port = listening.getsockname()[1]
    servers: list[uvicorn.Server] = []

    async def serve() -> None:
        backend = make()
        config = uvicorn.Config(
            new_app(backend, port), log_config=None, lifespan="off", timeout_graceful_shutdown=1
        )
        server = uvicorn.Server(config)
        servers.append(server)
        await server.serve(sockets=[listening])
        await backend.close()

    thread = threading.Thread(target=lambda: asyncio.run(serve()), daemon=True)
    thread.start()
    until(lambda: servers and servers[0].started)
    try:
        yield Served(port)
    finally:
        servers[0].should_exit = True
        thread.join(PATIENCE)
        listening.close()
