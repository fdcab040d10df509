"""A stand-in for the stores that speak S3: moto behind every host name, with the checks that stores make."""

from __future__ import annotations

import re
import socket
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import pytest
from moto.backends import get_backend
from moto.s3.exceptions import BucketAlreadyExists
from moto.server import DomainDispatcherApplication, create_backend_app
from werkzeug.serving import WSGIRequestHandler, make_server

WSGI = Callable[[dict[str, Any], Any], Iterable[bytes]]


@dataclass
class Store:
    """Answers for every host. Each host's first label is the bucket if it is in `buckets` and no path is."""

    regions: dict[str, str] = field(default_factory=dict)
    """Bucket -> its region: a request that is signed for another is refused, as AWS does."""
    tells_region: bool = True
    before: list[tuple[int, str]] = field(default_factory=list)
    """Statuses and codes that the next requests get."""
    asked: list[tuple[str, str, str, str]] = field(default_factory=list)
    """Method, host, path and region of each request."""

    def make(self, bucket: str) -> None:
        """Makes a bucket, of any region."""
        with suppress(
            BucketAlreadyExists
        ):  # by an earlier test: moto keeps one set for the process
            get_backend("s3")["123456789012"]["aws"].create_bucket(bucket, "us-east-1")

    def __call__(self, environ: dict[str, Any], start: Any) -> Iterable[bytes]:
        query = environ.get("QUERY_STRING", "")
        host, path = (
            environ["HTTP_HOST"].rpartition(":")[0] or environ["HTTP_HOST"],
            environ["PATH_INFO"],
        )
        signed = environ.get("HTTP_AUTHORIZATION", "") or query
        scope = re.search(r"Credential=[^/]+/\d+/([^/]+)/", signed.replace("%2F", "/"))
        region = scope[1] if scope else ""
        self.asked.append((environ["REQUEST_METHOD"], host, path, region))
        bucket = next((b for b in self.regions if host.startswith(f"{b}.")), path.split("/")[1])
        wants = self.regions.get(bucket, region)
        if self.before:
            return _refuse(start, *self.before.pop(0))
        if region != wants:
            wrong = "AuthorizationQueryParametersError", "AuthorizationHeaderMalformed"
            more = f"<Region>{wants}</Region>" if self.tells_region else ""
            return _refuse(start, 400, wrong["HTTP_AUTHORIZATION" in environ], more)
        if host.startswith(f"{bucket}."):
            environ["PATH_INFO"] = f"/{bucket}{path}"
            environ["RAW_URI"] = environ["REQUEST_URI"] = f"{environ['PATH_INFO']}?{query}"
        environ["HTTP_HOST"] = "localhost"
        answer: Iterable[bytes] = _moto()(environ, start)
        return answer


@cache
def _moto() -> WSGI:
    app: WSGI = DomainDispatcherApplication(create_backend_app)
    return app


def _refuse(start: Any, status: int, code: str, more: str = "") -> list[bytes]:
    body = f"<?xml version='1.0'?><Error><Code>{code}</Code><Message>canary</Message>{more}</Error>"
    start(f"{status} X", [("Content-Type", "application/xml"), ("Content-Length", str(len(body)))])
    return [body.encode()]


class _Quiet(WSGIRequestHandler):
    def log(self, *_: Any) -> None:
        pass


@contextmanager
def serving(store: WSGI, monkeypatch: pytest.MonkeyPatch) -> Iterator[int]:
    """Every host name on port 80 leads to the store, while the block runs; its port."""
    server = make_server("127.0.0.1", 0, store, threaded=True, request_handler=_Quiet)
    thread = threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True)
    thread.start()
    real = socket.getaddrinfo

    def to_us(host: Any, port: Any, *args: Any, **options: Any) -> list[Any]:
        return real("127.0.0.1", server.port if port == 80 else port, *args, **options)

    monkeypatch.setattr(socket, "getaddrinfo", to_us)
    try:
        yield server.port
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
