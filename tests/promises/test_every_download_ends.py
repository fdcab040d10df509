"""Every fault that a server or a disk may have, and what the cache makes of it.

`FAULTS` is the table in docs/reliability.md; `pytest -s` prints it with the seconds that each fault took.
"""

from __future__ import annotations

import errno
import gzip
import hashlib
import os
import re
import socket
import time
import tracemalloc
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, fields, replace
from email.utils import formatdate
from pathlib import Path
from typing import Any

import pytest

from lora.errors import DownloadFailed, LoraError, LoraNotFound
from lora.fetch.rules import WebRules
from lora.fetch.sources import Reference
from lora.fetch.web import MAX_REDIRECTS, Web
from lora.volume.cache import CacheEntry, Limits, VolumeCache
from settings import Settings
from tests.adapters import as_bytes, kohya
from tests.conftest import ROOT
from tests.server import LOOPBACK, STALL, LoopbackServer, Reply, gzip_of
from tests.waiting import PATIENCE, until
from worker.opening import open_cache

ADAPTER, OTHER = as_bytes(kohya()), as_bytes(kohya(seed=9))
ETAG = '"one"'
LIMITS = Limits(file_bytes=4 << 20, timeout=PATIENCE, stall=PATIENCE, tries=3, pause=0.02)
"""No test ends by a time, but where one is set for it."""
PATH = "/lora.safetensors"
GZIP = {"Content-Encoding": "gzip"}
NOBODY = "http://127.0.0.1:9"
"""Where nothing listens."""
HTML = b"<!DOCTYPE html><html><body>Please log in</body></html>"

CHUNKED = Reply(headers={"Transfer-Encoding": "chunked"}, length=-1, drip=0.02)
WHOLE, PART = Reply(ADAPTER, etag=ETAG, ranges=True), len(ADAPTER) // 3
CUT, CUT_WITHOUT_RANGES = replace(WHOLE, cut_after=PART), Reply(ADAPTER, cut_after=PART)


@pytest.fixture
def server() -> Iterator[LoopbackServer]:
    """As most are: connections stay open between requests."""
    with LoopbackServer(keep_alive=True) as running:
        yield running


@dataclass(frozen=True)
class Fault:
    """One row of the table, and how it comes about."""

    name: str
    outcome: str
    reply: Reply
    code: str | None = None
    """Of the error; None where the file arrives whole in the end."""
    asked: int = 1
    """Requests for the file that the server sees."""
    sha256: str | None = None
    disk: int | None = None
    """The error that the disk gives when the file is written out."""
    at: str | None = None
    """A URL that is not the server's."""
    times: Mapping[str, float] = field(default_factory=dict)
    """The limits of time that it is to reach."""
    beside: tuple[str, Reply] = ("/beside", Reply())
    """Another path of the server, and its answer."""


def after(*first: Reply, then: Reply = WHOLE) -> Reply:
    return replace(then, first=first)


def fault(name: str, outcome: str, reply: Reply, code: str | None = None, **more: object) -> Fault:
    return Fault(name, outcome, reply, code, **more)  # type: ignore[arg-type]


FAILED, DENIED, MISSING = "LORA_DOWNLOAD_FAILED", "LORA_ACCESS_DENIED", "LORA_NOT_FOUND"
CORRUPT, LARGE, INVALID, FULL = (
    "LORA_CORRUPT",
    "LORA_TOO_LARGE",
    "LORA_SOURCE_INVALID",
    "CACHE_FULL",
)

