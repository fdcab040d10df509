"""What a drawing starts from, and what a job with it answers."""

from __future__ import annotations

import base64
from typing import Any

import numpy as np
import pytest
from PIL import Image

from handler import Worker
from pipelines.inpainting import Masked
from schemas import parse_job
from tests.server import LOOPBACK
from tests.test_handler import job, picture, pipeline_unchanged, pixels
from tests.worker.pictures.test_inputs import saved
from validation import InvalidInput
from worker.pictures import start
from worker.pictures.start import start_of

RANDOM = np.random.default_rng(4)


def noise(width: int, height: int) -> Image.Image:
    return Image.fromarray(RANDOM.integers(0, 256, (height, width, 3), dtype=np.uint8))


def hole(width: int, height: int) -> Image.Image:
    made = np.zeros((height, width), np.uint8)
    made[height // 4 : height // 2, width // 4 : width // 2] = 255
    return Image.fromarray(made)


def uri(made: Image.Image) -> str:
    return base64.b64encode(saved(made, "PNG")).decode()


def started(side: int = 64, **values: Any) -> tuple[Any, list[str]]:
    said: list[str] = []
    request = parse_job({"input": {"prompt": "x", **values}})
    return start_of(request, LOOPBACK, side, said.append), said


def test_without_a_picture_there_is_none() -> None:
    assert started() == (None, [])


def test_a_picture_near_the_models_size_is_left_alone() -> None:
    given = noise(96, 64)
    found, said = started(image_url=uri(given))
    np.testing.assert_array_equal(found, given)
    assert said == []


def test_a_picture_far_from_the_models_size_is_brought_to_it_and_the_answer_says_so() -> None:
    found, said = started(image_url=uri(noise(400, 200)))
    assert found.size == (88, 48)
    (sentence,) = said
    assert "the picture has 400x200 pixels and was drawn at 88x48" in sentence


def test_width_and_height_hold() -> None:
    found, said = started(image_url=uri(noise(400, 200)), width=48, height=72)
    assert (found.size, said) == ((48, 72), [])
    assert started(image_url=uri(noise(400, 200)), height=72)[0].size == (144, 72)


def test_a_mask_comes_with_its_picture_at_the_pictures_own_size() -> None:
    given = noise(300, 200)
    found, said = started(image_url=uri(given), mask_url=uri(hole(300, 200)), mask_blur=2)
    assert isinstance(found, Masked)
    np.testing.assert_array_equal(found.whole, given)
    np.testing.assert_array_equal(found.mask, hole(300, 200))
    assert (found.size, found.blur, said) == ((80, 56), 2, [])


def test_a_mask_of_another_size_is_resized() -> None:
    urls = {"image_url": uri(noise(120, 80)), "mask_url": uri(hole(60, 40))}
    found, said = started(**urls)
    assert abs(np.asarray(found.mask).astype(int) - np.asarray(hole(120, 80))).mean() < 10
    assert said == []
    _, said = started(image_url=uri(noise(120, 80)), mask_url=uri(hole(64, 64)))
    assert said == ["mask_url: the mask of 64x64 was stretched to 120x80 pixels"]


@pytest.mark.parametrize("mode", ["cover", "contain", "stretch"])
def test_a_mask_is_framed_as_its_picture(mode: str) -> None:
    """The picture is white where the mask is: so it must be afterwards."""
    white = hole(160, 80)
    urls = {"image_url": uri(white.convert("RGB")), "mask_url": uri(white)}
    found, _ = started(**urls, width=64, height=64, resize_mode=mode)
    same = (np.asarray(found.whole.convert("L")) >= 128) == (np.asarray(found.mask) > 0)
    assert same.mean() > 0.97
    assert found.whole.size == found.mask.size == found.size == (64, 64)


def test_a_large_picture_is_made_smaller_and_the_answer_says_so(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(start, "MAX_KEPT", 100 * 50)
    found, said = started(image_url=uri(noise(400, 200)), mask_url=uri(hole(400, 200)))
    assert found.whole.size == found.mask.size == (100, 50)
    assert "the picture of 400x200 pixels was made smaller, 100x50" in said[0]


def test_greys_count_as_the_nearer_of_black_and_white() -> None:
    ramp = Image.fromarray(np.arange(256, dtype=np.uint8).reshape(1, 256).repeat(64, 0))
    found, _ = started(256, image_url=uri(noise(256, 64)), mask_url=uri(ramp), width=256, height=64)
    assert (np.asarray(found.mask)[0] == 255 * (np.arange(256) >= 128)).all()


@pytest.mark.parametrize(("lightest", "said"), [(0, "0 of 255"), (1, "1 of 255"), (127, "127 of")])
def test_a_mask_without_white_is_refused(lightest: int, said: str) -> None:
    with pytest.raises(InvalidInput) as caught:
        started(image_url=uri(noise(64, 64)), mask_url=uri(Image.new("L", (64, 64), lightest)))
    assert f"nothing in the mask is white (its lightest pixel is {said}" in str(caught.value)


def test_a_job_within_a_mask_keeps_the_rest_bit_for_bit_with_a_lora_too(
    demo_worker: Worker,
) -> None:
    given, white = noise(200, 100), hole(200, 100)
    urls = {"image_url": uri(given), "mask_url": uri(white)}
    inside = np.asarray(white) > 0
    plain = pixels(demo_worker(job(**urls)))
    with pipeline_unchanged(demo_worker):
        with_lora = pixels(demo_worker(job(**urls, loras=["demo-stripes"])))
    for found in (plain, with_lora):
        np.testing.assert_array_equal(found[~inside], np.asarray(given)[~inside])
    assert (plain[inside] != with_lora[inside]).any()


def test_each_picture_has_its_own_seed_and_can_be_had_alone(demo_worker: Worker) -> None:
    lora = {"loras": [{"path": "demo-stripes", "start": 0.5}]}
    answer = demo_worker(job(**lora, num_images=3, seed_mode="each", seed=2**64 - 2))
    seeds = [2**64 - 2, 2**64 - 1, 0]
    assert (answer["seed"], answer["seeds"]) == (seeds[0], seeds)
    for index, seed in enumerate(seeds):
        alone = demo_worker(job(**lora, seed=seed))
        assert "seeds" not in alone
        np.testing.assert_array_equal(pixels(answer, index), pixels(alone))
        text = picture(answer, index).info["parameters"]
        assert text == picture(alone).info["parameters"]
        assert f"Seed: {seed}," in text


def test_one_seed_for_all_pictures_is_the_default(demo_worker: Worker) -> None:
    batch = demo_worker(job(num_images=2))
    assert "seeds" not in batch
    same = demo_worker(job(num_images=2, seed_mode="batch"))
    for index in range(2):
        np.testing.assert_array_equal(pixels(batch, index), pixels(same, index))
