"""The names of the original Stable Diffusion code (sgm) for the modules of diffusers' UNet, both ways."""

from __future__ import annotations

import re
from collections.abc import Container, Mapping, Set
from dataclasses import dataclass
from functools import cache
from itertools import count

LEVELS = 8
"""More down blocks than any UNet has."""

WHOLE: Mapping[str, str] = {
    "conv_in": "input_blocks.0.0",
    "conv_norm_out": "out.0",
    "conv_out": "out.2",
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "add_embedding.linear_1": "label_emb.0.0",
    "add_embedding.linear_2": "label_emb.0.2",
}
_INSIDE: Mapping[str, Mapping[str, str]] = {
    "resnets": {
        "norm1": "in_layers.0",
        "conv1": "in_layers.2",
        "time_emb_proj": "emb_layers.1",
        "norm2": "out_layers.0",
        "conv2": "out_layers.3",
        "conv_shortcut": "skip_connection",
    },
    "downsamplers": {"conv": "op"},
    "upsamplers": {"conv": "conv"},
}
"""Kind of layer -> the names inside of it. Inside of attentions both codes use the same names."""


@cache
def layers(resnets: int, attended: Set[int] = frozenset()) -> Mapping[str, str]:
    """diffusers' name of each layer of the blocks -> sgm's.

    A UNet with n `resnets` in a down block (2 in SD 1.5, SD 2 and SDXL) has n + 1 in an up block. Layer j of
    down block i is input block 1 + i (n + 1) + j; layer j of up block i is output block i (n + 1) + j. An
    upsampler stands behind the resnet and, in the up blocks that are `attended`, the attention.
    """
    names = {f"mid_block.resnets.{j}": f"middle_block.{2 * j}" for j in (0, 1)}
    names["mid_block.attentions.0"] = "middle_block.1"
    for i in range(LEVELS):
        start = i * (resnets + 1)
        for place, kind in enumerate(("resnets", "attentions")):
            for j in range(resnets):
                names[f"down_blocks.{i}.{kind}.{j}"] = f"input_blocks.{start + 1 + j}.{place}"
            for j in range(resnets + 1):
                names[f"up_blocks.{i}.{kind}.{j}"] = f"output_blocks.{start + j}.{place}"
        names[f"down_blocks.{i}.downsamplers.0"] = f"input_blocks.{start + resnets + 1}.0"
        behind = 2 if i in attended else 1
        names[f"up_blocks.{i}.upsamplers.0"] = f"output_blocks.{start + resnets}.{behind}"
    return names


@dataclass(frozen=True)
class Blocks:
    """What the numbers in sgm's names depend on."""

    resnets: int
    """In a down block."""
    attended: frozenset[int]
    """The up blocks that have attention."""

    @classmethod
    def of(cls, paths: Container[str]) -> Blocks:
        """The blocks of the UNet whose modules have all these paths, and no others."""
        attended = (i for i in range(LEVELS) if f"up_blocks.{i}.attentions.0.proj_in" in paths)
        resnets = next(n for n in count() if f"down_blocks.0.resnets.{n}.conv1" not in paths)
        return cls(resnets, frozenset(attended))


SDXL_BLOCKS, SD_BLOCKS = Blocks(2, frozenset({0, 1})), Blocks(2, frozenset({1, 2, 3}))
"""Those of SDXL, and of SD 1.5 and SD 2: for a file that names a few of the modules."""


def sgm_path(path: str, siblings: Container[str] | Blocks) -> str | None:
    """The sgm name of a module of diffusers' UNet; None if it has none.

    `siblings`: the UNet's blocks, or all its module paths, which show them.
    """
    if path in WHOLE:
        return WHOLE[path]
    blocks = siblings if isinstance(siblings, Blocks) else Blocks.of(siblings)
    layer, inside = _split(path, 3 if path.startswith("mid_block.") else 4)
    theirs = layers(blocks.resnets, blocks.attended).get(layer)
    kind = layer.split(".")[-2:][0]
    inside = _INSIDE[kind].get(inside, "") if kind in _INSIDE else inside
    return f"{theirs}.{inside}" if theirs and inside else None


def diffusers_path(name: str, resnets: int) -> str | None:
    """The path in diffusers' UNet of the module with this sgm name: the inverse of `sgm_path`."""
    modules, attentions = _inverse(resnets)
    layer, inside = _split(name, 2 if name.startswith("middle_block.") else 3)
    if name in modules or layer not in attentions or not inside:
        return modules.get(name)
    return f"{attentions[layer]}.{inside}"


@cache
def _inverse(resnets: int) -> tuple[Mapping[str, str], Mapping[str, str]]:
    """sgm's name -> diffusers' path, of all modules outside of attentions, and of the attentions."""
    modules = {theirs: ours for ours, theirs in WHOLE.items()}
    attentions: dict[str, str] = {}
    for attended in (frozenset(range(LEVELS)), frozenset[int]()):
        for ours, theirs in layers(resnets, attended).items():
            names = _INSIDE.get(ours.split(".")[-2])
            if names is None:
                attentions[theirs] = ours
            else:
                modules |= {f"{theirs}.{b}": f"{ours}.{a}" for a, b in names.items()}
    return modules, attentions


def _split(path: str, parts: int) -> tuple[str, str]:
    """The first parts of a path, and the rest."""
    steps = path.split(".", parts)
    return ".".join(steps[:parts]), "".join(steps[parts:])


_BLOCK = re.compile(r"(input|middle|output)_blocks?[._](\d+)")


def block_of(sgm: str) -> str:
    """The block of the UNet that a module with this sgm name is in: IN00, ..., MID, OUT00, ..., else BASE."""
    match = _BLOCK.search(sgm)
    if not match:
        return "BASE"
    side, number = match.groups()
    return "MID" if side == "middle" else f"{'IN' if side == 'input' else 'OUT'}{int(number):02}"
