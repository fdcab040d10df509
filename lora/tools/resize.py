"""Cuts an adapter to a smaller rank, with the smallest error, without forming whole matrices."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from torch import Tensor

from lora.errors import ToolError
from lora.formats.names.keys import KeyMap
from lora.tools import OnProgress, ignore_progress
from lora.tools.adapters.parts import Part
from lora.tools.adapters.reading import open_adapter
from lora.tools.adapters.saving import WriteOptions, write_adapter
from lora.tools.factors import cutting
from lora.tools.factors.cutting import Cut, CutLayer, ModuleToCut, Report
from lora.tools.factors.lowrank import FACTOR_SLOTS, product_of
from lora.tools.factors.ranks import RankPolicy
from lora.tools.overwriting import parts_of, refuse_overwriting

RESIZED = ("lora", "dora", "full")
"""Algorithms whose layers are cut, or stay as they are; resize refuses all others."""

SCALED = ("bias_values", "lora_up_bias")
"""Slots that are scaled by alpha / rank, as the factors are."""

BOUND = {"bias_values", "lora_up_bias", "dora_scale", "magnitude"}
"""Slots that have no meaning without factors."""


@dataclass(frozen=True)
class ResizeOptions:
    """How an adapter is resized and written."""

    policy: RankPolicy
    write: WriteOptions = field(default_factory=WriteOptions)
    allow_unused: bool = False


def resize(
    path: Path,
    output: Path,
    options: ResizeOptions,
    on_progress: OnProgress = ignore_progress,
    key_map: KeyMap | None = None,
) -> Report:
    """Writes the adapter of `path` to `output` with each LoRA layer at the rank that the policy chooses.

    Each layer's change becomes the nearest one of its rank (Eckart and Young); the report has the error as
    stored. Layers that have that rank already, differences and new words stay bit for bit. A Tucker layer
    becomes flat, which may be larger. Of a DoRA the inner change is resized, and the magnitudes stay: W' = m
    * (W + D') / norm(W + D'). `key_map` is needed for another naming if the model is not known.

    Raises: ToolError for algorithms without a rank that can be cut, for tensors that cannot be carried, and
    as `write_adapter` and `read_adapter` do.
    """
    refuse_overwriting(output, options.write.overwrite, parts_of(path))
    adapter = open_adapter(
        path, key_map, rename=bool(options.write.naming), allow_unused=options.allow_unused
    )
    modules = [_module(part, options.write.dtype) for part in adapter.parts]
    resized, changes = cutting.cut_modules(adapter, modules, options.policy, on_progress)
    write_adapter(output, resized, options.write)
    return cutting.report_of(resized, changes, [adapter])


def _module(part: Part, dtype: torch.dtype | None) -> ModuleToCut:
    if not _is_lora(part):
        return ModuleToCut(part)
    rest = _scaled_rest(part)
    layer = CutLayer(part.name, part.rank, dtype or part.slots["lora_up"].dtype)
    return ModuleToCut(
        replace(part, slots=rest),
        lambda: Cut.of_product(layer, product_of(part)),
        least=1 if BOUND & rest.keys() else 0,
        uncut=None if "lora_mid" in part.slots else part,
    )


def _is_lora(part: Part) -> bool:
    """Whether there are factors to cut. Raises: ToolError for an algorithm with a rank of another kind."""
    slots = part.slots
    other = next((name for name in part.algorithms if name not in RESIZED), None)
    inner = "lora_down" not in slots and any(s.startswith(("hada", "lokr")) for s in slots)
    if other := other or ("dora" if inner else None):
        hint = "Make it a LoRA first: convert --algorithm lora."
        raise ToolError(f"{part.name} is {other}, which has no rank to cut", hint)
    return "lora_down" in slots


def _scaled_rest(part: Part) -> dict[str, Tensor]:
    """The slots besides the factors; those that alpha / rank scales are multiplied by it."""
    rest = {slot: tensor for slot, tensor in part.slots.items() if slot not in FACTOR_SLOTS}
    if part.alpha is not None and part.rank and part.alpha != part.rank:
        scaling = part.alpha / part.rank
        rest |= {s: rest[s].float() * scaling for s in SCALED if s in rest}
    return rest
