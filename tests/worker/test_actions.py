"""Jobs that ask for something else than pictures, through the whole worker."""

from __future__ import annotations

import asyncio
import json
import threading
from typing import Any

import pytest

from handler import Worker
from tests.adapters import as_bytes, kohya
from tests.server import LoopbackServer
from tests.test_handler import job
from tests.waiting import PATIENCE


def ask(worker: Worker, action: str, **values: Any) -> dict[str, Any]:
    """The answer, the same by a plain call and in an event loop, as JSON holds it."""
    one = {"id": "action", "input": {"action": action, **values}}
    answer = worker(one)
    found: dict[str, Any] = json.loads(json.dumps(answer, allow_nan=False))
    return found


def test_health_tells_what_an_operator_asks(demo_worker: Worker) -> None:
    answer = ask(demo_worker, "health")
    assert answer["model"] == "demo"
    assert answer["device"] == "cpu"
    assert answer["cache"]["files"] >= 4
    assert answer["cache"]["trouble"] is None
    again = asyncio.run(demo_worker.handle({"id": "h", "input": {"action": "health"}}))
    for one in (answer, again):
        assert one["cache"].pop("free_gb") > 0  # others write to the disk, too
    assert answer == again


def test_the_list_has_every_file(demo_worker: Worker) -> None:
    demo_worker(job(loras=["demo-night"]))
    found = {one["name"]: one for one in ask(demo_worker, "loras.list")["loras"]}
    night = found["demo-night.safetensors"]
    assert {"demo-stripes.safetensors", "demo-outline.safetensors"} <= found.keys()
    assert night["sha256"]
    assert night["downloaded"] is None
    assert night["used"] > 0
    assert night["pinned"] is False


def test_what_is_prefetched_is_there_for_the_next_job(
    demo_worker: Worker, server: LoopbackServer
) -> None:
    url = server.serve("/pre.safetensors", as_bytes(kohya(seed=31)))
    answer = ask(demo_worker, "loras.prefetch", loras=[url, {"path": "demo-night"}])
    assert [one["origin"] for one in answer["loras"]] == ["downloaded", "cached"]
    assert [one["algorithm"] for one in answer["loras"]] == ["lora", "loha"]
    assert demo_worker(job(loras=[url]))["loras"][0]["origin"] == "cached"


@pytest.mark.parametrize("action", ["loras.prefetch", "loras.inspect"])
def test_an_action_that_fetches_tells_how_far_it_is(
    demo_worker: Worker, server: LoopbackServer, action: str
) -> None:
    gate, updates = threading.Event(), list[dict[str, Any]]()
    body = as_bytes(kohya(seed=33 + len(action)))
    url = server.serve(f"/{action}.safetensors", body, gate=gate, gate_after=len(body) // 2)
    given = {"action": action, **({"path": url} if "inspect" in action else {"loras": [url]})}

    async def scene() -> dict[str, Any]:
        told = asyncio.Event()

        async def post(update: dict[str, Any]) -> None:
            updates.append(update)
            told.set()

        asking = asyncio.create_task(demo_worker.handle({"id": action, "input": given}, post))
        await asyncio.wait_for(told.wait(), PATIENCE)
        assert 0 < updates[0]["fraction"] <= 0.5
        assert (updates[0]["phase"], updates[0]["text"][:18]) == (
            "downloading",
            "downloading 1 LoRA",
        )
        gate.set()
        return await asking

    assert "error" not in asyncio.run(scene())
    assert updates[-1]["fraction"] == 1.0


def test_a_file_is_inspected(demo_worker: Worker) -> None:
    answer = ask(demo_worker, "loras.inspect", path="demo-spiral")
    assert answer["modules"].keys() == {"unet", "text_encoder", "text_encoder_2"}
    assert answer["used_keys"] > 0
    assert answer["unused_keys"] == []


def test_an_alias_of_path_is_understood_with_a_warning(demo_worker: Worker) -> None:
    answer = ask(demo_worker, "loras.inspect", url="demo-spiral")
    assert answer["used_keys"] > 0
    assert answer["warnings"] == ["url was taken as path"]
    answer = ask(demo_worker, "loras.prefetch", loras=["demo-night", {"file": "demo-spiral"}])
    assert [lora["file"][:9] for lora in answer["loras"]] == ["demo-nigh", "demo-spir"]
    assert answer["warnings"] == ["loras[1].file was taken as path"]
    assert "warnings" not in ask(demo_worker, "loras.prefetch", loras=["demo-night"])


def test_a_file_is_pinned_unpinned_and_deleted(demo_worker: Worker, server: LoopbackServer) -> None:
    url = server.serve("/del.safetensors", as_bytes(kohya(seed=32)))
    name = ask(demo_worker, "loras.prefetch", loras=[url])["loras"][0]["file"]

    def pinned() -> bool:
        files = ask(demo_worker, "loras.list")["loras"]
        return next(bool(one["pinned"]) for one in files if one["name"] == name)

    assert ask(demo_worker, "loras.pin", name=name) == {"name": name, "pinned": True}
    assert pinned()
    ask(demo_worker, "loras.pin", name=name, pinned=False)
    assert not pinned()
    assert ask(demo_worker, "loras.delete", name=name) == {"deleted": name}
    root = demo_worker.parts.library.cache.shelf.root
    assert not [path for path in root.iterdir() if path.name.startswith(name)]
    assert ask(demo_worker, "loras.delete", name=name)["error"].startswith("LORA_NOT_FOUND: ")


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"action": "loras.lst"}, "action must be one of health, loras.list"),
        ({"action": None}, "action must be one of"),
        ({"action": "health", "x": 1}, "x is not a field"),
        ({"action": "loras.delete"}, "name is required"),
        ({"action": "loras.delete", "name": 5}, "name: 5 is not a string"),
        ({"action": "loras.delete", "name": "../../x"}, "LORA_NOT_FOUND"),
        ({"action": "loras.prefetch", "loras": []}, "loras"),
        ({"action": "loras.prefetch", "loras": [5, {"path": "x", "y": 1}]}, "loras[0] names no"),
        (
            {"action": "loras.prefetch", "loras": [{"path": "x", "strength": 1}, {"url": 5}]},
            "loras[0].strength is not a field (leave it out); loras[1].path: 5 is not a string",
        ),
        (
            {"action": "loras.inspect", "path": "x", "lora": "y"},
            "lora means path, which is given too",
        ),
        ({"action": "loras.inspect", "path": "no-such"}, "LORA_NOT_FOUND"),
    ],
    ids=str,
)
def test_bad_actions_are_refused(demo_worker: Worker, values: dict[str, Any], said: str) -> None:
    answer = demo_worker({"id": "bad", "input": values})
    assert said in answer["error"]


@pytest.mark.parametrize("action", [[], {}, 7, None, "loras.lisst"])
def test_an_action_that_is_none_is_refused_with_the_names(
    demo_worker: Worker, action: object
) -> None:
    answer = demo_worker({"id": "x", "input": {"action": action}})
    assert answer["error"].startswith("INVALID_INPUT: action must be one of health, loras.list")
