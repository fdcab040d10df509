"""No LoRA, no difference: our pixels equal those of plain diffusers calls, made as worker-sdxl makes them."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from diffusers import (
    StableDiffusionXLImg2ImgPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from PIL import Image

from demo.networks import initialise
from lora.engine.engine import LoraEngine
from lora.engine.stack import LoraUse, Mode
from lora.formats.adapter import load
from pipelines.image import ImagePipeline, Timings
from pipelines.loading import LoadedModels, load_models
from pipelines.routes import Route, choose_route
from pipelines.schedulers import SCHEDULER_CLASSES, make_scheduler
from schemas import SCHEDULERS, ImageRequest, parse_job
from settings import Settings
from tests.adapters import kohya, write
from tests.test_handler import data_uri
from validation import InvalidInput

PROMPT = "a big red circle on a blue background"


def request(**values: Any) -> ImageRequest:
    asked = {"prompt": PROMPT, "num_inference_steps": 3, "refiner_inference_steps": 8, "seed": 11}
    return parse_job({"input": {**asked, **values}})


def tiny_refiner(base: StableDiffusionXLPipeline) -> StableDiffusionXLImg2ImgPipeline:
    """A refiner as SDXL's: the second text encoder alone, an aesthetic score in the time ids."""
    torch.manual_seed(5)
    config = dict(base.unet.config)
    config |= {"cross_attention_dim": 64, "projection_class_embeddings_input_dim": 5 * 32 + 64}
    unet = UNet2DConditionModel.from_config(config)
    initialise(unet)
    refiner = StableDiffusionXLImg2ImgPipeline(
        vae=base.vae,
        text_encoder=None,
        text_encoder_2=base.text_encoder_2,
        tokenizer=None,
        tokenizer_2=base.tokenizer_2,
        unet=unet.eval(),
        scheduler=copy.deepcopy(base.scheduler),
        requires_aesthetics_score=True,
        force_zeros_for_empty_prompt=False,
        add_watermarker=False,
    )
    refiner.set_progress_bar_config(disable=True)
    return refiner


@pytest.fixture(scope="module")
def models() -> LoadedModels:
    return load_models(Settings(model="demo", device="cpu"))


@pytest.fixture(scope="module")
def refined(models: LoadedModels) -> LoadedModels:
    return LoadedModels(models.name, models.base, tiny_refiner(models.base), models.device)


def ours(
    models: LoadedModels, asked: ImageRequest, picture: Image.Image | None = None
) -> list[Any]:
    pipeline = ImagePipeline(models)
    route, _ = choose_route(asked, has_refiner=pipeline.has_refiner)
    return [np.asarray(i) for i in pipeline.generate(asked, route, picture, Timings())]


def worker_sdxls(
    models: LoadedModels, asked: ImageRequest, picture: Image.Image | None = None
) -> list[Any]:
    """The same request, called as worker-sdxl's handler calls diffusers."""
    generator = torch.Generator("cpu").manual_seed(asked.seed)
    base, refiner = models.base, models.refiner
    own = base.scheduler
    class_name, _ = SCHEDULER_CLASSES[asked.scheduler]
    base.scheduler = getattr(diffusers, class_name).from_config(own.config)
    try:
        if picture is not None:
            assert refiner is not None
            images = refiner(
                prompt=asked.prompt,
                num_inference_steps=asked.refiner_inference_steps,
                strength=asked.strength,
                image=picture,
                generator=generator,
            ).images
        else:
            images = base(
                prompt=asked.prompt,
                negative_prompt=asked.negative_prompt,
                height=asked.height,
                width=asked.width,
                num_inference_steps=asked.num_inference_steps,
                guidance_scale=asked.guidance_scale,
                denoising_end=asked.high_noise_frac if refiner else None,
                output_type="latent" if refiner else "pil",
                num_images_per_prompt=asked.num_images,
                generator=generator,
            ).images
            if refiner:
                images = refiner(
                    prompt=asked.prompt,
                    num_inference_steps=asked.refiner_inference_steps,
                    strength=asked.strength,
                    image=images,
                    num_images_per_prompt=asked.num_images,
                    generator=generator,
                ).images
    finally:
        base.scheduler = own
    return [np.asarray(image) for image in images]


