"""Canaries in every setting, link and text of random requests, with every logger at DEBUG."""

from __future__ import annotations

import json
import logging
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from diffusers.utils import logging as of_diffusers
from transformers.utils import logging as of_transformers

from handler import Worker
from lora.fetch.web import quiet_libraries
from tests.adapters import as_bytes, kohya
from tests.promises.attackers.rounds import Rounds
from tests.server import LoopbackServer
from tests.test_handler import job
from tests.waiting import until
from tests.worker.pictures.test_inputs import png
from worker.opening import read_settings

CANARY, SAID = "canary", "nightingale"
"""In settings and links, which nobody may see; in texts, which stand in the answer but in no log or file."""

LINKS = (
    *("http://{canary}@127.0.0.1:{port}{path}", "http://u:{canary}@127.0.0.1:{port}{path}?x=1"),
    *(
        "http://127.0.0.1:{port}{path}?token={canary}",
        "http://127.0.0.1:{port}{path}?a=1&sig={canary}#x",
    ),
    *(
        "http://127.0.0.1:{port}{path}#{canary}",
        "http://127.0.0.1:{port}{path}?n=https://x&k={canary}",
    ),
    *(
        "ftp://u:{canary}@h{path}",
        "//u:{canary}@h{path}",
        "user/repo?token={canary}",
        "u:{canary}@h/f",
    ),
    *("http://127.0.0.1:9{path}?{canary}", "http://10.0.0.1{path}?{canary}", "http://[{canary}"),
    *(
        "https:/h{path}?token={canary}",
        "hf://user/repo{path}?token={canary}",
        "civitai:1?token={canary}",
    ),
)


@pytest.fixture
def heard(caplog: pytest.LogCaptureFixture) -> Iterator[pytest.LogCaptureFixture]:
    """Every logger at DEBUG, but for those that the worker's program quiets, as it does."""
    ours = [logging.getLogger(name) for name in ("transformers", "diffusers")]
    known = (*ours, *logging.root.manager.loggerDict.values())
    levels = {one: one.level for one in known if isinstance(one, logging.Logger)}
    caplog.set_level(logging.DEBUG)
    for logger in levels:
        logger.setLevel(logging.DEBUG)
    quiet_libraries()
    for library, logger in zip((of_transformers, of_diffusers), ours, strict=True):
        library.set_verbosity_debug()
        logger.addHandler(caplog.handler)
    yield caplog
    for logger in ours:
        logger.removeHandler(caplog.handler)
    for logger, level in levels.items():
        logger.setLevel(level)


def environment(server: LoopbackServer, cache: Path) -> dict[str, str]:
    """Canaries in every setting that may hold a secret, addresses with a user among them."""
    own = f"http://u:{CANARY}@127.0.0.1:{server.port}"
    return {
        "WORKER_MODEL": "demo",
        "WORKER_DEVICE": "cpu",
        "LORA_CACHE_DIR": str(cache),
        "LORA_ALLOW_PRIVATE_URLS": "1",
        "LORA_DOWNLOAD_TIMEOUT": "5",
        "LORA_PRELOAD": f"{own}/x.safetensors?token={CANARY}",
        "LORA_AUTH_HEADERS": json.dumps({"models.example.com": f"X-Key: {CANARY}"}),
        "HF_TOKEN": f"hf_{CANARY}",
        "HF_ENDPOINT": own,
        "CIVITAI_TOKEN": CANARY,
        "CIVITAI_ENDPOINT": own,
    }


def link(chance: random.Random, server: LoopbackServer) -> str:
    path = chance.choice(("/x.safetensors", "/x.png", "/none", "/page"))
    return chance.choice(LINKS).format(canary=CANARY, port=server.port, path=path)


def text(chance: random.Random) -> str:
    words = [
        SAID,
        f"({SAID}:1.2)",
        f"[{SAID}]",
        "BREAK",
        "a circle",
        ",",
        "\\(",
        f"<lora:{SAID}:1>",
    ]
    return " ".join(chance.choices(words, k=chance.choice((1, 3, 200))))


def request(chance: random.Random, server: LoopbackServer) -> dict[str, Any]:
    """A job or an action with links and texts in random fields, known and unknown."""
    url = link(chance, server)
    if chance.random() < 0.3:
        action = chance.choice(("loras.inspect", "loras.prefetch", "loras.delete", "loras.pin"))
        field = {"loras.inspect": "path", "loras.prefetch": "loras"}.get(action, "name")
        value: Any = [url] if field == "loras" else url
        return {"id": "job", "input": {"action": action, field: value}}
    fields: dict[str, Any] = {"prompt": text(chance), "num_inference_steps": 1}
    places: dict[str, Any] = {
        "loras": [chance.choice((url, {"path": url, "refresh": True}))],
        "image_url": url,
        "mask_url": url,
        "img_url": url,
        "width": url,
        "lora_selection": url,
        "negative_prompt": text(chance),
    }
    for name in chance.sample(list(places), chance.choice((0, 1, 1, 2))):
        fields[name] = places[name]
    made = job(**fields)
    if chance.random() < 0.1:
        keys = {"accessId": CANARY, "accessSecret": CANARY, "bucketName": "b"}
        made["s3Config"] = {**keys, "endpointUrl": url}
    return made


def test_no_canary_is_shown_logged_or_kept(
    rounds: Rounds,
    server: LoopbackServer,
    tmp_path: Path,
    heard: pytest.LogCaptureFixture,
    capfd: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("lora.fetch.download.random.uniform", lambda least, most: least / 100)
    server.serve("/x.safetensors", as_bytes(kohya()))
    server.serve("/x.png", png())
    server.serve("/page", f"<html>{CANARY}</html>".encode())
    folder = tmp_path / "loras"
    told: list[str] = []
    worker = Worker(
        read_settings(environment(server, folder)),
        lambda job, update: told.append(json.dumps({**update, "preview": None})),
    ).setup()
    until(lambda: "under way" not in worker.preloaded.values())
    told.append(json.dumps(worker.preloaded))
    for chance in rounds(30, 1500):
        asked = request(chance, server)
        answer = worker(asked)
        rounds.seen["errors" if "error" in answer else "answers"] += 1
        told.append(json.dumps({**answer, "images": None, "image_url": None}))
        shown = "\n".join(told)
        told.clear()
        printed = capfd.readouterr()
        logged = heard.text + printed.out + printed.err
        heard.clear()
        for path in [one for one in folder.rglob("*") if one.is_file()]:
            logged += str(path.relative_to(folder)) + path.read_bytes().decode("latin-1")
        leaks = [line for line in (shown + logged).splitlines() if CANARY in line.lower()]
        leaks += [line for line in logged.splitlines() if SAID in line.lower()]
        rounds.seen["canaries"] += len(leaks)
        rounds.seen["bytes searched"] += len(shown) + len(logged)
        assert leaks == [], asked
    assert rounds.seen["answers"]
    assert rounds.seen["errors"]
