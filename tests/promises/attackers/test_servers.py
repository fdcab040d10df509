"""Servers that never end, and hubs that answer nonsense: every question ends, and no token leaves."""

from __future__ import annotations

import asyncio
import json
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import requests

from handler import Worker
from lora.errors import DownloadFailed, LoraError
from lora.fetch.civitai import Civitai
from lora.fetch.hub import Hub
from lora.fetch.rules import WebRules, origin_of
from lora.fetch.sources import CivitaiFile, HubFile, RemoteFile
from lora.fetch.web import Web
from tests.promises.attackers.rounds import Rounds, garbled
from tests.promises.attackers.stuck import StuckServer
from tests.server import LOOPBACK, LoopbackServer
from tests.test_handler import job
from tests.waiting import PATIENCE, until

SECONDS = 0.6
"""The deadline of what is asked of a server that never ends."""


@pytest.fixture
def stuck() -> Iterator[StuckServer]:
    with StuckServer() as running:
        yield running


def test_a_deadline_ends_an_answer_in_whatever_part_of_it(
    rounds: Rounds, stuck: StuckServer
) -> None:
    ended: dict[str, str] = {}

    def ask(name: str, url: str, stall: float) -> None:
        try:
            with LOOPBACK.open(url, stall=stall, deadline=time.monotonic() + SECONDS) as body:
                ended[name] = f"{len(body.read(1 << 20))} bytes"
        except requests.RequestException as error:
            ended[name] = type(error).__name__

    for chance in rounds(1, 60):
        ended.clear()
        threads = {
            name: threading.Thread(
                target=ask, args=(name, url, chance.choice((SECONDS / 3, PATIENCE))), daemon=True
            )
            for name, url in stuck.urls()
        }
        for thread in threads.values():
            thread.start()
        guard = time.monotonic() + PATIENCE
        for thread in threads.values():
            thread.join(max(0.0, guard - time.monotonic()))
        assert [name for name, thread in threads.items() if thread.is_alive()] == []
        assert ended.keys() == threads.keys()
        assert not [name for name, how in ended.items() if "bytes" in how], ended
        rounds.seen["answers that never end"] += len(ended)


def test_eight_jobs_at_servers_that_never_end_leave_room_for_the_ninth_and_for_health(
    rounds: Rounds, stuck: StuckServer, demo_worker: Worker, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("worker.pictures.inputs.TIMEOUT", 4.0)

    async def attack(urls: list[str]) -> tuple[list[Any], Any, Any]:
        soon = {"executionTimeout": 2000}
        jobs = [job(image_url=url, strength=1.0) for url in urls]
        held = await asyncio.gather(*(demo_worker.handle({**one, "policy": soon}) for one in jobs))
        ninth = demo_worker.handle({**job(), "id": f"ninth {urls}"})
        health = demo_worker.handle({"id": "health", "input": {"action": "health"}})
        async with asyncio.timeout(PATIENCE):
            return held, await ninth, await health

    for chance in rounds(1, 5):
        urls = chance.sample([url for _, url in stuck.urls()], 8)
        held, ninth, health = asyncio.run(attack(urls))
        assert [answer["error"].split(":")[0] for answer in held] == ["DEADLINE_EXCEEDED"] * 8
        assert "images" in ninth
        assert "cache" in health
        rounds.seen["jobs at stuck servers"] += len(held)
        rounds.seen["later answers in time"] += 2
    # Their threads, too, end by themselves, by the deadline of a picture.
    until(lambda: not demo_worker._left_behind)


def test_no_answer_of_a_hub_does_harm(server: LoopbackServer, rounds: Rounds) -> None:
    file = {"rfilename": "x.safetensors", "size": 5, "lfs": {"sha256": "a" * 64, "size": 5}}
    file |= {"name": "x.safetensors", "id": 3, "type": "Model", "hashes": {"SHA256": "a" * 64}}
    file |= {"downloadUrl": "http://127.0.0.1:9/x?token=canary"}
    sound = json.dumps({"sha": "c" * 40, "modelId": 1, "siblings": [file], "files": [file]})
    web = Web(WebRules(own=frozenset({origin_of(server.address)})))
    hub, civitai = Hub("hf_canary", server.address, web), Civitai(web, server.address)
    calls: tuple[Callable[[], RemoteFile], ...] = (
        lambda: hub.ask(HubFile("u/r")),
        lambda: civitai.ask(CivitaiFile(1, 2)),
    )
    with LoopbackServer() as inside:
        for chance in rounds(40, 1000):
            body = garbled(chance, sound.encode())
            status = chance.choice((200, 200, 200, 301, 302, 307, 401, 403, 404, 418, 503))
            headers = {"Location": inside.url("/latest")} if 300 <= status < 400 else {}
            for path in ("/api/models/u/r", "/api/v1/model-versions/2"):
                server.serve(path, body, status=status, headers=headers)
            for call in calls:
                try:
                    assert "canary" not in repr(call())
                except LoraError as error:
                    assert "canary" not in str(error)
                    rounds.seen["refused"] += 1
        rounds.seen["private connections"] = inside.connections
        assert inside.connections == 0
        assert all(asked.path.startswith("/api/") for asked in server.asked)


def test_a_hub_that_never_ends_is_asked_no_longer_than_its_time(
    rounds: Rounds, stuck: StuckServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("lora.fetch.asking.ASK_TIMEOUT", SECONDS)
    for chance in rounds(3, 60):
        _, address = chance.choice(list(stuck.urls()))
        with pytest.raises(DownloadFailed):
            Hub(None, address).ask(HubFile("u/r"))
