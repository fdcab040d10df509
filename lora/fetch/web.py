"""GET over http(s), for URLs that strangers write: to public addresses alone, within limits of time.

A host's name is resolved once per connection, every address that it has is checked, and the connection goes
to one of those: what a second look-up would answer does not matter. Redirects are followed one by one, each
checked alike. Tokens belong to an origin (scheme, host and port) and are sent to no other.
"""

from __future__ import annotations

import http.cookiejar
import logging
import re
import socket
import threading
import time
import zlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from typing import Any
from urllib.parse import urljoin, urlsplit

import requests
import urllib3
from requests.adapters import HTTPAdapter
from urllib3.connection import HTTPConnection, HTTPSConnection
from urllib3.connectionpool import HTTPConnectionPool, HTTPSConnectionPool

from lora.errors import SourceInvalid
from lora.fetch.rules import PORTS, WebRules, origin_of

CHUNK = 1 << 20
MAX_REDIRECTS = 10
CONNECT_TIMEOUT = 10.0


def quiet_libraries() -> None:
    """Silences what other libraries log of a request: it may hold whole URLs, and so tokens or signatures."""
    for library, level in (
        ("botocore", logging.WARNING),
        ("httpx2", logging.WARNING),
        ("urllib3", logging.ERROR),
        ("urllib3.connection", logging.ERROR),  # runpod, once it is imported, sets urllib3's own
        ("urllib3.connectionpool", logging.ERROR),
    ):
        logging.getLogger(library).setLevel(level)


class Body:
    """An answer whose body is about to be read."""

    def __init__(self, response: requests.Response, stall: float, deadline: float) -> None:
        self._response, self._stall, self._deadline = response, stall, deadline
        self.status = response.status_code
        self.headers: Mapping[str, str] = response.headers
        self.url = str(response.url)
        """Where it came from in the end, after redirects. It may hold secrets."""

    @property
    def encoding(self) -> str:
        """How the body is compressed; empty if it is not, which is what was asked for."""
        return self.headers.get("Content-Encoding", "").strip().lower().replace("identity", "")

    @property
    def length(self) -> int | None:
        """How many bytes the body will have; None if the server does not tell, or compresses it."""
        return None if self.encoding else self._sent_length

    @property
    def _sent_length(self) -> int | None:
        text = self.headers.get("Content-Length", "")
        return int(text) if re.fullmatch(r"[0-9]{1,18}", text) else None

    def read(self, limit: int) -> bytes:
        """The whole body. Raises: ValueError if it is longer than the limit; as `pieces`."""
        data = bytearray()
        for piece in self.pieces():
            data += piece
            if len(data) > limit:
                raise ValueError(f"the answer is over {limit} bytes")
        return bytes(data)

    def pieces(self) -> Iterator[bytes]:
        """The body as it comes in, unpacked, in pieces of at most a megabyte.

        Raises: requests.RequestException if the connection breaks, is silent for too long, ends before
        the length that it told, or if the deadline passes, however slowly the bytes drip.
        """
        unpack = _unpacker(self.encoding)
        done = 0
        for piece in self._sent():
            done += len(piece)
            if unpack is None:
                yield piece
                continue
            yield from unpack.pieces(piece)
        if self._sent_length not in (None, done):
            raise requests.ConnectionError("the body ended early")
        if not done and self._sent_length is None and not self._response.raw.chunked:
            raise requests.ConnectionError("the head ended early, or there is no body")
        if unpack is not None and not unpack.complete:
            raise requests.ConnectionError("the compressed body ended early")

    def _sent(self) -> Iterator[bytes]:
        raw = self._response.raw
        try:
            while True:
                left = self._deadline - time.monotonic()
                if left <= 0:
                    raise requests.Timeout("the deadline passed")
                held = getattr(raw.connection, "held", None)
                if held is not None:
                    with suppress(OSError):  # closed: what is left of the body is here
                        held.settimeout(min(self._stall, left))
                piece = raw.read1(CHUNK, decode_content=False)
                if not piece:
                    return
                yield piece
        except urllib3.exceptions.ReadTimeoutError as error:
            raise requests.Timeout("the connection fell silent") from error
        except (urllib3.exceptions.HTTPError, OSError) as error:
            if isinstance(error, requests.RequestException):
                raise
            raise requests.ConnectionError("the connection broke") from error


