"""Which family of models an adapter file is for: what its names, widths and metadata say. No torch.

Each piece of evidence leaves only the families that have it. Names and block numbers are facts of the file;
metadata is what somebody wrote into it. So names and widths are weighed first, and metadata decides where
they leave several families or none.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping, Set

from lora.formats.header import Header, TensorInfo
from lora.formats.names.family import (
    ALL,
    CHROMA,
    COGVIDEO,
    FLUX1,
    FLUX2,
    HUNYUAN,
    HUNYUAN_DIT,
    LANGUAGE,
    LTX,
    LUMINA,
    MOCHI,
    PIXART,
    QWEN,
    REFINER,
    SANA,
    SD1,
    SD2,
    SD3,
    UNETS,
    WAN,
    XL,
    ZIMAGE,
    Families,
    claimed,
)
from lora.formats.names.others import other_kind
from lora.formats.names.prefixes import DRAWING, unwrapped
from lora.formats.names.shapes import inputs_by
from lora.formats.names.slots import split_key

_OLD, _FOUR, _LARGE = (SD1, SD2), (SD1, SD2, REFINER), (XL, REFINER)
_JOINT = (SD3, FLUX1, FLUX2, CHROMA, QWEN, HUNYUAN)
_FLUXES = (FLUX1, FLUX2, CHROMA)
_BLOCK = r"(?:down|up|input|output)_blocks_\d+_(?:attentions_\d+|1)_transformer_blocks_"

_NAMES: tuple[tuple[str, tuple[str, ...]], ...] = (
    # U-Nets, in diffusers' names and the original ones: which blocks there are, how deep their attention is
    (r"(?:(?:down|up)_blocks|mid_block|(?:input|output)_blocks|middle_block)_\d", (*_OLD, *_LARGE)),
    (r"mid_block_|time_embed_[02]|time_embedding_linear", (*_OLD, *_LARGE)),
    (r"down_blocks_0_attentions|up_blocks_3_attentions|input_blocks_[12]_1_", _OLD),
    (r"output_blocks_(?:9|1[01])_1_", _OLD),
    (r"(?:down|up)_blocks_3_|(?:down_blocks_2_down|up_blocks_2_up)samplers", _FOUR),
    (r"up_blocks_2_attentions|output_blocks_[678]_1_(?!conv)|output_blocks_2_1_conv", _FOUR),
    (r"(?:input|output)_blocks_(?:9|1[01])_|output_blocks_8_2_", _FOUR),
    (r"up_blocks_0_attentions|output_blocks_[012]_1_(?!conv)|output_blocks_2_2_", (XL,)),
    (rf"(?:{_BLOCK}|mid_block_attentions_0_transformer_blocks_)[4-9]", (XL,)),
    (r"middle_block_1_transformer_blocks_[4-9]", (XL,)),
    (rf"(?:{_BLOCK}|mid_block_attentions_0_transformer_blocks_)[1-9]", _LARGE),
    (r"middle_block_1_transformer_blocks_[1-9]|add_embedding_|label_emb_", _LARGE),
    (r"(?:down_blocks_1_attentions_\d|input_blocks_[45]_1)_transformer_blocks_[23]", (REFINER,)),
    # transformers in diffusers' names
    (r"transformer_blocks_\d+_attn_(?:to_|add_)|transformer_blocks_\d+_ff_context", _JOINT),
    (r"transformer_blocks_\d+_(?:img|txt)_(?:mlp|mod)_", (QWEN,)),
    (r"transformer_blocks_(?:[89]|1[0-8])_attn_", (SD3, FLUX1, CHROMA, QWEN, HUNYUAN)),
    (r"transformer_blocks_(?:19|2\d|3[0-7])_attn_", (SD3, QWEN, HUNYUAN)),
    (r"transformer_blocks_(?:3[89]|[45]\d)_attn_", (QWEN, HUNYUAN)),
    (r"transformer_blocks_\d+_attn2_", (SD3, LTX, PIXART, SANA)),
    (r"transformer_blocks_\d+_ff(?:_context)?_linear_(?:in|out)", (FLUX2,)),
    (
        r"transformer_blocks_\d+_ff_(?:context_)?net_",
        (SD3, FLUX1, CHROMA, HUNYUAN, LTX, PIXART, COGVIDEO),
    ),
    (r"transformer_blocks_\d+_ff_context_net_", (SD3, FLUX1, CHROMA, HUNYUAN)),
    (r"transformer_blocks_\d+_norm1_context", (SD3, FLUX1, HUNYUAN)),
    (r"transformer_blocks_\d+_attn1_", (LTX, PIXART, SANA, COGVIDEO, MOCHI)),
    (r"transformer_blocks_\d+_attn1_(?:add_|to_add_)", (MOCHI,)),
    (r"transformer_blocks_\d+_audio_attn1_", (LTX,)),
    (r"single_transformer_blocks_", (*_FLUXES, HUNYUAN)),
    (r"single_transformer_blocks_\d+_(?:attn_to_[qkv](?:_|$)|proj_)", (FLUX1, CHROMA, HUNYUAN)),
    (r"single_transformer_blocks_\d+_norm_linear", (FLUX1, HUNYUAN)),
    (r"single_transformer_blocks_(?:3[89]|4\d)_", (FLUX2, HUNYUAN)),
    (r"single_transformer_blocks_\d+_attn_to_(?:qkv_mlp_proj|out)", (FLUX2,)),
    (r"double_stream_modulation|single_stream_modulation|time_guidance_embed", (FLUX2,)),
    (r"distilled_guidance_layer", (CHROMA,)),
    (r"context_embedder_(?!token_refiner|time_text|proj_in)", (SD3, *_FLUXES)),
    (r"x_embedder_(?!proj)", (*_FLUXES, LUMINA)),
    (r"context_embedder_(?:token_refiner|time_text_embed|proj_in)", (HUNYUAN,)),
    (r"blocks_\d+_attn[12]_(?:to_|norm_)", (WAN, HUNYUAN_DIT)),
    (r"blocks_\d+_(?:attn[12]_(?:add_|norm_added_)|ffn_net_)|condition_embedder_", (WAN,)),
    (r"blocks_\d+_ff_net_", (HUNYUAN_DIT,)),
    (r"(?:layers|noise_refiner|context_refiner)_\d+_attn_(?:to_|norm_)", (LUMINA,)),
    (r"(?:layers|noise_refiner|context_refiner)_\d+_feed_forward_linear_", (LUMINA,)),
    (r"(?:layers|noise_refiner|context_refiner)_\d+_attention_to_|all_x_embedder", (ZIMAGE,)),
    # and in their own code's
    (r"joint_blocks_", (SD3,)),
    (r"(?:double|single)_blocks_\d", (*_FLUXES, HUNYUAN)),
    (r"double_blocks_\d+_(?:img|txt)_mlp_fc[12]|(?:img|txt)_in_individual_token", (HUNYUAN,)),
    (r"(?:double_blocks_\d+_(?:img|txt)_mod|single_blocks_\d+_modulation)_linear", (HUNYUAN,)),
    (r"double_blocks_\d+_(?:img|txt)_mlp_[02]", _FLUXES),
    (r"(?:double_blocks_\d+_(?:img|txt)_mod|single_blocks_\d+_modulation)_lin(?:_|$)", (FLUX1,)),
    (r"double_blocks_(?:[89]|1[0-8])_", (FLUX1, CHROMA, HUNYUAN)),
    (r"double_blocks_(?:19|[2-9]\d)_", (HUNYUAN,)),
    (r"single_blocks_(?:3[89])_", (FLUX2, HUNYUAN)),
    (r"single_blocks_4\d_", (FLUX2,)),
    (r"blocks_\d+_(?:self|cross)_attn_(?:[qkvo]|[kv]_img|norm_[qk])(?:_|$)", (WAN,)),
    (r"blocks_\d+_ffn_[02]|head_head|img_emb_proj|time_projection_1", (WAN,)),
    (r"(?:layers|noise_refiner|context_refiner)_\d+_attention_(?:qkv|out)", (LUMINA, ZIMAGE)),
    (r"(?:layers|noise_refiner|context_refiner)_\d+_feed_forward_w[123]", (LUMINA, ZIMAGE)),
    (r"layers_(?:2[6-9])_(?:attention|feed_forward)_", (ZIMAGE,)),
    # language models: Llama's names, and GPT-2's
    (
        r"(?:language_)?(?:model_)*layers_\d+_(?:self_attn|mlp|block_sparse_moe|input_layernorm)",
        (LANGUAGE,),
    ),
    (
        r"(?:transformer_)?h_\d+_(?:attn|mlp|self_attention)_|lm_head|(?:model_)?embed_tokens",
        (LANGUAGE,),
    ),
)
"""How a module's path begins, with `_` for its dots -> the families that have it."""

