"""A worker in the page's own process."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

from handler import Worker
from live.session import run
from live.wire import Receive, Send
from page.backend import Json
from page.jobs import Jobs, Running
from settings import Settings
from text_settings import TextSettings
from worker.opening import read_settings
from worker.text.worker import TextWorker

ABOUT: Json = {"kind": "local", "name": "this machine", "url": None}
"""What the page shows of a worker in its own process."""


class Local(Jobs):
    """A worker for pictures: its `handle` answers jobs, and its sessions draw live frames."""

    def __init__(self, worker: Worker) -> None:
        """`worker` is set up already."""
        super().__init__()
        self._worker = worker

    async def answer(self, job: Running, given: Json) -> Any:
        """The worker's answer."""
        return await self._worker.handle(given, job.progress)

    async def live(self, receive: Receive, send: Send) -> None:
        """Serves a session of live frames, as the worker's own server does."""
        await run(receive, send, self._worker)

    def about(self) -> Json:
        """What the page shows of it."""
        return ABOUT


class LocalText(Jobs):
    """A worker for text, whose `handle` is a generator."""

    def __init__(self, worker: TextWorker) -> None:
        """`worker` is set up already."""
        super().__init__()
        self._worker = worker

    async def answer(self, job: Running, given: Json) -> Any:
        """All pieces of the worker's answer, which are told as they come."""
        pieces = []
        async for piece in self._worker.handle(given, job.progress):
            if isinstance(piece, Mapping) and "error" in piece:
                return {"error": str(piece["error"])}
            pieces.append(piece)
            job.news.append(piece)
        return pieces

    def about(self) -> Json:
        """What the page shows of it."""
        return ABOUT

    async def close(self) -> None:
        """Ends all jobs and the worker's threads."""
        await super().close()
        self._worker.close()


def from_environment() -> Local | LocalText:
    """The worker that this process's environment names (`WORKER_KIND`), set up.

    Raises: SettingsError; what `setup` of the worker raises.
    """
    if os.environ.get("WORKER_KIND", "").strip() == "text":
        text = read_settings(os.environ, TextSettings)
        return LocalText(TextWorker(text).setup())
    settings: Settings = read_settings(os.environ)
    return Local(Worker(settings).setup())
