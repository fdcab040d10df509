"""The queue: every job, its state, and who works on it. No HTTP, no processes."""

from __future__ import annotations

import asyncio
import time
import uuid
from collections import defaultdict, deque
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any

MB = 1 << 20

RUN_LIMIT, RUNSYNC_LIMIT, STREAM_LIMIT = 10 * MB, 20 * MB, 1 * MB
"""Bytes of a request or an answer, by how the job came in, and of one piece of a stream."""

EXECUTION_TIMEOUT, TTL = 600.0, 86_400.0
"""Seconds that a job may run, and that it may exist, unless its policy says otherwise."""

KEEP, KEEP_SYNC = 1800.0, 60.0
"""Seconds for which a final answer can be asked for."""

SETTLED = 0.3
"""Seconds after which a worker can stop a job that it took: the SDK starts it up to 0.1 s after that, and
forgets a signal to stop that comes before."""


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


RETRIED = (Status.FAILED, Status.TIMED_OUT)
"""The states from which a client may ask for another try."""


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
    """Every progress update of this life, in the order in which they came."""
    late: int = 0
    """How many updates came after the answer."""
    answers: int = 0
    """How many results were taken for the job's answer."""
    let_go: float | None = None
    """When its worker posted the end of a job that had ended without it: cancelled, or timed out."""
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

    def shown(self) -> dict[str, Any]:
        """As /status answers."""
        answer: dict[str, Any] = {"id": self.id, "status": self.status}
        if self.started is not None:
            answer["delayTime"] = int(1000 * (self.started - self.created))
            answer["workerId"] = self.worker
        if self.execution_ms is not None:
            answer["executionTime"] = self.execution_ms
        if self.output is not None:
            answer["output"] = self.output
        if self.error is not None:
            answer["error"] = self.error
        return answer

    def taken(self) -> dict[str, Any]:
        """As a worker gets it."""
        return {**self.request, "id": self.id}


class TooLarge(ValueError):
    """A request, a result or a piece of a stream is over the platform's limit."""

    def __init__(self, what: str, size: int, limit: int) -> None:
        super().__init__(f"{what} has {size / MB:.1f} MB; {limit // MB} are allowed")


