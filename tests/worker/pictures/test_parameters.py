"""The text in a picture reads back to the request that drew it, from every format that holds it."""

from __future__ import annotations

import base64
import io
import json
import logging
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from entries import parse_loras
from handler import Worker
from schemas import ImageRequest, parse_job
from tests.lora.commands.running import run
from tests.test_handler import data_uri, picture, pixels
from worker.image_job import TOO_LONG
from worker.pictures.embedded import JPEG_LIMIT, exif_of, text_of
from worker.pictures.outputs import encode
from worker.pictures.parameters import Applied, read, write

SIZE = (1024, 768)


def request(**values: Any) -> ImageRequest:
    return parse_job({"input": {"prompt": "a cat", "seed": 3, **values}})


def applied(*loras: Any) -> list[Applied]:
    uses = parse_loras(list(loras)).uses
    return [Applied(f"{use.lora.path}.safetensors", use, "ab" * 32) for use in uses]


def written(asked: ImageRequest) -> str:
    loras = [Applied(f"{use.lora.path}.safetensors", use, "ab" * 32) for use in asked.loras]
    return write(asked, "demo", SIZE, loras)


# --- the form -------------------------------------------------------------------------------------


def test_the_form_is_that_of_web_uis() -> None:
    pairs = "Steps: 20, Sampler: DDIM, CFG scale: 7.5, Seed: 3, Size: 1024x768, Model: demo"
    assert written(request(num_inference_steps=20)) == f"a cat\n{pairs}"
    values = {"negative_prompt": "dog", "clip_skip": 2, "num_images": 2, "num_inference_steps": 20}
    loras = [
        {"path": "x", "scale": 0.5},
        {"path": "sub/y", "scale": {"unet": 1, "text_encoder": 0, "text_encoder_2": 0}},
    ]
    assert written(request(**values, loras=loras)) == (
        "a cat <lora:x:0.5> <lora:sub/y:unet=1:te=0>\nNegative prompt: dog\n"
        f'{pairs}, Clip skip: 2, Lora hashes: "x: abababababab, sub/y: abababababab", num_images: 2'
    )


# --- back -----------------------------------------------------------------------------------------

LORAS: dict[str, list[Any]] = {
    "none": [],
    "one": [{"path": "x", "scale": 0.8}],
    "not six digits": [{"path": "x", "scale": 0.123456789}],
    "each component": [
        {"path": "x", "scale": {"unet": 0.5, "text_encoder": 0.25, "text_encoder_2": 0.25}}
    ],
    "one component": [{"path": "x", "scale": {"text_encoder_2": 0.25}}],
    "blocks and a range": [
        {"path": "x", "blocks": {"MID": 0.5, "IN04": 0}, "start": 0.1, "end": 0.9}
    ],
    "odd names": ["x, y", "a:b", "d>e", "caf\u00e9 (v2)"],
}

TEXTS = (
    "a cat",
    "",
    "  a cat,\n",
    "a (cat:1.3) [dog] BREAK\nstyle",
    "a cat\nNegative prompt: dog",
    "a cat\nSteps: 3, Sampler: K_EULER, Seed: 9",
    "Steps: 3",
    'she said: "no, never", \\(x\\) \\n',
    "caf\u00e9 \u4e2d\u6587 \U0001f600\r\nx",
    "<s0> <lora> a<b",
)


@pytest.mark.parametrize("loras", LORAS.values(), ids=LORAS.keys())
def test_every_prompt_and_stack_comes_back(loras: list[Any]) -> None:
    uses = applied(*loras)
    for prompt in TEXTS:
        for negative in (None, prompt):
            own = replace(request(loras=loras), prompt=prompt, negative_prompt=negative)
            found = read(write(own, "demo", SIZE, uses)).input
            assert found["prompt"] == prompt
            assert found.get("negative_prompt") == negative
            assert parse_loras(found["loras"]) == parse_loras(loras)


