"""Where requests may lead, what they carry along, and how long they may take."""

from __future__ import annotations

import socket
import ssl
import threading
import time
import tracemalloc
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
import requests
from urllib3.connection import HTTPConnection, HTTPSConnection
from urllib3.connectionpool import HTTPConnectionPool, HTTPSConnectionPool

from lora.errors import SourceInvalid
from lora.fetch import body as body_module
from lora.fetch import web as web_module
from lora.fetch.body import Body
from lora.fetch.rules import WebRules, origin_of
from lora.fetch.sources import Reference
from lora.fetch.web import MAX_REDIRECTS, USER_AGENT, UncheckedConnection, Web
from lora.volume.cache import Limits, VolumeCache
from tests.adapters import as_bytes, kohya
from tests.server import LOOPBACK, STALL, LoopbackServer, Reply, gzip_of
from tests.waiting import PATIENCE, Clock
from validation import InvalidInput
from worker.pictures.inputs import load_picture

ADAPTER = as_bytes(kohya())
GZIP = {"Content-Encoding": "gzip"}
LIMITS = Limits(tries=2, pause=0.01)

PUBLIC, PUBLIC6 = "93.184.216.34", "2606:2800:220:1::1"


class Names:
    """A resolver: the answers that each name gets, one after the other, the last one for ever.

    Numbers need no answer: the C library reads them, in every spelling that it knows.
    """

    def __init__(self, resolve: Any) -> None:
        self._resolve = resolve
        self.known: dict[str, list[list[str]]] = {}
        self.asked: Counter[str] = Counter()

    def __call__(self, host: str, port: int, **_: Any) -> list[Any]:
        self.asked[host] += 1
        answers = self.known.get(host, [[host]])
        found = answers.pop(0) if len(answers) > 1 else answers[0]
        about = {"type": socket.SOCK_STREAM, "flags": socket.AI_NUMERICHOST}
        return [entry for one in found for entry in self._resolve(one, port, **about)]


@pytest.fixture
def names(monkeypatch: pytest.MonkeyPatch) -> Names:
    made = Names(socket.getaddrinfo)
    monkeypatch.setattr(socket, "getaddrinfo", made)
    return made


@pytest.fixture
def connects(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, int]]:
    """Every address that a socket is connected to."""
    made: list[tuple[str, int]] = []
    connect = socket.socket.connect

    def noted(self: socket.socket, address: Any) -> None:
        made.append(address[:2])
        connect(self, address)

    monkeypatch.setattr(socket.socket, "connect", noted)
    return made


@pytest.fixture
def other() -> Iterator[LoopbackServer]:
    with LoopbackServer() as running:
        yield running


@contextmanager
def opened(
    web: Web, url: str, *, stall: float = PATIENCE, timeout: float = PATIENCE
) -> Iterator[Body]:
    with web.open(url, stall=stall, deadline=time.monotonic() + timeout) as body:
        yield body


def ask(web: Web, url: str, **times: float) -> bytes:
    with opened(web, url, **times) as body:
        assert body.status == 200
        return body.read(1 << 24)


def fetch(web: Web, url: str, folder: Path) -> bytes:
    cache = VolumeCache(folder, LIMITS, web)
    return cache.get(cache.resolve(Reference(url))).path.read_bytes()


# --- hostile URLs --------------------------------------------------------------------------------

PRIVATE_NAMES = {
    "localhost": ["127.0.0.1"],
    "localhost.": ["127.0.0.1"],
    "127.0.0.1.": ["127.0.0.1"],
    "metadata.google.internal": ["169.254.169.254"],
    "inside.example": ["10.0.0.1"],
    "mapped.example": ["::ffff:127.0.0.1"],
    "mixed.example": [PUBLIC, "127.0.0.1"],
    "mixed6.example": [PUBLIC, "::1"],
    "all.example": ["0.0.0.0"],
}