class _Unpacker:
    """Bytes of gzip or zlib, in pieces that stay small however much is packed into them."""

    def __init__(self) -> None:
        self._zlib = _new_zlib()

    @property
    def complete(self) -> bool:
        return self._zlib.eof

    def pieces(self, data: bytes) -> Iterator[bytes]:
        try:
            while data:
                if self._zlib.eof:  # gzip may have several members; anything else is an error
                    self._zlib = _new_zlib()
                piece = self._zlib.decompress(data, CHUNK)
                data = self._zlib.unconsumed_tail or self._zlib.unused_data
                if piece:
                    yield piece
        except zlib.error as error:
            raise requests.exceptions.ContentDecodingError("the body is not unpackable") from error


def _new_zlib() -> zlib._Decompress:
    return zlib.decompressobj(zlib.MAX_WBITS | 32)  # 32: either header


def _unpacker(encoding: str) -> _Unpacker | None:
    if encoding in ("gzip", "x-gzip", "deflate"):
        return _Unpacker()
    if encoding:
        raise requests.exceptions.ContentDecodingError("the body is packed in an unknown way")
    return None


class Web:
    """Asks URLs by the rules. One object serves all threads of a process."""

    def __init__(self, rules: WebRules | None = None) -> None:
        self.rules = rules = rules or WebRules()
        self._session = _Session()
        # No proxies, no .netrc and no cookies: they would go around the rules.
        self._session.trust_env = False
        self._session.cookies.set_policy(http.cookiejar.DefaultCookiePolicy(allowed_domains=[]))
        for scheme in PORTS:
            self._session.mount(f"{scheme}://", _Adapter(rules))

    @contextmanager
    def open(
        self, url: str, headers: Mapping[str, str] | None = None, *, stall: float, deadline: float
    ) -> Iterator[Body]:
        """An open GET, after redirects. `stall`: seconds of silence allowed; `deadline`: by time.monotonic().

        Raises: SourceInvalid where the URL, or one that it redirects to, leads where the rules forbid, before
        a byte is sent there; requests.RequestException, whose text may hold the URL and must not be shown.
        """
        at = ""
        for _ in range(MAX_REDIRECTS + 1):
            at, own = self._prepared(at, url)
            wait = max(0.001, min(stall, deadline - time.monotonic()))
            response = self._session.get(
                at,
                headers={"Accept-Encoding": "identity", **(headers or {}), **own},
                stream=True,
                allow_redirects=False,
                timeout=(min(CONNECT_TIMEOUT, wait), wait),
            )
            with response:
                target = response.headers.get("Location") if response.is_redirect else None
                if target is None:
                    yield Body(response, stall, deadline)
                    return
                with suppress(UnicodeError):  # requests reads a header's bytes as latin-1
                    target = target.encode("latin-1").decode("utf-8")
                url = target
        raise requests.TooManyRedirects("too many redirects")

    def check(self, url: str) -> None:
        """Whether a URL's host may be asked, for those who ask it by other means.

        Raises: SourceInvalid if the rules forbid it, or there is no such host.
        """
        prepared, _ = self._prepared("", url)
        parts = urlsplit(prepared)
        host = parts.hostname or ""
        try:
            found = socket.getaddrinfo(host, parts.port or PORTS[parts.scheme])
        except (OSError, UnicodeError):
            raise SourceInvalid(f"there is no host {host}") from None
        if origin_of(prepared) not in self.rules.own:
            self.rules.check(host, [str(address[0]) for *_, address in found])

    def _prepared(self, base: str, url: str) -> tuple[str, dict[str, str]]:
        """The URL, seen from `base`, in the form that will be sent, and its origin's token: who is asked and
        whose token it is never differ.
        """
        request = requests.PreparedRequest()
        try:
            request.prepare_url(urljoin(base, url), None)
            prepared = str(request.url)
            origin = origin_of(prepared)
        except (requests.RequestException, ValueError):
            raise SourceInvalid("what is named, or redirected to, is no http(s) URL") from None
        token = self.rules.tokens.get(origin)
        return prepared, dict([token]) if token else {}


