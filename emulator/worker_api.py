"""The wire between a worker's SDK and the platform, as runpod 1.12 speaks it."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from typing import Any

from fastapi import APIRouter, HTTPException, Request, Response

from emulator.bodies import Json, parse
from emulator.job import Job, TooLarge
from emulator.jobs import JobQueue
from emulator.workers import WorkerPool

log = logging.getLogger(__name__)

TAKE_WAIT = 1.5
"""Seconds for which a question for jobs is held open. A worker that is to end waits for the answer."""

STOP_WAIT = 10.0
"""Seconds for which the question what to stop is held open, unless its worker is asked to end. They are more,
because the SDK does not ask again for a second after an empty answer."""


def wire_environment(address: str, endpoint: str, key: str) -> dict[str, str]:
    """The variables that make a worker's SDK talk to this server.

    The SDK fills in `$ID` and `$RUNPOD_POD_ID`, and needs a `?` in each URL.
    """
    base = f"{address}/v2/{endpoint}"
    return {
        "RUNPOD_WEBHOOK_GET_JOB": f"{base}/job-take/$ID?gpu=emulated",
        "RUNPOD_WEBHOOK_POST_OUTPUT": f"{base}/job-done/$RUNPOD_POD_ID/$ID?gpu=emulated",
        "RUNPOD_WEBHOOK_POST_STREAM": f"{base}/job-stream/$RUNPOD_POD_ID/$ID?gpu=emulated",
        "RUNPOD_WEBHOOK_PING": f"{base}/ping/$RUNPOD_POD_ID?gpu=emulated",
        "RUNPOD_PING_INTERVAL": "1000",
        "RUNPOD_AI_API_KEY": key,
        "RUNPOD_ENDPOINT_ID": endpoint,
        "RUNPOD_SKIP_AUTO_SYSTEM_CHECKS": "true",
        "RUNPOD_SKIP_GPU_CHECK": "true",
    }


class WorkerApi:
    """The routes that workers call, under /v2/{endpoint}."""

    def __init__(self, queue: JobQueue, pool: WorkerPool) -> None:
        self._queue, self._pool = queue, pool
        self.router = APIRouter()
        add = self.router.add_api_route
        add("/job-take/{worker}", self.take, methods=["GET"])
        add("/job-take-batch/{worker}", self.take_batch, methods=["GET"])
        add("/job-stop/{worker}", self.stop, methods=["GET"])
        add("/job-done/{worker}/{job_id}", self.done, methods=["POST"])
        add("/job-stream/{worker}/{job_id}", self.stream, methods=["POST"])
        add("/ping/{worker}", self.ping, methods=["GET"])

    async def take(self, worker: str) -> Response:
        """One job, or 204."""
        jobs = await self._take(worker, 1)
        return Json(jobs[0].taken()) if jobs else Response(status_code=204)

    async def take_batch(self, worker: str, batch_size: int = 1) -> Response:
        """Several jobs, or 204."""
        jobs = await self._take(worker, max(1, batch_size))
        return Json([job.taken() for job in jobs]) if jobs else Response(status_code=204)

    async def _take(self, worker: str, most: int) -> list[Job]:
        self._pool.heard_of(worker)
        # A worker that gets no more jobs waits as well: its SDK would ask again at once.
        return await self._queue.take(worker, most, TAKE_WAIT, lambda: self._pool.takes(worker))

    async def stop(self, worker: str) -> Response:
        """Answers with the ids of the jobs that the worker should stop."""
        ids = await self._queue.to_stop(worker, STOP_WAIT, lambda: self._pool.ends(worker))
        return Json({"jobsToStop": ids})

    async def done(self, worker: str, job_id: str, request: Request) -> Response:
        """Progress, or the result."""

        def use(job: Job, content: Mapping[str, Any], size: int) -> None:
            if content.get("status") == "IN_PROGRESS":
                self._queue.update(job, worker, content.get("output"), size)
                return
            if content.get("stopPod"):
                self._pool.stop(worker)
            self._queue.finish(job, worker, content, size)

        return await self._receive(job_id, request, use)

    async def stream(self, worker: str, job_id: str, request: Request) -> Response:
        """A piece of a stream."""

        def use(job: Job, content: Mapping[str, Any], size: int) -> None:
            self._queue.add_stream(job, worker, content, size)

        return await self._receive(job_id, request, use)

    async def ping(self, worker: str) -> Response:
        """Answers a sign of life. None is needed: the emulator sees the worker's process."""
        return Json({"status": "ok"})

    async def _receive(
        self, job_id: str, request: Request, use: Callable[[Job, Mapping[str, Any], int], None]
    ) -> Response:
        """Passes what a worker posted to `use`. Logs why a post is refused: the SDK logs only a 400."""
        body = await request.body()
        job = self._queue.find(job_id)
        if job is None:
            raise HTTPException(404, "job not found")
        try:
            use(job, parse(body), len(body))
        except (TooLarge, HTTPException) as error:
            reason = str(error) if isinstance(error, TooLarge) else error.detail
            log.warning("a post for %s is refused: %s", job_id, reason)
            raise HTTPException(400, reason) from error
        return Json({"status": "ok"})
