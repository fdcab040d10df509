"""Which component of a model, and which parameter of it, a checkpoint's tensor is: told from names alone."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator
from typing import NamedTuple

from lora.tools.models.sdxl_names import (
    Namer,
    Where,
    clip,
    is_clip,
    is_diffusers_unet,
    is_open_clip,
    is_sgm_unet,
    open_clip,
    own_names,
    sgm_unet,
)

MAIN = ("unet", "transformer", "transformer_2")
"""The components that draw."""

ADAPTABLE = (*MAIN, "text_encoder", "text_encoder_2", "text_encoder_3")
"""The components that adapters change. A `vae` has places too, and no adapter has names for it."""


class Found(NamedTuple):
    """What one tensor of a file is."""

    name: str
    component: str
    wheres: tuple[Where, ...]
    """Nothing: the tensor is no parameter of the model."""


class _Row(NamedTuple):
    """What stands before a component's names in a file that holds a whole model."""

    prefix: str
    component: str
    """Empty: it is told by the names behind the prefix."""


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
    _Row("text_encoders.clip_l.transformer.", "text_encoder"),  # ComfyUI
    _Row("text_encoders.clip_g.transformer.", "text_encoder_2"),
    _Row("unet.", "unet"),  # a diffusers pipeline's parts in one file
    _Row("text_encoder.", "text_encoder"),
    _Row("text_encoder_2.", "text_encoder_2"),
)


class _Layout(NamedTuple):
    """One row of the table of layouts: how to know it, and what is then what."""

    holds: Callable[[Collection[str]], bool]
    component: str
    namer: Callable[[Collection[str]], Namer]


# The first that holds wins; names that only one layout has come first.
LAYOUTS: tuple[_Layout, ...] = (
    _Layout(is_sgm_unet, "unet", sgm_unet),
    _Layout(is_diffusers_unet, "unet", lambda _: own_names),
    _Layout(is_open_clip, "text_encoder_2", lambda _: open_clip(projected=True)),
    _Layout(
        lambda names: is_clip(names) and "text_projection.weight" in names,
        "text_encoder_2",
        lambda _: clip(projected=True),
    ),
    _Layout(is_clip, "text_encoder", lambda _: clip(projected=False)),
    _Layout(lambda _: True, "transformer", lambda _: own_names),
)


def places(names: Iterable[str], component: str = "") -> Iterator[Found]:
    """What each name means. `component`: whose folder of a pipeline the names are from; empty if they are
    those of a file, which then may hold a whole model.
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


def _namer(component: str, names: Collection[str]) -> Namer:
    """How a component's names are to be read."""
    projected = component != "text_encoder" or "text_projection.weight" in names
    if is_sgm_unet(names):
        return sgm_unet(names)
    if is_open_clip(names):
        return open_clip(projected=component != "text_encoder")  # SD 2's is not used with one
    if is_clip(names):
        return clip(projected=projected)
    return own_names if component in (*ADAPTABLE, "vae") else lambda _: ()
