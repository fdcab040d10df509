"""Words of wrappers are taken off a name wherever they stand."""

from __future__ import annotations

import pytest

from lora.engine.engine import LoraEngine
from lora.formats.names.prefixes import unwrapped
from lora.formats.names.slots import named_slot
from tests.adapters import SELF_ATTENTION

DOTTED = SELF_ATTENTION
FLAT = SELF_ATTENTION.replace(".", "_")
INSIDE = SELF_ATTENTION.replace("transformer_blocks.0.", "transformer_blocks.0.{}.")


@pytest.mark.parametrize(
    "stem",
    [
        f"unet._orig_mod.{DOTTED}",
        f"_orig_mod.unet.{DOTTED}",
        f"_orig_mod.module.base_model.model.{DOTTED}",
        f"module.module.{DOTTED}",
        f"unet.base_model.model.{DOTTED}",
        f"base_model.model.unet.{DOTTED}",
        f"base_model.model.base_model.model.{DOTTED}",
        f"base_model.model.model.{DOTTED}",
        f"_fsdp_wrapped_module._orig_mod.{DOTTED}",
        f"unet.{INSIDE.format('_checkpoint_wrapped_module')}",
        f"unet.{INSIDE.format('_fsdp_wrapped_module')}",
        f"unet.{INSIDE.format('_orig_mod')}",
        f"model.unet.{DOTTED}",
        f"pipe.unet.module.{DOTTED}",
        f"model.{DOTTED}",
        f"model.diffusion_model._orig_mod.{DOTTED}",
        f"lora_unet__orig_mod_{FLAT}",
        f"lora_unet_module_{FLAT}",
        f"_orig_mod.lora_unet_{FLAT}",
        f"module._orig_mod.lora_unet_{FLAT}",
        f"lora_unet_{FLAT.removesuffix('_to_q')}.to_q",
        f"unet_{FLAT}",
        FLAT,
        f"_module.unet.{DOTTED}",
        f"lora_unet__module_{FLAT}",
        f"unet.{DOTTED}._orig_mod",
        f"unet.{DOTTED}.module",
        f"unet.{DOTTED}._fsdp_wrapped_module._checkpoint_wrapped_module",
        f"module.base_model.model.{DOTTED}._orig_mod",
    ],
)
@pytest.mark.parametrize("suffix", ["lora_down.weight", "alpha"])
def test_a_wrapped_name_means_its_module(engine: LoraEngine, stem: str, suffix: str) -> None:
    match = engine.key_map.match(f"{stem}.{suffix}")
    assert match is not None
    assert (match.target.path, match.slot) == (SELF_ATTENTION, suffix.partition(".")[0])


def test_a_wrapper_within_a_suffix_is_taken_off_too(engine: LoraEngine) -> None:
    match = engine.key_map.match(f"unet.{DOTTED}.lora_A.default._fsdp_wrapped_module.weight")
    assert match is not None
    assert (match.slot, match.adapter) == ("lora_down", "default")


@pytest.mark.parametrize("name", ["unet.module_list.0", "motion_modules.0.a", "unet.remodule.a"])
def test_words_that_only_look_like_a_wrappers_stay(name: str) -> None:
    assert unwrapped(name) == name


@pytest.mark.parametrize(
    ("suffix", "slot", "adapter"),
    [
        ("lora_A.weight", "lora_down", ""),
        ("lora_A.default.weight", "lora_down", "default"),
        ("lora_B.my-style.weight", "lora_up", "my-style"),
        ("modules_to_save.default.bias", "bias", "default"),
        ("lokr_w1.default_0", "lokr_w1", "default_0"),
        ("oft_R.default.weight", "oft_r", "default"),
        ("oft_R.scaled_oft", "scaled_oft", ""),
        ("lora_up.weight_scale", "lora_up.step", ""),
        ("lora_A.scale_weight", "lora_down.step", ""),
        *((f"{known}.{word}", f"?{known}.{word}", "") for known in ("lokr_w1", "hada_w1_a", "ia3_l")
          for word in ("scale", "zero_point", "absmax", "weight_scale")),
        ("oft_R.clipped_oft", "clipped_oft", ""),
        ("oft_R.of_tomorrow", "?oft_R.of_tomorrow", ""),
        ("lora_A.scale", "?lora_A.scale", ""),
        ("lora_A.one.two.weight", "?lora_A.one.two.weight", ""),
    ],
)  # fmt: skip
def test_only_the_words_that_are_known_are_taken_for_an_adapters_name(
    suffix: str, slot: str, adapter: str
) -> None:
    assert named_slot(suffix) == (slot, adapter)
