"""Trainers' names for the tensors of an adapter -> component, module and slot. Strings only.

A tensor's key is a stem (which module), a dot and a suffix (which tensor of the algorithm). Suffixes come
from the table `SLOTS`. Stems are looked up in a dictionary of every name that any trainer gives to any
module of the pipeline that is loaded, made from the modules' own paths; so underscores are never
parsed, and a key either means exactly one module or is reported as unknown.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

from lora.formats.names.sgm import sgm_path
from lora.formats.names.wan import wan_path

Shape = tuple[int, ...]

SLOTS: Mapping[str, str] = {
    # kohya, LyCORIS
    "lora_up.weight": "lora_up",
    "lora_down.weight": "lora_down",
    "lora_mid.weight": "lora_mid",
    "alpha": "alpha",
    "bias_indices": "bias_indices",
    "bias_values": "bias_values",
    "bias_size": "bias_size",
    # diffusers and PEFT
    "lora_B.weight": "lora_up",
    "lora_A.weight": "lora_down",
    "lora_B.bias": "lora_up_bias",
    "lora.up.weight": "lora_up",
    "lora.down.weight": "lora_down",
    "lora_linear_layer.up.weight": "lora_up",
    "lora_linear_layer.down.weight": "lora_down",
    "up.weight": "lora_up",  # behind `processor.to_q_lora`
    "down.weight": "lora_down",
    # LyCORIS LoHa; PEFT's has the same names
    "hada_w1_a": "hada_w1_a",
    "hada_w1_b": "hada_w1_b",
    "hada_w2_a": "hada_w2_a",
    "hada_w2_b": "hada_w2_b",
    "hada_t1": "hada_t1",
    "hada_t2": "hada_t2",
    # LyCORIS LoKr; PEFT's has the same names
    "lokr_w1": "lokr_w1",
    "lokr_w1_a": "lokr_w1_a",
    "lokr_w1_b": "lokr_w1_b",
    "lokr_w2": "lokr_w2",
    "lokr_w2_a": "lokr_w2_a",
    "lokr_w2_b": "lokr_w2_b",
    "lokr_t2": "lokr_t2",
    # DoRA
    "dora_scale": "dora_scale",
    "lora_magnitude_vector": "magnitude",
    "lora_magnitude_vector.weight": "magnitude",
    # OFT, BOFT
    "oft_blocks": "oft_blocks",
    "rescale": "rescale",
    "oft_R": "oft_r",
    "oft_R.weight": "oft_r",
    # GLoRA
    "a1.weight": "a1",
    "a2.weight": "a2",
    "b1.weight": "b1",
    "b2.weight": "b2",
    "bm.weight": "bm",
    # IA3; LyCORIS' own factors are called `weight`
    "on_input": "on_input",
    "ia3_l": "ia3_l",
    # parameters given whole
    "diff": "diff",
    "diff_b": "diff_b",
    "diff_m": "diff_m",
    "w_norm": "diff",
    "b_norm": "diff_b",
    "set_weight": "weight",
    "weight": "weight",
    "bias": "bias",
    "base_layer.bias": "bias",  # PEFT's `bias="all"` and "lora_only"
    "modules_to_save.weight": "weight",
    "modules_to_save.bias": "bias",
    # known, and refused with their reason: see `REFUSED`
    "q_layer.weight": "q_layer",
    "p_layer.weight": "p_layer",
    "lambda_layer": "lambda_layer",
    "reshape_weight": "reshape_weight",
}
"""What follows a module's name in a key -> slot: the field of an algorithm that takes the tensor."""

_T_LORA = (
    "T-LoRA: the file lacks the base part that its trainer subtracts, and its rank changes with the "
    "timestep; LyCORIS can export it as a LoRA"
)
REFUSED: Mapping[str, str] = {
    "q_layer": _T_LORA,
    "p_layer": _T_LORA,
    "lambda_layer": _T_LORA,
    "reshape_weight": "reshape_weight would change the layer's shape",
}
"""Slots of forms that cannot be applied, and why."""

_ADAPTER_NAME = re.compile(
    r"^(lora_[AB]|lora_magnitude_vector|oft_R|ia3_l|hada_\w+|lokr_\w+|modules_to_save)\.[^.]+(?=\.|$)"
)
"""PEFT puts the adapter's name behind its own (`lora_A.default.weight`) where it is not taken out."""


def slot_of(suffix: str) -> str:
    """The slot that a suffix means; if it is not known, the suffix behind a `?`, which no field has."""
    slot = SLOTS.get(suffix)
    return slot if slot else SLOTS.get(_ADAPTER_NAME.sub(r"\1", suffix), f"?{suffix}")


MAX_KEY = 1000
"""No trainer writes longer names, and each of their dots would cost a look."""


@dataclass(frozen=True)
class _Prefixes:
    """What stands before a module's path in a key: dotted, or with underscores for dots."""

    dotted: tuple[str, ...]
    underscored: tuple[str, ...]


COMPONENTS: Mapping[str, _Prefixes] = {
    "unet": _Prefixes(
        ("unet.", "diffusion_model.", "model.diffusion_model."),
        ("lora_unet_", "lycoris_", "oft_unet_"),
    ),
    "transformer": _Prefixes(
        ("transformer.", "diffusion_model.", "model.diffusion_model."),
        ("lora_transformer_", "lora_unet_", "lycoris_"),
    ),
    "text_encoder": _Prefixes(
        ("text_encoder.", "clip_l.", "text_encoders.clip_l.transformer."),
        ("lora_te1_", "lora_te_", "lycoris_te1_"),
    ),
    "text_encoder_2": _Prefixes(
        ("text_encoder_2.", "clip_g.", "text_encoders.clip_g.transformer."),
        ("lora_te2_", "lycoris_te2_"),
    ),
    "text_encoder_3": _Prefixes(
        ("text_encoder_3.", "t5.", "text_encoders.t5xxl.transformer."), ("lora_te3_",)
    ),
}
"""The prefixes of each component that pipelines have."""

