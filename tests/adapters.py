"""Adapter files for tests, made by hand so that no code under test names their keys or shapes."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors.torch import save, save_file
from torch import Tensor

# One linear layer of the tiny UNet and its shapes: [out, in] = [64, 64] and, for cross attention, [64, 96].
SELF_ATTENTION = "down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_q"
CROSS_ATTENTION = "down_blocks.1.attentions.0.transformer_blocks.0.attn2.to_k"
CONVOLUTION = "down_blocks.0.resnets.0.conv1"

SELF_SGM = "lora_unet_input_blocks_4_1_transformer_blocks_0_attn1_to_q"
CROSS_SGM = "lora_unet_input_blocks_4_1_transformer_blocks_0_attn2_to_k"
CONV_SGM = "lora_unet_input_blocks_1_0_in_layers_2"


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def kohya(seed: int = 0, rank: int = 4, alpha: float | None = 2.0) -> dict[str, Tensor]:
    """A kohya LoRA with SGM names over three layers, one of them a convolution."""
    tensors = {
        f"{SELF_SGM}.lora_down.weight": randn(rank, 64, seed=seed),
        f"{SELF_SGM}.lora_up.weight": randn(64, rank, seed=seed + 1),
        f"{CROSS_SGM}.lora_down.weight": randn(rank, 96, seed=seed + 2),
        f"{CROSS_SGM}.lora_up.weight": randn(64, rank, seed=seed + 3),
        f"{CONV_SGM}.lora_down.weight": randn(rank, 32, 3, 3, seed=seed + 4),
        f"{CONV_SGM}.lora_up.weight": randn(32, rank, 1, 1, seed=seed + 5),
    }
    if alpha is not None:
        for stem in (SELF_SGM, CROSS_SGM, CONV_SGM):
            tensors[f"{stem}.alpha"] = torch.tensor(alpha)
    return tensors


def loha(seed: int = 0, rank: int = 3) -> dict[str, Tensor]:
    """A LyCORIS LoHa over one linear layer."""
    stem = "lycoris_" + SELF_ATTENTION.replace(".", "_")
    shapes = {"hada_w1_a": (64, rank), "hada_w1_b": (rank, 64)}
    shapes |= {"hada_w2_a": (64, rank), "hada_w2_b": (rank, 64)}
    tensors = {f"{stem}.{n}": randn(*s, seed=seed + i) for i, (n, s) in enumerate(shapes.items())}
    return {**tensors, f"{stem}.alpha": torch.tensor(1.5)}


def sd15() -> dict[str, Tensor]:
    """An SD 1.5 LoRA by its layers' names and shapes: cross attention reads 768 values per token."""
    stem = "lora_unet_down_blocks_1_attentions_0_transformer_blocks_0"
    return {
        f"{stem}_attn2_to_k.lora_down.weight": randn(4, 768),
        f"{stem}_attn2_to_k.lora_up.weight": randn(640, 4),
        f"{stem}_attn2_to_k.alpha": torch.tensor(4.0),
        f"{stem}_attn1_to_q.lora_down.weight": randn(4, 640),
        f"{stem}_attn1_to_q.lora_up.weight": randn(640, 4),
        f"{stem}_attn1_to_q.alpha": torch.tensor(4.0),
    }


def as_bytes(tensors: dict[str, Tensor], metadata: dict[str, str] | None = None) -> bytes:
    return save(tensors, metadata)


def write(path: Path, tensors: dict[str, Tensor], metadata: dict[str, str] | None = None) -> Path:
    save_file(tensors, path, metadata)
    return path
