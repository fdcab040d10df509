"""The names of an adapter's tensors in the conventions of other tools, for writing.

| naming | a key | alpha |
| --- | --- | --- |
| kohya | `lora_unet_input_blocks_4_1_proj_in.lora_down.weight` | a tensor |
| diffusers | `unet.down_blocks.1.attentions.0.proj_in.lora_A.weight` | in the file's metadata |
| peft | `base_model.model.down_blocks.1.attentions.0.proj_in.lora_A.weight` | in `adapter_config.json` |
| original | `diffusion_model.input_blocks.4.1.proj_in.lora_down.weight` | a tensor |

`original` is LightX2V's and ComfyUI's: the names of the model's own code. `KeyMap.match` reads every key that
is made here back as the same module and slot.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Set
from enum import StrEnum

from lora.formats.names.keys import KeyMap, Target
from lora.formats.names.prefixes import PEFT_PREFIX, prefixes_of
from lora.formats.names.sgm import sgm_path
from lora.formats.names.slots import LYCORIS, LYCORIS_NORMS, PEFT, SAME
from lora.formats.names.wan import wan_path


class Naming(StrEnum):
    """The namings that can be written."""

    KOHYA = "kohya"
    DIFFUSERS = "diffusers"
    PEFT = "peft"
    ORIGINAL = "original"

    @property
    def has_config(self) -> bool:
        """Whether alphas are in a PEFT config, not in tensors."""
        return self in (Naming.DIFFUSERS, Naming.PEFT)


_IN_CONFIG: Mapping[Naming, Set[str]] = {
    Naming.KOHYA: frozenset(),
    Naming.ORIGINAL: frozenset(),
    Naming.DIFFUSERS: frozenset({"alpha"}),
    Naming.PEFT: frozenset({"alpha", "neumann_terms", "on_input"}),
}
"""The slots that a naming stores in its config; they have no key."""

PEFT_TYPES: Mapping[str, Set[str]] = {
    "LORA": frozenset({"lora_up", "lora_down", "lora_up_bias", "magnitude"}),
    "LOHA": frozenset(slot for slot in SAME if slot.startswith("hada")),
    "LOKR": frozenset(slot for slot in SAME if slot.startswith("lokr")),
    "OFT": frozenset({"oft_r", "neumann_terms"}),
    "IA3": frozenset({"ia3_l", "on_input"}),
}
"""PEFT's name of an algorithm -> its slots. An adapter of PEFT is of one type."""

_SUFFIXES: Mapping[Naming, Mapping[str, str]] = {
    Naming.KOHYA: {slot: suffix for slot, suffix in LYCORIS.items() if slot != "diff_m"},
    Naming.ORIGINAL: {**LYCORIS, "constraint": "alpha"},
    Naming.DIFFUSERS: {slot: PEFT[slot] for slot in PEFT_TYPES["LORA"]},
    # PEFT's Tucker core of a LoKr has another shape than LyCORIS'.
    Naming.PEFT: {slot: suffix for slot, suffix in PEFT.items() if slot != "lokr_t2"},
}

MAGNITUDE_OF: Mapping[Naming, str] = {
    naming: "magnitude" if naming.has_config else "dora_scale" for naming in Naming
}
"""The slot in which a naming keeps a DoRA's magnitudes of the outputs."""

_WORDS: Mapping[str, str] = {
    **dict.fromkeys(("lora_mid", "lokr_t2"), "a Tucker core"),
    "bias_values": "a sparse rest",
    "lora_up_bias": "a bias in lora_B",
    "dora_scale": "DoRA magnitudes of the inputs",
    "oft_blocks": "LyCORIS' OFT",
    "oft_r": "PEFT's OFT",
    **dict.fromkeys(("clipped_oft", "cans_oft"), "OneTrainer's clipped or CANS OFT"),
    **dict.fromkeys(("dora_log_multiplier", "dora_multiplier", "initial_norm"), "DoRA over OFT"),
    "boft_r": "PEFT's BOFT",
    "hra_u": "PEFT's HRA",
    "miss_block": "PEFT's MiSS",
    "ada_e": "AdaLoRA",
    "randlora_lambda": "PEFT's RandLora",
    "a1": "GLoRA",
    "on_input": "LyCORIS' IA3",
    "ia3_l": "PEFT's IA3",
    "hada_w1_a": "LoHa",
    "diff": "a weight's difference",
    "diff_b": "a bias' difference",
    "diff_m": "a modulation's difference",
    "weight": "a weight's new value",
    "bias": "a bias' new value",
    **dict.fromkeys(PEFT_TYPES["LOKR"] - {"lokr_t2"}, "LoKr"),
}
"""What a naming that lacks this slot cannot store; the first of these slots that it lacks is named."""


