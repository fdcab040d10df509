"""The job handler: `python handler.py` starts the RunPod worker; importing this does nothing.

A job has three stages. It is prepared: checked, its LoRAs fetched and parsed. It is drawn: the LoRAs applied,
the pictures generated, the weights put back. It is answered. Every job ends in an answer, and after every job
the pipeline is bit for bit what it was before. While one job draws, others prepare.
"""

from __future__ import annotations

import asyncio
import contextvars
import gc
import logging
import os
import sys
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from functools import cache, cached_property
from importlib import import_module
from typing import Any, TypeVar

from worker.reading import START

if __name__ == "__main__":  # reading the weights takes as long as importing what follows
    START.begin(os.environ)

import torch

from lora.engine.engine import EngineBusy, RestoreFailed
from lora.errors import CodedError
from lora.fetch.web import quiet_libraries
from pipelines.weights import WeightsIncomplete, WeightsMissing
from settings import Settings, SettingsError
from worker.actions import Actions, action_of
from worker.failures import OOM_HINT, OutOfMemory, Unexpected, failure, unexpected
from worker.image_job import PHASES, ImageJob
from worker.logs import JOB_ID, set_up
from worker.opening import read_settings
from worker.parts import Answer, Job, Parts, make_parts
from worker.pictures.outputs import guard_size, sendable
from worker.preload import check_fit, preload
from worker.progress import Progress
from worker.queue.intake import Intake, Turn
from worker.queue.kept import KeptAnswers
from worker.queue.sender import Post, sender_of
from worker.queue.serve import take_jobs
from worker.stop import Cancelled, Stop, seconds_for

__all__ = ["PHASES", "Worker", "default_worker", "generate_image", "main"]

log = logging.getLogger("worker")

Result = TypeVar("Result")

SendProgress = Callable[[Job, dict[str, Any]], None]

LEFT_BEHIND = 64
"""Threads that may still work for jobs that were ended early; with more the worker asks to be replaced."""


