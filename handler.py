"""The job handler: `python handler.py` starts the RunPod worker; importing this does nothing.

A job is prepared (checked, its LoRAs fetched and parsed), drawn (LoRAs applied, pictures drawn, weights put
back) and answered. Every job ends in an answer, and after every job the pipeline is bit for bit what it was
before. While one job draws, others prepare.
"""

from __future__ import annotations

import asyncio
import contextvars
import gc
import logging
import os
import threading
import time
import traceback
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from functools import cache, cached_property
from typing import Any, TypeVar

import torch

from lora.engine.engine import Budgets, LoraEngine, RestoreFailed
from lora.errors import CodedError
from lora.fetch.sources import Reference, parse, redact_url
from lora.fetch.web import quiet_libraries
from lora.volume.loader import LoraLibrary
from pipelines.image import ImagePipeline
from pipelines.loading import load_models
from settings import Settings
from worker.actions import Actions, action_of
from worker.image_job import PHASES, Answer, ImageJob, Job, Parts
from worker.kept import KeptAnswers
from worker.logs import JOB_ID, set_up
from worker.opening import open_cache, read_settings
from worker.outputs import guard_size, open_bucket, sendable
from worker.progress import Progress
from worker.sender import Sender
from worker.shutdown import Shutdown
from worker.stop import Cancelled, Stop, seconds_for

__all__ = ["PHASES", "Worker", "default_worker", "generate_image", "main"]

log = logging.getLogger("worker")

Result = TypeVar("Result")

SendProgress = Callable[[Job, dict[str, Any]], None]

PREPARING = 8
"""Threads that prepare and answer jobs: more than are taken at once, for cancelled jobs' downloads go on."""


class Worker:
    """Serves jobs: prepares several at a time, draws one at a time. All state is in `parts`."""

    def __init__(self, settings: Settings, send_progress: SendProgress | None = None) -> None:
        self.settings = settings
        self._send = send_progress or (lambda job, update: log.debug("%s", update["text"]))
        self._preparing = ThreadPoolExecutor(PREPARING, thread_name_prefix="prepare")
        self._drawing = ThreadPoolExecutor(1, thread_name_prefix="draw")
        self._kept = KeptAnswers()
        self.preloaded: dict[str, str] = {}
        """What became of each source of LORA_PRELOAD: `under way`, `ready`, or an error."""

    def setup(self) -> Worker:
        """Loads the models and opens the cache, so that the first job finds them; returns itself.

        Raises: WeightsMissing, or whatever keeps the models from loading: then no job can be served.
        """
        begun = time.perf_counter()
        log.info("%s is ready after %.1f s", self.parts.pipeline.name, time.perf_counter() - begun)
        if self.settings.preload:
            self.preloaded = {redact_url(source): "under way" for source in self.settings.preload}
            threading.Thread(target=self._preload, name="preload", daemon=True).start()
        return self

    @cached_property
    def parts(self) -> Parts:
        """What every job uses; made when it is first asked for."""
        pipeline = ImagePipeline(load_models(self.settings))
        settings = self.settings
        budgets = Budgets(
            int(settings.lora_originals_gb * 1e9), int(settings.lora_prepared_gb * 1e9)
        )
        engine = LoraEngine(pipeline.components, budgets)
        lora_cache = open_cache(settings)
        with suppress(OSError):  # whoever needs to write will say so
            lora_cache.shelf.prepare()
        library = LoraLibrary(lora_cache, engine.key_map, int(settings.lora_warm_gb * 1e9))
        return Parts(pipeline, engine, library, open_bucket(settings), settings, threading.Lock())

    def check_fitness(self) -> None:
        """Raises: CodedError or OSError if this worker cannot serve: LORA_PRELOAD names what can mean
        nothing, no folder for LoRAs can be written, the device does not compute. (That the weights are
        there and whole, `setup` has found out.)

        A preloaded LoRA that cannot be had at the moment is logged, and is no reason to stop.
        """
        for source in self.settings.preload:
            parse(Reference(source))
        self.parts.library.cache.shelf.prepare()
        if float(torch.ones(2, device=self.parts.pipeline.device).sum()) != 2.0:
            raise Unexpected("the device does not compute")
        log.info("fit; preloading: %s", self.preloaded or "nothing")

    def _preload(self) -> None:
        for source in self.settings.preload:
            try:
                self.parts.library.load(Reference(source))
                self.preloaded[redact_url(source)] = "ready"
            except CodedError as error:
                self.preloaded[redact_url(source)] = str(error)
                log.warning("LORA_PRELOAD: %s", error)

    # --- one job, by a plain call ---------------------------------------------------------------

    def __call__(self, job: Job) -> Answer:
        """The answer to a job, or `{"error": "CODE: sentence. hint"}`. Never raises.

        `refresh_worker` is in it where the process must not go on: weights that could not be put back,
        memory that did not suffice, a device that failed.
        """
        return self._sendable(self._answer(job))

    def _answer(self, job: Job) -> Answer:
        if action_of(job):
            return self._acted(job)
        progress = Progress(lambda update: self._send(job, update))
        one = ImageJob(self.parts, job, progress, Stop(seconds_for(job, self.settings.deadline)))
        for stage in (one.prepare, lambda: self._draw(one)):
            if failed := self._caught(stage):
                return failed
        return self._caught(one.answer)

    def _caught(self, work: Callable[..., Result], *given: Any) -> Result | Answer:
        """Does a stage of a job: what it returns, or the answer that says why it failed."""
        try:
            return work(*given)
        except RestoreFailed as error:
            return _failure(error, refresh=True)
        except CodedError as error:
            return _failure(error)
        except torch.OutOfMemoryError:
            log.warning("out of memory")
        except torch.AcceleratorError as error:
            return _failure(_unexpected(error), refresh=True)
        except Exception as error:  # noqa: BLE001 - the last line: a job must end in an answer
            return _failure(_unexpected(error))
        # Here, and not in the clause above: there the error still holds the job's tensors.
        self._free()
        return _failure(OutOfMemory("the device's memory did not suffice", OOM_HINT), refresh=True)

    def _draw(self, one: ImageJob) -> None:
        """Draws; once more with all caches freed, and the VAE in tiles, if memory does not suffice."""
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

    def _acted(self, job: Job) -> Answer:
        answer: Answer = self._caught(Actions(self.parts, self.preloaded).answer, job)
        return self._caught(guard_size, answer, self.settings.max_answer_mb) or answer

    def _sendable(self, answer: Answer) -> Answer:
        """The last guard: what the platform cannot carry would leave the job without an end."""
        return self._caught(sendable, answer)

    def _free(self) -> None:
        with self.parts.drawing:
            self.parts.engine.free()
        self.parts.library.free()
        gc.collect()
        torch.cuda.empty_cache()

    # --- many jobs, by the platform -------------------------------------------------------------

    async def handle(self, job: Job) -> Answer:
        """As a plain call, for an event loop: others prepare while one draws.

        Cancelling the task ends the job with CANCELLED at its next step, weights put back; a download goes on
        without it, into the cache.
        """
        JOB_ID.set(str(job.get("id", "")))
        if kept := self._kept.get(job):
            log.info("the platform asks again: answered as before")
            return kept
        begun = time.perf_counter()
        answer = self._sendable(await self._handle(job))
        seconds = round(time.perf_counter() - begun, 3)
        about = {"event": "job", "seconds": seconds, "timings": answer.get("timings")}
        log.info("failed" if "error" in answer else "done", extra={"about": about})
        if "error" not in answer and not action_of(job):
            self._kept.put(job, answer)
        return answer

    async def _handle(self, job: Job) -> Answer:
        stop = Stop(seconds_for(job, self.settings.deadline))
        if action_of(job):
            answer = await self._stage(stop, self._preparing, self._acted, job)
            return answer or {}
        async with Sender(job) as sender:
            one = ImageJob(self.parts, job, Progress(sender.send), stop)
            answer = await self._stage(stop, self._preparing, self._caught, one.prepare)
            if answer is None:
                answer = await self._stage(
                    stop, self._drawing, self._caught, self._draw, one, to_its_end=True
                )
            if answer is None:
                answer = await self._stage(stop, self._preparing, self._caught, one.answer)
        return answer or _failure(Unexpected("the job has no answer"))

    async def _stage(
        self,
        stop: Stop,
        pool: ThreadPoolExecutor,
        work: Callable[..., Answer | None],
        *given: Any,
        to_its_end: bool = False,
    ) -> Answer | None:
        """Does a stage in a thread. If the job is to stop, waits for the thread only where `to_its_end`."""
        context = contextvars.copy_context()  # the job's id, for the log
        running: Future[Answer | None] = pool.submit(context.run, work, *given)
        try:
            async with asyncio.timeout(stop.left):
                return await asyncio.shield(asyncio.wrap_future(running))
        except TimeoutError:
            ended: CodedError = stop.deadline_exceeded()
        except asyncio.CancelledError:
            if task := asyncio.current_task():
                task.uncancel()  # the job ends with an answer
            stop.cancel()
            ended = Cancelled("the job was cancelled")
        if to_its_end and not running.cancel():
            with suppress(asyncio.CancelledError):
                return await asyncio.shield(asyncio.wrap_future(running)) or _failure(ended)
        return _failure(ended)


