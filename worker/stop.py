"""Ending a job early: its client cancelled it, or its time is over."""

from __future__ import annotations

import threading
import time
from collections.abc import Mapping

from lora.errors import CodedError

MARGIN = 5.0
"""A job is ended this many seconds before the platform's own limit, so that its answer still arrives."""


class Cancelled(CodedError):
    """The client cancelled the job."""

    code = "CANCELLED"


class DeadlineExceeded(CodedError):
    """The job was not done in its time."""

    code = "DEADLINE_EXCEEDED"


class Stop:
    """Tells the thread that works on a job to end it early. Any thread may set it.

    A job's time is that in which it is worked on: while it waits for its turn, its clock stands.
    """

    def __init__(self, seconds: float | None = None) -> None:
        """`seconds`: how long the job may be worked on from now on; None for no limit."""
        self._seconds = seconds
        self._deadline = None if seconds is None else time.monotonic() + seconds
        self._rest: float | None = None
        """The seconds that are left, while the clock stands."""
        self._cancelled = threading.Event()

    def wait(self) -> None:
        """Stops the job's clock: it waits for its turn."""
        if self._deadline is not None:
            self._rest, self._deadline = self.left, None

    def go_on(self) -> None:
        """Lets the job's clock run again, if it stands."""
        if (rest := self._rest) is not None:
            self._rest, self._deadline = None, time.monotonic() + rest

    def cancel(self) -> None:
        """Notes that the client no longer wants the job."""
        self._cancelled.set()

    @property
    def left(self) -> float | None:
        """Seconds until the deadline; None if there is none, or the clock stands."""
        return None if self._deadline is None else self._deadline - time.monotonic()

    def deadline_exceeded(self) -> DeadlineExceeded:
        """The error for a job whose time is over."""
        return DeadlineExceeded(
            f"the job was not done after {self._seconds:g} s", "Ask for fewer steps or pictures."
        )

    def check(self) -> None:
        """Returns if the job may go on. Raises: Cancelled, DeadlineExceeded."""
        if self._cancelled.is_set():
            raise Cancelled("the job was cancelled")
        if self._deadline is not None and time.monotonic() > self._deadline:
            raise self.deadline_exceeded()


def seconds_for(job: object, default: float) -> float | None:
    """Seconds that a job may be worked on; None for no limit.

    They are its executionTimeout (milliseconds) less `MARGIN`, but at least half of it; or `default` (0 for
    none) if that is smaller.
    """
    policy = job.get("policy") if isinstance(job, Mapping) else None
    timeout = policy.get("executionTimeout") if isinstance(policy, Mapping) else None
    limits = [default] if default > 0 else []
    if isinstance(timeout, (int, float)) and not isinstance(timeout, bool) and timeout > 0:
        limits.append(max(timeout / 1000 - MARGIN, timeout / 2000))
    return min(limits, default=None)
