"""How the worker ends: it finishes and posts the running jobs, and takes no new one."""

from __future__ import annotations

import asyncio
import signal
from collections.abc import Awaitable, Callable
from contextlib import suppress
from types import FrameType, ModuleType
from typing import Any, TypeVar

Reply = TypeVar("Reply")


class Shutdown:
    """Ends the SDK's open requests to the platform as soon as SIGTERM or SIGINT comes.

    The SDK asks for new jobs, and which jobs to stop, by requests that the platform holds open. At a signal
    the SDK waits up to 90 s for their answers, and a job that comes with one is lost (runpod 1.12).
    """

    def __init__(self) -> None:
        self._over: asyncio.Event | None = None

    def guard(self, scaling: ModuleType) -> None:
        """Wraps the functions by which the SDK's scaler, `runpod.serverless.modules.rp_scale`, asks.

        The SDK has no setting for this outside of its local tests.
        """
        for name in ("get_job", "get_stop_signals"):
            setattr(scaling, name, self._guarded(getattr(scaling, name)))

    def _guarded(self, ask: Callable[..., Awaitable[Reply]]) -> Callable[..., Awaitable[Reply]]:
        async def asked(*arguments: Any) -> Reply:
            over = self._listen()
            question = asyncio.ensure_future(ask(*arguments))
            end = asyncio.ensure_future(over.wait())
            try:
                await asyncio.wait({question, end}, return_when=asyncio.FIRST_COMPLETED)
                if question.done():
                    return question.result()
            finally:
                end.cancel()
                question.cancel()
                with suppress(asyncio.CancelledError, Exception):
                    await question  # so that its connection is closed at once
            raise TimeoutError("the worker ends")  # the SDK asks again unless it is to end

        return asked

    def _listen(self) -> asyncio.Event:
        """Sets signal handlers at the first question. They call the SDK's own, set by then, first."""
        if self._over is None:
            over, loop = asyncio.Event(), asyncio.get_running_loop()
            for number in (signal.SIGTERM, signal.SIGINT):
                before = signal.getsignal(number)

                def handle(number: int, frame: FrameType | None, before: Any = before) -> None:
                    if callable(before):
                        before(number, frame)
                    loop.call_soon_threadsafe(over.set)

                signal.signal(number, handle)
            self._over = over
        return self._over
