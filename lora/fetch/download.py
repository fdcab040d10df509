"""Downloads one file into a part file, in spite of broken connections and failing servers, within limits."""

from __future__ import annotations

import hashlib
import io
import logging
import os
import queue
import random
import re
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import requests

from lora.errors import DownloadFailed, LoraNotFound, LoraTooLarge
from lora.fetch.answers import denied, later, status_in_words, wait_of
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


@dataclass(eq=False)
class _TryAgain(Exception):
    """A try failed, and the next may succeed."""

    reason: str
    after: float | None = None
    """The seconds that the server asks to wait."""


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
        """The ETag or date of the content that is being downloaded; None if it cannot be resumed."""
        self._total: int | None = None
        self._headers: Mapping[str, str] = {}

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
                    etag, modified = map(self._headers.get, ("ETag", "Last-Modified"))
                    return Fetched(self._digest.hexdigest(), self._done, etag, modified)
                except _TryAgain as failure:
                    failures = 1 if self._done > before else failures + 1
                    self._wait(failure, failures)

    def _wait(self, failure: _TryAgain, failures: int) -> None:
        """Waits before the next try. Raises: DownloadFailed if this was the last."""
        shown = self._remote.shown
        log.warning("%s: %s (after %.1f MB)", shown, failure.reason, self._done / 1e6)
        after = failure.after
        pause = max(pause_after(failures, self._limits), after or 0.0)
        if failures >= self._limits.tries or pause > self._deadline - time.monotonic():
            sentence = f"{shown} could not be downloaded ({failure.reason})"
            raise DownloadFailed(sentence, later(after), after)
        time.sleep(pause)

    def _try(
        self, stream: io.FileIO, make_room: Callable[[int], None], conditions: Mapping[str, str]
    ) -> None:
        headers, url, limits = conditions, self._remote.url, self._limits
        failed = f"{self._remote.shown} could not be downloaded"
        if self._done and self._validator:
            headers = {"Range": f"bytes={self._done}-", "If-Range": self._validator}
        try:
            with self._web.open(
                url,
                headers,
                stall=limits.stall,
                deadline=self._deadline,
                token=self._remote.token,
            ) as body:
                self._check_status(body)
                self._begin(stream, body)
                if self._total is not None:
                    self._check_size(self._total)
                    make_room(self._total - self._done)
                with _written_beside(stream, self._digest) as write:
                    for piece in body.pieces():
                        self._check_size(self._done + len(piece))
                        write(piece)
                        self._done += len(piece)
                        self._on_bytes(self._done, self._total)
        # No error's own text is repeated: it holds the whole URL, tokens and all.
        except requests.TooManyRedirects:
            raise DownloadFailed(f"{failed} (it redirects in circles)") from None
        except requests.exceptions.ContentDecodingError:
            raise DownloadFailed(f"{failed} (it is packed in a way that cannot be read)") from None
        except requests.Timeout:
            raise _TryAgain("it took too long") from None
        except requests.RequestException:
            raise _TryAgain("the connection failed or broke off") from None
        if self._total is not None and self._done != self._total:
            self._validator = None  # another length than announced: the next try starts anew
            raise _TryAgain("the body has another length than announced")

    def _begin(self, stream: io.FileIO, body: Body) -> None:
        """Resumes where the last try broke off, if the server does so too; else starts anew."""
        if body.status == 206:
            expected = rf"bytes {self._done}-[0-9]{{1,18}}/{self._total}"
            span = body.headers.get("Content-Range", "")
            if not body.encoding and re.fullmatch(expected, span):
                return
            self._validator = None
            raise _TryAgain("the server sent another part than was asked for")
        self._done, self._digest = 0, hashlib.sha256()
        stream.seek(0)
        stream.truncate()
        self._total = None if body.encoding else body.sent_length or self._remote.size
        self._headers, etag = body.headers, body.headers.get("ETag", "")
        strong = "" if etag.startswith("W/") else etag
        validator = strong or body.headers.get("Last-Modified")
        self._validator = None if body.encoding or not self._total else validator

    def _check_status(self, body: Body) -> None:
        """Raises: NotModified, or the error that the status means, unless the content follows."""
        status, shown = body.status, self._remote.shown
        if status in (200, 206):
            if urlsplit(body.url).path.rstrip("/").endswith("/login"):
                raise denied(shown, body)
            return
        if status == 304:
            raise NotModified
        if status in (404, 410):
            raise LoraNotFound(f"{shown} does not exist (HTTP {status})")
        if status in (401, 403):
            raise denied(shown, body)
        if status == 416 and self._done:
            self._done, self._validator = 0, None
            raise _TryAgain("the server has less than it had")
        if status in (408, 425, 429) or status >= 500:
            raise _TryAgain(status_in_words(status), wait_of(body.headers))
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


@contextmanager
def _written_beside(stream: io.FileIO, digest: Any) -> Iterator[Callable[[bytes], None]]:
    """Gives a function that hands pieces to a thread, which hashes and writes them while the next piece is
    received. The block ends when all are written. If writing fails, the function and the block raise OSError.
    """
    pieces: queue.Queue[bytes | None] = queue.Queue(maxsize=8)
    errors: list[OSError] = []

    def work() -> None:
        while (piece := pieces.get()) is not None:
            if errors:
                continue  # the queue is emptied, so that `put` never blocks for ever
            try:
                digest.update(piece)
                view = memoryview(piece)
                while view:
                    view = view[stream.write(view) :]
            except OSError as error:
                errors.append(error)

    def put(piece: bytes) -> None:
        if errors:
            raise errors[0]
        pieces.put(piece)

    thread = threading.Thread(target=work, name="download", daemon=True)
    thread.start()
    try:
        yield put
    finally:
        pieces.put(None)
        thread.join()
        if errors:
            raise errors[0]
