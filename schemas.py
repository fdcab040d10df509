"""What a request may say: the JSON Schema, and `parse_job`, which turns a job into an `ImageRequest`.

Field names, defaults and meaning are those of RunPod's worker-sdxl; what is ours comes after them.
"""

from __future__ import annotations

import secrets
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import validation
from lora.engine.stack import LoraUse, Mode
from lora.fetch.sources import Reference
from lora.formats.names.blocks import MAX_SCALE, parse_blocks
from validation import NAMES_NO_LORA, InvalidInput, as_entry, faults_of, field, filled, number

SCHEDULERS = (
    *("PNDM", "KLMS", "DDIM", "K_EULER", "K_EULER_ANCESTRAL"),
    *("DPMSolverMultistep", "DPMSolverSinglestep"),
    *("UniPC", "Euler Karras", "DPM++ 2M", "DPM++ 2M Karras", "DPM++ 2M SDE Karras", "LCM", "TCD"),
)
"""worker-sdxl's seven, then others under the names that web UIs use (classes: `pipelines.schedulers`)."""

DISTILLED, DISTILLED_STEPS = ("LCM", "TCD"), 50
"""Samplers of distilled models, and the steps they were distilled from: no more can be asked for."""

MAX_LORAS = 16

LORA_COMPONENTS = ("unet", "text_encoder", "text_encoder_2")
"""The parts of SDXL that a LoRA can change."""

_SIZE = {"minimum": 64, "maximum": 4096, "multipleOf": 8}
_OWN_SIZE = "in pixels; null is the model's own size, 1024 for SDXL"

IMAGE_REQUEST: dict[str, Any] = {
    "$schema": "https://json-schema.org/draft/2020-12/schema",
    "type": "object",
    "additionalProperties": False,
    "properties": {
        "prompt": field("string|null", None, "What to draw; required unless `image_url` is given"),
        "negative_prompt": field("string|null", None, "What not to draw"),
        "height": field("integer|null", None, f"Height {_OWN_SIZE}", **_SIZE),
        "width": field("integer|null", None, f"Width {_OWN_SIZE}", **_SIZE),
        "seed": number(
            "integer|null",
            None,
            (0, 2**64 - 1),
            "The same seed gives the same picture; null chooses one at random, and the answer has it",
        ),
        "scheduler": field("string", "DDIM", "The base model's sampler", enum=list(SCHEDULERS)),
        "num_inference_steps": number("integer", 25, (1, 500), "Denoising steps of the base model"),
        "refiner_inference_steps": number(
            "integer",
            50,
            (1, 500),
            "Denoising steps of the refiner; it does the share `strength` of them",
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
            "`img2img` refines as worker-sdxl does; `ensemble` splits one denoising between "
            "base and refiner at `high_noise_frac` (0.8 if null); `none` leaves the refiner out",
            enum=["img2img", "ensemble", "none"],
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
            "`none` turns off the worker's default preset, too",
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

_SCALES = {"minimum": -MAX_SCALE, "maximum": MAX_SCALE}

LORA_ENTRY: dict[str, Any] = {
    "type": "object",
    "additionalProperties": False,
    "required": ["path"],
    "properties": {
        "path": {"type": "string", "minLength": 1, "description": "The LoRA's source"},
        "scale": field(
            "number|object",
            1.0,
            "How strongly the LoRA acts: 1 as it was trained, 0 not at all, below 0 in reverse. An "
            "object scales each component: `unet`, `text_encoder`, `text_encoder_2` (1 if left out)",
            **_SCALES,
            propertyNames={"enum": list(LORA_COMPONENTS)},
            additionalProperties={"type": "number", **_SCALES},
        ),
        "blocks": field(
            "array|string|object|null",
            None,
            "A further factor for each block of the UNet: 12 or 20 values as in web UIs, as a list "
            "or as text, or an object of names (`BASE`, `IN04`, `MID`, `OUT01`, `IN`, `OUT`)",
        ),
        "start": number(
            "number",
            0.0,
            (0, 1),
            "Fraction of the base model's denoising at which the LoRA begins to act on the UNet; on "
            "text encoders it always acts",
        ),
        "end": number("number", 1.0, (0, 1), "Fraction at which it stops acting on the UNet"),
        "weight_name": field(
            "string|null",
            None,
            "Name of the file, if a Hugging Face repo or a Civitai version has several",
        ),
        "revision": field("string|null", None, "Branch, tag or commit of a Hugging Face repo"),
        "sha256": field(
            "string|null",
            None,
            "SHA-256 that the file must have; a file with another one is refused",
            pattern=validation.SHA256,
        ),
        "refresh": field(
            "boolean",
            False,
            "`true` asks the source now whether it has a newer file; see `LORA_TTL_HOURS`",
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


class ParsedLoras(NamedTuple):
    """What a list of LoRAs means, and what is wrong with it."""

    uses: tuple[LoraUse[Reference], ...]
    warnings: tuple[str, ...]
    """One sentence for each alias of a field, and for each entry that names no LoRA and was skipped."""
    faults: tuple[str, ...]


def parse_loras(entries: object, lora_mode: object = None, *, strict: bool = True) -> ParsedLoras:
    """The entries of a job's or a preset's `loras`; a value that is no list has none.

    With `strict`, an entry that names no LoRA is a fault, otherwise it is skipped with a warning.
    """
    uses: list[LoraUse[Reference]] = []
    warnings, skipped, faults = list[str](), list[str](), list[str]()
    for index, given in enumerate(entries if isinstance(entries, list) else []):
        where = f"loras[{index}]"
        entry, renames, broken = as_entry(given, LORA_ENTRY, f"{where}.")
        warnings, faults = warnings + renames, faults + broken
        if not entry and not broken:
            skipped.append(f"{where} {NAMES_NO_LORA}")
        elif not broken:
            try:
                uses.append(_lora(filled(LORA_ENTRY, entry)))
            except ValueError as error:
                faults.append(f"{where}.{error}")
    if lora_mode == Mode.MERGED and any(use.ranged for use in uses):
        faults.insert(0, "lora_mode: a LoRA with start or end cannot be merged")
    if strict:
        faults += skipped
    else:
        warnings += [f"{sentence} and was skipped" for sentence in skipped]
    return ParsedLoras(tuple(uses), tuple(warnings), tuple(faults))


def _lora(values: dict[str, Any]) -> LoraUse[Reference]:
    """An entry that fits the schema. Raises: ValueError, with the field's name first."""
    scale, blocks = values.pop("scale"), values.pop("blocks")
    start, end = float(values.pop("start")), float(values.pop("end"))
    if start >= end:
        raise ValueError("start is not before end")
    try:
        factors = {} if blocks is None else parse_blocks(blocks)
    except ValueError as error:
        raise ValueError(f"blocks: {error}") from None
    whole = not isinstance(scale, Mapping)
    return LoraUse(
        Reference(**values),
        scale=float(scale) if whole else 1.0,
        components={} if whole else {name: float(one) for name, one in scale.items()},
        blocks=factors,
        start=start,
        end=end,
    )
