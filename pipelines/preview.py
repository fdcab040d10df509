"""Previews of a picture that is being denoised, by a linear map from latents to RGB instead of the VAE.

A sampler's step gets noisy latents and the network's output. From both follows the network's estimate of the
finished latents (x0), which the preview shows. Stable Diffusion's latents are close to a small picture in
another colour space; the map between the two spaces is fitted to the VAE of the loaded model.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional

PICTURES, SIDE, PATCHES = 4, 256, 16
"""The pictures that the map is fitted on: how many, their side in pixels, patches of colour along a side."""

MAX_PREVIEW = 192
"""Largest length of a preview's longer side, in pixels."""


@dataclass(frozen=True)
class LatentColours:
    """RGB as a linear function of the latents that the denoising works on."""

    matrix: Tensor
    """[3, channels + 1], float32; the last column is the constant."""

    @classmethod
    @torch.no_grad()
    def fit(cls, vae: Any) -> LatentColours:
        """The least squares fit between pictures of soft patches of colour and what `vae` encodes them to.

        The pictures are the same every time. The fit runs in float32; afterwards the VAE has its former
        precision again.
        """
        chance = torch.Generator().manual_seed(0)
        patches = torch.rand(PICTURES, 3, PATCHES, PATCHES, generator=chance) * 2 - 1
        pictures = functional.interpolate(patches, size=(SIDE, SIDE), mode="bicubic").clamp(-1, 1)
        with _in_float32(vae):
            encoded = vae.encode(pictures.to(vae.device)).latent_dist.mode()
        latents = _channels_last(scaled(encoded, vae.config))
        small = _channels_last(functional.adaptive_avg_pool2d(pictures, encoded.shape[-1]))
        ones = torch.ones(len(latents), 1)
        solution = torch.linalg.lstsq(torch.cat([latents, ones], dim=1), small).solution
        return cls(solution.t())

    def picture(self, latents: Tensor) -> Image.Image:
        """Latents [channels, height, width] as RGB, one pixel each; smaller if they are large."""
        flat = latents.float().cpu().flatten(1)
        values = self.matrix[:, :-1] @ flat + self.matrix[:, -1:]
        pixels = ((values + 1) * 127.5).round_().clamp_(0, 255).to(torch.uint8)
        height, width = latents.shape[1:]
        image = Image.fromarray(pixels.t().reshape(height, width, 3).contiguous().numpy())
        image.thumbnail((MAX_PREVIEW, MAX_PREVIEW))
        return image


@contextmanager
def _in_float32(vae: Any) -> Iterator[None]:
    """Within the block the VAE computes in float32: SDXL's own overflows in half precision."""
    own = vae.dtype
    try:
        if own is not torch.float32:
            vae.float()
        yield
    finally:
        if own is not torch.float32:
            vae.to(own)


@contextmanager
def precise(vae: Any) -> Iterator[None]:
    """Within the block a VAE that overflows in half precision computes in float32, as diffusers has it."""
    overflows = vae.dtype is torch.float16 and getattr(vae.config, "force_upcast", False)
    with _in_float32(vae) if overflows else nullcontext():
        yield


def scaled(latents: Tensor, config: Any) -> Tensor:
    """The VAE's latents as the denoising has them (the reverse of what diffusers does before it decodes)."""
    if statistics := _statistics(latents, config):
        latents = (latents - statistics[0]) / statistics[1]
    return latents * config.scaling_factor


def unscaled(latents: Tensor, config: Any) -> Tensor:
    """The reverse of `scaled`."""
    latents = latents / config.scaling_factor
    if statistics := _statistics(latents, config):
        latents = latents * statistics[1] + statistics[0]
    return latents


def _statistics(latents: Tensor, config: Any) -> tuple[Tensor, Tensor] | None:
    """Mean and deviation of each channel, where the VAE's config has them."""
    values = (getattr(config, name, None) for name in ("latents_mean", "latents_std"))
    mean, std = (
        None if one is None else torch.tensor(one, device=latents.device).view(1, -1, 1, 1)
        for one in values
    )
    return None if mean is None or std is None else (mean, std)


def _channels_last(images: Tensor) -> Tensor:
    """[n, channels, h, w] -> [n * h * w, channels]."""
    return images.cpu().permute(0, 2, 3, 1).flatten(0, 2)


class LatentWatch:
    """Keeps the inputs of the sampler's last step while its `with` block runs, and changes nothing."""

    def __init__(self, scheduler: Any) -> None:
        self._scheduler = scheduler
        self._last_step: tuple[Tensor, Any, Tensor] | None = None

    def __enter__(self) -> LatentWatch:
        step = self._scheduler.step

        @functools.wraps(step)  # pipelines look at its parameters
        def watched(output: Tensor, timestep: Any, sample: Tensor, *rest: Any, **more: Any) -> Any:
            self._last_step = output, timestep, sample
            return step(output, timestep, sample, *rest, **more)

        self._scheduler.step = watched
        return self

    def __exit__(self, *_: object) -> None:
        del self._scheduler.step

    def finished(self) -> Tensor | None:
        """The estimate of the finished latents, [batch, channels, height, width] in float32; None before the
        first step.

        x0 = (x - sigma * epsilon) / alpha, or alpha * x - sigma * v (arXiv 2202.00512), where x has the
        variance of alpha^2 * x0 + sigma^2; samplers that count in sigmas alone scale it by 1 / alpha.
        """
        if self._last_step is None:
            return None
        output, timestep, sample = self._last_step
        config, steps = self._scheduler.config, self._scheduler.alphas_cumprod
        if config.prediction_type == "sample":
            return output.float()
        kept = float(steps[min(round(float(timestep)), len(steps) - 1)])
        alpha, sigma = kept**0.5, (1 - kept) ** 0.5
        noisy = sample.float()
        if float(self._scheduler.init_noise_sigma) > 1:
            noisy = noisy * alpha
        if config.prediction_type == "v_prediction":
            return alpha * noisy - sigma * output.float()
        return (noisy - sigma * output.float()) / alpha