_LARGE_CLIP = frozenset({XL, REFINER, SD3})
_PREFIXES: Mapping[str, Families] = {
    "lora_te_text_model_": frozenset(_OLD),
    "lora_te1_text_model_": frozenset({XL, SD3, FLUX1}),
    "lora_te2_text_model_": _LARGE_CLIP,
    "text_encoder_2.text_model.": _LARGE_CLIP,
    "text_encoders.clip_g.": _LARGE_CLIP,
}
"""How keys of text encoders begin -> the families that have them."""

CROSS_ATTENTION_WIDTHS = {768: SD1, 1024: SD2, 1280: REFINER, 2048: XL}
"""How many values per token a U-Net's cross attention reads -> its family."""

REFINER_WIDTH = 384
"""Of the refiner's first block; those of the other U-Nets have another."""

_WIDTHS: Mapping[int, tuple[str, ...]] = {
    **{1152: (SD3,), 1536: (SD3, WAN), 2432: (SD3,), 2304: (LUMINA,), 3840: (ZIMAGE,)},
    **{3072: (FLUX1, CHROMA, QWEN, HUNYUAN, WAN, FLUX2), 4096: (FLUX2, LTX), 6144: (FLUX2,)},
}
"""How many values a transformer's attention reads per token -> the families of that width."""

