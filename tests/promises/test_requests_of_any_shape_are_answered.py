"""Requests in the shapes that clients send get pictures, or one sentence that says what to send instead.

Half of the fields of each request are as they should be, the others in a shape that some client sends. Each
goes through the whole worker but for the drawing; a few are drawn, too.
"""

from __future__ import annotations

import base64
import random
from typing import Any

import pytest
from PIL import Image

from handler import Worker
from tests.test_handler import data_uri, picture

REQUESTS, DRAWN = 500, 12

PICTURE = data_uri()
BARE = PICTURE.partition(",")[2]

GOOD: dict[str, tuple[Any, ...]] = {
    "prompt": ("a big red circle", "a cat, (masterpiece)", "日本語 🔴"),
    "negative_prompt": ("blue", ""),
    "width": (64, 96),
    "height": (64, 72),
    "seed": (1, 2**32, -1),
    "scheduler": ("DDIM", "K_EULER", "UniPC"),
    "num_inference_steps": (1, 2),
    "guidance_scale": (7.5, 1, 0),
    "strength": (0.5, 1),
    "image_url": (PICTURE, None),
    "num_images": (1, 2),
    "output_format": ("png", "webp"),
    "loras": ([], ["demo-stripes"], [{"path": "demo-stripes", "scale": 0.5}]),
    "preview": (False, True),
    "seed_mode": ("batch", "each"),
    "resize_mode": ("cover", "contain"),
}

SHAPES: dict[str, tuple[Any, ...]] = {
    "prompt": (None, "", "  ", 5, ["a", "b"], {"text": "a"}, "a\x00b"),
    "negative_prompt": (None, " ", 0, []),
    "width": (None, "", "64", "64.0", 64.0, 100, "64px", 0, -64, True, [64], "1e2"),
    "height": (None, "", "72", 72.5, 10**9, "big"),
    "seed": (None, "", "-1", "7", 7.0, "random", 2**70, "1" * 50, False),
    "scheduler": (None, "", "k_euler", "Euler a", "DPM++ 2M", "foo", 3, []),
    "num_inference_steps": (None, "", "2", 2.0, 0, -1, 5000, "two", "2,5"),
    "guidance_scale": (None, "", "7.5", "-1", -3, "NaN", "1e9", True),
    "strength": (None, "", "0.5", 0, 2, "half"),
    "image_url": ("", " ", BARE, f"\n{PICTURE}\n", "cat.png", "file:///etc/passwd", [PICTURE], 1),
    "num_images": (None, "", "2", 0, 100, 1.5),
    "output_format": (None, "", "PNG", "jpg", "gif", 1),
    "loras": (None, "", {}, "demo-stripes", {"path": "demo-stripes"}, [""], [None], [["a"]], 0),
    "preview": (None, "", "true", "False", 1, 0, "yes"),
    "seed_mode": (None, "", "Each", "all"),
    "resize_mode": (None, "", "COVER", "crop"),
}

NAMES: dict[str, tuple[str, ...]] = {
    "num_inference_steps": ("steps", "numInferenceSteps", "NumInferenceSteps"),
    "guidance_scale": ("cfg_scale", "guidanceScale", "cfgScale"),
    "negative_prompt": ("negativePrompt", "negative-prompt"),
    "scheduler": ("sampler_name", "sampler"),
    "num_images": ("n", "batch_size", "numImages"),
    "image_url": ("image", "imageUrl", "init_image"),
    "output_format": ("outputFormat",),
}

EXTRA: tuple[tuple[str, Any], ...] = (
    ("user_id", "abc"),
    ("override_settings", {"x": 1}),
    ("webhook", None),
    ("model", ""),
    ("tiling", False),
    ("restore_faces", "false"),
)


def request(number: int) -> dict[str, Any]:
    dice = random.Random(number)
    values: dict[str, Any] = {}
    for name in ("prompt", *dice.sample(sorted(GOOD), dice.randint(1, 8))):
        as_it_should_be = dice.random() < 0.5 or (name == "prompt" and dice.random() < 0.8)
        value = dice.choice((GOOD if as_it_should_be else SHAPES)[name])
        own = name not in NAMES or dice.random() < 0.7
        values[name if own else dice.choice(NAMES[name])] = value
    if dice.random() < 0.1:
        values.update([dice.choice(EXTRA)])
    return values


def assert_one_sentence(error: str, values: dict[str, Any]) -> None:
    code, _, rest = error.partition(": ")
    assert code in ("INVALID_INPUT", "LORA_SOURCE_INVALID"), (error, values)
    sentence = rest.removesuffix(" See the README's table of parameters.")
    faults = sentence.split(": ", 1)[1] if sentence[0].isdigit() else sentence
    fields = [*GOOD, *(name for names in NAMES.values() for name in names), *dict(EXTRA)]
    for fault in faults.split("; "):
        assert any(name in fault for name in fields), (fault, values)
    assert not any(word in error for word in ("Traceback", "Error", "object at", PICTURE[30:60]))
    assert len(error) < 1500


def test_every_request_gets_pictures_or_one_sentence(
    demo_worker: Worker, monkeypatch: pytest.MonkeyPatch
) -> None:
    drawn = [Image.new("RGB", (64, 64))]
    monkeypatch.setattr(
        type(demo_worker.parts.pipeline),
        "generate",
        lambda self, request, *rest: drawn * request.num_images,
    )
    answered = 0
    for number in range(REQUESTS):
        values = request(number)
        answer = demo_worker({"id": f"{number}", "input": values})
        if "error" in answer:
            assert_one_sentence(answer["error"], values)
        else:
            answered += 1
            assert base64.b64decode(answer["images"][0].partition(",")[2])
    assert 150 < answered < 400


def test_some_of_them_are_drawn(demo_worker: Worker) -> None:
    drawn = 0
    for number in range(40):
        values = request(number)
        cheap = {"num_inference_steps": 1, "strength": 1, "num_images": 1}
        values = {k: v for k, v in values.items() if k not in NAMES["num_inference_steps"]}
        answer = demo_worker({"id": f"{number}", "input": {**values, **cheap}})
        if "error" not in answer:
            assert picture(answer).size[0] >= 64
            drawn += 1
        if drawn == DRAWN:
            return
    raise AssertionError(f"only {drawn} could be drawn")
