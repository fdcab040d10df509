"""Trainers' names for the tensors of an adapter -> component, module and slot. Strings only.

A tensor's key is a stem (which module), a dot and a suffix (which tensor of the algorithm). Suffixes come
from the table `SLOTS`. Stems are looked up in a dictionary of every name that any trainer gives to any
module of the pipeline that is loaded, made from the modules' own paths; so underscores are never
parsed, and a key either means exactly one module or is reported as unknown.
"""

from __future__ import annotations

import re
from collections.abc import Container, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property

Shape = tuple[int, ...]

SLOTS: Mapping[str, str] = {
    # kohya, LyCORIS
    "lora_up.weight": "lora_up",
    "lora_down.weight": "lora_down",
    "lora_mid.weight": "lora_mid",
    "alpha": "alpha",
    # diffusers and PEFT
    "lora_B.weight": "lora_up",
    "lora_A.weight": "lora_down",
    "lora_B.default.weight": "lora_up",
    "lora_A.default.weight": "lora_down",
    "lora.up.weight": "lora_up",
    "lora.down.weight": "lora_down",
    # LyCORIS LoHa
    "hada_w1_a": "hada_w1_a",
    "hada_w1_b": "hada_w1_b",
    "hada_w2_a": "hada_w2_a",
    "hada_w2_b": "hada_w2_b",
    "hada_t1": "hada_t1",
    "hada_t2": "hada_t2",
}
"""What follows a module's name in a key -> slot: the field of an algorithm that takes the tensor."""

COMPONENT_PREFIXES: Mapping[str, tuple[str, ...]] = {
    "unet": ("lora_unet_", "lycoris_"),
    "text_encoder": ("lora_te1_", "lycoris_te1_"),
    "text_encoder_2": ("lora_te2_", "lycoris_te2_"),
}
"""What stands before a module's path with underscores, by component."""


@dataclass(frozen=True)
class Target:
    """One module of the pipeline that an adapter can change."""

    component: str
    path: str
    shape: Shape
    """The weight's shape: [out, in] or [out, in, kh, kw]."""

    def __str__(self) -> str:
        return f"{self.component}.{self.path}"


@dataclass(frozen=True)
class Match:
    """What a key means."""

    target: Target
    slot: str
    """One of the values of `SLOTS`, or the key's own ending if it is not known."""


class KeyMap:
    """Every name that a trainer may give to a module of this pipeline. Built once, never changed."""

    def __init__(self, targets: Mapping[str, Mapping[str, Shape]]) -> None:
        """`targets`: component -> module path -> weight shape.

        Raises: ValueError if two modules share a name; then no key with it could be trusted.
        """
        self._targets: dict[str, Target] = {}
        for component, shapes in targets.items():
            for path, shape in shapes.items():
                target = Target(component, path, tuple(shape))
                for name in _names(component, path, shapes):
                    if self._targets.setdefault(name, target) != target:
                        other = self._targets[name]
                        raise ValueError(f"{name!r} would mean both {other} and {target}")

    @cached_property
    def targets(self) -> frozenset[Target]:
        """Every module that has a name."""
        return frozenset(self._targets.values())

    def match(self, key: str) -> Match | None:
        """What a tensor's key means in this pipeline: its longest beginning that is a module's name,
        and the slot; None if no beginning is.
        """
        stem, dot, suffix = key.rpartition(".")
        while dot:
            if target := self._targets.get(stem):
                return Match(target, SLOTS.get(suffix, suffix))
            stem, dot, more = stem.rpartition(".")
            suffix = f"{more}.{suffix}"
        return None


def _names(component: str, path: str, siblings: Mapping[str, Shape]) -> Iterator[str]:
    """Every stem that means this module."""
    paths = {path}
    if component == "unet":
        # PEFT's own saving; for the text encoders it would be the same name twice.
        yield f"base_model.model.{path}"
        sgm = sgm_path(path, siblings)
        paths.update({sgm} if sgm else ())
    else:
        # transformers 5 dropped `text_model.` from CLIPTextModel, and trainers still write it.
        bare = path.removeprefix("text_model.")
        paths = {bare, f"text_model.{bare}"} if bare != "text_projection" else {bare}
    for name in sorted(paths):
        yield f"{component}.{name}"
        for prefix in COMPONENT_PREFIXES.get(component, ()):
            yield prefix + name.replace(".", "_")


# --- SGM names ------------------------------------------------------------------------------------

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