class JobQueue:
    """All jobs of one endpoint. Lives in one event loop."""

    def __init__(self, *, lives: int = 2) -> None:
        """`lives`: how many workers a job may be given to, should they die under it."""
        self._lives = lives
        self._jobs: dict[str, Job] = {}
        self._waiting: deque[str] = deque()
        self._changed = asyncio.Event()
        self._to_stop: defaultdict[str, dict[str, float]] = defaultdict(dict)
        """Per worker the jobs that it should stop, and from when on it can."""
        self.retried = 0
        self.on_final: list[Callable[[Job], None]] = []
        """Called with each job that reached its final state."""

    def __iter__(self) -> Iterator[Job]:
        return iter(self._jobs.values())

    def find(self, job_id: str) -> Job | None:
        """The job of this id, as long as it is kept."""
        return self._jobs.get(job_id)

    def count(self, status: Status) -> int:
        """How many jobs are in a state."""
        return sum(job.status is status for job in self._jobs.values())

    @property
    def waited(self) -> float:
        """Seconds since the oldest job in the queue came."""
        if not self._waiting:
            return 0.0
        return time.monotonic() - self._jobs[self._waiting[0]].created

    # --- the client's side ----------------------------------------------------------------------

    def add(self, request: Mapping[str, Any], *, sync: bool = False, size: int = 0) -> Job:
        """A new job; `size` is that of the request in bytes. Raises: TooLarge."""
        name = f"{'sync-' if sync else ''}{uuid.uuid4()}-e1"
        job = Job(name, request, sync)
        if size > job.limit:
            raise TooLarge("the payload", size, job.limit)
        self._jobs[name] = job
        self._queue(job)
        return job

    def cancel(self, job: Job) -> None:
        """Ends a job; the worker that has it is told to stop."""
        self._end(job, Status.CANCELLED, stop=True)

    def retry(self, job: Job) -> bool:
        """Puts a failed job into the queue again; False if it did not fail."""
        if job.status not in RETRIED:
            return False
        self._clear(job)
        job.error, job.ended, job.lives, job.answers, job.late = None, None, 0, 0, 0
        job.let_go = None
        job.created = time.monotonic()
        job.done.clear()
        self.retried += 1
        self._queue(job)
        return True

    def purge(self) -> int:
        """Cancels all jobs that no worker has yet; how many."""
        waiting = [self._jobs[job_id] for job_id in list(self._waiting)]
        for job in waiting:
            self.cancel(job)
        return len(waiting)

    def read_stream(self, job: Job) -> list[Any]:
        """What came since the last reading."""
        found, job.stream = job.stream, []
        return found

    def close(self) -> None:
        """Cancels all that has not ended, so that who waits for it is answered. No one else is told."""
        self.on_final.clear()
        for job in self:
            self.cancel(job)

    # --- the worker's side ----------------------------------------------------------------------

    async def take(
        self, worker: str, most: int, wait: float, may: Callable[[], bool] = lambda: True
    ) -> list[Job]:
        """Up to `most` jobs for a worker; waits for one, for so many seconds.

        `may` is asked at the moment of taking: a worker can end while its question is open.
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
            self._to_stop[worker].pop(job.id, None)  # of an earlier try: it would stop this one
        return taken

    def update(self, job: Job, worker: str, output: Any, size: int = 0) -> None:
        """Progress: shown as the job's output until it ends. Raises: TooLarge."""
        if size > job.limit:
            raise TooLarge("the progress", size, job.limit)
        if _is_of(job, worker):
            job.output = output
            job.updates.append(output)
        elif job.answers and job.worker == worker:
            job.late += 1

    def add_stream(self, job: Job, worker: str, piece: Any, size: int = 0) -> None:
        """A piece of a stream. Raises: TooLarge."""
        if size > STREAM_LIMIT:
            raise TooLarge("a piece of the stream", size, STREAM_LIMIT)
        if _is_of(job, worker):
            job.stream.append(piece)

    def finish(self, job: Job, worker: str, result: Mapping[str, Any], size: int = 0) -> None:
        """A worker's result. That of a job which ended or went to another worker meanwhile is dropped.

        Raises: TooLarge; the job is then COMPLETED without an output, as on the platform.
        """
        mine = _is_of(job, worker)
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
        """A worker died: its jobs go back to the front of the queue, or fail."""
        self._to_stop.pop(worker, None)
        for job in reversed(self.holds(worker)):  # the oldest comes to the very front
            if job.lives < self._lives:
                self._clear(job)
                self._waiting.appendleft(job.id)
                self._changed.set()
            else:
                job.output, job.error = None, "the worker died while it worked on this job"
                self._end(job, Status.FAILED)

    def holds(self, worker: str) -> list[Job]:
        """The jobs that a worker has."""
        return [job for job in self if _is_of(job, worker)]

    async def to_stop(
        self, worker: str, wait: float, over: Callable[[], bool] = lambda: False
    ) -> list[str]:
        """Ids of jobs that a worker should stop; waits for one, for so many seconds or until `over`."""
        deadline, signals = time.monotonic() + wait, self._to_stop[worker]
        while True:
            now = time.monotonic()
            found = [job_id for job_id, since in signals.items() if since <= now]
            if found or now >= deadline or over():
                break
            await asyncio.sleep(0.02)
        for job_id in found:
            del signals[job_id]
        return found

    # --- time -----------------------------------------------------------------------------------

    def tick(self) -> None:
        """Ends what took too long, forgets what is old. Called a few times a second."""
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
        """What a try left in a job that gets another."""
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
            job.output = None  # a progress update is no answer
        job.status, job.ended = status, time.monotonic()
        job.done.set()
        for call in self.on_final:
            call(job)


def _is_of(job: Job, worker: str) -> bool:
    return job.status is Status.IN_PROGRESS and job.worker == worker
