"""A session: one client's frames, drawn as they come, under whatever LoRAs each of them asks for.

What carries the messages is not known here: a WebSocket's server gives `run` two functions. The event loop
reads, sends and watches the time; one thread draws (`live.drawing`); files are fetched in others.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from typing import Any, TypeVar

from live import pictures
from live.drawing import Answer, Drawing, Studio, told
from live.queue import Waiting
from live.request import Asked, Start, parse_frame, parse_start
from live.wire import Closed, Message, Receive, Send, pack, unpack
from lora.engine.undo import RestoreFailed
from lora.errors import CodedError
from validation import InvalidInput

Result = TypeVar("Result")

LORA_FIELDS = frozenset({"lora_selection", "loras", "scales"})


class LiveBusy(CodedError):
    """The worker has as many live sessions as it takes."""

    code = "LIVE_BUSY"


class Places:
    """The live sessions of a worker, of which there are so many at most. For one event loop."""

    def __init__(self, limit: int) -> None:
        self._limit, self.taken = limit, 0

    @contextmanager
    def taking(self) -> Iterator[None]:
        """One session's place. Raises: LiveBusy."""
        if self.taken >= self._limit:
            raise LiveBusy(
                f"the worker has {self.taken} live sessions, and takes no more",
                "Try again later, or set WORKER_LIVE_SESSIONS.",
            )
        self.taken += 1
        try:
            yield
        finally:
            self.taken -= 1


async def run(receive: Receive, send: Send, worker: Any) -> None:
    """Serves one client from its first message on, and returns when the session is over.

    `worker`: a `handler.Worker` after `setup`. `receive` is awaited by one task at a time, and so is `send`.
    The session ends when either raises Closed, when its time is over (`WORKER_LIVE_SECONDS`) or when this
    task is cancelled; where more sessions than `WORKER_LIVE_SESSIONS` are there, it ends at once with an
    answer that says so. Whatever the client sends, nothing else is raised, and no error ends a session.
    When this returns or raises, all its threads are done and every weight is bit for bit what it was. The
    caller closes the socket.
    """
    parts = worker.parts
    with suppress(Closed):
        try:
            with parts.live.taking():
                reason = await _Session(receive, send, parts).serve()
        except CodedError as error:
            await send(pack({"type": "end", "error": str(error)}))
        else:
            await send(pack({"type": "end", "reason": reason}))