class Worker:
    """Serves jobs: prepares several at once, and draws one at a time. What jobs share is in `parts`."""

    def __init__(self, settings: Settings, send_progress: SendProgress | None = None) -> None:
        self.settings = settings
        self._send = send_progress or (lambda job, update: log.debug("%s", update["text"]))
        self._preparing = ThreadPoolExecutor(
            LEFT_BEHIND + 2 * settings.concurrency, thread_name_prefix="prepare"
        )
        self._drawing = ThreadPoolExecutor(1, thread_name_prefix="draw")
        self._left_behind = set[Future[Any]]()
        self._kept = KeptAnswers()
        self.intake = Intake()
        self.preloaded: dict[str, str] = {}
        """Source of LORA_PRELOAD -> `under way`, `ready`, or an error."""

    def setup(self) -> Worker:
        """Loads the models and opens the cache before the first job; returns itself.

        Raises: WeightsMissing, or any error of loading the models; then no job can be served.
        """
        imported, parts = START.seconds, self.parts
        with suppress(OSError):  # whatever has to write there later reports it
            parts.library.cache.shelf.prepare()
        if parts.pipeline.device.type == "cuda":
            begun = time.perf_counter()
            parts.pipeline.warm_up()
            parts.seconds["warm_up"] = time.perf_counter() - begun
        parts.started(imported, START.reading)
        self.preloaded = preload(parts.library, self.settings.preload)
        return self

    @cached_property
    def parts(self) -> Parts:
        """What every job uses; made at the first access."""
        return make_parts(self.settings)

    def check_fitness(self) -> None:
        """Raises: CodedError or OSError if this worker cannot serve: a source of LORA_PRELOAD is malformed,
        no folder for LoRAs can be written, or the device does not compute. `setup` has checked the weights.

        A LoRA of LORA_PRELOAD that cannot be fetched now is logged, and does not stop the worker.
        """
        parts = self.parts
        check_fit(parts.library, parts.pipeline.device, self.settings.preload, self.preloaded)

    # --- one job, by a plain call ---------------------------------------------------------------

    def __call__(self, job: Job) -> Answer:
        """The answer to a job, or `{"error": "CODE: sentence. hint"}`. After `setup`, never raises.

        `refresh_worker` is set where the process must not go on: weights could not be put back, the memory
        did not suffice, or the device failed.
        """
        return self._sendable(self._answer(job))

    def _answer(self, job: Job) -> Answer:
        progress = Progress(lambda update: self._send(job, update))
        if action_of(job):
            return self._acted(job, progress)
        stop = Stop(seconds_for(job, self.settings.deadline))
        one = ImageJob(self.parts, job, progress, stop, Turn())
        for stage in (one.prepare, lambda: self._draw(one)):
            if failed := self._caught(stage):
                return failed
        return self._caught(one.answer)

    def _caught(self, work: Callable[..., Result], *given: Any) -> Result | Answer:
        """Runs a stage of a job. Returns its result, or the answer that says why it failed."""
        try:
            return work(*given)
        except RestoreFailed as error:
            return failure(error, refresh=True)
        except CodedError as error:
            return failure(error)
        except torch.OutOfMemoryError:
            log.warning("out of memory")
        except (torch.AcceleratorError, EngineBusy) as error:  # no later job could draw either
            return failure(unexpected(error), refresh=True)
        except Exception as error:  # noqa: BLE001 - the last line: a job must end in an answer
            return failure(unexpected(error))
        # Outside of the clause above, in which the error still holds the job's tensors.
        self._free()
        return failure(OutOfMemory("the device's memory did not suffice", OOM_HINT), refresh=True)

    def _draw(self, one: ImageJob) -> None:
        """Draws. If the memory does not suffice, draws again with all caches freed and the VAE in tiles."""
        try:
            one.draw()
        except torch.OutOfMemoryError:
            log.warning("out of memory; once more with less")
        else:
            return
        self._free()
        with self.parts.pipeline.sparing():
            one.draw()
        one.warnings.append("memory was short: the pictures were decoded in tiles")

    def _acted(self, job: Job, progress: Progress) -> Answer:
        actions = Actions(self.parts, self.preloaded, progress.download)
        answer: Answer = self._caught(actions.answer, job)
        return self._caught(guard_size, answer, self.settings.max_answer_mb) or answer

    def _sendable(self, answer: Answer) -> Answer:
        """Makes sure that the platform can carry the answer; otherwise the job would never end."""
        return self._caught(sendable, answer)

    def _free(self) -> None:
        with self.parts.drawing:
            self.parts.engine.free()
        self.parts.library.free()
        gc.collect()
        torch.cuda.empty_cache()

    # --- many jobs, by the platform -------------------------------------------------------------

    async def handle(self, job: Job, post: Post | None = None) -> Answer:
        """The same as a plain call, for an event loop: other jobs prepare while one draws.

        `post` sends an update of the progress; without it the platform gets them. Cancelling the task ends
        the job with CANCELLED at its next step, and the weights are put back. Its downloads go on.
        """
        JOB_ID.set(str(job.get("id", "")))
        with self.intake.turn(job) as turn:
            if kept := self._kept.get(job):
                log.info("the platform asks again: answered as before")
                return kept
            begun = time.perf_counter()
            answer = self._sendable(await self._handle(job, turn, post))
        seconds = round(time.perf_counter() - begun, 3)
        about = {"event": "job", "seconds": seconds, "timings": answer.get("timings")}
        log.info("failed" if "error" in answer else "done", extra={"about": about})
        if "error" not in answer and not action_of(job):
            self._kept.put(job, answer)
        return answer

    async def _handle(self, job: Job, turn: Turn, post: Post | None) -> Answer:
        stop = Stop(seconds_for(job, self.settings.deadline))
        async with sender_of(job, post) as sender:
            progress = Progress(sender.send)
            if action_of(job):
                turn.ends()  # it draws nothing
                answer = await self._stage(stop, self._preparing, self._acted, job, progress)
                return answer or {}
            one = ImageJob(self.parts, job, progress, stop, turn)
            answer = await self._stage(stop, self._preparing, self._caught, one.prepare)
            if answer is None:
                answer = await self._stage(
                    stop, self._drawing, self._caught, self._draw, one, to_its_end=True
                )
            if answer is None:
                answer = await self._stage(stop, self._preparing, self._caught, one.answer)
        return answer or failure(Unexpected("the job has no answer"))

    async def _stage(
        self,
        stop: Stop,
        pool: ThreadPoolExecutor,
        work: Callable[..., Answer | None],
        *given: Any,
        to_its_end: bool = False,
    ) -> Answer | None:
        """Runs a stage in a thread. A job that is stopped waits for the thread only with `to_its_end`."""
        context = contextvars.copy_context()  # the job's id, for the log
        running: Future[Answer | None] = pool.submit(context.run, work, *given)
        try:
            async with asyncio.timeout(stop.left):
                return await asyncio.shield(asyncio.wrap_future(running))
        except TimeoutError:
            ended: CodedError = stop.deadline_exceeded()
        except asyncio.CancelledError:
            if task := asyncio.current_task():
                task.uncancel()  # the task goes on, to return an answer
            stop.cancel()
            ended = Cancelled("the job was cancelled")
        queued = running.cancel()  # nothing that was not begun is begun now
        if to_its_end and not queued:
            with suppress(asyncio.CancelledError):
                return await asyncio.shield(asyncio.wrap_future(running)) or failure(ended)
        if not queued:  # its download goes on, into the cache
            self._left_behind.add(running)
            running.add_done_callback(self._left_behind.discard)
        return failure(ended, refresh=len(self._left_behind) > LEFT_BEHIND)


@cache
def default_worker() -> Worker:
    """The worker of this process, set up from the environment at the first call."""
    return Worker(read_settings(os.environ)).setup()


def generate_image(job: Job) -> Answer:
    """The handler function, as `Worker.__call__`; the first call loads the models, or raises."""
    return default_worker()(job)


def main(handle_of: Callable[[Worker], Callable[..., Any]] = lambda worker: worker.handle) -> None:
    """Serves until the process ends: RunPod's jobs (one with --test_input), or HTTP with WORKER_SERVE=http.

    `handle_of` makes of a worker what takes the jobs of RunPod's queue. Raises: SystemExit, with why.
    """
    set_up(json_lines="RUNPOD_POD_ID" in os.environ)
    quiet_libraries()
    try:
        settings: Settings = read_settings(os.environ)
        if settings.serve == "http":
            return import_module("worker.http.images").serve(Worker(settings))
        worker = default_worker()
    except (SettingsError, WeightsMissing, WeightsIncomplete, CodedError) as error:
        sys.exit(f"the worker cannot start: {error}")
    return take_jobs(handle_of(worker), settings.concurrency, worker.check_fitness, worker.intake)


if __name__ == "__main__":
    kind = os.environ.get("WORKER_KIND", "").strip()
    other = {"text": "worker.text.serve", "live": "worker.live_serve"}.get(kind)
    import_module(other).serve() if other else main()
