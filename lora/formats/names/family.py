"""The families of models that adapters are made for, and what metadata calls them. No torch."""

from __future__ import annotations

import re
from collections.abc import Mapping

Families = frozenset[str]

SD1, SD2, XL, REFINER = "SD 1.5", "SD 2", "SDXL", "SDXL refiner"
SD3, FLUX1, FLUX2, CHROMA = "SD 3", "Flux.1", "Flux.2", "Chroma"
QWEN, HUNYUAN, WAN, LTX = "Qwen-Image", "HunyuanVideo", "Wan", "LTX"
ZIMAGE, LUMINA, LANGUAGE = "Z-Image", "Lumina 2", "language model"
PIXART, SANA, COGVIDEO = "PixArt", "Sana", "CogVideoX"
MOCHI, HUNYUAN_DIT = "Mochi", "Hunyuan-DiT"

TRANSFORMERS = (
    *(SD3, FLUX1, FLUX2, CHROMA, QWEN, HUNYUAN, WAN, LTX, ZIMAGE, LUMINA),
    *(PIXART, SANA, COGVIDEO, MOCHI, HUNYUAN_DIT),
)
"""The families whose drawing component is a transformer."""

UNETS = frozenset({SD1, SD2, XL, REFINER})
"""The families that draw with a U-Net."""

ALL = (SD1, SD2, XL, REFINER, *TRANSFORMERS, LANGUAGE)
"""The families that names or widths can show."""

_NAMED_SO = tuple(
    (re.compile(pattern), name)
    for pattern, name in (
        (r"refiner", REFINER),
        (r"pixart", PIXART),
        (r"(?<![a-z])sana(?![a-z])", SANA),
        (r"cogvideo", COGVIDEO),
        (r"(?<![a-z])mochi(?![a-z])", MOCHI),
        (r"hunyuan[_ -]?dit", HUNYUAN_DIT),
        (r"kolors", "Kolors"),
        (r"auraflow|pony.?v?7", "AuraFlow"),
        (r"cascade", "Stable Cascade"),
        (r"hidream", "HiDream"),
        (r"sdxl|xl(?![a-z])|(?<![a-z])pony|illustrious|noob|animagine|ssd-?1b", XL),
        (r"cosmos|anima(?![a-z])", "Cosmos"),
        (r"(?<![a-z])sd[_ -]?v?1|diffusion-v?1|v1-5-pruned", SD1),
        (r"(?<![a-z])sd[_ -]?v?2|diffusion-v?2|v2-1_(?:512|768)", SD2),
        (r"(?<![a-z])sd[_ -]?v?3|diffusion-v?3", SD3),
        (r"(?<![a-z])chroma(?![a-z])", CHROMA),
        (r"(?<![a-z])flux[._ -]?2", FLUX2),
        (r"(?<![a-z])flux(?![a-z])", FLUX1),
        (r"(?<![a-z])qwen[_ -]?image", QWEN),
        (r"z[_ -]?image", ZIMAGE),
        (r"hunyuan[_ -]?video|^hunyuan$", HUNYUAN),
        (r"(?<![a-z])ltx", LTX),
        (r"lumina", LUMINA),
        (r"(?<![a-z])wan(?![a-z])", WAN),
    )
)
"""What a base model's name has in it -> its family; the first that fits counts.

A maker's name is no family: Qwen makes language models, too, and only shapes tell those.
"""

BASES = ("ss_base_model_version", "modelspec.architecture")
"""The fields that name a kind of base model."""

FILES = ("base_model_name_or_path", "base_model", "baseModel", "ss_sd_model_name")
"""The fields that name one base model, as its maker called it; the first is one of PEFT's config."""

_ONETRAINER = re.compile(r'"model_type"\s*:\s*"(\w+)"')
"""Where OneTrainer's `ot_config` names the kind of its base model."""


def family_of(base: str) -> str | None:
    """The family of a base model by its name; None if the name alone does not tell it."""
    return next((name for part, name in _NAMED_SO if part.search(base.lower())), None)


def claimed(fields: Mapping[str, object]) -> str | None:
    """The family that a file's metadata and its PEFT config name; None if they name none that is known."""
    told = _ONETRAINER.search(str(fields.get("ot_config") or ""))
    kinds = [str(fields.get(field) or "") for field in BASES]
    for name in (*kinds, told[1].replace("_", "-") if told else ""):
        if family := family_of(name):
            return SD2 if family == SD1 and fields.get("ss_v2") == "True" else family
    for field in FILES:
        # It may be a folder of somebody's: only its last part, and only well-known names.
        family = family_of(str(fields.get(field) or "").rstrip("/").rpartition("/")[2])
        if family in ALL:
            return SD2 if family == SD1 and fields.get("ss_v2") == "True" else family
    return SD2 if fields.get("ss_v2") == "True" else None
