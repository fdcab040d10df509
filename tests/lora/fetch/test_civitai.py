import hashlib
import json
from pathlib import Path
from typing import Any

import pytest

from lora.errors import LoraError
from lora.fetch.civitai import Civitai
from lora.fetch.rules import WebRules, origin_of
from lora.fetch.sources import Reference
from lora.fetch.web import Web
from lora.volume.cache import Limits, VolumeCache
from tests.adapters import as_bytes, kohya
from tests.server import LoopbackServer

ADAPTER = as_bytes(kohya())


def file(number: int, name: str, body: bytes = ADAPTER, **more: Any) -> dict[str, Any]:
    """A file as Civitai lists it. `url` is filled in by `serve`."""
    sha256 = hashlib.sha256(body).hexdigest().upper()
    about = {"format": "SafeTensor" if name.endswith(".safetensors") else "PickleTensor"}
    found = {"id": number, "name": name, "type": "Model", "sizeKB": len(body) / 1024}
    return {**found, "metadata": about, "hashes": {"SHA256": sha256, "AutoV2": sha256[:10]}, **more}


def serve(server: LoopbackServer, model: int, versions: dict[int, list[dict[str, Any]]]) -> None:
    """Answers as Civitai does for a model; the newest version first."""
    listed = [{"id": number, "name": f"v{number}"} for number in versions]
    _json(server, f"/api/v1/models/{model}", {"id": model, "modelVersions": listed})
    for version, files in versions.items():
        download = server.serve(f"/api/download/models/{version}", ADAPTER)
        own = [{"downloadUrl": download, **one} for one in files]
        about = {"id": version, "modelId": model, "baseModel": "SDXL 1.0", "files": own}
        _json(server, f"/api/v1/model-versions/{version}", about)


def _json(server: LoopbackServer, path: str, value: object) -> None:
    server.serve(path, json.dumps(value).encode(), headers={"Content-Type": "application/json"})


@pytest.fixture
def cache(tmp_path: Path, server: LoopbackServer) -> VolumeCache:
    token = ("Authorization", "Bearer civ_canary")
    origin = origin_of(server.address)
    web = Web(WebRules(own=frozenset({origin}), tokens={origin: token}))
    return VolumeCache(
        tmp_path,
        Limits(tries=1),
        web,
        civitai=Civitai(web, server.address),
    )


@pytest.mark.parametrize(
    ("reference", "version"),
    [
        ("civitai:12", 3),
        ("civitai:12@2", 2),
        ("urn:air:sdxl:lora:civitai:12@2", 2),
        ("SERVER/models/12", 3),
        ("SERVER/models/12/name?modelVersionId=2", 2),
        ("SERVER/api/download/models/2", 2),
    ],
)
def test_a_model_is_fetched_by_its_version(
    cache: VolumeCache, server: LoopbackServer, reference: str, version: int
) -> None:
    serve(server, 12, {3: [file(31, "new.safetensors")], 2: [file(21, "old.safetensors")]})
    entry = cache.get(cache.resolve(Reference(reference.replace("SERVER", server.address))))
    assert entry.path.read_bytes() == ADAPTER
    name = {2: "old", 3: "new"}[version]
    assert entry.name.startswith(f"{name}-")
    assert entry.record.source == f"civitai:12@{version}/{name}.safetensors"
    assert entry.record.origin_sha256 == hashlib.sha256(ADAPTER).hexdigest()
    asked = server.headers[f"/api/download/models/{version}"]
    assert asked["Authorization"] == "Bearer civ_canary"


