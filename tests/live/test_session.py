"""A session from its first message to its end, whatever the client does."""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections.abc import Awaitable, Callable
from typing import Any

import pytest
import torch

from handler import Worker
from live.session import Places, run
from live.wire import pack
from pipelines.live import LiveStream
from tests.adapters import as_bytes, kohya
from tests.live.streams import PROMPT, Client, frame, pixels, session, start
from tests.server import LoopbackServer
from tests.test_handler import job, pipeline_unchanged
from tests.waiting import PATIENCE

Scene = Callable[[], Awaitable[None]]


def play(worker: Worker, scene: Scene) -> None:
    """Runs it in an event loop; afterwards every weight is bit for bit what it was."""
    with pipeline_unchanged(worker):
        asyncio.run(scene())
    assert not worker.parts.drawing._line
    assert worker.parts.live.taken == 0


def names(message: Any) -> list[str]:
    return [lora["name"] for lora in message.about["loras"]]


def test_frames_come_back_under_what_they_ask_for(demo_worker: Worker) -> None:
    async def scene() -> None:
        async with session(demo_worker, steps=1) as client:
            answers = await client.frames(
                [
                    ({}, frame(0)),
                    ({"loras": ["demo-stripes"], "wait": True}, frame(0, "JPEG")),
                    ({"scales": {"demo-stripes": 0.25}}, frame(0, "WEBP")),
                    ({"prompt": "a small green square on a white background"}, frame(0)),
                    ({"lora_selection": "none", "loras": [], "prompt": PROMPT}, frame(0)),
                ]
            )
        assert [one.about["seq"] for one in answers] == [0, 1, 2, 3, 4]
        assert [names(one) for one in answers] == [[], *[["demo-stripes"]] * 3, []]
        assert answers[2].about["loras"] == [
            {"name": "demo-stripes", "scale": 0.25, "mode": "dynamic"}
        ]
        assert pixels(answers[0]) == pixels(answers[4])
        assert len({pixels(one) for one in answers}) == 4
        assert {"switch_ms", "ms", "seed", "presets"} <= answers[1].about.keys()

    play(demo_worker, scene)


def test_presets_are_loaded_ahead_and_bring_their_words(demo_worker: Worker) -> None:
    presets = demo_worker.parts.selection.presets
    presets.set("live-one", {"loras": ["demo-outline"], "trigger_words": ["outlined"]})
    presets.set("live-two", {"loras": [{"path": "demo-stripes", "scale": 0.5}]})

    async def scene() -> None:
        async with session(demo_worker, steps=1, presets=["live-one", "live-two"]) as client:
            first = await client.ask({"lora_selection": "live-one"}, frame(1))
            both = await client.ask({"lora_selection": ["live-one", "live-two"]}, frame(1))
            none = await client.ask({"lora_selection": "no such preset"}, frame(1))
        assert first.about["presets"] == ["live-one"] and "loading" not in first.about
        assert first.about["prompt"] == f"{PROMPT}, outlined"
        assert names(both) == ["demo-outline", "demo-stripes"]
        assert none.about["error"].startswith("LORA_NOT_FOUND: there is no preset")
        assert names(none) == names(both) and none.picture  # frames go on as before

    try:
        play(demo_worker, scene)
    finally:
        presets.delete("live-one")
        presets.delete("live-two")


def test_frames_go_on_while_a_lora_is_fetched(demo_worker: Worker, server: LoopbackServer) -> None:
    gate = threading.Event()
    url = server.serve("/beside.safetensors", as_bytes(kohya(seed=71)), gate=gate)

    async def scene() -> None:
        async with session(demo_worker, steps=1, loras=["demo-stripes"]) as client:
            before = await client.ask({}, frame(0))
            asked = await client.ask({"loras": [url]}, frame(0))
            meanwhile = await client.ask({}, frame(0))
            for one in (asked, meanwhile):
                assert one.about["loading"] is True and names(one) == ["demo-stripes"]
                assert pixels(one) == pixels(before)
            gate.set()
            async with asyncio.timeout(PATIENCE):
                while "loading" in (after := await client.ask({}, frame(0))).about:
                    pass
            assert names(after)[0].startswith("beside") and pixels(after) != pixels(before)

    play(demo_worker, scene)


