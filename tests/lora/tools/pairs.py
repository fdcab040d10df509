"""Two small models and a planted difference: what the tests of extraction begin with."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from lora.formats.header import read_header
from tests.adapters import randn

LINEAR = "blocks.0.self_attn.q.weight"
WIDE = "blocks.0.ffn.0.weight"
TALL = "blocks.1.ffn.2.weight"
CONV = "blocks.1.conv.weight"
POINT = "blocks.1.point.weight"
PATCH = "patch_embedding.weight"
TABLE = "token_embedding.weight"
NORM, BIAS, MODULATION = (
    "blocks.0.norm3.weight",
    "blocks.0.self_attn.q.bias",
    "blocks.0.modulation",
)

SHAPES: Mapping[str, tuple[int, ...]] = {
    PATCH: (96, 4, 1, 4, 4),
    LINEAR: (96, 80),
    BIAS: (96,),
    "blocks.0.self_attn.k.weight": (96, 80),
    WIDE: (128, 320),
    NORM: (96,),
    MODULATION: (1, 6, 32),
    TALL: (320, 96),
    CONV: (64, 48, 3, 3),
    POINT: (64, 96, 1, 1),
    "blocks.1.small.weight": (8, 8),
    TABLE: (50, 40),
    "head.modulation": (1, 2, 32),
}
"""A model of our own: names that no known one has, so that they stay as they are."""

MATRICES = (LINEAR, WIDE, TALL, CONV, POINT, PATCH)
"""Those whose change becomes factors."""
SAME = "blocks.0.self_attn.k.weight"


def base(dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    return {
        name: (0.1 * randn(*shape, seed=index)).to(dtype)
        for index, (name, shape) in enumerate(SHAPES.items())
    }


def low_rank(shape: tuple[int, ...], rank: int, seed: int) -> Tensor:
    """A random matrix of that rank, as the layer's weight; its largest singular values about 1."""
    out, columns = shape[0], torch.Size(shape[1:]).numel()
    up, down = randn(out, rank, seed=seed), randn(rank, columns, seed=seed + 1)
    return (up @ down / (out * columns) ** 0.5).reshape(shape)


def change(name: str, rank: int = 4, noise: float = 0.0) -> Tensor:
    shape, seed = SHAPES[name], 1000 + 10 * len(name)
    if name not in MATRICES:
        return 0.05 * randn(*shape, seed=seed)
    return low_rank(shape, rank, seed) + noise * randn(*shape, seed=seed + 2)


def tuned(
    source: Mapping[str, Tensor], rank: int = 4, noise: float = 0.0, scale: float = 1.0
) -> dict[str, Tensor]:
    """The model with every tensor changed but one."""
    return {
        name: tensor.clone()
        if name == SAME
        else (tensor.float() + scale * change(name, rank, noise)).to(tensor.dtype)
        for name, tensor in source.items()
    }


def write_model(path: Path, tensors: Mapping[str, Tensor]) -> Path:
    save_file(dict(tensors), path)
    return path


def write_pair(
    folder: Path, dtype: torch.dtype = torch.float32, rank: int = 4, noise: float = 0.0
) -> tuple[Path, Path]:
    source = base(dtype)
    return (
        write_model(folder / "source.safetensors", source),
        write_model(folder / "target.safetensors", tuned(source, rank, noise)),
    )


def read(path: Path) -> tuple[dict[str, Tensor], Mapping[str, str]]:
    return load_file(path), read_header(path).metadata
