"""The names that the original Stable Diffusion code (sgm) gives to the modules of diffusers' UNet."""

from __future__ import annotations

import re
from collections.abc import Container

_RESNET = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "time_emb_proj": "emb_layers.1",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "conv_shortcut": "skip_connection",
}
_WHOLE = {
    "conv_in": "input_blocks.0.0",
    "conv_norm_out": "out.0",
    "conv_out": "out.2",
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "add_embedding.linear_1": "label_emb.0.0",
    "add_embedding.linear_2": "label_emb.0.2",
}
_BLOCK = re.compile(
    r"(down|up)_blocks\.(\d+)\."
    r"(resnets|attentions|downsamplers|upsamplers)\.(\d+)\.(.+)"
)
_MIDDLE = re.compile(r"mid_block\.(resnets|attentions)\.(\d+)\.(.+)")


def sgm_path(path: str, siblings: Container[str]) -> str | None:
    """The name that the original Stable Diffusion code (sgm) gives to a module of diffusers' UNet.

    `siblings` are all module paths of that UNet; they tell its number of resnets in a down block, n
    (2 in SD 1.5, SD 2 and SDXL). Down block i, layer j is input block 1 + i (n + 1) + j; up block i,
    layer j is output block i (n + 1) + j. None: the module has no such name.
    """
    if path in _WHOLE:
        return _WHOLE[path]
    if middle := _MIDDLE.fullmatch(path):
        kind, index, rest = middle.groups()
        place = 1 if kind == "attentions" else 2 * int(index)
        return _inside(f"middle_block.{place}", kind, rest)
    block = _BLOCK.fullmatch(path)
    if not block:
        return None
    side, number, kind, index, rest = block.groups()
    start = int(number) * (_resnets_per_down_block(siblings) + 1)
    if kind == "downsamplers":
        return f"input_blocks.{start + _resnets_per_down_block(siblings) + 1}.0.op"
    if kind == "upsamplers":
        # It stands behind the resnet and, where the block has one, the attention.
        behind = 2 if f"up_blocks.{number}.attentions.0.proj_in" in siblings else 1
        return f"output_blocks.{start + _resnets_per_down_block(siblings)}.{behind}.conv"
    place = 1 if kind == "attentions" else 0
    place_of = {
        "down": f"input_blocks.{start + 1 + int(index)}",
        "up": f"output_blocks.{start + int(index)}",
    }
    return _inside(f"{place_of[side]}.{place}", kind, rest)


def _resnets_per_down_block(siblings: Container[str]) -> int:
    count = 0
    while f"down_blocks.0.resnets.{count}.conv1" in siblings:
        count += 1
    return count


def _inside(where: str, kind: str, rest: str) -> str | None:
    if kind == "attentions":
        return f"{where}.{rest}"
    return f"{where}.{_RESNET[rest]}" if rest in _RESNET else None