def trouble(naming: Naming, slots: Iterable[str]) -> str | None:
    """Why a naming cannot store a module with these slots; None if it can. The magnitudes of the outputs are
    `magnitude` or `dora_scale`: pass the naming's own slot for them (`MAGNITUDE_OF`).
    """
    there = set(slots)
    left = sorted(there - set(_SUFFIXES[naming]) - _IN_CONFIG[naming])
    if naming is Naming.PEFT and not left and len(peft_types(there)) > 1:
        return f"one module of a PEFT adapter cannot be {' and '.join(peft_types(there))}"
    if not left:
        return None
    word = next((_WORDS[slot] for slot in _WORDS if slot in left), left[0].removeprefix("?"))
    return f"{naming} has no name for {word}"


def peft_types(slots: Iterable[str]) -> tuple[str, ...]:
    """PEFT's names of the algorithms that slots belong to. `alpha` is ignored, since each may have it."""
    there = set(slots)
    if "ia3_l" not in there:
        there.discard("on_input")
    return tuple(name for name, own in PEFT_TYPES.items() if own & there)


class Namer:
    """The names of a model's modules in one naming."""

    def __init__(self, naming: Naming, key_map: KeyMap) -> None:
        self.naming = naming
        self._main = key_map.components[0] if key_map.components else ""
        self._paths: dict[str, set[str]] = {}
        for target in key_map.targets:
            self._paths.setdefault(target.component, set()).add(target.path)

    def trouble(self, target: Target) -> str | None:
        """Why a module has no name in this naming; None if it has."""
        if self.naming is Naming.PEFT and target.component != self._main:
            return f"a PEFT adapter is for one network, here {self._main}, not {target.component}"
        if not target.path and self.naming in (Naming.KOHYA, Naming.PEFT):
            return f"the root of {target.component} has no name in {self.naming}"
        return None

    def stem(self, target: Target) -> str:
        """A module's name: the beginning of its keys."""
        component = target.component
        if self.naming is Naming.PEFT:
            return f"{PEFT_PREFIX}{target.path}"
        if self.naming is Naming.DIFFUSERS:
            return f"{component}.{_full_path(target)}"
        if self.naming is Naming.ORIGINAL:
            return prefixes_of(component).original + self._original(target)
        prefix = prefixes_of(component).kohya
        if component == "text_encoder" and not self._sdxl:
            prefix = "lora_te_"  # kohya numbers them only where there are two
        # kohya trains SD 1.5 and SD 2 in diffusers' own modules, and everything else in the original's.
        plain = component == "unet" and not self._sdxl
        path = target.path if plain else self._original(target)
        return prefix + (path.replace(".", "_") if prefix.endswith("_") else path)

    def key(self, target: Target, slot: str, beside: Iterable[str] = ()) -> str | None:
        """A tensor's key; None if this naming stores the slot in its config. `beside`: the module's other
        slots. They matter only for IA3, whose `weight` is not a new value of the module's weight.

        Raises: KeyError for a slot that the naming cannot store; call `trouble` first.
        """
        if slot in _IN_CONFIG[self.naming]:
            return None
        is_norm = len(target.parameters.get("weight", ())) == 1
        if slot == "weight" and "on_input" in beside:
            ending = "weight"
        elif self.naming is Naming.KOHYA and slot in LYCORIS_NORMS and is_norm:
            ending = LYCORIS_NORMS[slot]
        else:
            ending = _SUFFIXES[self.naming][slot]
        return f"{self.stem(target)}.{ending}"

    @property
    def _sdxl(self) -> bool:
        """Whether the U-Net is SDXL's or its refiner's: only they read sizes in addition to the prompt."""
        paths = self._paths.get("unet", set())
        return "add_embedding.linear_1" in paths or "text_encoder_2" in self._paths

    def _original(self, target: Target) -> str:
        """The module's path in its model's own code."""
        siblings = self._paths.get(target.component, set())
        if target.component == "unet":
            return sgm_path(target.path, siblings) or target.path
        if target.component == "transformer" and "condition_embedder.time_proj" in siblings:
            return wan_path(target.path)
        return _full_path(target)


def suffix(naming: Naming, slot: str) -> str | None:
    """What follows a module's name in a key; None if the naming has no such key."""
    return _SUFFIXES[naming].get(slot)


def bare_path(target: Target) -> str:
    """A text encoder's path without `text_model.`, which transformers 5 dropped from some; others unchanged.

    PEFT's configs need this form: a name there fits every module that ends in it, with the prefix or without.
    """
    if target.component in ("text_encoder", "text_encoder_2"):
        return target.path.removeprefix("text_model.")
    return target.path


def _full_path(target: Target) -> str:
    """The path with `text_model.`, as all trainers write it."""
    path = bare_path(target)
    clip = target.component in ("text_encoder", "text_encoder_2")
    return f"text_model.{path}" if clip and path != "text_projection" else path
