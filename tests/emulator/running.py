"""For tests with an emulator: one in a process of its own, its web side in a thread, and a webhook."""

from __future__ import annotations

import asyncio
import json
import os
import re
import signal
import subprocess
import sys
import threading
import uuid
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import requests
import uvicorn

from emulator.app import new_app
from emulator.jobs import JobQueue
from emulator.workers import LAST_GRACE, Scale, Worker, WorkerPool
from tests.conftest import ROOT
from tests.waiting import PATIENCE, until

LOG = "emulator.log"
FINAL = {"COMPLETED", "FAILED", "CANCELLED", "TIMED_OUT"}
KEY = "the-workers-key"


@dataclass
class Api:
    """The public API, without any client library."""

    address: str
    headers: dict[str, str]

    @property
    def base(self) -> str:
        return f"{self.address}/v2"

    def ask(self, method: str, path: str, **options: Any) -> requests.Response:
        """Of the endpoint; of the server, if the path begins with a slash."""
        options = {"headers": self.headers, "timeout": PATIENCE, **options}
        url = self.address + path if path.startswith("/") else f"{self.base}/local/{path}"
        return requests.request(method, url, **options)

    def get(self, path: str) -> Any:
        return self.ask("GET", path).json()

    def post(self, path: str, **options: Any) -> Any:
        return self.ask("POST", path, **options).json()

    def run(self, given: dict[str, Any] | None = None, **more: Any) -> str:
        """Queues a job; its id."""
        return str(self.post("run", json={"input": given or {}, **more})["id"])

    def status(self, job_id: str) -> dict[str, Any]:
        return cast(dict[str, Any], self.get(f"status/{job_id}"))

    def story(self, job_id: str) -> dict[str, Any]:
        """What came for a job from its worker."""
        return cast(dict[str, Any], self.get(f"/state/{job_id}"))

    def cancel(self, job_id: str) -> None:
        self.ask("POST", f"cancel/{job_id}").raise_for_status()

    def end(self, job_id: str) -> dict[str, Any]:
        """A job's final state."""
        until(lambda: self.status(job_id)["status"] in FINAL, lambda: self.status(job_id))
        return self.status(job_id)

    def under_way(self, job_id: str) -> dict[str, Any]:
        """Waits until a worker has the job; its state."""
        until(lambda: self.status(job_id)["status"] == "IN_PROGRESS")
        return self.status(job_id)

    def workers(self) -> dict[str, int]:
        return cast(dict[str, int], self.get("health")["workers"])

    def wait_for_workers(self, count: int) -> None:
        until(lambda: self.workers()["ready"] >= count)


class Emulator(Api):
    """A running `python -m emulator`."""

    def __init__(self, process: subprocess.Popen[bytes], folder: Path, mark: str, key: str) -> None:
        self.process, self.folder, self._mark = process, folder, mark
        found = until(lambda: re.search(r"(http://\S+?)(/v2/local)? is open", self.log()), self.log)
        assert found
        super().__init__(found[1], {"Authorization": f"Bearer {key}"})

    def log(self) -> str:
        return (self.folder / LOG).read_text(errors="replace")

    def pids(self) -> dict[str, int]:
        """The workers that were started, by name."""
        started = re.findall(r" (w\d+) started \(pid (\d+)\)", self.log())
        return {name: int(pid) for name, pid in started}

    def said(self, text: str, times: int = 1) -> bool:
        """Waits until a text stands in the log, so many times."""
        return bool(until(lambda: self.log().count(text) >= times, self.log))

    def stop(self, number: signal.Signals = signal.SIGINT) -> int:
        """Its exit code. Everything that it started must be gone then."""
        self.process.send_signal(number)
        code = self.process.wait(PATIENCE)
        assert marked(self._mark) == [], self.log()
        return code


