"""A canary in every secret: it must reach the server that it is for, and nothing else.

One worker with a canary in each token serves jobs that succeed and jobs that fail in every way, whose URLs
carry canaries too. Then all that it ever said or wrote is searched.
"""

from __future__ import annotations

import base64
import json
import logging
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import pytest

from handler import Worker
from lora.fetch.web import quiet_libraries
from settings import Settings
from tests.adapters import as_bytes, kohya
from tests.server import LoopbackServer, Reply
from tests.test_handler import job
from tests.waiting import until
from tests.worker.pictures.test_inputs import png
from worker.opening import read_settings

CANARY = "canary"
KEY_ID = "canary-key-id"
"""It names who signed, so it stands in the URLs of uploaded pictures, and only there."""
USER = "me:canary-password"
QUERY = "?token=canary-query&X-Amz-Signature=canary-signature#canary-fragment"
ENCODED = base64.b64encode(USER.encode()).decode()

TOKENS = {
    "HF_TOKEN": "hf_canary",
    "CIVITAI_TOKEN": "civitai-canary",
    "BUCKET_ACCESS_KEY_ID": KEY_ID,
    "BUCKET_SECRET_ACCESS_KEY": "canary-secret-key",
}
ADAPTER = as_bytes(kohya())
HTML = b"<!DOCTYPE html><html>Please log in</html>"
TOLD = b"<!DOCTYPE html><html>You asked with canary</html>"


@dataclass(frozen=True)
class Site:
    """The servers that the worker asks, each of its own origin."""

    hub: LoopbackServer
    civitai: LoopbackServer
    models: LoopbackServer
    """A host with an entry in LORA_AUTH_HEADERS."""
    store: LoopbackServer
    """A host that no token is for; and the bucket."""

    def url(self, path: str, reply: Reply) -> str:
        """A URL of the store with canaries wherever one may be."""
        self.store.replies[path] = reply
        return f"http://{USER}@127.0.0.1:{self.store.port}{path}{QUERY}"

    @property
    def environment(self) -> dict[str, str]:
        """Every secret setting, and where the servers are."""
        preload = ["/preloaded.safetensors", "/gone.safetensors"]
        return {
            **TOKENS,
            "LORA_AUTH_HEADERS": json.dumps({self.models.address: "X-Key: models-canary"}),
            "WORKER_API_KEY": "canary-api-key",
            "LORA_ALLOWED_HOSTS": "127.0.0.1,localhost",
            "LORA_ALLOW_PRIVATE_URLS": "1",
            "LORA_DOWNLOAD_TIMEOUT": "5",
            "LORA_PRELOAD": ",".join(self.url(path, Reply(ADAPTER)) for path in preload),
            "HF_ENDPOINT": self.hub.address,
            "CIVITAI_ENDPOINT": self.civitai.address,
            "BUCKET_ENDPOINT_URL": self.store.address,
            "BUCKET_NAME": "pictures",
            "WORKER_MODEL": "demo",
            "WORKER_DEVICE": "cpu",
        }


@pytest.fixture
def site() -> Iterator[Site]:
    with ExitStack() as stack:
        servers = [stack.enter_context(LoopbackServer(keep_alive=True)) for _ in range(4)]
        made = Site(*servers)
        _fill(made)
        yield made


def _fill(site: Site) -> None:
    """What is there for the jobs that succeed."""
    site.store.serve_bucket("pictures")
    signed = site.url("/signed", Reply(ADAPTER))
    site.store.serve("/login", HTML)
    site.models.serve("/m.safetensors", ADAPTER)
    site.models.serve("/away.safetensors", to=signed)
    site.hub.serve_repo("user/repo", {"style.safetensors": ADAPTER})
    site.hub.replies[f"/user/repo/resolve/{'c' * 40}/style.safetensors"] = Reply(to=signed)
    gated = {"X-Error-Code": "GatedRepo"}
    site.hub.serve("/api/models/user/gated", status=403, headers=gated, body=b"canary")
    missing = {"X-Error-Code": "RepoNotFound"}
    site.hub.serve("/api/models/user/private", status=401, headers=missing, body=b"canary")
    site.hub.serve("/api/models/user/broken", status=500, body=b"canary")
    file = {"id": 1, "name": "c.safetensors", "type": "Model"}
    file["downloadUrl"] = site.civitai.serve("/api/download/models/3", to=signed, status=307)
    site.civitai.serve_json("/api/v1/models/12", {"id": 12, "modelVersions": [{"id": 3}]})
    about = {"id": 3, "modelId": 12, "files": [file]}
    site.civitai.serve_json("/api/v1/model-versions/3", about)
    site.civitai.serve("/api/v1/models/13", status=403, body=b"canary")
    site.civitai.serve("/api/v1/models/14", b"canary, not JSON")


