"""Downloads one file into a part file, in spite of broken connections and failing servers, within limits."""

from __future__ import annotations

import email.utils
import hashlib
import io
import logging
import os
import queue
import random
import re
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import requests

from lora.errors import AccessDenied, DownloadFailed, LoraNotFound, LoraTooLarge
from lora.fetch.body import Body
from lora.fetch.sources import RemoteFile
from lora.fetch.web import Web

log = logging.getLogger(__name__)

OnBytes = Callable[[int, int | None], None]
"""Called with (bytes so far, total or None) during a download."""

MAX_PAUSE = 30.0
"""Most seconds between two tries, unless the server asks for more."""


@dataclass(frozen=True)
class Limits:
    """How much a cache may take, in bytes and seconds. None means no limit."""

    file_bytes: int = 2 << 30
    total_bytes: int | None = None
    timeout: float = 300.0
    """Seconds that a whole download may take, with all tries and pauses."""
    stall: float = 30.0
    """Seconds that a connection may be silent."""
    tries: int = 4
    """How many tries in a row may bring no new byte."""
    pause: float = 0.5
    """Seconds before the second try; doubled before each further one, with 50% jitter."""
    lease: float = 10.0
    """Seconds of silence after which another worker's download counts as abandoned."""
    ttl: float = 86_400.0
    """Seconds after which a branch, a newest version and a URL's content are asked for again."""
    refusal: float = 60.0
    """Seconds for which a source that answered 404 or 403 is not asked again."""


@dataclass(frozen=True)
class Fetched:
    """A complete download."""

    sha256: str
    size: int
    etag: str | None
    modified: str | None


class NotModified(Exception):
    """The server answered that the content has not changed (304)."""


class _TryAgain(Exception):
    """A try failed, and the next may succeed. `after`: the seconds that the server asks to wait."""

    def __init__(self, reason: str, after: float | None = None) -> None:
        super().__init__(reason)
        self.reason, self.after = reason, after


