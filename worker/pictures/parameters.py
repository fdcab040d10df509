"""The text in a picture that says how it was drawn, as AUTOMATIC1111's web UI has it: written, and read back.

    a cat <lora:style:0.8>
    Negative prompt: dog
    Steps: 25, Sampler: DDIM, CFG scale: 7.5, Seed: 3, Size: 1024x1024, Model: …, Lora hashes: "style: 0123…"

What this form cannot say stands behind it under a request's own names, as JSON (`num_images: 2`). Whoever
writes reads the text back first and adds what came out differently, so what is written can be read.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import cache
from pathlib import PurePosixPath
from typing import Any, NamedTuple

from lora.engine.stack import LoraUse
from lora.fetch.sources import Reference
from schemas import IMAGE_REQUEST, SCHEDULERS, ImageRequest, parse_job
from worker.tags import taken

NEGATIVE, PICTURE = "Negative prompt: ", "Source picture"

DELIVERY = ("output_format", "output_quality", "output_fallback", "preview", "strict_loras")
"""Fields that say nothing of what is drawn."""

RESOLVED = ("loras", "lora_selection", "lora_tags")
"""Fields that are written as what they came to."""

FIELDS: Mapping[str, tuple[str, Callable[[str], Any]]] = {
    "Steps": ("num_inference_steps", int),
    "CFG scale": ("guidance_scale", float),
    "Seed": ("seed", int),
    "Clip skip": ("clip_skip", int),
    "Denoising strength": ("strength", float),
}
"""Key of the text -> field of a request, and how its value is read."""

SAMPLERS = {
    "Euler": "K_EULER",
    "Euler a": "K_EULER_ANCESTRAL",
    "LMS": "KLMS",
    "PLMS": "PNDM",
    **{name: name for name in SCHEDULERS},
}
"""A web UI's name, with the type of its schedule behind it -> ours."""

SAID = ("Model", "Model hash", "Lora hashes", "Version", "Schedule type")
"""Keys that need no field."""

_PAIR = re.compile(r'\s*(\w[\w \-/]*):\s*("(?:\\.|[^"\\])*"|[^,]*)(?:,|$)')


class Applied(NamedTuple):
    """A LoRA as it was applied."""

    name: str
    """Its file's name in the cache."""
    use: LoraUse[Reference]
    sha256: str

    @property
    def stem(self) -> str:
        """The name without its extension."""
        return str(PurePosixPath(self.name).with_suffix(""))

    @property
    def entry(self) -> dict[str, Any]:
        """The same as an entry of a job's `loras`."""
        use = self.use
        scale = {name: use.scale * factor for name, factor in use.components.items()}
        entry = {"path": self.stem, "scale": scale or use.scale}
        entry |= {"blocks": dict(use.blocks)} if use.blocks else {}
        entry |= {"start": use.start} if use.start > 0 else {}
        return entry | ({"end": use.end} if use.end < 1 else {})


@dataclass
class Read:
    """What a text says."""

    input: dict[str, Any] = field(default_factory=dict)
    """A job's input that draws the picture again."""
    unused: list[str] = field(default_factory=list)
    """Keys that have no field here."""
    warnings: list[str] = field(default_factory=list)
    hashes: dict[str, str] = field(default_factory=dict)
    """Name of a LoRA -> the first digits of a hash of its file, as the text has them."""


def write(
    request: ImageRequest, model: str, size: tuple[int, int], loras: Sequence[Applied]
) -> str:
    """The text of a picture of `size` (width, height). It holds no URL, be it of a source picture."""
    wanted = _wanted(request, size, loras)
    pairs = {
        "Steps": str(request.num_inference_steps),
        "Sampler": request.scheduler,
        "CFG scale": f"{request.guidance_scale:g}",
        "Seed": str(request.seed),
        "Size": f"{size[0]}x{size[1]}",
        "Model": re.sub(r"[,\"\n]", " ", model),
    }
    if request.clip_skip:
        pairs["Clip skip"] = str(request.clip_skip)
    if loras:
        hashes = ", ".join(f"{one.stem}: {one.sha256[:12]}" for one in loras)
        pairs["Lora hashes"] = json.dumps(hashes)
    if request.image_url:
        pairs[PICTURE] = "not kept"
    lines = [request.prompt + "".join(map(_tag, loras))]
    if request.negative_prompt:
        lines.append(f"{NEGATIVE}{request.negative_prompt}")
    text = "\n".join([*lines, _joined(pairs)])
    found, plain = read(text).input, _plain()
    for name in IMAGE_REQUEST["properties"]:
        value, default = wanted.get(name), getattr(plain, name)
        if name in (wanted.keys() | found.keys()) and found.get(name, default) != value:
            pairs[name] = _quoted(json.dumps(value))
    text = "\n".join([*lines, _joined(pairs)])
    return text.encode(errors="replace").decode()  # half a surrogate pair has no bytes


