"""One file from a URL into a part file, through broken connections, servers in trouble and limits."""

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

Progress = Callable[[int, int | None], None]
"""Called with (bytes so far, total or None) while a file comes in."""

MAX_PAUSE = 30.0
"""Most seconds between two tries, unless the server says how long."""


@dataclass(frozen=True)
class Limits:
    """How much a cache may take, in bytes and seconds. None means no limit."""

    file_bytes: int = 2 << 30
    total_bytes: int | None = None
    timeout: float = 300.0
    """Seconds that one whole download may take, its tries and pauses included."""
    stall: float = 30.0
    """Seconds that a connection may stay silent."""
    tries: int = 4
    """How often in a row nothing may come."""
    pause: float = 0.5
    """Seconds before the second try; twice as long before each further one, give or take half."""
    lease: float = 10.0
    """Seconds of silence after which another worker's download counts as abandoned."""
    ttl: float = 86_400.0
    """Seconds for which a branch, a newest version and a URL's content are taken as known."""
    refusal: float = 60.0
    """Seconds for which a source that said no (404, 403) is not asked again."""


@dataclass(frozen=True)
class Fetched:
    """What came in."""

    sha256: str
    size: int
    etag: str | None
    modified: str | None


class NotModified(Exception):
    """The server says that what is here is what it has."""


class _Again(Exception):
    """A try that failed and may pass: the kind of trouble, and how long the server wants to be left alone."""

    def __init__(self, kind: str, after: float | None = None) -> None:
        super().__init__(kind)
        self.kind, self.after = kind, after


class Download:
    """One source into one part file. What has come in survives a broken connection."""

    def __init__(
        self,
        web: Web,
        remote: RemoteFile,
        part: Path,
        limits: Limits,
        progress: Progress = lambda done, total: None,
        *,
        deadline: float,
    ) -> None:
        """`deadline`: when it must be done, by time.monotonic()."""
        self._web, self._remote, self._part = web, remote, part
        self._limits, self._progress = limits, progress
        self._deadline = deadline
        self._done = 0
        self._digest = hashlib.sha256()
        self._validator: str | None = None
        """What the server calls the content of which `_done` bytes are here; None: no going on with it."""
        self._total: int | None = None
        self._etag: str | None = None
        self._modified: str | None = None

    def run(self, make_room: Callable[[int], None], known: Mapping[str, str] = {}) -> Fetched:
        """Fetches the file, in several tries if need be. `make_room` is told how many bytes are still to
        come, as soon as that is known.

        `known`: conditional headers; with them it may raise NotModified. Raises: LoraNotFound, AccessDenied,
        DownloadFailed, LoraTooLarge, SourceInvalid; OSError if the part cannot be written.
        """
        failures = 0
        with self._part.open("wb", buffering=0) as stream:
            while True:
                before = self._done
                try:
                    self._try(stream, make_room, known)
                    os.fsync(stream.fileno())
                    return Fetched(self._digest.hexdigest(), self._done, self._etag, self._modified)
                except _Again as trouble:
                    failures = 1 if self._done > before else failures + 1
                    self._wait(trouble, failures)

    def _wait(self, trouble: _Again, failures: int) -> None:
        """Until the next try. Raises: DownloadFailed if there is to be none."""
        shown = self._remote.shown
        log.warning("%s: %s (after %.1f MB)", shown, trouble.kind, self._done / 1e6)
        pause = pause_after(failures, self._limits)
        if trouble.after is not None:
            pause = max(pause, trouble.after)
        left = self._deadline - time.monotonic()
        if failures >= self._limits.tries or pause > left:
            hint = "Try again later."
            if trouble.after is not None:
                hint = f"The server asks to wait {trouble.after:.0f} s."
            raise DownloadFailed(f"{shown} could not be downloaded ({trouble.kind})", hint)
        time.sleep(pause)

    def _try(
        self, stream: io.FileIO, make_room: Callable[[int], None], known: Mapping[str, str]
    ) -> None:
        headers = dict(known)
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
                        self._progress(self._done, self._total)
        except (requests.TooManyRedirects, requests.exceptions.ContentDecodingError) as error:
            raise DownloadFailed(
                f"{self._remote.shown} could not be downloaded ({_kind(error)})"
            ) from None
        except requests.RequestException as error:
            # Only the kind of error: its text holds the whole URL, tokens and all.
            raise _Again(_kind(error)) from None
        if self._total is not None and self._done != self._total:
            self._validator = None  # more or less than the server told: begin anew
            raise _Again("the body has another length than was told")

    def _begin(self, stream: io.FileIO, body: Body) -> None:
        """Goes on where the last try broke off, if the server does so too; else from the start."""
        span = re.fullmatch(
            r"bytes (\d{1,18})-(\d{1,18})/(\d{1,18})", body.headers.get("Content-Range", "")
        )
        goes_on = body.status == 206 and not body.encoding and span is not None
        if goes_on and span and int(span[1]) == self._done and int(span[3]) == self._total:
            return
        if body.status == 206:
            self._validator = None
            raise _Again("the server sent another part than was asked for")
        self._done, self._digest = 0, hashlib.sha256()
        stream.seek(0)
        stream.truncate()
        self._total = body.length or (None if body.encoding else self._remote.size)
        self._etag, self._modified = body.headers.get("ETag"), body.headers.get("Last-Modified")
        strong = self._etag if self._etag and not self._etag.startswith("W/") else None
        self._validator = None if body.encoding or not self._total else strong or self._modified

    def _check_status(self, body: Body) -> None:
        """Raises: what an answer other than the content means."""
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
            raise _Again("the server has less than it had")
        if status in (408, 425, 429) or status >= 500:
            raise _Again(f"HTTP {status}", _seconds(body.headers.get("Retry-After", "")))
        raise DownloadFailed(f"{shown} answered HTTP {status}")

    def _check_size(self, size: int) -> None:
        if size > self._limits.file_bytes:
            raise LoraTooLarge(
                f"{self._remote.shown} is over the limit of {self._limits.file_bytes / 1e6:.0f} MB",
                "The limit is LORA_MAX_FILE_MB.",
            )


def pause_after(failures: int, limits: Limits) -> float:
    """Seconds to wait before the next try: twice as long each time, with jitter."""
    return min(MAX_PAUSE, limits.pause * 2 ** (failures - 1)) * random.uniform(0.5, 1.5)


class _Sink:
    """Writes and hashes in a thread of its own, while the next piece comes in."""

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
                continue  # drained, so that `put` never waits for ever
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
    """A Retry-After: seconds, or a date."""
    if text.isascii() and text.isdigit():
        return float(text)
    try:
        return max(0.0, email.utils.parsedate_to_datetime(text).timestamp() - time.time())
    except (ValueError, OverflowError):
        return None


def _kind(error: requests.RequestException) -> str:
    if isinstance(error, requests.TooManyRedirects):
        return "it redirects in circles"
    if isinstance(error, requests.Timeout):
        return "it took too long"
    if isinstance(error, requests.exceptions.ContentDecodingError):
        return "it is packed in a way that cannot be read"
    return "the connection failed or broke off"
