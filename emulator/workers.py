"""Worker processes: the pool starts, scales and replaces them, and leaves none behind."""

from __future__ import annotations

import asyncio
import logging
import os
import signal
import socket
import time
from collections import deque
from collections.abc import Collection, Coroutine, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from emulator.jobs import JobQueue

log = logging.getLogger(__name__)

GRACE, LAST_GRACE = 30.0, 5.0
"""Seconds between asking a worker to end and killing it: while the others go on, and when the pool ends."""

POLL = 0.1

RESTART_PAUSE = 1.0
"""Seconds before another worker is started after one that ended before it asked for a job."""

MAX_STILLBORN, LAST_LINES = 3, 20
"""Deaths after which a command that never had a worker ask for a job is given up; the lines of the last one
that are shown.
"""


class NoWorkerStarts(RuntimeError):
    """No worker ever was ready, and several died; the text ends with what the last one printed."""


@dataclass
class Worker:
    """One worker process, in a session of its own, so that the processes that it started end with it."""

    id: str
    process: asyncio.subprocess.Process
    port: int = 0
    """Where its own HTTP server is to listen; 0 for a worker of the queue."""
    ready: bool = False
    """Whether it has asked for a job, or its server was healthy."""
    stopping: bool = False
    """Whether it gets no more jobs."""
    asked: bool = False
    """Whether it was asked to end."""
    idle_since: float | None = None
    lines: deque[str] = field(default_factory=lambda: deque(maxlen=LAST_LINES))
    """What it printed last."""

    @property
    def alive(self) -> bool:
        """Whether the process runs.

        `process.wait()` will not do: it also waits for other processes that hold the worker's output, and the
        SDK's heartbeat outlives its worker.
        """
        return self.process.returncode is None

    def ask_to_end(self) -> None:
        """Sends SIGTERM to the process alone, which then finishes its jobs and ends."""
        self.stopping = self.asked = True
        with suppress(ProcessLookupError):
            self.process.terminate()

    def kill(self) -> None:
        """Sends SIGKILL to the process and all that it started."""
        with suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)


@dataclass(frozen=True)
class Scale:
    """How many workers there may be, and when the number changes."""

    least: int = 1
    most: int = 1
    delay: float = 4.0
    """Seconds that a job waits before another worker is started. The first worker is started at once."""
    idle: float = 5.0
    """Seconds after which an idle worker above the least number ends."""


