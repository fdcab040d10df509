"""LoRA tags in prompts, as in web UIs: `<lora:name>`, `<lora:name:0.8>`, `<lora:name:unet:clip>`.

The name is a cached file's. Of two numbers the first is for the UNet and the second for both text encoders;
`unet=0.8` and `te=0.5` say it by name. (Of two plain numbers, AUTOMATIC1111 takes the first for the text
encoder; ComfyUI's nodes take it for the UNet.)
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

from entries import parse_loras
from schemas import ImageRequest
from validation import InvalidInput

_TAG = re.compile(r"<(?:lora|lyco):(?P<rest>[^<>]*)(?P<end>>?)", re.IGNORECASE)
_NUMBER = re.compile(r"[+-]?(?:\d+\.?\d*|\.\d+)")
TEXT_ENCODERS = ("text_encoder", "text_encoder_2")
FORMS = "A tag is <lora:name>, <lora:name:0.8> or <lora:name:unet:clip>; lora_tags: false leaves them alone."


@dataclass(frozen=True)
class Tagged:
    """A text without its tags."""

    text: str
    entries: tuple[dict[str, Any], ...]
    """What the tags mean, as entries of a job's `loras`."""
    faults: tuple[str, ...]
    """A sentence for each tag that means nothing."""


def taken(text: str) -> Tagged:
    """Takes the tags out of a text, with the blanks at its ends. A text without tags stays as it is."""
    matches = list(_TAG.finditer(text))
    if not matches:
        return Tagged(text, (), ())
    entries, faults = list[dict[str, Any]](), list[str]()
    for number, match in enumerate(matches, 1):
        try:
            entries.append(_entry(match))
        except ValueError as error:
            faults.append(f"its LoRA tag {number} {error}")
    return Tagged(_TAG.sub("", text).strip(), tuple(entries), tuple(faults))


def _entry(match: re.Match[str]) -> dict[str, Any]:
    """Raises: ValueError, which never repeats the tag: it may hold a URL with a token."""
    if not match["end"]:
        raise ValueError("has no > at its end")
    name, *values = (part.strip() for part in match["rest"].split(":"))
    if not name:
        raise ValueError("names no LoRA")
    plain = [_number(value) for value in values if "=" not in value]
    if len(plain) > 2:
        raise ValueError("has more numbers than one for the UNet and one for the text encoders")
    named = dict(_named(values))
    unet, clip = (plain * 2 or [1.0, 1.0])[:2]
    unet, clip = named.get("unet", unet), named.get("te", clip)
    if unet == clip:
        return {"path": name, "scale": unet}
    return {"path": name, "scale": {"unet": unet, **dict.fromkeys(TEXT_ENCODERS, clip)}}


def _named(values: list[str]) -> Iterator[tuple[str, float]]:
    for value in values:
        name, equals, number = value.partition("=")
        if equals and name.strip() not in ("unet", "te"):
            raise ValueError("has a part that is neither a number nor unet= nor te=")
        if equals:
            yield name.strip(), _number(number.strip())


def _number(text: str) -> float:
    if not _NUMBER.fullmatch(text):
        raise ValueError("has a scale that is not a number")
    return float(text)


def has_tags(request: ImageRequest) -> bool:
    """Whether the request names LoRAs by tags."""
    texts = (request.prompt, request.negative_prompt or "")
    return request.lora_tags and any(map(_TAG.search, texts))


IN_NEGATIVE = (
    "negative_prompt: its LoRA tags count as the prompt's, since a LoRA changes the model for both"
)


def with_tags(request: ImageRequest) -> ImageRequest:
    """The request with the tags of its prompts in `loras`, behind those that are there.

    Raises: InvalidInput, with every fault of a tag.
    """
    if not has_tags(request):
        return request
    prompt, negative = taken(request.prompt), taken(request.negative_prompt or "")
    faults = [f"prompt: {fault}" for fault in prompt.faults]
    faults += [f"negative_prompt: {fault}" for fault in negative.faults]
    uses, _, broken = parse_loras([*prompt.entries, *negative.entries], request.lora_mode)
    if faults := [*faults, *(f"a LoRA tag: {fault.partition('.')[2]}" for fault in broken)]:
        raise InvalidInput("; ".join(faults), FORMS)
    own_negative = None if request.negative_prompt is None else negative.text
    warnings = (*request.warnings, *([IN_NEGATIVE] if negative.entries else []))
    return replace(
        request,
        prompt=prompt.text,
        negative_prompt=own_negative,
        loras=(*request.loras, *uses),
        warnings=warnings,
    )