REQUESTS: dict[str, dict[str, Any]] = {
    "defaults": {},
    "everything": {
        "negative_prompt": "green",
        "height": 96,
        "width": 64,
        "guidance_scale": 3.0,
        "num_images": 2,
        "scheduler": "K_EULER",
        "high_noise_frac": 0.7,
        "strength": 0.6,
    },
    "no guidance": {"guidance_scale": 1.0, "scheduler": "DPMSolverMultistep"},
    "random sampler": {"scheduler": "K_EULER_ANCESTRAL"},
}


@pytest.mark.parametrize("values", REQUESTS.values(), ids=REQUESTS.keys())
@pytest.mark.parametrize("with_refiner", [False, True], ids=["base", "refined"])
def test_text_to_image_equals_plain_diffusers(
    models: LoadedModels, refined: LoadedModels, values: dict[str, Any], with_refiner: bool
) -> None:
    asked, chosen = request(**values), refined if with_refiner else models
    np.testing.assert_array_equal(ours(chosen, asked), worker_sdxls(chosen, asked))


def test_image_to_image_with_a_refiner_equals_plain_diffusers(refined: LoadedModels) -> None:
    picture = Image.new("RGB", (80, 64), (30, 60, 200))
    asked = request(image_url=data_uri(), strength=0.5)
    np.testing.assert_array_equal(
        ours(refined, asked, picture), worker_sdxls(refined, asked, picture)
    )


def test_image_to_image_without_a_refiner_equals_the_base_as_image_to_image(
    models: LoadedModels,
) -> None:
    picture = Image.new("RGB", (64, 64), (30, 60, 200))
    asked = request(image_url=data_uri(), strength=0.7, scheduler="K_EULER", negative_prompt="red")
    plain = StableDiffusionXLImg2ImgPipeline(
        **{
            **models.base.components,
            "scheduler": make_scheduler("K_EULER", models.base.scheduler.config),
        }
    )
    expected = plain(
        prompt=asked.prompt,
        negative_prompt="red",
        image=picture,
        strength=0.7,
        num_inference_steps=3,
        guidance_scale=7.5,
        generator=torch.Generator("cpu").manual_seed(11),
    ).images
    np.testing.assert_array_equal(ours(models, asked, picture)[0], np.asarray(expected[0]))


def test_an_ensemble_splits_one_denoising_between_base_and_refiner(refined: LoadedModels) -> None:
    asked = request(
        refiner_mode="ensemble", num_inference_steps=10, high_noise_frac=0.6, scheduler="K_EULER"
    )
    base, refiner = copy.copy(refined.base), copy.copy(refined.refiner)
    assert refiner is not None
    for pipeline in (base, refiner):
        pipeline.scheduler = make_scheduler("K_EULER", pipeline.scheduler.config)
    generator = torch.Generator("cpu").manual_seed(11)
    shared = {
        "prompt": PROMPT,
        "num_inference_steps": 10,
        "guidance_scale": 7.5,
        "generator": generator,
    }
    latents = base(**shared, denoising_end=0.6, output_type="latent").images
    expected = refiner(**shared, denoising_start=0.6, image=latents).images
    np.testing.assert_array_equal(ours(refined, asked)[0], np.asarray(expected[0]))


def test_no_refiner_wanted_is_the_base_alone(models: LoadedModels, refined: LoadedModels) -> None:
    alone = ours(refined, request(refiner_mode="none", high_noise_frac=0.5))
    np.testing.assert_array_equal(alone, ours(models, request()))


@pytest.mark.parametrize("name", SCHEDULERS)
def test_every_scheduler_draws_and_the_models_own_is_put_back(
    models: LoadedModels, name: str
) -> None:
    own = models.base.scheduler
    first = ours(models, request(scheduler=name))
    assert models.base.scheduler is own
    assert first[0].std() > 0
    np.testing.assert_array_equal(first, ours(models, request(scheduler=name)))


def test_a_sampler_does_not_depend_on_the_ones_before_it(models: LoadedModels) -> None:
    first = ours(models, request(scheduler="DDIM"))
    for name in ("DPM++ 2M SDE Karras", "LCM", "TCD"):
        ours(models, request(scheduler=name))
    np.testing.assert_array_equal(first, ours(models, request(scheduler="DDIM")))


