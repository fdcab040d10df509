"""The public API: what clients call. https://docs.runpod.io/serverless/endpoints/operation-reference"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Mapping
from typing import Any

import aiohttp
from fastapi import APIRouter, HTTPException, Request

from emulator.bodies import Json, parse, read
from emulator.job import RUN_LIMIT, RUNSYNC_LIMIT, Job, Status, TooLarge
from emulator.jobs import JobQueue
from emulator.workers import WorkerPool

log = logging.getLogger(__name__)

WAIT, LEAST_WAIT, MOST_WAIT = 90_000, 1_000, 300_000
"""Milliseconds that /runsync waits for an answer: by default, at least, at most."""

STREAM_WAIT = 1.0
"""Seconds that /stream waits for a piece."""

WEBHOOK_TRIES, WEBHOOK_PAUSE, WEBHOOK_TIMEOUT = 3, 10.0, 10.0

WEEK = 604_800_000
POLICY = {"executionTimeout": (5_000, WEEK), "ttl": (10_000, WEEK)}
"""Milliseconds: at least, at most."""


class ClientApi:
    """The routes under /v2/{endpoint}."""

    def __init__(
        self, queue: JobQueue, pool: WorkerPool, *, webhook_pause: float = WEBHOOK_PAUSE
    ) -> None:
        """`webhook_pause`: seconds between the tries to post an answer."""
        self._queue, self._pool, self._pause = queue, pool, webhook_pause
        self._posts: set[asyncio.Task[None]] = set()
        queue.on_final.append(self._call_webhook)
        self.router = APIRouter()
        add = self.router.add_api_route
        add("/run", self.run, methods=["POST"])
        add("/runsync", self.runsync, methods=["POST"])
        add("/status/{job_id}", self.status, methods=["GET", "POST"])
        add("/stream/{job_id}", self.stream, methods=["GET", "POST"])
        add("/cancel/{job_id}", self.cancel, methods=["POST"])
        add("/retry/{job_id}", self.retry, methods=["POST"])
        add("/purge-queue", self.purge, methods=["POST"])
        add("/health", self.health, methods=["GET"])

    async def run(self, request: Request) -> Json:
        """Queues a job."""
        return _brief(await self._add(request, sync=False))

    async def runsync(self, request: Request, wait: int = WAIT) -> Json:
        """Queues a job and waits for its end; answers with its state if the end does not come in time."""
        job = await self._add(request, sync=True)
        seconds = min(max(wait, LEAST_WAIT), MOST_WAIT) / 1000
        try:
            await asyncio.wait_for(job.done.wait(), seconds)
        except TimeoutError:
            return _brief(job)
        return Json(job.shown())

    async def status(self, job_id: str) -> Json:
        """Answers with a job's state, its progress or its answer."""
        return Json(self._find(job_id).shown())

    async def stream(self, job_id: str) -> Json:
        """Answers with what a streaming handler yielded since the last call; waits a little for a piece."""
        job = self._find(job_id)
        for _ in range(int(STREAM_WAIT / 0.05)):
            if job.stream or job.status.final:
                break
            await asyncio.sleep(0.05)
        return Json({"status": job.status, "stream": self._queue.read_stream(job)})

    async def cancel(self, job_id: str) -> Json:
        """Ends a job, whether it is queued or in progress."""
        job = self._find(job_id)
        self._queue.cancel(job)
        return _brief(job)

    async def retry(self, job_id: str) -> Json:
        """Queues a job that failed or timed out again."""
        job = self._find(job_id)
        if not self._queue.retry(job):
            raise HTTPException(
                400, f"only failed and timed-out jobs are retried, not {job.status}"
            )
        return _brief(job)

    async def purge(self) -> Json:
        """Cancels all queued jobs."""
        return Json({"removed": self._queue.purge(), "status": "completed"})

    async def health(self) -> Json:
        """Counts jobs and workers."""
        queue, workers = self._queue, list(self._pool.workers.values())
        running = sum(bool(queue.holds(worker.id)) for worker in workers)
        ready = [worker for worker in workers if worker.ready and not worker.stopping]
        return Json(
            {
                "jobs": {
                    "completed": queue.count(Status.COMPLETED),
                    "failed": queue.count(Status.FAILED) + queue.count(Status.TIMED_OUT),
                    "inProgress": queue.count(Status.IN_PROGRESS),
                    "inQueue": queue.count(Status.IN_QUEUE),
                    "retried": queue.retried,
                },
                "workers": {
                    "idle": sum(not queue.holds(worker.id) for worker in ready),
                    "initializing": sum(not (w.ready or w.stopping) for w in workers),
                    "ready": len(ready),
                    "running": running,
                    "throttled": 0,
                    "unhealthy": 0,
                },
            }
        )

    async def _add(self, request: Request, *, sync: bool) -> Job:
        limit = RUNSYNC_LIMIT if sync else RUN_LIMIT
        body, size = await read(request, limit)
        try:
            if size > limit:
                raise TooLarge("the payload", size, limit)
            job = parse(body)
            _check(job)
            return self._queue.add(job, sync=sync, size=size)
        except TooLarge as error:
            raise HTTPException(413, str(error)) from error

    def _find(self, job_id: str) -> Job:
        job = self._queue.find(job_id)
        if job is None:
            raise HTTPException(404, "job not found")
        return job

    def _call_webhook(self, job: Job) -> None:
        url = job.request.get("webhook")
        if url:
            post = self._post(url, Json(job.shown()).body, job.id)
            task = asyncio.get_running_loop().create_task(post)
            self._posts.add(task)
            task.add_done_callback(self._posts.discard)

    async def _post(self, url: str, answer: bytes | memoryview, job_id: str) -> None:
        headers = {"Content-Type": "application/json"}
        limit = aiohttp.ClientTimeout(WEBHOOK_TIMEOUT)
        async with aiohttp.ClientSession(headers=headers, timeout=limit) as session:
            for attempt in range(WEBHOOK_TRIES):
                if attempt:
                    await asyncio.sleep(self._pause)
                try:
                    async with session.post(url, data=answer) as response:
                        if response.status == 200:
                            return
                        log.warning("webhook of %s: HTTP %d", job_id, response.status)
                except (aiohttp.ClientError, TimeoutError, ValueError) as error:
                    log.warning("webhook of %s: %s", job_id, type(error).__name__)


def _brief(job: Job) -> Json:
    return Json({"id": job.id, "status": job.status})


def _check(body: Mapping[str, Any]) -> None:
    """Raises: HTTPException 400 that says what is wrong with a job."""
    if body.get("input") is None:
        raise HTTPException(400, "input is missing")
    if not isinstance(body.get("webhook"), (str, type(None))):
        raise HTTPException(400, "webhook is no string")
    policy = {} if body.get("policy") is None else body["policy"]
    if not isinstance(policy, dict):
        raise HTTPException(400, "policy is no object")
    for name, (least, most) in POLICY.items():
        value = policy.get(name)
        if value is not None and not (type(value) in (int, float) and least <= value <= most):
            raise HTTPException(400, f"policy.{name} is no number of {least} to {most} ms")