def _malformed() -> Reply:
    """A whole file behind a head that libraries warn of."""
    length = b"Content-Length: %d\r\n" % len(ADAPTER)
    return Reply(raw=b"HTTP/1.1 200 OK\r\n" + length + b"no header at all\r\n\r\n" + ADAPTER)


Make = Callable[[Site], Any]

GOOD: dict[str, Make] = {
    "url": lambda s: job(loras=[s.url("/a.safetensors", Reply(ADAPTER, etag='"1"'))]),
    "again": lambda s: job(loras=[s.url("/a.safetensors", Reply(ADAPTER, etag='"1"'))]),
    "fresh": lambda s: job(
        loras=[{"path": s.url("/a.safetensors", Reply(ADAPTER, etag='"1"')), "refresh": True}]
    ),
    "resumed": lambda s: job(
        loras=[
            s.url(
                "/cut.safetensors",
                Reply(ADAPTER, first=[Reply(ADAPTER, cut_after=99)], etag='"1"', ranges=True),
            )
        ]
    ),
    "malformed head": lambda s: job(loras=[s.url("/malformed.safetensors", _malformed())]),
    "no host's token": lambda s: job(loras=[s.models.url("/m.safetensors" + QUERY)]),
    "redirect": lambda s: job(loras=[s.models.url("/away.safetensors" + QUERY)]),
    "hub": lambda s: job(loras=["user/repo"]),
    "civitai": lambda s: job(loras=["civitai:12"]),
    "civitai's link": lambda s: job(
        loras=[{"path": f"{s.civitai.address}/models/12?token=link-canary", "refresh": True}]
    ),
    "picture": lambda s: job(image_url=s.url("/p.png", Reply(png())), strength=1),
}


def bad_lora(reply: Reply, **entry: Any) -> Make:
    """Asked for anew, unless the entry says otherwise: a refusal is remembered."""
    about = {"refresh": True, **entry}
    return lambda s: job(loras=[{"path": s.url("/bad.safetensors", reply), **about}])


def bad_path(path: str) -> Make:
    return lambda s: job(loras=[path])


def bad_picture(reply: Reply) -> Make:
    return lambda s: job(image_url=s.url("/bad.png", reply))


