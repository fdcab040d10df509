"""What checkpoints call the parameters of Stable Diffusion -> diffusers' module paths. Strings only.

The inverse of `names.sgm` for the UNet, and the two forms that CLIP's text encoders have on disk: Hugging
Face's, and OpenCLIP's with its fused attention. Paths come out as they are in a live pipeline of diffusers
0.42 and transformers 5: a text encoder without a projection has no `text_model.` before its paths, one with
a projection has.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection
from typing import NamedTuple


class Where(NamedTuple):
    """Which parameter of which module a stored tensor is, or a third of it is."""

    path: str
    parameter: str
    third: int | None = None
    """0, 1 or 2: these of the tensor's three blocks of rows, where a fused tensor holds three parameters."""
    transposed: bool = False
    """Whether the tensor is stored as [in, out]."""


Namer = Callable[[str], tuple[Where, ...]]
"""A tensor's name, without its component's prefix, to what it holds; nothing for what is no parameter."""


def own_names(name: str) -> tuple[Where, ...]:
    """A name that already is a module's path, a dot and a parameter."""
    path, _, parameter = name.rpartition(".")
    return (Where(path, parameter),)


_RESNET = {
    "in_layers.0": "norm1",
    "in_layers.2": "conv1",
    "emb_layers.1": "time_emb_proj",
    "out_layers.0": "norm2",
    "out_layers.3": "conv2",
    "skip_connection": "conv_shortcut",
}
_WHOLE = {
    "input_blocks.0.0": "conv_in",
    "out.0": "conv_norm_out",
    "out.2": "conv_out",
    "time_embed.0": "time_embedding.linear_1",
    "time_embed.2": "time_embedding.linear_2",
    "label_emb.0.0": "add_embedding.linear_1",
    "label_emb.0.2": "add_embedding.linear_2",
}
_BLOCK = re.compile(r"(input|output)_blocks\.(\d+)\.(\d+)\.(.+)")
_MIDDLE = re.compile(r"middle_block\.(\d+)\.(.+)")
_SAMPLERS = {"op": "downsamplers.0.conv", "conv": "upsamplers.0.conv"}
_FIRST_DOWNSAMPLER = re.compile(r"input_blocks\.(\d+)\.0\.op\.weight")


def is_sgm_unet(names: Collection[str]) -> bool:
    """Whether these are the parameters of a UNet in the original code's names."""
    return "input_blocks.0.0.weight" in names and "out.2.weight" in names


def is_diffusers_unet(names: Collection[str]) -> bool:
    """Whether these are the parameters of a UNet in diffusers' names."""
    return "conv_in.weight" in names and "down_blocks.0.resnets.0.conv1.weight" in names


def sgm_unet(names: Collection[str]) -> Namer:
    """The names of a UNet as the original Stable Diffusion code (sgm) has them.

    A level has n resnets on the way down, n + 1 on the way up; `input_blocks.N.0.op` closes the first level,
    so its number is n + 1. See `lora.formats.names.sgm.sgm_path` for the other direction.
    """
    found = [int(match[1]) for name in names if (match := _FIRST_DOWNSAMPLER.fullmatch(name))]
    per_level = min(found, default=3)

    def where(name: str) -> tuple[Where, ...]:
        module, _, parameter = name.rpartition(".")
        path = _unet_path(module, per_level)
        return () if path is None else (Where(path, parameter),)

    return where


def _unet_path(module: str, per_level: int) -> str | None:
    if module in _WHOLE:
        return _WHOLE[module]
    if middle := _MIDDLE.fullmatch(module):
        place = int(middle[1])
        return _inside("mid_block", 0 if place == 1 else place // 2, str(place % 2), middle[2])
    block = _BLOCK.fullmatch(module)
    if not block:
        return None
    down = block[1] == "input"
    level, layer = divmod(int(block[2]) - down, per_level)
    side = f"{'down' if down else 'up'}_blocks.{level}"
    if block[4] in _SAMPLERS:
        return f"{side}.{_SAMPLERS[block[4]]}"
    return _inside(side, layer, block[3], block[4])


def _inside(side: str, layer: int, kind: str, rest: str) -> str | None:
    """`kind`: 0 for what is in a resnet, 1 in an attention."""
    if kind == "1":
        return f"{side}.attentions.{layer}.{rest}"
    return f"{side}.resnets.{layer}.{_RESNET[rest]}" if rest in _RESNET else None


def is_clip(names: Collection[str]) -> bool:
    """Whether these are the parameters of a CLIP text encoder in Hugging Face's names."""
    return any(
        f"{start}encoder.layers.0.self_attn.q_proj.weight" in names
        and f"{start}embeddings.position_embedding.weight" in names
        for start in ("", "text_model.")
    )


def is_open_clip(names: Collection[str]) -> bool:
    """Whether these are the parameters of a text encoder in OpenCLIP's names."""
    return "transformer.resblocks.0.attn.in_proj_weight" in names


def clip(*, projected: bool) -> Namer:
    """Hugging Face's names of a text encoder, with `text_model.` (transformers 4) or without (5)."""

    def where(name: str) -> tuple[Where, ...]:
        path, _, parameter = name.rpartition(".")
        return (Where(_text_path(path.removeprefix("text_model."), projected), parameter),)

    return where


def _text_path(bare: str, projected: bool) -> str:
    return f"text_model.{bare}" if projected and bare != "text_projection" else bare


_OPEN_CLIP = {
    "token_embedding.weight": "embeddings.token_embedding.weight",
    "positional_embedding": "embeddings.position_embedding.weight",
    "ln_final.weight": "final_layer_norm.weight",
    "ln_final.bias": "final_layer_norm.bias",
}
_RESBLOCK = re.compile(r"transformer\.resblocks\.(\d+)\.(.+)")
_IN_RESBLOCK = {
    "ln_1": "layer_norm1",
    "ln_2": "layer_norm2",
    "mlp.c_fc": "mlp.fc1",
    "mlp.c_proj": "mlp.fc2",
    "attn.out_proj": "self_attn.out_proj",
}
_FUSED = {"attn.in_proj_weight": "weight", "attn.in_proj_bias": "bias"}


def open_clip(*, projected: bool) -> Namer:
    """OpenCLIP's names: query, key and value are the thirds of one tensor, the projection is transposed."""

    def where(name: str) -> tuple[Where, ...]:
        if name == "text_projection":
            return (Where("text_projection", "weight", transposed=True),) if projected else ()
        if name == "text_projection.weight":
            return (Where("text_projection", "weight"),) if projected else ()
        if known := _OPEN_CLIP.get(name):
            path, _, parameter = known.rpartition(".")
            return (Where(_text_path(path, projected), parameter),)
        block = _RESBLOCK.fullmatch(name)
        return _in_resblock(block[1], block[2], projected) if block else ()

    return where


def _in_resblock(number: str, rest: str, projected: bool) -> tuple[Where, ...]:
    layer = _text_path(f"encoder.layers.{number}", projected)
    if rest in _FUSED:
        return tuple(
            Where(f"{layer}.self_attn.{letter}_proj", _FUSED[rest], third)
            for third, letter in enumerate("qkv")
        )
    module, _, parameter = rest.rpartition(".")
    if module not in _IN_RESBLOCK:
        return ()
    return (Where(f"{layer}.{_IN_RESBLOCK[module]}", parameter),)
