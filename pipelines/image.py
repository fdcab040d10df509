"""SDXL, base and refiner, behind one call that draws a request."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

import torch
from PIL import Image
from torch import nn

from lora.formats.embeddings import TokenEmbedding
from pipelines.chunks import Measured, measure
from pipelines.inpainting import Masked, inpaint_options, inpaint_pipeline, whole_mask
from pipelines.preview import LatentColours, LatentWatch
from pipelines.prompts import encode
from pipelines.routes import Route
from pipelines.schedulers import make_scheduler
from pipelines.timings import Timings
from pipelines.tokens import added_tokens
from schemas import ImageRequest, parse_job

if TYPE_CHECKING:
    from diffusers import StableDiffusionXLPipeline

    from pipelines.loading import LoadedModels

ENSEMBLE_FRACTION = 0.8
"""Where the refiner takes over in an ensemble if the request does not say: SDXL's own default."""

Preview = Callable[[], Image.Image | None]
"""Makes a small picture of the denoising's present state; costs nothing unless it is called."""

StepCallback = Callable[[int, int, Preview], None]
"""Called after each denoising step with the steps done, the steps in all, and a preview. The preview works
within that call only, and returns None unless the request has `preview`."""


class ImagePipeline:
    """The SDXL base, and the refiner where there is one, behind one call."""

    def __init__(self, models: LoadedModels) -> None:
        from diffusers import StableDiffusionXLImg2ImgPipeline

        self.name = models.name
        self.device = models.device
        self.has_refiner = models.refiner is not None
        self.tiny_vae = models.tiny_vae
        """What live frames are encoded and decoded with, where the settings name one."""
        self._base = models.base
        self._refiner = models.refiner
        self._base_image = StableDiffusionXLImg2ImgPipeline(
            **models.base.components,
            force_zeros_for_empty_prompt=models.base.config.force_zeros_for_empty_prompt,
            add_watermarker=False,
        )
        self._base_image.set_progress_bar_config(disable=True)
        self._inpaint = inpaint_pipeline(models.base)
        self._fills_masks = models.base.unet.config.in_channels == 9
        """Whether the model was trained for inpainting: then it draws everything within a mask."""

    @property
    def components(self) -> Mapping[str, nn.Module]:
        """What a LoRA may change: the base model's UNet and text encoders."""
        names = ("unet", "text_encoder", "text_encoder_2")
        return {name: getattr(self._base, name) for name in names if getattr(self._base, name)}

    @property
    def base(self) -> StableDiffusionXLPipeline:
        """The base model's networks, for `pipelines.live`."""
        return self._base

    @property
    def _of_base(self) -> tuple[Any, ...]:
        """The pipelines that share the base model's networks."""
        return self._base, self._base_image, self._inpaint

    @property
    def default_size(self) -> int:
        """The width and height that the model was made for, in pixels."""
        return int(self._base.unet.config.sample_size * self._base.vae_scale_factor)

    @cached_property
    def _colours(self) -> LatentColours:
        return LatentColours.fit(self._base.vae)

    def tokens(
        self, embeddings: Sequence[TokenEmbedding]
    ) -> AbstractContextManager[tuple[str, ...]]:
        """The words of `embeddings` work in prompts within the block; yields warnings. See `added_tokens`."""
        pipelines = [one for one in (*self._of_base, self._refiner) if one]
        return added_tokens(pipelines, embeddings)

    def measure(self, request: ImageRequest, embeddings: Sequence[TokenEmbedding]) -> Measured:
        """How the base model will read the request's prompts. See `pipelines.chunks.measure`."""
        return measure(self._base, request, embeddings)

    def warm_up(self) -> None:
        """Draws one step of a picture, so that no job waits for what the device sets up at its first use."""
        request = parse_job({"input": {"prompt": "a picture", "num_inference_steps": 1, "seed": 0}})
        self.generate(request, Route.BASE, None, Timings())

    def generate(
        self,
        request: ImageRequest,
        route: Route,
        start: Image.Image | Masked | None,
        timings: Timings,
        on_step: StepCallback = lambda done, total, preview: None,
    ) -> list[Image.Image]:
        """Draws the request: `num_images` RGB pictures.

        `start` is what the two image routes start from, and the picture with its mask for inpainting, which
        gives back every pixel that the mask keeps, bit for bit. The same request and seed give the same
        pixels, whatever was drawn before. Adds encode_prompt, denoise and decode to `timings`.
        """
        generator = torch.Generator(self.device).manual_seed(request.seed)
        colours = self._colours if request.preview else None
        draw = _Drawing(request, generator, timings, on_step, colours)
        with self._as_they_were(request, route):
            if route is Route.REFINER_IMAGE:
                return self._refine(draw, image=start)
            if isinstance(start, Masked):
                return start.with_drawn(self._within(draw, start))
            if start is not None and self._fills_masks:
                return self._within(draw, whole_mask(start))
            if start is not None:
                return draw.run(
                    self._base_image,
                    **self._base_options(request),
                    image=start,
                    strength=request.strength,
                )
            if route is Route.BASE:
                return self._from_text(draw)
            return self._base_then_refiner(draw, route)

    def _within(self, draw: _Drawing, masked: Masked) -> list[Image.Image]:
        options = inpaint_options(masked, draw.request.strength)
        return draw.run(self._inpaint, **self._base_options(draw.request), **options)

    def _from_text(self, draw: _Drawing, **options: Any) -> Any:
        """The base model from pure noise; one that fills masks is given one that leaves nothing."""
        size = self._size(draw.request)
        pipeline, started = self._base, size
        if self._fills_masks:
            nothing = Image.new("RGB", (size["width"], size["height"]), "grey")
            pipeline, started = self._inpaint, inpaint_options(whole_mask(nothing), 1.0)
        return draw.run(pipeline, **self._base_options(draw.request), **started, **options)

    def _base_then_refiner(self, draw: _Drawing, route: Route) -> list[Image.Image]:
        request, split = draw.request, draw.request.high_noise_frac
        if route is Route.ENSEMBLE and split is None:
            split = ENSEMBLE_FRACTION
        latents = self._from_text(draw, denoising_end=split, output_type="latent")
        if route is Route.ENSEMBLE:
            return draw.run(
                self._refiner,
                negative_prompt=request.negative_prompt,
                guidance_scale=request.guidance_scale,
                num_inference_steps=request.num_inference_steps,
                denoising_start=split,
                image=latents,
            )
        return self._refine(draw, image=latents)

    def _refine(self, draw: _Drawing, image: Any) -> list[Image.Image]:
        """As worker-sdxl calls its refiner: with the prompt alone, and its own guidance scale."""
        return draw.run(
            self._refiner,
            negative_prompt=None,
            guidance_scale=5.0,
            num_inference_steps=draw.request.refiner_inference_steps,
            strength=draw.request.strength,
            image=image,
        )

    def _base_options(self, request: ImageRequest) -> dict[str, Any]:
        return {
            "negative_prompt": request.negative_prompt,
            "guidance_scale": request.guidance_scale,
            "num_inference_steps": request.num_inference_steps,
        }

    def _size(self, request: ImageRequest) -> dict[str, Any]:
        side = self.default_size
        return {"height": request.height or side, "width": request.width or side}

    @contextmanager
    def sparing(self) -> Iterator[None]:
        """Within the block the VAE decodes picture by picture, in tiles: less memory, other last digits."""
        vaes = {pipeline.vae for pipeline in (self._base, self._refiner) if pipeline}
        own = [(vae, vae.use_slicing, vae.use_tiling) for vae in vaes]
        try:
            for vae in vaes:
                vae.enable_slicing()
                vae.enable_tiling()
            yield
        finally:
            for vae, slicing, tiling in own:
                vae.use_slicing, vae.use_tiling = slicing, tiling

    @contextmanager
    def _as_they_were(self, request: ImageRequest, route: Route) -> Iterator[None]:
        """Gives the pipelines the request's sampler, and their own back afterwards.

        diffusers also turns a half precision VAE to float32 to decode, and leaves it so if that fails.
        """
        both = (self._base, self._refiner)
        vaes = {pipeline.vae: _dtype(pipeline.vae) for pipeline in both if pipeline}
        chosen = [*self._of_base]
        if route is Route.ENSEMBLE:  # both halves of one denoising must count alike
            chosen.append(self._refiner)
        own = [pipeline.scheduler for pipeline in chosen]
        # The base's pipelines share theirs, of which one is used: making a scheduler takes a millisecond.
        made = {one: make_scheduler(request.scheduler, one.config) for one in dict.fromkeys(own)}
        try:
            for pipeline, scheduler in zip(chosen, own, strict=True):
                pipeline.scheduler = made[scheduler]
            yield
        finally:
            for pipeline, scheduler in zip(chosen, own, strict=True):
                pipeline.scheduler = scheduler
            for vae, precision in vaes.items():
                if _dtype(vae) is not precision:
                    vae.to(precision)


