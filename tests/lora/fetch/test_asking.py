"""Whatever a hub answers, it is asked by the rules for every URL, within their limits; no token leaves."""

from __future__ import annotations

import gzip
import json
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from lora.errors import LoraError
from lora.fetch import asking
from lora.fetch.civitai import Civitai
from lora.fetch.hub import Hub
from lora.fetch.rules import WebRules, origin_of
from lora.fetch.sources import CivitaiFile, HubFile, Reference, RemoteFile
from lora.fetch.web import Web
from lora.volume.cache import Limits
from lora.volume.opening import make_cache
from tests.server import LoopbackServer, Reply


@pytest.fixture
def other_server() -> Iterator[LoopbackServer]:
    with LoopbackServer() as running:
        yield running


DEEP = b"[" * 100_000 + b"]" * 100_000

HUB_PATH, VERSION_PATH = "/api/models/user/repo", "/api/v1/model-versions/2"


def web_of(server: LoopbackServer) -> Web:
    """Only this server may be asked in the private network."""
    return Web(WebRules(own=frozenset({origin_of(server.address)})))


def asked(server: LoopbackServer, body: bytes, **options: Any) -> list[RemoteFile | LoraError]:
    """What the hub and Civitai make of the same answer."""
    server.serve(HUB_PATH, body, **options)
    server.serve(VERSION_PATH, body, **options)
    web = web_of(server)
    calls: list[Callable[[], RemoteFile]] = [
        lambda: Hub("hf_canary", server.address, web).ask(HubFile("user/repo")),
        lambda: Civitai(web, server.address).ask(CivitaiFile(1, 2)),
    ]
    results: list[RemoteFile | LoraError] = []
    for call in calls:
        try:
            results.append(call())
        except LoraError as error:
            assert "canary" not in str(error)
            results.append(error)
    return results


def said(**fields: Any) -> bytes:
    """An answer that both hubs could give, with one file, in part replaced."""
    file = {"rfilename": "x.safetensors", "name": "x.safetensors", "id": 1, "type": "Model"}
    file |= {"downloadUrl": "http://127.0.0.1:9/x", **fields.pop("file", {})}
    whole = {"sha": "a" * 40, "modelId": 1, "siblings": [file], "files": [file], **fields}
    return json.dumps(whole).encode()


ODD = {
    "nothing": b"",
    "null": b"null",
    "a list": b"[]",
    "deep": DEEP,
    "deep within": b'{"siblings":' + DEEP + b',"files":' + DEEP + b"}",
    "no text": b"\xff\xfe",
    "a long number": b"9" * 5000,
    "a page": b"<html>log in</html>",
    "files of text": said(siblings="x", files="x"),
    "files of numbers": said(siblings=[1, None], files=[1, None]),
    "a table of files": said(siblings={"a": 1}, files={"a": 1}),
    "a name that is a number": said(file={"rfilename": 5, "name": 5}),
    "half a surrogate": said(file={"rfilename": "\ud800.safetensors", "name": "\ud800"}),
    "a name of a megabyte": said(file={"rfilename": "x" * 10**6, "name": "x" * 10**6}),
    "hashes of lists": said(file={"lfs": [], "hashes": ["x"], "metadata": "x"}),
    "a hash of a number": said(file={"lfs": {"sha256": 5}, "hashes": {"SHA256": 5}}),
    "a size of text": said(file={"size": "big"}),
    "a size below zero": said(file={"size": -5}),
    "a commit of a number": said(sha=5, modelId=[1]),
    "no URL": said(file={"downloadUrl": 5}),
}


@pytest.mark.parametrize("kind", ODD)
def test_odd_answers_of_hubs_are_read_or_refused(server: LoopbackServer, kind: str) -> None:
    for result in asked(server, ODD[kind]):
        if isinstance(result, LoraError):
            assert result.code in ("LORA_CORRUPT", "LORA_NOT_FOUND")
        else:
            assert result.size is None or result.size >= 0
            assert result.sha256 is None or len(result.sha256) == 64
            assert result.file_name.isprintable()


@pytest.mark.parametrize("status", [301, 302, 303, 307, 308])
def test_a_hub_cannot_send_us_to_another_private_host(
    server: LoopbackServer, other_server: LoopbackServer, status: int
) -> None:
    target = other_server.serve("/latest", b"{}")
    results = asked(server, b"", status=status, headers={"Location": target})
    assert [getattr(result, "code", None) for result in results] == ["LORA_SOURCE_INVALID"] * 2
    assert other_server.connections == 0


def test_no_proxy_of_the_environment_is_asked(
    server: LoopbackServer, other_server: LoopbackServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("HTTP_PROXY", "http_proxy", "HTTPS_PROXY", "https_proxy", "ALL_PROXY"):
        monkeypatch.setenv(name, other_server.address)
    for result in asked(server, said()):
        assert isinstance(result, RemoteFile)
    assert other_server.connections == 0


def test_an_answer_that_unpacks_to_more_than_the_limit_is_not_unpacked(
    server: LoopbackServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(asking, "MAX_ANSWER", 100_000)
    packed = gzip.compress(b" " * 50_000_000)
    for result in asked(server, packed, headers={"Content-Encoding": "gzip"}):
        assert isinstance(result, LoraError)
        assert result.code == "LORA_CORRUPT"


def test_an_answer_that_drips_is_given_up_at_its_deadline(
    server: LoopbackServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(asking, "ASK_TIMEOUT", 0.5)
    begun = time.monotonic()
    server.replies[HUB_PATH] = Reply(b"{" + b" " * 10_000, drip=0.05)
    hub = Hub(None, server.address, web_of(server))
    with pytest.raises(LoraError) as caught:
        hub.ask(HubFile("user/repo"))
    assert caught.value.code == "LORA_DOWNLOAD_FAILED"
    assert time.monotonic() - begun < 20


def test_a_hubs_password_is_sent_to_it_and_written_nowhere(
    server: LoopbackServer, tmp_path: Path
) -> None:
    server.serve_repo("user/repo", {"x.safetensors": b"x"})
    endpoint = server.address.replace("://", "://me:canary-password@")
    cache = make_cache(tmp_path, Limits(), WebRules(), hub=(endpoint, ""), civitai=("", ""))
    cache.shelf.fallback = None
    found = cache.resolve(Reference("user/repo")).location
    assert isinstance(found, RemoteFile)
    assert "canary" not in found.url
    assert server.headers[HUB_PATH]["Authorization"].startswith("Basic ")
    kept = [path.read_text() for path in (tmp_path / ".lookups").iterdir()]
    assert len(kept) == 1
    assert "canary" not in kept[0]
