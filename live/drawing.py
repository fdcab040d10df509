"""The thread of a session that draws: takes frames, and lets the model go whenever it can."""

from __future__ import annotations

import logging
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from PIL import Image

from live import pictures
from live.looks import DRAWING, Look, Looks, names_of
from live.monitor import Monitor
from live.painter import Drawn, Painter, Ticket
from live.queue import Inbox, Waiting
from live.request import Start
from live.similar import Similar
from live.turns import Turns
from lora.engine.engine import LoraEngine, RestoreFailed
from lora.engine.stack import Mode
from lora.errors import CodedError
from lora.volume.loader import Loaded, LoraLibrary
from pipelines.image import ImagePipeline
from pipelines.live import Guidance, LiveStream, Spec, spread

log = logging.getLogger(__name__)

IN_FLIGHT = 2
"""Frames that a client may have on their way without losing one: one is drawn, one waits."""

FLUSH = 0.1
"""Seconds without a new frame after which a stream batch goes on without one."""

IDLE, IDLE_MERGED = 0.25, 2.0
"""Seconds without a frame after which the weights are put back and the model let go. Merging again takes
longer than applying again."""

FULL_STRENGTH, HALF_STRENGTH = 1.0, 0.5


class Studio(Protocol):
    """What a session needs of a worker: `worker.parts.Parts`."""

    @property
    def pipeline(self) -> ImagePipeline:
        """The networks."""

    @property
    def engine(self) -> LoraEngine:
        """Applies LoRAs to them."""

    @property
    def library(self) -> LoraLibrary:
        """Finds LoRAs."""

    @property
    def selection(self) -> Any:
        """Finds presets: a `worker.selection.Selection`."""

    @property
    def drawing(self) -> Turns:
        """Who may draw now."""


@dataclass(frozen=True)
class Answer:
    """A message to the client; the picture is not encoded yet."""

    about: dict[str, Any]
    picture: Image.Image | None = None