def _dtype(network: nn.Module) -> torch.dtype:
    """That of the first weight: diffusers' own `dtype` goes through all modules."""
    return next(network.parameters()).dtype


@dataclass
class _Drawing:
    """One request under way: the generator that all its calls share, and where their times go."""

    request: ImageRequest
    generator: torch.Generator
    timings: Timings
    on_step: StepCallback
    colours: LatentColours | None = None
    """For previews, where the request wants them."""

    def run(
        self,
        pipeline: Any,
        *,
        negative_prompt: str | None,
        guidance_scale: float,
        **options: Any,
    ) -> Any:
        """One call of a pipeline, timed by phase. Returns its images, or latents if so asked.

        The prompt is encoded first and on its own: of any length, and with its weights.
        """
        with self.timings.measure("encode_prompt"):
            conditions = encode(
                pipeline,
                self.request.prompt,
                negative_prompt,
                guided=guidance_scale > 1 and pipeline.unet.config.time_cond_proj_dim is None,
                clip_skip=self.request.clip_skip,
            )
        begun = time.perf_counter()
        denoised = begun
        watch = LatentWatch(pipeline.scheduler)

        def preview() -> Image.Image | None:
            latents = watch.finished()
            return None if latents is None or not self.colours else self.colours.picture(latents[0])

        def after_step(pipe: Any, step: int, _t: Any, tensors: dict[str, Any]) -> dict[str, Any]:
            nonlocal denoised
            if step + 1 >= pipe.num_timesteps and pipe._execution_device.type == "cuda":
                torch.cuda.synchronize()  # else the last steps would count as decoding
            denoised = time.perf_counter()
            self.on_step(step + 1, pipe.num_timesteps, preview)
            return tensors

        with watch if self.colours else nullcontext():
            images = pipeline(
                **conditions._asdict(),
                **options,
                guidance_scale=guidance_scale,
                num_images_per_prompt=self.request.num_images,
                generator=self.generator,
                callback_on_step_end=after_step,
            ).images
        self.timings.add("denoise", denoised - begun)
        self.timings.add("decode", time.perf_counter() - denoised)
        return images
