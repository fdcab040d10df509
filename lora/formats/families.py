"""Finds the family of models that an adapter was made for, by its keys, shapes and metadata alone."""

from __future__ import annotations

import re
from collections.abc import Callable

from lora.formats.header import Header

CROSS_ATTENTION_WIDTHS = {768: "SD 1.5", 1024: "SD 2", 1280: "SDXL refiner", 2048: "SDXL"}
"""How many values per token a UNet's cross attention reads -> its family."""


def _some_key_has(*parts: str) -> Callable[[Header], bool]:
    return lambda header: any(part in key for key in header.tensors for part in parts)


def _reads(width: int) -> Callable[[Header], bool]:
    return lambda header: cross_attention_width(header) == width


CONDITIONS: tuple[tuple[str, Callable[[Header], bool]], ...] = (
    ("Flux", _some_key_has("double_blocks", "single_transformer_blocks", "single_blocks")),
    ("Qwen-Image", _some_key_has("img_mlp", "img_mod", "txt_mod")),
    ("SD 3", _some_key_has("joint_blocks", "attn.add_q_proj", "attn_add_q_proj")),
    ("Wan", _some_key_has("blocks.0.cross_attn", "blocks_0_cross_attn", ".ffn.0.")),
    *((family, _reads(width)) for width, family in CROSS_ATTENTION_WIDTHS.items()),
    ("SDXL", _some_key_has("lora_te2_", "text_encoder_2.")),
    ("SD 1.5", _some_key_has("lora_te_text_model")),
    ("language model", _some_key_has("model.layers.", "h.0.attn")),
)
"""A family, and how to know it: the first that holds wins. Names that only one family has come before
widths, which families may share."""


NAMED_SO: tuple[tuple[str, str], ...] = (
    (r"refiner", "SDXL refiner"),
    (r"sdxl", "SDXL"),
    (r"diffusion-xl", "SDXL"),
    (r"sd_v1", "SD 1.5"),
    (r"diffusion-v1", "SD 1.5"),
    (r"sd_v2", "SD 2"),
    (r"diffusion-v2", "SD 2"),
    (r"diffusion-v3", "SD 3"),
    (r"sd3", "SD 3"),
    (r"(?<![a-z])flux(?![a-z])", "Flux"),
    (r"(?<![a-z])wan(?![a-z])", "Wan"),
    (r"(?<![a-z])qwen[ _-]?image", "Qwen-Image"),
)
"""What a base model's name has in it -> its family; the first that fits counts.

A maker's name is no family: Qwen makes language models, too, and only shapes tell those.
"""


def family_of(base: str) -> str | None:
    """The family of a base model by its name; None if the name alone does not tell it."""
    return next((family for part, family in NAMED_SO if re.search(part, base.lower())), None)


def identify(header: Header) -> str | None:
    """The family that the file was made for, by its usual name; None if nothing shows it."""
    family = next((family for family, holds in CONDITIONS if holds(header)), None)
    base = header.metadata.get("ss_base_model_version", "")
    return family or family_of(base) or base[:80] or None


_DOWN_SUFFIXES = ("lora_down.weight", "lora_A.weight", "hada_w1_b", "lora.down.weight")


def cross_attention_width(header: Header) -> int | None:
    """How many values per token the file's cross attention reads: the `in` of some attn2.to_k."""
    for key, info in header.tensors.items():
        is_key_projection = "attn2_to_k." in key or "attn2.to_k." in key
        if is_key_projection and key.endswith(_DOWN_SUFFIXES) and len(info.shape) >= 2:
            return info.shape[1]
    return None