class _Session:
    """One client's session."""

    def __init__(self, receive: Receive, send: Send, parts: Any) -> None:
        self._receive, self._send = receive, send
        self._studio: Studio = parts
        self._seconds = parts.settings.live_seconds
        self._out: asyncio.Queue[Answer] = asyncio.Queue()
        self._loading: asyncio.Task[None] | None = None
        self._trouble: str | None = None
        """Why what was asked for last could not be had; the next answer tells it."""

    async def serve(self) -> str:
        """The whole session. Returns why it ended. Raises: Closed, RestoreFailed."""
        try:
            async with asyncio.timeout(self._seconds or None):
                start = await self._begun()
                return await self._flow(start)
        except TimeoutError:
            return f"its {self._seconds:g} seconds are over"

    async def _begun(self) -> Start:
        """Waits for a first message that can be served, and answers it."""
        while True:
            data = await self._receive()
            try:
                start = parse_start(unpack(data).about)
                self._drawing = Drawing(self._studio, start, self._post)
                self._look = await _in_a_thread(self._drawing.prepare)
            except RestoreFailed:
                raise
            except Exception as error:  # noqa: BLE001 - an error ends no session
                await self._send(pack({"type": "error", "error": told(error)}))
                continue
            self._start, self._asked, self._shown = start, start.asked, start.asked
            warnings = [*start.warnings, *self._look.warnings]
            await self._send(pack({**self._drawing.about(), "warnings": warnings}))
            return start

    async def _flow(self, start: Start) -> str:
        loop = asyncio.get_running_loop()
        self._loop = loop
        drawing = loop.run_in_executor(None, self._drawing.run)
        tasks = [loop.create_task(work) for work in (self._read(), self._write(), self._tell())]
        try:
            done, _ = await asyncio.wait([drawing, *tasks], return_when=asyncio.FIRST_COMPLETED)
            for one in done:
                one.result()
            return "the client is gone"
        finally:
            self._drawing.inbox.close()
            loading = [self._loading] if self._loading else []
            for task in (*tasks, *loading):
                task.cancel()
            await _to_its_end(asyncio.gather(drawing, *tasks, *loading, return_exceptions=True))

    # --- what comes in --------------------------------------------------------------------------

    async def _read(self) -> None:
        while True:
            await self._take(await self._receive())

    async def _take(self, data: str | bytes) -> None:
        """One message: changes what is asked for, and hands its frame on."""
        seq = None
        notes: dict[str, Any] = {}
        try:
            message = unpack(data)
            given = parse_frame(message.about)
            seq = given.get("seq")
            is_frame = self._is_frame(message)
        except CodedError as error:
            self._answer({"type": "error", "seq": seq, "error": str(error)})
            return
        try:
            await self._change(given)
        except CodedError as error:
            notes["error"] = str(error)
        if not is_frame:
            self._answer({"type": "changed", "seq": seq, **self._notes(notes)})
            return
        self._drawing.monitor.count("in")
        frame = Waiting(seq, message.picture, self._look, self._notes(notes))
        for lost in self._drawing.inbox.put(frame):
            self._drawing.monitor.count("dropped")
            self._answer({"type": "frame", "seq": lost.seq, "dropped": True, **lost.notes})

    def _is_frame(self, message: Message) -> bool:
        """Whether a message asks for a frame, not only for a change. Raises: InvalidInput."""
        wants_picture = self._start.values["source"] == "image"
        if message.picture and not wants_picture:
            raise InvalidInput("this session draws from text", "Begin one with source image.")
        return bool(message.picture) or not wants_picture

    def _notes(self, notes: dict[str, Any]) -> dict[str, Any]:
        if self._loading is not None:
            notes["loading"] = True
        if self._trouble:
            notes.setdefault("error", self._trouble)
            self._trouble = None
        return notes

    async def _change(self, given: dict[str, Any]) -> None:
        """Raises: CodedError if what is asked for cannot be had; then all stays as it was."""
        asked = self._asked.changed(given)
        if asked == self._asked:
            return
        if self._drawing.baked and LORA_FIELDS & given.keys():
            raise InvalidInput(
                "the LoRAs of this session are baked into the weights", "Begin one without bake."
            )
        looks = self._drawing.looks
        look = await asyncio.to_thread(looks.of, asked, fetch=False)
        if self._loading is not None:
            self._loading.cancel()  # what it was for is no longer asked for; the file is kept
            self._loading = None
        if look is None and given.get("wait"):
            look = await asyncio.to_thread(looks.of, asked, fetch=True)
        self._asked = asked
        if look is None:
            self._loading = asyncio.create_task(self._load(asked))
            asked = replace(asked, **_lora_fields(self._shown))  # what is no LoRA's need not wait
            look = await asyncio.to_thread(looks.of, asked, fetch=False)
        if look is not None:
            self._look, self._shown = look, asked

    async def _load(self, asked: Asked) -> None:
        """Fetches what is asked for while frames go on; if that fails, the old LoRAs are asked for again."""
        try:
            look = await asyncio.to_thread(self._drawing.looks.of, asked, fetch=True)
        except CodedError as error:
            self._trouble = str(error)
            self._asked = replace(self._asked, **_lora_fields(self._shown))
        else:
            if look is not None:
                self._look, self._shown = look, asked
        self._loading = None

    # --- what goes out --------------------------------------------------------------------------

    def _post(self, answer: Answer) -> None:
        """Sends an answer from the drawing's thread."""
        self._drawing.inbox.answering(1)
        self._loop.call_soon_threadsafe(self._out.put_nowait, answer)

    def _answer(self, about: dict[str, Any]) -> None:
        self._drawing.inbox.answering(1)
        self._out.put_nowait(Answer(about))

    async def _write(self) -> None:
        values = self._start.values
        how = values["output_format"], values["output_quality"]
        while True:
            answer = await self._out.get()
            file = b""
            if answer.picture:
                file = await asyncio.to_thread(pictures.write, answer.picture, *how)
                self._drawing.monitor.count("out")
            await self._send_one(answer.about, file)

    async def _send_one(self, about: dict[str, Any], file: bytes) -> None:
        await self._send(pack(about, file))
        self._drawing.inbox.answering(-1)

    async def _tell(self) -> None:
        """The monitor, once a second."""
        while True:
            await asyncio.sleep(1.0)
            self._answer(self._drawing.monitor.figures())


def _lora_fields(asked: Asked) -> dict[str, Any]:
    names = ("lora_selection", "loras", "has_loras", "scales")
    return {name: getattr(asked, name) for name in names}


async def _in_a_thread(work: Callable[[], Result]) -> Result:
    """Runs it in a thread, to its end even if this task is cancelled: it may have changed weights."""
    running = asyncio.get_running_loop().run_in_executor(None, work)
    try:
        return await asyncio.shield(running)
    except asyncio.CancelledError:
        await _to_its_end(running)
        raise


async def _to_its_end(running: asyncio.Future[Any]) -> None:
    """Waits for it, however often this task is cancelled meanwhile."""
    again = False
    while not running.done():
        try:
            await asyncio.shield(asyncio.wait([running]))
        except asyncio.CancelledError:
            again = True
    if again:
        raise asyncio.CancelledError
