"""A session: one client's frames, drawn as they come, under whatever LoRAs each of them asks for.

What carries the messages is not known here: a WebSocket's server gives `run` two functions.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Any

Receive = Callable[[], Awaitable[str | bytes]]
"""Waits for the client's next message, a text or bytes. Raises: Closed once the client is gone."""

Send = Callable[[bytes], Awaitable[None]]
"""Sends one message (`live.wire.pack`). Raises: Closed once the client is gone."""


class Closed(Exception):
    """The client is gone: `receive` and `send` raise this, and the session ends in order."""


async def run(receive: Receive, send: Send, worker: Any) -> None:
    """Serves one client from its first message on, and returns when the session is over.

    `worker`: a `handler.Worker` after `setup`. `receive` is awaited by one task at a time, and so is `send`.
    The session ends when either raises Closed, when its time is over (`WORKER_LIVE_SECONDS`) or when this
    task is cancelled; where more sessions than `WORKER_LIVE_SESSIONS` are there, it ends at once with an
    answer that says so. Whatever the client sends, nothing else is raised, and no error ends a session.
    When this returns or raises, all its threads are done and every weight is bit for bit what it was. The
    caller closes the socket.
    """
    raise NotImplementedError
