"""A queue's job with many frames: where nothing reaches a running job, it says beforehand what is to come.

The job's frames go through a session of `live`, as a client's would, each when the one before is answered.
"""

from __future__ import annotations

import asyncio
import base64
import contextlib
import io
import json
from collections.abc import AsyncIterator, Mapping
from dataclasses import dataclass
from typing import Any

from live.request import FRAME, START
from live.session import run
from live.wire import Closed, Message, pack, unpack
from lora.errors import CodedError
from pipelines.pixels import BROKEN
from validation import InvalidInput, faults_of, field, filled, understood
from worker.failures import failure
from worker.parts import Answer, Job
from worker.pictures.inputs import load_picture
from worker.pictures.outputs import OutputTooLarge
from worker.stop import DeadlineExceeded

MAX_FRAMES = 1000

FRAMES: dict[str, Any] = {
    "type": "object",
    "properties": {
        "frames": field(
            "array|null",
            None,
            "The pictures, in order: each an http(s) URL, a data URI or base64",
            items={"type": "string"},
            maxItems=MAX_FRAMES,
        ),
        "image_url": field(
            "string|null", None, "One picture for every frame, in place of `frames`"
        ),
        "schedule": field(
            "array|null",
            None,
            "What frames change, as in a session: objects with `at`, the frame's number from 0 on (left "
            "out: one after the other). Without `frames` the last one's is the last frame",
            items={"type": "object"},
            maxItems=MAX_FRAMES,
        ),
    },
}
"""What a job with frames has besides the fields of a session's first message."""


@dataclass(frozen=True)
class FramesRequest:
    """A job's first message, pictures and changes."""

    start: dict[str, Any]
    pictures: tuple[str, ...]
    """One for each frame, or one for all, or none to draw from text."""
    changes: Mapping[int, dict[str, Any]]
    count: int


def has_frames(job: Job) -> bool:
    """Whether a job asks for a stream of frames."""
    given = job.get("input")
    return isinstance(given, Mapping) and bool(given.get("frames") or given.get("schedule"))


def parse_frames_job(job: Job) -> FramesRequest:
    """Raises: InvalidInput, with every fault of the frames; the session checks the rest."""
    given = dict(job["input"])
    own = {name: given.pop(name) for name in FRAMES["properties"] if name in given}
    values, _, faults = understood(FRAMES, own, "")
    faults += faults_of(FRAMES, values, "")
    if values.get("frames") and values.get("image_url"):
        faults.append("image_url: frames are given, too")
    if faults:
        raise InvalidInput.of(faults)
    chosen, changes = filled(FRAMES, values), dict[int, dict[str, Any]]()
    for index, entry in enumerate(chosen["schedule"] or []):
        change = dict(entry)
        at = change.pop("at", index)
        if not isinstance(at, int) or isinstance(at, bool) or not 0 <= at < MAX_FRAMES:
            raise InvalidInput(f"schedule[{index}].at is no frame's number below {MAX_FRAMES}")
        if unknown := sorted(change.keys() - FRAME["properties"].keys()):
            raise InvalidInput(f"schedule[{index}].{str(unknown[0])[:40]} is not a field")
        changes[at] = {**changes.get(at, {}), **change}
    pictures = chosen["frames"] or ([chosen["image_url"]] if chosen["image_url"] else [])
    count = len(chosen["frames"] or ()) or max(changes) + 1
    if late := [at for at in changes if at >= count]:
        raise InvalidInput(f"schedule: there is no frame {late[0]}, only {count}")
    start = {**given, "source": given.get("source") or ("image" if pictures else "text")}
    if unknown := sorted(start.keys() - START["properties"].keys()):
        raise InvalidInput(f"{str(unknown[0])[:40]} is not a field of a job with frames")
    return FramesRequest(start, tuple(pictures), changes, count)


