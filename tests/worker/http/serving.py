"""For tests of the worker's HTTP server: its routes in a thread, and the whole program in a process."""

from __future__ import annotations

import asyncio
import os
import re
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import requests
import uvicorn

from settings import Settings
from tests.conftest import ROOT
from tests.waiting import PATIENCE, until
from worker.http.app import Kind, Serving, State, new_app


@dataclass
class Site:
    """A server, and how to ask it."""

    address: str
    headers: dict[str, str] = field(default_factory=dict)

    def get(self, path: str, **options: Any) -> requests.Response:
        return requests.get(
            self.address + path, **{"headers": self.headers, "timeout": PATIENCE, **options}
        )

    def post(self, path: str, body: Any = None, **options: Any) -> requests.Response:
        headers = {**self.headers, **options.pop("headers", {})}
        return requests.post(
            self.address + path, json=body, headers=headers, timeout=PATIENCE, **options
        )


@dataclass
class Thread(Site):
    """The routes over a worker of this process."""

    serving: Serving = None  # type: ignore[assignment]
    server: uvicorn.Server = None  # type: ignore[assignment]
    given_up: list[bool] = field(default_factory=list)


@contextmanager
def served(kind: Kind, settings: Settings, **changes: Any) -> Iterator[Thread]:
    """The kind's routes under the settings with these changes, in a thread."""
    given_up: list[bool] = []
    serving = Serving(replace(settings, **changes), lambda: given_up.append(True))
    serving.state = State.READY
    config = uvicorn.Config(
        new_app(serving, kind), port=0, log_config=None, access_log=False, lifespan="off"
    )
    server = uvicorn.Server(config)
    thread = threading.Thread(target=lambda: asyncio.run(server.serve()), daemon=True)
    thread.start()
    until(lambda: server.started)
    port = server.servers[0].sockets[0].getsockname()[1]
    key = serving.settings.api_key
    headers = {"Authorization": f"Bearer {key}"} if key else {}
    try:
        yield Thread(f"http://127.0.0.1:{port}", headers, serving, server, given_up)
    finally:
        server.should_exit = True
        thread.join(PATIENCE)


class Program(Site):
    """`WORKER_SERVE=http python handler.py`, once it listens."""

    def __init__(self, process: subprocess.Popen[bytes], log: Path) -> None:
        self.process, self._log = process, log
        found = until(lambda: re.search(r"(http://\S+) answers", self.log()) or self._died())
        assert not isinstance(found, str), found
        super().__init__(found[1])

    def _died(self) -> str:
        return f"it died: {self.log()}" if self.process.poll() is not None else ""

    def log(self) -> str:
        return self._log.read_text(errors="replace")

    def ready(self) -> Program:
        until(lambda: self.get("/ping").status_code == 200, self.log)
        return self

    def signal(self, number: signal.Signals = signal.SIGTERM) -> None:
        self.process.send_signal(number)

    def ended(self) -> int:
        """Its exit code, once it has ended."""
        return self.process.wait(PATIENCE)


def start(folder: Path, *, program: str = "", **environment: str) -> subprocess.Popen[bytes]:
    """Starts the program on the demo model; `program` is Python that runs in place of handler.py."""
    variables = {
        "WORKER_MODEL": "demo",
        "WORKER_DEVICE": "cpu",
        "WORKER_SERVE": "http",
        "WORKER_HOST": "127.0.0.1",
        "PORT": "0",
        "LORA_CACHE_DIR": str(folder / "loras"),
        "HF_HUB_OFFLINE": "1",
        "OMP_NUM_THREADS": "1",
    }
    command = [sys.executable, *(["-c", program] if program else ["handler.py"])]
    with (folder / "log").open("wb") as file:
        return subprocess.Popen(
            command,
            cwd=ROOT,
            env={**os.environ, **variables, **environment},
            stdout=file,
            stderr=subprocess.STDOUT,
        )


@contextmanager
def program(folder: Path, *, code: str = "", **environment: str) -> Iterator[Program]:
    """The program, which is killed at the end if it still runs."""
    process = start(folder, program=code, **environment)
    try:
        yield Program(process, folder / "log")
    finally:
        process.kill()
        process.wait()
