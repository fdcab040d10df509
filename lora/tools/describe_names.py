"""What a module's name tells a person: which tool wrote it, which block it is in, what kind of layer it is.

Names are matched by pattern here, since this is only told; what is applied goes by `names.keys`. No torch.
"""

from __future__ import annotations

import re

SEPARATOR = r"[._]"

LAYOUTS: tuple[tuple[str, str], ...] = (
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
    """The tool, or the convention, that names tensors so."""
    return next((name for name, pattern in LAYOUTS if re.match(pattern, key)), BARE)


KINDS: tuple[tuple[str, str], ...] = (
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
    """What kind of layer a module is."""
    return next((kind for kind, pattern in KINDS if re.search(pattern, path)), "other")


_SIDED = re.compile(rf"(input|output)_blocks{SEPARATOR}(\d+)")
_DIFFUSERS = re.compile(
    rf"(down|up)_blocks{SEPARATOR}(\d+){SEPARATOR}(resnets|attentions|downsamplers|upsamplers)"
    rf"{SEPARATOR}(\d+)"
)
_MIDDLE = re.compile(r"mid(dle)?_block")
_NUMBERED = re.compile(
    rf"(?:^|{SEPARATOR})((?:single_|double_|joint_)?(?:transformer_)?(?:blocks|layers)){SEPARATOR}(\d+)"
)

RESNETS = 2
"""Per down block, in the UNets of SD 1.5, SD 2 and SDXL."""


def block_of(component: str, path: str) -> str:
    """The row of a component's chart that a module belongs to.

    A UNet's: IN00 to IN11, MID, OUT00 to OUT11 and BASE, as `names.blocks` has them. A transformer's:
    `blocks 07`. A text encoder is one row.
    """
    if component.startswith("text_encoder"):
        return "all"
    if component == "unet":
        return _unet_block(path)
    found = _NUMBERED.search(path)
    return f"{found[1]} {int(found[2]):02}" if found else "BASE"


def _unet_block(path: str) -> str:
    if path == "conv_in":
        return "IN00"
    if found := _SIDED.search(path):
        return f"{'IN' if found[1] == 'input' else 'OUT'}{int(found[2]):02}"
    if _MIDDLE.search(path):
        return "MID"
    found = _DIFFUSERS.search(path)
    if not found:
        return "BASE"
    side, number, kind, index = found[1], int(found[2]), found[3], int(found[4])
    start = number * (RESNETS + 1)
    if side == "down":
        return f"IN{start + (RESNETS + 1 if kind == 'downsamplers' else 1 + index):02}"
    return f"OUT{start + (RESNETS if kind == 'upsamplers' else index):02}"
