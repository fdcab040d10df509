import hashlib
import json
from pathlib import Path
from typing import Any

import pytest

from lora.errors import LoraError, LoraIncompatible
from lora.fetch.civitai import Civitai
from lora.fetch.rules import WebRules, origin_of
from lora.fetch.sources import CivitaiFile, Reference
from lora.fetch.web import Web
from lora.volume.cache import Limits, VolumeCache
from tests.adapters import as_bytes, kohya
from tests.server import LoopbackServer, Reply

ADAPTER = as_bytes(kohya())


def file(number: int, name: str, body: bytes = ADAPTER, **more: Any) -> dict[str, Any]:
    """A file as Civitai lists it. `url` is filled in by `serve`."""
    sha256 = hashlib.sha256(body).hexdigest().upper()
    about = {"format": "SafeTensor" if name.endswith(".safetensors") else "PickleTensor"}
    found = {"id": number, "name": name, "type": "Model", "sizeKB": len(body) / 1024}
    return {**found, "metadata": about, "hashes": {"SHA256": sha256, "AutoV2": sha256[:10]}, **more}


def serve(
    server: LoopbackServer,
    model: int,
    versions: dict[int, list[dict[str, Any]]],
    bases: dict[int, str | None] = {},  # noqa: B006 - only read
) -> None:
    """Answers as Civitai does for a model; the newest version first. `bases`: other ones than SDXL's."""
    listed = [
        {"id": number, "name": f"v{number}", "baseModel": bases.get(number, "SDXL 1.0")}
        for number in versions
    ]
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
        "civitai:15": ("LORA_CORRUPT", "is not the JSON of its API"),
        "civitai:16": ("LORA_DOWNLOAD_FAILED", "HTTP 503"),
        "civitai:17": ("LORA_CORRUPT", "is not the JSON of its API"),
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


def test_what_a_link_says_of_the_file_is_held_to(
    cache: VolumeCache, server: LoopbackServer
) -> None:
    half = {"format": "SafeTensor", "fp": "fp16", "size": "pruned"}
    files = [
        file(1, "same.safetensors", primary=True, metadata={"format": "SafeTensor", "fp": "fp32"}),
        file(2, "same.safetensors", metadata=half),
        file(3, "notes.txt", type="Config", metadata={}),
        file(4, "plain.safetensors", metadata={"format": "SafeTensor", "fp": None}),
    ]
    serve(server, 12, {3: files})
    link = f"{server.address}/api/download/models/3"

    def identity(path: str, **options: str) -> str:
        place = cache.resolve(Reference(path, **options)).location  # type: ignore[arg-type]
        return str(getattr(place, "identity", "")).removeprefix("civitai:12@3/")

    assert identity("civitai:12") == "1"
    assert identity("civitai:12@3+2") == identity(f"{link}?fileId=2") == "2"
    assert identity("civitai:12@3+3") == "3", "a file that is named goes before the primary one"
    assert identity(f"{link}?fp=fp16") == identity(f"{link}?size=pruned&type=Model") == "2"
    assert identity(f"{link}?fileId=2", weight_name="same.safetensors") == "2"
    assert identity(f"{link}?fp=fp8") == "4", "Civitai says nothing of its precision"
    for path, options in (
        (f"{link}?fileId=9", {}),
        (f"{link}?fileId=2&fp=fp32", {}),
        (f"{link}?fileId=2", {"weight_name": "plain.safetensors"}),
        (f"{link}?type=VAE", {}),
        ("civitai:12@3+2.ckpt", {}),
    ):
        with pytest.raises(LoraError) as caught:
            identity(path, **options)
        assert "civitai:12@3 has no such file" in str(caught.value), path
    with pytest.raises(LoraError) as caught:
        identity("civitai:12@3", weight_name="same.safetensors")
    assert "by fileId in its link's query: 1 (same.safetensors), 2 (same" in str(caught.value)


