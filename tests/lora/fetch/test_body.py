"""What is read of an answer's body: packed, chunked, cut off or too long."""

from __future__ import annotations

import gzip
import tracemalloc
import zlib

import pytest
import requests

from tests.adapters import as_bytes, kohya
from tests.lora.fetch.test_web import ask, opened
from tests.server import LOOPBACK, LoopbackServer, Reply, gzip_of

ADAPTER = as_bytes(kohya())
GZIP = {"Content-Encoding": "gzip"}


@pytest.mark.parametrize("encoding", ["gzip", "x-gzip", "GZIP", "deflate", "identity", ""])
def test_a_body_is_unpacked(server: LoopbackServer, encoding: str) -> None:
    bodies = {"gzip": gzip.compress(ADAPTER), "deflate": zlib.compress(ADAPTER)}
    body = bodies.get(encoding.lower().removeprefix("x-"), ADAPTER)
    url = server.serve("/x", body, headers={"Content-Encoding": encoding})
    assert ask(LOOPBACK, url) == ADAPTER
    assert server.headers["/x"]["Accept-Encoding"] == "identity"


def test_a_body_of_several_gzip_members_is_unpacked(server: LoopbackServer) -> None:
    packed = b"".join(gzip.compress(ADAPTER[i : i + 1000]) for i in range(0, len(ADAPTER), 1000))
    assert ask(LOOPBACK, server.serve("/x", packed, headers=GZIP)) == ADAPTER


def test_a_chunked_body_is_joined_and_its_end_is_needed(server: LoopbackServer) -> None:
    chunks = b"".join(b"%x\r\n%s\r\n" % (len(c), c) for c in (b"he", b"re"))
    chunked = {"headers": {"Transfer-Encoding": "chunked"}, "length": -1}
    assert ask(LOOPBACK, server.serve("/x", chunks + b"0\r\n\r\n", **chunked)) == b"here"
    with pytest.raises(requests.ConnectionError):
        ask(LOOPBACK, server.serve("/x", chunks, **chunked))


@pytest.mark.parametrize(
    "reply",
    [
        Reply(b"here", length=5),
        Reply(gzip.compress(ADAPTER)[:-9], headers=GZIP),
        Reply(gzip.compress(ADAPTER) + b"more", headers=GZIP),
        Reply(ADAPTER, headers=GZIP),
        Reply(ADAPTER, headers={"Content-Encoding": "br"}),
        Reply(ADAPTER, headers={"Content-Encoding": "gzip, gzip"}),
        Reply(raw=b""),
        Reply(raw=b"no HTTP at all\r\n\r\n"),
        Reply(raw=b"HTTP/1.1 200 OK\r\nETag: "),
        Reply(raw=b"HTTP/1.1 200 OK\r\nContent-Length: 1"),
        Reply(raw=b"HTTP/1.1 200 OK\r\n" + b"X-A: b\r\n" * 1000 + b"\r\nhere"),
        Reply(raw=b"HTTP/1.1 200 OK\r\nX-A: " + b"a" * 100_000 + b"\r\n\r\nhere"),
        Reply(raw=b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nxyz\r\n"),
    ],
)
def test_a_broken_answer_is_an_error_of_the_connection(
    server: LoopbackServer, reply: Reply
) -> None:
    server.replies["/x"] = reply
    with pytest.raises(requests.RequestException):
        ask(LOOPBACK, server.url("/x"))


def test_a_length_of_thousands_of_digits_is_no_length(server: LoopbackServer) -> None:
    head = b"HTTP/1.1 200 OK\r\nContent-Length: " + b"9" * 5000
    server.replies["/x"] = Reply(raw=head + b"\r\n\r\nhere")
    assert ask(LOOPBACK, server.url("/x")) == b"here"


def test_a_body_over_the_limit_is_cut_there(server: LoopbackServer) -> None:
    url = server.serve("/x", gzip_of(bytes(1 << 20), 64), headers=GZIP)
    tracemalloc.start()
    try:
        with pytest.raises(ValueError, match="is over"), opened(LOOPBACK, url) as body:
            body.read(4 << 20)
        assert tracemalloc.get_traced_memory()[1] < 16 << 20
    finally:
        tracemalloc.stop()


def test_what_follows_a_packed_body_is_not_hoarded(server: LoopbackServer) -> None:
    url = server.serve("/x", gzip.compress(b"here") + bytes(64 << 20), headers=GZIP)
    tracemalloc.start()
    try:
        with pytest.raises(requests.RequestException):
            ask(LOOPBACK, url)
        assert tracemalloc.get_traced_memory()[1] < 16 << 20
    finally:
        tracemalloc.stop()
