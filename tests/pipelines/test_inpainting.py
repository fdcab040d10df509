"""Drawing within a mask: diffusers' own pixels in it, the picture's own outside of it."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionXLInpaintPipeline, UNet2DConditionModel
from PIL import Image, ImageDraw

from demo.networks import initialise
from pipelines.image import ImagePipeline
from pipelines.inpainting import Masked
from pipelines.loading import LoadedModels, load_models
from pipelines.routes import Route, choose_route
from pipelines.schedulers import make_scheduler
from pipelines.timings import Timings
from schemas import ImageRequest, parse_job
from settings import Settings
from tests.test_handler import data_uri

PROMPT = "a big yellow star on a blue background"


def request(**values: Any) -> ImageRequest:
    asked = {"prompt": PROMPT, "num_inference_steps": 3, "seed": 11, "scheduler": "K_EULER"}
    urls = {"image_url": data_uri(), "mask_url": data_uri()}
    return parse_job({"input": {**asked, **urls, **values}})


@pytest.fixture(scope="module")
def models() -> LoadedModels:
    return load_models(Settings(model="demo", device="cpu"))


@pytest.fixture(scope="module")
def nine(models: LoadedModels) -> LoadedModels:
    """The demo with a UNet for inpainting: 4 channels of latents, 1 of the mask, 4 of what it keeps."""
    torch.manual_seed(6)
    unet = UNet2DConditionModel.from_config({**models.base.unet.config, "in_channels": 9})
    initialise(unet)
    base = copy.copy(models.base)
    base.unet = unet.eval()
    return LoadedModels("nine", base, None, models.device)


@pytest.fixture
def noise() -> Image.Image:
    """A picture that no VAE gives back."""
    pixels = np.random.default_rng(2).integers(0, 256, (64, 80, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def mask(size: tuple[int, int], *box: int) -> Image.Image:
    made = Image.new("L", size)
    ImageDraw.Draw(made).rectangle(box, fill=255)
    return made


def drawn(
    models: LoadedModels, start: Image.Image | Masked | None, asked: ImageRequest
) -> list[Any]:
    route, _ = choose_route(asked, has_refiner=False)
    return [np.asarray(i) for i in ImagePipeline(models).generate(asked, route, start, Timings())]


def plain(models: LoadedModels, asked: ImageRequest, **options: Any) -> Any:
    """diffusers' own inpainting, without its copy of the picture around the mask."""
    pipeline = StableDiffusionXLInpaintPipeline(
        **{
            **models.base.components,
            "scheduler": make_scheduler(asked.scheduler, models.base.scheduler.config),
        }
    )
    generator = torch.Generator("cpu").manual_seed(asked.seed)
    images = pipeline(prompt=PROMPT, num_inference_steps=3, generator=generator, **options).images
    return np.asarray(images[0])


@pytest.mark.parametrize("channels", [4, 9])
@pytest.mark.parametrize("strength", [1.0, 0.7])
def test_within_the_mask_are_diffusers_pixels_and_outside_the_pictures_own(
    models: LoadedModels, nine: LoadedModels, noise: Image.Image, channels: int, strength: float
) -> None:
    chosen = {4: models, 9: nine}[channels]
    asked = request(strength=strength)
    box = mask(noise.size, 16, 8, 55, 47)  # whole pixels of the latents
    found = drawn(chosen, Masked(noise, box, noise.size), asked)[0]
    expected = plain(
        chosen, asked, image=noise, mask_image=box, width=80, height=64, strength=strength
    )
    inside = np.asarray(box) > 0
    np.testing.assert_array_equal(found[inside], expected[inside])
    np.testing.assert_array_equal(found[~inside], np.asarray(noise)[~inside])


def test_a_line_thinner_than_the_latents_pixels_is_drawn(
    models: LoadedModels, noise: Image.Image
) -> None:
    line = mask(noise.size, 3, 20, 76, 21)
    found = drawn(models, Masked(noise, line, noise.size), request())[0]
    inside = np.asarray(line) > 0
    assert (found[inside] != np.asarray(noise)[inside]).any(axis=-1).mean() > 0.9
    np.testing.assert_array_equal(found[~inside], np.asarray(noise)[~inside])


def test_a_picture_of_another_size_comes_back_in_its_own(
    models: LoadedModels, noise: Image.Image
) -> None:
    large = noise.resize((203, 161))
    hole = mask(large.size, 60, 40, 120, 100)
    found = drawn(models, Masked(large, hole, noise.size), request())[0]
    inside = np.asarray(hole) > 0
    np.testing.assert_array_equal(found[~inside], np.asarray(large)[~inside])
    assert (found[inside] != np.asarray(large)[inside]).any(axis=-1).mean() > 0.9


@pytest.mark.parametrize("blur", [0.5, 3, 20])
def test_a_blur_mixes_at_the_edge_and_leaves_what_is_far_from_it(blur: float) -> None:
    black, white = Image.new("RGB", (200, 80)), Image.new("RGB", (200, 80), "white")
    masked = Masked(black, mask(black.size, 0, 0, 99, 79), (200, 80), blur)
    row = np.asarray(masked.with_drawn([white])[0])[40, :, 0]
    assert (np.diff(row.astype(int)) <= 0).all()
    assert row[0] == 255 or blur == 20
    assert abs(int(row[99]) + int(row[100]) - 255) <= 2
    assert row[-1] == 0
    assert ((row > 0) & (row < 255)).sum() >= blur


def test_patches_are_the_latents_pixels_that_the_mask_touches() -> None:
    dots = Image.new("L", (32, 16))
    dots.putpixel((9, 15), 255)
    found = np.asarray(Masked(Image.new("RGB", (32, 16)), dots, (32, 16)).patches)
    expected = np.zeros((16, 32), np.uint8)
    expected[8:16, 8:16] = 255
    np.testing.assert_array_equal(found, expected)


def test_a_model_for_inpainting_draws_text_and_pictures_too(
    nine: LoadedModels, noise: Image.Image
) -> None:
    text = request(mask_url=None, image_url=None, width=80, height=64)
    white = Image.new("L", noise.size, 255)
    nothing = Image.new("RGB", noise.size, "grey")
    size = {"mask_image": white, "width": 80, "height": 64}
    np.testing.assert_array_equal(
        drawn(nine, None, text)[0], plain(nine, text, image=nothing, strength=1.0, **size)
    )
    image = request(mask_url=None, strength=0.7)
    np.testing.assert_array_equal(
        drawn(nine, noise, image)[0], plain(nine, image, image=noise, strength=0.7, **size)
    )


def test_the_models_own_sampler_is_put_back(models: LoadedModels, noise: Image.Image) -> None:
    own = models.base.scheduler
    pipeline = ImagePipeline(models)
    masked = Masked(noise, mask(noise.size, 8, 8, 40, 40), noise.size)
    pipeline.generate(request(), Route.INPAINT, masked, Timings())
    assert pipeline._inpaint.scheduler is own


@pytest.mark.parametrize(
    ("values", "has_refiner", "warned"),
    [
        ({}, False, []),
        ({}, True, ["mask_url: the base model draws within it, without the refiner"]),
        ({"refiner_mode": "none"}, True, []),
        ({"loras": ["a"]}, False, []),
    ],
)
def test_a_mask_is_drawn_by_the_base_model(
    values: dict[str, Any], has_refiner: bool, warned: list[str]
) -> None:
    assert choose_route(request(**values), has_refiner=has_refiner) == (Route.INPAINT, warned)
