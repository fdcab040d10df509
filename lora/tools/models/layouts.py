"""Finds by name alone which component of a model, and which parameter of it, a checkpoint's tensor is.

The paths are those of a live pipeline of diffusers 0.42 and transformers 5: those of a text encoder with a
projection begin with `text_model.`, those of one without a projection do not.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterable, Iterator
from typing import NamedTuple

from lora.formats.names.prefixes import COMPONENTS
from lora.formats.names.sgm import diffusers_path

MAIN = ("unet", "transformer", "transformer_2")
"""The components that draw."""

ADAPTABLE = (*MAIN, "text_encoder", "text_encoder_2", "text_encoder_3")
"""The components that adapters change. A `vae` has places too, but no adapter has names for it."""


class Where(NamedTuple):
    """The parameter that a stored tensor, or a third of it, holds."""

    path: str
    parameter: str
    third: int | None = None
    """0, 1 or 2: the block of rows, if a fused tensor holds three parameters."""
    transposed: bool = False
    """Whether the tensor is stored as [in, out]."""


class Found(NamedTuple):
    """What one tensor of a file is."""

    name: str
    component: str
    wheres: tuple[Where, ...]
    """Empty if the tensor is no parameter of the model."""


Lookup = Callable[[str], tuple[Where, ...]]
"""From a tensor's name, without its component's prefix, to what it holds; empty if it is no parameter."""


# --- how each component's parameters are called -------------------------------------------------------


def plain_names(name: str) -> tuple[Where, ...]:
    """A name that already is a module's path, a dot and a parameter."""
    path, _, parameter = name.rpartition(".")
    return (Where(path, parameter),)


def is_sgm_unet(names: Collection[str]) -> bool:
    """Whether these are the parameters of a UNet in the original code's names."""
    return "input_blocks.0.0.weight" in names and "out.2.weight" in names


def is_diffusers_unet(names: Collection[str]) -> bool:
    """Whether these are the parameters of a UNet in diffusers' names."""
    return "conv_in.weight" in names and "down_blocks.0.resnets.0.conv1.weight" in names


_DOWNSAMPLER = re.compile(r"input_blocks\.(\d+)\.0\.op\.weight")


def sgm_unet(names: Collection[str]) -> Lookup:
    """The names of a UNet as the original Stable Diffusion code (sgm) has them.

    The first downsampler closes the first level: its number shows how many resnets a level has.
    """
    closing = [int(match[1]) for name in names if (match := _DOWNSAMPLER.fullmatch(name))]
    resnets = min(closing, default=3) - 1

    def where(name: str) -> tuple[Where, ...]:
        module, _, parameter = name.rpartition(".")
        path = diffusers_path(module, resnets)
        return () if path is None else (Where(path, parameter),)

    return where


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


def clip(*, projected: bool) -> Lookup:
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


def open_clip(*, projected: bool) -> Lookup:
    """OpenCLIP's names. Query, key and value are thirds of one tensor; the projection is transposed."""

    def where(name: str) -> tuple[Where, ...]:
        if name in ("text_projection", "text_projection.weight"):
            transposed = name == "text_projection"
            projection = Where("text_projection", "weight", transposed=transposed)
            return (projection,) if projected else ()
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


# --- which names belong to which component ------------------------------------------------------------


class _Row(NamedTuple):
    """What stands before a component's names in a file that holds a whole model."""

    prefix: str
    component: str
    """Empty if the names behind the prefix show it."""


# The first prefix that a name has counts.
PREFIXES: tuple[_Row, ...] = (
    _Row("model.diffusion_model.", ""),  # the original code's, and ComfyUI's for every model
    _Row("diffusion_model.", ""),
    _Row("conditioner.embedders.0.transformer.", "text_encoder"),  # SDXL
    _Row("conditioner.embedders.1.model.", "text_encoder_2"),
    _Row("conditioner.embedders.0.model.", "text_encoder_2"),  # SDXL's refiner
    _Row("cond_stage_model.transformer.", "text_encoder"),  # SD 1.5
    _Row("cond_stage_model.model.", "text_encoder"),  # SD 2
    _Row("first_stage_model.", "vae"),
    *(_Row(COMPONENTS[name].original, name) for name in ("text_encoder", "text_encoder_2")),
    *(_Row(f"{name}.", name) for name in ("unet", "text_encoder", "text_encoder_2")),
)


class _Layout(NamedTuple):
    """One row of the table of layouts: how it is recognised, its component, and its names."""

    holds: Callable[[Collection[str]], bool]
    component: str
    namer: Callable[[Collection[str]], Lookup]


# The first that holds wins; names that only one layout has come first.
LAYOUTS: tuple[_Layout, ...] = (
    _Layout(is_sgm_unet, "unet", sgm_unet),
    _Layout(is_diffusers_unet, "unet", lambda _: plain_names),
    _Layout(is_open_clip, "text_encoder_2", lambda _: open_clip(projected=True)),
    _Layout(
        lambda names: is_clip(names) and "text_projection.weight" in names,
        "text_encoder_2",
        lambda _: clip(projected=True),
    ),
    _Layout(is_clip, "text_encoder", lambda _: clip(projected=False)),
    _Layout(lambda _: True, "transformer", lambda _: plain_names),
)


def places(names: Iterable[str], component: str = "") -> Iterator[Found]:
    """What each name means. `component`: the one whose folder of a pipeline the names are from; empty if they
    are from a file that may hold a whole model.
    """
    names = list(names)
    if component:
        yield from _component(names, "", component)
        return
    groups: dict[_Row | None, list[str]] = {}
    for name in names:
        row = next((row for row in PREFIXES if name.startswith(row.prefix)), None)
        groups.setdefault(row, []).append(name)
    alone = set(groups) == {None}
    for row, group in groups.items():
        if row is not None:
            yield from _component(group, row.prefix, row.component)
        elif alone:
            yield from _component(group, "", "")
        else:  # what a whole model has beside its parts: EMA copies, schedules
            yield from (Found(name, "", ()) for name in group)


def _component(names: list[str], prefix: str, component: str) -> Iterator[Found]:
    bare = {name.removeprefix(prefix): name for name in names}
    if not component:
        layout = next(row for row in LAYOUTS if row.holds(bare.keys()))
        component, namer = layout.component, layout.namer(bare.keys())
    else:
        namer = _namer(component, bare.keys())
    yield from (Found(name, component, namer(short)) for short, name in bare.items())


def _namer(component: str, names: Collection[str]) -> Lookup:
    """The naming that a component's names are in."""
    projected = component != "text_encoder" or "text_projection.weight" in names
    if is_sgm_unet(names):
        return sgm_unet(names)
    if is_open_clip(names):
        return open_clip(projected=component != "text_encoder")  # SD 2's is not used with one
    if is_clip(names):
        return clip(projected=projected)
    return plain_names if component in (*ADAPTABLE, "vae") else lambda _: ()
