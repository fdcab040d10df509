"""Jobs of a backend that answers a job by one call: what RunPod's queue does elsewhere."""

from __future__ import annotations

import asyncio
import uuid
from abc import ABC, abstractmethod
from collections import OrderedDict
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

from lora.errors import CodedError
from page.backend import JobUnknown, Json

KEPT = 200
"""Ended jobs whose answers are kept."""

OVER = ("COMPLETED", "FAILED", "CANCELLED")


@dataclass
class Running:
    """A job as its client sees it."""

    status: str = "IN_QUEUE"
    output: Any = None
    error: Any = None
    news: list[Any] = field(default_factory=list)
    """Pieces that nobody fetched yet."""
    task: asyncio.Task[None] | None = None

    async def progress(self, update: Json) -> None:
        """Takes an update of the job's progress."""
        if self.status == "IN_PROGRESS":
            self.output = update

    def shown(self, job_id: str) -> Json:
        """The job as RunPod's `/status` answers."""
        shown = {"id": job_id, "status": self.status, "output": self.output, "error": self.error}
        return {name: value for name, value in shown.items() if value is not None}


class Jobs(ABC):
    """A backend (`page.backend.Backend`) whose jobs this process keeps."""

    def __init__(self) -> None:
        self._jobs: OrderedDict[str, Running] = OrderedDict()

    @abstractmethod
    async def answer(self, job: Running, given: Json) -> Any:
        """The job's output, or `{"error": ...}`. Pieces of a stream go into `job.news` as they come."""

    async def run(self, job: Json) -> Json:
        """Queues a job; its `id` and `status`."""
        job_id = uuid.uuid4().hex
        made = self._jobs[job_id] = Running()
        made.task = asyncio.create_task(self._work(made, {**job, "id": job_id}))
        for old in [name for name, one in self._jobs.items() if one.status in OVER][:-KEPT]:
            del self._jobs[old]
        return {"id": job_id, "status": made.status}

    async def status(self, job_id: str) -> Json:
        """How a job stands: `status`, and `output` or `error`."""
        return self._find(job_id).shown(job_id)

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

    async def close(self) -> None:
        """Ends all jobs."""
        tasks = [job.task for job in self._jobs.values() if job.task and not job.task.done()]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    def _find(self, job_id: str) -> Running:
        if job := self._jobs.get(job_id):
            return job
        raise JobUnknown("there is no such job", f"The last {KEPT} answers are kept.")

    async def _work(self, job: Running, given: Json) -> None:
        with suppress(asyncio.CancelledError):  # one that is cancelled has its state already
            job.status = "IN_PROGRESS"
            try:
                answer = await self.answer(job, given)
            except CodedError as error:
                answer = {"error": str(error)}
            except Exception as error:  # noqa: BLE001 - the last line, and the page goes on
                answer = {"error": f"INTERNAL: {type(error).__name__}."}
            if job.status != "CANCELLED":
                failed = isinstance(answer, Mapping) and answer.get("error")
                job.error, job.output = (failed, None) if failed else (None, answer)
                job.status = "FAILED" if failed else "COMPLETED"
