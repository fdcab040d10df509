"""Files that are no adapter for any family of models, by how their keys begin. No torch."""

from __future__ import annotations

import re
from collections.abc import Iterable

OTHERS: tuple[tuple[str, re.Pattern[str]], ...] = tuple(
    (name, re.compile(pattern))
    for name, pattern in (
        ("a Control-LoRA", r"lora_controlnet$"),
        ("a ControlNet-LLLite", r"lllite_"),
        ("a ControlNet", r"(?:control_model\.)?(?:input_hint_block|zero_convs)\.|controlnet_"),
        ("an IP-Adapter FaceID", r"(?:ip_adapter\.)?\d+\.to_(?:q|k|v|out)_lora\."),
        ("an IP-Adapter", r"image_proj\.|ip_adapter\.|\d+\.to_[kv]_ip\."),
        ("a hypernetwork", r"(?:320|640|768|1024|1280|2048)\.[01]\."),
        ("an adapter for Stable Video Diffusion", r".*[._]temporal_transformer_blocks[._]"),
        ("an AnimateDiff motion LoRA", r".*[._]motion_modules[._].*lora"),
        ("an AnimateDiff motion module", r".*[._](?:motion_modules|temporal_transformer)[._]"),
        ("a T2I-Adapter", r"(?:adapter\.)?body\.\d+\.(?:resnets|in_conv|block1)"),
        (
            "a VAE",
            r"(?:first_stage_model\.)?(?:en|de)coder\.(?:down|up|mid)(?:_blocks)?\.|quant_conv\.",
        ),
        ("an upscaler", r"(?:module\.)?(?:params_ema\.)?(?:body|model)\.\d+\.(?:rdb|RDB|sub)"),
        ("an adapter for Stable Cascade", r"(?:lora_unet_)?down_blocks[._]\d+[._]\d+[._]attention"),
        ("an adapter for HiDream", r".*(?:double|single)_stream_blocks[._]"),
        ("an adapter for AuraFlow", r".*joint_transformer_blocks[._]"),
        ("an adapter for Cosmos", r".*blocks[._]\d+[._](?:self|cross)_attn[._][qkv]_proj"),
    )
)
"""What a file is that is for none of the families -> how a key of it begins."""


def other_kind(keys: Iterable[str]) -> str | None:
    """What a file is that is no adapter for any family; None if no key shows it."""
    every = tuple(keys)
    return next((name for name, form in OTHERS if any(map(form.match, every))), None)