BAD: dict[str, tuple[str, Make]] = {
    "404": ("LORA_NOT_FOUND", bad_lora(Reply(status=404))),
    "404 that is remembered": ("LORA_NOT_FOUND", bad_lora(Reply(status=404), refresh=False)),
    "403": ("LORA_ACCESS_DENIED", bad_lora(Reply(TOLD, 403))),
    "500": ("LORA_DOWNLOAD_FAILED", bad_lora(Reply(TOLD, 500))),
    "418": ("LORA_DOWNLOAD_FAILED", bad_lora(Reply(TOLD, 418))),
    "web page": ("LORA_CORRUPT", bad_lora(Reply(HTML))),
    "half a file": ("LORA_CORRUPT", bad_lora(Reply(ADAPTER[:-9]))),
    "hash": ("LORA_CORRUPT", bad_lora(Reply(ADAPTER), sha256="0" * 64)),
    "cut": ("LORA_DOWNLOAD_FAILED", bad_lora(Reply(ADAPTER, cut_after=9))),
    "no HTTP": ("LORA_DOWNLOAD_FAILED", bad_lora(Reply(raw=b"canary\r\n"))),
    "login": ("LORA_ACCESS_DENIED", bad_lora(Reply(to="/login" + QUERY))),
    "circle": ("LORA_DOWNLOAD_FAILED", bad_lora(Reply(to="/bad.safetensors" + QUERY))),
    "away": ("LORA_SOURCE_INVALID", bad_lora(Reply(to=f"http://{USER}@10.0.0.1/x{QUERY}"))),
    "file": ("LORA_SOURCE_INVALID", bad_lora(Reply(to=f"file://{USER}/x{QUERY}"))),
    "nonsense": ("LORA_SOURCE_INVALID", bad_lora(Reply(to=f"http://[{USER}/x{QUERY}"))),
    "host": ("LORA_SOURCE_INVALID", bad_path(f"http://{USER}@10.0.0.1/x{QUERY}")),
    "port": ("LORA_SOURCE_INVALID", bad_path(f"http://{USER}@127.0.0.1:99999/x{QUERY}")),
    "nobody": ("LORA_DOWNLOAD_FAILED", bad_path(f"http://{USER}@127.0.0.1:9/x{QUERY}")),
    "scheme": ("LORA_SOURCE_INVALID", bad_path(f"ftp://{USER}@h.example/x{QUERY}")),
    "bracket": ("LORA_SOURCE_INVALID", bad_path(f"https://{USER}@[h/x{QUERY}")),
    "typing error": ("LORA_SOURCE_INVALID", bad_path(f"https//h.example/x{QUERY}")),
    "user": ("LORA_SOURCE_INVALID", bad_path(f"{USER}@h.example/x.safetensors")),
    "repo's query": ("LORA_SOURCE_INVALID", bad_path(f"user/repo{QUERY}")),
    "civitai's query": ("LORA_SOURCE_INVALID", bad_path(f"civitai:12{QUERY}")),
    "civitai's link": (
        "LORA_SOURCE_INVALID",
        lambda s: job(loras=[f"{s.civitai.address}/models/12?other=canary&token=canary"]),
    ),
    "gated": ("LORA_ACCESS_DENIED", bad_path("user/gated")),
    "private": ("LORA_NOT_FOUND", bad_path("user/private")),
    "no repo": ("LORA_NOT_FOUND", bad_path("user/none")),
    "broken hub": ("LORA_DOWNLOAD_FAILED", bad_path("user/broken")),
    "civitai refuses": ("LORA_ACCESS_DENIED", bad_path("civitai:13")),
    "civitai is broken": ("LORA_CORRUPT", bad_path("civitai:14")),
    "no token's host": ("LORA_NOT_FOUND", lambda s: job(loras=[s.models.url("/no" + QUERY)])),
    "no picture": ("INVALID_INPUT", bad_picture(Reply(HTML))),
    "picture 404": ("INVALID_INPUT", bad_picture(Reply(TOLD, 404))),
    "picture cut": ("INVALID_INPUT", bad_picture(Reply(png() * 9, cut_after=9))),
    "picture away": ("INVALID_INPUT", bad_picture(Reply(to=f"http://{USER}@10.0.0.1/{QUERY}"))),
    "picture circle": ("INVALID_INPUT", bad_picture(Reply(to="/bad.png" + QUERY))),
    "picture's host": ("INVALID_INPUT", lambda s: job(image_url=f"http://{USER}@10.0.0.1/{QUERY}")),
    "picture's scheme": ("INVALID_INPUT", lambda s: job(image_url=f"ftp://{USER}@h/{QUERY}")),
    "picture's URI": ("INVALID_INPUT", lambda s: job(image_url="data:image/png;base64,canary=")),
    "wrong field": ("INVALID_INPUT", lambda s: job(img_url=f"https://{USER}@h/{QUERY}")),
    "wrong value": ("INVALID_INPUT", lambda s: job(width=f"https://{USER}@h/{QUERY}")),
    "wrong scale": ("INVALID_INPUT", bad_lora(Reply(), scale=f"https://{USER}@h/{QUERY}")),
    "wrong path": ("INVALID_INPUT", lambda s: job(loras=[{"path": {"url": "https://h/?canary"}}])),
    "wrong hash": ("INVALID_INPUT", bad_lora(Reply(), sha256=f"https://{USER}@h/{QUERY}")),
    "wrong job": ("INVALID_INPUT", lambda s: f"https://{USER}@h/{QUERY}"),
}


@dataclass
class Heard:
    """All that the worker says while it works; and what lay in its cache each time that it said something."""

    folder: Path
    texts: list[str] = field(default_factory=list)

    def update(self, job: object, update: dict[str, Any]) -> None:
        self.texts.append(json.dumps(update))
        self.look()

    def answer(self, answer: dict[str, Any]) -> None:
        """An answer, its URLs of uploaded pictures without the key's id."""
        self.texts.append(json.dumps(answer).replace(KEY_ID, ""))
        self.look()

    def look(self) -> None:
        """Names and contents of every file in the cache's folder."""
        for path in self.folder.rglob("*"):
            self.texts.append(str(path.relative_to(self.folder)))
            try:
                self.texts.append(path.read_bytes().decode("latin-1"))
            except OSError:
                continue  # a folder, or gone just now

    def assert_clean(self) -> None:
        lines = {line for text in self.texts for line in text.splitlines()}
        assert {line for line in lines if CANARY in line.lower() or ENCODED in line} == set()


