"""Sends a job's progress on, to the platform or to a client: in order, and never after the answer."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import AbstractAsyncContextManager, asynccontextmanager, suppress
from types import TracebackType
from typing import Any

log = logging.getLogger(__name__)

Post = Callable[[dict[str, Any]], Awaitable[None]]
"""A function that sends one update, and waits until it is taken."""

DRAIN = 2.0
"""Seconds that the last update may take; then the answer is sent without it."""


class Sender:
    """Posts one job's updates, one after the other. Of the updates that wait, only the newest is posted."""

    def __init__(self, post: Post) -> None:
        self._post = post
        self._loop = asyncio.get_running_loop()
        self._newest: dict[str, Any] | None = None
        self._wake = asyncio.Event()
        self._closed = False

    def send(self, update: dict[str, Any]) -> None:
        """Takes an update from any thread, without waiting; drops it if the job has ended."""
        with suppress(RuntimeError):  # the loop is closed, and a download has outlived its job
            self._loop.call_soon_threadsafe(self._put, update)

    def _put(self, update: dict[str, Any]) -> None:
        if not self._closed:
            self._newest = update
            self._wake.set()

    async def __aenter__(self) -> Sender:
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
        done, _ = await asyncio.wait([self._task], timeout=DRAIN)
        if not done:
            self._task.cancel()
            log.warning("the last progress was not taken in time")

    async def _work(self) -> None:
        while True:
            await self._wake.wait()
            self._wake.clear()
            update, self._newest = self._newest, None
            if update is not None:
                await self._post(update)
            if self._closed and self._newest is None:
                return


def sender_of(job: Mapping[str, Any], post: Post | None) -> AbstractAsyncContextManager[Sender]:
    """A sender of the job's updates to `post`, or without it to the platform."""
    return Sender(post) if post else to_platform(job)


@asynccontextmanager
async def to_platform(job: Mapping[str, Any]) -> AsyncIterator[Sender]:
    """A sender of the job's updates to RunPod; outside of the platform it posts nothing.

    The SDK's own `progress_update` starts a thread per update, which may arrive in any order, even after the
    answer (runpod 1.12).
    """
    from runpod.http_client import AsyncClientSession
    from runpod.serverless.modules.rp_http import send_result
    from runpod.serverless.modules.worker_state import IS_LOCAL_TEST

    async with AsyncClientSession() as session:  # not shared: the SDK writes the job's id into it

        async def post(update: dict[str, Any]) -> None:
            if not IS_LOCAL_TEST:
                await send_result(session, {"status": "IN_PROGRESS", "output": update}, job)

        async with Sender(post) as sender:
            yield sender
