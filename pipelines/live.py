"""Frames in a few steps: image to image, and text to image, over the networks of an SDXL pipeline.

A step takes the network's estimate of the finished latents, x0, and puts the session's own noise of the next
step on it, as the samplers of distilled models do (LCM, Turbo, Lightning). Each frame has its own step, so
frames at different steps can share one batch, and none depends on another.

Guidance pushes x0 away from an origin o: o + scale * (x0 - o). With `full`, o is the estimate under the
negative prompt at each step. Residual guidance (StreamDiffusion, arXiv 2312.12491) saves these forwards:
`self` takes the picture that came in, `initialize` the negative prompt's estimate at the first step. (The
paper states it as noise: the residual noise that leads x_t to o is (x_t - a * o) / b, and the guided noise
gives the x0 above.)
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from enum import StrEnum
from typing import Any, NamedTuple

import torch
from PIL import Image, ImageOps
from torch import Tensor

from lora.errors import LoraUnsupported
from lora.formats.embeddings import TokenEmbedding
from pipelines.image import ImagePipeline
from pipelines.preview import precise, scaled, unscaled
from pipelines.prompts import Conditions, encode

INDICES = 50
"""What `t_index` counts in: 0 is pure noise, 49 nearly the finished picture."""


class Guidance(StrEnum):
    """What pushes a frame away from the negative prompt, or from what came in."""

    NONE = "none"
    SELF = "self"
    INITIALIZE = "initialize"
    FULL = "full"


@dataclass(frozen=True)
class Spec:
    """What stays the same for all frames of a stream."""

    width: int
    height: int
    t_index: tuple[int, ...]
    """The steps, as indices of `INDICES`, rising."""
    guidance: Guidance = Guidance.NONE
    guidance_scale: float = 1.2

    @property
    def steps(self) -> int:
        """How many steps a frame takes."""
        return len(self.t_index)

    @property
    def negative(self) -> bool:
        """Whether the negative prompt counts."""
        return self.guidance in (Guidance.INITIALIZE, Guidance.FULL)


def spread(steps: int, strength: float) -> tuple[int, ...]:
    """The `t_index` of so many steps over the last `strength` of the denoising."""
    first = min(round(INDICES * (1 - strength)), INDICES - steps)
    return tuple(first + (INDICES - first) * step // steps for step in range(steps))


@dataclass(eq=False)
class Frame:
    """One picture under way."""

    latents: Tensor
    """[1, channels, h, w] in float32: noisy, and finished after the last step."""
    noise: Tensor
    """[steps, channels, h, w] in float32."""
    conditions: Conditions
    origin: Tensor
    """What residual guidance pushes away from, as `latents`."""
    step: int = 0


class Row(NamedTuple):
    """One row of a step's batch."""

    frame: int
    """The index of its frame."""
    negative: bool


