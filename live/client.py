"""A client of live frames: sends pictures, gives what comes back, and counts. See `python -m live`."""

from __future__ import annotations

import io
import json
import shutil
import subprocess
import time
from collections.abc import Iterable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from PIL import Image, ImageSequence
from websockets.exceptions import ConnectionClosed, InvalidHandshake
from websockets.sync.client import ClientConnection, connect

from live.wire import Message, pack, unpack
from lora.errors import ToolError

ENDINGS = (".jpg", ".jpeg", ".png", ".webp")
PATIENCE = 300.0
"""Seconds without a message after which the worker counts as gone."""


def frames_of(source: Path, size: int) -> Iterator[bytes]:
    """The pictures of a folder, of an animated GIF or WebP, or of a video or camera, as JPEG files.

    A video, or a camera such as `/dev/video0`, is read by the program ffmpeg. Raises: ToolError.
    """
    if source.is_dir():
        files = sorted(file for file in source.iterdir() if file.suffix.lower() in ENDINGS)
        if not files:
            raise ToolError(
                f"{source.name} has no pictures", f"Their endings: {', '.join(ENDINGS)}."
            )
        return (file.read_bytes() for file in files)
    if not source.exists():
        raise ToolError(
            f"{source.name} is not there", "Name a folder, a picture, a video or a camera."
        )
    try:
        with Image.open(source) as moving:
            pictures = [one.convert("RGB") for one in ImageSequence.Iterator(moving)]
    except OSError:
        return _by_ffmpeg(source, size)
    return map(_as_jpeg, pictures)


def _as_jpeg(picture: Image.Image) -> bytes:
    buffer = io.BytesIO()
    picture.save(buffer, "JPEG", quality=90)
    return buffer.getvalue()


def _by_ffmpeg(source: Path, size: int) -> Iterator[bytes]:
    if not (ffmpeg := shutil.which("ffmpeg")):
        raise ToolError(
            f"{source.name} is no picture, and a video or camera needs the program ffmpeg",
            "Install ffmpeg, or send a folder of pictures or an animated GIF or WebP.",
        )
    kind = ["-f", "v4l2"] if source.is_char_device() else []
    fit = f"scale={size}:{size}:force_original_aspect_ratio=increase,crop={size}:{size}"
    command = [ffmpeg, "-loglevel", "error", *kind, "-i", str(source), "-vf", fit]
    return _raw_frames([*command, "-f", "rawvideo", "-pix_fmt", "rgb24", "-"], size)


def _raw_frames(command: list[str], size: int) -> Iterator[bytes]:
    with subprocess.Popen(command, stdout=subprocess.PIPE) as process:
        if process.stdout is None:
            raise ToolError("ffmpeg gives no output")
        try:
            while len(data := process.stdout.read(3 * size * size)) == 3 * size * size:
                yield _as_jpeg(Image.frombytes("RGB", (size, size), data))
        finally:
            process.kill()


@dataclass
class Figures:
    """What a client saw."""

    sent: int = 0
    drawn: int = 0
    dropped: int = 0
    skipped: int = 0
    errors: list[str] = field(default_factory=list)
    seconds: float = 0.0
    round_trips: list[float] = field(default_factory=list)
    switches: list[float] = field(default_factory=list)
    monitor: dict[str, Any] = field(default_factory=dict)

    def lines(self) -> list[str]:
        """The figures for a person."""
        rate = self.drawn / self.seconds if self.seconds else 0.0
        lines = [
            f"{self.sent} frames sent, {self.drawn} drawn, {self.skipped} skipped, {self.dropped} dropped, "
            f"{len(self.errors)} errors in {self.seconds:.1f} s: {rate:.1f} frames/s"
        ]
        for name, values in (("round trip", self.round_trips), ("switch", self.switches)):
            if values:
                ordered = sorted(values)
                p50, p95 = (ordered[int(share * (len(ordered) - 1))] for share in (0.5, 0.95))
                lines.append(f"{name}: median {p50:.1f} ms, p95 {p95:.1f} ms")
        return [*lines, *(f"error: {error}" for error in dict.fromkeys(self.errors))]


class Client:
    """One session with a worker, over a WebSocket. To be used in a `with` block."""

    def __init__(self, url: str, first: dict[str, Any], key: str = "") -> None:
        """`first`: the first message. Raises: ToolError if the worker cannot be reached or refuses it."""
        headers = {"Authorization": f"Bearer {key}"} if key else {}
        self.figures = Figures()
        self._exits = ExitStack()
        try:
            opening = connect(url, additional_headers=headers, max_size=None, compression=None)
            self._socket: ClientConnection = self._exits.enter_context(opening)
        except (OSError, InvalidHandshake, ValueError) as error:
            raise ToolError(
                f"the worker cannot be reached ({type(error).__name__})", "Does it serve /live?"
            ) from error
        self._socket.send(pack(first))
        about = self._hear().about
        if about["type"] != "ready":
            self._exits.close()
            raise ToolError(str(about.get("error", about)))
        self.ready = about
        self._flying: dict[int, float] = {}

    def __enter__(self) -> Client:
        return self

    def __exit__(self, *_: object) -> None:
        self._exits.close()

    def stream(
        self, frames: Iterable[bytes], changes: dict[int, dict[str, Any]] | None = None
    ) -> Iterator[Message]:
        """Sends frames, as many at once as the worker said; gives every answer to a frame as it comes.

        `changes`: what the frame of this number asks for besides. Raises: ToolError if the session ends.
        """
        begun = time.perf_counter()
        for number, frame in enumerate(frames):
            while len(self._flying) >= self.ready["in_flight"]:
                yield self._answer()
            self._flying[number] = time.perf_counter()
            self._socket.send(pack({"seq": number, **(changes or {}).get(number, {})}, frame))
            self.figures.sent += 1
        while self._flying:
            yield self._answer()
        self.figures.seconds = time.perf_counter() - begun

    def _answer(self) -> Message:
        message = self._hear()
        about, figures = message.about, self.figures
        sent = self._flying.pop(about.get("seq", -1), None)
        if message.picture:
            figures.drawn += 1
            figures.switches.append(about["switch_ms"])
            if sent is not None:
                figures.round_trips.append(1000 * (time.perf_counter() - sent))
        figures.dropped += bool(about.get("dropped"))
        figures.skipped += bool(about.get("skipped"))
        if "error" in about:
            figures.errors.append(about["error"])
        return message

    def _hear(self) -> Message:
        """The next message that is not the monitor's."""
        while True:
            try:
                data = self._socket.recv(timeout=PATIENCE)
            except TimeoutError as error:
                raise ToolError("the worker says nothing any more") from error
            except ConnectionClosed as error:
                raise ToolError("the worker has closed the connection") from error
            message = unpack(data)
            if message.about["type"] == "end":
                raise ToolError(f"the session is over: {message.about}")
            if message.about["type"] != "monitor":
                return message
            self.figures.monitor = message.about


def first_message(values: dict[str, Any], more: str | None) -> dict[str, Any]:
    """The first message from options and a JSON text. Raises: ToolError."""
    try:
        extra = json.loads(more) if more else {}
    except ValueError:
        extra = None
    if not isinstance(extra, dict):
        raise ToolError("--start is no JSON object")
    return {**{name: value for name, value in values.items() if value is not None}, **extra}
