"""A loopback web server whose paths answer as a test says, faults included."""

from __future__ import annotations

import hashlib
import json
import re
import ssl
import threading
import zlib
from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import TracebackType
from typing import Any
from urllib.parse import urlsplit

from lora.fetch.rules import WebRules
from lora.fetch.web import Web

LOOPBACK = Web(WebRules(allow_private=True))
"""Asks servers of this machine, too."""

PIECES = 20

STALL = 600.0
"""Most seconds that an answer falls silent; it ends with the server, too."""


@dataclass
class Reply:
    """How one path answers."""

    body: bytes = b""
    status: int = 200
    headers: dict[str, str] = field(default_factory=dict)
    first: Sequence[Reply] = ()
    """What the first requests get, one each, before all others get this."""
    fail_first: int = 0
    """Answer 500 so many times before answering well."""
    to: str | None = None
    """Redirect there, with 302 if `status` names no other."""
    etag: str | None = None
    """Sent, and If-None-Match with it is answered by 304."""
    ranges: bool = False
    """Send the part that Range asks for, unless If-Range names another content."""
    length: int | None = None
    """The Content-Length that is told in place of the body's; -1 for none."""
    cut_after: int | None = None
    """Close the connection after so many bytes of the body."""
    stall_after: int | None = None
    """Fall silent after so many bytes of the body, and keep the connection."""
    pause: float = 0.0
    """Seconds before the body."""
    gate: threading.Event | None = None
    """The body is sent when this is set."""
    gate_after: int = 0
    """So many bytes of the body pass the gate at once."""
    drip: float = 0.0
    """Seconds between the bytes of the body, or of `raw`."""
    seconds: float = 0.0
    """Seconds over which the body is sent, in `PIECES`."""
    raw: bytes | None = None
    """All that is sent, head included, in place of everything above; then the connection ends."""


@dataclass(frozen=True)
class Asked:
    """A request as it came in."""

    method: str
    path: str
    query: str
    headers: Mapping[str, str]


@dataclass(frozen=True)
class _Answer:
    status: int
    headers: dict[str, str]
    body: bytes


class _Server(ThreadingHTTPServer):
    connections = 0

    def get_request(self) -> tuple[Any, Any]:
        accepted = super().get_request()
        self.connections += 1
        return accepted

    def handle_error(self, request: Any, client_address: Any) -> None:
        pass  # the client hung up


