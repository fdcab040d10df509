"""Trainers' names for the tensors of an adapter -> component, module and slot. Strings only.

A tensor's key is a stem (which module), a dot and a suffix (which tensor of the algorithm). Suffixes come
from the table `SLOTS`. Stems are looked up in a dictionary of all names that any trainer gives to the
modules of the loaded pipeline, made from the modules' own paths. So underscores are never parsed, and a
key either means exactly one module or is reported as unknown.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

from lora.formats.names.sgm import block_of, sgm_path
from lora.formats.names.wan import wan_path

Shape = tuple[int, ...]

SAME = (
    *("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b", "hada_t1", "hada_t2"),
    *("lokr_w1", "lokr_w1_a", "lokr_w1_b", "lokr_w2", "lokr_w2_a", "lokr_w2_b", "lokr_t2"),
)
"""The slots whose suffix is their own name, in LyCORIS and in PEFT: LoHa's and LoKr's."""

LYCORIS: Mapping[str, str] = {
    **{slot: f"{slot}.weight" for slot in ("lora_up", "lora_down", "lora_mid")},
    **{slot: slot for slot in ("alpha", "bias_indices", "bias_values", "bias_size", *SAME)},
    **{slot: slot for slot in ("dora_scale", "oft_blocks", "rescale", "on_input")},
    **{slot: f"{slot}.weight" for slot in ("a1", "a2", "b1", "b2", "bm")},
    **{slot: slot for slot in ("diff", "diff_b", "diff_m")},
    "weight": "set_weight",
}
"""Slot -> what kohya, LyCORIS and ComfyUI put behind the module's name."""

LYCORIS_NORMS: Mapping[str, str] = {"diff": "w_norm", "diff_b": "b_norm"}
"""The same, for the modules that LyCORIS has for norms."""

ONE_NUMBER = ("alpha", "on_input", "neumann_terms")
"""The slots that hold one number. PEFT keeps them in its config."""

PEFT: Mapping[str, str] = {
    "lora_up": "lora_B.weight",
    "lora_down": "lora_A.weight",
    "lora_up_bias": "lora_B.bias",
    "magnitude": "lora_magnitude_vector",
    "oft_r": "oft_R.weight",
    "ia3_l": "ia3_l",
    **{slot: slot for slot in SAME},
}
"""Slot -> what PEFT and diffusers put behind the module's name."""

