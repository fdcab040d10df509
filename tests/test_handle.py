"""The worker in an event loop: jobs that overlap, jobs that are ended early."""

from __future__ import annotations

import asyncio
import threading
import uuid
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch

from handler import Worker
from tests.adapters import as_bytes, kohya
from tests.server import LoopbackServer
from tests.test_handler import job as same_job
from tests.test_handler import picture, pipeline_unchanged, pixels
from tests.waiting import PATIENCE, Clock, until
from worker.stop import Stop, seconds_for

LONG = 400
"""Steps that take longer than any of these tests."""


def job(**values: Any) -> dict[str, Any]:
    """Each with an id of its own, as the platform gives them."""
    return {**same_job(**values), "id": uuid.uuid4().hex}


def run(worker: Worker, *jobs: dict[str, Any]) -> list[dict[str, Any]]:
    async def all_of_them() -> list[dict[str, Any]]:
        return list(await asyncio.gather(*(worker.handle(one) for one in jobs)))

    return asyncio.run(all_of_them())


def test_an_event_loops_answer_is_a_plain_calls(demo_worker: Worker) -> None:
    plain = demo_worker(job(loras=["demo-stripes"]))
    (answer,) = run(demo_worker, job(loras=["demo-stripes"]))
    assert answer["images"] == plain["images"]
    assert answer.keys() == plain.keys()
    assert run(demo_worker, {"id": "x", "input": {}})[0] == demo_worker({"id": "x", "input": {}})


def test_many_at_once_are_drawn_one_by_one_without_a_trace(demo_worker: Worker) -> None:
    jobs = [
        job(loras=loras) for loras in ([], ["demo-stripes"], [], ["demo-night", "demo-outline"])
    ]
    alone = [demo_worker(one)["images"] for one in jobs]
    with pipeline_unchanged(demo_worker):
        assert [one["images"] for one in run(demo_worker, *jobs, *jobs)] == alone * 2


def test_a_download_overlaps_the_drawing(demo_worker: Worker, server: LoopbackServer) -> None:
    gate = threading.Event()
    url = server.serve("/slow-one.safetensors", as_bytes(kohya(seed=61)), gate=gate)

    async def both() -> tuple[dict[str, Any], dict[str, Any]]:
        first = asyncio.create_task(demo_worker.handle(job(loras=[url])))
        second = await demo_worker.handle(job())
        gate.set()  # not before: the other job was drawn without this one's file
        return await first, second

    slow, quick = asyncio.run(both())
    assert slow["loras"][0]["origin"] == "downloaded"
    assert picture(quick)


async def cancelled(
    worker: Worker, one: dict[str, Any], when: Callable[[], object]
) -> dict[str, Any]:
    """The answer of a job that is cancelled as soon as `when` holds."""
    task = asyncio.create_task(worker.handle(one))
    while not when():
        await asyncio.sleep(0.005)
    task.cancel()
    return await task


def test_a_job_that_is_cancelled_in_its_download_does_not_wait_for_it(
    demo_worker: Worker, server: LoopbackServer
) -> None:
    gate = threading.Event()
    url = server.serve("/cancelled.safetensors", as_bytes(kohya(seed=62)), gate=gate)
    answer = asyncio.run(
        cancelled(demo_worker, job(loras=[url]), lambda: server.hits["/cancelled.safetensors"])
    )
    gate.set()
    assert answer == {"error": "CANCELLED: the job was cancelled."}
    again = demo_worker(job(loras=[url]))  # the download went on, or was shared
    assert server.hits["/cancelled.safetensors"] == 1
    assert picture(again)


def cancel_in_download(
    worker: Worker, server: LoopbackServer, path: str, gate: threading.Event
) -> dict[str, Any]:
    """The answer of a job whose thread goes on until the gate is opened."""
    url = server.serve(path, as_bytes(kohya(seed=64)), gate=gate)
    return asyncio.run(cancelled(worker, job(loras=[url]), lambda: server.hits[path]))


def test_threads_that_are_left_behind_hold_up_no_other_job(
    demo_worker: Worker, server: LoopbackServer
) -> None:
    gate = threading.Event()
    for number in range(12):
        answer = cancel_in_download(demo_worker, server, f"/left-{number}.safetensors", gate)
        assert answer == {"error": "CANCELLED: the job was cancelled."}
    assert len(demo_worker._left_behind) == 12
    assert picture(run(demo_worker, job(loras=["demo-stripes"]))[0])
    assert run(demo_worker, {"id": "h", "input": {"action": "health"}})[0]["version"]
    gate.set()  # not before: none of them was waited for
    until(lambda: not demo_worker._left_behind)