NUMBERS = (
    "http://127.0.0.1:{port}/x",
    "https://127.0.0.1:{port}/x",
    "HTTP://127.0.0.1:{port}/x",
    "http://127.0.0.1:{port}",
    "http://127.1:{port}/x",
    "http://127.0.1:{port}/x",
    "http://2130706433:{port}/x",
    "http://0x7f000001:{port}/x",
    "http://0X7F.0.0.1:{port}/x",
    "http://0177.0.0.1:{port}/x",
    "http://017700000001:{port}/x",
    "http://0:{port}/x",
    "http://0.0.0.0:{port}/x",
    "http://127.0.0.1%2e:{port}/x",
    "http://%31%32%37.0.0.1:{port}/x",
    "http://①②⑦.⓪.⓪.①:{port}/x",
    "http://127。0。0。1:{port}/x",
    "http://１２７.0.0.1:{port}/x",  # noqa: RUF001 - full-width digits
    "http://[::1]:{port}/x",
    "http://[::]:{port}/x",
    "http://[::127.0.0.1]:{port}/x",
    "http://[::ffff:127.0.0.1]:{port}/x",
    "http://[::ffff:7f00:1]:{port}/x",
    "http://[0:0:0:0:0:ffff:7f00:1]:{port}/x",
    "http://[64:ff9b::7f00:1]:{port}/x",
    "http://[2002:7f00:1::]:{port}/x",
    "http://[fe80::1]:{port}/x",
    "http://[fd00:ec2::254]/latest/meta-data/",
    "http://[ff02::1]/x",
    "http://169.254.169.254/latest/meta-data/",
    "http://2852039166/latest/meta-data/",
    "http://0xa9fea9fe/latest/meta-data/",
    "http://100.100.100.200/latest/meta-data/",
    "http://192.0.0.192/opc/v2/instance/",
    "http://168.63.129.16/machine?comp=goalstate",
    "http://10.0.0.1/x",
    "http://192.168.0.1/x",
    "http://224.0.0.1/x",
    "http://255.255.255.255/x",
)

TRICKS = (
    "http://public.example@127.0.0.1:{port}/x",
    "http://public.example:80@127.0.0.1:{port}/x",
    "http://public.example%40127.0.0.1:{port}@127.0.0.1:{port}/x",
    "http://127.0.0.1:{port}\\@public.example/x",
    "http://127.0.0.1:{port}#@public.example/x",
    "http://127.0.0.1:{port}?@public.example/x",
    "http://127.0.0.1:{port}:80/x",
    "http://127.0.0.1:99999/x",
    "http://[127.0.0.1]:{port}/x",
    "http://[::1/x",
    "http://public.example℀127.0.0.1:{port}/x",
    "file:///etc/passwd",
    "file://127.0.0.1/etc/passwd",
    "ftp://127.0.0.1:{port}/x",
    "gopher://127.0.0.1:{port}/_GET",
    "httpx://127.0.0.1:{port}/x",
    "javascript://127.0.0.1:{port}/%0aalert(1)",
)

HOSTILE = (*NUMBERS, *(f"http://{name}:{{port}}/x" for name in PRIVATE_NAMES), *TRICKS)

NO_HOST = ("http:/\\127.0.0.1:{port}/x", "http:///127.0.0.1:{port}/x", "http:127.0.0.1:{port}")
"""These name none; as a redirect they are paths of the server that redirects."""


def test_the_table_of_hostile_urls_is_long() -> None:
    assert len(HOSTILE) >= 60


@pytest.fixture
def hostile_names(names: Names) -> Names:
    names.known |= {name: [found] for name, found in PRIVATE_NAMES.items()}
    names.known["public.example"] = [[PUBLIC]]
    return names


def refused(web: Web, url: str, folder: Path) -> None:
    """The URL is refused with its code, by whichever way it comes in."""
    with pytest.raises(SourceInvalid), opened(web, url):
        pass
    with pytest.raises(SourceInvalid):
        fetch(web, url, folder)
    with pytest.raises(InvalidInput):
        load_picture(url, web)


@pytest.mark.usefixtures("hostile_names")
@pytest.mark.parametrize("url", [*HOSTILE, *NO_HOST])
def test_a_hostile_url_is_refused_before_a_byte_is_sent(
    url: str, connects: list[tuple[str, int]], server: LoopbackServer, tmp_path: Path
) -> None:
    refused(Web(), url.format(port=server.port), tmp_path)
    assert connects == []
    assert server.connections == 0