def test_a_links_token_opens_what_it_is_for_and_is_kept_nowhere(
    cache: VolumeCache, server: LoopbackServer, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("DEBUG")
    serve(server, 12, {3: [file(31, "a.safetensors")]})
    link = f"{server.address}/api/download/models/3"
    download = "/api/download/models/3"
    with LoopbackServer() as store:
        elsewhere = VolumeCache(
            cache.shelf.root,
            Limits(tries=1),
            Web(WebRules(allow_private=True, tokens=cache.web.rules.tokens)),
            civitai=Civitai(Web(WebRules(allow_private=True)), server.address),
        )
        server.replies[download].to = store.serve("/bucket/a", ADAPTER)
        entry = elsewhere.get(elsewhere.resolve(Reference(f"{link}?token=link-secret")))
        assert "Authorization" not in store.headers["/bucket/a"]
    for path in ("/api/v1/model-versions/3", download):
        assert server.headers[path]["Authorization"] == "Bearer link-secret"
    assert all("link-secret" not in asked.path + asked.query for asked in server.asked)
    texts = [
        f"{path} {path.read_bytes()!r}" for path in cache.shelf.root.rglob("*") if path.is_file()
    ]
    assert entry.path.exists()
    assert not any("link-secret" in text for text in (*texts, caplog.text))


def test_a_refusal_of_one_token_is_not_another_tokens(
    cache: VolumeCache, server: LoopbackServer
) -> None:
    serve(server, 12, {3: [file(31, "a.safetensors")]})
    link = f"{server.address}/api/download/models/3"
    for path in ("/api/v1/model-versions/3", "/api/download/models/3"):
        well = server.replies[path]
        server.replies[path] = Reply(status=401)
        for _ in range(2):
            with pytest.raises(LoraError) as caught:
                cache.get(cache.resolve(Reference(f"{link}?token=wrong")))
            assert caught.value.code == "LORA_ACCESS_DENIED"
            assert "?token= in a link to Civitai" in str(caught.value)
        assert server.hits[path] == 1, "remembered"
        server.replies[path] = well
        cache.resolve(Reference(f"{link}?token=right"))
    assert cache.get(cache.resolve(Reference(f"{link}?token=right"))).path.exists()


@pytest.mark.parametrize(
    ("status", "body", "said"),
    [
        (403, {"error": "Early Access", "deadline": "2026-12-24T08:18:36Z"}, "until 2026-12-24"),
        (403, {"error": "Early Access", "message": "canary"}, "is in early access"),
        (401, {"message": "The creator of this asset requires you to be logged in"}, "a login"),
        (401, {"message": "The creator of this asset has disabled downloads on it"}, "disabled"),
        (403, {"error": "canary"}, "refuses access (HTTP 403)"),
    ],
)
def test_what_is_in_the_way_is_said(
    cache: VolumeCache, server: LoopbackServer, status: int, body: dict[str, str], said: str
) -> None:
    serve(server, 12, {3: [file(31, "a.safetensors")]})
    for path in ("/api/download/models/3", "/api/v1/models/12"):
        server.serve(path, json.dumps(body).encode(), status=status)
        with pytest.raises(LoraError) as caught:
            cache.get(cache.resolve(Reference("civitai:12", refresh=True)))
        assert caught.value.code == "LORA_ACCESS_DENIED"
        assert said in str(caught.value)
        assert "canary" not in str(caught.value)


@pytest.mark.parametrize(
    ("bases", "fitting"),
    [
        ({3: "Flux.1 D"}, ["civitai:12@2 (SDXL 1.0)", "civitai:12@1 (SDXL 1.0)"]),
        ({3: "Pony V7", 2: "Pony"}, ["civitai:12@2 (Pony)", "civitai:12@1 (SDXL 1.0)"]),
        ({3: "SD 1.5", 2: "SD 1.5", 1: "Illustrious"}, ["civitai:12@1 (Illustrious)"]),
        ({3: "ZImageTurbo", 2: "NoobAI", 1: None}, ["civitai:12@2 (NoobAI)"]),
        ({3: "Pony"}, None),
        ({3: "SDXL Lightning"}, None),
        ({3: "Other"}, None),
        ({3: None}, None),
        ({3: "Flux.1 D", 2: "Flux.1 S", 1: "Other"}, None),
    ],
)
def test_versions_that_fit_are_named_if_the_newest_does_not(
    tmp_path: Path,
    server: LoopbackServer,
    bases: dict[int, str | None],
    fitting: list[str] | None,
) -> None:
    serve(server, 12, {n: [file(n, f"{n}.safetensors")] for n in (3, 2, 1)}, bases)
    web = Web(WebRules(allow_private=True))
    newest = CivitaiFile(12, None)
    assert Civitai(web, server.address).ask(newest).file_name == "3.safetensors", "no family"
    civitai = Civitai(web, server.address, family="SDXL")
    assert civitai.ask(CivitaiFile(12, 3)).file_name == "3.safetensors", "it was named"
    if fitting is None:
        assert civitai.ask(newest).file_name == "3.safetensors"
        return
    with pytest.raises(LoraIncompatible) as caught:
        civitai.ask(newest)
    assert f"is for {bases[3]}, not for SDXL" in str(caught.value)
    assert caught.value.hint == f"Name one that fits: {', '.join(fitting)}."


@pytest.mark.parametrize("status", [429, 503])
def test_a_wait_that_civitai_asks_for_is_kept(
    tmp_path: Path, server: LoopbackServer, monkeypatch: pytest.MonkeyPatch, status: int
) -> None:
    made: list[float] = []
    monkeypatch.setattr("lora.volume.resolver.time.sleep", made.append)
    web = Web(WebRules(allow_private=True))
    cache = VolumeCache(tmp_path, Limits(timeout=60), web, civitai=Civitai(web, server.address))
    serve(server, 12, {3: [file(31, "a.safetensors")]})
    for path in ("/api/v1/models/12", "/api/v1/model-versions/3"):
        server.replies[path].first = [Reply(status=status, headers={"Retry-After": "9"})]
    cache.resolve(Reference("civitai:12"))
    assert made == [9.0, 9.0]
    server.serve("/api/v1/models/13", status=status, headers={"Retry-After": "99"})
    with pytest.raises(LoraError) as caught:
        cache.resolve(Reference("civitai:13"))
    assert made == [9.0, 9.0], "nobody waits for longer than a download may take"
    assert ("rate limit" in str(caught.value)) is (status == 429)
    assert "The server asks to wait 99 s." in str(caught.value)