class Download:
    """Downloads one source into one part file. A broken connection is resumed where it broke."""

    def __init__(
        self,
        web: Web,
        remote: RemoteFile,
        part: Path,
        limits: Limits,
        on_bytes: OnBytes = lambda done, total: None,
        *,
        deadline: float,
    ) -> None:
        """`deadline`: by time.monotonic()."""
        self._web, self._remote, self._part = web, remote, part
        self._limits, self._on_bytes = limits, on_bytes
        self._deadline = deadline
        self._done = 0
        self._digest = hashlib.sha256()
        self._validator: str | None = None
        """The ETag or date of the content of which `_done` bytes are here; None if it cannot be resumed."""
        self._total: int | None = None
        self._etag: str | None = None
        self._modified: str | None = None

    def run(self, make_room: Callable[[int], None], conditions: Mapping[str, str] = {}) -> Fetched:
        """Downloads the file, in several tries if need be.

        `make_room` is called with the number of bytes that are still to come, once that is known.
        `conditions`: conditional headers; with them it may raise NotModified. Raises: LoraNotFound,
        AccessDenied, DownloadFailed, LoraTooLarge, SourceInvalid; OSError if the part cannot be written.
        """
        failures = 0
        with self._part.open("wb", buffering=0) as stream:
            while True:
                before = self._done
                try:
                    self._try(stream, make_room, conditions)
                    os.fsync(stream.fileno())
                    return Fetched(self._digest.hexdigest(), self._done, self._etag, self._modified)
                except _TryAgain as failure:
                    failures = 1 if self._done > before else failures + 1
                    self._wait(failure, failures)

    def _wait(self, failure: _TryAgain, failures: int) -> None:
        """Waits before the next try. Raises: DownloadFailed if this was the last."""
        shown = self._remote.shown
        log.warning("%s: %s (after %.1f MB)", shown, failure.reason, self._done / 1e6)
        pause = pause_after(failures, self._limits)
        if failure.after is not None:
            pause = max(pause, failure.after)
        left = self._deadline - time.monotonic()
        if failures >= self._limits.tries or pause > left:
            hint = "Try again later."
            if failure.after is not None:
                hint = f"The server asks to wait {failure.after:.0f} s."
            raise DownloadFailed(f"{shown} could not be downloaded ({failure.reason})", hint)
        time.sleep(pause)

    def _try(
        self, stream: io.FileIO, make_room: Callable[[int], None], conditions: Mapping[str, str]
    ) -> None:
        headers = dict(conditions)
        if self._done and self._validator:
            headers = {"Range": f"bytes={self._done}-", "If-Range": self._validator}
        limits = self._limits
        try:
            with self._web.open(
                self._remote.url, headers, stall=limits.stall, deadline=self._deadline
            ) as body:
                self._check_status(body)
                self._begin(stream, body)
                if self._total is not None:
                    self._check_size(self._total)
                    make_room(self._total - self._done)
                with _Sink(stream, self._digest) as sink:
                    for piece in body.pieces():
                        self._check_size(self._done + len(piece))
                        sink.put(piece)
                        self._done += len(piece)
                        self._on_bytes(self._done, self._total)
        except (requests.TooManyRedirects, requests.exceptions.ContentDecodingError) as error:
            raise DownloadFailed(
                f"{self._remote.shown} could not be downloaded ({_reason(error)})"
            ) from None
        except requests.RequestException as error:
            # Not the error's own text, which holds the whole URL, tokens and all.
            raise _TryAgain(_reason(error)) from None
        if self._total is not None and self._done != self._total:
            self._validator = None  # another length than announced: the next try starts anew
            raise _TryAgain("the body has another length than announced")

    def _begin(self, stream: io.FileIO, body: Body) -> None:
        """Resumes where the last try broke off, if the server does so too; else starts anew."""
        span = re.fullmatch(
            r"bytes (\d{1,18})-(\d{1,18})/(\d{1,18})", body.headers.get("Content-Range", "")
        )
        resumes = body.status == 206 and not body.encoding and span is not None
        if resumes and span and int(span[1]) == self._done and int(span[3]) == self._total:
            return
        if body.status == 206:
            self._validator = None
            raise _TryAgain("the server sent another part than was asked for")
        self._done, self._digest = 0, hashlib.sha256()
        stream.seek(0)
        stream.truncate()
        self._total = body.length or (None if body.encoding else self._remote.size)
        self._etag, self._modified = body.headers.get("ETag"), body.headers.get("Last-Modified")
        strong = self._etag if self._etag and not self._etag.startswith("W/") else None
        self._validator = None if body.encoding or not self._total else strong or self._modified

    def _check_status(self, body: Body) -> None:
        """Raises: NotModified, or the error that the status means, unless the content follows."""
        status, shown = body.status, self._remote.shown
        if status in (200, 206):
            if urlsplit(body.url).path.rstrip("/").endswith("/login"):
                raise AccessDenied(f"{shown} asks for a login", "It may need a token.")
            return
        if status == 304:
            raise NotModified
        if status in (404, 410):
            raise LoraNotFound(f"{shown} does not exist (HTTP {status})")
        if status in (401, 403):
            raise AccessDenied(f"{shown} refuses access (HTTP {status})", "It may need a token.")
        if status == 416 and self._done:
            self._done, self._validator = 0, None
            raise _TryAgain("the server has less than it had")
        if status in (408, 425, 429) or status >= 500:
            raise _TryAgain(f"HTTP {status}", _seconds(body.headers.get("Retry-After", "")))
        raise DownloadFailed(f"{shown} answered HTTP {status}")

    def _check_size(self, size: int) -> None:
        if size > self._limits.file_bytes:
            raise LoraTooLarge(
                f"{self._remote.shown} is over the limit of {self._limits.file_bytes / 1e6:.0f} MB",
                "The limit is LORA_MAX_FILE_MB.",
            )


def pause_after(failures: int, limits: Limits) -> float:
    """Seconds to wait before the next try: doubled each time, with jitter."""
    return min(MAX_PAUSE, limits.pause * 2 ** (failures - 1)) * random.uniform(0.5, 1.5)


class _Sink:
    """Writes and hashes pieces in a thread of its own, while the next piece is received."""

    def __init__(self, stream: io.FileIO, digest: Any) -> None:
        self._stream, self._digest = stream, digest
        self._pieces: queue.Queue[bytes | None] = queue.Queue(maxsize=8)
        self._error: OSError | None = None
        self._thread = threading.Thread(target=self._work, name="download", daemon=True)

    def put(self, piece: bytes) -> None:
        if self._error:
            raise self._error
        self._pieces.put(piece)

    def _work(self) -> None:
        while (piece := self._pieces.get()) is not None:
            if self._error:
                continue  # the queue is emptied, so that `put` never blocks for ever
            try:
                self._digest.update(piece)
                view = memoryview(piece)
                while view:
                    view = view[self._stream.write(view) :]
            except OSError as error:
                self._error = error

    def __enter__(self) -> _Sink:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._pieces.put(None)
        self._thread.join()
        if self._error:
            raise self._error


def _seconds(text: str) -> float | None:
    """The seconds of a Retry-After header, which holds a number or a date; None if it is neither."""
    if text.isascii() and text.isdigit():
        return float(text)
    try:
        return max(0.0, email.utils.parsedate_to_datetime(text).timestamp() - time.time())
    except (ValueError, OverflowError):
        return None


def _reason(error: requests.RequestException) -> str:
    if isinstance(error, requests.TooManyRedirects):
        return "it redirects in circles"
    if isinstance(error, requests.Timeout):
        return "it took too long"
    if isinstance(error, requests.exceptions.ContentDecodingError):
        return "it is packed in a way that cannot be read"
    return "the connection failed or broke off"
