"""An entry of a job's or a preset's `loras`: its JSON Schema, and what it means."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import validation
from lora.engine.stack import LoraUse, Mode
from lora.fetch.sources import Reference
from lora.formats.names.blocks import MAX_SCALE, parse_blocks
from validation import Checked, faults_of, field, filled, number, understood

LORA_COMPONENTS = ("unet", "text_encoder", "text_encoder_2")
"""The parts of SDXL that a LoRA can change."""

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


NAMES_NO_LORA = "names no LoRA (a string or an object with path)"


def as_entry(given: object, schema: dict[str, Any], where: str) -> Checked:
    """An entry of `loras` as an object with `path`; an empty one if it names no LoRA."""
    entry = {"path": given} if isinstance(given, str) else given
    values, warnings, faults = understood(
        schema, entry if isinstance(entry, Mapping) else {}, where
    )
    if not values.get("path"):
        return {}, [], faults
    return values, warnings, [*faults, *faults_of(schema, values, where)]


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
