"""Several adapters as one: exactly, by concatenation, or by the rules of TIES and DARE.

- `concat`: sum of scale * D, with the factors side by side: up = [up1 up2], down = [down1; down2]. Exact.
- `ties` (Yadav et al., arXiv 2306.01708): of each scaled change only the `density` largest numbers stay; each
  number's sign is that of their sum; the mean is taken over those that have it.
- `dare` (Yu et al., arXiv 2311.03099): each number of a change is dropped with probability 1 - `density`, the
  others are divided by `density`, and the scaled changes are added up.

TIES and DARE work on whole matrices, one layer at a time, so a rank has to be chosen for their result.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from enum import StrEnum
from pathlib import Path

import torch
from torch import Tensor

from lora.errors import ToolError
from lora.formats.names.keys import KeyMap
from lora.tools import OnProgress, ignore_progress
from lora.tools.adapters.known import key_map_for
from lora.tools.adapters.parts import Adapter, Part
from lora.tools.adapters.reading import header_of, read_adapter
from lora.tools.adapters.saving import WriteOptions, write_adapter
from lora.tools.factors.cutting import (
    Cut,
    Layer,
    LayerChange,
    Module,
    Report,
    cut_modules,
    report_of,
)
from lora.tools.factors.lowrank import FACTOR_SLOTS, Product, product_of, side_by_side
from lora.tools.factors.ranks import RankPolicy
from lora.tools.sparsified import dare, ties
from lora.tools.writing import refuse_overwriting

FACTORS = FACTOR_SLOTS - {"alpha"}
ADDED = ("diff", "diff_b", "diff_m")
"""Slots that are added up as they are."""

CARRIED = {*FACTORS, *ADDED, "alpha", "lora_up_bias"}
KEPT_METADATA = (
    "ss_base_model_version",
    "modelspec.architecture",
    "modelspec.sai_model_spec",
    "ss_v2",
)


class Method(StrEnum):
    """How changes are combined."""

    CONCAT = "concat"
    TIES = "ties"
    DARE = "dare"


@dataclass(frozen=True)
class Source:
    """One adapter, and how strongly it goes in: 1 as trained, negative the reverse."""

    path: Path
    scale: float = 1.0


@dataclass(frozen=True)
class CombineOptions:
    """Raises: ToolError if they do not go together."""

    method: Method = Method.CONCAT
    policy: RankPolicy | None = None
    """The rank of the result; None, which only concatenation can do: the sum of the ranks."""
    density: float = 0.5
    """For TIES and DARE: the share of each change's numbers that stays; 0 < density <= 1."""
    seed: int = 0
    """For DARE's choice, and where singular values are searched for."""
    write: WriteOptions = field(default_factory=WriteOptions)
    """`dtype` None: float32, so that nothing is rounded."""
    allow_unused: bool = False

    def __post_init__(self) -> None:
        if self.method is not Method.CONCAT and self.policy is None:
            raise ToolError(
                f"{self.method} makes whole matrices, and no rank is chosen", "Give --rank."
            )
        if not 0 < self.density <= 1:
            raise ToolError(f"density is {self.density}", "It is a share: over 0, at most 1.")


def combine(
    sources: Sequence[Source],
    output: Path,
    options: CombineOptions = CombineOptions(),
    key_map: KeyMap | None = None,
    on_progress: OnProgress = ignore_progress,
) -> Report:
    """Writes one adapter that does what all of them do together, each at its scale.

    LoRA, LoCon and Tucker (made flat) parts and differences can be combined; what changes a layer in another
    way than by adding to it cannot. TIES and DARE look at factors and at differences apart. Modules are told
    apart by `key_map`, else by the model that the files are for where that is known, else by the files' own
    names, which must then be of one naming. Without a naming in `options.write` the result has the first
    file's. Words for the prompt are carried.

    Raises: ToolError as above, if two files have different shapes for a layer or one word, and as
    `read_adapter` and `write_adapter` do.
    """
    if len(sources) < 2:
        raise ToolError("there are not two adapters to combine")
    if any(not math.isfinite(source.scale) for source in sources):
        raise ToolError("a scale is not a number")
    refuse_overwriting(output, [source.path for source in sources])
    adapters = _read_all(sources, key_map, options)
    combined, changes = combined_adapter(adapters, [s.scale for s in sources], options, on_progress)
    metadata = {"merged_from": ", ".join(f"{s.path.stem}:{s.scale:g}" for s in sources)}
    combined = replace(combined, metadata={**combined.metadata, **metadata})
    naming = options.write.naming or (adapters[0].naming if combined.key_map else None)
    write_adapter(output, combined, replace(options.write, naming=naming))
    return report_of(combined, changes, adapters)


def _read_all(
    sources: Sequence[Source], key_map: KeyMap | None, options: CombineOptions
) -> list[Adapter]:
    """All of them, in the same modules."""
    given = key_map is not None
    if key_map is None:
        known = [key_map_for(header_of(source.path)) for source in sources]
        key_map = next((one for one in known if one), None)
    adapters = [
        read_adapter(s.path, key_map, allow_unused=options.allow_unused, check_shapes=given)
        for s in sources
    ]
    if key_map is None and len({adapter.naming for adapter in adapters}) > 1:
        raise ToolError(
            "the files name their modules differently, and their model is not known",
            "Name it with --model, or convert them to one naming.",
        )
    return adapters