class LiveStream:
    """Draws frames of one `Spec` with the networks of a pipeline, which it does not change."""

    def __init__(self, pipeline: ImagePipeline, spec: Spec) -> None:
        """Raises: LoraUnsupported if the model was trained for inpainting alone."""
        self.spec = spec
        self._pipeline, self._base = pipeline, pipeline.base
        self._unet = self._base.unet
        if self._unet.config.in_channels != self._unet.config.out_channels:
            raise LoraUnsupported(
                "this model draws within masks only", "Live frames need another WORKER_MODEL."
            )
        self._device, self._dtype = pipeline.device, self._unet.dtype
        self._vae = pipeline.tiny_vae or self._base.vae
        alphas = self._base.scheduler.alphas_cumprod
        times = torch.linspace(len(alphas) - 1, len(alphas) / INDICES - 1, INDICES).round().long()
        times = times[list(spec.t_index)]
        self._times = times.to(self._device)
        kept = alphas[times].view(-1, 1, 1, 1).to(self._device, torch.float32)
        self._a, self._b = kept.sqrt(), (1 - kept).sqrt()
        self._shape = (
            int(self._unet.config.in_channels),
            spec.height // self._base.vae_scale_factor,
            spec.width // self._base.vae_scale_factor,
        )
        size = spec.height, spec.width
        self._sizes = torch.tensor([[*size, 0, 0, *size]], device=self._device, dtype=self._dtype)

    def noise(self, seed: int) -> Tensor:
        """The noise of every step, [steps, channels, h, w]: the same for a seed on every device."""
        chance = torch.Generator().manual_seed(seed)
        return torch.randn(self.spec.steps, *self._shape, generator=chance).to(self._device)

    def tokens(self, words: Sequence[TokenEmbedding]) -> AbstractContextManager[tuple[str, ...]]:
        """See `ImagePipeline.tokens`."""
        return self._pipeline.tokens(words)

    def conditions(self, prompt: str, negative: str | None) -> Conditions:
        """The encoded prompts. Raises: InvalidInput if one is too long."""
        return encode(self._base, prompt, negative, guided=self.spec.negative)

    @torch.no_grad()
    def encode(self, picture: Image.Image) -> Tensor:
        """A picture, cropped to the stream's aspect, as latents [1, channels, h, w] in float32."""
        size = self.spec.width, self.spec.height
        fitted = ImageOps.fit(picture.convert("RGB"), size, Image.Resampling.BICUBIC)
        pixels = torch.frombuffer(bytearray(fitted.tobytes()), dtype=torch.uint8)
        pixels = pixels.to(self._device).view(1, size[1], size[0], 3).permute(0, 3, 1, 2)
        with precise(self._vae):
            encoded = self._vae.encode(pixels.to(self._vae.dtype) / 127.5 - 1)
            is_tiny = hasattr(encoded, "latents")
            latents = encoded.latents if is_tiny else encoded.latent_dist.mode()
        return scaled(latents.float(), self._vae.config)

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Image.Image:
        """Finished latents as an RGB picture."""
        latents = unscaled(latents, self._vae.config)
        with precise(self._vae):
            drawn = self._vae.decode(latents.to(self._vae.dtype), return_dict=False)[0][0]
        pixels = ((drawn.float() + 1) * 127.5).round_().clamp_(0, 255).to(torch.uint8)
        return Image.fromarray(pixels.permute(1, 2, 0).cpu().numpy())

    def begin(self, latents: Tensor | None, noise: Tensor, conditions: Conditions) -> Frame:
        """A frame before its first step. `latents`: of the picture to start from; None begins with noise."""
        if latents is None:
            return Frame(noise[:1], noise, conditions, torch.zeros_like(noise[:1]))
        return Frame(self._a[:1] * latents + self._b[:1] * noise[:1], noise, conditions, latents)

    def blank(self, like: Conditions, step: int) -> Frame:
        """A frame that fills a row of a batch, to be thrown away."""
        nothing = torch.zeros(self.spec.steps, *self._shape, device=self._device)
        zeros = [t if t is None else torch.zeros_like(t) for t in like]
        empty = Conditions._make(zeros)
        return Frame(nothing[:1], nothing, empty, nothing[:1], step)

    def rows(self, steps: Sequence[int]) -> list[Row]:
        """The rows that a batch of frames at these steps has."""
        guidance = self.spec.guidance
        extra = [
            Row(index, negative=True)
            for index, step in enumerate(steps)
            if guidance is Guidance.FULL or (guidance is Guidance.INITIALIZE and step == 0)
        ]
        return [*extra, *(Row(index, negative=False) for index in range(len(steps)))]

    @torch.no_grad()
    def step(self, frames: Sequence[Frame]) -> None:
        """Takes every frame one step on, in one batch. One that has taken all its steps holds x0."""
        at = torch.tensor([frame.step for frame in frames], device=self._device)
        rows = self.rows([frame.step for frame in frames])
        latents = torch.cat([frame.latents for frame in frames])
        estimates = self._estimates(frames, rows, latents, at)
        finished = estimates[len(rows) - len(frames) :]
        if self.spec.guidance is not Guidance.NONE:
            for row, estimate in zip(rows, estimates, strict=True):
                if row.negative:
                    frames[row.frame].origin = estimate[None]
            origin = torch.cat([frame.origin for frame in frames])
            finished = origin + self.spec.guidance_scale * (finished - origin)
        for frame, own in zip(frames, finished, strict=True):
            frame.step += 1
            frame.latents = own[None]
            if (step := frame.step) < self.spec.steps:
                noise = frame.noise[step : step + 1]
                frame.latents = self._a[step] * frame.latents + self._b[step] * noise

    def _estimates(
        self, frames: Sequence[Frame], rows: Sequence[Row], latents: Tensor, at: Tensor
    ) -> Tensor:
        """The network's x0 of every row, in float32."""
        own = torch.tensor([row.frame for row in rows], device=self._device)
        latents, at = latents[own], at[own]
        sides = [_side(frames[row.frame].conditions, negative=row.negative) for row in rows]
        out = self._unet(
            latents.to(self._dtype),
            self._times[at],
            encoder_hidden_states=torch.cat([side.embeds for side in sides]),
            timestep_cond=self._guidance_embedding(len(rows)),
            added_cond_kwargs={
                "text_embeds": torch.cat([side.pooled for side in sides]),
                "time_ids": self._sizes.expand(len(rows), -1),
            },
            return_dict=False,
        )[0].float()
        a, b = self._a[at], self._b[at]
        kind = self._base.scheduler.config.prediction_type
        if kind == "sample":
            return out
        if kind == "v_prediction":
            return a * latents - b * out
        return (latents - b * out) / a

    def _guidance_embedding(self, rows: int) -> Tensor | None:
        """For models whose guidance was distilled into the network (LCM)."""
        width = self._unet.config.time_cond_proj_dim
        if width is None:
            return None
        scale = torch.full((rows,), self.spec.guidance_scale - 1)
        embedding: Any = self._base.get_guidance_scale_embedding(scale, embedding_dim=width)
        return embedding.to(self._device, self._dtype)


class _Side(NamedTuple):
    embeds: Tensor
    pooled: Tensor


def _side(conditions: Conditions, *, negative: bool) -> _Side:
    embeds, pooled = conditions.prompt_embeds, conditions.pooled_prompt_embeds
    if negative:
        if (
            conditions.negative_prompt_embeds is None
            or conditions.negative_pooled_prompt_embeds is None
        ):
            raise ValueError("the negative prompt was not encoded")
        embeds = conditions.negative_prompt_embeds
        pooled = conditions.negative_pooled_prompt_embeds
    return _Side(embeds, pooled)
