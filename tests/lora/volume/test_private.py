"""A file that one request's token opened serves another's only after its source accepted that one's own."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import parse_qs, urlsplit

import pytest

from lora.errors import AccessDenied, DownloadFailed, LoraError
from lora.fetch.rules import WebRules
from lora.fetch.sources import Reference
from lora.fetch.web import Web
from lora.volume.cache import CacheEntry, Limits, VolumeCache
from tests.adapters import as_bytes, kohya

ADAPTER = as_bytes(kohya())


class Guarded:
    """A server that gives one file to who names a token that it knows, and says 304 where it may."""

    def __init__(self) -> None:
        self.known = {"alice", "bob"}
        self.down = False
        self.asked: list[str | None] = []
        outer = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                query = parse_qs(urlsplit(self.path).query)
                names = (query.get(name, [""])[0] for name in ("token", "X-Amz-Signature"))
                token = next(filter(None, names), None)
                outer.asked.append(token)
                status = 200 if token in outer.known else 403
                if status == 200 and self.headers.get("If-None-Match") == '"1"':
                    status = 304
                self.send_response(500 if outer.down else status)
                self.send_header("ETag", '"1"')
                body = ADAPTER if status == 200 and not outer.down else b""
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)

            def log_message(self, format: str, *args: object) -> None:  # noqa: A002 - the base's
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_address[1]}/x.safetensors"


@pytest.fixture
def guarded() -> Iterator[Guarded]:
    made = Guarded()
    thread = threading.Thread(target=made.server.serve_forever, args=(0.02,), daemon=True)
    thread.start()
    yield made
    made.server.shutdown()
    made.server.server_close()
    thread.join()


def cache_in(root: Path, *, share_private: bool = False) -> VolumeCache:
    web = Web(WebRules(allow_private=True, share_private=share_private))
    return VolumeCache(root, Limits(tries=1, pause=0.01), web)


def get(cache: VolumeCache, url: str) -> CacheEntry:
    return cache.get(cache.resolve(Reference(url)))


@pytest.mark.parametrize("name", ["token", "X-Amz-Signature"])
def test_each_request_is_let_in_by_its_own_token(
    tmp_path: Path, guarded: Guarded, name: str
) -> None:
    cache = cache_in(tmp_path)
    first = get(cache, f"{guarded.url}?{name}=alice")
    assert first.downloaded
    assert not get(cache, f"{guarded.url}?{name}=alice").downloaded
    assert guarded.asked == ["alice"]
    for query in ("", f"?{name}=mallory"):
        with pytest.raises(AccessDenied):
            get(cache, guarded.url + query)
    second = get(cache, f"{guarded.url}?{name}=bob")
    assert (second.path, second.downloaded) == (first.path, False)
    assert guarded.asked == ["alice", None, "mallory", "bob"]
    assert "alice" not in json.dumps([p.read_text() for p in tmp_path.glob("*.json")])


def test_a_source_that_is_down_opens_to_nobody_new(tmp_path: Path, guarded: Guarded) -> None:
    cache = cache_in(tmp_path)
    get(cache, f"{guarded.url}?token=alice")
    guarded.down = True
    assert get(cache, f"{guarded.url}?token=alice").path.exists()
    for query in ("", "?token=bob"):
        with pytest.raises(DownloadFailed):
            get(cache, guarded.url + query)


def test_an_operator_may_let_it_serve_all(tmp_path: Path, guarded: Guarded) -> None:
    cache = cache_in(tmp_path, share_private=True)
    get(cache, f"{guarded.url}?token=alice")
    for query in ("", "?token=mallory"):
        assert not get(cache, guarded.url + query).downloaded
    assert guarded.asked == ["alice"]


@pytest.mark.parametrize("name", ["token", "X-Amz-Signature", "sig"])
def test_a_refusal_is_remembered_for_the_very_link(
    tmp_path: Path, guarded: Guarded, name: str
) -> None:
    cache = cache_in(tmp_path)
    guarded.known.add("")
    for _ in range(2):
        with pytest.raises(LoraError):
            get(cache, f"{guarded.url}?{name}=expired")
    assert len(guarded.asked) == 1
    guarded.known.add(None)  # type: ignore[arg-type]
    get(cache, f"{guarded.url}?{name}=alice")
    assert len(guarded.asked) == 2
