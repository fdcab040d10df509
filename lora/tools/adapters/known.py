"""Models whose modules are known without their weights: SDXL's UNet and both of its text encoders.

Built on torch's `meta` device, which holds shapes and no numbers. The configs are those of
stabilityai/stable-diffusion-xl-base-1.0.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from typing import Any

import torch

from lora.engine.modules import targets_of
from lora.formats.families import family_of, identify
from lora.formats.header import Header
from lora.formats.names.keys import KeyMap
from lora.tools.adapters.metadata import BASES

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
CLIP_L: Mapping[str, Any] = {
    "hidden_size": 768,
    "intermediate_size": 3072,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "projection_dim": 768,
}
OPEN_CLIP_G: Mapping[str, Any] = {
    "hidden_size": 1280,
    "intermediate_size": 5120,
    "num_hidden_layers": 32,
    "num_attention_heads": 20,
    "projection_dim": 1280,
}


@cache
def sdxl_key_map() -> KeyMap:
    """Every module of SDXL that an adapter can change. Seconds for the first call, which loads diffusers."""
    from diffusers import UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

    with torch.device("meta"):
        components = {
            "unet": UNet2DConditionModel(**UNET),
            "text_encoder": CLIPTextModel(CLIPTextConfig(**CLIP_L)),
            "text_encoder_2": CLIPTextModelWithProjection(CLIPTextConfig(**OPEN_CLIP_G)),
        }
    return KeyMap(targets_of(components))


def key_map_for(header: Header) -> KeyMap | None:
    """The modules of the model that an adapter is for, by its keys, its shapes or what its metadata says;
    None if that model is not known. A narrower model of the same make has the same names, not the shapes.
    """
    told = identify(Header(header.tensors, {}))
    named = [family_of(header.metadata[base]) for base in BASES if header.metadata.get(base)]
    return sdxl_key_map() if told == "SDXL" or (told is None and "SDXL" in named) else None
