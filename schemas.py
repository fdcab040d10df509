"""What a request may say: the JSON Schema, and `parse_job`, which turns a job into an `ImageRequest`.

Field names, defaults and meaning are those of RunPod's worker-sdxl; what is ours comes after them.
"""

from __future__ import annotations

import math
import re
import secrets
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from jsonschema import Draft202012Validator
from jsonschema.exceptions import ValidationError

from lora.engine.stack import LoraUse, Mode
from lora.errors import CodedError, nearest
from lora.fetch.sources import Reference
from lora.formats.names.blocks import MAX_SCALE, parse_blocks

SCHEDULERS = (
    "PNDM",
    "KLMS",
    "DDIM",
    "K_EULER",
    "K_EULER_ANCESTRAL",
    "DPMSolverMultistep",
    "DPMSolverSinglestep",
    "UniPC",
    "Euler Karras",
    "DPM++ 2M",
    "DPM++ 2M Karras",
    "DPM++ 2M SDE Karras",
    "LCM",
    "TCD",
)
"""worker-sdxl's seven, then others under the names that web UIs use (classes: `pipelines.schedulers`)."""

DISTILLED, DISTILLED_STEPS = ("LCM", "TCD"), 50
"""Samplers of distilled models, and how many steps they were distilled from: no more can be asked for."""

MAX_LORAS = 16

LORA_COMPONENTS = ("unet", "text_encoder", "text_encoder_2")
"""The parts of SDXL that a LoRA can change."""

IMAGE_REQUEST: dict[str, Any] = {
    "$schema": "https://json-schema.org/draft/2020-12/schema",
    "type": "object",
    "additionalProperties": False,
    "properties": {
        "prompt": {
            "type": ["string", "null"],
            "default": None,
            "description": "What to draw; required unless `image_url` is given",
        },
        "negative_prompt": {
            "type": ["string", "null"],
            "default": None,
            "description": "What not to draw",
        },
        "height": {
            "type": ["integer", "null"],
            "minimum": 64,
            "maximum": 4096,
            "multipleOf": 8,
            "default": None,
            "description": "Height in pixels; null is the model's own size, 1024 for SDXL",
        },
        "width": {
            "type": ["integer", "null"],
            "minimum": 64,
            "maximum": 4096,
            "multipleOf": 8,
            "default": None,
            "description": "Width in pixels; null is the model's own size, 1024 for SDXL",
        },
        "seed": {
            "type": ["integer", "null"],
            "minimum": 0,
            "maximum": 2**64 - 1,
            "default": None,
            "description": "Same seed, same picture; null draws one, and the answer tells it",
        },
        "scheduler": {
            "type": "string",
            "enum": list(SCHEDULERS),
            "default": "DDIM",
            "description": "The base model's sampler",
        },
        "num_inference_steps": {
            "type": "integer",
            "minimum": 1,
            "maximum": 500,
            "default": 25,
            "description": "Denoising steps of the base model",
        },
        "refiner_inference_steps": {
            "type": "integer",
            "minimum": 1,
            "maximum": 500,
            "default": 50,
            "description": "Denoising steps of the refiner, of which `strength` are done",
        },
        "guidance_scale": {
            "type": "number",
            "minimum": 0,
            "maximum": 100,
            "default": 7.5,
            "description": "How strictly the base model follows the prompt",
        },
        "strength": {
            "type": "number",
            "minimum": 0,
            "maximum": 1,
            "default": 0.3,
            "description": "Image to image: how much of the picture is drawn anew",
        },
        "image_url": {
            "type": ["string", "null"],
            "pattern": "^(https?://|data:image/)",
            "default": None,
            "description": "Picture to start from: an http(s) URL or a data URI",
        },
        "num_images": {
            "type": "integer",
            "minimum": 1,
            "maximum": 4,
            "default": 1,
            "description": "How many pictures",
        },
        "high_noise_frac": {
            "type": ["number", "null"],
            "minimum": 0,
            "maximum": 1,
            "default": None,
            "description": "Share of the denoising that the base model does before the refiner takes over",
        },
        "refiner_mode": {
            "type": "string",
            "enum": ["img2img", "ensemble", "none"],
            "default": "img2img",
            "description": "`img2img` as worker-sdxl refines; `ensemble` splits one denoising between "
            "base and refiner at `high_noise_frac` (0.8 if null); `none` leaves the refiner out",
        },
        "loras": {
            "type": ["array", "null"],
            "maxItems": MAX_LORAS,
            "default": None,
            "description": "LoRAs to apply, in this order: each a source, or an object with `path`",
        },
        "lora_selection": {
            "type": ["string", "array", "null"],
            "items": {"type": "string"},
            "maxItems": MAX_LORAS,
            "default": None,
            "description": "Presets of this volume, whose LoRAs come before `loras`: a name or a list of "
            "names; `none` for none, not even the worker's default",
        },
        "strict_loras": {
            "type": "boolean",
            "default": False,
            "description": "Fail on an entry of `loras` that names no LoRA, instead of skipping it, and on a "
            "LoRA with tensors that cannot be used, instead of warning",
        },
        "lora_mode": {
            "type": ["string", "null"],
            "enum": [*Mode, None],
            "default": None,
            "description": "How to apply `loras`, in place of the worker's `LORA_MODE`",
        },
        "output_format": {
            "type": "string",
            "enum": ["png", "jpeg", "webp"],
            "default": "png",
            "description": "File format of the pictures",
        },
        "output_quality": {
            "type": "integer",
            "minimum": 1,
            "maximum": 100,
            "default": 95,
            "description": "Quality of jpeg and webp",
        },
        "output_fallback": {
            "type": ["string", "null"],
            "enum": ["webp", "jpeg", None],
            "default": None,
            "description": "File format to take where the answer would be too large for the platform",
        },
        "preview": {
            "type": "boolean",
            "default": False,
            "description": "Send a small picture of how far it is with the progress, every few steps",
        },
    },
}

