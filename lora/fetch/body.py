"""The body of an answer: read in pieces, unpacked, within limits of time and size."""

from __future__ import annotations

import re
import socket
import threading
import time
import zlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress

import requests
import urllib3

CHUNK = 1 << 20
ANY_HEADER = zlib.MAX_WBITS | 32  # 32: zlib recognizes a header of gzip or its own


class Body:
    """An HTTP answer: its head has been read, its body is still to come."""

    def __init__(self, response: requests.Response, stall: float, deadline: float) -> None:
        self._response, self._stall, self._deadline = response, stall, deadline
        self.status = response.status_code
        self.headers: Mapping[str, str] = response.headers
        self.url = str(response.url)
        """The last URL, after redirects. It may hold secrets."""
        encoding = self.headers.get("Content-Encoding", "").strip().lower()
        self.encoding = encoding.replace("identity", "")
        """How the body is compressed; empty if it is not, as the request asks."""
        length = self.headers.get("Content-Length", "")
        self.sent_length = int(length) if re.fullmatch(r"[0-9]{1,18}", length) else None
        """How many bytes will come, before they are unpacked; None if the server does not say."""

    def read(self, limit: int) -> bytes:
        """The whole body. Raises: ValueError if it is longer than the limit; what `pieces` raises."""
        data = bytearray()
        for piece in self.pieces():
            data += piece
            if len(data) > limit:
                raise ValueError(f"the answer is over {limit} bytes")
        return bytes(data)

    def pieces(self) -> Iterator[bytes]:
        """The body as it comes in, unpacked, in pieces of at most a megabyte.

        Raises: requests.RequestException if the connection breaks or is silent for too long, if the body is
        shorter than announced, or if the deadline passes while bytes still trickle in.
        """
        return self._unpacked() if self.encoding else self._sent()

    def _sent(self) -> Iterator[bytes]:
        """The body as it was sent. Where it is hung up on, a part may look like a whole: it is late then."""
        with hung_up_after(self._deadline - time.monotonic(), self._socket) as late:
            try:
                yield from self._read()
            except requests.RequestException as error:
                if late.is_set():
                    raise requests.Timeout("the deadline passed") from error
                raise
            if late.is_set():
                raise requests.Timeout("the deadline passed")

    def _socket(self) -> socket.socket | None:
        """The connection that the body comes from; None once the body is read, and another may have it."""
        found: socket.socket | None = getattr(self._response.raw.connection, "body_socket", None)
        return found

    def _read(self) -> Iterator[bytes]:
        raw, done = self._response.raw, 0
        try:
            while True:
                left = self._deadline - time.monotonic()
                if left <= 0:
                    raise requests.Timeout("the deadline passed")
                if (body_socket := self._socket()) is not None:
                    with suppress(OSError):  # closed: the rest of the body is in the buffer
                        body_socket.settimeout(min(self._stall, left))
                piece = raw.read1(CHUNK, decode_content=False)
                if not piece:
                    break
                done += len(piece)
                yield piece
        except urllib3.exceptions.ReadTimeoutError as error:
            raise requests.Timeout("the connection fell silent") from error
        except (urllib3.exceptions.HTTPError, OSError) as error:
            if isinstance(error, requests.RequestException):
                raise
            raise requests.ConnectionError("the connection broke") from error
        if self.sent_length not in (None, done):
            raise requests.ConnectionError("the body ended early")
        if not done and self.sent_length is None and not raw.chunked:
            raise requests.ConnectionError("the head ended early, or there is no body")

    def _unpacked(self) -> Iterator[bytes]:
        """Unpacks gzip or zlib, in pieces that stay small however much is packed into them."""
        if self.encoding not in ("gzip", "x-gzip", "deflate"):
            raise requests.exceptions.ContentDecodingError("the body is packed in an unknown way")
        unpacker = zlib.decompressobj(ANY_HEADER)
        try:
            for data in self._sent():
                while data:
                    if unpacker.eof:  # gzip may have several members
                        unpacker = zlib.decompressobj(ANY_HEADER)
                    piece = unpacker.decompress(data, CHUNK)
                    data = unpacker.unconsumed_tail or unpacker.unused_data  # noqa: PLW2901
                    if piece:
                        yield piece
        except zlib.error as error:
            raise requests.exceptions.ContentDecodingError("the body is not unpackable") from error
        if not unpacker.eof:
            raise requests.ConnectionError("the compressed body ended early")


@contextmanager
def hung_up_after(
    seconds: float, find: Callable[[], socket.socket | None]
) -> Iterator[threading.Event]:
    """Shuts the connection down that `find` returns, if the block takes longer. Yields what is set then.

    The socket's own timeout starts anew with each byte, and one call may read many: the lines of a head, of a
    chunk's length, of a chunked body's end.
    """
    late = threading.Event()

    def hang_up() -> None:
        late.set()
        if (body_socket := find()) is not None:
            with suppress(OSError):  # it is closed already
                # Not TLS's own shutdown, which would drop its state.
                socket.socket.shutdown(body_socket, socket.SHUT_RDWR)

    timer = threading.Timer(seconds, hang_up)
    timer.daemon = True
    timer.start()
    try:
        yield late
    finally:
        timer.cancel()
