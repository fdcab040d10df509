"""Previews: what the network takes the finished latents to be, in colours fitted to the VAE."""

from __future__ import annotations

import base64
import io
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from pipelines.image import ImagePipeline, Timings
from pipelines.loading import LoadedModels, load_models
from pipelines.preview import MAX_PREVIEW, LatentColours, LatentWatch
from pipelines.routes import Route
from pipelines.schedulers import make_scheduler
from schemas import SCHEDULERS
from settings import Settings
from tests.adapters import randn
from tests.pipelines.test_image import request
from worker.progress import Progress


@pytest.fixture(scope="module")
def models() -> LoadedModels:
    return load_models(Settings(model="demo", device="cpu"))


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction"])
@pytest.mark.parametrize("name", SCHEDULERS)
def test_the_finished_latents_are_found_at_any_step(
    models: LoadedModels, name: str, kind: str
) -> None:
    """A network that knows the truth, asked as each sampler asks: x = alpha * truth + sigma * noise."""
    config = {**models.base.scheduler.config, "prediction_type": kind}
    scheduler = make_scheduler(name, config)
    scheduler.set_timesteps(8)
    truth, noise = randn(1, 4, 8, 8, seed=1), randn(1, 4, 8, 8, seed=2)
    timestep = scheduler.timesteps[4]
    kept = scheduler.alphas_cumprod[round(float(timestep))]
    alpha, sigma = kept**0.5, (1 - kept) ** 0.5
    mixed = alpha * truth + sigma * noise
    by_sigmas = float(scheduler.init_noise_sigma) > 1
    output = noise if kind == "epsilon" else alpha * noise - sigma * truth
    with LatentWatch(scheduler) as watch:
        assert watch.finished() is None
        if hasattr(scheduler, "set_begin_index"):
            scheduler.set_begin_index(4)
        sample = mixed / alpha if by_sigmas else mixed
        scheduler.scale_model_input(sample, timestep)
        scheduler.step(output, timestep, sample, return_dict=False)
        found = watch.finished()
    torch.testing.assert_close(found, truth, rtol=1e-4, atol=1e-4)
    assert "step" not in vars(scheduler)


def test_a_scheduler_has_its_own_step_again_after_an_error(models: LoadedModels) -> None:
    with pytest.raises(ZeroDivisionError), LatentWatch(models.base.scheduler):
        raise ZeroDivisionError
    assert "step" not in vars(models.base.scheduler)


def previews_of(models: LoadedModels, **values: Any) -> tuple[list[Image.Image], Image.Image]:
    """Each step's preview, and the picture."""
    found: list[Image.Image | None] = []
    asked = request(preview=True, num_inference_steps=8, scheduler="K_EULER", **values)
    pictures = ImagePipeline(models).generate(
        asked, Route.BASE, None, Timings(), lambda _done, _total, make: found.append(make())
    )
    assert all(found)
    return [one for one in found if one], pictures[0]


def test_previews_come_close_to_the_picture_and_change_nothing_of_it(models: LoadedModels) -> None:
    previews, picture = previews_of(models)
    plain = ImagePipeline(models).generate(
        request(num_inference_steps=8, scheduler="K_EULER"), Route.BASE, None, Timings()
    )[0]
    assert np.array_equal(np.asarray(picture), np.asarray(plain))
    small = np.asarray(picture.resize(previews[0].size, Image.Resampling.BOX), dtype=float)
    apart = [float(np.abs(np.asarray(one, dtype=float) - small).mean()) for one in previews]
    assert previews[0].size == (picture.width // 8, picture.height // 8)
    assert apart[-1] < float(np.abs(small - 128).mean()) / 2  # what a grey picture is away, halved
    assert apart[-1] < 0.7 * apart[0]


def test_the_colours_are_those_of_the_vae_and_leave_it_as_it_was(models: LoadedModels) -> None:
    vae = models.base.vae
    before = {name: value.clone() for name, value in vae.state_dict().items()}
    colours = LatentColours.fit(vae)
    assert colours.matrix.shape == (3, 5)
    again = LatentColours.fit(vae)
    torch.testing.assert_close(colours.matrix, again.matrix)
    assert all(torch.equal(before[name], value) for name, value in vae.state_dict().items())
    flat = torch.zeros(1, 3, 64, 64)
    flat[:, 0] = 0.6  # a reddish plane, which the fit has not seen
    with torch.no_grad():
        latents = vae.encode(flat).latent_dist.mode() * vae.config.scaling_factor
    seen = np.asarray(colours.picture(latents[0]), dtype=float)[2:-2, 2:-2].mean((0, 1))
    assert seen[0] - seen[1:].max() > 40


def test_a_large_preview_is_made_smaller() -> None:
    colours = LatentColours(torch.zeros(3, 5))
    assert colours.picture(torch.zeros(4, 256, 512)).size == (MAX_PREVIEW, MAX_PREVIEW // 2)


def test_a_preview_is_made_only_for_an_update_that_is_sent() -> None:
    now, sent, made = [0.0], list[dict[str, Any]](), list[int]()
    progress = Progress(sent.append, lambda: now[0])

    def preview() -> str:
        made.append(1)
        return "data:image/webp;base64,AA=="

    for done in range(1, 9):
        progress.step(done, 10, preview)
        now[0] += 0.1
    assert len(made) == len(sent) == 2
    assert sent[0]["preview"] == "data:image/webp;base64,AA=="
    progress.step(10, 10)
    assert "preview" not in sent[-1]


def test_a_jobs_previews_are_pictures(demo_worker: Any) -> None:
    updates: list[dict[str, Any]] = []
    demo_worker_send = demo_worker._send
    demo_worker._send = lambda job, update: updates.append(update)
    try:
        answer = demo_worker(
            {"id": "p", "input": {"prompt": "a circle", "num_inference_steps": 3, "preview": True}}
        )
    finally:
        demo_worker._send = demo_worker_send
    assert "error" not in answer
    uris = [update["preview"] for update in updates if update["phase"] == "generating"]
    assert uris
    kind, data = uris[-1].split(",")
    assert kind == "data:image/webp;base64"
    assert Image.open(io.BytesIO(base64.b64decode(data))).size == (8, 8)
