"""A worker in the page's own process, which answers as an endpoint does."""

from __future__ import annotations

import asyncio
import os
import uuid
from collections import OrderedDict
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

from handler import Worker
from page.backend import JobUnknown, Json
from settings import Settings
from text_settings import TextSettings
from worker.opening import read_settings
from worker.text_worker import TextWorker

KEPT = 200
"""Ended jobs whose answers are kept."""

OVER = ("COMPLETED", "FAILED", "CANCELLED")


@dataclass
class _Job:
    """A job as its client sees it."""

    status: str = "IN_QUEUE"
    output: Any = None
    error: Any = None
    news: list[Any] = field(default_factory=list)
    """Pieces that nobody fetched yet."""
    task: asyncio.Task[None] | None = None


class Local:
    """Runs jobs by a worker's `handle`: a coroutine for pictures, a generator for text."""

    def __init__(self, worker: Worker | TextWorker) -> None:
        """`worker` is set up already."""
        self._worker = worker
        self._jobs: OrderedDict[str, _Job] = OrderedDict()

    async def run(self, job: Json) -> Json:
        """Queues a job; its `id` and `status`."""
        job_id = uuid.uuid4().hex
        made = self._jobs[job_id] = _Job()
        made.task = asyncio.create_task(self._work(made, {**job, "id": job_id}))
        for old in [name for name, one in self._jobs.items() if one.status in OVER][:-KEPT]:
            del self._jobs[old]
        return {"id": job_id, "status": made.status}

    async def status(self, job_id: str) -> Json:
        """How a job stands: `status`, and `output` or `error`."""
        job = self._find(job_id)
        shown = {"id": job_id, "status": job.status, "output": job.output, "error": job.error}
        return {name: value for name, value in shown.items() if value is not None}

    async def stream(self, job_id: str) -> Json:
        """What a job yielded since the last call, as `stream`; each piece comes once."""
        job = self._find(job_id)
        for _ in range(20):
            if job.news or job.status in OVER:
                break
            await asyncio.sleep(0.05)
        news, job.news = job.news, []
        return {"status": job.status, "stream": [{"output": piece} for piece in news]}

    async def cancel(self, job_id: str) -> Json:
        """Ends a job."""
        job = self._find(job_id)
        if job.status not in OVER:
            job.status = "CANCELLED"
            if job.task:
                job.task.cancel()
        return {"id": job_id, "status": job.status}

    async def health(self) -> Json:
        """Counts of `jobs` and `workers`."""
        standings = [job.status for job in self._jobs.values()]
        running = standings.count("IN_PROGRESS")
        jobs = {"inProgress": running, "inQueue": standings.count("IN_QUEUE")}
        jobs |= {"completed": standings.count("COMPLETED"), "failed": standings.count("FAILED")}
        workers = {"ready": 1, "idle": int(not running), "running": int(bool(running))}
        return {"jobs": jobs, "workers": workers}

    def about(self) -> Json:
        """What the page shows of it."""
        return {"kind": "local", "name": "this machine", "url": None}

    async def close(self) -> None:
        """Ends all jobs."""
        tasks = [job.task for job in self._jobs.values() if job.task and not job.task.done()]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        if isinstance(self._worker, TextWorker):
            self._worker.close()

    def _find(self, job_id: str) -> _Job:
        if job := self._jobs.get(job_id):
            return job
        raise JobUnknown("there is no such job", f"The last {KEPT} answers are kept.")

    async def _work(self, job: _Job, given: Json) -> None:
        with suppress(asyncio.CancelledError):  # one that is cancelled has its state already
            job.status = "IN_PROGRESS"
            try:
                answer = await self._answer(job, given)
            except Exception as error:  # noqa: BLE001 - the worker's last line has failed, and the page goes on
                answer = {"error": f"INTERNAL: {type(error).__name__}."}
            if job.status != "CANCELLED":
                failed = isinstance(answer, Mapping) and answer.get("error")
                job.error, job.output = (failed, None) if failed else (None, answer)
                job.status = "FAILED" if failed else "COMPLETED"

    async def _answer(self, job: _Job, given: Json) -> Any:
        if isinstance(self._worker, Worker):

            async def take(update: Json) -> None:
                job.output = update

            return await self._worker.handle(given, take)
        pieces = []
        async for piece in self._worker.handle(given):
            if isinstance(piece, Mapping) and "error" in piece:
                return {"error": str(piece["error"])}
            pieces.append(piece)
            job.news.append(piece)
        return pieces


def from_environment() -> Local:
    """The worker that this process's environment names (`WORKER_KIND`), set up.

    Raises: SettingsError; what `setup` of the worker raises.
    """
    if os.environ.get("WORKER_KIND", "").strip() == "text":
        text = read_settings(os.environ, TextSettings)
        return Local(TextWorker(text).setup())
    settings: Settings = read_settings(os.environ)
    return Local(Worker(settings).setup())