class LoopbackServer:
    """Serves `replies` (path -> Reply) on a free port of 127.0.0.1 and counts what was asked.

    `keep_alive`: speak HTTP/1.1. `tls`: speak it within TLS.
    """

    def __init__(self, *, keep_alive: bool = False, tls: ssl.SSLContext | None = None) -> None:
        self.replies: dict[str, Reply] = {}
        self.hits: Counter[str] = Counter()
        self.headers: dict[str, dict[str, str]] = {}
        """The last request's, per path."""
        self.asked: list[Asked] = []
        self.sent: Counter[str] = Counter()
        """Bytes of bodies, per path."""
        self.stored: dict[str, bytes] = {}
        """What was put into a bucket, per path."""
        self._buckets: set[str] = set()
        self._guard = threading.Lock()
        self._ended = threading.Event()
        self._tls = tls
        outer = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1" if keep_alive else "HTTP/1.0"

            def do_GET(self) -> None:
                outer._answer(self)

            def do_HEAD(self) -> None:
                outer._answer(self)

            def do_PUT(self) -> None:
                outer._answer(self)

            def log_message(self, format: str, *args: Any) -> None:  # noqa: A002 - the base's name
                pass

        self._server = _Server(("127.0.0.1", 0), Handler)
        if tls:
            self._server.socket = tls.wrap_socket(self._server.socket, server_side=True)
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.02,))
        self._thread.daemon = True

    def __enter__(self) -> LoopbackServer:
        self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._ended.set()
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()

    @property
    def port(self) -> int:
        return int(self._server.server_address[1])

    @property
    def address(self) -> str:
        return f"{'https' if self._tls else 'http'}://127.0.0.1:{self.port}"

    @property
    def connections(self) -> int:
        """How many there were: 0 proves that nothing was sent."""
        return self._server.connections

    def url(self, path: str) -> str:
        return self.address + path

    def serve(self, path: str, body: bytes = b"", **options: Any) -> str:
        """Sets how a path answers; returns its URL."""
        self.replies[path] = Reply(body, **options)
        return self.url(path)

    def serve_json(self, path: str, value: object) -> str:
        """Sets a path's answer to a JSON document; returns its URL."""
        body, headers = json.dumps(value).encode(), {"Content-Type": "application/json"}
        return self.serve(path, body, headers=headers)

    def serve_repo(self, repo: str, files: dict[str, bytes], commit: str = "c" * 40) -> None:
        """Answers as the Hugging Face hub does for a model repo with these files."""
        siblings: list[dict[str, Any]] = []
        for name, body in files.items():
            digest = hashlib.sha256(body).hexdigest()
            lfs = {"sha256": digest, "size": len(body), "pointerSize": 134}
            siblings.append({"rfilename": name, "size": len(body), "lfs": lfs})
            headers = {"ETag": f'"{digest}"', "X-Repo-Commit": commit}
            self.serve(f"/{repo}/resolve/{commit}/{name}", body, headers=headers)
        info: dict[str, Any] = {
            "id": repo,
            "modelId": repo,
            "sha": commit,
            "siblings": siblings,
            "tags": [],
        }
        info |= {"private": False, "downloads": 0, "likes": 0}
        for path in ("", "/revision/main", f"/revision/{commit}"):
            self.serve_json(f"/api/models/{repo}{path}", info)
        tree = [
            {
                "type": "file",
                "path": one["rfilename"],
                "size": one["size"],
                "oid": "0" * 40,
                "lfs": {**one["lfs"], "oid": one["lfs"]["sha256"]},
            }
            for one in siblings
        ]
        for revision in ("main", commit):
            self.serve_json(f"/api/models/{repo}/tree/{revision}", tree)

    def serve_bucket(self, name: str) -> str:
        """Keeps what is PUT below `/name/`, as an S3 store does; returns the store's endpoint."""
        self._buckets.add(name)
        return self.address

    def close_buckets(self) -> None:
        """From now on every PUT is answered by 404."""
        self._buckets.clear()

    # --- answering -------------------------------------------------------------------------------

    def _answer(self, request: BaseHTTPRequestHandler) -> None:
        parts = urlsplit(request.path)
        headers = dict(request.headers)
        taken = request.rfile.read(int(headers.get("Content-Length", 0)))
        with self._guard:
            self.hits[parts.path] += 1
            self.headers[parts.path] = headers
            self.asked.append(Asked(request.command, parts.path, parts.query, headers))
            reply = self._reply(parts.path, self.hits[parts.path])
        if request.command == "PUT" and parts.path.split("/")[1] in self._buckets:
            self.stored[parts.path] = taken
            reply = Reply()
        elif request.command == "GET" and parts.path in self.stored:
            reply = Reply(self.stored[parts.path])
        with suppress(OSError):  # the client hangs up
            if reply.raw is not None:
                request.close_connection = True
                self._write(request, reply, reply.raw)
            else:
                self._send(request, reply, _answer(reply, headers))

    def _reply(self, path: str, number: int) -> Reply:
        """What the request of this number (from 1) gets."""
        reply = self.replies.get(path)
        if reply is None:
            hub = {"X-Error-Code": "RepoNotFound"} if path.startswith("/api/models/") else {}
            return Reply(status=404, headers=hub)
        early = [*reply.first, *[Reply(status=500)] * reply.fail_first]
        return early[number - 1] if number <= len(early) else reply

    def _send(self, request: BaseHTTPRequestHandler, reply: Reply, answer: _Answer) -> None:
        request.send_response(answer.status)
        for name, value in answer.headers.items():
            request.send_header(name, value.encode().decode("latin-1"))
        if "Content-Length" not in answer.headers:
            request.close_connection = True
        request.end_headers()
        if request.command == "HEAD":
            return
        self._ended.wait(reply.pause)
        stops = [stop for stop in (reply.cut_after, reply.stall_after) if stop is not None]
        body = answer.body[: min(stops, default=None)]
        if stops:
            request.close_connection = True
        self._write(request, reply, body[: reply.gate_after])
        while reply.gate and not reply.gate.wait(0.02) and not self._ended.is_set():
            pass
        self._write(request, reply, body[reply.gate_after :])
        if reply.stall_after is not None:
            self._ended.wait(STALL)

    def _write(self, request: BaseHTTPRequestHandler, reply: Reply, data: bytes) -> None:
        path = urlsplit(request.path).path
        size = 1 if reply.drip else (-(-len(data) // PIECES) or 1) if reply.seconds else 1 << 16
        pause = reply.drip or reply.seconds / PIECES
        for start in range(0, len(data), size):
            piece = data[start : start + size]
            request.wfile.write(piece)
            self.sent[path] += len(piece)
            if pause and self._ended.wait(pause):
                return


def _answer(reply: Reply, asked: Mapping[str, str]) -> _Answer:
    """What is sent for a request with these headers."""
    status, body, headers = reply.status, reply.body, dict(reply.headers)
    if reply.to is not None:
        status = 302 if status == 200 else status
        headers["Location"] = reply.to
    if reply.etag:
        headers["ETag"] = reply.etag
        if asked.get("If-None-Match") == reply.etag:
            status, body = 304, b""
    known = (headers.get("ETag"), headers.get("Last-Modified"))
    span = re.fullmatch(r"bytes=(\d+)-", asked.get("Range", ""))
    if status == 200 and reply.ranges and span and asked.get("If-Range", known[0]) in known:
        start, whole = int(span[1]), len(body)
        status, body = (206, body[start:]) if start < whole else (416, b"")
        told = f"{start}-{whole - 1}" if body else "*"
        headers["Content-Range"] = f"bytes {told}/{whole}"
    length = len(body) if reply.length is None else reply.length
    if length >= 0:
        headers["Content-Length"] = str(length)
    return _Answer(status, headers, body)


def gzip_of(body: bytes, times: int = 1) -> bytes:
    """The body, so many times over, as gzip; made without having all of it in memory."""
    packer = zlib.compressobj(wbits=zlib.MAX_WBITS | 16)
    return b"".join([*(packer.compress(body) for _ in range(times)), packer.flush()])
