"""What stands around a module's path in trainers' names: a component's prefix, and the words of wrappers."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property

from lora.formats.names.slots import LONGEST_SUFFIX

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
        (
            *("text_encoder.", "text_encoder_1.", "clip_l.", "clip_l.transformer.", "lora_te_"),
            *("conditioner.embedders.0.transformer.", "lycoris_te1_"),
        ),
    ),
    "text_encoder_2": Prefixes(
        "lora_te2_",
        "text_encoders.clip_g.transformer.",
        (
            *("text_encoder_2.", "clip_g.", "clip_g.transformer.", "lycoris_te2_"),
            "conditioner.embedders.1.transformer.",
        ),
    ),
    "text_encoder_3": Prefixes(
        "lora_te3_", "text_encoders.t5xxl.transformer.", ("text_encoder_3.", "t5.")
    ),
}
"""The prefixes of each component that pipelines have."""

DRAWING = tuple({prefix for name in ("unet", "transformer") for prefix in COMPONENTS[name].all})
"""The prefixes of the components that draw."""


def prefixes_of(component: str) -> Prefixes:
    """A component's prefixes; for an unknown one, its name and a dot."""
    return COMPONENTS.get(component) or Prefixes(f"{component}.", f"{component}.")


_WORDS = (
    "(?:_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module|_fpw_module|_forward_module|_?module"
    "|base_model[._]model)"
)
_WRAPPERS = re.compile(rf"(?:^|(?<=\.)){_WORDS}\.|(?<=_){_WORDS}_")
"""The words that torch.compile, DDP, FSDP, activation checkpointing, DeepSpeed, Opacus and PEFT put into
names."""

_OUTER = ("model.", "pipe.", "pipeline.", "network.")
"""What trainers call the whole that a component belongs to."""

_FLAT = ("lora_", "lycoris_", "oft_")
"""How names begin that have `_` for the dots of a path."""


def unwrapped(key: str) -> str:
    """The key without the words of wrappers, wherever they stand."""
    return _WRAPPERS.sub("", key)


def other_forms(key: str) -> Iterator[str]:
    """Forms that a key of an unknown module could have had without its trainer's wrappers, or with the prefix
    that its trainer left out. Most of them mean nothing: look each of them up.
    """
    bare = unwrapped(key)
    if bare != key:
        yield bare
    while outer := next((word for word in _OUTER if bare.startswith(word)), None):
        bare = bare.removeprefix(outer)
        yield bare
    if bare.startswith(_FLAT):
        # Half flattened: diffusers' own converter leaves a dot where a suffix has one less.
        parts = bare.split(".")
        for count in range(1, min(LONGEST_SUFFIX, len(parts) - 2) + 1):
            yield "_".join(parts[:-count]) + "." + ".".join(parts[-count:])
    elif "." in bare and "_" in bare.partition(".")[0]:
        yield from (f"lora_{bare}", f"lora_unet_{bare}")
