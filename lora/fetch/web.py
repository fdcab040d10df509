"""GET over http(s), for URLs that strangers write: to public addresses alone, within limits of time.

A host's name is resolved once per connection, every address that it has is checked, and the connection goes
to one of those: a second look-up, which might answer something else, is never made. Redirects are followed
one by one, each checked alike. Tokens belong to an origin (scheme, host and port) and are sent to no other.
"""

from __future__ import annotations

import http.cookiejar
import logging
import socket
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from typing import Any, ClassVar
from urllib.parse import urljoin, urlsplit

import requests
import urllib3
from requests.adapters import HTTPAdapter
from urllib3.connection import HTTPConnection, HTTPSConnection
from urllib3.connectionpool import HTTPConnectionPool, HTTPSConnectionPool

from lora.errors import SourceInvalid
from lora.fetch.body import Body, hung_up_after
from lora.fetch.rules import PORTS, WebRules, origin_of

MAX_REDIRECTS = 10
CONNECT_TIMEOUT = 10.0

USER_AGENT = "worker-lora (an image server that fetches what its requests name)"
"""Some hosts refuse programs that do not say who they are; Civitai sends pages to what may be a browser."""

HEADERS = {"User-Agent": USER_AGENT, "Accept-Encoding": "identity"}


def quiet_libraries() -> None:
    """Silences other libraries' logs of requests, where whole URLs stand with tokens and signatures, and of
    the texts inside of pictures."""
    for library in ("botocore", "httpx2", "PIL"):
        logging.getLogger(library).setLevel(logging.WARNING)
    # urllib3's children by name, too: runpod, once it is imported, sets the level of urllib3 itself.
    for library in ("urllib3", "urllib3.connection", "urllib3.connectionpool"):
        logging.getLogger(library).setLevel(logging.ERROR)


class Web:
    """Sends GET requests where the rules allow it. One object serves all threads of a process."""

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
        self,
        url: str,
        headers: Mapping[str, str] | None = None,
        *,
        stall: float,
        deadline: float,
        token: str | None = None,
    ) -> Iterator[Body]:
        """Sends a GET and follows redirects; its body is read inside of the `with` block.

        `stall`: seconds that the server may be silent; `deadline`: by time.monotonic(); `token`: a bearer
        token for the URL's own origin, in place of the one that the rules have for that.
        Raises: SourceInvalid if the rules forbid the URL, or one that it redirects to, before a byte is sent
        there; requests.RequestException, whose text may hold the URL and must not be shown.
        """
        current, tokens = "", dict(self.rules.tokens)
        if token:
            tokens[self._prepared("", url)[1]] = ("Authorization", f"Bearer {token}")
        for _ in range(MAX_REDIRECTS + 1):
            current, origin = self._prepared(current, url)
            own = dict([tokens[origin]]) if origin in tokens else {}
            wait = max(0.001, min(stall, deadline - time.monotonic()))
            response = self._session.get(
                current,
                headers={**HEADERS, **(headers or {}), **own},
                stream=True,
                allow_redirects=False,
                timeout=(min(CONNECT_TIMEOUT, wait), wait),
            )
            with response:
                target = response.headers.get("Location") if response.is_redirect else None
                if target is None:
                    yield Body(response, stall, deadline)
                    return
                with suppress(UnicodeError):  # requests decodes headers as latin-1
                    target = target.encode("latin-1").decode("utf-8")
                url = target
        raise requests.TooManyRedirects("too many redirects")

    def check(self, url: str) -> None:
        """For a URL that another client asks. Raises: SourceInvalid if its host is forbidden or missing."""
        prepared, _ = self._prepared("", url)
        parts = urlsplit(prepared)
        host = parts.hostname or ""
        try:
            _look_up(self.rules, parts.scheme, host, parts.port or PORTS[parts.scheme])
        except (OSError, UnicodeError):
            raise SourceInvalid(f"there is no host {host}") from None

    def _prepared(self, base: str, url: str) -> tuple[str, str]:
        """The URL, relative to `base`, as requests will send it, and its origin.

        Both come from one parse, so a token never goes to another host than its own.
        """
        request = requests.PreparedRequest()
        try:
            request.prepare_url(urljoin(base, url), None)
            prepared = str(request.url)
            return prepared, origin_of(prepared)
        except (requests.RequestException, ValueError):
            raise SourceInvalid(
                "the address, or the one that it redirects to, is not an http(s) URL"
            ) from None


class _Session(requests.Session):
    """Leaves redirects to `Web.open`: requests would read their whole bodies, however long once unpacked."""

    def get_redirect_target(self, resp: requests.Response) -> str | None:
        return None


