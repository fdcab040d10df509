"""Answers text jobs.

The handler is a generator for every job, as the SDK wants it where any job streams. Requests that come
together share the model's batch; the scheduler runs on in its own thread whether or not a post is under way,
so each piece of a stream has all that came since the last one.
"""

from __future__ import annotations

import asyncio
import contextvars
import logging
import time
from collections.abc import AsyncIterator, Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property
from typing import Any, TypeVar, cast

import torch

from live.turns import Turns
from lora.engine.engine import Budgets, LoraEngine
from lora.errors import CodedError
from lora.volume.loader import LoraLibrary
from text.generation import Generation, about
from text.loading import COMPONENT, DEMO, DEMO_FOLDER, TextModel, Wanted, load_model
from text.scheduler import Scheduler
from text_settings import TextSettings
from validation import InvalidInput
from worker.actions import Actions, action_of
from worker.failures import OutOfMemory, unexpected
from worker.logs import JOB_ID
from worker.opening import open_cache
from worker.outputs import guard_size, sendable
from worker.parts import Answer, Job, Parts
from worker.stop import Cancelled, Stop, seconds_for
from worker.text_answers import Writer, error_answer, models_answer
from worker.text_input import MODELS, TextRequest, parse_text_job, plain
from worker.text_models import Models, Ready, prompt_of
from worker.text_statistics import Statistics

log = logging.getLogger("worker")

Result = TypeVar("Result")

PREPARING = 16
"""Threads that fetch and parse adapters, and read prompts."""

DTYPES = {"half": "float16", "float": "float32"}


@dataclass(frozen=True)
class _Face:
    """What the actions ask of a pipeline."""

    name: str
    device: torch.device


@dataclass(frozen=True)
class Prepared:
    """A request whose texts may begin."""

    request: TextRequest
    ready: Ready
    texts: tuple[Generation, ...]
    seconds: float
    """What its adapters took to be fetched and parsed."""