LORA_ENTRY: dict[str, Any] = {
    "type": "object",
    "additionalProperties": False,
    "required": ["path"],
    "properties": {
        "path": {"type": "string", "minLength": 1, "description": "The source"},
        "scale": {
            "type": ["number", "object"],
            "minimum": -MAX_SCALE,
            "maximum": MAX_SCALE,
            "propertyNames": {"enum": list(LORA_COMPONENTS)},
            "additionalProperties": {"type": "number", "minimum": -MAX_SCALE, "maximum": MAX_SCALE},
            "default": 1.0,
            "description": "How strongly; 1 as trained, 0 not at all, negative the reverse. An object "
            "gives each component its own: `unet`, `text_encoder`, `text_encoder_2` (1 where not named)",
        },
        "blocks": {
            "type": ["array", "string", "object", "null"],
            "default": None,
            "description": "A further factor per block of the UNet: 12 or 20 values as in web UIs, as a list "
            "or as text, or an object of names (`BASE`, `IN04`, `MID`, `OUT01`, `IN`, `OUT`)",
        },
        "start": {
            "type": "number",
            "minimum": 0,
            "maximum": 1,
            "default": 0.0,
            "description": "When it begins, as a fraction of the base model's denoising; in text encoders it "
            "always is",
        },
        "end": {
            "type": "number",
            "minimum": 0,
            "maximum": 1,
            "default": 1.0,
            "description": "When it ends",
        },
        "weight_name": {
            "type": ["string", "null"],
            "default": None,
            "description": "Which file of a Hugging Face repo",
        },
        "revision": {
            "type": ["string", "null"],
            "default": None,
            "description": "Which branch, tag or commit of a Hugging Face repo",
        },
        "sha256": {
            "type": ["string", "null"],
            "pattern": "^[0-9a-fA-F]{64}$",
            "default": None,
            "description": "The file's hash, if it must be this one",
        },
        "refresh": {
            "type": "boolean",
            "default": False,
            "description": "Ask the source whether it has another version, whatever the cache knows",
        },
    },
}