@cache
def _plain() -> ImageRequest:
    """A request that says nothing but a prompt: it has every default."""
    return parse_job({"input": {"prompt": "-"}})


def _wanted(
    request: ImageRequest, size: tuple[int, int], loras: Sequence[Applied]
) -> dict[str, Any]:
    """A job's input that draws the picture again, but for the URLs of pictures."""
    left_out = (*DELIVERY, *RESOLVED)
    wanted = {
        name: getattr(request, name)
        for name in IMAGE_REQUEST["properties"]
        if name not in left_out and not name.endswith("_url")
    }
    wanted |= {"width": size[0], "height": size[1], "loras": [one.entry for one in loras]}
    if taken(request.prompt).entries or taken(request.negative_prompt or "").entries:
        wanted["lora_tags"] = False
    return wanted


def _tag(lora: Applied) -> str:
    scale = lora.entry["scale"]
    if not isinstance(scale, Mapping):
        return f" <lora:{lora.stem}:{scale:g}>"
    unet, clip = scale.get("unet", 1.0), scale.get("text_encoder", 1.0)
    return f" <lora:{lora.stem}:unet={unet:g}:te={clip:g}>"


def _joined(pairs: Mapping[str, str]) -> str:
    return ", ".join(f"{key}: {value}" for key, value in pairs.items())


def _quoted(value: str) -> str:
    return value if re.fullmatch(r'[^,:"\n]+', value) else json.dumps(value)


def _pairs(line: str) -> Iterator[tuple[str, str]]:
    """The pairs of a line; what is none, up to the next comma, is passed over."""
    place = 0
    while place < len(line):
        if pair := _PAIR.match(line, place):
            yield pair[1], pair[2].strip()
        place = pair.end() if pair else (line.find(",", place) + 1 or len(line))


def read(text: str) -> Read:
    """What a text says, whoever wrote it. A text without a line of keys is a prompt."""
    *lines, last = text.strip().split("\n")
    pairs = dict(_pairs(last))
    if "Steps" not in pairs:
        lines, pairs = [*lines, last], {}
    found = Read()
    begins = [n for n, line in enumerate(lines) if line.startswith(NEGATIVE)]
    first = begins[0] if begins else len(lines)
    prompt, negative = "\n".join(lines[:first]), "\n".join(lines[first:])
    tagged = taken(prompt)
    found.input = {"prompt": tagged.text, "loras": list(tagged.entries)}
    found.warnings += [f"the prompt: {fault}" for fault in tagged.faults]
    if negative:
        found.input["negative_prompt"] = negative.removeprefix(NEGATIVE)
    for key, value in pairs.items():
        _take(found, key, value, pairs)
    return found


def _hashes(value: str) -> dict[str, str]:
    """Name -> digits, of `"name: 0123abcd4567, other: ..."`."""
    with suppress(ValueError):
        text = json.loads(value) if value.startswith('"') else value
        pairs = (one.rpartition(":") for one in str(text).split(","))
        return {name.strip(): digits.strip().lower() for name, _, digits in pairs if name.strip()}
    return {}


def _take(found: Read, key: str, value: str, pairs: Mapping[str, str]) -> None:
    """Puts one pair into the input; `pairs` are all of them."""
    if key in IMAGE_REQUEST["properties"]:
        with suppress(ValueError):
            found.input[key] = json.loads(json.loads(value) if value.startswith('"') else value)
            return
    elif key == PICTURE:
        found.warnings.append("it was drawn from a picture: give that as image_url")
        return
    elif key in FIELDS:
        name, kind = FIELDS[key]
        with suppress(ValueError):
            found.input[name] = kind(value)
            return
    elif size := re.fullmatch(r"(\d+)x(\d+)", value if key == "Size" else ""):
        found.input |= {"width": int(size[1]), "height": int(size[2])}
        return
    elif key == "Sampler":
        names = (f"{value} {pairs.get('Schedule type', '')}", value)
        known = [SAMPLERS[name] for name in names if name in SAMPLERS]
        if known:
            found.input["scheduler"] = known[0]
            return
    elif key in SAID:
        found.hashes |= _hashes(value) if key == "Lora hashes" else {}
        return
    found.unused.append(key)