FIELDS: dict[str, dict[str, Any]] = {
    "defaults": {},
    "numbers": {"seed": 2**64 - 1, "guidance_scale": 7.123456789, "num_inference_steps": 50},
    "sampler": {"scheduler": "DPM++ 2M SDE Karras"},
    "everything": {
        "negative_prompt": "dog, (blurred:1.2)",
        "scheduler": "K_EULER",
        "refiner_inference_steps": 20,
        "guidance_scale": 3,
        "strength": 0.55,
        "num_images": 3,
        "high_noise_frac": 0.8,
        "refiner_mode": "ensemble",
        "clip_skip": 1,
        "lora_mode": "merged",
        "loras": [{"path": "x", "scale": -0.5}],
    },
    "tags that are text": {"prompt": "a <lora:y:1> cat", "lora_tags": False, "loras": ["x"]},
}


@pytest.mark.parametrize("values", FIELDS.values(), ids=FIELDS.keys())
def test_every_field_that_draws_comes_back(values: dict[str, Any]) -> None:
    asked = request(
        **values, output_format="webp", output_quality=20, preview=True, strict_loras=True
    )
    found = read(written(asked))
    assert (found.unused, found.warnings) == ([], [])
    assert "output_format" not in found.input
    back = parse_job({"input": found.input})
    for name in values:
        assert getattr(back, name) == getattr(asked, name), name
    again = parse_job({"input": {**found.input, "output_format": "webp"}})
    assert written(again) == written(asked)


def test_a_source_picture_is_asked_for_and_its_url_not_written() -> None:
    text = written(request(image_url="https://user:canary@h/x.png?canary", strength=0.5))
    assert "canary" not in text
    found = read(text)
    assert found.warnings == ["it was drawn from a picture: give that as image_url"]
    assert found.input["strength"] == 0.5


def test_texts_of_web_uis_are_read_as_far_as_there_are_fields() -> None:
    text = (
        "score_9, a cat <lora:style:0.7>\nin a hat\nNegative prompt: dog,\nblurred\n"
        "Steps: 30, Sampler: DPM++ 2M, Schedule type: Karras, CFG scale: 6, Seed: 42, "
        "Size: 832x1216, Model hash: 67ab2fd8ec, Model: pony, Clip skip: 2, "
        'Hires upscaler: 4x, ADetailer: "a, b: c", Hashes: {"model": "67ab", "lora:x": "9"}, Version: v1.10'
    )
    found = read(text)
    assert found.input == {
        "prompt": "score_9, a cat \nin a hat",
        "negative_prompt": "dog,\nblurred",
        "loras": [{"path": "style", "scale": 0.7}],
        "num_inference_steps": 30,
        "scheduler": "DPM++ 2M Karras",
        "guidance_scale": 6.0,
        "seed": 42,
        "width": 832,
        "height": 1216,
        "clip_skip": 2,
    }
    assert found.unused[:2] == ["Hires upscaler", "ADetailer"]
    assert read("Steps: 1, Sampler: Euler a, Seed: 1").input["scheduler"] == "K_EULER_ANCESTRAL"
    assert read("Steps: 1, Sampler: Restart, Seed: x").unused == ["Sampler", "Seed"]
    assert read("just a prompt").input == {"prompt": "just a prompt", "loras": []}


# --- files ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "text", ["a cat\nSteps: 1", "caf\u00e9 \u4e2d\u6587 \U0001f600", "\u4e2d" * 5000]
)
@pytest.mark.parametrize("kind", ["png", "jpeg", "webp"])
def test_every_format_holds_the_text_and_no_log_has_it(
    kind: str, text: str, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG)
    made = Image.fromarray(np.arange(768, dtype=np.uint8).reshape(16, 16, 3))
    data = encode(made, kind, 95, text).data
    assert text[:9] not in caplog.text
    with Image.open(io.BytesIO(data)) as opened:
        assert text_of(opened) == text
        opened.load()
        plain = io.BytesIO()
        made.save(plain, kind, quality=95)
        np.testing.assert_array_equal(np.asarray(opened), np.asarray(Image.open(plain)))


def test_a_text_beyond_the_limit_of_jpeg_is_left_out() -> None:
    picture = Image.new("RGB", (8, 8))
    for text, there in (("x" * 65_000, True), ("\u4e2d" * 40_000, False)):
        assert (len(exif_of(text)) <= JPEG_LIMIT) == there
        opened = Image.open(io.BytesIO(encode(picture, "jpeg", 95, text).data))
        assert text_of(opened) == (text if there else None)


