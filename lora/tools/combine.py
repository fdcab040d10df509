"""Combines several adapters into one: exactly, by concatenation, or by the rules of TIES and DARE.

- `concat`: the sum of scale * D, with concatenated factors: up = [up1 up2], down = [down1; down2]. Exact.
- `ties` (Yadav et al., arXiv 2306.01708): only the largest numbers of each scaled change stay, a share of
  `density`. The sign of their sum is elected for each number, and the mean of those with that sign is taken.
- `dare` (Yu et al., arXiv 2311.03099): each number of a change is dropped with probability 1 - `density`, the
  others are divided by `density`, and the scaled changes are added.

TIES and DARE compute whole matrices, one layer at a time, so a rank must be chosen for their result.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from enum import StrEnum
from pathlib import Path

import torch
from torch import Tensor

from lora.engine.stack import LoraUse
from lora.errors import ToolError
from lora.formats.names.keys import KeyMap
from lora.tools import OnProgress, ignore_progress
from lora.tools.adapters.known import key_map_for
from lora.tools.adapters.parts import Adapter, Part
from lora.tools.adapters.reading import header_of, read_adapter
from lora.tools.adapters.saving import WriteOptions, write_adapter
from lora.tools.factors import cutting
from lora.tools.factors.cutting import Cut, CutLayer, LayerChange, ModuleToCut, Report
from lora.tools.factors.lowrank import FACTOR_SLOTS, Product, product_of, side_by_side
from lora.tools.factors.ranks import RankPolicy
from lora.tools.factors.svd import layer_seed
from lora.tools.overwriting import parts_of, refuse_overwriting

FACTORS = FACTOR_SLOTS - {"alpha"}
ADDED = ("diff", "diff_b", "diff_m")
"""Slots that are added without a decomposition."""

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
class CombineOptions:
    """Raises: ToolError if they contradict each other."""

    method: Method = Method.CONCAT
    policy: RankPolicy | None = None
    """The rank of the result. None, only for concatenation: the sum of the ranks."""
    density: float = 0.5
    """For TIES and DARE: the share of the numbers that stays in each change; 0 < density <= 1."""
    seed: int = 0
    """Of DARE's choice and of the randomised SVD."""
    write: WriteOptions = field(default_factory=WriteOptions)
    """With `dtype` None it is float32, so that nothing is rounded."""
    allow_unused: bool = False

    def __post_init__(self) -> None:
        if self.method is not Method.CONCAT and self.policy is None:
            hint = "Give --rank."
            raise ToolError(f"{self.method} makes whole matrices, and no rank is chosen", hint)
        if not 0 < self.density <= 1:
            raise ToolError(f"density is {self.density}", "It must be over 0 and at most 1.")


def combine(
    sources: Sequence[LoraUse[Path]],
    output: Path,
    options: CombineOptions = CombineOptions(),
    key_map: KeyMap | None = None,
    on_progress: OnProgress = ignore_progress,
) -> Report:
    """Writes one adapter that does what all of them do together, each at its scale; other factors are errors.

    LoRA, LoCon and Tucker (made flat) parts and differences can be combined; algorithms that do not add to
    the weight cannot. TIES and DARE treat factors and differences separately. Modules are identified by
    `key_map`, else by the model that the files are for if it is known, else by the files' own names, which
    must then be of one naming. Without a naming in `options.write` the result has that of the first file. New
    words of the prompt are carried over.

    Raises: ToolError as above, if two files have different shapes for a layer or teach a word differently,
    and as `read_adapter` and `write_adapter` do.
    """
    if len(sources) < 2:
        raise ToolError("combining takes two adapters or more", "Name another one.")
    if any(not math.isfinite(source.scale) for source in sources):
        raise ToolError("a scale is not a number")
    if any(source != LoraUse(source.lora, source.scale) for source in sources):
        raise ToolError(
            "combine takes scales only, no factors for components or blocks, no start and no end"
        )
    parts = [part for source in sources for part in parts_of(source.lora)]
    refuse_overwriting(output, options.write.overwrite, parts)
    adapters = _read_all(sources, key_map, options)
    combined, changes = _combined(adapters, [s.scale for s in sources], options, on_progress)
    metadata = {"merged_from": ", ".join(f"{s.lora.name}:{s.scale:g}" for s in sources)}
    combined = replace(combined, metadata={**combined.metadata, **metadata})
    naming = options.write.naming or (adapters[0].naming if combined.key_map else None)
    write_adapter(output, combined, replace(options.write, naming=naming))
    return cutting.report_of(combined, changes, adapters)