def test_schedulers_of_the_schema_are_those_that_exist() -> None:
    assert tuple(SCHEDULER_CLASSES) == SCHEDULERS


@pytest.mark.parametrize(
    ("values", "has_refiner", "route", "warned"),
    [
        ({}, False, Route.BASE, ""),
        ({}, True, Route.REFINED, ""),
        ({"refiner_mode": "ensemble"}, True, Route.ENSEMBLE, ""),
        ({"refiner_mode": "ensemble"}, False, Route.BASE, "no refiner"),
        ({"refiner_mode": "none"}, True, Route.BASE, ""),
        ({"high_noise_frac": 0.8}, False, Route.BASE, "high_noise_frac does nothing"),
        ({"image_url": "https://h/x", "strength": 0.5}, True, Route.REFINER_IMAGE, ""),
        ({"image_url": "https://h/x", "strength": 0.5}, False, Route.BASE_IMAGE, ""),
        (
            {"image_url": "https://h/x", "strength": 0.5, "loras": ["a"]},
            True,
            Route.BASE_IMAGE,
            "do not fit",
        ),
    ],
)
def test_routes(values: dict[str, Any], has_refiner: bool, route: Route, warned: str) -> None:
    chosen, warnings = choose_route(request(**values), has_refiner=has_refiner)
    assert chosen is route
    assert bool(warnings) == bool(warned)
    assert warned in " ".join(warnings)


def test_strength_that_leaves_no_step_is_refused_before_anything_is_drawn() -> None:
    with pytest.raises(InvalidInput) as caught:
        choose_route(request(refiner_inference_steps=2, strength=0.3), has_refiner=True)
    assert "strength: 0.3 of 2 refiner_inference_steps" in str(caught.value)


def test_an_ensemble_that_splits_nothing_is_refused() -> None:
    for fraction in (0, 1):
        with pytest.raises(InvalidInput):
            choose_route(
                request(refiner_mode="ensemble", high_noise_frac=fraction), has_refiner=True
            )


def test_a_failed_decode_leaves_the_vae_as_it_was(
    models: LoadedModels, monkeypatch: pytest.MonkeyPatch
) -> None:
    vae = models.base.vae
    vae.to(torch.bfloat16)
    try:

        def upcast_and_fail(*_: object, **__: object) -> None:
            vae.to(torch.float32)
            raise torch.OutOfMemoryError

        with monkeypatch.context() as patch, pytest.raises(torch.OutOfMemoryError):
            patch.setattr(vae, "decode", upcast_and_fail)
            ours(models, request())
        assert vae.dtype is torch.bfloat16
    finally:
        vae.to(torch.float32)


@pytest.mark.parametrize(
    "values", [{}, {"image_url": data_uri(), "strength": 0.5}], ids=["text", "image"]
)
def test_a_lora_before_changes_nothing_with_a_refiner(
    refined: LoadedModels, tmp_path: Path, values: dict[str, Any]
) -> None:
    asked = request(**values)
    picture = Image.new("RGB", (64, 64), (30, 60, 200)) if values else None
    before = ours(refined, asked, picture)
    engine = LoraEngine(ImagePipeline(refined).components)
    file = load(write(tmp_path / "a.safetensors", kohya()), engine.key_map, "a")
    for mode in Mode:
        with engine.applied([LoraUse(file)], mode):
            assert not np.array_equal(ours(refined, request()), before)
    np.testing.assert_array_equal(ours(refined, asked, picture), before)
    np.testing.assert_array_equal(worker_sdxls(refined, asked, picture), before)


def test_timings_tell_the_phases(models: LoadedModels) -> None:
    timings, steps = Timings(), []
    ImagePipeline(models).generate(
        request(), Route.BASE, None, timings, lambda done, total, _: steps.append((done, total))
    )
    assert set(timings.seconds) == {"encode_prompt", "denoise", "decode"}
    assert all(seconds > 0 for seconds in timings.seconds.values())
    assert steps == [(1, 3), (2, 3), (3, 3)]