def test_a_lora_that_cannot_be_had_is_told_and_the_old_ones_stay(
    demo_worker: Worker, server: LoopbackServer
) -> None:
    async def scene() -> None:
        async with session(demo_worker, steps=1, loras=["demo-stripes"]) as client:
            said = [await client.ask({"loras": [f"{server.url}/gone.safetensors"]}, frame(0))]
            async with asyncio.timeout(PATIENCE):
                while "error" not in said[-1].about:
                    said.append(await client.ask({}, frame(0)))
            assert said[-1].about["error"].startswith("LORA_NOT_FOUND")
            after = await client.ask({"scales": {"demo-stripes": 0.5}}, frame(0))
        assert {tuple(names(one)) for one in (*said, after)} == {("demo-stripes",)}
        assert "error" not in after.about and after.about["loras"][0]["scale"] == 0.5

    play(demo_worker, scene)


@pytest.mark.parametrize(
    ("data", "code"),
    [
        (b"", "INVALID_INPUT: the message is shorter"),
        ("{}no", "INVALID_INPUT: the message is no JSON"),
        (pack({"seq": 7, "colour": 1}, frame(0)), "INVALID_INPUT: colour is not a field"),
        (pack({"seq": 7}, b"\xff\xd8 no picture"), "INVALID_INPUT: the frame is no whole"),
        (pack({"seq": 7}, frame(0)[:90]), "INVALID_INPUT: the frame is no whole"),
        (pack({"seq": 7, "scales": {"who": 1}}, frame(0)), "INVALID_INPUT: scales: no LoRA"),
    ],
)
def test_a_bad_message_ends_no_session(demo_worker: Worker, data: Any, code: str) -> None:
    async def scene() -> None:
        async with session(demo_worker, steps=1) as client:
            client.say_raw(data)
            bad = await client.hear()
            good = await client.ask({"seq": 8}, frame(0))
        assert bad.about["error"].startswith(code)
        assert good.about["seq"] == 8 and good.picture and "error" not in good.about

    play(demo_worker, scene)


