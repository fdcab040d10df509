"""Bytes from a URL, in pieces, within limits of size and time."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

import requests
import urllib3

CHUNK = 1 << 20


def quiet_libraries() -> None:
    """Silences what other libraries log of a request: it may hold whole URLs, and so tokens."""
    logging.getLogger("httpx2").setLevel(logging.WARNING)
    logging.getLogger("urllib3").setLevel(logging.ERROR)


@dataclass(frozen=True)
class Body:
    """An answer whose body is about to be read."""

    response: requests.Response
    deadline: float

    @property
    def status(self) -> int:
        """The HTTP status."""
        return self.response.status_code

    @property
    def length(self) -> int | None:
        """How many bytes the body will have; None if the server does not tell, or compresses it."""
        text = self.response.headers.get("Content-Length", "")
        return (
            int(text)
            if text.isdigit() and "Content-Encoding" not in self.response.headers
            else None
        )

    def pieces(self) -> Iterator[bytes]:
        """The body as it comes in, decoded, in pieces of at most a megabyte.

        Raises: requests.RequestException if the connection breaks, is silent for too long, ends before
        `length` bytes, or if the deadline passes, however slowly the bytes drip.
        """
        done = 0
        try:
            while piece := self.response.raw.read1(CHUNK, decode_content=True):
                if time.monotonic() > self.deadline:
                    raise requests.Timeout("the deadline passed")
                done += len(piece)
                yield piece
        except urllib3.exceptions.HTTPError as error:
            raise requests.ConnectionError("the connection broke") from error
        if self.length is not None and done != self.length:
            raise requests.ConnectionError("the body ended early")


@contextmanager
def open_url(
    url: str, headers: Mapping[str, str], *, stall: float, deadline: float
) -> Iterator[Body]:
    """An open GET. `stall`: seconds of silence allowed; `deadline`: by time.monotonic().

    A redirect to another host loses the Authorization header (requests' own rule). Raises:
    requests.RequestException; its text may hold the whole URL and must not be shown.
    """
    timeout = (min(10.0, stall), stall)
    with requests.get(url, headers=dict(headers), stream=True, timeout=timeout) as response:
        yield Body(response, deadline)