def test_a_worker_with_too_many_of_them_asks_to_be_replaced(
    demo_worker: Worker, server: LoopbackServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("handler.LEFT_BEHIND", 2)
    gate = threading.Event()
    answers = [
        cancel_in_download(demo_worker, server, f"/many-{number}.safetensors", gate)
        for number in range(3)
    ]
    assert ["refresh_worker" in answer for answer in answers] == [False, False, True]
    assert answers[2]["error"] == "CANCELLED: the job was cancelled."
    gate.set()
    until(lambda: not demo_worker._left_behind)
    assert picture(run(demo_worker, job())[0])


def held_at_step(
    worker: Worker, number: int, release: threading.Event, patch: pytest.MonkeyPatch
) -> list[int]:
    """Lets every drawing wait at that step until `release` is set; the steps that were reached."""
    steps: list[int] = []
    generate = worker.parts.pipeline.generate

    def held(request: Any, route: Any, given: Any, timings: Any, on_step: Any) -> Any:
        def step(done: int, total: int, preview: Any) -> None:
            steps.append(done)
            if done == number:
                assert release.wait(PATIENCE)
            on_step(done, total, preview)

        return generate(request, route, given, timings, step)

    patch.setattr(worker.parts.pipeline, "generate", held)
    return steps


def test_a_job_that_is_cancelled_while_drawing_ends_at_the_next_step(
    demo_worker: Worker, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = pixels(demo_worker(job()))
    stopped, cancel = threading.Event(), Stop.cancel
    monkeypatch.setattr(Stop, "cancel", lambda stop: (cancel(stop), stopped.set()))
    with pipeline_unchanged(demo_worker), monkeypatch.context() as patch:
        steps = held_at_step(demo_worker, 3, stopped, patch)
        one = job(num_inference_steps=LONG, loras=["demo-stripes"])
        answer = asyncio.run(cancelled(demo_worker, one, lambda: 3 in steps))
    assert answer == {"error": "CANCELLED: the job was cancelled."}
    assert steps == [1, 2, 3]
    assert (pixels(demo_worker(job())) == plain).all()


def test_a_job_that_is_cancelled_before_its_turn_never_draws(
    demo_worker: Worker, monkeypatch: pytest.MonkeyPatch
) -> None:
    release = threading.Event()
    steps = held_at_step(demo_worker, 1, release, monkeypatch)

    async def two() -> list[dict[str, Any]]:
        first = asyncio.create_task(demo_worker.handle(job(num_inference_steps=2)))
        while not steps:
            await asyncio.sleep(0.005)
        answer = await cancelled(demo_worker, job(), demo_worker._drawing._work_queue.qsize)
        release.set()  # not before: the one that draws was not waited for
        return [answer, await first]

    answer, first = asyncio.run(two())
    assert answer["error"].startswith("CANCELLED: ")
    assert picture(first)
    assert steps == [1, 2]


def test_the_time_that_a_job_waits_for_anothers_drawing_is_not_its_own(
    demo_worker: Worker, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock, release = Clock(), threading.Event()
    monkeypatch.setattr("worker.stop.time", clock)
    steps = held_at_step(demo_worker, 1, release, monkeypatch)

    async def two() -> list[dict[str, Any]]:
        first = asyncio.create_task(demo_worker.handle(job(num_inference_steps=2)))
        while not steps:
            await asyncio.sleep(0.005)
        limited = {**job(), "policy": {"executionTimeout": 600_000}}
        second = asyncio.create_task(demo_worker.handle(limited))
        while not demo_worker._drawing._work_queue.qsize():
            await asyncio.sleep(0.005)
        clock.now += 3600
        release.set()
        return [await first, await second]

    assert all(picture(answer) for answer in asyncio.run(two()))
    assert demo_worker.intake.open


@pytest.mark.parametrize("where", ["in the drawing", "in the download"])
def test_a_job_whose_time_is_over_says_so(
    demo_worker: Worker, server: LoopbackServer, where: str
) -> None:
    gate, values = threading.Event(), {"num_inference_steps": LONG}
    if where == "in the download":
        url = server.serve("/late.safetensors", as_bytes(kohya(seed=63)), gate=gate)
        values = {"loras": [url]}
    with pipeline_unchanged(demo_worker):
        (answer,) = run(demo_worker, {**job(**values), "policy": {"executionTimeout": 1600}})
    gate.set()  # not before: the download was not waited for
    assert answer["error"].startswith("DEADLINE_EXCEEDED: the job was not done after 0.8 s.")


def test_the_deadline_holds_for_a_plain_call(demo_worker: Worker) -> None:
    answer = demo_worker({**job(num_inference_steps=LONG), "policy": {"executionTimeout": 1000}})
    assert answer["error"].startswith("DEADLINE_EXCEEDED: ")


def test_the_smaller_limit_counts() -> None:
    assert seconds_for({"policy": {"executionTimeout": 60_000}}, 0.0) == 55.0
    assert seconds_for({"policy": {"executionTimeout": 60_000}}, 20.0) == 20.0
    assert seconds_for({"policy": {"executionTimeout": 6_000}}, 0.0) == 3.0
    assert seconds_for({}, 0.0) is None
    for odd in (True, "9", -1, None):
        assert seconds_for({"policy": {"executionTimeout": odd}}, 9.0) == 9.0
    assert seconds_for({"policy": "odd"}, 9.0) == seconds_for("odd", 9.0) == 9.0


def test_memory_that_does_not_suffice_is_tried_once_more_with_less(
    demo_worker: Worker, monkeypatch: pytest.MonkeyPatch
) -> None:
    pipeline = demo_worker.parts.pipeline
    generate, vae, tries = pipeline.generate, pipeline._base.vae, []

    def short_at_first(*given: Any) -> Any:
        tries.append((vae.use_tiling, vae.use_slicing))
        if len(tries) == 1:
            raise torch.OutOfMemoryError("short")
        return generate(*given)

    monkeypatch.setattr(pipeline, "generate", short_at_first)
    with pipeline_unchanged(demo_worker):
        answer = demo_worker(job(loras=["demo-stripes"]))
    assert tries == [(False, False), (True, True)]
    assert (vae.use_tiling, vae.use_slicing) == (False, False)
    assert answer["warnings"] == ["memory was short: the pictures were decoded in tiles"]
    assert picture(answer)


def test_a_job_that_the_platform_asks_for_again_is_not_drawn_again(
    demo_worker: Worker, monkeypatch: pytest.MonkeyPatch
) -> None:
    one = job(loras=["demo-stripes"], seed=None)  # drawn again, it would be another picture
    (first,) = run(demo_worker, one)
    monkeypatch.setattr(demo_worker.parts.pipeline, "generate", None)
    assert run(demo_worker, one)[0] == first
    first.pop("images")  # as the SDK takes answers apart
    assert "images" in run(demo_worker, one)[0]
    assert run(demo_worker, {**one, "id": "another"})[0]["error"].startswith("INTERNAL")


def test_failures_are_not_kept(demo_worker: Worker, server: LoopbackServer) -> None:
    one = job(loras=[server.url("/later.safetensors")], strict_loras=True)
    assert run(demo_worker, one)[0]["error"].startswith("LORA_NOT_FOUND")
    server.serve("/later.safetensors", as_bytes(kohya(seed=77)))
    one["input"]["loras"] = [{"path": one["input"]["loras"][0], "refresh": True}]
    assert picture(run(demo_worker, one)[0])


def test_an_action_that_was_cancelled_before_its_turn_is_never_done(
    demo_worker: Worker, monkeypatch: pytest.MonkeyPatch
) -> None:
    gate = threading.Event()
    with ThreadPoolExecutor(1) as pool:
        monkeypatch.setattr(demo_worker, "_preparing", pool)
        pool.submit(gate.wait, PATIENCE)
        done: list[object] = []
        monkeypatch.setattr(demo_worker, "_acted", done.append)
        action = {"id": "x", "input": {"action": "loras.delete", "name": "demo-night"}}
        queued = pool._work_queue.qsize
        answer = asyncio.run(cancelled(demo_worker, action, lambda: queued() > 0))
        assert answer["error"].startswith("CANCELLED")
        gate.set()
    assert done == []