@pytest.mark.usefixtures("hostile_names")
@pytest.mark.parametrize("url", [*HOSTILE, "//127.0.0.1:{port}/x", "//localhost:{port}"])
def test_a_redirect_to_a_hostile_url_is_refused_before_a_byte_is_sent(
    url: str,
    connects: list[tuple[str, int]],
    server: LoopbackServer,
    other: LoopbackServer,
    tmp_path: Path,
) -> None:
    """The server that redirects is the operator's own; where it redirects to is not."""
    door = other.serve("/door", to=url.format(port=server.port))
    refused(Web(WebRules(own=frozenset({other.address}))), door, tmp_path)
    assert set(connects) == {("127.0.0.1", other.port)}
    assert server.connections == 0
    assert set(other.hits) == {"/door"}


@pytest.mark.parametrize("status", [301, 302, 303, 307, 308])
def test_every_kind_of_redirect_is_checked(
    status: int, server: LoopbackServer, other: LoopbackServer
) -> None:
    web = Web(WebRules(own=frozenset({other.address})))
    door = other.serve("/door", status=status, to=server.serve("/x", b"secret"))
    with pytest.raises(SourceInvalid), opened(web, other.serve("/outer", to=door)):
        pass
    assert (other.hits["/door"], server.connections) == (1, 0)


@pytest.mark.parametrize(
    "url",
    [
        "http://public.example\\@127.0.0.1:{port}/x",
        "http://public.example\\.127.0.0.1:{port}/x",
        "http://127.0.0.1:{port};@public.example/x",
        "http://public.example/\\127.0.0.1:{port}/x",
        "http://public.example#@127.0.0.1:{port}/x",
        "http://public.example?@127.0.0.1:{port}/x",
    ],
)
def test_what_parsers_read_differently_goes_to_the_host_that_was_checked(
    url: str, hostile_names: Names, connects: list[tuple[str, int]], server: LoopbackServer
) -> None:
    with pytest.raises(requests.ConnectionError), opened(Web(), url.format(port=server.port)):
        pass  # the tests' guard keeps it from the public host
    assert hostile_names.asked == {"public.example": 1}
    assert connects == [(PUBLIC, 80)]


def test_a_name_that_changes_its_address_is_never_followed_to_a_private_one(
    names: Names, connects: list[tuple[str, int]], server: LoopbackServer, tmp_path: Path
) -> None:
    """DNS rebinding: the checked address is the one that is asked; the next try is checked anew."""
    url = f"http://turning.example:{server.port}/x"
    names.known["turning.example"] = [[PUBLIC], ["127.0.0.1"]]
    with pytest.raises(requests.ConnectionError), opened(Web(), url):
        pass
    assert (names.asked["turning.example"], connects) == (1, [(PUBLIC, server.port)])
    names.known["turning.example"] = [[PUBLIC], ["127.0.0.1"]]
    with pytest.raises(SourceInvalid):
        fetch(Web(), url, tmp_path)
    assert connects == [(PUBLIC, server.port)] * 2
    assert server.connections == 0


def test_a_host_is_looked_up_once_per_connection(names: Names, server: LoopbackServer) -> None:
    names.known["a.example"] = [["127.0.0.1"]]
    server.serve("/end", b"here")
    url = f"http://a.example:{server.port}"
    server.serve("/start", to=f"{url}/end")
    assert ask(LOOPBACK, f"{url}/start") == b"here"
    assert names.asked == {"a.example": 2}
    assert server.headers["/end"]["Host"] == f"a.example:{server.port}"


def test_each_address_of_a_host_is_tried(
    names: Names, connects: list[tuple[str, int]], server: LoopbackServer
) -> None:
    names.known["a.example"] = [[PUBLIC, "127.0.0.1"]]  # the tests' guard refuses the first
    server.serve("/x", b"here")
    assert ask(LOOPBACK, f"http://a.example:{server.port}/x") == b"here"
    assert connects == [(PUBLIC, server.port), ("127.0.0.1", server.port)]


def test_the_operators_own_server_may_be_within_the_network(server: LoopbackServer) -> None:
    url = server.serve("/x", b"here")
    assert ask(Web(WebRules(own=frozenset({server.address}))), url) == b"here"
    assert ask(Web(WebRules(allow_private=True)), url) == b"here"
    elsewhere = origin_of(f"127.0.0.1:{server.port}")  # the same, but https
    with pytest.raises(SourceInvalid):
        ask(Web(WebRules(own=frozenset({elsewhere}))), url)