_MAIN_PREFIXES = ("", "base_model.model.", "transformer.")
"""For the first component, which bare names mean: PEFT's own saving, diffusers' for models that draw."""

MODULATIONS = ("modulation", "scale_shift_table")
"""What models call the table that `diff_m` changes."""


@dataclass(frozen=True, eq=False)
class Target:
    """One module of the pipeline that an adapter can change. One object per module of a `KeyMap`."""

    component: str
    path: str
    parameters: Mapping[str, Shape]
    """Its own parameters' shapes; a weight's is [out, in(, kh, kw)], however the module stores it."""
    block: str
    """Which block of a UNet it is in: IN00 to IN08, MID, OUT00 to OUT08, else BASE."""

    def parameter(self, wanted: str) -> str | None:
        """The module's own name for what an algorithm changes; None if it has no such parameter."""
        names = MODULATIONS if wanted == "modulation" else (wanted,)
        return next((name for name in names if name in self.parameters), None)

    def __str__(self) -> str:
        return f"{self.component}.{self.path}"


class Match(NamedTuple):
    """What a key means."""

    target: Target
    slot: str
    """One of the values of `SLOTS`, or `?` and the key's own ending if that is not known."""
    stem: str
    """The module's name in the file."""


class KeyMap:
    """Every name that a trainer may give to a module of this pipeline. Built once, never changed."""

    def __init__(self, modules: Mapping[str, Mapping[str, Mapping[str, Shape]]]) -> None:
        """`modules`: component -> module path -> parameter -> shape, the component that draws first.

        Raises: ValueError if two modules share a name; then no key with it could be trusted.
        """
        self._targets: dict[str, Target] = {}
        self.components = tuple(modules)
        for component, found in modules.items():
            main = component == self.components[0]
            for path, parameters in found.items():
                sgm = sgm_path(path, found) if component == "unet" else None
                target = Target(component, path, parameters, _block(sgm))
                for name in _names(component, _paths(component, path, sgm, found), main=main):
                    if self._targets.setdefault(name, target) is not target:
                        other = self._targets[name]
                        raise ValueError(f"{name!r} would mean both {other} and {target}")

    @cached_property
    def targets(self) -> frozenset[Target]:
        """Every module that has a name."""
        return frozenset(self._targets.values())

    def find(self, name: str) -> Target | None:
        """The module that a trainer calls so."""
        return self._targets.get(name)

    def match(self, key: str) -> Match | None:
        """What a tensor's key means in this pipeline: its longest beginning that is a module's name,
        and the slot; None if no beginning is.
        """
        if len(key) > MAX_KEY:
            return None
        stem, dot, suffix = key.rpartition(".")
        while dot:
            if target := self._targets.get(stem):
                return Match(target, slot_of(suffix), stem)
            stem, dot, more = stem.rpartition(".")
            suffix = f"{more}.{suffix}"
        return None

    def missing_component(self, key: str) -> str | None:
        """The component that a key is for, if this pipeline has none of that name."""
        meant = [
            component
            for component, prefixes in COMPONENTS.items()
            if key.startswith((*prefixes.dotted, *prefixes.underscored))
        ]
        return None if set(meant) & set(self.components) else next(iter(meant), None)


def _block(sgm: str | None) -> str:
    found = re.match(r"(input|middle|output)_blocks?\.(\d+)", sgm or "")
    if not found:
        return "BASE"
    side, number = found.groups()
    return "MID" if side == "middle" else f"{'IN' if side == 'input' else 'OUT'}{int(number):02}"


def _names(component: str, paths: Iterable[str], *, main: bool) -> Iterator[str]:
    """Every stem that means a module which trainers know under these paths."""
    prefixes = COMPONENTS.get(component, _Prefixes((f"{component}.",), ()))
    dotted = {*prefixes.dotted, *(_MAIN_PREFIXES if main else ())}
    for path in paths:
        for prefix in dotted:
            yield prefix + path
        if path:
            for prefix in prefixes.underscored:
                yield prefix + path.replace(".", "_")


_OLD_ATTENTION = re.compile(r"(.*attn\d?)\.to_(q|k|v|out)(\.0)?")
_OLD_CLIP = re.compile(r"(.*self_attn)\.(q|k|v|out)_proj")


def _paths(
    component: str, path: str, sgm: str | None, siblings: Mapping[str, object]
) -> Iterator[str]:
    """Every dotted path that trainers use for a module."""
    if component.startswith("text_encoder"):
        # transformers 5 dropped `text_model.` from CLIPTextModel, and trainers still write it.
        bare = path.removeprefix("text_model.")
        both = {bare, f"text_model.{bare}"} if bare != "text_projection" else {bare}
        yield from sorted(both)
        if old := _OLD_CLIP.fullmatch(bare):
            yield f"text_model.{old[1]}.to_{old[2]}_lora"
        return
    yield path
    if sgm and sgm != path:
        yield sgm
    if old := _OLD_ATTENTION.fullmatch(path):
        yield f"{old[1]}.processor.to_{old[2]}_lora"
        yield f"{old[1]}.to_{old[2]}_lora"
    if "condition_embedder.time_proj" in siblings:
        wan = wan_path(path)
        if wan != path:
            yield wan
