"""What a denoising has come to, as a small picture: a linear map of the latents, without the VAE.

A step of the sampler sees noisy latents and the network's output; together they say what the network
takes the finished latents to be (x0), and that is what is shown. Latents of Stable Diffusion are close to a
small picture in another colour space: the map from one to the other is fitted to the VAE at hand.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional

PICTURES, SIDE, PATCHES = 4, 256, 16
"""What the map is fitted on: pictures, their side in pixels, patches of colour along it."""

LARGEST = 192
"""Pixels of a preview's longer side, at most."""


@dataclass(frozen=True)
class LatentColours:
    """RGB as a linear function of the latents, as the denoising has them."""

    matrix: Tensor
    """[3, channels + 1], float32; the last column is the constant."""

    @classmethod
    @torch.no_grad()
    def fit(cls, vae: Any) -> LatentColours:
        """The least squares fit between pictures of soft patches of colour and what `vae` encodes them to.

        The pictures are the same every time. Computes in float32, and leaves the VAE in the precision that
        it had.
        """
        chance = torch.Generator().manual_seed(0)
        patches = torch.rand(PICTURES, 3, PATCHES, PATCHES, generator=chance) * 2 - 1
        pictures = functional.interpolate(patches, size=(SIDE, SIDE), mode="bicubic").clamp(-1, 1)
        with _in_float32(vae):
            encoded = vae.encode(pictures.to(vae.device)).latent_dist.mode()
        latents = _channels_last(_scaled(encoded, vae.config))
        small = _channels_last(functional.adaptive_avg_pool2d(pictures, encoded.shape[-1]))
        ones = torch.ones(len(latents), 1)
        found = torch.linalg.lstsq(torch.cat([latents, ones], dim=1), small).solution
        return cls(found.t())

    def picture(self, latents: Tensor) -> Image.Image:
        """Latents [channels, height, width] as RGB, one pixel each; smaller if they are large."""
        flat = latents.float().cpu().flatten(1)
        values = self.matrix[:, :-1] @ flat + self.matrix[:, -1:]
        pixels = ((values + 1) * 127.5).round_().clamp_(0, 255).to(torch.uint8)
        height, width = latents.shape[1:]
        image = Image.fromarray(pixels.t().reshape(height, width, 3).contiguous().numpy())
        image.thumbnail((LARGEST, LARGEST))
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


def _scaled(latents: Tensor, config: Any) -> Tensor:
    """The VAE's latents as the denoising has them (the reverse of what diffusers does before it decodes)."""
    if config.latents_mean is not None and config.latents_std is not None:
        mean, std = (
            torch.tensor(values, device=latents.device).view(1, -1, 1, 1)
            for values in (config.latents_mean, config.latents_std)
        )
        return (latents - mean) / std * config.scaling_factor
    return latents * config.scaling_factor


def _channels_last(images: Tensor) -> Tensor:
    """[n, channels, h, w] -> [n * h * w, channels]."""
    return images.cpu().permute(0, 2, 3, 1).flatten(0, 2)


class Watch:
    """Sees the steps of a sampler within its block; changes nothing of what they do."""

    def __init__(self, scheduler: Any) -> None:
        self._scheduler = scheduler
        self._seen: tuple[Tensor, Any, Tensor] | None = None

    def __enter__(self) -> Watch:
        step = self._scheduler.step

        @functools.wraps(step)  # pipelines look at its parameters
        def seen(output: Tensor, timestep: Any, sample: Tensor, *rest: Any, **more: Any) -> Any:
            self._seen = output, timestep, sample
            return step(output, timestep, sample, *rest, **more)

        self._scheduler.step = seen
        return self

    def __exit__(self, *_: object) -> None:
        del self._scheduler.step

    def finished(self) -> Tensor | None:
        """What the network takes the finished latents to be, [batch, channels, height, width], float32;
        None before the first step.

        x0 = (x - sigma * epsilon) / alpha, or alpha * x - sigma * v (arXiv 2202.00512), where x has the
        variance of alpha^2 * x0 + sigma^2; samplers that count in sigmas alone scale it by 1 / alpha.
        """
        if self._seen is None:
            return None
        output, timestep, sample = self._seen
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
