import math
from typing import Any

import pytest

from lora.engine.stack import LoraUse
from lora.fetch.sources import Reference
from schemas import IMAGE_REQUEST, parse_job
from validation import InvalidInput


def parse(**values: Any) -> Any:
    return parse_job({"input": {"prompt": "a red circle", **values}})


def fault_of(job: object) -> str:
    with pytest.raises(InvalidInput) as caught:
        parse_job(job)
    return str(caught.value)


def test_defaults_are_those_of_worker_sdxl() -> None:
    request = parse()
    assert request.negative_prompt is None
    assert (request.height, request.width) == (None, None)
    assert request.scheduler == "DDIM"
    assert (request.num_inference_steps, request.refiner_inference_steps) == (25, 50)
    assert (request.guidance_scale, request.strength) == (7.5, 0.3)
    assert (request.image_url, request.num_images, request.high_noise_frac) == (None, 1, None)


def test_the_seed_is_drawn_if_none_is_given_and_kept_if_it_is() -> None:
    assert parse(seed=2**64 - 1).seed == 2**64 - 1
    assert parse(seed=0).seed == 0
    assert len({parse().seed for _ in range(8)}) > 1


def test_whole_floats_are_integers_and_two_calls_share_nothing() -> None:
    request = parse(num_inference_steps=20.0, seed=3.0)
    assert (request.num_inference_steps, request.seed) == (20, 3)
    assert isinstance(request.num_inference_steps, int)
    assert parse(loras=["a"]).loras != parse().loras == ()


@pytest.mark.parametrize(
    ("job", "said"),
    [
        ("text", "the job is not an object"),
        (None, "the job is not an object"),
        ({}, "input is not an object"),
        ({"input": [1]}, "input is not an object"),
        ({"input": {}}, "prompt is required"),
        ({"input": {"prompt": ""}}, "prompt is required"),
        (
            {"input": {"prompt": "x", "promt": "y"}},
            "promt is not a field (did you mean prompt or negative_prompt?)",
        ),
        ({"input": {"prompt": "x", "width": 1023}}, "width: 1023 is not a multiple of 8"),
        ({"input": {"prompt": "x", "num_images": 0}}, "num_images: 0 is less than 1"),
        ({"input": {"prompt": "x", "num_images": 100}}, "num_images: 100 is more than 4"),
        ({"input": {"prompt": "x", "scheduler": "Foo"}}, "'Foo' is none of PNDM, KLMS, DDIM"),
        ({"input": {"prompt": 5}}, "prompt: 5 is not a string or null"),
        ({"input": {"prompt": "x", "seed": True}}, "seed: True is not an integer or null"),
        ({"input": {"prompt": "x", "guidance_scale": math.nan}}, "nan is not a number"),
        ({"input": {"prompt": "x", "strength": math.inf}}, "inf is not a number"),
        (
            {"input": {"image_url": "ftp://u:canary@h/x"}},
            "image_url: the text does not look right",
        ),
        ({"input": {"prompt": "x", "loras": "a"}}, "loras: 'a' is not an array or null"),
        ({"input": {"prompt": "x", "loras": ["a"] * 17}}, "loras: more than 16 entries"),
        (
            {"input": {"prompt": "x", "loras": [{"path": "a", "scale": "big"}]}},
            "loras[0].scale: 'big' is not a number",
        ),
        *(
            ({"input": {"prompt": "x", "loras": [{"path": "a", **entry}]}}, said)
            for entry, said in (
                ({"scale": {"unet": 11}}, "loras[0].scale.unet: 11 is more than 10"),
                ({"scale": {"unet": "1"}}, "loras[0].scale.unet: '1' is not a number"),
                ({"scale": {"vae": 1}}, "loras[0].scale: 'vae' is none of unet, text_encoder"),
                ({"scale": None}, "loras[0].scale: None is not a number or an object"),
                ({"blocks": [1, 2]}, "loras[0].blocks: 2 values are neither 12 nor 20"),
                ({"blocks": {"IN04": "x"}}, "loras[0].blocks: a block's value is not a number"),
                ({"blocks": 5}, "loras[0].blocks: 5 is not an array"),
                ({"start": 0.5, "end": 0.5}, "loras[0].start is not before end"),
                ({"end": 1.5}, "loras[0].end: 1.5 is more than 1"),
                ({"scale": {"unet": math.inf}}, "loras[0].scale.unet: inf is more than 10"),
                ({"scale": {"unet": math.nan}}, "loras[0].scale.unet: nan is not a number"),
            )
        ),
        (
            {"input": {"prompt": "x", "lora_mode": "fast"}},
            "lora_mode: 'fast' is none of auto, dynamic, merged",
        ),
        (
            {
                "input": {
                    "prompt": "x",
                    "lora_mode": "merged",
                    "loras": [{"path": "a", "start": 0.2}],
                }
            },
            "lora_mode: a LoRA with start or end cannot be merged",
        ),
        (
            {"input": {"prompt": "x", "loras": [{"path": "a", "scale": 11}]}},
            "loras[0].scale: 11 is more than 10",
        ),
        (
            {"input": {"prompt": "x", "loras": [{"path": "a", "weigth_name": "w"}]}},
            "loras[0].weigth_name is not a field (did you mean weight_name?)",
        ),
        *(
            ({"input": {"prompt": "x", "loras": [entry]}}, said)
            for entry, said in (
                ({"path": "a", "url": "canary"}, "loras[0].url means path, which is given too"),
                ({"path": "", "lora": "canary"}, "loras[0].lora means path, which is given too"),
                ({"name": "a", "file": "canary"}, "loras[0].file means path, which is given too"),
                (
                    {"path": "a", "scale": 1, "weight": 2},
                    "loras[0].weight means scale, which is given too",
                ),
                ({"path": "a", "strength": "big"}, "loras[0].scale: 'big' is not a number"),
            )
        ),
        (
            {"input": {"prompt": "x", "loras": [{"path": "a", "sha256": "12"}]}},
            "loras[0].sha256: '12' does not look right (64 hexadecimal digits)",
        ),
    ],
)
def test_a_fault_is_told_in_one_sentence_with_its_path(job: object, said: str) -> None:
    text = fault_of(job)
    assert text.startswith("INVALID_INPUT: ")
    assert said in text
    assert "canary" not in text


