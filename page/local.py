"""A worker in the page's own process."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

from handler import Worker
from page.backend import Json
from page.jobs import Jobs, Running
from settings import Settings
from text_settings import TextSettings
from worker.opening import read_settings
from worker.text_worker import TextWorker


class Local(Jobs):
    """Answers jobs by a worker's `handle`: a coroutine for pictures, a generator for text."""

    def __init__(self, worker: Worker | TextWorker) -> None:
        """`worker` is set up already."""
        super().__init__()
        self._worker = worker

    async def answer(self, job: Running, given: Json) -> Any:
        """The worker's answer, or all pieces of it."""
        if isinstance(self._worker, Worker):
            return await self._worker.handle(given, job.progress)
        pieces = []
        async for piece in self._worker.handle(given):
            if isinstance(piece, Mapping) and "error" in piece:
                return {"error": str(piece["error"])}
            pieces.append(piece)
            job.news.append(piece)
        return pieces

    def about(self) -> Json:
        """What the page shows of it."""
        return {"kind": "local", "name": "this machine", "url": None}

    async def close(self) -> None:
        """Ends all jobs and the worker's threads."""
        await super().close()
        if isinstance(self._worker, TextWorker):
            self._worker.close()


def from_environment() -> Local:
    """The worker that this process's environment names (`WORKER_KIND`), set up.

    Raises: SettingsError; what `setup` of the worker raises.
    """
    if os.environ.get("WORKER_KIND", "").strip() == "text":
        text = read_settings(os.environ, TextSettings)
        return Local(TextWorker(text).setup())
    settings: Settings = read_settings(os.environ)
    return Local(Worker(settings).setup())
