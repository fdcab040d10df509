"""Starts a worker for pictures and streams of frames: `WORKER_KIND=live python handler.py`.

The SDK asks once, at the start, whether the handler is a generator, and the answers of a generator come as
lists. So streaming is a kind of its own, and a worker for pictures answers as ever.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

from handler import Worker, main
from worker.live_job import has_frames, stream_frames
from worker.logs import JOB_ID
from worker.parts import Answer, Job


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
    """As `handler.main`: with WORKER_SERVE=http frames come by /live, whatever the kind.

    Raises: SystemExit, with why.
    """
    main(lambda worker: LiveWorker(worker).handle)
