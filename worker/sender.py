"""Posts a job's progress to the platform: in order, and never after the answer."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Mapping
from contextlib import suppress
from types import TracebackType
from typing import Any

log = logging.getLogger(__name__)

DRAIN = 2.0
"""Seconds that the last update may take; then the answer is sent without it."""


class Sender:
    """Posts one job's updates, one after the other. Of the updates that wait, only the newest is posted.

    The SDK's own `progress_update` starts a thread per update, which may arrive in any order, even after the
    answer (runpod 1.12). Outside of the platform nothing is posted.
    """

    def __init__(
        self,
        job: Mapping[str, Any],
        also: Callable[[Mapping[str, Any], dict[str, Any]], None] = lambda job, update: None,
    ) -> None:
        """`also` gets each update too, in the thread that sends it."""
        self._job, self._also = job, also
        self._loop = asyncio.get_running_loop()
        self._newest: dict[str, Any] | None = None
        self._wake = asyncio.Event()
        self._closed = False
        self._task: asyncio.Task[None] | None = None

    def send(self, update: dict[str, Any]) -> None:
        """Takes an update from any thread, without waiting; drops it if the job has ended."""
        self._also(self._job, update)
        with suppress(RuntimeError):  # the loop is closed, and a download has outlived its job
            self._loop.call_soon_threadsafe(self._put, update)

    def _put(self, update: dict[str, Any]) -> None:
        if not self._closed:
            self._newest = update
            self._wake.set()

    async def __aenter__(self) -> Sender:
        from runpod.serverless.modules.worker_state import IS_LOCAL_TEST

        if not IS_LOCAL_TEST:
            self._task = asyncio.create_task(self._work())
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._closed = True
        self._wake.set()
        if self._task:
            done, _ = await asyncio.wait([self._task], timeout=DRAIN)
            if not done:
                self._task.cancel()
                log.warning("the last progress of %s was not taken in time", self._job.get("id"))

    async def _work(self) -> None:
        from runpod.http_client import AsyncClientSession
        from runpod.serverless.modules.rp_http import send_result

        async with (
            AsyncClientSession() as session
        ):  # not shared: the SDK writes the job's id into it
            while True:
                await self._wake.wait()
                self._wake.clear()
                update, self._newest = self._newest, None
                if update is not None:
                    data = {"status": "IN_PROGRESS", "output": update}
                    await send_result(session, data, self._job)
                if self._closed and self._newest is None:
                    return
