"""What a request may say: the JSON Schema, and `parse_job`, which turns a job into an `ImageRequest`.

Field names, defaults and meaning are those of RunPod's worker-sdxl; what is ours comes after them.
"""

from __future__ import annotations

import secrets
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import validation
from entries import parse_loras
from lora.engine.stack import LoraUse, Mode
from lora.fetch.sources import Reference
from validation import InvalidInput, faults_of, field, filled, number

SCHEDULERS = (
    *("PNDM", "KLMS", "DDIM", "K_EULER", "K_EULER_ANCESTRAL"),
    *("DPMSolverMultistep", "DPMSolverSinglestep"),
    *("UniPC", "Euler Karras", "DPM++ 2M", "DPM++ 2M Karras", "DPM++ 2M SDE Karras", "LCM", "TCD"),
)
"""worker-sdxl's seven, then others under the names that web UIs use (classes: `pipelines.schedulers`)."""

DISTILLED, DISTILLED_STEPS = ("LCM", "TCD"), 50
"""Samplers of distilled models, and the steps they were distilled from: no more can be asked for."""

MAX_LORAS = 16

MAX_PROMPT = 10_000
"""Characters of a prompt. It is cut into chunks, of which `pipelines.chunks` allows so many."""

_SIZE = {"minimum": 64, "maximum": 4096, "multipleOf": 8}
_OWN_SIZE = "in pixels; null is the model's own size, 1024 for SDXL"

IMAGE_REQUEST: dict[str, Any] = {
    "$schema": "https://json-schema.org/draft/2020-12/schema",
    "type": "object",
    "additionalProperties": False,
    "properties": {
        "prompt": field(
            "string|null",
            None,
            "What to draw; required unless `image_url` is given. Of any length up to 10,000 characters "
            "or 32 chunks of 75 tokens; `(word)`, `(word:1.3)`, `[word]`, `BREAK` and `<lora:name:0.8>` "
            "as in web UIs, `\\(` for the sign itself (docs/prompts.md)",
            maxLength=MAX_PROMPT,
        ),
        "negative_prompt": field(
            "string|null", None, "What not to draw; written as `prompt` is", maxLength=MAX_PROMPT
        ),
        "height": field("integer|null", None, f"Height {_OWN_SIZE}", **_SIZE),
        "width": field("integer|null", None, f"Width {_OWN_SIZE}", **_SIZE),
        "seed": number(
            "integer|null",
            None,
            (0, 2**64 - 1),
            "Same seed, same picture; null draws one, and the answer tells it",
        ),
        "scheduler": field("string", "DDIM", "The base model's sampler", enum=list(SCHEDULERS)),
        "num_inference_steps": number("integer", 25, (1, 500), "Denoising steps of the base model"),
        "refiner_inference_steps": number(
            "integer", 50, (1, 500), "Denoising steps of the refiner, of which `strength` are done"
        ),
        "guidance_scale": number(
            "number", 7.5, (0, 100), "How strictly the base model follows the prompt"
        ),
        "strength": number(
            "number", 0.3, (0, 1), "Image to image: how much of the picture is drawn anew"
        ),
        "image_url": field(
            "string|null",
            None,
            "Picture to start from: an http(s) URL or a data URI",
            pattern=validation.WEB_OR_DATA,
        ),
        "num_images": number("integer", 1, (1, 4), "How many pictures"),
        "high_noise_frac": number(
            "number|null",
            None,
            (0, 1),
            "Share of the denoising that the base model does before the refiner takes over",
        ),
        "refiner_mode": field(
            "string",
            "img2img",
            "`img2img` as worker-sdxl refines; `ensemble` splits one denoising between "
            "base and refiner at `high_noise_frac` (0.8 if null); `none` leaves the refiner out",
            enum=["img2img", "ensemble", "none"],
        ),
        "clip_skip": number(
            "integer|null",
            None,
            (1, 12),
            "Which layer of the text encoders is used, counted from the last, which is 1, as in web UIs; "
            "null is SDXL's own, 2 (diffusers' `clip_skip` is less by 2)",
        ),
        "lora_tags": field(
            "boolean", True, "Take `<lora:name:scale>` out of prompts and add it to `loras`"
        ),
        "loras": field(
            "array|null",
            None,
            "LoRAs to apply, in this order: each a source, or an object with `path`",
            maxItems=MAX_LORAS,
        ),
        "lora_selection": field(
            "string|array|null",
            None,
            "Presets of this volume, whose LoRAs come before `loras`: a name or a list of "
            "names; `none` or an empty text for none, not even the worker's default",
            items={"type": "string"},
            maxItems=MAX_LORAS,
        ),
        "strict_loras": field(
            "boolean",
            False,
            "Fail on an entry of `loras` that names no LoRA, instead of skipping it, and on a "
            "LoRA with tensors that cannot be used, instead of warning",
        ),
        "lora_mode": field(
            "string|null",
            None,
            "How to apply `loras`, in place of the worker's `LORA_MODE`",
            enum=[*Mode, None],
        ),
        "output_format": field(
            "string", "png", "File format of the pictures", enum=["png", "jpeg", "webp"]
        ),
        "output_quality": number("integer", 95, (1, 100), "Quality of jpeg and webp"),
        "output_fallback": field(
            "string|null",
            None,
            "File format to take where the answer would be too large for the platform",
            enum=["webp", "jpeg", None],
        ),
        "preview": field(
            "boolean",
            False,
            "Send a small picture of how far it is with the progress, every few steps",
        ),
    },
}


