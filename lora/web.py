"""GET over http(s), for URLs that strangers write: to public addresses alone, within limits of time.

A host's name is resolved once per connection, every address that it has is checked, and the connection goes
to one of those: what a second look-up would answer does not matter. Redirects are followed one by one, each
checked alike. Tokens belong to an origin (scheme, host and port) and are sent to no other.
"""

from __future__ import annotations

import http.cookiejar
import ipaddress
import logging
import socket
import time
import zlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import Any
from urllib.parse import urljoin, urlsplit

import requests
import urllib3
from requests.adapters import HTTPAdapter
from urllib3.connection import HTTPConnection, HTTPSConnection
from urllib3.connectionpool import HTTPConnectionPool, HTTPSConnectionPool

from lora.errors import SourceInvalid

CHUNK = 1 << 20
MAX_REDIRECTS = 10
CONNECT_TIMEOUT = 10.0

PORTS = {"http": 80, "https": 443}

PLATFORM = frozenset({"168.63.129.16"})
"""Addresses that look public and answer a cloud's own machines: Azure's."""

NAT64 = ipaddress.ip_network("64:ff9b::/96")


def quiet_libraries() -> None:
    """Silences what other libraries log of a request: it may hold whole URLs, and so tokens."""
    logging.getLogger("httpx2").setLevel(logging.WARNING)
    logging.getLogger("urllib3").setLevel(logging.ERROR)


def is_public(address: str) -> bool:
    """Whether an IP address is one of the open internet; an address within an address counts as that."""
    ip = ipaddress.ip_address(address.partition("%")[0])
    if isinstance(ip, ipaddress.IPv6Address):
        inner = ip.ipv4_mapped or ip.sixtofour or (ip.teredo and ip.teredo[1])
        if ip in NAT64:
            inner = ipaddress.IPv4Address(int(ip) & 0xFFFFFFFF)
        if inner:
            return is_public(str(inner))
        if ip.is_site_local:
            return False
    return ip.is_global and not (ip.is_multicast or ip.is_reserved) and str(ip) not in PLATFORM


@dataclass(frozen=True)
class WebRules:
    """Where requests may lead, and with which tokens."""

    allow_private: bool = False
    """Whether addresses within the own network may be asked."""
    allowed_hosts: tuple[str, ...] = ()
    """If any: only these hosts, redirects too. `*.example.com` means every host below example.com."""
    own: frozenset[str] = frozenset()
    """Origins that the operator named as servers to use: neither rule holds for them."""
    tokens: Mapping[str, tuple[str, str]] = field(default_factory=dict, repr=False)
    """Origin -> (header's name, its value)."""

    def check(self, host: str, addresses: Sequence[str]) -> None:
        """Raises: SourceInvalid if the host may not be asked, given all the addresses that it has."""
        allowed = self.allowed_hosts
        if allowed and not any(fnmatchcase(host, pattern.lower()) for pattern in allowed):
            raise SourceInvalid(
                f"the host {host} is not among LORA_ALLOWED_HOSTS",
                "The worker's operator decides which hosts it may ask.",
            )
        if not self.allow_private and not all(map(is_public, addresses)):
            raise SourceInvalid(
                f"the host {host} is not on the open internet",
                "If it must be asked, the worker's operator sets LORA_ALLOW_PRIVATE_URLS=1.",
            )


def origin_of(url: str) -> str:
    """`scheme://host:port`, the port always there. A bare host name means https.

    Raises: ValueError if there is no host.
    """
    parts = urlsplit(url if "://" in url else f"https://{url}")
    if parts.scheme not in PORTS or not parts.hostname:
        raise ValueError(f"{parts.hostname or 'the URL'} is no http(s) host")
    return f"{parts.scheme}://{parts.hostname}:{parts.port or PORTS[parts.scheme]}"


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
        return int(text) if text.isascii() and text.isdigit() else None

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
        if unpack is not None and not unpack.complete:
            raise requests.ConnectionError("the compressed body ended early")

    def _sent(self) -> Iterator[bytes]:
        raw = self._response.raw
        try:
            while True:
                left = self._deadline - time.monotonic()
                if left <= 0:
                    raise requests.Timeout("the deadline passed")
                connection = getattr(raw, "connection", None)
                if connection is not None and connection.sock is not None:
                    connection.sock.settimeout(min(self._stall, left))
                piece = raw.read1(CHUNK, decode_content=False)
                if not piece:
                    return
                yield piece
        except (urllib3.exceptions.HTTPError, OSError) as error:
            if isinstance(error, requests.RequestException):
                raise
            raise requests.ConnectionError("the connection broke") from error