@pytest.fixture
def quiet() -> Iterator[None]:
    """As `main` has it; afterwards as before."""
    known = logging.root.manager.loggerDict.values()
    levels = {one: one.level for one in known if isinstance(one, logging.Logger)}
    quiet_libraries()
    yield
    for one, level in levels.items():
        one.setLevel(level)


@pytest.mark.usefixtures("quiet")
def test_no_secret_is_ever_shown_or_kept(
    site: Site,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    capfd: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("lora.fetch.download.random.uniform", lambda least, most: least / 100)
    caplog.set_level(logging.DEBUG)
    heard = Heard(tmp_path / "loras")
    environment = {**site.environment, "LORA_CACHE_DIR": str(heard.folder)}
    secret = {one.metadata["env"] for one in fields(Settings) if one.metadata["secret"]}
    assert {name for name in secret if CANARY in environment[name]} == secret
    site.store.replies["/gone.safetensors"] = Reply(status=404)
    worker = Worker(read_settings(environment), heard.update).setup()
    worker.check_fitness()
    for name, make in GOOD.items():
        answer = worker({**make(site), "id": "job"})
        assert "error" not in answer, (name, answer)
        assert all(KEY_ID in url for url in answer["images"]), "it is a presigned URL"
        heard.answer(answer)
    for name, (code, make) in BAD.items():
        answer = worker(make(site))
        assert answer.get("error", "no error").startswith(f"{code}: "), (name, answer)
        heard.answer(answer)
    site.store.close_buckets()
    answer = worker(job())
    assert answer["error"].startswith("UPLOAD_FAILED: ")
    heard.answer(answer)
    _wait_for(worker)
    heard.texts += [*worker.preloaded, *worker.preloaded.values()]
    heard.texts += [body.decode("latin-1") for body in site.store.stored.values()]
    printed = capfd.readouterr()
    heard.texts += [caplog.text, printed.out, printed.err]
    assert "LORA_NOT_FOUND" in caplog.text, "the log was searched"
    assert any("127.0.0.1" in text and '"sha256"' in text for text in heard.texts), (
        "so were records"
    )
    assert any("downloading" in text for text in heard.texts), "and updates"
    heard.assert_clean()
    _assert_sent_where_due(site)


def _wait_for(worker: Worker) -> None:
    """For the preload, which goes on in the background."""
    until(lambda: "under way" not in worker.preloaded.values())
    assert sorted(text[:14] for text in worker.preloaded.values()) == ["LORA_NOT_FOUND", "ready"]


def _assert_sent_where_due(site: Site) -> None:
    """Each server had its own token with every request, and no other; queries came through."""
    for server, header, token in (
        (site.hub, "authorization", "Bearer hf_canary"),
        (site.civitai, "authorization", "Bearer civitai-canary|Bearer link-canary"),
        (site.models, "x-key", "models-canary"),
    ):
        assert server.asked
        for asked in server.asked:
            sent = {name.lower(): value for name, value in asked.headers.items()}
            assert sent.pop(header) in token.split("|")
            assert CANARY not in str(sent)
    tried = [asked for asked in site.store.asked if asked.path.startswith("/pictures/")]
    assert {asked.method for asked in tried} == {"PUT", "GET"}
    gets = [asked for asked in site.store.asked if asked.method == "GET" and asked not in tried]
    assert {f"?{asked.query}" for asked in gets} == {QUERY.partition("#")[0]}
    assert {asked.headers.get("Authorization") for asked in gets} == {f"Basic {ENCODED}"}
    puts = [asked for asked in site.store.asked if asked.method == "PUT"]
    assert len(puts) == len(GOOD) + 1
    assert all(KEY_ID in asked.headers["Authorization"] for asked in puts)
    for asked in site.store.asked:
        told = str(asked.headers)
        assert not any(token in told for name, token in TOKENS.items() if token != KEY_ID)
        assert "models-canary" not in told


def test_the_search_finds_a_canary(tmp_path: Path) -> None:
    heard = Heard(tmp_path)
    heard.assert_clean()
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "record.json").write_text('{"source": "https://h/x?token=canary"}')
    heard.look()
    with pytest.raises(AssertionError):
        heard.assert_clean()