FAULTS = (
    # The connection.
    fault(
        "there is no such host",
        "`LORA_DOWNLOAD_FAILED` after the tries",
        Reply(),
        FAILED,
        asked=0,
        at="http://nowhere.example" + PATH,
    ),
    fault(
        "nothing listens there",
        "`LORA_DOWNLOAD_FAILED` after the tries",
        Reply(),
        FAILED,
        asked=0,
        at=NOBODY + PATH,
    ),
    fault(
        "the connection breaks",
        "the next try asks for the rest, and the file arrives whole",
        after(CUT),
        asked=2,
    ),
    fault(
        "it breaks more often than there are tries, and each try brings some bytes",
        "the file arrives whole, piece by piece",
        after(*[replace(WHOLE, cut_after=len(ADAPTER) // 6)] * 5),
        asked=6,
    ),
    fault(
        "it breaks, and the server cannot send a part",
        "the next try asks for the whole file, and it arrives",
        after(CUT_WITHOUT_RANGES, then=Reply(ADAPTER)),
        asked=2,
    ),
    fault(
        "it breaks at the same place each time",
        "`LORA_DOWNLOAD_FAILED` after the tries",
        CUT_WITHOUT_RANGES,
        FAILED,
        asked=3,
    ),
    fault(
        "the server hangs up without an answer",
        "the next try fetches the file",
        after(Reply(raw=b"")),
        asked=2,
    ),
    fault(
        "the answer's head is cut off",
        "the next try fetches the file",
        after(Reply(raw=b"HTTP/1.1 200 OK\r\nContent-T")),
        asked=2,
    ),
    fault(
        "the server does not speak HTTP",
        "`LORA_DOWNLOAD_FAILED` after the tries",
        Reply(raw=b"220 mail.example ESMTP\r\n"),
        FAILED,
        asked=3,
    ),
    fault(
        "the body falls silent",
        "it is broken off after 30 s, and the rest is asked for",
        after(replace(WHOLE, stall_after=PART)),
        asked=2,
        times={"stall": 3.0},
    ),
    fault(
        "it falls silent each time",
        "`LORA_DOWNLOAD_FAILED` after the tries",
        Reply(ADAPTER, stall_after=PART),
        FAILED,
        asked=3,
        times={"stall": 0.5},
    ),
    fault(
        "there is no answer at all",
        "`LORA_DOWNLOAD_FAILED` after the tries, of 30 s each",
        Reply(raw=b"x", drip=STALL),
        FAILED,
        asked=3,
        times={"stall": 0.5},
    ),
    fault(
        "the body drips in, byte by byte",
        "`LORA_DOWNLOAD_FAILED` when the time is over",
        Reply(ADAPTER, drip=0.05),
        FAILED,
        times={"timeout": 2.0},
    ),
    fault(
        "the end of a chunked body drips in, line by line",
        "`LORA_DOWNLOAD_FAILED` when the time is over",
        replace(CHUNKED, body=b"1\r\nx\r\n0\r\n" + b"X: y\r\n" * 1000),
        FAILED,
        times={"timeout": 2.0},
    ),
    fault(
        "the head drips in, byte by byte",
        "`LORA_DOWNLOAD_FAILED` after the tries, of 30 s each",
        Reply(raw=b"HTTP/1.1 200 OK\r\nX: " + b"x" * 9999, drip=0.02),
        FAILED,
        asked=3,
        times={"stall": 0.5},
    ),
    # Going on where it broke off.
    fault(
        "the file changes before the rest is asked for",
        "the new one arrives whole; the two are never mixed",
        after(replace(WHOLE, body=OTHER, etag='"old"', cut_after=PART)),
        asked=2,
    ),
    fault(
        "the server sends another part than was asked for",
        "the next try asks for the whole file, and it arrives",
        after(CUT, Reply(ADAPTER[1:], 206, {"Content-Range": f"bytes 1-9/{len(ADAPTER)}"})),
        asked=3,
    ),
    fault(
        "the server says that there is no such part",
        "the next try asks for the whole file, and it arrives",
        after(CUT, Reply(status=416)),
        asked=3,
    ),
    # Lengths and packing.
    fault(
        "the server states a length that is too long, once",
        "the next try asks for it again, and arrives whole",
        after(Reply(ADAPTER, length=len(ADAPTER) + 9, cut_after=len(ADAPTER))),
        asked=2,
    ),
    fault(
        "the length that the server states is too long each time",
        "`LORA_DOWNLOAD_FAILED` after the tries",
        Reply(ADAPTER, length=len(ADAPTER) + 9, cut_after=len(ADAPTER)),
        FAILED,
        asked=3,
    ),
    fault(
        "the length that the server states is too short",
        "`LORA_CORRUPT`: bytes are missing",
        Reply(ADAPTER, length=len(ADAPTER) - 9),
        CORRUPT,
    ),
    fault(
        "the server states no length",
        "the file arrives whole",
        Reply(ADAPTER, length=-1),
    ),
    fault(
        "the server states no length, and the connection breaks",
        "`LORA_CORRUPT`: bytes are missing",
        Reply(ADAPTER, length=-1, cut_after=PART),
        CORRUPT,
    ),
    fault(
        "the body is packed with gzip, though none was asked for",
        "it is unpacked, and the file arrives whole",
        Reply(gzip.compress(ADAPTER), headers=GZIP),
    ),
    fault(
        "the packed body breaks off",
        "the next try asks for the whole file, and it arrives",
        after(
            Reply(gzip.compress(ADAPTER), headers=GZIP, cut_after=PART),
            then=Reply(gzip.compress(ADAPTER), headers=GZIP),
        ),
        asked=2,
    ),
    fault(
        "the packed body is broken",
        "`LORA_DOWNLOAD_FAILED` at once",
        Reply(ADAPTER, headers=GZIP),
        FAILED,
    ),
    fault(
        "the body is packed in another way, though none was asked for",
        "`LORA_DOWNLOAD_FAILED` at once",
        Reply(ADAPTER, headers={"Content-Encoding": "br"}),
        FAILED,
    ),
    fault(
        "a small packed body holds a huge one",
        "`LORA_TOO_LARGE`; it is unpacked up to the limit, and no further",
        Reply(gzip_of(bytes(1 << 20), 64), headers=GZIP),
        LARGE,
    ),
    fault(
        "the file is over the limit, and the server says so",
        "`LORA_TOO_LARGE` before any of it is read",
        Reply(length=5 << 20, stall_after=0),
        LARGE,
    ),
    fault(
        "the file is over the limit, and the server does not say so",
        "`LORA_TOO_LARGE` as soon as the limit is passed",
        Reply(bytes(5 << 20), length=-1),
        LARGE,
    ),
    # Contents.
    fault(
        "the content has another hash than the request, the hub or Civitai says",
        "`LORA_CORRUPT`; nothing is kept",
        WHOLE,
        CORRUPT,
        sha256="0" * 64,
    ),
    fault(
        "a web page comes in place of the file, with 200",
        "`LORA_CORRUPT`: it is a web page",
        Reply(HTML, headers={"Content-Type": "text/html"}),
        CORRUPT,
    ),
    fault(
        "the file on the server is not whole",
        "`LORA_CORRUPT`: bytes are missing",
        Reply(ADAPTER[:-9]),
        CORRUPT,
    ),
    # Statuses.
    fault(
        "500 and the like, for a while",
        "the next try fetches the file",
        after(Reply(status=500), Reply(status=503)),
        asked=3,
    ),
    fault(
        "500 and the like, each time",
        "`LORA_DOWNLOAD_FAILED` after the tries",
        Reply(status=502),
        FAILED,
        asked=3,
    ),
    fault(
        "429 or 503 with Retry-After",
        "the next try comes when the server wants it, and fetches the file",
        after(Reply(status=429, headers={"Retry-After": "1"})),
        asked=2,
    ),
    fault(
        "Retry-After is later than the time that is left",
        "`LORA_DOWNLOAD_FAILED` at once; it says how long to wait",
        Reply(status=429, headers={"Retry-After": "999"}),
        FAILED,
    ),
    fault(
        "404 or 410",
        "`LORA_NOT_FOUND` at once, and for a minute without asking again",
        Reply(status=410),
        MISSING,
    ),
    fault(
        "401 or 403",
        "`LORA_ACCESS_DENIED` at once, and for a minute without asking again",
        Reply(status=403),
        DENIED,
    ),
    fault(
        "any other status",
        "`LORA_DOWNLOAD_FAILED` at once",
        Reply(status=418),
        FAILED,
    ),
    # Redirects.
    fault(
        "a redirect to another host",
        "it is followed, without our token; the file arrives whole",
        Reply(to="http://localhost:{port}/store"),
        beside=("/store", WHOLE),
    ),
    fault(
        "a redirect to a login page",
        "`LORA_ACCESS_DENIED` at once",
        Reply(to="/login?back=1"),
        DENIED,
        beside=("/login", Reply(HTML)),
    ),
    fault(
        "redirects that lead in a circle",
        "`LORA_DOWNLOAD_FAILED` after 10 of them, at once",
        Reply(to=PATH),
        FAILED,
        asked=MAX_REDIRECTS + 1,
    ),
    fault(
        "a redirect to an address within the network, or to a host that is not allowed",
        "`LORA_SOURCE_INVALID` at once; nothing is sent there",
        Reply(to="http://10.0.0.1/latest/meta-data/"),
        INVALID,
    ),
    fault(
        "a redirect to something that is not an http(s) URL",
        "`LORA_SOURCE_INVALID` at once",
        Reply(to="file:///etc/passwd"),
        INVALID,
    ),
    # The disk.
    fault(
        "the volume is full",
        "`CACHE_FULL`; no part of the file stays",
        WHOLE,
        FULL,
        disk=errno.ENOSPC,
    ),
    fault(
        "neither the volume nor the container's disk can be written",
        "`CACHE_FULL`; no part of the file stays",
        WHOLE,
        FULL,
        disk=errno.EIO,
    ),
)
MEASURED: dict[str, float] = {}


@pytest.fixture(scope="module", autouse=True)
def table() -> Iterator[None]:
    """Prints the table with what was measured, when all of it was."""
    yield
    width = max(len(one.name) for one in FAULTS)
    for one in FAULTS if len(MEASURED) == len(FAULTS) else ():
        print(f"\n{MEASURED[one.name]:6.2f} s  {one.name:<{width}}  {one.outcome}", end="")


@pytest.fixture
def cache(tmp_path: Path, server: LoopbackServer, monkeypatch: pytest.MonkeyPatch) -> VolumeCache:
    """It may ask the server, under two names; there is no other host."""
    resolve = socket.getaddrinfo

    def known(host: str, port: int, **_: object) -> list[Any]:
        numbers = {"localhost": "127.0.0.1"}.get(host, host)
        return resolve(numbers, port, type=socket.SOCK_STREAM, flags=socket.AI_NUMERICHOST)

    monkeypatch.setattr(socket, "getaddrinfo", known)
    own = frozenset({server.address, f"http://localhost:{server.port}", NOBODY})
    return VolumeCache(tmp_path / "loras", LIMITS, Web(WebRules(own=own)))


def get(cache: VolumeCache, path: str, **options: object) -> CacheEntry:
    return cache.get(cache.resolve(Reference(path, **options)))  # type: ignore[arg-type]


def files(cache: VolumeCache) -> list[Path]:
    return [path for path in cache.shelf.root.rglob("*") if path.is_file()]


def outcome_of(cache: VolumeCache, fault: Fault, url: str) -> str | None:
    """The code of the error, or None and the file is whole. Either way nothing else is left."""
    begun = time.monotonic()
    try:
        entry = get(cache, url, sha256=fault.sha256)
    except LoraError as error:
        assert url.partition("?")[0] in str(error) or error.code in (INVALID, FULL)
        assert "canary" not in str(error)
        assert files(cache) == []
        return error.code
    finally:
        MEASURED[fault.name] = time.monotonic() - begun
    assert entry.path.read_bytes() == ADAPTER
    assert entry.record.sha256 == hashlib.sha256(ADAPTER).hexdigest()
    assert sorted(files(cache)) == [entry.path, entry.path.with_name(entry.path.name + ".json")]
    return None


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.name)
def test_a_fault_has_its_outcome(
    fault: Fault, cache: VolumeCache, server: LoopbackServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    limits = replace(LIMITS, **fault.times)
    cache = VolumeCache(cache.shelf.root, limits, cache.web)
    to = fault.reply.to and fault.reply.to.format(port=server.port)
    server.replies[PATH] = replace(fault.reply, to=to)
    server.replies |= dict([fault.beside])
    if fault.disk is not None:
        error = OSError(fault.disk, os.strerror(fault.disk))

        def fail(handle: int) -> None:
            raise error

        monkeypatch.setattr(os, "fsync", fail)
    assert outcome_of(cache, fault, (fault.at or server.url(PATH)) + "?token=canary") == fault.code
    until(lambda: server.hits[PATH] >= fault.asked)  # who hung up was perhaps not heard yet
    assert server.hits[PATH] == fault.asked


def test_the_table_in_the_docs_is_the_tests() -> None:
    text = (ROOT / "docs" / "reliability.md").read_text()
    rows = re.findall(r"^\| (.+?) +\| (.+?) +\|$", text, re.MULTILINE)
    head = rows.index(("fault", "outcome"))
    assert rows[head + 2 :] == [(one.name, one.outcome) for one in FAULTS]


def test_every_row_names_its_code() -> None:
    for one in FAULTS:
        assert re.findall("`([A-Z_]+)`", one.outcome) == ([one.code] if one.code else []), one.name


def test_the_numbers_and_settings_in_the_docs_are_the_codes() -> None:
    text = (ROOT / "docs" / "reliability.md").read_text()
    limits = open_cache(Settings()).limits
    for words in (
        f"{limits.tries} tries in a row",
        f"{limits.timeout:.0f} s",
        f"{limits.stall:.0f} s",
        f"{limits.pause:g} s",
        f"{limits.refusal:.0f} s",
        f"{MAX_REDIRECTS} redirects",
    ):
        assert words in text, words
    known = {setting.metadata["env"] for setting in fields(Settings)}
    named = set(re.findall(r"`(LORA_[A-Z_]+|[A-Z]+_TOKEN|[A-Z]+_ENDPOINT)`", text))
    codes = {one.code for one in FAULTS}
    assert named - codes <= known
    assert len(named & known) >= 6


# --- going on where it broke off -----------------------------------------------------------------


def test_only_what_is_missing_is_asked_for_again(
    cache: VolumeCache, server: LoopbackServer
) -> None:
    server.replies[PATH] = after(CUT, replace(WHOLE, cut_after=PART))
    told: list[tuple[int, int | None]] = []
    entry = cache.get(cache.resolve(Reference(server.url(PATH))), lambda *now: told.append(now))
    assert entry.path.read_bytes() == ADAPTER
    ranges = [(one.headers.get("Range"), one.headers.get("If-Range")) for one in server.asked]
    assert ranges == [
        (None, None),
        (f"bytes={PART}-", ETAG),
        (f"bytes={2 * PART}-", ETAG),
    ]
    assert server.sent[PATH] == len(ADAPTER)
    assert told == sorted(told)
    assert told[-1] == (len(ADAPTER), len(ADAPTER))


def test_a_file_without_an_etag_is_gone_on_with_by_its_date(
    cache: VolumeCache, server: LoopbackServer
) -> None:
    date = formatdate(1e9, usegmt=True)
    dated = Reply(ADAPTER, ranges=True, headers={"Last-Modified": date})
    server.replies[PATH] = after(replace(dated, cut_after=PART), then=dated)
    assert get(cache, server.url(PATH)).path.read_bytes() == ADAPTER
    assert server.headers[PATH]["If-Range"] == date
    assert server.sent[PATH] == len(ADAPTER)


@pytest.mark.parametrize(
    "cut",
    [
        replace(CUT, etag='W/"one"'),
        replace(CUT, etag=None),
        replace(CUT, length=-1),
        Reply(gzip.compress(ADAPTER), headers=GZIP, etag=ETAG, ranges=True, cut_after=PART),
    ],
    ids=["weak", "none", "no length", "packed"],
)
def test_what_cannot_be_told_apart_is_asked_for_from_the_start(
    cache: VolumeCache, server: LoopbackServer, cut: Reply
) -> None:
    server.replies[PATH] = after(cut, then=replace(WHOLE, etag=cut.etag))
    if cut.length is None:
        assert get(cache, server.url(PATH)).path.read_bytes() == ADAPTER
        assert server.hits[PATH] == 2
    else:  # nobody can know that it broke off but by what is in it
        with pytest.raises(LoraError):
            get(cache, server.url(PATH))
    assert not any("Range" in one.headers for one in server.asked)


def test_a_file_that_changes_all_the_time_is_never_mixed(
    cache: VolumeCache, server: LoopbackServer
) -> None:
    bodies = [as_bytes(kohya(seed=seed)) for seed in range(3)]
    replies = [Reply(body, etag=f'"{n}"', ranges=True) for n, body in enumerate(bodies)]
    cuts = [replace(reply, cut_after=PART) for reply in replies]
    server.replies[PATH] = after(cuts[0], cuts[1], then=replies[2])
    assert get(cache, server.url(PATH)).path.read_bytes() == bodies[2]
    assert [one.headers.get("If-Range") for one in server.asked] == [None, '"0"', '"1"']


# --- when to ask again ---------------------------------------------------------------------------


@pytest.fixture
def pauses(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The seconds that a download would wait between its tries; it does not."""
    made: list[float] = []
    monkeypatch.setattr("lora.fetch.download.time.sleep", made.append)
    return made


@pytest.mark.parametrize("status", [404, 403])
def test_a_refusal_is_remembered_for_a_while(
    cache: VolumeCache, server: LoopbackServer, status: int
) -> None:
    url = server.serve(PATH, status=status)
    said = []
    for options in ({}, {}, {"refresh": True}):
        with pytest.raises(LoraError) as caught:
            get(cache, url, **options)
        said.append(str(caught.value))
        assert server.hits[PATH] == 1 + ("refresh" in options)
    assert len(set(said)) == 1
    server.replies[PATH] = WHOLE
    assert get(cache, url, refresh=True).path.read_bytes() == ADAPTER
    assert get(cache, url).path.read_bytes() == ADAPTER


def test_a_refusal_is_forgotten_after_its_time(cache: VolumeCache, server: LoopbackServer) -> None:
    cache = VolumeCache(cache.shelf.root, replace(LIMITS, refusal=0.1), LOOPBACK)
    with pytest.raises(LoraNotFound):
        get(cache, server.url(PATH))
    server.replies[PATH] = WHOLE
    time.sleep(0.11)
    assert get(cache, server.url(PATH)).path.read_bytes() == ADAPTER


def test_a_fault_that_may_pass_is_not_remembered(
    cache: VolumeCache, server: LoopbackServer
) -> None:
    url = server.serve(PATH, status=500)
    with pytest.raises(DownloadFailed):
        get(cache, url)
    server.replies[PATH] = WHOLE
    assert get(cache, url).path.read_bytes() == ADAPTER


@pytest.mark.parametrize(
    ("after_text", "least", "most"),
    [
        ("1", 1.0, 1.0),
        (lambda: formatdate(time.time() + PATIENCE / 2, usegmt=True), 1.0, PATIENCE / 2),
        ("0", 0.01, 0.03),
        ("-5", 0.01, 0.03),
        ("soon", 0.01, 0.03),
        ("1 Jan -99999999999 25:61:61", 0.01, 0.03),
        (lambda: formatdate(time.time() - 60, usegmt=True), 0.01, 0.03),
    ],
    ids=["seconds", "date", "none", "negative", "words", "impossible", "past"],
)
def test_a_server_is_left_alone_for_as_long_as_it_asks(
    cache: VolumeCache,
    server: LoopbackServer,
    pauses: list[float],
    after_text: object,
    least: float,
    most: float,
) -> None:
    text = after_text() if callable(after_text) else after_text
    server.replies[PATH] = after(Reply(status=503, headers={"Retry-After": str(text)}))
    assert get(cache, server.url(PATH)).path.read_bytes() == ADAPTER
    (pause,) = pauses
    assert least <= pause <= most


@pytest.mark.parametrize("text", ["999", "9" * 5000], ids=["minutes", "for ever"])
def test_a_wait_that_is_too_long_fails_at_once_and_says_so(
    cache: VolumeCache, server: LoopbackServer, pauses: list[float], text: str
) -> None:
    url = server.serve(PATH, status=429, headers={"Retry-After": text})
    with pytest.raises(DownloadFailed) as caught:
        get(cache, url)
    assert pauses == []
    assert "HTTP 429" in str(caught.value)
    assert "The server asks to wait" in str(caught.value)
    assert server.hits[PATH] == 1


def test_pauses_grow_and_are_never_the_same(
    cache: VolumeCache, server: LoopbackServer, pauses: list[float]
) -> None:
    limits = replace(LIMITS, tries=5, pause=0.01)
    cache = VolumeCache(cache.shelf.root, limits, LOOPBACK)
    with pytest.raises(DownloadFailed):
        get(cache, server.serve(PATH, status=500))
    assert len(pauses) == len(set(pauses)) == 4
    for number, pause in enumerate(pauses):
        assert 0.5 <= pause / (0.01 * 2**number) <= 1.5


# --- an old file, and none -----------------------------------------------------------------------


@pytest.mark.parametrize(
    "reply",
    [Reply(status=500), Reply(status=404), Reply(HTML), Reply(to=PATH), CUT_WITHOUT_RANGES],
    ids=["500", "404", "html", "circle", "cut"],
)
def test_an_old_file_serves_when_the_new_one_cannot_be_had(
    cache: VolumeCache, server: LoopbackServer, reply: Reply
) -> None:
    cache = VolumeCache(cache.shelf.root, replace(LIMITS, ttl=0), LOOPBACK)
    server.replies[PATH] = WHOLE
    url = server.url(PATH)
    get(cache, url)
    server.replies[PATH] = reply
    old = get(cache, url)
    assert old.path.read_bytes() == ADAPTER
    assert "may be out of date" in old.warnings[0]
    with pytest.raises(LoraError):
        get(cache, url, refresh=True)
    assert old.path.read_bytes() == ADAPTER
    server.replies[PATH] = replace(WHOLE, body=OTHER, etag='"two"')
    new = get(cache, url, refresh=True)
    assert (new.path.read_bytes(), new.warnings) == (OTHER, ())


def test_a_file_that_has_not_changed_is_not_sent_again(
    cache: VolumeCache, server: LoopbackServer
) -> None:
    server.replies[PATH] = WHOLE
    get(cache, server.url(PATH))
    again = get(cache, server.url(PATH), refresh=True)
    assert not again.downloaded
    assert server.headers[PATH]["If-None-Match"] == ETAG
    assert server.sent[PATH] == len(ADAPTER)


def test_a_server_that_says_not_modified_of_nothing_has_failed(
    cache: VolumeCache, server: LoopbackServer
) -> None:
    with pytest.raises(DownloadFailed):
        get(cache, server.serve(PATH, status=304))


def test_a_disk_that_fails_is_replaced_by_the_containers(
    tmp_path: Path, server: LoopbackServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache = VolumeCache(tmp_path / "volume", LIMITS, LOOPBACK, fallback=tmp_path / "own")
    server.replies[PATH] = WHOLE
    fsync = os.fsync
    trouble = [OSError(errno.EIO, os.strerror(errno.EIO))]

    def failing(handle: int) -> None:
        if trouble and str(tmp_path / "volume") in str(Path(f"/proc/self/fd/{handle}").readlink()):
            raise trouble[0]
        fsync(handle)

    monkeypatch.setattr(os, "fsync", failing)
    entry = get(cache, server.url(PATH))
    assert entry.path.is_relative_to(tmp_path / "own")
    assert entry.path.read_bytes() == ADAPTER
    assert "Input/output error" in str(cache.shelf.trouble)
    assert [p for p in (tmp_path / "volume").rglob("*") if p.is_file()] == []


# --- memory --------------------------------------------------------------------------------------


@pytest.mark.parametrize("packed", [False, True], ids=["plain", "packed"])
def test_memory_stays_small_however_much_comes_in(
    cache: VolumeCache, server: LoopbackServer, packed: bool
) -> None:
    """96 MB of zeros, of which 48 MB may come in."""
    cache = VolumeCache(cache.shelf.root, replace(LIMITS, file_bytes=48 << 20), LOOPBACK)
    if packed:
        server.replies[PATH] = Reply(gzip_of(bytes(1 << 20), 96), headers=GZIP)
    else:
        server.replies[PATH] = Reply(bytes(96 << 20), length=-1)
    tracemalloc.start()
    try:
        with pytest.raises(LoraError) as caught:
            get(cache, server.url(PATH))
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert caught.value.code == "LORA_TOO_LARGE"
    assert peak < 24 << 20
    assert files(cache) == []