SLOTS: Mapping[str, str] = {
    **{suffix: slot for row in (LYCORIS, LYCORIS_NORMS, PEFT) for slot, suffix in row.items()},
    # older forms of diffusers and PEFT
    "lora.up.weight": "lora_up",
    "lora.down.weight": "lora_down",
    "lora_linear_layer.up.weight": "lora_up",
    "lora_linear_layer.down.weight": "lora_down",
    "up.weight": "lora_up",  # behind `processor.to_q_lora`
    "down.weight": "lora_down",
    "lora_magnitude_vector.weight": "magnitude",
    "oft_R": "oft_r",
    # parameters given whole; LyCORIS' IA3 factors are called `weight`, too
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
"""Suffix of a key -> slot: the field of an algorithm that takes the tensor."""

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
"""PEFT may leave the adapter's name behind its own (`lora_A.default.weight`)."""


def slot_of(suffix: str) -> str:
    """The slot of a suffix; for an unknown one, `?` and the suffix, which is the name of no field."""
    return SLOTS.get(suffix) or SLOTS.get(_ADAPTER_NAME.sub(r"\1", suffix), f"?{suffix}")


MAX_KEY = 1000
"""Trainers write no longer names. These are not looked up, since each of their dots costs a look-up."""

PEFT_PREFIX = "base_model.model."
"""What PEFT itself writes before a module's path."""


@dataclass(frozen=True)
class Prefixes:
    """What stands before the path of a component's modules. After a `_`, the path has `_` for its dots."""

    kohya: str
    original: str
    """ComfyUI's and LightX2V's: see `naming.Naming`."""
    others: tuple[str, ...] = ()

    @cached_property
    def all(self) -> tuple[str, ...]:
        """All that are read."""
        return (self.kohya, self.original, *self.others)


_DRAWING = ("lora_unet_", "diffusion_model.")
COMPONENTS: Mapping[str, Prefixes] = {
    "unet": Prefixes(*_DRAWING, ("unet.", "model.diffusion_model.", "lycoris_", "oft_unet_")),
    "transformer": Prefixes(
        *_DRAWING, ("transformer.", "model.diffusion_model.", "lora_transformer_", "lycoris_")
    ),
    "text_encoder": Prefixes(
        "lora_te1_",
        "text_encoders.clip_l.transformer.",
        ("text_encoder.", "clip_l.", "lora_te_", "lycoris_te1_"),
    ),
    "text_encoder_2": Prefixes(
        "lora_te2_",
        "text_encoders.clip_g.transformer.",
        ("text_encoder_2.", "clip_g.", "lycoris_te2_"),
    ),
    "text_encoder_3": Prefixes(
        "lora_te3_", "text_encoders.t5xxl.transformer.", ("text_encoder_3.", "t5.")
    ),
}
"""The prefixes of each component that pipelines have."""


def prefixes_of(component: str) -> Prefixes:
    """A component's prefixes; for an unknown one, its name and a dot."""
    return COMPONENTS.get(component) or Prefixes(f"{component}.", f"{component}.")


_MAIN_PREFIXES = ("", PEFT_PREFIX, "transformer.")
"""Further prefixes of the first component: none, PEFT's, and diffusers' for models that draw."""

MODULATIONS = ("modulation", "scale_shift_table")
"""The names that models have for the table that `diff_m` changes."""


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
    """One of the values of `SLOTS`, or `?` and the key's suffix if that is not known."""
    stem: str
    """The module's name in the file."""


class KeyMap:
    """All names that trainers may give to the modules of one pipeline. Built once, never changed."""

    def __init__(self, modules: Mapping[str, Mapping[str, Mapping[str, Shape]]]) -> None:
        """`modules`: component -> module path -> parameter -> shape; the first component draws.

        Raises: ValueError if two modules share a name, since a key with that name would be ambiguous.
        """
        self._targets: dict[str, Target] = {}
        self.components = tuple(modules)
        for component, paths in modules.items():
            main = component == self.components[0]
            for path, parameters in paths.items():
                sgm = sgm_path(path, paths) if component == "unet" else None
                target = Target(component, path, parameters, block_of(sgm or ""))
                for name in _names(component, _paths(component, path, sgm, paths), main=main):
                    if self._targets.setdefault(name, target) is not target:
                        other = self._targets[name]
                        raise ValueError(f"{name!r} would mean both {other} and {target}")

    @cached_property
    def targets(self) -> frozenset[Target]:
        """Every module that has a name."""
        return frozenset(self._targets.values())

    def find(self, name: str) -> Target | None:
        """The module that trainers call by this name."""
        return self._targets.get(name)

    def match(self, key: str) -> Match | None:
        """The module and the slot of a key. The stem is its longest beginning that is a module's name;
        None if it has none.
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
        """The component that a key is for, if this pipeline does not have it."""
        meant = [name for name, prefixes in COMPONENTS.items() if key.startswith(prefixes.all)]
        return None if set(meant) & set(self.components) else next(iter(meant), None)


def _names(component: str, paths: Iterable[str], *, main: bool) -> Iterator[str]:
    """Every stem that means the module with these paths."""
    prefixes = {*prefixes_of(component).all, *(_MAIN_PREFIXES if main else ())}
    for path in paths:
        for prefix in prefixes:
            if not prefix.endswith("_"):
                yield prefix + path
            elif path:
                yield prefix + path.replace(".", "_")


_OLD_ATTENTION = re.compile(r"(.*attn\d?)\.to_(q|k|v|out)(\.0)?")
_OLD_CLIP = re.compile(r"(.*self_attn)\.(q|k|v|out)_proj")


def _paths(
    component: str, path: str, sgm: str | None, siblings: Mapping[str, object]
) -> Iterator[str]:
    """All dotted paths that trainers use for a module."""
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
