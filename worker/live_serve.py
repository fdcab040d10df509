"""Starts a worker for pictures and streams of frames: `WORKER_KIND=live python handler.py`.

The SDK asks once, at the start, whether the handler is a generator, and the answers of a generator come as
lists. So streaming is a kind of its own, and a worker for pictures answers as ever.
"""

from __future__ import annotations

import asyncio
import os
import sys
from collections.abc import AsyncIterator

from handler import Worker, default_worker
from lora.fetch.web import quiet_libraries
from pipelines.weights import WeightsIncomplete, WeightsMissing
from settings import SettingsError
from worker.live_job import has_frames, stream_frames
from worker.logs import JOB_ID, set_up
from worker.parts import Answer, Job
from worker.shutdown import Shutdown


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
    """Loads the models, then serves RunPod's jobs until the process ends. Raises: SystemExit, with why."""
    os.environ.setdefault("RUNPOD_DEBUG_LEVEL", "INFO")  # runpod's own DEBUG logs every answer
    import runpod
    from runpod.serverless.modules import rp_scale

    set_up(json_lines="RUNPOD_POD_ID" in os.environ)
    quiet_libraries()
    try:
        worker = default_worker()
    except (SettingsError, WeightsMissing, WeightsIncomplete) as error:
        sys.exit(f"the worker cannot start: {error}")
    runpod.serverless.register_fitness_check(worker.check_fitness)
    worker.intake.guard(rp_scale)
    Shutdown().guard(rp_scale)
    runpod.serverless.start(
        {
            "handler": LiveWorker(worker).handle,
            "concurrency_modifier": lambda _: worker.settings.concurrency,
            "return_aggregate_stream": True,
        }
    )
