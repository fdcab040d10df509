import math
import random
from typing import Any

import pytest
import torch

from lora.engine.stack import LoraUse
from lora.fetch.sources import Reference
from schemas import IMAGE_REQUEST, SCHEDULERS, parse_job
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
        ({"input": {"prompt": "x", "loras": 5}}, "loras: 5 is not an array or null"),
        ({"input": {"prompt": "x", "width": 100}}, "100 is not a multiple of 8 (send 96 or 104)"),
        ({"input": {"prompt": "x", "height": 4}}, "4 is not a multiple of 8 (send 8)"),
        ({"input": {"prompt": "x", "tiling": 1}}, "tiling is not a field (leave it out)"),
        ({"input": {"prompt": "x", "steps": 2, "num_inference_steps": 3}}, "steps means num_inf"),
        ({"input": {"prompt": "x", "steps": 2, "cfg_scale": "high"}}, "'high' is not a number"),
        ({"input": {"prompt": "x", "seed": "7.5"}}, "seed: 7.5 is not an integer or null"),
        ({"input": {"prompt": "x", "preview": "maybe"}}, "preview: 'maybe' is not a boolean"),
        ({"input": {"prompt": "x", "preview": 2}}, "preview: 2 is not a boolean"),
        ({"input": {"prompt": "x", "mask_url": "https://h/m"}}, "mask_url needs the picture"),
        (
            {"input": {"prompt": "x", "width": 16_384, "height": 4096}},
            "width and height: 16384 x 4096 is more than 16.8 megapixels",
        ),
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


@pytest.mark.parametrize(
    ("sent", "meant"),
    [
        ({"seed": "42"}, {"seed": 42}),
        ({"seed": " 42.0 "}, {"seed": 42}),
        ({"seed": "18446744073709551615"}, {"seed": 2**64 - 1}),
        ({"num_inference_steps": "2e1"}, {"num_inference_steps": 20}),
        ({"guidance_scale": "7.5"}, {"guidance_scale": 7.5}),
        ({"guidance_scale": "-.5"}, {"guidance_scale": -0.5}),
        ({"width": "", "height": "  "}, {"width": None, "height": None}),
        ({"strength": None, "scheduler": None}, {"strength": 0.3, "scheduler": "DDIM"}),
        ({"num_images": None, "preview": None}, {"num_images": 1, "preview": False}),
        ({"output_format": ""}, {"output_format": "png"}),
        ({"output_format": "JPG"}, {"output_format": "jpeg"}),
        ({"output_format": "PNG"}, {"output_format": "png"}),
        ({"scheduler": "k_euler"}, {"scheduler": "K_EULER"}),
        ({"scheduler": "Euler a"}, {"scheduler": "K_EULER_ANCESTRAL"}),
        ({"scheduler": "dpm++ 2m karras"}, {"scheduler": "DPM++ 2M Karras"}),
        ({"preview": "True"}, {"preview": True}),
        ({"strict_loras": "false", "preview": 1}, {"strict_loras": False, "preview": True}),
        ({"image_url": " "}, {"image_url": None}),
        ({"negative_prompt": ""}, {"negative_prompt": ""}),
        ({"loras": ""}, {"loras": ()}),
        ({"loras": "a"}, {"loras": (LoraUse(Reference("a"), 1.0),)}),
        ({"loras": {"path": "a", "scale": "0.5"}}, {"loras": (LoraUse(Reference("a"), 0.5),)}),
        ({"loras": [{"path": "a", "scale": None}]}, {"loras": (LoraUse(Reference("a"), 1.0),)}),
        ({"loras": [{"path": "a", "weight_name": ""}]}, {"loras": (LoraUse(Reference("a"), 1.0),)}),
        ({"unknown": None}, {}),
    ],
)
def test_the_shapes_that_clients_send_mean_what_they_say(
    sent: dict[str, Any], meant: dict[str, Any]
) -> None:
    request = parse(**sent)
    assert {name: getattr(request, name) for name in meant} == meant
    assert request.warnings == ()


@pytest.mark.parametrize(
    ("sent", "name", "value"),
    [
        ({"numInferenceSteps": 7}, "num_inference_steps", 7),
        ({"Guidance-Scale": "3"}, "guidance_scale", 3),
        ({"imageURL": "https://h/x"}, "image_url", "https://h/x"),
        ({"steps": 7, "num_inference_steps": None}, "num_inference_steps", 7),
        ({"cfgScale": 3}, "guidance_scale", 3),
        ({"sampler_name": "Euler"}, "scheduler", "K_EULER"),
        ({"n": 2}, "num_images", 2),
        ({"denoising_strength": 0.5}, "strength", 0.5),
    ],
)
def test_another_name_of_a_field_is_understood_with_a_warning(
    sent: dict[str, Any], name: str, value: object
) -> None:
    request = parse(**sent)
    assert getattr(request, name) == value
    assert request.warnings == (f"{next(iter(sent))} was taken as {name}",)


def test_a_seed_below_zero_is_worker_sdxls_but_minus_one_is_drawn() -> None:
    assert len({parse(seed=-1).seed for _ in range(8)}) > 1
    assert parse(seed="-1").seed >= 0
    for seed in (-2, -12345, -(2**63)):
        kept = torch.Generator().manual_seed(seed).initial_seed()
        assert parse(seed=seed).seed == kept


def test_within_a_mask_all_is_drawn_anew_unless_the_request_says_how_much() -> None:
    urls = {"image_url": "https://h/x", "mask_url": "https://h/m"}
    assert parse(**urls).strength == 1.0
    assert parse(**urls, strength=0.4).strength == 0.4
    assert parse(image_url="https://h/x").strength == 0.3


WORKER_SDXL: dict[str, tuple[Any, ...]] = {
    "negative_prompt": (None, "", "blue"),
    "height": (8, 48, 512, 1024, 5120),
    "width": (8, 48, 512, 1024, 2048),
    "seed": (None, -12345, -1, 0, 42, 2**63),
    "scheduler": SCHEDULERS[:7],
    "num_inference_steps": (1, 25, 600, 1000),
    "refiner_inference_steps": (1, 50, 600, 1000),
    "guidance_scale": (-7.5, -1, 0, 0.5, 1, 7.5, 30, 150),
    "strength": (0.0, 0.3, 1, 1.0),
    "image_url": (None, "", "https://h/x", "data:image/png;base64,AAAA"),
    "num_images": (1, 2),
    "high_noise_frac": (None, 0, 0.8, 1.0),
}
"""What worker-sdxl's schema takes and diffusers draws."""


def test_what_worker_sdxl_takes_is_taken_with_its_meaning() -> None:
    dice = random.Random(0)
    grid = [{name: value} for name, values in WORKER_SDXL.items() for value in values]
    grid += [{name: dice.choice(v) for name, v in WORKER_SDXL.items()} for _ in range(300)]
    for sent in grid:
        request = parse(**sent)
        for name, value in sent.items():
            meant = {"image_url": value or None}.get(name, value)
            if name == "seed" and (value is None or value < 0):
                assert 0 <= request.seed < 2**64
            else:
                assert getattr(request, name) == meant, sent
        assert request.warnings == ()


def test_a_field_that_has_nothing_to_do_is_warned_of() -> None:
    assert parse(mask_blur=3).warnings == ("mask_blur does nothing without mask_url",)
    (sentence,) = parse(image_url="https://h/x", resize_mode="contain").warnings
    assert "resize_mode does nothing" in sentence
    assert parse(image_url="https://h/x", resize_mode="contain", width=64).warnings == ()
