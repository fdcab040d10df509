"""Ending a job early: because its client cancelled it, or because its time is over."""

from __future__ import annotations

import threading
import time
from collections.abc import Mapping

from lora.errors import CodedError

MARGIN = 5.0
"""Seconds before the platform's own limit at which a job is ended, so that its answer still arrives."""


class Cancelled(CodedError):
    """The client cancelled the job."""

    code = "CANCELLED"


class DeadlineExceeded(CodedError):
    """The job's time was over before it was done."""

    code = "DEADLINE_EXCEEDED"


class Stop:
    """One job's end before its time. Set by any thread, looked at by the one that works."""

    def __init__(self, seconds: float | None = None) -> None:
        """`seconds`: how long the job may take from now; None for no limit."""
        self._seconds = seconds
        self._deadline = None if seconds is None else time.monotonic() + seconds
        self._cancelled = threading.Event()

    def cancel(self) -> None:
        """The job is not wanted any more."""
        self._cancelled.set()

    @property
    def left(self) -> float | None:
        """Seconds until the deadline; None if there is none."""
        return None if self._deadline is None else self._deadline - time.monotonic()

    def deadline_exceeded(self) -> DeadlineExceeded:
        """The error that says so."""
        return DeadlineExceeded(
            f"the job was not done after {self._seconds:g} s", "Ask for fewer steps or pictures."
        )

    def check(self) -> None:
        """Does nothing as long as the job may go on. Raises: Cancelled, DeadlineExceeded."""
        if self._cancelled.is_set():
            raise Cancelled("the job was cancelled")
        if self._deadline is not None and time.monotonic() > self._deadline:
            raise self.deadline_exceeded()


def seconds_for(job: object, default: float) -> float | None:
    """How long a job may take: its policy's executionTimeout (ms) less the margin, else the default (0: no
    limit); the smaller of both.
    """
    policy = job.get("policy") if isinstance(job, Mapping) else None
    given = policy.get("executionTimeout") if isinstance(policy, Mapping) else None
    limits = [default] if default > 0 else []
    if isinstance(given, (int, float)) and not isinstance(given, bool) and given > 0:
        limits.append(max(given / 1000 - MARGIN, given / 2000))
    return min(limits, default=None)