@pytest.mark.parametrize("scheme", ["http", "https"])
def test_nothing_is_asked_if_urllib3_makes_its_connections_otherwise(
    scheme: str, server: LoopbackServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As if another version had renamed the private method that hands over the checked socket."""
    connects = 0

    def renamed(self: HTTPConnection) -> None:
        nonlocal connects
        connects += 1
        self.sock = socket.create_connection((self.host, self.port))

    monkeypatch.setattr(HTTPConnection, "connect", renamed)
    monkeypatch.setattr(HTTPSConnection, "connect", renamed)
    server.serve("/x", b"secret")
    url = f"{scheme}://127.0.0.1:{server.port}/x"
    with pytest.raises(UncheckedConnection):
        ask(LOOPBACK, url)
    assert (connects, server.hits.total()) == (1, 0)
    with pytest.raises(SourceInvalid):
        ask(Web(), url)
    assert connects == 1  # the check stands before urllib3's own connecting


def test_no_web_is_made_if_urllib3_does_not_take_our_connections(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    pools = {"http": HTTPConnectionPool, "https": HTTPSConnectionPool}
    monkeypatch.setattr("lora.fetch.web.checked_pools", lambda rules: pools)
    with pytest.raises(UncheckedConnection):
        Web()


# --- allowed hosts -------------------------------------------------------------------------------

ALLOWED = WebRules(allow_private=True, allowed_hosts=("One.Example", "*.two.example"))


@pytest.mark.parametrize(
    ("host", "allowed"),
    [
        ("one.example", True),
        ("ONE.example", True),
        ("a.two.example", True),
        ("b.a.two.example", True),
        ("two.example", False),
        ("a.one.example", False),
        ("evil-one.example", False),
        ("one.example.evil.example", False),
        ("one.example.", False),
        ("one.example@evil.example", False),
        ("127.0.0.1", False),
    ],
)
def test_only_allowed_hosts_are_asked(
    host: str, allowed: bool, names: Names, server: LoopbackServer, other: LoopbackServer
) -> None:
    bare = host.rpartition("@")[2].lower()
    names.known |= {bare: [["127.0.0.1"]], "one.example": [["127.0.0.1"]]}
    server.serve("/x", b"here")
    direct = f"http://{host}:{server.port}/x"
    other.serve("/door", to=direct)
    for url in (direct, f"http://one.example:{other.port}/door"):
        if allowed:
            assert ask(Web(ALLOWED), url) == b"here"
        else:
            with pytest.raises(SourceInvalid) as caught:
                ask(Web(ALLOWED), url)
            assert f"{bare} is not among LORA_ALLOWED_HOSTS" in str(caught.value)
    assert other.connections == 1
    assert server.connections == 2 * allowed


def test_an_allowed_host_must_still_be_public(names: Names, connects: list[Any]) -> None:
    names.known["one.example"] = [["10.0.0.1"]]
    rules = WebRules(allowed_hosts=("one.example",))
    with pytest.raises(SourceInvalid) as caught:
        ask(Web(rules), "http://one.example/x")
    assert "is not on the open internet" in str(caught.value)
    assert connects == []


# --- what requests carry -------------------------------------------------------------------------


def test_a_token_goes_to_its_own_origin_alone(names: Names, server: LoopbackServer) -> None:
    server.serve("/x", b"here")
    for name in ("a.example", "sub.a.example", "b.example"):
        names.known[name] = [["127.0.0.1"]]
    rules = WebRules(
        allow_private=True,
        tokens={
            f"http://a.example:{server.port}": ("Authorization", "Bearer a"),
            f"https://b.example:{server.port}": ("Authorization", "Bearer b"),
            f"http://127.0.0.1:{server.port + 1}": ("Authorization", "Bearer port"),
        },
    )
    sent = {
        f"http://a.example:{server.port}/x": "Bearer a",
        f"http://A.Example:{server.port}/x": "Bearer a",
        f"http://sub.a.example:{server.port}/x": None,
        f"http://b.example:{server.port}/x": None,  # its token is for https
        f"http://127.0.0.1:{server.port}/x": None,
        f"http://a.example:pw@127.0.0.1:{server.port}/x": "Basic YS5leGFtcGxlOnB3",
    }
    for url, token in sent.items():
        assert ask(Web(rules), url) == b"here"
        assert server.headers["/x"].get("Authorization") == token


def test_a_token_is_dropped_on_a_redirect_and_the_next_host_gets_its_own(
    server: LoopbackServer, other: LoopbackServer
) -> None:
    tokens = {server.address: ("Authorization", "Bearer a"), other.address: ("X-Key", "b")}
    server.serve("/end", b"here")
    other.serve("/middle", to=server.url("/end"))
    start = server.serve("/start", to=other.url("/middle"))
    assert ask(Web(WebRules(allow_private=True, tokens=tokens)), start) == b"here"
    for path in ("/start", "/end"):
        assert server.headers[path]["Authorization"] == "Bearer a"
        assert "X-Key" not in server.headers[path]
    assert other.headers["/middle"]["X-Key"] == "b"
    assert "Authorization" not in other.headers["/middle"]


def test_a_urls_user_and_password_go_to_its_own_host_alone(
    server: LoopbackServer, other: LoopbackServer
) -> None:
    other.serve("/end", b"here")
    server.serve("/start", to=other.url("/end"))
    url = f"http://me:canary@127.0.0.1:{server.port}/start"
    assert ask(LOOPBACK, url) == b"here"
    assert server.headers["/start"]["Authorization"].startswith("Basic ")
    told = other.headers["/end"]
    assert not {"Authorization", "Referer", "Cookie"} & set(told)


def test_no_cookie_is_kept(server: LoopbackServer) -> None:
    cookie = {"Set-Cookie": "session=canary; Path=/"}
    server.serve("/end", b"here", headers=cookie)
    start = server.serve("/start", to="/end", headers=cookie)
    web = Web(WebRules(allow_private=True))
    for _ in range(2):
        assert ask(web, start) == b"here"
        assert "Cookie" not in server.headers["/start"]
        assert "Cookie" not in server.headers["/end"]


def test_no_password_file_is_read(
    server: LoopbackServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "netrc").write_text("machine 127.0.0.1 login me password canary\n")
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    url = server.serve("/x", b"here")
    assert requests.utils.get_netrc_auth(url) == ("me", "canary")  # type: ignore[no-untyped-call]
    assert ask(Web(WebRules(allow_private=True)), url) == b"here"
    assert "Authorization" not in server.headers["/x"]


def test_no_proxy_of_the_environment_is_used(
    server: LoopbackServer, other: LoopbackServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY"):
        monkeypatch.setenv(name, other.address)
        monkeypatch.setenv(name.lower(), other.address)
    for name in ("NO_PROXY", "no_proxy"):
        monkeypatch.setenv(name, "")
    assert ask(Web(WebRules(allow_private=True)), server.serve("/x", b"here")) == b"here"
    assert other.connections == 0


def certificate(folder: Path, name: str) -> Path:
    """A self-signed certificate for a host, with its key in the same file."""
    from cryptography import x509
    from cryptography.hazmat.primitives import hashes, serialization
    from cryptography.hazmat.primitives.asymmetric import ec

    key = ec.generate_private_key(ec.SECP256R1())
    subject = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, name)])
    now = datetime.now(UTC)
    made = (
        x509.CertificateBuilder(subject, subject, key.public_key(), x509.random_serial_number())
        .not_valid_before(now - timedelta(days=1))
        .not_valid_after(now + timedelta(days=1))
        .add_extension(x509.SubjectAlternativeName([x509.DNSName(name)]), critical=False)
        .sign(key, hashes.SHA256())
    )
    pem, form = serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8
    path = folder / "certificate.pem"
    plain = key.private_bytes(pem, form, serialization.NoEncryption())
    path.write_bytes(plain + made.public_bytes(pem))
    return path


def test_a_certificate_must_be_the_hosts_before_anything_is_sent(
    names: Names, tmp_path: Path
) -> None:
    """The connection goes to a checked address; TLS still asks for the name."""
    path = certificate(tmp_path, "right.example")
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(path)
    names.known |= {"right.example": [["127.0.0.1"]], "wrong.example": [["127.0.0.1"]]}
    web = Web(WebRules(allow_private=True))
    web._session.verify = str(path)
    with LoopbackServer(tls=context) as secure:
        secure.serve("/x", b"here")
        assert ask(web, f"https://right.example:{secure.port}/x") == b"here"
        with pytest.raises(requests.exceptions.SSLError):
            ask(web, f"https://wrong.example:{secure.port}/x")
        assert secure.hits["/x"] == 1


# --- redirects -----------------------------------------------------------------------------------


def test_redirects_are_followed_up_to_a_number(server: LoopbackServer) -> None:
    for step in range(MAX_REDIRECTS + 1):
        server.serve(f"/{step}", to=f"{step + 1}")
    server.serve(f"/{MAX_REDIRECTS + 1}", b"here")
    assert ask(LOOPBACK, server.url("/1")) == b"here"
    with pytest.raises(requests.TooManyRedirects):
        ask(LOOPBACK, server.url("/0"))


def test_a_circle_of_redirects_ends(server: LoopbackServer) -> None:
    url = server.serve("/a", to="/b")
    server.serve("/b", to="/a")
    with pytest.raises(requests.TooManyRedirects):
        ask(LOOPBACK, url)
    assert server.hits.total() == MAX_REDIRECTS + 1


@pytest.mark.parametrize("target", ["http://[::1", "http://[x]/", "http://a:b:c/", "//[x"])
def test_a_redirect_to_nonsense_is_refused(target: str, server: LoopbackServer) -> None:
    with pytest.raises(SourceInvalid):
        ask(LOOPBACK, server.serve("/door", to=target))


def test_a_redirects_path_in_any_script_is_followed(server: LoopbackServer) -> None:
    server.serve("/%E7%94%BB", b"here")
    assert ask(LOOPBACK, server.serve("/door", to="/画")) == b"here"


def test_a_redirects_own_body_is_not_read(server: LoopbackServer) -> None:
    """However much there is of it, packed or not, and however slowly it comes."""
    end = server.serve("/end", b"here")
    packed = gzip_of(bytes(1 << 20), 64)
    doors = {
        "/long": Reply(bytes(32 << 20), to=end),
        "/packed": Reply(packed, to=end, headers={"Content-Encoding": "gzip"}),
        "/slow": Reply(b"0" * 1000, to=end, drip=0.1),
        "/silent": Reply(b"0" * 1000, to=end, stall_after=10),
        "/cut": Reply(b"0" * 1000, to=end, cut_after=10),
    }
    server.replies |= doors
    for path, door in doors.items():
        tracemalloc.start()
        try:
            assert ask(LOOPBACK, server.url(path)) == b"here"
            # Who reads it would be here when all of it was sent. What is packed fits into one packet.
            assert path == "/packed" or server.sent[path] < len(door.body)
            assert tracemalloc.get_traced_memory()[1] < 8 << 20
        finally:
            tracemalloc.stop()


# --- time ----------------------------------------------------------------------------------------


@pytest.fixture(params=[False, True], ids=["closing", "keep-alive"])
def either(request: pytest.FixtureRequest) -> Iterator[LoopbackServer]:
    with LoopbackServer(keep_alive=request.param) as running:
        yield running


CHUNKED = {"Transfer-Encoding": "chunked"}
TRAILERS = b"1\r\nx\r\n0\r\n" + b"X: y\r\n" * 1000
SLOW_HEAD = b"HTTP/1.1 200 OK\r\nX-Slow: " + b"x" * 10_000


@pytest.mark.parametrize(
    ("reply", "times", "least"),
    [
        (Reply(b"0" * 1000, stall_after=10), {"stall": 0.3}, 0.3),
        (Reply(b"0" * 1000, stall_after=10), {"timeout": 0.3}, 0.3),
        (Reply(b"0" * 1000, drip=0.05), {"timeout": 0.3}, 0.3),
        (Reply(b"0" * 500_000, drip=0.2, stall_after=1), {"timeout": 0.5}, 0.5),
        (Reply(b"0" * 1000, drip=0.02, headers=CHUNKED, length=-1), {"timeout": 0.3}, 0.3),
        (Reply(b"1;" + b"x" * 1000, drip=0.02, headers=CHUNKED, length=-1), {"timeout": 0.3}, 0.3),
        (Reply(TRAILERS, drip=0.02, headers=CHUNKED, length=-1), {"timeout": 0.3}, 0.3),
        (Reply(b"0" * 1000, drip=0.05, length=-1), {"timeout": 0.3}, 0.3),
        (Reply(raw=SLOW_HEAD, drip=0.02), {"timeout": 0.3}, 0.3),
        (Reply(raw=SLOW_HEAD, drip=0.02), {"stall": 0.3}, 0.3),
        (Reply(raw=b"x", drip=STALL), {"stall": 0.3}, 0.3),
    ],
    ids=[
        *("stall", "stall-deadline", "drip", "drip-stall"),
        *("chunk's length", "chunk's extension", "trailers", "no length"),
        *("head", "head-stall", "silent head"),
    ],
)
def test_no_answer_takes_longer_than_its_times(
    either: LoopbackServer, reply: Reply, times: dict[str, float], least: float
) -> None:
    either.replies["/x"] = reply
    begun = time.monotonic()
    with pytest.raises(requests.Timeout):
        ask(LOOPBACK, either.url("/x"), **times)
    assert least * 0.9 < time.monotonic() - begun < PATIENCE / 2


def test_a_body_that_stalls_late_ends_with_the_deadline(
    either: LoopbackServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not a whole stall later."""
    either.replies["/x"] = Reply(b"0" * 1000, stall_after=10)
    clock = Clock()
    for module in (web_module, body_module):
        monkeypatch.setattr(module, "time", clock)
    waits: list[float] = []
    settimeout = socket.socket.settimeout

    def noted(self: socket.socket, seconds: float | None) -> None:
        waits.append(seconds or 0.0)
        settimeout(self, seconds)

    monkeypatch.setattr(socket.socket, "settimeout", noted)
    ends = clock.now + PATIENCE
    with LOOPBACK.open(either.url("/x"), stall=PATIENCE, deadline=ends) as body:
        clock.now = ends - 0.1
        with pytest.raises(requests.Timeout):
            body.read(1000)
    assert waits[-1] == pytest.approx(0.1)


def test_a_host_of_many_dead_addresses_takes_no_longer(
    names: Names, monkeypatch: pytest.MonkeyPatch
) -> None:
    names.known["dead.example"] = [[f"93.184.216.{number}" for number in range(100)]]
    waits: list[float] = []

    def silent(self: socket.socket, address: object) -> None:
        waits.append(self.gettimeout() or STALL)
        time.sleep(min(waits[-1], 0.01))
        raise TimeoutError

    monkeypatch.setattr(socket.socket, "connect", silent)
    with pytest.raises(requests.ConnectTimeout):
        ask(Web(), "http://dead.example/x", timeout=0.5)
    assert len(waits) == 100
    assert sum(waits) < 1.0


# --- threads ------------------------------------------------------------------------------------


def test_threads_share_one_web(either: LoopbackServer) -> None:
    bodies = {f"/{n}": bytes([n]) * 100_000 for n in range(8)}
    for path, body in bodies.items():
        either.serve(path, body)
    web, found = Web(WebRules(allow_private=True)), dict[str, bytes]()

    def work(path: str) -> None:
        found[path] = ask(web, either.url(path))

    threads = [threading.Thread(target=work, args=(path,)) for path in bodies]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == bodies


def test_the_program_says_who_it_is_to_every_host(server: LoopbackServer) -> None:
    with LoopbackServer() as other:
        server.serve("/a", to=other.serve("/b", b"1"))
        with LOOPBACK.open(server.url("/a"), stall=9, deadline=time.monotonic() + 9) as body:
            assert body.read(9) == b"1"
        agents = {server.headers["/a"]["User-Agent"], other.headers["/b"]["User-Agent"]}
    assert agents == {USER_AGENT}
    assert USER_AGENT.startswith("worker-lora ")


def test_a_links_token_goes_to_its_own_origin_alone(server: LoopbackServer) -> None:
    with LoopbackServer() as other:
        server.serve("/a", to=server.url("/b"))
        server.serve("/b", to=other.serve("/c", b"1"))
        rules = {
            origin_of(server.address): ("Authorization", "Bearer ours"),
            origin_of(other.address): ("X-Key", "other's"),
        }
        web = Web(WebRules(allow_private=True, tokens=rules))
        deadline = time.monotonic() + 9
        with web.open(server.url("/a"), stall=9, deadline=deadline, token="theirs"):
            pass
        assert [server.headers[path]["Authorization"] for path in ("/a", "/b")] == [
            "Bearer theirs",
            "Bearer theirs",
        ]
        assert "Authorization" not in other.headers["/c"]
        assert other.headers["/c"]["X-Key"] == "other's"
        with web.open(server.url("/a"), stall=9, deadline=deadline):
            pass
        assert server.headers["/a"]["Authorization"] == "Bearer ours"