def combined_adapter(
    adapters: Sequence[Adapter],
    scales: Sequence[float],
    options: CombineOptions,
    on_progress: OnProgress = ignore_progress,
) -> tuple[Adapter, list[LayerChange]]:
    """The sum of the adapters, and what was approximated; see `combine`."""
    modules: dict[object, list[_Scaled]] = {}
    for adapter, scale in zip(adapters, scales, strict=True):
        for part in adapter.parts:
            _refuse_other_algorithms(part)
            place = part.target if adapter.key_map else part.stem
            modules.setdefault(place, []).append(_Scaled(part, scale))
    first = adapters[0]
    kept = {key: first.metadata[key] for key in KEPT_METADATA if key in first.metadata}
    empty = replace(first, parts=(), metadata=kept, words=_words(adapters))
    made = [_combine(found, options) for found in modules.values()]
    return cut_modules(empty, made, options.policy, on_progress)


@dataclass(frozen=True, eq=False)
class _Scaled:
    """A part of one of the files."""

    part: Part
    scale: float


def _refuse_other_algorithms(part: Part) -> None:
    other = sorted(part.slots.keys() - CARRIED)
    if other:
        name = next((name for name in part.algorithms if name not in ("lora", "full")), other[0])
        raise ToolError(
            f"{part.name} is {name}, which cannot be combined as it is",
            "Make it a LoRA first: convert --algorithm lora.",
        )


def _combine(found: Sequence[_Scaled], options: CombineOptions) -> Module:
    keys = {slot: key for one in reversed(found) for slot, key in one.part.keys.items()}
    first = found[0].part
    name = first.name
    differences: dict[str, list[Tensor]] = {}
    for one in found:
        for slot, tensor in _differences(one).items():
            differences.setdefault(slot, []).append(tensor)
    for slot, tensors in differences.items():
        if len({tuple(tensor.shape) for tensor in tensors}) > 1:
            raise ToolError(f"the files' {slot} of {name} differ in shape")
    slots = {slot: _merged(found, f"{name} {slot}", options) for slot, found in differences.items()}
    part = replace(first, slots=slots, keys=keys)
    thin = [one for one in found if "lora_down" in one.part.slots]
    if not thin:
        return Module(part)
    if len({_sizes(one.part) for one in thin}) > 1:
        raise ToolError(
            f"the files' layers {name} differ in shape", "They are for different models."
        )
    if options.policy is not None:
        policy = options.policy
        return Module(part, lambda: _cut(name, thin, policy, options))
    exact = _sum(thin).slots(options.write.dtype or torch.float32)
    return Module(replace(part, slots={**exact, **slots}))


def _sizes(part: Part) -> tuple[int, int]:
    """Outputs, and inputs with the kernel."""
    product = product_of(part)
    return len(product.up), product.down.shape[1]


def _sum(parts: Sequence[_Scaled]) -> Product:
    return side_by_side([product_of(one.part, one.scale) for one in parts])


def _cut(name: str, parts: Sequence[_Scaled], policy: RankPolicy, options: CombineOptions) -> Cut:
    whole = sum(one.part.rank or 0 for one in parts)
    layer = Layer(name, whole, options.write.dtype or torch.float32)
    if options.method is Method.CONCAT:
        return Cut.of_product(layer, _sum(parts))
    products = [product_of(one.part, one.scale) for one in parts]
    matrix = _merged([one.up @ one.down for one in products], name, options)
    seed = options.seed + zlib.crc32(name.encode())
    return Cut.of_matrix(layer, matrix, products[0].kernel, policy, seed)


def _differences(one: _Scaled) -> dict[str, Tensor]:
    """A part's whole differences at its scale, float32; the bias of PEFT's lora_B among them."""
    slots = one.part.slots
    found = {slot: slots[slot].float() * one.scale for slot in ADDED if slot in slots}
    rank, alpha = one.part.rank, one.part.alpha
    if "lora_up_bias" in slots and rank and alpha is not None:
        bias = slots["lora_up_bias"].float() * (one.scale * alpha / rank)
        found["diff_b"] = found["diff_b"] + bias if "diff_b" in found else bias
    return found


def _merged(tensors: Sequence[Tensor], name: str, options: CombineOptions) -> Tensor:
    """One tensor of several of the same shape, by the method."""
    if options.method is Method.TIES:
        return ties(tensors, options.density)
    if options.method is Method.DARE:
        return dare(tensors, options.density, options.seed + zlib.crc32(name.encode()))
    return torch.stack(list(tensors)).sum(0) if len(tensors) > 1 else tensors[0]


def _words(adapters: Sequence[Adapter]) -> dict[str, Tensor]:
    """All words for the prompt. Raises: ToolError if two files teach one word differently."""
    words: dict[str, Tensor] = {}
    for adapter in adapters:
        for key, vectors in adapter.words.items():
            known = words.setdefault(key, vectors)
            if known.shape != vectors.shape or not torch.equal(known.float(), vectors.float()):
                raise ToolError(f"two of the files teach the word {key[:200]}, differently")
    return words
