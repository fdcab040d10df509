"""The suffixes of adapter files' keys -> slots: which tensor of which algorithm. Strings only."""

from __future__ import annotations

import re
from collections.abc import Mapping
from functools import lru_cache

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

ONE_NUMBER = (
    *("alpha", "constraint", "on_input", "neumann_terms", "turned_back", "scaled_oft"),
    *("gram_schmidt", "ada_scaling", "randlora_alpha", "clipped_oft", "cans_oft"),
)
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

BARE = frozenset({"weight", "bias"})
"""The suffixes that a model's own parameters have: an adapter's only if the file shows that it is one."""

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
    # ai-toolkit's
    "magnitude": "magnitude",
    "lora_up.bias": "lora_up_bias",
    # PEFT's other methods, which are read and not written
    "boft_R": "boft_r",
    "boft_s": "boft_s",
    "hra_u": "hra_u",
    "miss_block": "miss_block",
    "lora_A": "ada_a",  # AdaLoRA's, which are no modules and have no `weight`
    "lora_B": "ada_b",
    "lora_E": "ada_e",
    "randlora_lambda": "randlora_lambda",
    "randlora_gamma": "randlora_gamma",
    "randlora_A": "randlora_a",
    "randlora_B": "randlora_b",
    # OneTrainer's
    **{f"oft_R.{slot}": slot for slot in ("scaled_oft", "clipped_oft", "cans_oft")},
    **{slot: slot for slot in ("dora_log_multiplier", "dora_multiplier", "initial_norm")},
    # parameters given whole; LyCORIS' IA3 factors are called `weight`, too
    **{suffix: suffix for suffix in BARE},
    "base_layer.bias": "bias",  # PEFT's `bias="all"` and "lora_only"
    "modules_to_save.weight": "weight",
    "modules_to_save.bias": "bias",
    "ln_tuning_layers.weight": "weight",  # PEFT's LN_TUNING
    "ln_tuning_layers.bias": "bias",
    # known, and refused with their reason: see `REFUSED`
    "q_layer.weight": "q_layer",
    "p_layer.weight": "p_layer",
    "lambda_layer": "lambda_layer",
    "reshape_weight": "reshape_weight",
    "oft_diag": "oft_diag",
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
    "oft_diag": "an early OFT of LyCORIS (2023), which its later versions do not read",
}
"""Slots of forms that cannot be applied, and why."""

_STEP_SCALES = ("weight_scale", "scale_weight")
"""What quantisers put in place of a tensor's `weight` for the number that its whole numbers are steps of."""

STEPS: Mapping[str, str] = {
    f"{suffix.removesuffix('weight')}{word}": f"{slot}.step"
    for suffix, slot in SLOTS.items()
    if suffix.endswith(".weight") and slot not in BARE
    for word in _STEP_SCALES
}
"""Suffix -> the slot that it multiplies, and `.step`."""

_NAMED = re.compile(
    r"(lora_[AB]|lora_magnitude_vector|oft_R|modules_to_save|ln_tuning_layers)\.([\w-]+)\.(weight|bias)"
    r"|(lora_magnitude_vector|ia3_l|hada_\w+|lokr_\w+|boft_[Rs]|hra_u|miss_block|lora_[ABE]"
    r"|randlora_\w+)"
    r"\.(default(?:_\d+)?)"
)
"""PEFT may leave an adapter's name in its own (`lora_A.NAME.weight`). Where no `weight` follows, only the
names that PEFT and diffusers give are known: another word may mean anything (`lokr_w1.scale`)."""


@lru_cache(maxsize=1024)  # a file has thousands of keys and few suffixes
def named_slot(suffix: str) -> tuple[str, str]:
    """The slot of a suffix, and the adapter's name in it, empty if there is none.

    The slot of an unknown suffix is `?` and the suffix, which is the name of no field.
    """
    known = SLOTS.get(suffix) or STEPS.get(suffix)
    if known:
        return known, ""
    if named := _NAMED.fullmatch(suffix):
        what, name, end, whole, default = named.groups()
        slot = SLOTS.get(f"{what}.{end}" if what else whole)
        if slot:
            return slot, name or default
    return f"?{suffix}", ""


def slot_of(suffix: str) -> str:
    """The slot of a suffix: see `named_slot`."""
    return named_slot(suffix)[0]


MAX_KEY = 1000
"""Characters. Trainers write no longer names, and each dot of a key costs a look-up."""

LONGEST_SUFFIX = 3
"""The longest suffix of a key has so many parts (`lora_linear_layer.up.weight`)."""


def split_key(key: str) -> tuple[str, str] | None:
    """(module's name in the file, slot), by the longest known suffix; None if the key has none."""
    parts = key.rsplit(".", LONGEST_SUFFIX) if len(key) <= MAX_KEY else []
    for count in range(1, len(parts)):  # the longest suffix first
        slot = slot_of(".".join(parts[count:]))
        if not slot.startswith("?"):
            return ".".join(parts[:count]), slot
    return None


def is_bare(key: str) -> bool:
    """Whether a key of the slots in `BARE` says no more than a model's own parameter would."""
    *_, word, end = key.rsplit(".", 3)
    return end in BARE and word not in ("modules_to_save", "base_layer", "ln_tuning_layers")
