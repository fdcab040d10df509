"""A queue's job with frames: what is to come is said beforehand, and each frame is a piece."""

from __future__ import annotations

import asyncio
import base64
import inspect
import io
from typing import Any

import pytest
from PIL import Image

from handler import Worker
from tests.live.streams import PROMPT, as_file, picture
from tests.test_handler import job, pipeline_unchanged
from validation import InvalidInput
from worker.live_job import has_frames, parse_frames_job
from worker.live_serve import LiveWorker

BASE = {"prompt": PROMPT, "size": 64, "steps": 1, "seed": 1, "output_format": "png"}


def uri(number: int) -> str:
    return "data:image/png;base64," + base64.b64encode(as_file(picture(number))).decode()


def pieces(worker: Worker, *inputs: dict[str, Any]) -> list[list[dict[str, Any]]]:
    async def all_of_them() -> list[list[dict[str, Any]]]:
        live = LiveWorker(worker)

        async def one(number: int, given: dict[str, Any]) -> list[dict[str, Any]]:
            return [piece async for piece in live.handle({"id": f"live-{number}", "input": given})]

        return list(await asyncio.gather(*(one(*pair) for pair in enumerate(inputs))))

    return asyncio.run(all_of_them())


def pixels(piece: dict[str, Any]) -> bytes:
    head, data = piece["image"].split(",", 1)
    assert head == "data:image/png;base64"
    return Image.open(io.BytesIO(base64.b64decode(data))).convert("RGB").tobytes()


def names(piece: dict[str, Any]) -> list[str]:
    return [lora["name"] for lora in piece["loras"]]


def test_one_picture_with_a_schedule_of_looks(demo_worker: Worker) -> None:
    schedule = [
        {"loras": ["demo-stripes"]},
        {"scales": {"demo-stripes": 0.3}},
        {"at": 3, "loras": ["demo-outline"]},
    ]
    pieces(demo_worker, {**BASE, "schedule": [{}]})  # transformers hooks at an encoder's first call
    with pipeline_unchanged(demo_worker):
        ((*frames,),) = pieces(demo_worker, {**BASE, "image_url": uri(0), "schedule": schedule})
    assert [one["seq"] for one in frames] == [0, 1, 2, 3]
    assert [names(one) for one in frames] == [["demo-stripes"]] * 3 + [["demo-outline"]]
    assert [one["loras"][0]["scale"] for one in frames] == [1.0, 0.3, 0.3, 1.0]
    assert pixels(frames[1]) == pixels(frames[2])
    assert len({pixels(one) for one in frames}) == 3


def test_a_list_of_frames_and_a_bad_one_among_them(demo_worker: Worker) -> None:
    given = [uri(0), "data:image/png;base64,bm8=", uri(2)]
    (frames,) = pieces(demo_worker, {**BASE, "frames": given, "loras": ["demo-stripes"]})
    assert [one["seq"] for one in frames] == [0, 1, 2]
    assert frames[1]["error"].startswith("INVALID_INPUT: the frame is no whole")
    assert "image" in frames[0] and "image" in frames[2] and "image" not in frames[1]


def test_jobs_with_frames_wait_for_each_other_and_others_are_answered_as_ever(
    demo_worker: Worker,
) -> None:
    text = {**BASE, "schedule": [{}, {"seed": 2}]}
    plain = job()["input"]
    first, second, image = pieces(demo_worker, text, text, plain)
    assert [pixels(one) for one in first] == [pixels(one) for one in second]
    assert pixels(first[0]) != pixels(first[1])
    assert image[0]["images"] == demo_worker({"id": "x", "input": plain})["images"]


def test_too_many_megabytes_end_the_job_with_an_error(
    demo_worker: Worker, monkeypatch: pytest.MonkeyPatch
) -> None:
    object.__setattr__(demo_worker.settings, "max_answer_mb", 0.01)
    try:
        with pipeline_unchanged(demo_worker):
            (frames,) = pieces(demo_worker, {**BASE, "image_url": uri(0), "schedule": [{}] * 8})
    finally:
        object.__setattr__(demo_worker.settings, "max_answer_mb", 10.0)
    assert 0 < len(frames) < 8
    assert frames[-1]["error"].startswith("OUTPUT_TOO_LARGE")


def test_a_session_whose_time_is_over_ends_the_job(demo_worker: Worker) -> None:
    object.__setattr__(demo_worker.parts.settings, "live_seconds", 0.05)
    try:
        (frames,) = pieces(demo_worker, {**BASE, "image_url": uri(0), "schedule": [{}] * 50})
    finally:
        object.__setattr__(demo_worker.parts.settings, "live_seconds", 300.0)
    assert frames[-1]["error"].startswith("DEADLINE_EXCEEDED: the frames' session is over")


@pytest.mark.parametrize(
    ("given", "fault"),
    [
        ({"frames": ["x"], "image_url": "y"}, "image_url"),
        ({"frames": "not a list of texts", "schedule": [7]}, "schedule"),
        ({"schedule": [{"at": -1}]}, "at is no frame's number"),
        ({"schedule": [{"at": True}]}, "at is no frame's number"),
        ({"schedule": [{"colour": 1}]}, "colour is not a field"),
        ({"frames": ["x"], "schedule": [{"at": 4}]}, "there is no frame 4, only 1"),
        ({"schedule": [{}], "num_images": 2}, "num_images is not a field"),
    ],
)
def test_what_is_wrong_with_a_schedule_is_told(given: dict[str, Any], fault: str) -> None:
    with pytest.raises(InvalidInput, match=fault):
        parse_frames_job({"input": {**BASE, **given}})


def test_wrong_jobs_end_in_one_piece_with_an_error(demo_worker: Worker) -> None:
    wrong = [
        {**BASE, "schedule": [{"at": -1}]},
        {**BASE, "steps": 99, "schedule": [{}]},
        {**BASE, "loras": ["no such lora"], "schedule": [{}]},
    ]
    for (piece,), code in zip(
        pieces(demo_worker, *wrong), ("INVALID", "INVALID", "LORA_NOT_FOUND"), strict=True
    ):
        assert piece["error"].startswith(code)


def test_the_handler_is_what_the_sdk_takes_for_a_generator() -> None:
    assert inspect.isasyncgenfunction(LiveWorker.handle)
    assert has_frames({"input": {"frames": ["x"]}}) and has_frames({"input": {"schedule": [{}]}})
    assert not has_frames({"input": {"prompt": "x"}}) and not has_frames({})