_ATTN1 = {
    **{1152: (PIXART, SANA), 2240: (SANA,), 1920: (COGVIDEO,), 1408: (HUNYUAN_DIT,)},
    **{2048: (LTX,), 4096: (LTX,), 3072: (COGVIDEO, MOCHI, WAN), 1536: (WAN,), 5120: (WAN,)},
}
"""The same, of those who call it `attn1`, as the U-Nets do."""

_UNETS_OWN = re.compile(r"attentions|(?:in|out)put_blocks|middle_block")

_DEPTHS = (
    (
        re.compile(r"(?:transformer|double|joint)_blocks_(\d+)_"),
        {8: (FLUX2,), 19: (FLUX1, CHROMA), 20: (HUNYUAN,), 24: (SD3,), 38: (SD3,), 60: (QWEN,)},
    ),
    (
        re.compile(r"single_(?:transformer_)?blocks_(\d+)_"),
        {38: (FLUX1, CHROMA), 40: (HUNYUAN,), 48: (FLUX2,)},
    ),
)
"""How a block's name begins -> how many of them there are -> the families that have so many."""

_NAMES_COMPILED = tuple((re.compile(pattern), frozenset(names)) for pattern, names in _NAMES)
_READS = re.compile(
    r"(?:attn2[._]to_[kv]|attn1[._]to_[qkv]|attn[._](?:to_q|add_k_proj|qkv|proj)|attention[._](?:to_q|qkv)"
    r"|(?:input_blocks[._]1[._]0[._]in_layers[._]2|down_blocks[._]0[._]resnets[._]0[._]conv1))$"
)


def families_by_names(keys: Iterable[str]) -> Families:
    """The families that have modules of these names; empty if no name tells."""
    paths = {_path(key)[:LONGEST] for key in keys}
    found: Families = frozenset()
    for form, names in _NAMES_COMPILED:
        # A file may mix names: what contradicts the evidence before it is left out.
        narrowed = found & names if found else names
        if narrowed and narrowed != found and any(form.match(path) for path in paths):
            found = narrowed
    return found


LONGEST = 50
"""No pattern of `_NAMES` reads further into a path; so a file's thousands of keys are some hundred."""