@pytest.mark.parametrize("stream_batch", [False, True])
def test_an_exception_in_a_step_costs_the_frames_under_way_alone(
    demo_worker: Worker, stream_batch: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, fails = LiveStream.step, threading.Event()

    def step(self: LiveStream, frames: Any) -> None:
        if fails.is_set():
            fails.clear()
            raise RuntimeError("secret words")
        real(self, frames)

    async def scene() -> None:
        monkeypatch.setattr(LiveStream, "step", step)
        async with session(
            demo_worker, stream_batch=stream_batch, loras=["demo-stripes"]
        ) as client:
            before = await client.ask({"seq": 1}, frame(0))
            fails.set()
            bad = await client.ask({"seq": 2}, frame(0))
            after = await client.ask({"seq": 3}, frame(0))
        assert bad.about["error"].startswith(
            "INTERNAL: the frame failed unexpectedly (RuntimeError)"
        )
        assert "secret" not in str(bad.about) and not bad.picture
        assert pixels(after) == pixels(before)

    play(demo_worker, scene)


def test_a_wrong_first_message_is_answered_and_the_next_one_begins(demo_worker: Worker) -> None:
    async def scene() -> None:
        client = Client(demo_worker)
        for about, code in (
            ({"steps": 99}, "INVALID_INPUT"),
            (start(loras=["no such lora"]), "LORA_NOT_FOUND"),
            (start(presets=["no such preset"]), "LORA_NOT_FOUND"),
        ):
            client.say(about)
            answer = (await client.hear()).about
            assert answer["type"] == "error" and answer["error"].startswith(code)
        client.say(start(steps=1))
        ready = (await client.hear()).about
        assert ready["type"] == "ready" and ready["in_flight"] == 2
        client.leave()
        await client.session

    play(demo_worker, scene)


def test_text_alone_draws_and_a_seed_changes_it(demo_worker: Worker) -> None:
    async def scene() -> None:
        async with session(demo_worker, source="text", steps=2) as client:
            one = await client.ask({"seq": 0})
            same = await client.ask({"seq": 1})
            other = await client.ask({"seq": 2, "seed": 5})
            refused = await client.ask({"seq": 3}, frame(0))
        assert pixels(one) == pixels(same) != pixels(other)
        assert other.about["seed"] == 5
        assert refused.about["error"].startswith("INVALID_INPUT: this session draws from text")

    play(demo_worker, scene)


def test_a_change_without_a_picture_holds_for_the_next_frame(demo_worker: Worker) -> None:
    async def scene() -> None:
        async with session(demo_worker, steps=1) as client:
            changed = await client.ask({"seq": 4, "loras": ["demo-stripes"]})
            assert changed.about["type"] == "changed" and changed.about["seq"] == 4
            async with asyncio.timeout(PATIENCE):
                while not names(after := await client.ask({}, frame(0))):
                    pass
            assert names(after) == ["demo-stripes"]

    play(demo_worker, scene)


def test_a_baked_stack_stays_for_the_session_and_leaves_with_it(demo_worker: Worker) -> None:
    async def scene() -> None:
        async with session(demo_worker, steps=1, loras=["demo-stripes"], bake=True) as client:
            one = await client.ask({}, frame(0))
            refused = await client.ask({"loras": []}, frame(0))
            words = await client.ask({"prompt": "a green square"}, frame(0))
        assert one.about["loras"][0]["mode"] == "baked"
        assert refused.about["error"].startswith(
            "INVALID_INPUT: the LoRAs of this session are baked"
        )
        assert pixels(refused) == pixels(one) != pixels(words)

    play(demo_worker, scene)


def test_equal_frames_are_skipped_until_something_changes(demo_worker: Worker) -> None:
    async def scene() -> None:
        async with session(demo_worker, steps=1, similar=0.9) as client:
            answers = await client.frames([({}, frame(0))] * 4)
            changed = await client.ask({"prompt": "a green square"}, frame(0))
        assert [one.about.get("skipped", False) for one in answers] == [False, True, True, True]
        assert changed.picture

    play(demo_worker, scene)


def test_more_frames_than_can_be_drawn_drop_all_but_the_newest(
    demo_worker: Worker, monkeypatch: pytest.MonkeyPatch
) -> None:
    gate, real = threading.Event(), LiveStream.step

    def step(self: LiveStream, frames: Any) -> None:
        gate.wait(PATIENCE)
        real(self, frames)

    async def scene() -> None:
        async with session(demo_worker, steps=1) as client:
            monkeypatch.setattr(LiveStream, "step", step)
            client.say({"seq": 0, "loras": ["demo-stripes"], "wait": True}, frame(0))
            while demo_worker.parts.drawing._line == demo_worker.parts.drawing._line.__class__():
                await asyncio.sleep(0)
            for seq in range(1, 6):
                client.say({"seq": seq}, frame(0))
            lost = [await client.hear() for _ in range(4)]
            gate.set()
            kept = [await client.hear() for _ in range(2)]
        assert [one.about["seq"] for one in lost] == [1, 2, 3, 4]
        assert all(one.about["dropped"] for one in lost)
        assert [one.about["seq"] for one in kept] == [0, 5]
        assert names(kept[1]) == ["demo-stripes"]  # what a lost frame changed holds

    play(demo_worker, scene)


def test_a_client_that_leaves_in_the_middle_costs_nothing_and_the_next_one_draws(
    demo_worker: Worker,
) -> None:
    async def scene() -> None:
        for options in ({}, {"stream_batch": True}, {"lora_mode": "merged"}, {"bake": True}):
            client = Client(demo_worker)
            client.say(start(loras=["demo-stripes"], **options))
            await client.hear()
            client.say({}, frame(0))
            client.say({}, frame(1))
            client.leave()  # without having read an answer
            await asyncio.wait_for(client.session, PATIENCE)
        async with session(demo_worker, steps=1) as after:
            assert (await after.ask({}, frame(0))).picture

    play(demo_worker, scene)


@pytest.mark.parametrize("end", ["killed", "bad frame", "failed step", "cancelled"])
@pytest.mark.parametrize("options", [{}, {"stream_batch": True}, {"lora_mode": "merged"}])
def test_the_next_session_draws_whatever_the_one_before_met(
    demo_worker: Worker, end: str, options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    real, fails = LiveStream.step, threading.Event()

    def step(self: LiveStream, frames: Any) -> None:
        if fails.is_set():
            raise RuntimeError
        real(self, frames)

    async def first() -> bytes:
        async with session(demo_worker) as client:
            return pixels(await client.ask({}, frame(0)))

    async def scene() -> None:
        monkeypatch.setattr(LiveStream, "step", step)
        calm = await first()
        client = Client(demo_worker)
        client.say(start(loras=["demo-stripes", "demo-night"], **options))
        assert (await client.hear()).about["type"] == "ready"
        if end == "failed step":
            fails.set()
        client.say({}, b"no picture" if end == "bad frame" else frame(1))
        if end in ("bad frame", "failed step"):
            assert "error" in (await client.hear()).about
        fails.clear()
        client.say({}, frame(2))  # under way at the end
        if end == "cancelled":  # as the server does at SIGTERM
            client.session.cancel()
        client.leave()
        with contextlib.suppress(asyncio.CancelledError):
            await asyncio.wait_for(client.session, PATIENCE)
        assert await first() == calm

    play(demo_worker, scene)


def test_a_worker_that_ends_cancels_the_session_in_order(demo_worker: Worker) -> None:
    async def scene() -> None:
        client = Client(demo_worker)
        client.say(start(loras=["demo-stripes"], lora_mode="merged"))
        await client.hear()
        client.say({}, frame(0))
        client.session.cancel()
        with pytest.raises(asyncio.CancelledError):
            await client.session

    play(demo_worker, scene)


def test_one_session_too_many_is_told_so(demo_worker: Worker) -> None:
    async def scene() -> None:
        async with session(demo_worker, steps=1):
            other = Client(demo_worker)
            answer = (await other.hear()).about
            assert answer["type"] == "end" and answer["error"].startswith("LIVE_BUSY")
            await other.session

    play(demo_worker, scene)


def test_a_session_ends_when_its_time_is_over(
    demo_worker: Worker, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def scene() -> None:
        object.__setattr__(demo_worker.parts.settings, "live_seconds", 0.05)
        client = Client(demo_worker)
        client.say(start(steps=1))
        said = [(await client.hear()).about]
        while said[-1]["type"] != "end":
            said.append((await client.hear()).about)
        assert said[-1]["reason"] == "its 0.05 seconds are over"
        await client.session

    try:
        play(demo_worker, scene)
    finally:
        object.__setattr__(demo_worker.parts.settings, "live_seconds", 300.0)


def test_jobs_and_sessions_share_the_model_frame_by_frame(demo_worker: Worker) -> None:
    request = job(loras=["demo-outline"], num_inference_steps=3)
    alone = demo_worker(request)["images"]

    async def scene() -> None:
        async with session(demo_worker, steps=1, loras=["demo-stripes"]) as client:
            before = await client.ask({}, frame(0))
            drawing = asyncio.create_task(demo_worker.handle({**request, "id": "beside"}))
            while not drawing.done():
                assert pixels(await client.ask({}, frame(0))) == pixels(before)
            assert (await drawing)["images"] == alone

    play(demo_worker, scene)


def test_the_monitor_tells_what_happens(demo_worker: Worker) -> None:
    async def scene() -> None:
        async with session(demo_worker, steps=1) as client:
            for number in range(3):
                await client.ask({}, frame(number))
            figures = await client.monitor()
            while figures["frames"].get("out", 0) < 3:
                figures = await client.monitor()
        assert figures["frames"]["in"] == 3
        assert {"frame", "switch", "queue"} == figures["ms"].keys()
        assert figures["ms"]["frame"]["p95"] >= figures["ms"]["frame"]["p50"] > 0
        assert figures["memory_mb"] > 50

    play(demo_worker, scene)


def test_memory_that_runs_out_ends_a_frame_not_the_session(
    demo_worker: Worker, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, fails = LiveStream.decode, threading.Event()

    def decode(self: LiveStream, latents: Any) -> Any:
        if fails.is_set():
            fails.clear()
            raise torch.OutOfMemoryError
        return real(self, latents)

    async def scene() -> None:
        monkeypatch.setattr(LiveStream, "decode", decode)
        async with session(demo_worker, steps=1, loras=["demo-stripes"]) as client:
            fails.set()
            bad = await client.ask({}, frame(0))
            good = await client.ask({}, frame(0))
        assert bad.about["error"].startswith("OUT_OF_MEMORY") and good.picture

    play(demo_worker, scene)


def test_places_are_given_back_however_a_session_ends() -> None:
    places = Places(1)
    with contextlib.suppress(KeyError), places.taking():
        raise KeyError
    with places.taking():
        assert places.taken == 1
    assert places.taken == 0


def test_a_client_that_is_gone_before_it_says_anything_is_no_error(demo_worker: Worker) -> None:
    async def scene() -> None:
        client = Client(demo_worker)
        client.leave()
        assert await client.session is None

    assert run.__doc__
    play(demo_worker, scene)
