"""What a hub said of a source: it serves while the hub misbehaves, and no secret of it is written down."""

from __future__ import annotations

import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from lora.errors import LoraError
from lora.fetch.civitai import Civitai
from lora.fetch.hub import Hub
from lora.fetch.sources import Reference
from lora.volume.cache import CacheEntry, Limits, VolumeCache
from lora.volume.records import record_path, write
from lora.volume.resolver import LOOKUPS
from tests.adapters import as_bytes, kohya
from tests.server import LOOPBACK, LoopbackServer

ADAPTER = as_bytes(kohya())

HTML = {"Content-Type": "text/html"}

MISBEHAVED: dict[str, dict[str, Any]] = {
    "nothing": {"body": b""},
    "a page": {"body": b"<html>log in</html>", "headers": HTML},
    "broken JSON": {"body": b'{"siblings": ['},
    "401": {"status": 401},
    "403": {"status": 403},
    "404": {"status": 404},
    "410": {"status": 410},
    "418": {"status": 418},
    "500": {"status": 500},
    "302 to itself": {"status": 302, "headers": {"Location": "/"}},
}


def cache_of(root: Path, server: LoopbackServer, **limits: Any) -> VolumeCache:
    limits = {"tries": 1, "pause": 0.01, "ttl": 0, **limits}
    hub, civitai = Hub(None, server.address, LOOPBACK), Civitai(LOOPBACK, server.address)
    return VolumeCache(root, Limits(**limits), LOOPBACK, hub=hub, civitai=civitai)


def get(cache: VolumeCache, path: str, **options: Any) -> CacheEntry:
    return cache.get(cache.resolve(Reference(path, **options)))


def serve(server: LoopbackServer, query: str = "") -> None:
    server.serve_repo("user/repo", {"x.safetensors": ADAPTER})
    server.serve("/download", ADAPTER)
    file = {"id": 3, "name": "x.safetensors", "type": "Model"}
    version = {"modelId": 1, "files": [{**file, "downloadUrl": server.url("/download") + query}]}
    server.serve_json("/api/v1/models/1", {"modelVersions": [{"id": 2}]})
    server.serve_json("/api/v1/model-versions/2", version)


@pytest.mark.parametrize("source", ["user/repo", "civitai:1"])
@pytest.mark.parametrize("kind", MISBEHAVED)
def test_what_is_there_serves_however_its_hub_misbehaves(
    tmp_path: Path, server: LoopbackServer, source: str, kind: str
) -> None:
    serve(server)
    first = get(cache_of(tmp_path, server), source)
    for path in list(server.replies):
        server.serve(path, **MISBEHAVED[kind])
    again = get(cache_of(tmp_path, server), source)
    assert (again.path, again.downloaded) == (first.path, False)
    assert "may be out of date" in again.warnings[0]
    with pytest.raises(LoraError):
        get(cache_of(tmp_path, server), source, refresh=True)


@pytest.mark.parametrize("kind", MISBEHAVED)
def test_what_is_there_serves_however_its_own_source_misbehaves(
    tmp_path: Path, server: LoopbackServer, kind: str
) -> None:
    url = server.serve("/x.safetensors", ADAPTER)
    first = get(cache_of(tmp_path, server), url)
    server.serve("/x.safetensors", **MISBEHAVED[kind])
    again = get(cache_of(tmp_path, server), url)
    assert (again.path, again.record.sha256) == (first.path, first.record.sha256)
    assert "may be out of date" in again.warnings[0]


def test_a_download_urls_token_is_not_written_down_and_its_file_serves_on(
    tmp_path: Path, server: LoopbackServer
) -> None:
    serve(server, "?type=Model&key=canary")
    first = get(cache_of(tmp_path, server), "civitai:1@2")
    written = "".join(path.read_text() for path in tmp_path.rglob("*.json"))
    assert "canary" not in written
    assert server.url("/download") in written
    server.serve("/api/v1/model-versions/2", status=500)
    assert get(cache_of(tmp_path, server), "civitai:1@2").path == first.path
    first.path.unlink()
    serve(server, "?type=Model&key=canary")
    assert get(cache_of(tmp_path, server), "civitai:1@2").downloaded  # with the whole URL


def test_what_a_fast_clock_wrote_is_asked_for_again(tmp_path: Path, server: LoopbackServer) -> None:
    serve(server)
    day, year = 86_400, 365 * 86_400
    cache = cache_of(tmp_path, server, ttl=day)
    url = server.url("/download")
    entry = get(cache, url)
    get(cache, "civitai:1")
    asked = [server.hits["/download"], server.hits["/api/v1/models/1"]]
    ahead = time.time() + year
    write(tmp_path, record_path(entry.path), replace(entry.record, fetched=ahead, checked=ahead))
    for path in (tmp_path / LOOKUPS).iterdir():
        text = path.read_text()
        when = text.rpartition('"when": ')[2].rstrip("} \n")
        path.write_text(text.replace(when, str(ahead)))
    get(cache, url)
    get(cache, "civitai:1")
    assert [server.hits["/download"], server.hits["/api/v1/models/1"]] == [
        asked[0] + 1,
        asked[1] + 1,
    ]