def test_a_text_that_is_left_out_is_warned_of(demo_worker: Worker) -> None:
    job = {"prompt": "\u4e2d " * 600, "num_inference_steps": 1, "seed": 1, "output_format": "jpeg"}
    assert demo_worker({"id": "j", "input": job})["warnings"] == []
    blanks = " " * 9900  # which are no tokens; the line in the prompt has both written twice
    job["prompt"] = f" \u4e2d{blanks}\nNegative prompt: y"
    answer = demo_worker({"id": "j", "input": {**job, "negative_prompt": f"x{blanks}"}})
    assert answer["warnings"] == [TOO_LONG]
    assert text_of(picture(answer)) is None


def test_other_programs_exif_is_read() -> None:
    def with_comment(comment: bytes) -> Image.Image:
        exif = Image.Exif()
        exif.get_ifd(0x8769)[0x9286] = comment
        buffer = io.BytesIO()
        Image.new("RGB", (8, 8)).save(buffer, "JPEG", exif=exif)
        return Image.open(buffer)

    assert text_of(with_comment(b"UNICODE\0" + "a c\u00e4t".encode("utf-16-le"))) == "a c\u00e4t"
    assert text_of(with_comment(b"UNICODE\0" + "a c\u00e4t".encode("utf-16-be"))) == "a c\u00e4t"
    assert text_of(with_comment(b"ASCII\0\0\0a cat")) == "a cat"
    assert text_of(with_comment(b"\0" * 8)) is None
    assert text_of(Image.new("RGB", (8, 8))) is None


@pytest.mark.parametrize("kind", ["png", "jpeg", "webp"])
def test_a_picture_draws_itself_again(
    demo_worker: Worker, tmp_path: Path, capsys: pytest.CaptureFixture[str], kind: str
) -> None:
    job = {
        "prompt": "a (big:1.3) red circle BREAK on a [blue] background <lora:demo-stripes:0.8>",
        "negative_prompt": "green, (star:0.9)",
        "loras": [{"path": "demo-night", "scale": {"unet": 0.5, "text_encoder": 0.1}, "end": 0.7}],
        "num_inference_steps": 4,
        "scheduler": "K_EULER",
        "guidance_scale": 3.3,
        "seed": 12,
        "width": 96,
        "height": 64,
        "output_format": kind,
    }
    answer = demo_worker({"id": "j", "input": job})
    assert answer.get("warnings") == []
    file = tmp_path / f"x.{kind}"
    file.write_bytes(base64.b64decode(answer["images"][0].partition(",")[2]))
    ran = run(capsys, "parameters", file, "--json")
    assert ran.code == 0, ran.err
    again = demo_worker({"id": "j", "input": {**ran.json["input"], "output_format": kind}})
    assert "error" not in again, again
    np.testing.assert_array_equal(pixels(again), pixels(answer))
    assert text_of(picture(again)) == text_of(picture(answer))
    shown = run(capsys, "parameters", file)
    assert json.loads(shown.out) == {"input": ran.json["input"]}


def test_the_command_says_what_is_missing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    plain, broken, text = tmp_path / "a.png", tmp_path / "b.png", tmp_path / "c.txt"
    Image.new("RGB", (8, 8)).save(plain)
    broken.write_bytes(b"no picture")
    text.write_text("a cat\nSteps: 3, Sampler: Restart, Seed: 5, Source picture: not kept")
    assert run(capsys, "parameters", plain).err.startswith(
        f"error: TOOL_ERROR: {plain} holds no parameters"
    )
    assert "is no picture in png, jpeg or webp" in run(capsys, "parameters", broken).err
    assert run(capsys, "parameters", tmp_path / "none.png").code == 2
    shown = run(capsys, "parameters", text)
    assert "not used: Sampler\nwarning: it was drawn from a picture" in shown.out


def test_image_to_image_reads_back_but_for_the_picture(demo_worker: Worker) -> None:
    job = {
        "prompt": "a cat",
        "image_url": data_uri(),
        "strength": 0.6,
        "num_inference_steps": 4,
        "seed": 1,
    }
    answer = demo_worker({"id": "j", "input": job})
    found = read(str(text_of(picture(answer))))
    assert "data:" not in json.dumps(found.input)
    again = demo_worker({"id": "j", "input": {**found.input, "image_url": data_uri()}})
    np.testing.assert_array_equal(pixels(again), pixels(answer))
