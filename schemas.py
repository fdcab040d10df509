"""What a request may say: the JSON Schema, and `parse_job`, which turns a job into an `ImageRequest`.

Field names, defaults and meaning are those of RunPod's worker-sdxl; what is ours comes after them.
"""

from __future__ import annotations

import math
import secrets
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import validation
from entries import parse_loras
from lora.engine.stack import LoraUse, Mode
from lora.fetch.sources import Reference
from validation import InvalidInput, faults_of, field, filled, number, understood

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

MAX_AREA = 4096 * 4096

_SIZE = {"minimum": 8, "maximum": 16_384, "multipleOf": 8}
_OWN_SIZE = (
    "in pixels; null is the model's own size, 1024 for SDXL, or follows the picture's aspect"
)
_PICTURE = "an http(s) URL, a data URI or base64"

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
            (-(2**63), 2**64 - 1),
            "The same seed gives the same picture; null or -1 chooses one at random, and the answer has it",
        ),
        "scheduler": field("string", "DDIM", "The base model's sampler", enum=list(SCHEDULERS)),
        "num_inference_steps": number(
            "integer", 25, (1, 1000), "Denoising steps of the base model"
        ),
        "refiner_inference_steps": number(
            "integer",
            50,
            (1, 1000),
            "Denoising steps of the refiner; it does the share `strength` of them",
        ),
        "guidance_scale": number(
            "number",
            7.5,
            (-1000, 1000),
            "How strictly the base model follows the prompt; up to 1 the negative prompt does not count",
        ),
        "strength": number(
            "number|null",
            None,
            (0, 1),
            "Image to image: how much of the picture is drawn anew; null is 0.3, and 1 within a mask",
        ),
        "image_url": field(
            "string|null",
            None,
            f"Picture to start from: {_PICTURE}. Without `width` and `height` it is drawn near the model's "
            "size, at its own aspect (docs/pictures.md)",
            pattern=validation.PICTURE,
        ),
        "mask_url": field(
            "string|null",
            None,
            f"Inpainting: {_PICTURE} of a mask for `image_url`. White is drawn anew, black is kept bit "
            "for bit",
            pattern=validation.PICTURE,
        ),
        "mask_blur": number(
            "number",
            0,
            (0, 256),
            "How softly drawn and kept pixels mix at the mask's edge, in pixels",
        ),
        "resize_mode": field(
            "string",
            "cover",
            "How `image_url` comes to `width` and `height`: `cover` cuts off what stands over, `contain` "
            "shows all and continues the edges, `stretch` changes the aspect",
            enum=["cover", "contain", "stretch"],
        ),
        "num_images": number("integer", 1, (1, 4), "How many pictures"),
        "seed_mode": field(
            "string",
            "batch",
            "Several pictures: `batch` draws all from one seed, as worker-sdxl; `each` draws picture i "
            "as `seed` + i draws it alone, and the answer has `seeds`",
            enum=["batch", "each"],
        ),
        "high_noise_frac": number(
            "number|null",
            None,
            (0, 1),
            "Share of the denoising that the base model does before the refiner takes over",
        ),
        "refiner_mode": field(
            "string",
            "img2img",
            "`img2img` refines as worker-sdxl does; `ensemble` splits one denoising between "
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
            "LoRAs to apply; each is a source, or an object with `path`",
            maxItems=MAX_LORAS,
        ),
        "lora_selection": field(
            "string|array|null",
            None,
            "A preset's name, or a list of names; their LoRAs are applied with those of `loras`. "
            "`none` or an empty text turns off the worker's default preset, too",
            items={"type": "string"},
            maxItems=MAX_LORAS,
        ),
        "strict_loras": field(
            "boolean",
            False,
            "`true` fails the job, instead of going on with a warning, if an entry of `loras` names "
            "no LoRA, or a LoRA has tensors that cannot be used",
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
            "File format that is used instead if the answer would be too large for the platform",
            enum=["webp", "jpeg", None],
        ),
        "preview": field(
            "boolean",
            False,
            "`true` adds a small picture of the current state to the progress, every few steps",
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
    mask_url: str | None
    mask_blur: float
    resize_mode: str
    num_images: int
    seed_mode: str
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
    given = job.get("input")
    if not isinstance(given, Mapping):
        raise InvalidInput.of(["input is not an object"])
    values, renames, faults = understood(IMAGE_REQUEST, given, "")
    faults += [*faults_of(IMAGE_REQUEST, values, ""), *_contradictions(values)]
    strict = values.get("strict_loras") is True
    loras = parse_loras(values.get("loras"), values.get("lora_mode"), strict=strict)
    if faults := [*faults, *loras.faults]:
        raise InvalidInput.of(faults)
    chosen = filled(IMAGE_REQUEST, values)
    selected = chosen["lora_selection"]
    if selected is not None:
        chosen["lora_selection"] = (selected,) if isinstance(selected, str) else tuple(selected)
    if chosen["strength"] is None:
        chosen["strength"] = 1.0 if chosen["mask_url"] else 0.3
    seed = chosen["seed"]
    return ImageRequest(
        **{
            **chosen,
            "prompt": chosen["prompt"] or "",
            "seed": secrets.randbits(32) if seed in (None, -1) else seed % 2**64,
            "loras": loras.uses,
            "warnings": (*renames, *_idle(values), *loras.warnings),
        }
    )


def _idle(values: Mapping[str, Any]) -> Iterator[str]:
    """A sentence for each field that has nothing to do in this request."""
    if values.get("mask_blur") and not values.get("mask_url"):
        yield "mask_blur does nothing without mask_url"
    sized = values.get("width") or values.get("height")
    if "resize_mode" in values and not (sized and values.get("image_url")):
        yield "resize_mode does nothing without image_url and one of width and height"


def _contradictions(values: Mapping[str, Any]) -> Iterator[str]:
    """What is wrong between the fields of a request, each of which may be wrong itself."""
    if not values.get("prompt") and not values.get("image_url"):
        yield "prompt is required (unless image_url is given)"
    if values.get("mask_url") and not values.get("image_url"):
        yield "mask_url needs the picture that the mask is for, as image_url"
    width, height = values.get("width"), values.get("height")
    sides = [side for side in (width, height) if isinstance(side, (int, float))]
    if len(sides) == 2 and math.prod(sides) > MAX_AREA:
        yield f"width and height: {width} x {height} is more than {MAX_AREA / 1e6:.1f} megapixels"
    name, steps = values.get("scheduler"), values.get("num_inference_steps")
    if name in DISTILLED and isinstance(steps, (int, float)) and steps > DISTILLED_STEPS:
        yield f"num_inference_steps: {name} takes at most {DISTILLED_STEPS}"