@dataclass(frozen=True)
class ImageRequest:
    """A valid request, every default filled in. See `IMAGE_REQUEST` for what each field means."""

    prompt: str
    negative_prompt: str | None
    height: int | None
    width: int | None
    seed: int
    scheduler: str
    num_inference_steps: int
    refiner_inference_steps: int
    guidance_scale: float
    strength: float
    image_url: str | None
    num_images: int
    high_noise_frac: float | None
    refiner_mode: str
    clip_skip: int | None
    lora_tags: bool
    loras: tuple[LoraUse[Reference], ...]
    lora_selection: tuple[str, ...] | None
    strict_loras: bool
    lora_mode: str | None
    output_format: str
    output_quality: int
    output_fallback: str | None
    preview: bool
    warnings: tuple[str, ...] = ()
    """What was let pass, in sentences for the answer."""


def parse_job(job: object) -> ImageRequest:
    """The job's request. Raises: InvalidInput, with every fault at once, each with its path."""
    if not isinstance(job, Mapping):
        raise InvalidInput.of(["the job is not an object"])
    values = job.get("input")
    if not isinstance(values, Mapping):
        raise InvalidInput.of(["input is not an object"])
    faults = list(faults_of(IMAGE_REQUEST, values, ""))
    if not values.get("prompt") and not values.get("image_url"):
        faults.append("prompt is required (unless image_url is given)")
    name, steps = values.get("scheduler"), values.get("num_inference_steps")
    if name in DISTILLED and isinstance(steps, (int, float)) and steps > DISTILLED_STEPS:
        faults.append(f"num_inference_steps: {name} takes at most {DISTILLED_STEPS}")
    strict = bool(values.get("strict_loras"))
    loras = parse_loras(values.get("loras"), values.get("lora_mode"), strict=strict)
    if faults := [*faults, *loras.faults]:
        raise InvalidInput.of(faults)
    chosen = filled(IMAGE_REQUEST, values)
    chosen["prompt"] = chosen["prompt"] or ""
    selected = chosen["lora_selection"]
    if selected is not None:
        chosen["lora_selection"] = (selected,) if isinstance(selected, str) else tuple(selected)
    if chosen["seed"] is None:
        chosen["seed"] = secrets.randbits(32)
    return ImageRequest(**{**chosen, "loras": loras.uses, "warnings": loras.warnings})
