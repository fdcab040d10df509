"""The queue: all jobs of an endpoint, and which worker has which. No HTTP, no processes."""

from __future__ import annotations

import asyncio
import time
import uuid
from collections import defaultdict, deque
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from typing import Any

from emulator.job import MB, Job, Status, TooLarge

STREAM_LIMIT = 1 * MB
"""Bytes that one piece of a stream may have."""

LIVES = 2
"""How many workers a job is given to, should they die while they have it."""

EXECUTION_TIMEOUT, TTL = 600.0, 86_400.0
"""Seconds that a job may run, and that it may exist, unless its policy says otherwise."""

KEEP, KEEP_SYNC = 1800.0, 60.0
"""Seconds for which a final answer can be asked for."""

SETTLED = 0.3
"""Seconds until a worker can stop a job that it took. The SDK starts a job up to 0.1 s after it took it, and
ignores a signal to stop that comes before that."""


class JobQueue:
    """All jobs of one endpoint. Used within one event loop."""

    def __init__(self) -> None:
        self._jobs: dict[str, Job] = {}
        self._waiting: deque[str] = deque()
        self._changed = asyncio.Event()
        self._to_stop: defaultdict[str, dict[str, float]] = defaultdict(dict)
        """For each worker the jobs that it should stop, each with the time from which it can."""
        self.retried = 0
        self.on_final: list[Callable[[Job], None]] = []
        """Functions that are called with each job that ends."""

    def __iter__(self) -> Iterator[Job]:
        return iter(self._jobs.values())

    def find(self, job_id: str) -> Job | None:
        """The job with this id, as long as it is kept."""
        return self._jobs.get(job_id)

    def count(self, status: Status) -> int:
        """How many jobs are in a state."""
        return sum(job.status is status for job in self._jobs.values())

    @property
    def waited(self) -> float:
        """Seconds for which the first job in the queue has waited; 0 if there is none."""
        if not self._waiting:
            return 0.0
        return time.monotonic() - self._jobs[self._waiting[0]].created

    # --- the client's side ----------------------------------------------------------------------

    def add(self, request: Mapping[str, Any], *, sync: bool = False, size: int = 0) -> Job:
        """Queues a new job. `size`: bytes of the request. Raises: TooLarge."""
        job = Job(f"{'sync-' if sync else ''}{uuid.uuid4()}-e1", request, sync)
        if size > job.limit:
            raise TooLarge("the payload", size, job.limit)
        self._jobs[job.id] = job
        self._queue(job)
        return job

    def cancel(self, job: Job) -> None:
        """Ends a job, and signals the worker that has it to stop."""
        self._end(job, Status.CANCELLED, stop=True)

    def retry(self, job: Job) -> bool:
        """Queues a job that failed or timed out as if it were new; False if it did neither."""
        if job.status not in (Status.FAILED, Status.TIMED_OUT):
            return False
        vars(job).update(vars(Job(job.id, job.request, job.sync)))
        self.retried += 1
        self._queue(job)
        return True

    def purge(self) -> int:
        """Cancels all jobs in the queue; returns their number."""
        waiting = [self._jobs[job_id] for job_id in list(self._waiting)]
        for job in waiting:
            self.cancel(job)
        return len(waiting)

    def read_stream(self, job: Job) -> list[Any]:
        """Returns the pieces that came since the last call."""
        pieces, job.stream = job.stream, []
        return pieces

    def close(self) -> None:
        """Cancels every job that has not ended, so that waiting clients are answered. Calls no `on_final`."""
        self.on_final.clear()
        for job in self:
            self.cancel(job)

    # --- the worker's side ----------------------------------------------------------------------

    async def take(
        self, worker: str, most: int, wait: float, may: Callable[[], bool] = lambda: True
    ) -> list[Job]:
        """Gives a worker up to `most` jobs; waits up to `wait` seconds for the first.

        `may` says, when there is one, whether the worker still takes jobs: it can end while it waits.
        """
        deadline = time.monotonic() + wait
        while not (self._waiting and may()):
            left = deadline - time.monotonic()
            if left <= 0:
                return []
            self._changed.clear()
            with suppress(TimeoutError):
                await asyncio.wait_for(self._changed.wait(), left)
        taken = [self._jobs[self._waiting.popleft()] for _ in range(min(most, len(self._waiting)))]
        for job in taken:
            job.status, job.worker, job.started = Status.IN_PROGRESS, worker, time.monotonic()
            job.lives += 1
            self._to_stop[worker].pop(job.id, None)  # an earlier try's signal would stop this one
        return taken

    def update(self, job: Job, worker: str, output: Any, size: int = 0) -> None:
        """Takes a progress update, which is the job's output until it ends. Raises: TooLarge."""
        if size > job.limit:
            raise TooLarge("the progress", size, job.limit)
        if job.is_held_by(worker):
            job.output = output
            job.updates.append(output)
        elif job.answers and job.worker == worker:
            job.late += 1

    def add_stream(self, job: Job, worker: str, piece: Any, size: int = 0) -> None:
        """Takes a piece of a stream. Raises: TooLarge."""
        if size > STREAM_LIMIT:
            raise TooLarge("a piece of the stream", size, STREAM_LIMIT)
        if job.is_held_by(worker):
            job.stream.append(piece)

    def finish(self, job: Job, worker: str, result: Mapping[str, Any], size: int = 0) -> None:
        """Takes a worker's result; drops it if the job has ended or another worker has it now.

        Raises: TooLarge; the job is then COMPLETED without an output, as on the platform.
        """
        mine = job.is_held_by(worker)
        if not mine and job.worker == worker and not job.answers:
            job.let_go = job.let_go or time.monotonic()
        if size > job.limit:
            if mine:
                job.output = None
                self._end(job, Status.COMPLETED)
            raise TooLarge("the result", size, job.limit)
        if mine:
            job.output = result.get("output")
            if result.get("error"):
                job.error = str(result["error"])
            job.answers += 1
            self._end(job, Status.FAILED if job.error else Status.COMPLETED)

    def lost(self, worker: str) -> None:
        """Puts a dead worker's jobs back at the front of the queue; those that had `LIVES` workers fail."""
        self._to_stop.pop(worker, None)
        for job in reversed(self.holds(worker)):  # the oldest is put in last, and so comes first
            if job.lives < LIVES:
                self._clear(job)
                self._waiting.appendleft(job.id)
                self._changed.set()
            else:
                job.output, job.error = None, "the worker died while it worked on this job"
                self._end(job, Status.FAILED)

    def holds(self, worker: str) -> list[Job]:
        """The jobs that a worker works on."""
        return [job for job in self if job.is_held_by(worker)]

    async def to_stop(
        self, worker: str, wait: float, over: Callable[[], bool] = lambda: False
    ) -> list[str]:
        """Ids of the jobs that a worker should stop; waits for one up to `wait` seconds, or until `over`."""
        deadline, signals = time.monotonic() + wait, self._to_stop[worker]
        while True:
            now = time.monotonic()
            ids = [job_id for job_id, since in signals.items() if since <= now]
            if ids or now >= deadline or over():
                break
            await asyncio.sleep(0.02)
        for job_id in ids:
            del signals[job_id]
        return ids

    # --- time -----------------------------------------------------------------------------------

    def tick(self) -> None:
        """Times out jobs that took too long, and forgets old answers. Called a few times a second."""
        now = time.monotonic()
        for job in list(self):
            if job.status.final:
                if now - (job.ended or now) > (KEEP_SYNC if job.sync else KEEP):
                    del self._jobs[job.id]
            elif now - job.created > job.policy("ttl", TTL):
                job.error = "the job's ttl is over"
                self._end(job, Status.TIMED_OUT, stop=True)
            elif job.started is not None and job.status is Status.IN_PROGRESS:
                limit = job.policy("executionTimeout", EXECUTION_TIMEOUT)
                if now - job.started > limit:
                    job.error = f"the job ran for more than {limit:g} s"
                    self._end(job, Status.TIMED_OUT, stop=True)

    def _clear(self, job: Job) -> None:
        """Removes what a dead worker left in a job that gets another."""
        job.status, job.worker, job.started = Status.IN_QUEUE, None, None
        job.output, job.stream, job.updates = None, [], []

    def _queue(self, job: Job) -> None:
        self._waiting.append(job.id)
        self._changed.set()

    def _end(self, job: Job, status: Status, *, stop: bool = False) -> None:
        if job.status.final:
            return
        if job.status is Status.IN_QUEUE:
            self._waiting.remove(job.id)
        elif stop and job.worker and job.started is not None:
            self._to_stop[job.worker][job.id] = job.started + SETTLED
        if status not in (Status.COMPLETED, Status.FAILED):
            job.output = None  # it is a progress update
        job.status, job.ended = status, time.monotonic()
        job.done.set()
        for call in self.on_final:
            call(job)
