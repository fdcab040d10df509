"""One job: what its client asked for, its state, and what its workers posted."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any

MB = 1 << 20

RUN_LIMIT, RUNSYNC_LIMIT = 10 * MB, 20 * MB
"""Bytes that a request or an answer may have, by how the job came in."""


class Status(StrEnum):
    """A job's state, in the words of the API."""

    IN_QUEUE = "IN_QUEUE"
    IN_PROGRESS = "IN_PROGRESS"
    COMPLETED = "COMPLETED"
    FAILED = "FAILED"
    CANCELLED = "CANCELLED"
    TIMED_OUT = "TIMED_OUT"

    @property
    def final(self) -> bool:
        """Whether a job in this state stays in it."""
        return self not in (Status.IN_QUEUE, Status.IN_PROGRESS)


@dataclass
class Job:
    """One job. Times are by `time.monotonic()`."""

    id: str
    request: Mapping[str, Any]
    """What the client posted: `input`, and perhaps `policy`, `webhook`, `s3Config`."""
    sync: bool
    created: float = field(default_factory=time.monotonic)
    started: float | None = None
    ended: float | None = None
    status: Status = Status.IN_QUEUE
    worker: str | None = None
    lives: int = 0
    """How many workers it was given to."""
    output: Any = None
    error: str | None = None
    stream: list[Any] = field(default_factory=list)
    updates: list[Any] = field(default_factory=list)
    """Every progress update from the present worker, in the order in which they came."""
    late: int = 0
    """How many updates came after the answer."""
    answers: int = 0
    """How many results were taken for the job's answer."""
    let_go: float | None = None
    """When its worker posted the end of a job that was already cancelled or timed out."""
    done: asyncio.Event = field(default_factory=asyncio.Event)

    @property
    def limit(self) -> int:
        """Bytes that its answer may have."""
        return RUNSYNC_LIMIT if self.sync else RUN_LIMIT

    @property
    def execution_ms(self) -> int | None:
        """Milliseconds that a worker had it, once it ended."""
        if self.started is None or self.ended is None:
            return None
        return int(1000 * (self.ended - self.started))

    def policy(self, name: str, default: float) -> float:
        """A limit of the job's policy in seconds; the API has milliseconds."""
        value = (self.request.get("policy") or {}).get(name)
        return value / 1000 if isinstance(value, (int, float)) and value > 0 else default

    def is_held_by(self, worker: str) -> bool:
        """Whether this worker works on it now."""
        return self.status is Status.IN_PROGRESS and self.worker == worker

    def shown(self) -> dict[str, Any]:
        """The job as /status answers."""
        answer: dict[str, Any] = {"id": self.id, "status": self.status}
        if self.started is not None:
            answer["delayTime"] = int(1000 * (self.started - self.created))
            answer["workerId"] = self.worker
        ends = {"executionTime": self.execution_ms, "output": self.output, "error": self.error}
        return answer | {name: value for name, value in ends.items() if value is not None}

    def taken(self) -> dict[str, Any]:
        """The job as a worker gets it."""
        return {**self.request, "id": self.id}


class TooLarge(ValueError):
    """A request, a result or a piece of a stream is over the platform's limit."""

    def __init__(self, what: str, size: int, limit: int) -> None:
        super().__init__(f"{what} has {size / MB:.1f} MB; {limit // MB} are allowed")
