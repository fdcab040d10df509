"""A loopback web server whose paths answer as a test says, faults included."""

from __future__ import annotations

import hashlib
import json
import threading
import time
from collections import Counter
from contextlib import suppress
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import TracebackType
from typing import Any
from urllib.parse import urlsplit


@dataclass
class Reply:
    """How one path answers."""

    body: bytes = b""
    status: int = 200
    headers: dict[str, str] = field(default_factory=dict)
    cut_after: int | None = None
    """Close the connection after so many bytes of the body."""
    fail_first: int = 0
    """Answer 500 so many times before answering well."""
    pause: float = 0.0
    """Seconds before the body."""
    drip: float = 0.0
    """Seconds between the body's bytes."""


class LoopbackServer:
    """Serves `replies` (path -> Reply) on a free port of 127.0.0.1 and counts what was asked."""

    def __init__(self) -> None:
        self.replies: dict[str, Reply] = {}
        self.hits: Counter[str] = Counter()
        self.headers: dict[str, dict[str, str]] = {}
        outer = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                outer._answer(self, send_body=True)

            def do_HEAD(self) -> None:
                outer._answer(self, send_body=False)

            def log_message(self, format: str, *args: Any) -> None:  # noqa: A002 - the base's name
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._thread = threading.Thread(target=self._server.serve_forever, daemon=True)

    def __enter__(self) -> LoopbackServer:
        self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self._server.server_address[1]}"

    def url(self, path: str) -> str:
        return self.address + path

    def serve(self, path: str, body: bytes = b"", **options: Any) -> str:
        """Sets how a path answers; returns its URL."""
        self.replies[path] = Reply(body, **options)
        return self.url(path)

    def serve_repo(self, repo: str, files: dict[str, bytes], commit: str = "c" * 40) -> None:
        """Answers as the Hugging Face hub does for a model repo with these files."""
        siblings = []
        for name, body in files.items():
            digest = hashlib.sha256(body).hexdigest()
            lfs = {"sha256": digest, "size": len(body), "pointerSize": 134}
            siblings.append({"rfilename": name, "size": len(body), "lfs": lfs})
            headers = {"ETag": f'"{digest}"', "X-Repo-Commit": commit}
            self.serve(f"/{repo}/resolve/{commit}/{name}", body, headers=headers)
        info = {"id": repo, "modelId": repo, "sha": commit, "siblings": siblings, "tags": []}
        info |= {"private": False, "downloads": 0, "likes": 0}
        body = json.dumps(info).encode()
        json_type = {"Content-Type": "application/json"}
        for path in ("", "/revision/main", f"/revision/{commit}"):
            self.serve(f"/api/models/{repo}{path}", body, headers=json_type)
        tree = [
            {
                "type": "file",
                "path": s["rfilename"],
                "size": s["size"],
                "oid": "0" * 40,
                "lfs": s["lfs"],
            }
            for s in siblings
        ]
        for s in tree:
            s["lfs"] = {**s["lfs"], "oid": s["lfs"]["sha256"]}  # type: ignore[dict-item]
        for revision in ("main", commit):
            body = json.dumps(tree).encode()
            self.serve(f"/api/models/{repo}/tree/{revision}", body, headers=json_type)

    def _answer(self, request: BaseHTTPRequestHandler, *, send_body: bool) -> None:
        path = urlsplit(request.path).path
        self.hits[path] += 1
        self.headers[path] = dict(request.headers)
        reply = self.replies.get(path)
        if reply is None:
            request.send_response(404)
            request.send_header("Content-Length", "0")
            if path.startswith("/api/models/"):
                request.send_header("X-Error-Code", "RepoNotFound")
            request.end_headers()
            return
        if self.hits[path] <= reply.fail_first:
            request.send_error(500)
            return
        request.send_response(reply.status)
        request.send_header("Content-Length", str(len(reply.body)))
        for name, value in reply.headers.items():
            request.send_header(name, value)
        request.end_headers()
        if not send_body:
            return
        time.sleep(reply.pause)
        if reply.drip:
            self._drip(request, reply)
            return
        request.wfile.write(reply.body[: reply.cut_after])
        if reply.cut_after is not None:
            request.close_connection = True

    @staticmethod
    def _drip(request: BaseHTTPRequestHandler, reply: Reply) -> None:
        with suppress(OSError):  # the client hangs up
            for byte in reply.body[:200]:
                request.wfile.write(bytes([byte]))
                time.sleep(reply.drip)
        request.close_connection = True