def marked(mark: str) -> list[int]:
    """Every process with a text in its environment."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            if mark.encode() in (folder / "environ").read_bytes():
                found.append(int(folder.name))
        except OSError:  # it ended meanwhile, or is not ours
            continue
    return found


WITH_GRACE = """
from emulator import workers
from emulator.__main__ import main
workers.LAST_GRACE = {}
raise SystemExit(main())
"""


@contextmanager
def emulator(
    folder: Path,
    *options: str,
    program: Sequence[str] = ("tests/emulator/echo.py",),
    key: str = "k",
    grace: float = LAST_GRACE,
    **environment: str,
) -> Iterator[Emulator]:
    """A platform whose workers run `program`. However the test ends, nothing of it is left.

    `grace`: how many seconds the workers have for their jobs when it is to end.
    """
    assert Path("/proc").is_dir(), "these tests look for left processes in /proc"
    mark = f"EMULATOR_TEST={uuid.uuid4()}"
    name, value = mark.split("=")
    command = [sys.executable, "-c", WITH_GRACE.format(grace), "--port", "0", *options]
    command += ["--", sys.executable, *program]
    with (folder / LOG).open("wb") as file:
        process = subprocess.Popen(
            command,
            cwd=ROOT,
            env={**os.environ, "OMP_NUM_THREADS": "1", name: value, **environment},
            stdout=file,
            stderr=subprocess.STDOUT,
        )
    try:
        yield (running := Emulator(process, folder, mark, key))
        if process.poll() is None:
            assert running.stop() == 0, running.log()
    finally:
        process.kill()
        process.wait()
        for left in marked(mark):
            os.kill(left, signal.SIGKILL)


@dataclass
class Web(Api):
    """Both APIs over a queue, in a thread. No process works on it: the test is worker `w0`."""

    queue: JobQueue
    pool: WorkerPool

    def ask_as_worker(self, method: str, path: str, **options: Any) -> requests.Response:
        return self.ask(method, path, **{"headers": {"Authorization": KEY}, **options})

    def take(self) -> dict[str, Any]:
        return cast(dict[str, Any], self.ask_as_worker("GET", "job-take/w0").json())

    def finish(self, job_id: str, result: object) -> requests.Response:
        return self.ask_as_worker("POST", f"job-done/w0/{job_id}", json=result)


@contextmanager
def web(folder: Path, *, api_key: str | None = None, pause: float = 0.1) -> Iterator[Web]:
    queue = JobQueue()
    pool = WorkerPool(["false"], {}, queue, Scale(), folder)
    process = cast(asyncio.subprocess.Process, SimpleNamespace(returncode=None, pid=None))
    pool.workers["w0"] = Worker("w0", process)
    app = new_app(
        queue, pool, endpoint="local", worker_key=KEY, api_key=api_key, webhook_pause=pause
    )
    config = uvicorn.Config(
        app, port=0, log_config=None, access_log=False, timeout_graceful_shutdown=1
    )
    server = uvicorn.Server(config)

    async def serve() -> None:
        serving = asyncio.create_task(server.serve())
        while not serving.done():
            queue.tick()
            await asyncio.sleep(0.02)

    thread = threading.Thread(target=lambda: asyncio.run(serve()), daemon=True)
    thread.start()
    until(lambda: server.started)
    port = server.servers[0].sockets[0].getsockname()[1]
    headers = {"Authorization": f"Bearer {api_key}"} if api_key else {}
    try:
        yield Web(f"http://127.0.0.1:{port}", headers, queue, pool)
    finally:
        server.should_exit = True
        thread.join(PATIENCE)


@contextmanager
def hook(*statuses: int) -> Iterator[tuple[str, list[Any]]]:
    """A server that answers with these, then 200; its URL and what was posted to it."""
    posts: list[Any] = []
    left = list(statuses)

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["Content-Length"]))
            posts.append((self.headers["Content-Type"], json.loads(body)))
            self.send_response(left.pop(0) if left else 200)
            self.send_header("Content-Length", "0")
            self.end_headers()

        def log_message(self, *_: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}/hook?token=x", posts
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