class TextWorker:
    """One base model, its adapters, and the jobs that are answered with them."""

    def __init__(self, settings: TextSettings) -> None:
        self.settings = settings
        self.statistics = Statistics()
        self._preparing = ThreadPoolExecutor(PREPARING, thread_name_prefix="prepare")

    def setup(self) -> TextWorker:
        """Loads the base; returns itself. Raises: ModelUnusable."""
        begun = time.perf_counter()
        with suppress(OSError):  # whatever has to write there later reports it
            self.library.cache.shelf.prepare()
        _ = self.models
        log.info("%s is ready after %.1f s", self.settings.name, time.perf_counter() - begun)
        return self

    def close(self) -> None:
        """Ends all texts and threads."""
        self.scheduler.close()
        self._preparing.shutdown(wait=False, cancel_futures=True)

    @cached_property
    def text(self) -> TextModel:
        """The base model."""
        settings = self.settings
        return load_model(
            Wanted(
                source=settings.model,
                revision=settings.revision or None,
                tokenizer=settings.tokenizer,
                device=settings.device,
                dtype=DTYPES.get(settings.dtype, settings.dtype),
                quantisation="nf4"
                if settings.quantisation == "bitsandbytes"
                else settings.quantisation,
                max_memory_gb=settings.max_memory_gb,
                context=settings.context,
                template=settings.chat_template,
                token=settings.hf_token or None,
            )
        )

    @cached_property
    def engine(self) -> LoraEngine:
        """Applies adapters to it."""
        settings = self.settings
        budgets = Budgets(
            int(settings.lora_originals_gb * 1e9), int(settings.lora_prepared_gb * 1e9)
        )
        return LoraEngine({COMPONENT: self.text.model}, budgets)

    @cached_property
    def library(self) -> LoraLibrary:
        """Finds, fetches and parses adapters."""
        cache = open_cache(self.settings)
        if self.settings.model == DEMO:
            cache.shelf.behind = DEMO_FOLDER.parent / "loras"
        return LoraLibrary(cache, self.engine.key_map, int(self.settings.lora_warm_gb * 1e9))

    @cached_property
    def scheduler(self) -> Scheduler:
        """Writes the texts."""
        return Scheduler(self.text, self.engine, self.settings.most_rows, self.statistics.ended)

    @cached_property
    def _parts(self) -> Parts:
        face: Any = _Face(self.settings.name, self.text.device)
        return Parts(face, self.engine, self.library, None, self.settings, Turns())

    @cached_property
    def models(self) -> Models:
        """Names and adapters."""
        parts = self._parts
        return Models(
            self.settings, self.library, parts.catalog, parts.selection, self.scheduler.rows
        )

    # --- one job --------------------------------------------------------------------------------

    async def handle(self, job: Job) -> AsyncIterator[Any]:
        """The answer to a job in one piece or, for a stream, in many: text of server-sent events.

        A failed job yields `{"error": …}` in OpenAI's shape. Whatever ends the generator early ends the
        job's texts within a step.
        """
        JOB_ID.set(str(job.get("id", "")))
        begun = time.perf_counter()
        stop = Stop(seconds_for(job, self.settings.deadline))
        try:
            async for piece in self._pieces(job, stop):
                yield piece
        except CodedError as error:
            log.info("job failed: %s", error.code)
            yield error_answer(error)
        except (GeneratorExit, asyncio.CancelledError):
            raise
        except Exception as error:  # noqa: BLE001 - the last line: a job must end in an answer
            yield error_answer(unexpected(error))
        finally:
            stop.cancel()
            seconds = round(time.perf_counter() - begun, 3)
            log.info("job ended", extra={"about": {"event": "job", "seconds": seconds}})

    async def _pieces(self, job: Job, stop: Stop) -> AsyncIterator[Any]:
        if action_of(job):
            yield await self._in_a_thread(lambda: self._act(job))
            return
        request = parse_text_job(job)
        if request.kind == MODELS:
            names = await self._in_a_thread(self.models.adapters)
            yield models_answer(self.settings.name, names)
            return
        news, loop = asyncio.Event(), asyncio.get_running_loop()

        def notify() -> None:
            with suppress(RuntimeError):  # the loop is closed: nobody listens any more
                loop.call_soon_threadsafe(news.set)

        try:
            async with asyncio.timeout(stop.left):
                prepared = await self._in_a_thread(lambda: self._prepare(request, stop, notify))
        except TimeoutError:
            raise stop.deadline_exceeded() from None
        writer = Writer(
            request, prepared.texts, request.model or self.settings.name, self.text.tokenizer
        )
        self.scheduler.submit(*prepared.texts)
        while any(text.finish is None for text in prepared.texts):
            await news.wait()
            news.clear()
            _raise_first(prepared.texts)
            if request.stream and (events := self._events(writer, prepared)):
                yield events
        _raise_first(prepared.texts)
        if not request.stream:
            answer = writer.whole(self._extras(prepared))
            guard_size(answer, self.settings.max_answer_mb)
            yield sendable(answer)
        elif events := self._events(writer, prepared):
            yield events

    def _events(self, writer: Writer, prepared: Prepared) -> str:
        done = all(text.finish is not None for text in prepared.texts)
        return writer.events(self._extras(prepared) if done else {})

    async def _in_a_thread(self, work: Callable[[], Result]) -> Result:
        context = contextvars.copy_context()  # the job's id, for the log
        running = self._preparing.submit(context.run, work)
        return await asyncio.wrap_future(cast(Any, running))

    def _prepare(self, request: TextRequest, stop: Stop, notify: Callable[[], None]) -> Prepared:
        """Finds, fetches and parses the adapters, and reads the prompt. Changes nothing."""
        begun = time.perf_counter()
        ready = self.models.load(self.models.choose(request), strict=request.strict)
        seconds = time.perf_counter() - begun
        stop.check()
        tokens = prompt_of(request, self.text, ready, plain(request.messages))
        room = self.text.context - len(tokens)
        texts = tuple(
            Generation(
                tokens,
                request.sampling(number, self.text.defaults, room),
                ready.stack,
                check=stop.check,
                notify=notify,
                special=not request.rules["skip_special_tokens"],
            )
            for number in range(request.count)
        )
        self.statistics.began(texts, request.model or self.settings.name, seconds)
        return Prepared(request, ready, texts, seconds)

    def _extras(self, prepared: Prepared) -> dict[str, Any]:
        """What our answers have besides OpenAI's fields."""
        slowest = max(prepared.texts, key=lambda text: text.times.ended)
        return {
            "seed": prepared.request.seed,
            "loras": prepared.ready.report,
            "timings": {"load": round(prepared.seconds, 4), **about(slowest)},
            "warnings": [
                *self._parts.warnings,
                *prepared.request.warnings,
                *prepared.ready.warnings,
            ],
        }

    def _act(self, job: Job) -> Answer:
        name = action_of(job)
        if name == "statistics":
            return self.statistics.answer(self.scheduler.counts)
        actions = Actions(self._parts, {})
        if name not in actions.table:
            raise InvalidInput(f"action must be one of statistics, {', '.join(actions.table)}")
        answer = actions.answer(job)
        if name == "health":
            answer |= {"kind": "text", **self.scheduler.counts}
        guard_size(answer, self.settings.max_answer_mb)
        return sendable(answer)


def _raise_first(texts: tuple[Generation, ...]) -> None:
    """Raises: the first error of a text, as one with a code."""
    for error in (text.error for text in texts):
        if isinstance(error, torch.OutOfMemoryError):
            raise OutOfMemory("the device's memory did not suffice", "Ask for a shorter text.")
        if isinstance(error, CodedError):
            raise error
        if isinstance(error, Exception):
            raise unexpected(error) from error
        if error is not None:
            raise Cancelled("the worker ends")