class InvalidInput(CodedError):
    """The request breaks the schema; the sentence lists every fault with its path."""

    code = "INVALID_INPUT"


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
        raise InvalidInput("the job is not an object", HINT)
    values = job.get("input")
    if not isinstance(values, Mapping):
        raise InvalidInput("input is not an object", HINT)
    faults = list(faults_of(IMAGE_REQUEST, values, ""))
    if not values.get("prompt") and not values.get("image_url"):
        faults.append("prompt is required (unless image_url is given)")
    name, steps = values.get("scheduler"), values.get("num_inference_steps")
    if name in DISTILLED and isinstance(steps, int) and steps > DISTILLED_STEPS:
        faults.append(f"num_inference_steps: {name} takes at most {DISTILLED_STEPS}")
    loras, warnings, lora_faults = _read_loras(
        values.get("loras"), bool(values.get("strict_loras"))
    )
    if values.get("lora_mode") == Mode.MERGED and any(use.ranged for use in loras):
        faults.append(NOT_MERGED)
    _refuse(faults + lora_faults)
    chosen = filled(IMAGE_REQUEST, values)
    chosen["prompt"] = chosen["prompt"] or ""
    selected = chosen["lora_selection"]
    if selected is not None:
        chosen["lora_selection"] = (selected,) if isinstance(selected, str) else tuple(selected)
    if chosen["seed"] is None:
        chosen["seed"] = secrets.randbits(32)
    return ImageRequest(**{**chosen, "loras": loras, "warnings": tuple(warnings)})


def parse_loras(entries: list[object]) -> tuple[LoraUse[Reference], ...]:
    """Entries of `loras` that stand elsewhere than in a job: in a preset, or in the worker's settings.

    Raises: InvalidInput, with every fault at once; an entry that names no LoRA is one.
    """
    found = list(faults_of(_LORAS, {"loras": entries}, ""))
    loras, _, faults = _read_loras(entries, strict=True)
    _refuse(found + faults)
    return loras


def _refuse(faults: Sequence[str]) -> None:
    """Raises: InvalidInput if there is a fault; its sentence lists them all."""
    if faults:
        start = "" if len(faults) == 1 else f"{len(faults)} faults: "
        raise InvalidInput(start + "; ".join(faults), HINT)


HINT = "See the README's table of parameters."

_LORAS = {
    "type": "object",
    "properties": {"loras": {**IMAGE_REQUEST["properties"]["loras"], "type": "array"}},
}

NOT_MERGED = "lora_mode: a LoRA with start or end cannot be merged"


NAMES_NO_LORA = "names no LoRA (a string or an object with path)"


def as_entry(given: object) -> Mapping[str, Any] | None:
    """An entry of `loras` as an object with `path`; None if it names no LoRA."""
    entry = {"path": given} if isinstance(given, str) else given
    return entry if isinstance(entry, Mapping) and entry.get("path") else None


def _read_loras(
    entries: object, strict: bool
) -> tuple[tuple[LoraUse[Reference], ...], list[str], list[str]]:
    """The entries that name a LoRA; warnings for those that do not; faults."""
    loras: list[LoraUse[Reference]] = []
    warnings: list[str] = []
    faults: list[str] = []
    for index, given in enumerate(entries if isinstance(entries, list) else []):
        where = f"loras[{index}]"
        entry = as_entry(given)
        if entry is None:
            words = f"{where} {NAMES_NO_LORA}"
            (faults if strict else warnings).append(words if strict else f"{words} and was skipped")
            continue
        found = list(faults_of(LORA_ENTRY, entry, f"{where}."))
        if not found:
            try:
                loras.append(_lora(filled(LORA_ENTRY, entry)))
            except ValueError as error:
                found = [f"{where}.{error}"]
        faults += found
    return tuple(loras), warnings, faults


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