class _Unpacker:
    """Bytes of gzip or zlib, in pieces that stay small however much is packed into them."""

    def __init__(self) -> None:
        self._zlib = zlib.decompressobj(zlib.MAX_WBITS | 32)  # 32: either header

    @property
    def complete(self) -> bool:
        return self._zlib.eof

    def pieces(self, data: bytes) -> Iterator[bytes]:
        try:
            while data:
                piece = self._zlib.decompress(data, CHUNK)
                data = self._zlib.unconsumed_tail
                if piece:
                    yield piece
                if self._zlib.eof:
                    return
        except zlib.error as error:
            raise requests.exceptions.ContentDecodingError("the body is not unpackable") from error


def _unpacker(encoding: str) -> _Unpacker | None:
    if encoding in ("gzip", "x-gzip", "deflate"):
        return _Unpacker()
    if encoding:
        raise requests.exceptions.ContentDecodingError("the body is packed in an unknown way")
    return None


class Web:
    """Asks URLs by the rules. One object serves all threads of a process."""

    def __init__(self, rules: WebRules = WebRules()) -> None:
        self.rules = rules
        self._session = requests.Session()
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
        for _ in range(MAX_REDIRECTS + 1):
            url, own = self._prepared(url)
            wait = max(0.001, min(stall, deadline - time.monotonic()))
            response = self._session.get(
                url,
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
                url = urljoin(url, target)
        raise requests.TooManyRedirects("too many redirects")

    def _prepared(self, url: str) -> tuple[str, dict[str, str]]:
        """The URL in the form that will be sent, so that who is asked and whose token it is never differ; and
        its origin's token.
        """
        request = requests.PreparedRequest()
        try:
            request.prepare_url(url, None)
            prepared = str(request.url)
            origin = origin_of(prepared)
        except (requests.RequestException, ValueError):
            raise SourceInvalid("what is named, or redirected to, is no http(s) URL") from None
        token = self.rules.tokens.get(origin)
        return prepared, dict([token]) if token else {}


class _Adapter(HTTPAdapter):
    """Makes requests' connections by the rules."""

    def __init__(self, rules: WebRules) -> None:
        self._rules = rules
        super().__init__(max_retries=0)

    def init_poolmanager(self, *args: Any, **kwargs: Any) -> None:
        super().init_poolmanager(*args, **kwargs)
        self.poolmanager.pool_classes_by_scheme = _pools(self._rules)


def _pools(rules: WebRules) -> dict[str, type[HTTPConnectionPool]]:
    """urllib3's pools, whose connections ask `_connect` for their socket."""

    class Plain(HTTPConnection):
        def _new_conn(self) -> socket.socket:
            return _connect(self, rules)

    class Secure(HTTPSConnection):
        def _new_conn(self) -> socket.socket:
            return _connect(self, rules)

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
    trouble: OSError | None = None
    for family, kind, protocol, _, address in found:
        made = socket.socket(family, kind, protocol)
        try:
            if isinstance(connection.timeout, (int, float)):
                made.settimeout(connection.timeout)
            for option in connection.socket_options or []:
                made.setsockopt(*option)
            made.connect(address)
        except OSError as error:
            made.close()
            trouble = error
        else:
            return made
    if isinstance(trouble, TimeoutError):
        raise urllib3.exceptions.ConnectTimeoutError(connection, "connecting took too long")
    raise urllib3.exceptions.NewConnectionError(connection, "no connection") from trouble
