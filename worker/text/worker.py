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
from collections.abc import AsyncGenerator, AsyncIterator, Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import AsyncExitStack, aclosing, asynccontextmanager, suppress
from dataclasses import dataclass
from typing import Any, TypeVar, cast

from lora.errors import CodedError
from lora.fetch.transfers import Report
from text.generation import Generation, about
from text.loading import ModelUnusable
from text_settings import TextSettings
from validation import InvalidInput
from worker.actions import Actions, action_of
from worker.failures import unexpected
from worker.logs import JOB_ID
from worker.openai_answers import error_answer, models_answer
from worker.parts import Answer, Job
from worker.pictures.outputs import guard_size, sendable
from worker.preload import check_fit, preload
from worker.progress import Progress
from worker.queue.sender import Post, sender_of
from worker.stop import Stop, seconds_for
from worker.text.answers import Writer, raise_first
from worker.text.base import Base
from worker.text.bases import Bases
from worker.text.input import MODELS, TextRequest, parse_text_job, plain
from worker.text.models import Ready, prompt_of
from worker.text.statistics import Statistics
from worker.text.vllm import VllmBase

log = logging.getLogger("worker")

Result = TypeVar("Result")

PREPARING = 16
"""Threads that fetch and parse adapters, and read prompts."""


@dataclass(frozen=True)
class Prepared:
    """A request whose texts may begin."""

    request: TextRequest
    ready: Ready
    texts: tuple[Generation, ...]
    seconds: float
    """What its adapters took to be fetched and parsed."""
    warnings: tuple[str, ...] = ()
    """What every answer of this worker has to say."""