class _Session(requests.Session):
    """Looks at no redirect: requests would read its whole body, however long that is unpacked."""

    def get_redirect_target(self, resp: requests.Response) -> str | None:
        return None


class _Adapter(HTTPAdapter):
    """Makes requests' connections by the rules."""

    def __init__(self, rules: WebRules) -> None:
        self._rules = rules
        super().__init__(max_retries=0)

    def init_poolmanager(self, *args: Any, **kwargs: Any) -> None:
        super().init_poolmanager(*args, **kwargs)
        self.poolmanager.pool_classes_by_scheme = _pools(self._rules)


def _pools(rules: WebRules) -> dict[str, type[HTTPConnectionPool]]:
    """urllib3's pools, whose connections ask `_connect` for their socket and `_held` for their time."""

    class Plain(HTTPConnection):
        def _new_conn(self) -> socket.socket:
            return _connect(self, rules)

        def getresponse(self) -> Any:  # urllib3's answer, not http.client's
            with _held(self):
                return super().getresponse()

    class Secure(HTTPSConnection):
        def _new_conn(self) -> socket.socket:
            return _connect(self, rules)

        def getresponse(self) -> Any:  # urllib3's answer, not http.client's
            with _held(self):
                return super().getresponse()

    class PlainPool(HTTPConnectionPool):
        ConnectionCls = Plain

    class SecurePool(HTTPSConnectionPool):
        ConnectionCls = Secure

    return {"http": PlainPool, "https": SecurePool}


def _connect(connection: HTTPConnection, rules: WebRules) -> socket.socket:
    """A socket to one of the host's addresses, all of which the rules allow.

    TLS checks the certificate against the host's name afterwards, as ever. Raises: SourceInvalid.
    """
    host, port = connection._dns_host, connection.port or connection.default_port
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    except (OSError, UnicodeError) as error:
        raise urllib3.exceptions.NewConnectionError(connection, "no such host") from error
    scheme = "https" if isinstance(connection, HTTPSConnection) else "http"
    if f"{scheme}://{host}:{port}" not in rules.own:
        rules.check(host, [str(address[0]) for *_, address in found])
    timeout = connection.timeout if isinstance(connection.timeout, int | float) else CONNECT_TIMEOUT
    ends = time.monotonic() + timeout
    trouble: OSError | None = None
    for number, (family, kind, protocol, _, address) in enumerate(found):
        made = socket.socket(family, kind, protocol)
        try:
            share = (ends - time.monotonic()) / (len(found) - number)
            made.settimeout(max(0.001, share))
            for option in connection.socket_options or []:
                made.setsockopt(*option)
            made.connect(address)
            made.settimeout(timeout)
        except OSError as error:
            made.close()
            trouble = error
        else:
            return made
    if isinstance(trouble, TimeoutError):
        raise urllib3.exceptions.ConnectTimeoutError(connection, "connecting took too long")
    raise urllib3.exceptions.NewConnectionError(connection, "no connection") from trouble


@contextmanager
def _held(connection: HTTPConnection) -> Iterator[None]:
    """Around waiting for an answer's head: hangs up if it is not whole within the connection's timeout, which
    by itself counts anew from each byte. The socket stays at hand for the body as `held`; http.client lets
    go of one that the server will close.

    Raises: TimeoutError, whatever was made of half a head.
    """
    held, late = connection.sock, threading.Event()
    connection.held = held  # type: ignore[attr-defined]

    def hang_up() -> None:
        late.set()
        with suppress(OSError):  # closed by now
            socket.socket.shutdown(held, socket.SHUT_RDWR)  # TLS's own would drop its state

    timer = threading.Timer(connection.timeout or CONNECT_TIMEOUT, hang_up)
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()
        if late.is_set():
            raise TimeoutError("the answer's head took too long")