def test_the_token_does_not_follow_a_redirect_to_the_store(
    cache: VolumeCache, server: LoopbackServer
) -> None:
    serve(server, 12, {3: [file(31, "a.safetensors")]})
    with LoopbackServer() as store:
        signed = store.serve("/bucket/a", ADAPTER) + "?X-Amz-Signature=canary"
        server.serve("/api/download/models/3", status=307, headers={"Location": signed})
        with pytest.raises(LoraError) as caught:
            cache.get(cache.resolve(Reference("civitai:12")))
        assert caught.value.code == "LORA_SOURCE_INVALID"  # a host of the own network
        assert not store.hits
        open_web = Web(WebRules(allow_private=True, tokens=cache.web.rules.tokens))
        other = VolumeCache(
            cache.shelf.root, None, open_web, civitai=Civitai(open_web, server.address)
        )
        entry = other.get(other.resolve(Reference("civitai:12")))
        assert entry.path.read_bytes() == ADAPTER
        assert "Authorization" not in store.headers["/bucket/a"]
        texts = [p.read_text() for p in cache.shelf.root.rglob("*.json")]
        assert texts
        assert not any("canary" in text for text in texts)


def test_the_file_is_chosen(cache: VolumeCache, server: LoopbackServer) -> None:
    files = [
        file(1, "lora.pt", primary=True),
        file(2, "lora.safetensors", metadata={"format": "SafeTensor", "fp": "fp16"}),
        file(3, "lora-full.safetensors", metadata={"format": "SafeTensor", "fp": "fp32"}),
        file(4, "training.zip", type="Training Data"),
    ]
    serve(server, 12, {3: files})
    shown = f"{server.address}/api/download/models/3"

    def chosen(path: str, **options: str) -> str:
        place = cache.resolve(Reference(path, refresh=True, **options)).location  # type: ignore[arg-type]
        return str(getattr(place, "file_name", ""))

    assert chosen("civitai:12", weight_name="lora.safetensors") == "lora.safetensors"
    assert chosen(f"{shown}?type=Model&format=SafeTensor&fp=fp32") == "lora-full.safetensors"
    assert chosen(f"{shown}?format=PickleTensor") == "lora.pt"
    with pytest.raises(LoraError) as caught:
        chosen("civitai:12")
    assert "has several such files" in str(caught.value)
    assert "lora-full.safetensors, lora.pt, lora.safetensors" in str(caught.value)


def test_faults_of_civitai_have_their_codes(cache: VolumeCache, server: LoopbackServer) -> None:
    serve(server, 12, {3: [file(31, "a.safetensors")]})
    serve(server, 13, {})
    server.serve("/api/v1/models/14", status=401)
    server.serve("/api/v1/models/15", b"<html>")
    server.serve("/api/v1/models/16", status=503)
    server.serve("/api/v1/models/17", b"[]")
    cases = {
        "civitai:11": ("LORA_NOT_FOUND", "does not exist on Civitai"),
        "civitai:13": ("LORA_NOT_FOUND", "has no version"),
        "civitai:13@3": ("LORA_NOT_FOUND", "It is one of civitai:12."),
        "civitai:14": ("LORA_ACCESS_DENIED", "CIVITAI_TOKEN"),
        "civitai:15": ("LORA_CORRUPT", "is no JSON"),
        "civitai:16": ("LORA_DOWNLOAD_FAILED", "HTTP 503"),
        "civitai:17": ("LORA_CORRUPT", "no JSON object"),
    }
    for reference, (code, said) in cases.items():
        with pytest.raises(LoraError) as caught:
            cache.resolve(Reference(reference))
        assert caught.value.code == code, reference
        assert said in str(caught.value)
        assert "canary" not in str(caught.value)


def test_a_download_that_leads_to_a_login_page_is_denied(
    cache: VolumeCache, server: LoopbackServer
) -> None:
    serve(server, 12, {3: [file(31, "a.safetensors")]})
    server.serve("/login", b"<!doctype html>")
    where = {"Location": "/login?returnUrl=/models/12"}
    server.serve("/api/download/models/3", status=307, headers=where)
    with pytest.raises(LoraError) as caught:
        cache.get(cache.resolve(Reference("civitai:12")))
    assert caught.value.code == "LORA_ACCESS_DENIED"


def test_other_bytes_than_civitai_hashed_are_refused(
    cache: VolumeCache, server: LoopbackServer
) -> None:
    serve(server, 12, {3: [file(31, "a.safetensors", body=b"other")]})
    with pytest.raises(LoraError) as caught:
        cache.get(cache.resolve(Reference("civitai:12")))
    assert caught.value.code == "LORA_CORRUPT"