def _read_all(
    sources: Sequence[LoraUse[Path]], key_map: KeyMap | None, options: CombineOptions
) -> list[Adapter]:
    """All adapters, bound to the modules of one model if it is known."""
    check_shapes = key_map is not None
    if key_map is None:
        key_maps = [key_map_for(header_of(source.lora)) for source in sources]
        key_map = next(filter(None, key_maps), None)
    allow = options.allow_unused
    adapters = [
        read_adapter(source.lora, key_map, allow_unused=allow, check_shapes=check_shapes)
        for source in sources
    ]
    if key_map is None and len({adapter.naming for adapter in adapters}) > 1:
        raise ToolError(
            "the files name their modules differently, and their model is not known",
            "Name it with --model, or convert them to one naming.",
        )
    return adapters


def _combined(
    adapters: list[Adapter], scales: list[float], options: CombineOptions, on_progress: OnProgress
) -> tuple[Adapter, list[LayerChange]]:
    modules: dict[object, list[_Scaled]] = {}
    for adapter, scale in zip(adapters, scales, strict=True):
        for part in adapter.parts:
            _refuse_other_algorithms(part)
            module = part.target if adapter.key_map else part.stem
            modules.setdefault(module, []).append(_Scaled(part, scale))
    first = adapters[0]
    kept = {key: first.metadata[key] for key in KEPT_METADATA if key in first.metadata}
    empty = replace(first, parts=(), metadata=kept, words=_words(adapters))
    combined = [_combine(parts, options) for parts in modules.values()]
    return cutting.cut_modules(empty, combined, options.policy, on_progress)


@dataclass(frozen=True, eq=False)
class _Scaled:
    """A part of one of the files, with the file's scale."""

    part: Part
    scale: float


def _refuse_other_algorithms(part: Part) -> None:
    other = sorted(part.slots.keys() - CARRIED)
    if other:
        name = next((name for name in part.algorithms if name not in ("lora", "full")), other[0])
        hint = "Make it a LoRA first: convert --algorithm lora."
        raise ToolError(f"{part.name} is {name}, which cannot be combined as it is", hint)


def _combine(parts: Sequence[_Scaled], options: CombineOptions) -> ModuleToCut:
    keys = {slot: key for scaled in reversed(parts) for slot, key in scaled.part.keys.items()}
    first = parts[0].part
    name = first.name
    differences: dict[str, list[Tensor]] = {}
    for scaled in parts:
        for slot, tensor in _differences(scaled).items():
            differences.setdefault(slot, []).append(tensor)
    for slot, tensors in differences.items():
        if len({tuple(tensor.shape) for tensor in tensors}) > 1:
            raise ToolError(f"the files' {slot} of {name} differ in shape")
    slots = {s: _merged(tensors, f"{name} {s}", options) for s, tensors in differences.items()}
    part = replace(first, slots=slots, keys=keys)
    thin = [scaled for scaled in parts if "lora_down" in scaled.part.slots]
    if not thin:
        return ModuleToCut(part)
    if len({_sizes(scaled.part) for scaled in thin}) > 1:
        hint = "They are for different models."
        raise ToolError(f"the files' layers {name} differ in shape", hint)
    if options.policy is not None:
        policy = options.policy
        return ModuleToCut(part, lambda: _cut(name, thin, policy, options))
    exact = _sum(thin).slots(options.write.dtype or torch.float32)
    return ModuleToCut(replace(part, slots={**exact, **slots}))


