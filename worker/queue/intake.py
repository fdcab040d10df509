"""When the worker takes another job from the platform: not while one of its own would keep it waiting."""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import ModuleType
from typing import Any

from worker.parts import Job

FETCHING = 2.0
"""Seconds of preparing after which a job counts as fetching: the device is idle, and may draw another."""

LEAD = 2.0
"""Most seconds before the end of a drawing at which the next job is taken."""

LOOK, PAUSE = 1.0, 0.05
"""Seconds for which the SDK's question waits for its time, and between two looks. Then the SDK asks again."""


class Turn:
    """How far one job is. Told by the threads that work on it; the event loop reads `free`."""

    def __init__(self, lead: float = 0.0) -> None:
        """`lead`: seconds before its last step from which on it does not hold up another job; after it, if
        negative.
        """
        self._lead = lead
        self._taken = self._begun = time.monotonic()
        self._runs = 1
        self.prepared: float | None = None
        """Seconds from its taking until it was ready to be drawn; None before that."""
        self.decoded = 0.0
        """Seconds from its last step to the end of its drawing."""
        self.free = self._taken + FETCHING
        """When, by time.monotonic() and as far as is known now, another job would not wait for this one."""

    def waits(self) -> None:
        """Notes that the job is ready to be drawn."""
        self.prepared, self.free = time.monotonic() - self._taken, math.inf

    def draws(self, runs: int = 1) -> None:
        """Notes that it is being drawn, by so many pipelines one after the other."""
        self._begun, self._runs, self.free = time.monotonic(), runs, math.inf

    def step(self, done: int, total: int) -> None:
        """Notes that a step of a pipeline is done; the steps that are left will take as long as these did."""
        now = time.monotonic()
        if self._runs == 1:
            self.free = now + (now - self._begun) / done * (total - done) - self._lead
        if done == total:  # what is drawn is decoded, or goes to the next pipeline
            self._begun, self._runs = now, self._runs - 1

    def ends(self) -> None:
        """Notes that nothing is left to draw; what follows holds up no other job."""
        if self._runs == 0:
            self.decoded = time.monotonic() - self._begun
        self.free = -math.inf


class Intake:
    """Decides when the worker asks for another job, and asks for one at a time.

    The worker cannot see a job before it has it, and cannot give it back. A job that it takes while it draws
    would wait here, though another worker may be idle. So the next one is taken as long before the end of a
    drawing as the last one took to be prepared, or while all that the worker has is fetching.
    """

    def __init__(self) -> None:
        self._turns: dict[str, Turn] = {}
        self._lead = 0.0

    @property
    def open(self) -> bool:
        """Whether another job would not wait for those that are here."""
        now = time.monotonic()
        return all(turn.free <= now for turn in self._turns.values())

    @contextmanager
    def turn(self, job: Job) -> Iterator[Turn]:
        """A job's turn, from the time when it was taken to the end of the block."""
        turn = self._take(job)
        try:
            yield turn
        finally:
            self._turns.pop(_key(job), None)
            if turn.prepared is not None:
                self._lead = min(turn.prepared, LEAD) - min(turn.decoded, LEAD)

    def guard(self, scaling: ModuleType) -> None:
        """Wraps the function by which the SDK's scaler, `runpod.serverless.modules.rp_scale`, asks for jobs.

        The SDK's own means, `concurrency_modifier`, will not do: a number that changes counts only once all
        jobs have ended, and an idle worker asks for that many jobs at once (runpod 1.12).
        """
        ask = scaling.get_job

        async def asked(session: Any, count: int = 1) -> list[dict[str, Any]] | None:
            for _ in range(round(LOOK / PAUSE)):
                if self.open:
                    jobs: list[dict[str, Any]] | None = await ask(session, 1)
                    for job in jobs or ():
                        self._take(job)  # it holds up others before the SDK has begun with it
                    return jobs
                await asyncio.sleep(PAUSE)
            return None

        scaling.get_job = asked  # type: ignore[attr-defined]

    def _take(self, job: Job) -> Turn:
        return self._turns.setdefault(_key(job), Turn(self._lead))


def _key(job: Job) -> str:
    return str(job.get("id", ""))