def filled(schema: Mapping[str, Any], values: Mapping[str, Any]) -> dict[str, Any]:
    """Every property of the schema: the value given, else the default; 20.0 becomes 20."""
    filled: dict[str, Any] = {}
    for name, rule in schema["properties"].items():
        value = values.get(name, rule.get("default"))
        whole = "integer" in rule["type"] and isinstance(value, float)
        filled[name] = int(value) if whole else value
    return filled


def faults_of(schema: dict[str, Any], values: Mapping[str, Any], where: str) -> Iterator[str]:
    """Every breach of the schema, as `path: what is wrong`, in a fixed order."""
    for name, value in _leaves(values):
        if isinstance(value, float) and not math.isfinite(value):
            yield f"{where}{name}: {value} is not a number that JSON knows"
        if isinstance(value, str) and re.search("[\ud800-\udfff]", value):
            yield f"{where}{name}: the text holds half a surrogate pair, which is no character"
    errors = Draft202012Validator(schema).iter_errors(values)
    for error in sorted(errors, key=lambda e: [str(step) for step in e.absolute_path]):
        yield from _words(error, schema, where)


def _leaves(values: Mapping[str, Any]) -> Iterator[tuple[str, object]]:
    """Every field and, of a field that is an object, each of its own."""
    for name, value in values.items():
        if isinstance(value, Mapping):
            for inner, one in value.items():
                yield f"{name}.{inner if re.fullmatch(NAME, str(inner)) else 'a field'}", one
        else:
            yield name, value


NAME = r"\w{1,40}"


def _words(error: ValidationError, schema: Mapping[str, Any], where: str) -> Iterator[str]:
    """One breach in words of our own; jsonschema's would repeat the whole value."""
    name = where + ".".join(str(step) for step in error.absolute_path)
    value, limit = _short(error.instance), error.validator_value
    if error.validator == "additionalProperties":
        for extra in sorted(str(k) for k in error.instance if k not in schema["properties"]):
            hint = nearest(extra, schema["properties"]).rstrip("?")
            yield f"{where}{extra} is not a field" + (f" ({_lower(hint)}?)" if hint else "")
        return
    say = _SENTENCES.get(str(error.validator))
    yield f"{name}: {say(value, limit) if say else error.message}"


_PATTERNS: Mapping[str, str] = {
    str(IMAGE_REQUEST["properties"]["image_url"]["pattern"]): "an http(s) URL or a data:image/ URI",
    str(LORA_ENTRY["properties"]["sha256"]["pattern"]): "64 hexadecimal digits",
}

_SENTENCES: Mapping[str, Callable[[str, Any], str]] = {
    "type": lambda value, limit: f"{value} is not {_kinds(limit)}",
    "enum": lambda value, limit: f"{value} is none of {', '.join(filter(None, limit))}",
    "minimum": lambda value, limit: f"{value} is less than {limit}",
    "maximum": lambda value, limit: f"{value} is more than {limit}",
    "multipleOf": lambda value, limit: f"{value} is not a multiple of {limit}",
    "maxItems": lambda value, limit: f"more than {limit} entries",
    "pattern": lambda value, limit: f"{value} does not look right ({_PATTERNS[limit]})",
}


def _kinds(types: object) -> str:
    names = [str(t) for t in (types if isinstance(types, list) else [types])]
    return " or ".join(
        f"an {n}" if n[0] in "aio" else n if n == "null" else f"a {n}" for n in names
    )


def _lower(text: str) -> str:
    return text[:1].lower() + text[1:]


def _short(value: object) -> str:
    """A value as an error may repeat it: numbers and plain words; all else may carry a secret."""
    if value is None or isinstance(value, (bool, int, float)):
        return repr(value)
    if isinstance(value, str) and re.fullmatch(r"[\w +-]{0,40}", value):
        return repr(value)
    kinds = {"str": "the text", "list": "the list", "dict": "the object"}
    return kinds.get(type(value).__name__, "the value")