def _sizes(part: Part) -> tuple[int, int]:
    """The number of outputs, and of inputs times the kernel."""
    product = product_of(part)
    return len(product.up), product.down.shape[1]


def _sum(parts: Sequence[_Scaled]) -> Product:
    return side_by_side([product_of(scaled.part, scaled.scale) for scaled in parts])


def _cut(name: str, parts: Sequence[_Scaled], policy: RankPolicy, options: CombineOptions) -> Cut:
    whole = sum(scaled.part.rank or 0 for scaled in parts)
    layer = CutLayer(name, whole, options.write.dtype or torch.float32)
    if options.method is Method.CONCAT:
        return Cut.of_product(layer, _sum(parts))
    products = [product_of(scaled.part, scaled.scale) for scaled in parts]
    matrix = _merged([product.up @ product.down for product in products], name, options)
    return Cut.of_matrix(layer, matrix, products[0].kernel, policy, layer_seed(options.seed, name))


def _differences(scaled: _Scaled) -> dict[str, Tensor]:
    """A part's differences at its scale, float32; among them the bias of PEFT's lora_B."""
    slots = scaled.part.slots
    differences = {s: slots[s].float() * scaled.scale for s in ADDED if s in slots}
    rank, alpha = scaled.part.rank, scaled.part.alpha
    if "lora_up_bias" in slots and rank and alpha is not None:
        bias = slots["lora_up_bias"].float() * (scaled.scale * alpha / rank)
        differences["diff_b"] = differences["diff_b"] + bias if "diff_b" in differences else bias
    return differences


def _merged(tensors: Sequence[Tensor], name: str, options: CombineOptions) -> Tensor:
    if options.method is Method.TIES:
        return ties(tensors, options.density)
    if options.method is Method.DARE:
        return dare(tensors, options.density, layer_seed(options.seed, name))
    return torch.stack(list(tensors)).sum(0) if len(tensors) > 1 else tensors[0]


def _words(adapters: Sequence[Adapter]) -> dict[str, Tensor]:
    """All new words of the prompt. Raises: ToolError if two files teach a word differently."""
    words: dict[str, Tensor] = {}
    for adapter in adapters:
        for key, vectors in adapter.words.items():
            first = words.setdefault(key, vectors)
            if first.shape != vectors.shape or not torch.equal(first.float(), vectors.float()):
                raise ToolError(f"two of the files define the word {key[:200]}, and they differ")
    return words


def ties(tensors: Sequence[Tensor], density: float) -> Tensor:
    """Trim, elect signs, and merge what agrees (arXiv 2306.01708, algorithm 1, with lambda = 1).

    Takes float32 tensors of one shape. Numbers that are equal to the smallest one that stays are kept too.
    """
    total, trimmed = torch.zeros_like(tensors[0]), []
    for tensor in tensors:
        sizes = tensor.abs().flatten()
        least = sizes.kthvalue(sizes.numel() - math.ceil(density * sizes.numel()) + 1).values
        trimmed.append(torch.where(tensor.abs() >= least, tensor, 0))
        total += trimmed[-1]
    sign, merged, count = total.sign(), torch.zeros_like(total), torch.zeros_like(total)
    for tensor in trimmed:
        agrees = (tensor.sign() == sign) & (tensor != 0)
        merged += torch.where(agrees, tensor, 0)
        count += agrees
    return merged / count.clamp_(min=1)


def dare(tensors: Sequence[Tensor], density: float, seed: int) -> Tensor:
    """Drop, rescale and add (arXiv 2311.03099, equations 2 and 3; the paper's p is 1 - `density`).

    The same seed drops the same numbers.
    """
    generator = torch.Generator().manual_seed(seed)
    total = torch.zeros_like(tensors[0])
    for tensor in tensors:
        kept = torch.rand(tensor.shape, generator=generator) < density
        total += torch.where(kept, tensor, 0) / density
    return total