class TextWorker:
    """One base model, its adapters, and the jobs that are answered with them."""

    def __init__(self, settings: TextSettings) -> None:
        self.settings = settings
        self.statistics = Statistics()
        self.preloaded: dict[str, str] = {}
        """Source of LORA_PRELOAD -> `under way`, `ready`, or an error."""
        self.bases = Bases(self._load)
        self._preparing = ThreadPoolExecutor(PREPARING, thread_name_prefix="prepare")

    def setup(self) -> TextWorker:
        """Loads the base; returns itself. Raises: ModelUnusable."""
        begun = time.perf_counter()
        self.bases.start(self.settings.model)
        with suppress(OSError):  # whatever has to write there later reports it
            self.base.library.cache.shelf.prepare()
        log.info("%s is ready after %.1f s", self.settings.name, time.perf_counter() - begun)
        self.preloaded = preload(self.base.library, self.settings.preload)
        return self

    def check_fitness(self) -> None:
        """Raises: CodedError or OSError if this worker cannot serve: a source of LORA_PRELOAD or LORA_MODULES
        is malformed, no folder for LoRAs can be written, or the device does not compute.

        A LoRA of LORA_PRELOAD that cannot be fetched now is logged, and does not stop the worker.
        """
        sources = *self.settings.preload, *self.settings.modules.values()
        base = self.base
        check_fit(base.library, base.parts.pipeline.device, sources, self.preloaded)

    def _load(self, source: str) -> Base | VllmBase:
        settings = self.settings.of_base(source)
        if settings.engine == "vllm":
            return VllmBase(settings)
        return Base(settings, self.statistics.ended)

    @property
    def base(self) -> Base | VllmBase:
        """The base that is loaded. Raises: ModelUnusable if there is none now."""
        if self.bases.now is None:
            raise ModelUnusable("no base model is loaded now")
        return self.bases.now

    def close(self) -> None:
        """Ends all texts and threads."""
        if self.bases.now is not None:
            self.bases.now.close()
        self._preparing.shutdown(wait=False, cancel_futures=True)

    @property
    def counts(self) -> dict[str, int]:
        """How many texts wait, and how many are under way; none while no base is loaded."""
        return self.bases.now.counts if self.bases.now is not None else {}

    # --- one job --------------------------------------------------------------------------------

    async def handle(self, job: Job, post: Post | None = None) -> AsyncGenerator[Any]:
        """The answer to a job in one piece or, for a stream, in many: text of server-sent events.

        `post` sends an update of an action's progress; without it the platform gets them.

        A failed job yields `{"error": …}` in OpenAI's shape. Whatever ends the generator early ends the
        job's texts within a step.
        """
        JOB_ID.set(str(job.get("id", "")))
        begun = time.perf_counter()
        stop = Stop(seconds_for(job, self.settings.deadline))
        try:
            async with aclosing(self._pieces(job, stop, post)) as pieces:
                async for piece in pieces:
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

    async def _pieces(self, job: Job, stop: Stop, post: Post | None) -> AsyncGenerator[Any]:
        if action_of(job):
            async with self._entered(None, stop) as base, sender_of(job, post) as sender:
                report = Progress(sender.send).download
                answer = await self._in_a_thread(lambda: self._act(base, job, report))
            yield answer
            return
        request = parse_text_job(job)
        if request.kind == MODELS:
            async with self._entered(None, stop) as base:
                names = await self._in_a_thread(base.models.adapters)
                yield models_answer(self.settings.bases, base.settings.name, names)
            return
        async with self._entered(self.settings.base_of(request.model), stop) as base:
            if isinstance(base, VllmBase):
                written = base.written(request, stop, self._in_a_thread)
            else:
                written = self._written(base, request, stop)
            async with aclosing(written) as pieces:
                async for piece in pieces:
                    yield self._checked(piece)

    @asynccontextmanager
    async def _entered(self, source: str | None, stop: Stop) -> AsyncIterator[Base | VllmBase]:
        """The base for a job, which stays while the block runs. Raises: DeadlineExceeded; ModelUnusable."""
        async with AsyncExitStack() as held:
            try:
                async with asyncio.timeout(stop.left):
                    base = await held.enter_async_context(self.bases.entered(source))
            except TimeoutError:
                raise stop.deadline_exceeded() from None
            yield base

    async def _written(self, base: Base, request: TextRequest, stop: Stop) -> AsyncGenerator[Any]:
        news, loop = asyncio.Event(), asyncio.get_running_loop()

        def notify() -> None:
            with suppress(RuntimeError):  # the loop is closed: nobody listens any more
                loop.call_soon_threadsafe(news.set)

        try:
            async with asyncio.timeout(stop.left):
                prepared = await self._in_a_thread(
                    lambda: self._prepare(base, request, stop, notify)
                )
        except TimeoutError:
            raise stop.deadline_exceeded() from None
        name = request.model or base.settings.name
        writer = Writer(request, prepared.texts, name, base.text.tokenizer)
        base.scheduler.submit(*prepared.texts)
        while any(text.finish is None for text in prepared.texts):
            await news.wait()
            news.clear()
            raise_first(prepared.texts)
            if request.stream and (events := self._events(writer, prepared)):
                yield events
        raise_first(prepared.texts)
        if not request.stream:
            yield writer.whole(self._extras(prepared))
        elif events := self._events(writer, prepared):
            yield events

    def _events(self, writer: Writer, prepared: Prepared) -> str:
        done = all(text.finish is not None for text in prepared.texts)
        return writer.events(self._extras(prepared) if done else {})

    async def _in_a_thread(self, work: Callable[[], Result]) -> Result:
        context = contextvars.copy_context()  # the job's id, for the log
        running = self._preparing.submit(context.run, work)
        return await asyncio.wrap_future(cast(Any, running))

    def _prepare(
        self, base: Base, request: TextRequest, stop: Stop, notify: Callable[[], None]
    ) -> Prepared:
        """Finds, fetches and parses the adapters, and reads the prompt. Changes nothing."""
        begun = time.perf_counter()
        ready = base.models.load(base.models.choose(request), strict=request.strict)
        seconds = time.perf_counter() - begun
        stop.check()
        tokens = prompt_of(request, base.text, ready, plain(request.messages))
        room = base.text.context - len(tokens)
        schema = request.schema
        grammar = None if schema is None else base.text.grammars.grammar(schema)
        texts = tuple(
            Generation(
                tokens,
                request.sampling(number, base.text.defaults, room),
                ready.stack,
                check=stop.check,
                notify=notify,
                special=not request.rules["skip_special_tokens"],
                grammar=grammar and grammar.copy(),
            )
            for number in range(request.count)
        )
        self.statistics.began(texts, request.model or base.settings.name, seconds)
        return Prepared(request, ready, texts, seconds, base.parts.warnings)

    def _extras(self, prepared: Prepared) -> dict[str, Any]:
        """What our answers have besides OpenAI's fields."""
        slowest = max(prepared.texts, key=lambda text: text.times.ended)
        return {
            "seed": prepared.request.seed,
            "loras": prepared.ready.report,
            "timings": {"load": round(prepared.seconds, 4), **about(slowest)},
            "warnings": [
                *prepared.warnings,
                *prepared.request.warnings,
                *prepared.ready.warnings,
            ],
        }

    def _checked(self, piece: Any) -> Any:
        """A piece of an answer that the platform can carry. Raises: OutputTooLarge."""
        if isinstance(piece, str):
            return piece
        guard_size(piece, self.settings.max_answer_mb)
        return sendable(piece)

    def _act(self, base: Base | VllmBase, job: Job, report: Report) -> Answer:
        name = action_of(job)
        if name == "statistics" and isinstance(base, VllmBase):
            return {**base.counts, "prometheus": base.server.metrics()}
        if name == "statistics":
            return self.statistics.answer(base.counts)
        actions = Actions(base.parts, self.preloaded, report)
        if name not in actions.table:
            raise InvalidInput(f"action must be one of statistics, {', '.join(actions.table)}")
        answer = actions.answer(job)
        if name == "health":
            answer |= {"kind": "text", "engine": self.settings.engine, **base.counts}
        return cast(Answer, self._checked(answer))
