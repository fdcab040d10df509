"""What a session's messages may say: their JSON Schemas, and what they mean. Imports without torch."""

from __future__ import annotations

import secrets
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from entries import parse_loras
from lora.engine.stack import LoraUse
from lora.fetch.sources import Reference
from schemas import IMAGE_REQUEST, ImageRequest
from validation import InvalidInput, faults_of, field, filled, number, understood

MAX_STEPS = 8
MAX_SIDE = 1536
MAX_SCALE = 20.0

_IMAGE: Mapping[str, Any] = IMAGE_REQUEST["properties"]

LOOK: dict[str, Any] = {
    "prompt": field("string|null", None, "As in a request; may be empty", maxLength=10_000),
    "negative_prompt": field(
        "string|null",
        None,
        "What not to draw; counts with the guidances `initialize` and `full`",
        maxLength=10_000,
    ),
    "lora_selection": {
        **_IMAGE["lora_selection"],
        "description": "Presets by name, as in a request",
    },
    "loras": _IMAGE["loras"],
    "scales": field(
        "object|null",
        None,
        "Name or source of a LoRA of the present stack -> its scale, in place of the one it came with",
        additionalProperties={"type": "number", "minimum": -MAX_SCALE, "maximum": MAX_SCALE},
    ),
    "seed": number(
        "integer|null", None, (-(2**63), 2**64 - 1), "The noise; null or -1 chooses one at random"
    ),
}
"""What each frame may change; it holds from then on."""

START: dict[str, Any] = {
    "type": "object",
    "additionalProperties": False,
    "properties": {
        **LOOK,
        "presets": field(
            "array",
            [],
            "Presets that are loaded before the session begins, so that choosing one costs nothing",
            items={"type": "string"},
            maxItems=100,
        ),
        "source": field(
            "string",
            "image",
            "`image` draws over each picture that comes in, `text` from the prompt alone",
            enum=["image", "text"],
        ),
        "size": field(
            "integer|array|null",
            None,
            "Width and height in pixels, in one or as two; null is the model's own",
            minimum=64,
            maximum=MAX_SIDE,
            multipleOf=8,
            items={"type": "integer", "minimum": 64, "maximum": MAX_SIDE, "multipleOf": 8},
            minItems=2,
            maxItems=2,
        ),
        "steps": number("integer", 2, (1, MAX_STEPS), "Denoising steps of each frame"),
        "strength": number(
            "number|null",
            None,
            (0.02, 1),
            "How much of the picture is drawn anew; null is 0.5 with `source` image, and 1 with text",
        ),
        "t_index": field(
            "array|null",
            None,
            "The steps themselves, rising, of 50: 0 is pure noise; in place of `steps` and `strength`",
            items={"type": "integer", "minimum": 0, "maximum": 49},
            maxItems=MAX_STEPS,
        ),
        "guidance": field(
            "string",
            "none",
            "What a frame is pushed away from: nothing, what came in (`self`), or the negative prompt, "
            "asked once a frame (`initialize`) or at each step (`full`)",
            enum=["none", "self", "initialize", "full"],
        ),
        "guidance_scale": number("number", 1.2, (1, 20), "How strongly; 1 not at all"),
        "stream_batch": field(
            "boolean",
            False,
            "`true` denoises several frames at once, each at another step: more frames a second, each "
            "`steps` - 1 frames later",
        ),
        "lora_mode": field(
            "string",
            "dynamic",
            "How LoRAs are applied, as in a request",
            enum=["dynamic", "merged"],
        ),
        "bake": field(
            "boolean",
            False,
            "`true` merges the first LoRAs for the whole session: no frame can change them, and none "
            "pays for them",
        ),
        "similar": number(
            "number|null",
            None,
            (0, 1),
            "From which likeness on to the one before, as cosine, a frame may be skipped (0.98 is usual); "
            "null skips none",
        ),
        "output_format": field(
            "string", "jpeg", "File format of the frames", enum=["jpeg", "png", "webp"]
        ),
        "output_quality": number("integer", 85, (1, 100), "Quality of jpeg and webp"),
    },
}

FRAME: dict[str, Any] = {
    "type": "object",
    "additionalProperties": False,
    "properties": {
        **LOOK,
        "seq": number(
            "integer|null", None, (0, 2**53), "The frame's number, which its answer repeats"
        ),
        "wait": field(
            "boolean",
            False,
            "`true` lets the frame wait until the LoRAs that it asks for are there",
        ),
    },
}


@dataclass(frozen=True)
class Asked:
    """What frames are to be drawn with, as the client says it."""

    prompt: str = ""
    negative_prompt: str | None = None
    lora_selection: tuple[str, ...] | None = None
    loras: tuple[LoraUse[Reference], ...] = ()
    has_loras: bool = False
    scales: tuple[tuple[str, float], ...] = ()
    seed: int = 0

    def request(self) -> ImageRequest:
        """The same as a job would ask it, so that presets, defaults and tags mean the same."""
        values = filled(IMAGE_REQUEST, {})
        own = {name: getattr(self, name) for name in ("prompt", "negative_prompt", "loras", "seed")}
        return ImageRequest(
            **{**values, **own, "lora_selection": self.lora_selection, "strength": 0.5}
        )

    def changed(self, given: Mapping[str, Any]) -> Asked:
        """With what a message says of it. Raises: InvalidInput."""
        changes: dict[str, Any] = {}
        for name in ("prompt", "negative_prompt"):
            if name in given:
                changes[name] = given[name] if name == "negative_prompt" else given[name] or ""
        if "lora_selection" in given:
            names = given["lora_selection"]
            changes["lora_selection"] = (names,) if isinstance(names, str) else tuple(names)
        if "loras" in given:
            parsed = parse_loras(given["loras"])
            if parsed.faults:
                raise InvalidInput.of(parsed.faults)
            changes |= {"loras": parsed.uses, "has_loras": True}
        if changes.keys() & {"lora_selection", "loras"}:
            changes["scales"] = ()  # those of a stack that is no longer asked for
        if given.get("scales"):
            before = changes.get("scales", self.scales)
            changes["scales"] = tuple(sorted({**dict(before), **given["scales"]}.items()))
        if "seed" in given:
            changes["seed"] = _seed(given["seed"])
        return replace(self, **changes)


@dataclass(frozen=True)
class Start:
    """A session's first message."""

    values: Mapping[str, Any]
    """Every field of `START`, filled in."""
    asked: Asked
    warnings: tuple[str, ...]


def parse_start(given: Mapping[str, Any]) -> Start:
    """Raises: InvalidInput with every fault."""
    values, warnings, faults = understood(START, given, "")
    faults += faults_of(START, values, "")
    rising = values.get("t_index")
    if isinstance(rising, list) and (not rising or sorted(set(rising)) != rising):
        faults.append("t_index: the numbers do not rise")
    if values.get("bake") is True and values.get("presets"):
        faults.append("presets: with bake there is nothing to choose")
    if faults:
        raise InvalidInput.of(faults)
    asked = Asked(seed=_seed(None)).changed({"seed": None, **values})
    return Start(filled(START, values), asked, tuple(warnings))


def parse_frame(given: Mapping[str, Any]) -> dict[str, Any]:
    """The fields that a frame's message has. Raises: InvalidInput with every fault."""
    values, _, faults = understood(FRAME, given, "")
    if faults := [*faults, *faults_of(FRAME, values, "")]:
        raise InvalidInput.of(faults)
    return values


def _seed(given: int | None) -> int:
    return secrets.randbits(32) if given in (None, -1) else int(given) % 2**64
