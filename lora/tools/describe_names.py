"""Describes a module by its name: which tool wrote it, its block, and its kind of layer. No torch.

Names are matched by patterns here, since this is only shown to people; adapters are applied by `names.keys`.
"""

from __future__ import annotations

import re

from lora.formats.names import sgm
from lora.formats.names.sgm import WHOLE, layers

SEPARATOR = r"[._]"

KEY_LAYOUTS: tuple[tuple[str, str], ...] = (
    (
        "kohya, SGM names",
        r"lora_unet_(input_blocks|middle_block|output_blocks|time_embed|label_emb)",
    ),
    (
        "kohya, diffusers' block names",
        r"lora_unet_(down_blocks|mid_block|up_blocks|time_embedding)",
    ),
    ("kohya, text encoders", r"lora_te\d?_"),
    ("kohya", r"lora_(unet|transformer)_"),
    ("LyCORIS wrapper", r"lycoris_"),
    ("sd-scripts OFT", r"oft_unet_"),
    ("PEFT", r"base_model\.model\."),
    ("diffusers, old attention processors", r".*processor\.to_(q|k|v|out)_lora\."),
    ("OMI", r"(unet\.(input_blocks|middle_block|output_blocks)|clip_[lg])\..*lora_(up|down)"),
    ("ComfyUI, LightX2V (the model's own names)", r"(model\.)?diffusion_model\.|text_encoders\."),
    ("diffusers", r"(unet|text_encoder(_\d)?|transformer)\."),
    ("textual inversion", r"(bundle_emb\.|clip_[lg]$|emb_params$|string_to_param)"),
)
"""Layout -> how its keys begin; the first that fits counts."""

BARE = "module names without a prefix"


def layout_of(key: str) -> str:
    """The tool or the convention that a key's form belongs to."""
    return next((name for name, pattern in KEY_LAYOUTS if re.match(pattern, key)), BARE)


LAYER_KINDS: tuple[tuple[str, str], ...] = (
    ("norm", r"norm\w*$"),
    ("cross attention", r"attn2|cross_attn"),
    ("self attention", r"attn1|self_attn|attn|attention\.self"),
    (
        "feed-forward",
        rf"(^|{SEPARATOR})(ff|ffn|mlp|fc1|fc2|feed_forward){SEPARATOR}?|img_mlp|txt_mlp",
    ),
    ("projection", r"proj_in|proj_out|text_projection"),
    (
        "sampler",
        rf"downsamplers|upsamplers|{SEPARATOR}op$|output_blocks{SEPARATOR}\d+{SEPARATOR}\d"
        rf"{SEPARATOR}conv$",
    ),
    ("resnet", r"resnets|in_layers|out_layers|emb_layers|skip_connection|conv_shortcut"),
    ("embedding", r"embed|label_emb"),
    ("modulation", r"modulation|scale_shift_table|_mod"),
)


def kind_of(path: str) -> str:
    """A module's kind of layer."""
    return next((kind for kind, pattern in LAYER_KINDS if re.search(pattern, path)), "other")


_NUMBERED = re.compile(
    rf"(?:^|{SEPARATOR})((?:single_|double_|joint_)?(?:transformer_)?(?:blocks|layers)){SEPARATOR}(\d+)"
)
_UNET_LAYER = re.compile(r"(?:(?:down|up)_blocks_\d+|mid_block)_[a-z]+_\d+")

RESNETS = 2
"""Per down block, in the UNets of SD 1.5, SD 2 and SDXL."""

_SGM = {path.replace(".", "_"): name for path, name in (*WHOLE.items(), *layers(RESNETS).items())}


def block_of(component: str, path: str) -> str:
    """The row of a component's chart that a module belongs to.

    For a UNet: IN00 to IN11, MID, OUT00 to OUT11 and BASE, as in `names.blocks`. For a transformer:
    `blocks 07`. A text encoder is one row.
    """
    if component.startswith("text_encoder"):
        return "all"
    if component == "unet":
        path = path.replace(".", "_")
        layer = _UNET_LAYER.search(path)
        return sgm.block_of(_SGM.get(layer[0] if layer else path, path))
    match = _NUMBERED.search(path)
    return f"{match[1]} {int(match[2]):02}" if match else "BASE"
