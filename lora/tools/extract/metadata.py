"""What an extracted file says of itself."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

from lora.formats.families import CROSS_ATTENTION_WIDTHS
from lora.tools.extract.options import ExtractOptions
from lora.tools.extract.report import LayerReport
from lora.tools.models.checkpoints import Checkpoint

_BASES: Mapping[str, tuple[str, str]] = {
    "SD 1.5": ("sd_v1", "stable-diffusion-v1"),
    "SD 2": ("sd_v2", "stable-diffusion-v2-512"),
    "SDXL": ("sdxl_base_v1-0", "stable-diffusion-xl-v1-base"),
    "SDXL refiner": ("sdxl_refiner_v1-0", "stable-diffusion-xl-v1-refiner"),
}
"""Family -> kohya's name of the base model, and ModelSpec's of its architecture."""


def sources_metadata(source: Checkpoint, target: Checkpoint, title: str) -> dict[str, str]:
    """What is known before anything is computed. No date: the same input gives the same bytes."""
    origin = {
        role: {"name": model.path.name, "sha256": model.sha256()}
        for role, model in (("source", source), ("target", target))
    }
    found = {
        "extracted_from": json.dumps(origin),
        "modelspec.sai_model_spec": "1.0.0",
        "modelspec.title": title,
        "modelspec.resolution": "",
    }
    widths = {
        stored.shape[1]
        for place, stored in source.parameters.items()
        if place.path.endswith("attn2.to_k") and len(stored.shape) == 2
    }
    base = _BASES.get(CROSS_ATTENTION_WIDTHS.get(widths.pop(), "")) if len(widths) == 1 else None
    if base:
        found["ss_base_model_version"] = base[0]
        found["modelspec.architecture"] = f"{base[1]}/lora"
    return {key: text for key, text in found.items() if text}


def layers_metadata(layers: Sequence[LayerReport], options: ExtractOptions) -> dict[str, str]:
    """What is known in the end: kohya's fields for the ranks, and how they came about."""
    found = {"extraction": json.dumps(_told(options), sort_keys=True)}
    kinds = {layer.kind for layer in layers}
    found["ss_network_module"] = "networks.lora" if kinds == {"lora"} else "lycoris.kohya"
    if kinds != {"lora"}:
        algorithm = {"algo": "full" if kinds == {"diff"} else "locon"}
        tucker = {"use_tucker": "True"} if "tucker" in kinds else {}
        found["ss_network_args"] = json.dumps({**algorithm, **tucker})
    ranks = {layer.rank for layer in layers if layer.rank}
    if ranks:
        rank = str(ranks.pop()) if len(ranks) == 1 else "Dynamic"
        found |= {"ss_network_dim": rank, "ss_network_alpha": rank}
    return found


def _told(options: ExtractOptions) -> dict[str, Any]:
    """The options that shape the numbers, as plain values."""
    rules = {key: value for key, value in asdict(options.policy).items() if value is not None}
    return {
        **({"diff_only": True} if options.diff_only else rules),
        "dtype": str(options.dtype).removeprefix("torch."),
        "conv": str(options.conv),
        "min_diff": options.min_diff,
        "clamp_quantile": options.clamp_quantile,
        "seed": options.seed,
    }