class Drawing:
    """What a session draws with, and the loop that its thread runs."""

    def __init__(self, studio: Studio, start: Start, post: Callable[[Answer], None]) -> None:
        """`post` sends an answer. Raises: LoraUnsupported if the model cannot draw frames."""
        self._studio, self._post = studio, post
        values = start.values
        self._start = start
        self.spec = spec_of(values, studio.pipeline.default_size)
        self._stream = LiveStream(studio.pipeline, self.spec)
        self.looks = Looks(studio.library, studio.selection)
        behind = self.spec.steps - 1 if values["stream_batch"] else 0
        self._in_flight = IN_FLIGHT + behind
        self.inbox, self.monitor = Inbox(self._in_flight), Monitor()
        self._similar = Similar(values["similar"], start.asked.seed)
        self._last: Look | None = None
        self._told: Look | None = None
        self._mode = Mode(values["lora_mode"])
        self.baked: bool = values["bake"]
        merges = self.baked or self._mode is Mode.MERGED
        self._idle = IDLE_MERGED if merges else IDLE

    def prepare(self) -> Look:
        """Fetches the first look and all presets, and draws a frame of each once. Raises: CodedError."""
        values, asked = self._start.values, self._start.asked
        first = self.looks.of(asked, fetch=True) or Look()
        others = self.looks.presets(values["presets"], asked)
        self._painter = Painter(
            self._stream,
            self._studio.engine,
            self._finished,
            mode=self._mode,
            stream_batch=values["stream_batch"],
            baked=first if self.baked else None,
        )
        with self._studio.drawing:
            try:
                self._studio.engine.settle()
                for look in (*others, first):
                    self._painter.warm(look)
            finally:
                self._painter.close()
        return first

    def about(self) -> dict[str, Any]:
        """The answer to the first message."""
        spec, values = self.spec, self._start.values
        return {
            "type": "ready",
            "size": [spec.width, spec.height],
            "t_index": list(spec.t_index),
            "seed": self._start.asked.seed,
            "in_flight": self._in_flight,
            "presets": list(values["presets"]),
        }

    def run(self) -> None:
        """Draws until the inbox is closed; then every weight is what it was. Raises: RestoreFailed."""
        while not self.inbox.closed:
            frame = self.inbox.take(FLUSH if self._painter.under_way else None)
            if frame or self._painter.under_way:
                with self._studio.drawing:
                    self._hold(frame)

    def _hold(self, frame: Waiting | None) -> None:
        """Draws while frames come and nobody else waits for the model."""
        try:
            self._studio.engine.settle()
            while not self.inbox.closed:
                self._draw(frame)
                if self._studio.drawing.wanted:
                    return
                under_way = self._painter.under_way
                frame = self.inbox.take(FLUSH if under_way else self._idle)
                if frame is None and not under_way:
                    return
        finally:
            self._painter.close()

    def _draw(self, frame: Waiting | None) -> None:
        begun = time.perf_counter()
        if frame:
            self.monitor.took("queue", begun - frame.came)
        try:
            if frame is None:
                self._painter.tick()
            elif ticket := self._ticket(frame):
                self._painter.draw(ticket)
                self.monitor.took("frame", time.perf_counter() - begun)
        except RestoreFailed:
            raise
        except CodedError as error:
            if frame is None:
                self._broken(None, error)
            else:
                self._failed(frame, str(error))
        except Exception as error:  # noqa: BLE001 - an error ends a frame, not the session
            self._broken(frame, error)

    def _ticket(self, frame: Waiting) -> Ticket | None:
        """The frame to be drawn; None if it is skipped. Raises: InvalidInput if its picture is broken."""
        picture = pictures.read(frame.picture) if frame.picture else None
        if frame.look is not self._last:
            self._similar.forget()
        if picture and self._similar.skips(picture):
            self.monitor.count("skipped")
            self.inbox.done()
            self._post(Answer({"type": "frame", "seq": frame.seq, "skipped": True, **frame.notes}))
            return None
        self._last = frame.look
        return Ticket(frame, frame.look, picture)

    def _finished(self, drawn: Drawn) -> None:
        frame, look = drawn.ticket.waiting, drawn.ticket.look
        self.monitor.took("switch", drawn.switch_seconds)
        about: dict[str, Any] = {
            "type": "frame",
            "seq": frame.seq,
            "presets": list(look.presets),
            "loras": [
                {"name": names_of(loaded)[0], "scale": _scale(use), "mode": _way(loaded, drawn.how)}
                for use, loaded in zip(look.uses, look.loaded, strict=True)
            ],
            "seed": look.seed,
            "switch_ms": round(1000 * drawn.switch_seconds, 2),
            "ms": round(1000 * (time.perf_counter() - frame.came), 1),
            **frame.notes,
        }
        if look is not self._told:  # a prompt may be long
            about["prompt"] = look.prompt
            self._told = look
        if drawn.alone:
            about["alone"] = drawn.alone
        self.inbox.done()
        self._post(Answer(about, drawn.image))

    def _failed(self, frame: Waiting, error: str) -> None:
        self.monitor.count("failed")
        self.inbox.done()
        self._post(Answer({"type": "frame", "seq": frame.seq, **frame.notes, "error": error}))

    def _broken(self, frame: Waiting | None, error: Exception) -> None:
        """Gives up all frames under way, and starts afresh."""
        lost = [ticket.waiting for ticket in self._painter.abandon()]
        self._painter.close()
        if isinstance(error, torch.OutOfMemoryError):
            self._studio.engine.free()
        for one in (*lost, *([frame] if frame else [])):
            self._failed(one, told(error))


def told(error: Exception) -> str:
    """What the client is told of an error. Of one that nobody foresaw the log has the place, not the text."""
    if isinstance(error, CodedError):
        return str(error)
    if isinstance(error, torch.OutOfMemoryError):
        return "OUT_OF_MEMORY: the device's memory did not suffice. Begin with a smaller size."
    name = type(error).__name__
    log.error("%s\n%s", name, "".join(traceback.format_tb(error.__traceback__)))
    return f"INTERNAL: the frame failed unexpectedly ({name}). The worker's log has the place."


def spec_of(values: Any, side: int) -> Spec:
    """What a first message's fields mean. `side`: the model's own, in pixels."""
    size = values["size"] or side
    width, height = (size, size) if isinstance(size, int) else size
    strength = values["strength"]
    if strength is None:
        strength = HALF_STRENGTH if values["source"] == "image" else FULL_STRENGTH
    return Spec(
        width=width,
        height=height,
        t_index=tuple(values["t_index"] or spread(values["steps"], strength)),
        guidance=Guidance(values["guidance"]),
        guidance_scale=float(values["guidance_scale"]),
    )


def _scale(use: Any) -> Any:
    return {"all": use.scale, **use.components} if use.components else use.scale


def _way(loaded: Loaded, how: str) -> str:
    """How one LoRA was applied: what has no factors is merged in dynamic mode, too."""
    layers = (layer for layer in loaded.file.layers if layer.target.component == DRAWING)
    if how == "dynamic" and not all(layer.algorithm.is_low_rank for layer in layers):
        return Mode.MERGED.value
    return how