async def stream_frames(job: Job, worker: Any) -> AsyncIterator[Answer]:
    """A piece for each frame, as the session answers it, its picture as a data URI; or one with `error`.

    However it ends, the session is over afterwards, and every weight is bit for bit what it was.
    """
    try:
        request = parse_frames_job(job)
    except CodedError as error:
        yield failure(error)
        return
    line = _Line()
    session = asyncio.create_task(run(line.receive, line.send, worker))
    sent, limit = 0, worker.settings.max_answer_mb * 1e6
    try:
        line.say(request.start)
        about = (await line.hear()).about
        if about["type"] != "ready":
            yield {"error": about["error"]}
            return
        files = _Files(request.pictures, worker)
        async for message in _answers(line, request, files, about["in_flight"]):
            piece = _piece(message)
            sent += len(json.dumps(piece))
            if sent > limit:
                sentence = f"the frames have over {limit / 1e6:g} MB in all"
                yield failure(OutputTooLarge(sentence, "Ask for fewer or smaller frames."))
                return
            yield piece
    except CodedError as error:
        yield failure(error)
    finally:
        line.leave()
        with contextlib.suppress(Closed):
            await session


async def _answers(
    line: _Line, request: FramesRequest, files: _Files, in_flight: int
) -> AsyncIterator[Message]:
    flying = 0
    for number in range(request.count):
        if flying == in_flight:
            yield await line.hear()
            flying -= 1
        file = await asyncio.to_thread(files.of, number)
        line.say({"wait": True, **request.changes.get(number, {}), "seq": number}, file)
        flying += 1
    for _ in range(flying):
        yield await line.hear()


def _piece(message: Message) -> Answer:
    about = {name: value for name, value in message.about.items() if name != "type"}
    if not message.picture:
        return about
    kind = {b"\x89P": "png", b"RI": "webp"}.get(message.picture[:2], "jpeg")
    return {
        **about,
        "image": f"data:image/{kind};base64,{base64.b64encode(message.picture).decode()}",
    }


class _Files:
    """The frames' files. One that cannot be had is empty, and so fails alone."""

    def __init__(self, pictures: tuple[str, ...], worker: Any) -> None:
        self._pictures, self._web = pictures, worker.parts.library.cache.web
        self._one: bytes | None = None

    def of(self, number: int) -> bytes:
        """The file of a frame; of a single picture always the same."""
        if not self._pictures:
            return b""
        if len(self._pictures) > 1:
            return self._read(self._pictures[number])
        if self._one is None:
            self._one = self._read(self._pictures[0])
        return self._one

    def _read(self, source: str) -> bytes:
        try:
            buffer = io.BytesIO()
            load_picture(source, self._web).save(buffer, "PNG", compress_level=1)
        except (CodedError, *BROKEN):
            return b"no picture"
        return buffer.getvalue()


class _Line:
    """Both directions between the job and its session."""

    def __init__(self) -> None:
        self._to: asyncio.Queue[bytes | None] = asyncio.Queue()
        self._back: asyncio.Queue[Message] = asyncio.Queue()

    async def receive(self) -> bytes:
        """The session's `receive`."""
        data = await self._to.get()
        if data is None:
            raise Closed
        return data

    async def send(self, data: bytes) -> None:
        """The session's `send`; the monitor is left out."""
        message = unpack(data)
        if message.about["type"] != "monitor":
            self._back.put_nowait(message)

    def say(self, about: dict[str, Any], file: bytes = b"") -> None:
        """A message to the session."""
        self._to.put_nowait(pack(about, file))

    def leave(self) -> None:
        """Ends the session."""
        self._to.put_nowait(None)

    async def hear(self) -> Message:
        """The session's next answer. Raises: DeadlineExceeded if the session's time is over."""
        message = await self._back.get()
        if reason := message.about.get("reason"):
            raise DeadlineExceeded(
                f"the frames' session is over: {reason}",
                "Ask for fewer frames, or set WORKER_LIVE_SECONDS.",
            )
        return message
