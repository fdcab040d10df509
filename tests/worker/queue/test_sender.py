"""Progress on its way to the platform, with the SDK's own post replaced."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
from runpod.serverless.modules import rp_http, worker_state

from tests.waiting import PATIENCE
from worker.queue import sender as sender_module
from worker.queue.sender import to_platform


@pytest.fixture
def posted(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """What reached the platform; each post takes a moment, the first the longest, and is waited for."""
    found: list[Any] = []

    async def send_result(session: object, data: dict[str, Any], job: dict[str, Any]) -> None:
        await asyncio.sleep(0.05 if found else 0.1)
        found.append((job["id"], data["status"], data["output"]["n"]))

    monkeypatch.setattr(worker_state, "IS_LOCAL_TEST", False)
    monkeypatch.setattr(rp_http, "send_result", send_result)
    monkeypatch.setattr(sender_module, "DRAIN", PATIENCE)
    return found


def test_updates_arrive_in_order_and_before_the_block_ends(posted: list[Any]) -> None:
    async def work() -> None:
        async with to_platform({"id": "a"}) as sender:
            for n in range(20):
                await asyncio.to_thread(sender.send, {"n": n})
                await asyncio.sleep(0.02)
        posted.append("answer")
        sender.send({"n": 99})
        await asyncio.sleep(0.15)  # time for it to arrive, if it were sent

    asyncio.run(work())
    assert posted[-1] == "answer"
    numbers = [n for _, _, n in posted[:-1]]
    assert numbers == sorted(set(numbers))
    assert numbers[-1] == 19
    assert {(name, status) for name, status, _ in posted[:-1]} == {("a", "IN_PROGRESS")}


def test_a_platform_that_does_not_answer_does_not_hold_the_answer_up(
    posted: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    async def stuck(*_: object) -> None:
        await asyncio.Event().wait()

    monkeypatch.setattr(rp_http, "send_result", stuck)
    monkeypatch.setattr(sender_module, "DRAIN", 0.1)

    async def work() -> None:
        async with to_platform({"id": "a"}) as sender:
            sender.send({"n": 1})
            await asyncio.sleep(0.01)

    asyncio.run(asyncio.wait_for(work(), PATIENCE))
    assert posted == []


def test_outside_of_the_platform_nothing_is_sent(
    posted: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(worker_state, "IS_LOCAL_TEST", True)

    async def work() -> None:
        async with to_platform({"id": "a"}) as sender:
            sender.send({"n": 1})

    asyncio.run(work())
    assert posted == []
