"""The models whose modules are known without a checkpoint: SDXL's UNet and its two text encoders.

They are built on torch's `meta` device, which has shapes and no numbers, with the configs of
stabilityai/stable-diffusion-xl-base-1.0.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from typing import Any

import torch

from lora.engine.modules import targets_of
from lora.formats.header import Header
from lora.formats.names.families import evidence
from lora.formats.names.family import XL, claimed
from lora.formats.names.keys import KeyMap

UNET: Mapping[str, Any] = {
    "sample_size": 128,
    "layers_per_block": 2,
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    "block_out_channels": (320, 640, 1280),
    "transformer_layers_per_block": (1, 2, 10),
    "attention_head_dim": (5, 10, 20),
    "cross_attention_dim": 2048,
    "use_linear_projection": True,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 256,
    "projection_class_embeddings_input_dim": 2816,
}


def _clip(width: int, layers: int, heads: int) -> Mapping[str, Any]:
    return {
        **{"hidden_size": width, "intermediate_size": 4 * width, "projection_dim": width},
        **{"num_hidden_layers": layers, "num_attention_heads": heads},
    }


@cache
def sdxl_key_map() -> KeyMap:
    """Every module of SDXL that an adapter can change. The first call loads diffusers, in seconds."""
    from diffusers import UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

    with torch.device("meta"):
        components = {
            "unet": UNet2DConditionModel(**UNET),
            "text_encoder": CLIPTextModel(CLIPTextConfig(**_clip(768, 12, 12))),
            "text_encoder_2": CLIPTextModelWithProjection(CLIPTextConfig(**_clip(1280, 32, 20))),
        }
    return KeyMap(targets_of(components))


def key_map_for(header: Header) -> KeyMap | None:
    """The modules of the model that an adapter is for, by its keys, shapes or metadata; None if that model is
    not known. A narrower model of the same architecture has the same names, but other shapes.
    """
    families = evidence(header)
    fits = XL in families and (len(families) == 1 or claimed(header.metadata) == XL)
    return sdxl_key_map() if fits or (not families and claimed(header.metadata) == XL) else None
