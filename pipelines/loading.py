"""Loads the base weights: from a folder, a single file, or a hub repo that was baked into the image."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import torch
from diffusers import (
    AutoencoderKL,
    AutoencoderTiny,
    DiffusionPipeline,
    StableDiffusionXLImg2ImgPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from diffusers.utils import logging as of_diffusers
from safetensors import safe_open
from transformers.utils import logging as of_transformers

from pipelines.obtaining import obtain
from pipelines.weights import find_weights, hubs
from settings import STOCK_MODEL, Settings

DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16, "float32": torch.float32}

AnyPipeline = TypeVar("AnyPipeline", bound=DiffusionPipeline)


@dataclass(frozen=True)
class LoadedModels:
    """The pipelines that a worker needs, on their device."""

    name: str
    base: StableDiffusionXLPipeline
    refiner: StableDiffusionXLImg2ImgPipeline | None
    device: torch.device
    tiny_vae: AutoencoderTiny | None = None
    seconds: Mapping[str, float] = field(default_factory=dict)
    """How long the stages took: `build` (the networks from their files) and `to_device`."""


def load_models(settings: Settings) -> LoadedModels:
    """Loads base, VAE and refiner as the settings say; asks no network but with WORKER_WEIGHTS=download.

    Raises: WeightsMissing; WeightsIncomplete, which names a file that is truncated or missing.
    """
    # First, so that who has nothing is told of the model, and not of its VAE.
    path = obtain(settings.model, settings)
    for logs in (of_diffusers, of_transformers):
        logs.disable_progress_bar()
    begun = time.perf_counter()
    device = torch.device(_device(settings.device))
    dtype = DTYPES[_dtype(settings.dtype, device)]
    vae = None
    if settings.vae_source:
        own = obtain(settings.vae_source, settings)
        vae = AutoencoderKL.from_pretrained(own, dtype=dtype, local_files_only=True)
    base = _load(StableDiffusionXLPipeline, path, settings, dtype, vae)
    refiner = None
    if settings.refiner_source:
        kind = StableDiffusionXLImg2ImgPipeline
        refiner = _load(kind, obtain(settings.refiner_source, settings), settings, dtype, vae)
    tiny = None
    if settings.tiny_vae_source:
        small = obtain(settings.tiny_vae_source, settings)
        tiny = AutoencoderTiny.from_pretrained(small, dtype=dtype, local_files_only=True)
    built = time.perf_counter()
    for pipeline in filter(None, (base, refiner)):
        pipeline.to(device)
    if tiny is not None:
        tiny.to(device)
    if device.type == "cuda":
        torch.cuda.synchronize()
    seconds = {"build": built - begun, "to_device": time.perf_counter() - built}
    for pipeline in filter(None, (base, refiner)):
        pipeline.set_progress_bar_config(disable=True)
    name = settings.model.rstrip("/").rsplit("/", 1)[-1].removesuffix(".safetensors")
    return LoadedModels(name, base, refiner, device, tiny, seconds)


def _load(
    pipeline: type[AnyPipeline],
    path: Path,
    settings: Settings,
    dtype: torch.dtype,
    vae: AutoencoderKL | None,
) -> AnyPipeline:
    parts: dict[str, Any] = {"vae": vae} if vae is not None else {}
    if path.is_file():
        # A single checkpoint holds no configs; SDXL's own are baked into the image.
        config = str(find_weights(STOCK_MODEL, hubs(settings), whole=False))
        if (channels := _input_channels(path)) != 4:
            parts["unet"] = UNet2DConditionModel.from_single_file(
                str(path),
                config=config,
                subfolder="unet",
                in_channels=channels,
                dtype=dtype,
                local_files_only=True,
            )
        return pipeline.from_single_file(
            str(path), config=config, dtype=dtype, local_files_only=True, **parts
        )
    half = any(path.glob("*/*.fp16.safetensors"))
    return pipeline.from_pretrained(
        path,
        dtype=dtype,
        variant="fp16" if half else None,
        use_safetensors=True,
        add_watermarker=False,
        local_files_only=True,
        **parts,
    )


def _input_channels(checkpoint: Path) -> int:
    """How many channels the UNet of a single checkpoint takes: 9 if it was trained for inpainting."""
    first = "model.diffusion_model.input_blocks.0.0.weight"
    with safe_open(checkpoint, framework="np") as file:
        return int(file.get_slice(first).get_shape()[1]) if first in file.keys() else 4  # noqa: SIM118


def _device(name: str) -> str:
    if name != "auto":
        return name
    return "cuda" if torch.cuda.is_available() else "cpu"


def _dtype(name: str, device: torch.device) -> str:
    if name != "auto":
        return name
    return "float16" if device.type == "cuda" else "float32"
