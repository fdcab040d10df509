"""The report on an extraction, for each tensor and in total, and the metadata of its file."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from lora.formats.names.families import CROSS_ATTENTION_WIDTHS
from lora.tools import dtype_name
from lora.tools.adapters.parts import rank_metadata
from lora.tools.extract.options import ExtractOptions
from lora.tools.factors.cutting import relative_error
from lora.tools.models.checkpoints import Checkpoint


@dataclass(frozen=True)
class LayerReport:
    """One parameter that changed, and how exactly the file stores its change."""

    name: str
    """Component, module and parameter, with dots between."""
    shape: tuple[int, ...]
    kind: str
    """`lora`, `tucker` or `diff`."""
    rank: int | None
    dtype: str
    bytes: int
    energy: float
    """||D||_F^2, where D = target - source."""
    kept: float
    """The share of it that the rank keeps, before rounding: 1 - (||D||^2 - sum s^2) / ||D||^2."""
    error: float
    """||D - D'||_F^2, where D' is what the stored, rounded numbers give."""
    largest: float
    """The largest |D - D'|."""
    unequal: int | None = None
    """Of a difference: how many numbers of source + difference do not round to those of the target."""

    @property
    def relative_error(self) -> float:
        """||D - D'||_F / ||D||_F."""
        return relative_error([self.error], [self.energy])


@dataclass(frozen=True)
class LeftOut:
    """A tensor that is not in the file, and why."""

    name: str
    reason: str


@dataclass(frozen=True)
class Verified:
    """The file, merged into the source in float32 and rounded once, against the target."""

    largest: float
    """The largest difference of two numbers."""
    relative_error: float
    """||merged - target||_F / ||target - source||_F, both in the source's dtype."""
    unequal: int
    """How many numbers differ."""
    numbers: int
    """How many numbers there are."""


@dataclass(frozen=True)
class ExtractReport:
    """Every tensor of both models is a layer here, left out, or unchanged."""

    output: Path
    layers: Sequence[LayerReport]
    left_out: Sequence[LeftOut]
    unchanged: int
    """How many tensors have the same numbers."""
    resumed: int
    """How many layers an earlier run, which was killed, had already written."""
    bytes: int
    seconds: float
    verified: Verified | None = None

    @property
    def energy(self) -> float:
        """The sum of ||D||_F^2 over all layers."""
        return math.fsum(layer.energy for layer in self.layers)

    @property
    def relative_error(self) -> float:
        """||D - D'||_F / ||D||_F over all layers."""
        return relative_error((layer.error for layer in self.layers), [self.energy])

    @property
    def kept(self) -> float:
        """The share of the energy that the ranks keep, over all layers."""
        kept = math.fsum(layer.kept * layer.energy for layer in self.layers)
        return kept / self.energy if self.energy else 1.0

    @property
    def inexact(self) -> Sequence[LayerReport]:
        """The differences that do not restore every number of the target."""
        return [layer for layer in self.layers if layer.unequal]


_BASES: Mapping[str, tuple[str, str]] = {
    "SD 1.5": ("sd_v1", "stable-diffusion-v1"),
    "SD 2": ("sd_v2", "stable-diffusion-v2-512"),
    "SDXL": ("sdxl_base_v1-0", "stable-diffusion-xl-v1-base"),
    "SDXL refiner": ("sdxl_refiner_v1-0", "stable-diffusion-xl-v1-refiner"),
}
"""Family -> kohya's name of the base model, and ModelSpec's name of its architecture."""


def sources_metadata(source: Checkpoint, target: Checkpoint, title: str) -> dict[str, str]:
    """The metadata that is known at first. It has no date: the same input gives the same bytes."""
    origin = {
        role: {"name": model.path.name, "sha256": model.sha256()}
        for role, model in (("source", source), ("target", target))
    }
    metadata = {
        "extracted_from": json.dumps(origin),
        "modelspec.sai_model_spec": "1.0.0",
        "modelspec.title": title,
    }
    widths = {
        stored.shape[1]
        for place, stored in source.parameters.items()
        if place.path.endswith("attn2.to_k") and len(stored.shape) == 2
    }
    base = _BASES.get(CROSS_ATTENTION_WIDTHS.get(widths.pop(), "")) if len(widths) == 1 else None
    if base:
        metadata["ss_base_model_version"] = base[0]
        metadata["modelspec.architecture"] = f"{base[1]}/lora"
    return {key: text for key, text in metadata.items() if text}


def layers_metadata(layers: Sequence[LayerReport], options: ExtractOptions) -> dict[str, str]:
    """The metadata that is known at the end: kohya's fields for the ranks, and the options."""
    metadata = {"extraction": json.dumps(_numeric_options(options), sort_keys=True)}
    kinds = {layer.kind for layer in layers}
    metadata["ss_network_module"] = "networks.lora" if kinds == {"lora"} else "lycoris.kohya"
    if kinds != {"lora"}:
        algorithm = {"algo": "full" if kinds == {"diff"} else "locon"}
        tucker = {"use_tucker": "True"} if "tucker" in kinds else {}
        metadata["ss_network_args"] = json.dumps({**algorithm, **tucker})
    return metadata | rank_metadata((layer.rank, layer.rank) for layer in layers)


def _numeric_options(options: ExtractOptions) -> dict[str, Any]:
    rules = {key: value for key, value in asdict(options.policy).items() if value is not None}
    return {
        **({"diff_only": True} if options.diff_only else rules),
        "dtype": dtype_name(options.dtype),
        "conv": str(options.conv),
        "min_diff": options.min_diff,
        "clamp_quantile": options.clamp_quantile,
        "seed": options.seed,
    }
