"""SIGTERM, with the real SDK and a platform that holds its questions open as long as it likes."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from emulator.worker_api import wire_environment
from tests.adapters import as_bytes, kohya
from tests.conftest import ROOT
from tests.production import ENVIRONMENT
from tests.server import LoopbackServer
from tests.waiting import PATIENCE, until
from worker.queue.shutdown import Shutdown

HELD = 3 * PATIENCE
"""Seconds for which the platform holds a question: longer than any test waits."""


class Platform:
    """Hands out one job, then nothing for a long time. Notes what is posted to it."""

    def __init__(self) -> None:
        self.jobs, self.posts = list[dict[str, Any]](), list[dict[str, Any]]()
        self.closed = threading.Event()
        platform = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_GET(self) -> None:
                if "/ping/" in self.path:
                    self._answer({"status": "ok"})
                elif "/job-take" in self.path and platform.jobs:
                    job = platform.jobs.pop()
                    self._answer([job] if "batch" in self.path else job)
                else:
                    platform.closed.wait(HELD)

            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers["Content-Length"]))
                platform.posts.append(json.loads(body))
                self._answer({"status": "ok"})

            def _answer(self, value: Any) -> None:
                body = json.dumps(value).encode()
                self.send_response(200)
                self.send_header("Content-Type", "application/json")
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)

            def log_message(self, *_: Any) -> None:
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self.address = f"http://127.0.0.1:{self._server.server_address[1]}"
        threading.Thread(target=self._server.serve_forever, args=(0.02,), daemon=True).start()

    def close(self) -> None:
        self.closed.set()
        self._server.shutdown()
        self._server.server_close()

    def answers(self) -> list[dict[str, Any]]:
        return [post for post in self.posts if post.get("status") != "IN_PROGRESS"]


@pytest.fixture
def platform() -> Iterator[Platform]:
    running = Platform()
    try:
        yield running
    finally:
        running.close()


@pytest.mark.slow
def test_at_sigterm_the_running_job_is_posted_and_no_question_keeps_the_worker(
    platform: Platform, server: LoopbackServer, tmp_path: Path
) -> None:
    gate = threading.Event()
    url = server.serve("/slow.safetensors", as_bytes(kohya()), gate=gate)
    values = {"prompt": "a big red circle", "num_inference_steps": 1, "loras": [url]}
    platform.jobs.append({"id": "the-job", "input": values})
    environment = {**os.environ, **ENVIRONMENT, "LORA_CACHE_DIR": str(tmp_path)}
    environment |= wire_environment(platform.address, "local", "key")
    environment |= {"RUNPOD_POD_ID": "w0", "HOME": str(tmp_path)}
    worker = subprocess.Popen(
        [sys.executable, "handler.py"],
        cwd=ROOT,
        env=environment,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        until(lambda: server.hits["/slow.safetensors"])
        worker.send_signal(signal.SIGTERM)
        assert platform.answers() == []
        gate.set()
        (answer,) = until(platform.answers)
        assert answer["output"]["images"]
        assert worker.wait(PATIENCE) == 0  # the questions are held for longer
    finally:
        worker.kill()
        worker.wait()


def test_a_question_that_is_answered_is_answered_as_before() -> None:
    scaling = ModuleType("rp_scale")

    async def get_job(session: str, count: int) -> list[str]:
        return [session] * count

    async def get_stop_signals(session: str) -> list[str]:
        raise ConnectionError(session)

    scaling.get_job, scaling.get_stop_signals = get_job, get_stop_signals  # type: ignore[attr-defined]
    own = signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)
    Shutdown().guard(scaling)

    async def both() -> list[str]:
        with pytest.raises(ConnectionError):
            await scaling.get_stop_signals("s")
        found: list[str] = await scaling.get_job("s", 2)
        return found

    try:
        assert asyncio.run(both()) == ["s", "s"]
    finally:
        signal.signal(signal.SIGTERM, own[0])
        signal.signal(signal.SIGINT, own[1])


def test_at_the_signal_an_open_question_ends_and_the_sdks_own_handler_is_called() -> None:
    scaling, told = ModuleType("rp_scale"), list[int]()
    asks = asyncio.Event()

    async def get_job(session: str) -> None:
        asks.set()
        await asyncio.Event().wait()

    scaling.get_job = scaling.get_stop_signals = get_job  # type: ignore[attr-defined]
    own = signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)
    signal.signal(signal.SIGTERM, lambda number, frame: told.append(number))
    Shutdown().guard(scaling)

    async def asked() -> None:
        question = asyncio.ensure_future(scaling.get_job("s"))
        await asks.wait()
        os.kill(os.getpid(), signal.SIGTERM)
        with pytest.raises(TimeoutError, match="the worker ends"):
            await asyncio.wait_for(question, PATIENCE)

    try:
        asyncio.run(asked())
        assert told == [signal.SIGTERM]
    finally:
        signal.signal(signal.SIGTERM, own[0])
        signal.signal(signal.SIGINT, own[1])