class OutOfMemory(CodedError):
    """The device's memory did not suffice for the job."""

    code = "OUT_OF_MEMORY"


OOM_HINT = "Ask for fewer or smaller pictures."


class Unexpected(CodedError):
    """Anything that nobody foresaw: a fault of the worker."""

    code = "INTERNAL"


def _unexpected(error: Exception) -> Unexpected:
    """Logs where it happened, and not what it said: exceptions' texts may hold a URL or a token."""
    log.error("%s\n%s", type(error).__name__, "".join(traceback.format_tb(error.__traceback__)))
    words = f"the job failed unexpectedly ({type(error).__name__})"
    return Unexpected(words, "This is a fault of the worker; its log has the place.")


def _failure(error: CodedError, *, refresh: bool = False) -> Answer:
    log.info("job failed: %s", error)
    return {"error": str(error), "refresh_worker": True} if refresh else {"error": str(error)}


@cache
def default_worker() -> Worker:
    """The worker of this process, by its environment; the models are loaded when it is first asked for."""
    return Worker(read_settings(os.environ)).setup()


def generate_image(job: Job) -> Answer:
    """The handler function: a job in, its answer out. See `Worker.__call__`.

    The first call loads the models, and raises what keeps them from loading.
    """
    return default_worker()(job)


def main() -> None:
    """Loads the models, then serves RunPod's jobs for ever (or one, with --test_input)."""
    import runpod
    from runpod.serverless.modules import rp_scale

    set_up(json_lines="RUNPOD_POD_ID" in os.environ)
    quiet_libraries()
    worker = default_worker()
    runpod.serverless.register_fitness_check(worker.check_fitness)
    concurrency = worker.settings.concurrency
    Shutdown().guard(rp_scale)
    runpod.serverless.start(
        {"handler": worker.handle, "concurrency_modifier": lambda current: concurrency}
    )


if __name__ == "__main__":
    main()