def _path(key: str) -> str:
    """A key's path within its component, and some of its suffix, with `_` for the dots."""
    bare = unwrapped(key)
    prefix = max((prefix for prefix in DRAWING if bare.startswith(prefix)), key=len, default="")
    return bare.removeprefix(prefix).replace(".", "_")


def families_by_widths(header: Header) -> Families:
    """The families whose attention reads as many values per token as the file's; empty if none is known."""
    modules: dict[str, dict[str, tuple[int, ...]]] = {}
    for key, info in header.tensors.items():
        if (
            ("at" in key or "_blocks" in key)
            and (parts := split_key(key))
            and _READS.search(parts[0])
        ):
            modules.setdefault(parts[0], {})[parts[1]] = info.shape
    return frozenset(name for stem, slots in modules.items() for name in _by_width(stem, slots))


def _by_width(stem: str, slots: Mapping[str, tuple[int, ...]]) -> tuple[str, ...]:
    width = inputs_by(slots) or 0
    if "attn1" in stem[-11:]:
        # Its matrix is square: an OFT shows the outputs.
        width = width or math.prod(slots.get("oft_blocks", ())[-3:-1])
        return () if _UNETS_OWN.search(stem) else _ATTN1.get(width, ())
    if "attn2" in stem[-11:]:
        family = CROSS_ATTENTION_WIDTHS.get(width)
        return (family,) if family else ()
    if "conv1" in stem or "in_layers" in stem:
        return (REFINER,) if width == REFINER_WIDTH else ()
    return _WIDTHS.get(width, ())


def evidence(header: Header, keys: Iterable[str] | None = None) -> Families:
    """The families that a file may be for by its names and widths; empty if nothing shows one.

    `keys`: those that count, if not all.
    """
    tensors: Mapping[str, TensorInfo] = header.tensors
    if keys is not None:
        tensors = {key: tensors[key] for key in keys}
    found = families_by_names(tensors)
    widths = families_by_widths(Header(tensors, {}))
    if found or not widths:
        found = (found & widths) or found
    elif widths <= frozenset(CROSS_ATTENTION_WIDTHS.values()):
        found = widths
    found = _by_depths(tensors, found) if found & {*_JOINT} and len(found) > 1 else found
    for prefix, names in _PREFIXES.items():
        if (not found or found & names != found) and _begins(tensors, prefix):
            found = (found & names) or found or names
    return found


def _by_depths(keys: Iterable[str], found: Families) -> Families:
    """Those of the families that have as many blocks as the file, if it has all blocks from the first on."""
    paths = {_path(key)[:LONGEST] for key in keys}
    for form, depths in _DEPTHS:
        numbers = {int(match[1]) for match in map(form.match, paths) if match}
        whole = numbers == set(range(len(numbers)))
        found = (found & {*depths.get(len(numbers), ())} if whole else None) or found
    return found


def _begins(keys: Iterable[str], prefix: str) -> bool:
    return any(key.startswith(prefix) for key in keys)


def named(families: Set[str]) -> str | None:
    """The families for a sentence; None if there are none."""
    *others, last = sorted(families, key=ALL.index) or [""]
    return " or ".join(filter(None, (", ".join(others), last))) or None


def identify(header: Header) -> str | None:
    """The family that the file was made for, by its usual name; None if nothing shows it.

    Where names and widths leave several, metadata may choose one of them; else all are named.
    """
    found, family = evidence(header), claimed(header.metadata)
    if family and (not found or family in found):
        return family
    found = frozenset() if found == UNETS else found
    base = header.metadata.get("ss_base_model_version", "")
    return named(found) or other_kind(header.tensors) or base[:80] or None


def cross_attention_width(header: Header) -> int | None:
    """How many values per token a U-Net's cross attention reads: the `in` of some attn2.to_k."""
    stem, slots = "", dict[str, tuple[int, ...]]()
    for key, info in header.tensors.items():
        if "attn2.to_k." in key or "attn2_to_k." in key:
            parts = split_key(key)
            if parts and (not stem or parts[0] == stem):
                stem, slots[parts[1]] = parts[0], info.shape
        elif slots:
            break
    return inputs_by(slots)
