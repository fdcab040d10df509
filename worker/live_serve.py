"""Starts a worker for pictures and streams of frames: `WORKER_KIND=live python handler.py`.

The SDK asks once, at the start, whether the handler is a generator, and the answers of a generator come as
lists. So streaming is a kind of its own, and a worker for pictures answers as ever.
"""

from __future__ import annotations

import asyncio
import os
import sys
from collections.abc import AsyncIterator
from importlib import import_module

from handler import Worker, default_worker
from lora.errors import CodedError
from lora.fetch.web import quiet_libraries
from pipelines.weights import WeightsIncomplete, WeightsMissing
from settings import Settings, SettingsError
from worker.live_job import has_frames, stream_frames
from worker.logs import JOB_ID, set_up
from worker.opening import read_settings
from worker.parts import Answer, Job
from worker.queue_serve import take_jobs


class LiveWorker:
    """Answers a job with frames in many pieces, and every other one as an image worker does, in one."""

    def __init__(self, worker: Worker) -> None:
        self._worker = worker
        self._places = asyncio.Semaphore(worker.settings.live_sessions)

    async def handle(self, job: Job) -> AsyncIterator[Answer]:
        """The pieces of a job's answer; a failed one's last piece is `{"error": ...}`."""
        if not has_frames(job):
            yield await self._worker.handle(job)
            return
        JOB_ID.set(str(job.get("id", "")))
        async with self._places:  # jobs wait where clients are turned away
            async for piece in stream_frames(job, self._worker):
                yield piece


def serve() -> None:
    """Loads the models, then serves RunPod's jobs until the process ends, or HTTP with WORKER_SERVE=http.

    Raises: SystemExit, with why.
    """
    set_up(json_lines="RUNPOD_POD_ID" in os.environ)
    quiet_libraries()
    try:
        settings: Settings = read_settings(os.environ)
        if settings.serve == "http":  # it streams frames by /live, whatever the kind
            return import_module("worker.http_images").serve(Worker(settings))
        worker = default_worker()
    except (SettingsError, WeightsMissing, WeightsIncomplete, CodedError) as error:
        sys.exit(f"the worker cannot start: {error}")
    handle = LiveWorker(worker).handle
    return take_jobs(handle, settings.concurrency, worker.check_fitness, worker.intake)