def test_every_fault_is_told_at_once() -> None:
    bad = {
        "width": 1023,
        "num_images": 0,
        "scheduler": "x",
        "extra": 1,
        "loras": [{"path": "a", "scale": "b"}],
    }
    text = fault_of({"input": bad})
    assert "6 faults" in text
    for name in (*bad, "prompt"):
        assert name in text


@pytest.mark.parametrize(
    "values",
    [
        {"loras": {"path": "a/b", "token": "hf_canary"}},
        {"image_url": "example.com/x?token=canary"},
        {"scheduler": "https://h/?canary"},
        {"loras": [{"path": ["canary://x"]}]},
    ],
)
def test_what_may_be_a_secret_is_not_repeated(values: dict[str, Any]) -> None:
    assert "canary" not in fault_of({"input": {"prompt": "x", **values}})


def test_half_a_surrogate_pair_is_refused() -> None:
    assert "prompt: the text holds half a surrogate" in fault_of({"input": {"prompt": "a\ud800"}})


@pytest.mark.parametrize("name", ["LCM", "TCD"])
def test_distilled_samplers_take_no_more_steps_than_they_were_made_for(name: str) -> None:
    assert parse(scheduler=name, num_inference_steps=50).num_inference_steps == 50
    text = fault_of({"input": {"prompt": "x", "scheduler": name, "num_inference_steps": 51}})
    assert f"num_inference_steps: {name} takes at most 50" in text


def test_loras_are_strings_or_objects() -> None:
    loras = parse(
        loras=["a.safetensors", {"path": "u/r", "scale": 2, "weight_name": "w", "revision": "v"}]
    ).loras
    assert loras == (
        LoraUse(Reference("a.safetensors"), 1.0),
        LoraUse(Reference("u/r", "w", "v"), 2.0),
    )


def test_scales_by_component_and_block_and_ranges() -> None:
    entry = {"path": "a", "scale": {"unet": 0.8, "text_encoder": 0}, "blocks": {"MID": 0.5}}
    lora, plain = parse_job(
        {"input": {"prompt": "x", "loras": [{**entry, "start": 0.25, "end": 0.75}, "b"]}}
    ).loras
    assert (lora.scale, lora.components) == (1.0, {"unet": 0.8, "text_encoder": 0.0})
    assert (lora.blocks, lora.start, lora.end, lora.ranged) == ({"MID": 0.5}, 0.25, 0.75, True)
    assert (plain.components, plain.blocks, plain.ranged) == ({}, {}, False)


def test_an_entry_that_names_no_lora_is_skipped_with_a_warning_or_strictly_refused() -> None:
    entries = [5, None, {"scale": 1}, "a", ""]
    request = parse(loras=entries)
    assert [use.lora.path for use in request.loras] == ["a"]
    assert len(request.warnings) == 4
    assert "loras[0]" in request.warnings[0]
    text = fault_of({"input": {"prompt": "x", "loras": entries, "strict_loras": True}})
    assert "4 faults" in text


@pytest.mark.parametrize("strict", [False, True])
@pytest.mark.parametrize("path", ["url", "name", "file", "lora"])
@pytest.mark.parametrize("scale", ["strength", "weight"])
def test_other_programs_names_of_fields_are_understood_with_a_warning(
    path: str, scale: str, strict: bool
) -> None:
    entry = {path: "a", scale: 0.5, "weight_name": "w"}
    request = parse(loras=[entry, "b"], strict_loras=strict)
    assert request.loras == (LoraUse(Reference("a", "w"), 0.5), LoraUse(Reference("b"), 1.0))
    assert request.warnings == (
        f"loras[0].{path} was taken as path",
        f"loras[0].{scale} was taken as scale",
    )
    assert entry == {path: "a", scale: 0.5, "weight_name": "w"}


def test_every_field_has_a_default_and_a_description() -> None:
    for name, rule in IMAGE_REQUEST["properties"].items():
        assert "default" in rule, name
        assert rule["description"], name


@pytest.mark.parametrize("steps", [60, 60.0])
def test_a_distilled_sampler_takes_no_more_steps_however_they_are_written(steps: float) -> None:
    with pytest.raises(InvalidInput) as caught:
        parse_job({"input": {"prompt": "x", "scheduler": "LCM", "num_inference_steps": steps}})
    assert "LCM takes at most 50" in str(caught.value)