class WorkerPool:
    """Keeps between `least` and `most` workers running `command`."""

    def __init__(
        self,
        command: Sequence[str],
        environment: Mapping[str, str],
        queue: JobQueue,
        scale: Scale,
        homes: Path,
        *,
        serving: bool = False,
    ) -> None:
        """`environment`: the variables of each worker, besides RUNPOD_POD_ID and a HOME below `homes`.

        `serving`: each worker is an HTTP server, and gets a PORT.
        """
        self._command, self._environment = list(command), dict(environment)
        self._queue, self._scale, self._homes = queue, scale, homes
        self._serving = serving
        self.workers: dict[str, Worker] = {}
        self.deaths = 0
        """How many workers ended without having been asked to."""
        self._proven = False
        """Whether a worker ever was ready; then the command works, and no number of deaths ends it."""
        self._stillborn: list[Worker] = []
        """Those that died before any had asked for a job."""
        self._number = 0
        self._not_before = 0.0
        self._ends: set[asyncio.Task[None]] = set()
        self._outputs: set[asyncio.Task[None]] = set()

    async def run(self, over: asyncio.Event) -> None:
        """Starts, watches and scales workers until `over` is set; then ends them and what they started.

        Raises: OSError if the command cannot be started; NoWorkerStarts.
        """
        try:
            while not over.is_set() and not self._hopeless:
                self._bury()
                self._queue.tick()
                while self._wants_another() and not over.is_set():
                    await self._start()
                self._scale_down()
                with suppress(TimeoutError):
                    await asyncio.wait_for(over.wait(), POLL)
        finally:
            await self._end_all()
        if self._hopeless:
            last = "\n".join(self._stillborn[-1].lines) or "(nothing)"
            count = f"{len(self._stillborn)} workers died, and none ever was ready"
            raise NoWorkerStarts(f"{count}; the last one printed:\n{last}")

    @property
    def _doubtful(self) -> bool:
        """Whether so many died that no more are started unless one that still starts asks for a job."""
        return not self._proven and len(self._stillborn) >= MAX_STILLBORN

    @property
    def _hopeless(self) -> bool:
        return self._doubtful and not self.workers

    def heard_of(self, name: str) -> None:
        """Notes that a worker asked for a job, or is healthy: it has started."""
        if worker := self.workers.get(name):
            worker.ready = self._proven = True

    def takes(self, name: str) -> bool:
        """Whether a worker gets jobs."""
        worker = self.workers.get(name)
        return worker is not None and worker.alive and not worker.stopping

    def ends(self, name: str) -> bool:
        """Whether a worker was asked to end, or has ended."""
        worker = self.workers.get(name)
        return worker is None or worker.asked

    def stop(self, name: str) -> None:
        """Lets a worker finish its jobs and end; it gets no more jobs, and another takes its place."""
        worker = self.workers.get(name)
        if worker and not worker.stopping:
            worker.stopping = True
            _keep(self._ends, self._end(worker))

    async def _start(self) -> None:
        name = f"w{self._number}"
        self._number += 1
        home = self._homes / name
        home.mkdir(parents=True, exist_ok=True)
        environment = {**self._environment, "RUNPOD_POD_ID": name, "HOME": str(home)}
        port = _free_port() if self._serving else 0
        if port:
            environment["PORT"] = environment["PORT_HEALTH"] = str(port)
        process = await asyncio.create_subprocess_exec(
            *self._command,
            env=environment,
            stdin=asyncio.subprocess.DEVNULL,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.STDOUT,
            start_new_session=True,
            limit=1 << 20,
        )
        worker = self.workers[name] = Worker(name, process, port)
        log.info("%s started (pid %d)", name, process.pid)
        _keep(self._outputs, self._show(worker))

    async def _show(self, worker: Worker) -> None:
        """Logs each line that a worker prints, with the worker's name before it."""
        assert worker.process.stdout is not None  # noqa: S101 - for the type checker; PIPE was asked for
        while True:
            try:
                line = await worker.process.stdout.readline()
            except ValueError:  # a line of over a megabyte
                continue
            if not line:
                return
            worker.lines.append(line.decode(errors="replace").rstrip())
            log.info("[%s] %s", worker.id, worker.lines[-1])

    def _bury(self) -> None:
        """Forgets the workers that ended, and puts their jobs back into the queue."""
        for worker in [worker for worker in self.workers.values() if not worker.alive]:
            worker.kill()  # the processes that it left behind
            del self.workers[worker.id]
            self._queue.lost(worker.id)
            if worker.stopping:
                log.info("%s ended", worker.id)
                continue
            self.deaths += 1
            log.warning("%s died (exit %s)", worker.id, worker.process.returncode)
            if not worker.ready:
                self._not_before = time.monotonic() + RESTART_PAUSE
                if not self._proven:
                    self._stillborn.append(worker)

    def _wants_another(self) -> bool:
        """Whether to start a worker. A worker that is ending counts: it still has the device's memory."""
        count, scale = len(self.workers), self._scale
        if count >= scale.most or self._doubtful or time.monotonic() < self._not_before:
            return False
        if count < scale.least:
            return True
        starting = any(not worker.ready for worker in self.workers.values())
        return not starting and self._queue.waited > (scale.delay if count else 0)

    def _scale_down(self) -> None:
        now = time.monotonic()
        serving = [worker for worker in self.workers.values() if not worker.stopping]
        spare = len(serving) - self._scale.least
        for worker in serving:
            if self._queue.holds(worker.id) or not worker.ready:
                worker.idle_since = None
                continue
            worker.idle_since = worker.idle_since or now
            if spare > 0 and now - worker.idle_since > self._scale.idle:
                self.stop(worker.id)
                spare -= 1

    async def _end(self, worker: Worker) -> None:
        """Asks a worker to end, even if it has jobs: one whose answer could not be posted would never end."""
        worker.ask_to_end()
        while not await _ended([worker], GRACE):
            if not self._queue.holds(worker.id):
                log.warning("%s did not end in %g s", worker.id, GRACE)
                worker.kill()

    async def _end_all(self) -> None:
        """Ends all workers and what they started, whatever they are doing."""
        for task in self._ends:
            task.cancel()
        workers = list(self.workers.values())
        for worker in workers:
            worker.ask_to_end()
        await _ended(workers, LAST_GRACE)
        for worker in workers:
            worker.kill()
        await _ended(workers, 1)
        if self._outputs:  # their last words
            await asyncio.wait(self._outputs, timeout=1)


async def _ended(workers: Collection[Worker], seconds: float) -> bool:
    """Waits until all have ended; False if they have not after so many seconds."""
    deadline = time.monotonic() + seconds
    while any(worker.alive for worker in workers):
        if time.monotonic() > deadline:
            return False
        await asyncio.sleep(POLL / 4)
    return True


def _free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as server:
        return int(server.getsockname()[1])


def _keep(tasks: set[asyncio.Task[None]], work: Coroutine[Any, Any, None]) -> None:
    """Runs a task in the background; the set keeps it from being collected."""
    task = asyncio.create_task(work)
    tasks.add(task)
    task.add_done_callback(tasks.discard)
