"""A server whose answers never end, each in another part of HTTP."""

from __future__ import annotations

import gzip
import socket
import threading
from collections.abc import Iterator
from contextlib import suppress
from types import TracebackType

OK = b"HTTP/1.1 200 OK\r\n"
CHUNKED = OK + b"Transfer-Encoding: chunked\r\n\r\n"

PARTS: dict[str, tuple[bytes, bytes]] = {
    "nothing at all": (b"", b""),
    "the status": (b"HTTP/1.1 200 ", b"x"),
    "interim answers": (b"", b"HTTP/1.1 100 Continue\r\n\r\n"),
    "a header": (OK + b"X: ", b"y"),
    "the headers": (OK, b"X: y\r\n"),
    "a folded header": (OK + b"X: y\r\n", b" y\r\n"),
    "a body with a length": (OK + b"Content-Length: 9000000\r\n\r\n", b"x"),
    "a body without": (OK + b"\r\n", b"x"),
    "a silent body": (OK + b"Content-Length: 9000000\r\n\r\nx", b""),
    "a chunk's length": (CHUNKED, b"0"),
    "a chunk's extension": (CHUNKED + b"1;", b"x"),
    "a chunk": (CHUNKED + b"fffff\r\n", b"x"),
    "chunks": (CHUNKED, b"1\r\nx\r\n"),
    "a trailer": (CHUNKED + b"1\r\nx\r\n0\r\nX: ", b"y"),
    "trailers": (CHUNKED + b"1\r\nx\r\n0\r\n", b"X: y\r\n"),
    "packed nothings": (OK + b"Content-Encoding: gzip\r\n\r\n", gzip.compress(b"")),
    "a redirect's headers": (b"HTTP/1.1 302 Found\r\nLocation: /\r\n", b"X: y\r\n"),
}
"""Part -> what is sent first, and what is sent again and again; nothing is silence."""

PAUSE = 0.05


class StuckServer:
    """Answers a path `/N`, and all below it, by the N-th of PARTS, for ever; ends with its block."""

    def __enter__(self) -> StuckServer:
        self._ended = threading.Event()
        self._socket = socket.create_server(("127.0.0.1", 0), backlog=64)
        self._socket.settimeout(0.05)
        self._threads = [threading.Thread(target=self._serve)]
        self._threads[0].start()
        return self

    def urls(self) -> Iterator[tuple[str, str]]:
        """Each part's name, and the URL whose answer never ends there."""
        port = self._socket.getsockname()[1]
        for number, name in enumerate(PARTS):
            yield name, f"http://127.0.0.1:{port}/{number}"

    def _serve(self) -> None:
        while not self._ended.is_set():
            with suppress(TimeoutError):
                connection, _ = self._socket.accept()
                self._threads.append(threading.Thread(target=self._answer, args=(connection,)))
                self._threads[-1].start()

    def _answer(self, connection: socket.socket) -> None:
        with connection, suppress(OSError):  # the client hangs up: what it should do
            number = int(connection.recv(1 << 16).split(b"/", 2)[1].split()[0])
            first, again = list(PARTS.values())[number]
            connection.sendall(first)
            while not self._ended.wait(PAUSE):
                connection.sendall(again)

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._ended.set()
        for thread in self._threads:
            thread.join()
        self._socket.close()
