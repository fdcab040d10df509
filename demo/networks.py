"""The networks of the demo model: SDXL's own topology, narrow, and its tokenizer."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from diffusers import (
    AutoencoderKL,
    AutoencoderTiny,
    EulerDiscreteScheduler,
    UNet2DConditionModel,
)
from torch import nn
from transformers import CLIPTextConfig, CLIPTokenizer

from demo import pictures


@torch.no_grad()
def initialise(network: nn.Module) -> None:
    """Weights that keep the signal's variance, with every residual branch close to nothing.

    With torch's own initialisation the autoencoder's loss stood at 0.80 after 110 steps of 8 pictures;
    with this one at 0.25.
    """
    for name, module in network.named_modules():
        if isinstance(module, (nn.Conv2d, nn.Linear)):
            nn.init.kaiming_normal_(module.weight, nonlinearity="linear")
            if module.bias is not None:
                nn.init.zeros_(module.bias)
            if name.endswith(("conv2", "to_out.0", "ff.net.2", "proj_out")):
                module.weight *= 0.1


def new_vae() -> AutoencoderKL:
    """f = 8 and four latent channels, as SDXL's; narrow, and without attention in the middle.

    It begins with almost no noise on its latents, so that it learns colours at once.
    """
    vae = AutoencoderKL(
        block_out_channels=(16, 32, 64, 96),
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=4,  # a group of one channel would lose every flat colour
        mid_block_add_attention=False,
        sample_size=pictures.SIDE,
        force_upcast=False,
    )
    initialise(vae)
    with torch.no_grad():
        spread = slice(vae.config.latent_channels, None)
        vae.quant_conv.bias[spread] = -6.0
        vae.quant_conv.weight[spread] *= 0.1
        vae.decoder.conv_out.weight *= 0.3
    return vae


def new_tiny_vae() -> AutoencoderTiny:
    """TAESD's form, narrow: for live frames, in place of the autoencoder."""
    width = (16, 16, 16, 16)
    return AutoencoderTiny(
        encoder_block_out_channels=width,
        decoder_block_out_channels=width,
        num_encoder_blocks=(1, 1, 1, 1),
        num_decoder_blocks=(2, 1, 1, 1),
    )


def new_tokenizer(folder: Path, pad_token: str, texts: Iterable[str] = ()) -> CLIPTokenizer:
    """CLIP's byte-pair tokenizer over the words of `texts`: single bytes, then merges up to whole words.

    Any other text still has tokens (its bytes), so a new word can be taught by an adapter.
    """
    letters = byte_letters()
    tokens = letters + [letter + "</w>" for letter in letters]
    merges: list[tuple[str, str]] = []
    words = sorted({w for text in texts for w in text.replace(",", " ").split()})
    for word in words:
        parts = [*word[:-1], word[-1] + "</w>"]
        for merge in merges:
            parts = apply_merge(parts, merge)
        while len(parts) > 1:
            merge = (parts[0], parts[1])
            merges.append(merge)
            tokens.append("".join(merge))
            parts = apply_merge(parts, merge)
    tokens += ["<|startoftext|>", "<|endoftext|>"]
    folder.mkdir(parents=True, exist_ok=True)
    vocabulary = {token: index for index, token in enumerate(dict.fromkeys(tokens))}
    (folder / "vocab.json").write_text(json.dumps(vocabulary, ensure_ascii=False))
    lines = ["#version: 0.2", *(" ".join(merge) for merge in merges)]
    (folder / "merges.txt").write_text("\n".join(lines) + "\n")
    tokenizer = CLIPTokenizer(
        vocab=str(folder / "vocab.json"),
        merges=str(folder / "merges.txt"),
        pad_token=pad_token,
        model_max_length=77,
    )
    tokenizer.save_pretrained(folder)
    return tokenizer


def byte_letters() -> list[str]:
    """One printable letter for each of the 256 bytes, as GPT-2 and CLIP write them."""
    printable = [*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return [chr(b) for b in printable] + [chr(256 + i) for i in range(len(others))]


def apply_merge(parts: list[str], merge: tuple[str, str]) -> list[str]:
    """One byte-pair merge over a word's parts."""
    merged: list[str] = []
    for part in parts:
        if merged and (merged[-1], part) == merge:
            merged[-1] = merged[-1] + part
        else:
            merged.append(part)
    return merged


def text_config(tokenizer: CLIPTokenizer, width: int, heads: int, act: str) -> CLIPTextConfig:
    """A CLIP text encoder of three layers; as in SDXL, the UNet reads the last but one."""
    return CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=width,
        intermediate_size=4 * width,
        projection_dim=64,
        num_hidden_layers=3,
        num_attention_heads=heads,
        max_position_embeddings=77,
        hidden_act=act,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )


TOPOLOGY: dict[str, Any] = {
    "layers_per_block": 2,
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    "use_linear_projection": True,
    "addition_embed_type": "text_time",
}
"""What SDXL's UNet is at every width."""


def new_unet() -> UNet2DConditionModel:
    """SDXL's topology, narrow: the same levels, blocks and names; transformer depths 1, 1, 2 for 0, 2, 10."""
    unet = UNet2DConditionModel(
        **TOPOLOGY,
        sample_size=pictures.SIDE // 8,
        block_out_channels=(32, 64, 96),
        transformer_layers_per_block=(1, 1, 2),
        attention_head_dim=(1, 2, 3),
        cross_attention_dim=96,
        norm_num_groups=8,
        addition_time_embed_dim=32,
        projection_class_embeddings_input_dim=6 * 32 + 64,
    )
    initialise(unet)
    return unet


def write_index(folder: Path) -> None:
    """`model_index.json`: which class each part of the pipeline is, as diffusers writes it."""
    parts = {
        "scheduler": ("diffusers", "EulerDiscreteScheduler"),
        "text_encoder": ("transformers", "CLIPTextModel"),
        "text_encoder_2": ("transformers", "CLIPTextModelWithProjection"),
        "tokenizer": ("transformers", "CLIPTokenizer"),
        "tokenizer_2": ("transformers", "CLIPTokenizer"),
        "unet": ("diffusers", "UNet2DConditionModel"),
        "vae": ("diffusers", "AutoencoderKL"),
        "feature_extractor": (None, None),
        "image_encoder": (None, None),
    }
    about = {"_class_name": "StableDiffusionXLPipeline", "force_zeros_for_empty_prompt": True}
    (folder / "model_index.json").write_text(json.dumps({**about, **parts}, indent=2) + "\n")


SCHEDULE: dict[str, Any] = {
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "num_train_timesteps": 1000,
}
"""SDXL's noise schedule."""


def new_scheduler() -> EulerDiscreteScheduler:
    """SDXL's own scheduler config, with what it says to the samplers that a request may choose instead."""
    for_others = {"clip_sample": False, "set_alpha_to_one": False, "skip_prk_steps": True}
    steps = {"timestep_spacing": "leading", "steps_offset": 1}
    return EulerDiscreteScheduler.from_config({**SCHEDULE, **steps, **for_others})