class _Adapter(HTTPAdapter):
    """Makes requests' connections by the rules."""

    def __init__(self, rules: WebRules) -> None:
        self._rules = rules
        super().__init__(max_retries=0)
        for scheme in PORTS:
            pool = self.poolmanager.connection_from_url(f"{scheme}://unchecked.invalid")
            if not issubclass(pool.ConnectionCls, _Connection):
                raise UncheckedConnection("urllib3 does not take our connections")

    def init_poolmanager(self, *args: Any, **kwargs: Any) -> None:
        super().init_poolmanager(*args, **kwargs)
        self.poolmanager.pool_classes_by_scheme = checked_pools(self._rules)


class UncheckedConnection(RuntimeError):
    """urllib3 goes around the check of addresses, as another version might; nothing was asked."""


class _Connection(HTTPConnection):
    """A connection to one of its host's addresses, after the rules allowed all of them.

    The check stands in `connect`, which is public. The socket is handed over in `_new_conn`, which is not:
    should urllib3 stop calling it and open a socket of its own, `connect` closes that and raises.
    """

    rules: ClassVar[WebRules]
    _checked: socket.socket | None = None

    def connect(self) -> None:
        self._checked = _connect(self, self.rules)
        try:
            super().connect()
        finally:
            if unused := self._take():
                unused.close()
                self.close()
                raise UncheckedConnection("urllib3 opened a connection of its own")

    def _new_conn(self) -> socket.socket:
        if checked := self._take():
            return checked
        raise UncheckedConnection("urllib3 asks for more than one connection")

    def _take(self) -> socket.socket | None:
        checked, self._checked = self._checked, None
        return checked

    def getresponse(self) -> Any:  # urllib3's answer, not http.client's
        with _head_timeout(self):
            return super().getresponse()


def checked_pools(rules: WebRules) -> dict[str, Any]:
    """urllib3's classes of pools, with connections that keep these rules; for any client of urllib3."""
    plain = type("Plain", (_Connection,), {"rules": rules})
    # TLS still checks the certificate against the host's name.
    secure = type("Secure", (plain, HTTPSConnection), {})
    return {
        "http": type("PlainPool", (HTTPConnectionPool,), {"ConnectionCls": plain}),
        "https": type("SecurePool", (HTTPSConnectionPool,), {"ConnectionCls": secure}),
    }


def _look_up(rules: WebRules, scheme: str, host: str, port: int) -> list[Any]:
    """All addresses of a host, as getaddrinfo has them. Raises: OSError; SourceInvalid by the rules."""
    answers = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    if f"{scheme}://{host}:{port}" not in rules.own:
        rules.check(host, [str(address[0]) for *_, address in answers])
    return answers


def _connect(connection: HTTPConnection, rules: WebRules) -> socket.socket:
    """A socket that is connected to one of the host's addresses, after the rules allowed all of them.

    The host is looked up once. Raises: SourceInvalid; urllib3's errors of connecting.
    """
    scheme = "https" if isinstance(connection, HTTPSConnection) else "http"
    port = connection.port or connection.default_port
    try:
        answers = _look_up(rules, scheme, connection._dns_host, port)
    except (OSError, UnicodeError) as error:
        raise urllib3.exceptions.NewConnectionError(connection, "no such host") from error
    timeout = connection.timeout if isinstance(connection.timeout, int | float) else CONNECT_TIMEOUT
    ends = time.monotonic() + timeout
    last_error: OSError | None = None
    for tried, (family, kind, protocol, _, address) in enumerate(answers):
        made = socket.socket(family, kind, protocol)
        try:
            share = (ends - time.monotonic()) / (len(answers) - tried)
            made.settimeout(max(0.001, share))
            for option in connection.socket_options or []:
                made.setsockopt(*option)
            made.connect(address)
            made.settimeout(timeout)
            return made
        except OSError as error:
            made.close()
            last_error = error
    if isinstance(last_error, TimeoutError):
        raise urllib3.exceptions.ConnectTimeoutError(connection, "connecting took too long")
    raise urllib3.exceptions.NewConnectionError(connection, "no connection") from last_error


@contextmanager
def _head_timeout(connection: HTTPConnection) -> Iterator[None]:
    """Shuts the connection down if the answer's head, which is read in the block, is not complete within the
    connection's timeout.

    `body_socket` keeps the socket for the body, because http.client drops one that the server will close.
    Raises: TimeoutError, also where half a head was taken for a whole one.
    """
    body_socket = connection.sock
    connection.body_socket = body_socket  # type: ignore[attr-defined]
    with hung_up_after(connection.timeout or CONNECT_TIMEOUT, lambda: body_socket) as late:
        try:
            yield
        finally:
            if late.is_set():
                raise TimeoutError("the answer's head took too long")
