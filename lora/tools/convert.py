"""Converts an adapter to another naming, another file format, or another algorithm: a plain LoRA."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from enum import StrEnum
from pathlib import Path

import torch
from torch import Tensor

from lora.errors import ToolError
from lora.formats.algorithms import Algorithm, recipes
from lora.formats.algorithms.full import WeightDifference
from lora.formats.algorithms.ia3 import PeftIA3Bias
from lora.formats.algorithms.lora import LoRA
from lora.formats.names.slots import Shape
from lora.tools import TABLES, OnProgress, ignore_progress
from lora.tools.adapters.parts import Adapter, Part
from lora.tools.adapters.reading import open_adapter
from lora.tools.adapters.saving import WriteOptions, write_adapter
from lora.tools.factors import cutting
from lora.tools.factors.cutting import Cut, CutLayer, LayerChange, ModuleToCut, Report
from lora.tools.factors.lowrank import FACTOR_SLOTS, product_of
from lora.tools.factors.ranks import RankPolicy
from lora.tools.factors.svd import layer_seed
from lora.tools.models.checkpoints import Checkpoint, Place
from lora.tools.overwriting import parts_of, refuse_overwriting

NEEDS_MODEL = "Name the model that it was trained on with --model."

ReadWeight = Callable[[Place], Tensor]


class Goal(StrEnum):
    """The algorithms that an adapter can be converted to."""

    LORA = "lora"


@dataclass(frozen=True)
class ConvertOptions:
    """What an adapter is converted to."""

    write: WriteOptions = field(default_factory=WriteOptions)
    """Naming, dtype and format; by default they stay."""
    algorithm: Goal | None = None
    """None: the algorithm and the numbers of every layer stay."""
    policy: RankPolicy | None = None
    """The rank of the layers that become a LoRA and are none yet."""
    seed: int = 0
    """Of the randomised SVD."""
    allow_unused: bool = False


def convert(
    path: Path,
    output: Path,
    options: ConvertOptions,
    model: Checkpoint | None = None,
    on_progress: OnProgress = ignore_progress,
) -> Report:
    """Writes the adapter of `path` to `output` as the options say.

    A change of the naming loses nothing: the numbers and alpha / rank stay. With `Goal.LORA`, each layer of
    another algorithm becomes the nearest product of the chosen rank, with its error in the report. What
    depends on the weights (DoRA, OFT, GLoRA, IA3, new values) needs `model`, and becomes its change to that
    model. Biases become differences, exactly; LoRA layers stay; a Tucker core is multiplied out. Without
    `model`, only SDXL's modules can get other names than the file's.

    Raises: ToolError if the naming cannot express a layer, if the model or the rank is missing for one, and
    as `read_adapter` and `write_adapter` do.
    """
    refuse_overwriting(output, options.write.overwrite, parts_of(path))
    key_map = model.key_map() if model else None
    rename = bool(options.write.naming or options.algorithm)
    adapter = open_adapter(path, key_map, rename=rename, allow_unused=options.allow_unused)
    result, changes = adapter, list[LayerChange]()
    if options.algorithm is Goal.LORA:
        result, changes = as_lora(adapter, options, model.read if model else None, on_progress)
    write_adapter(output, result, options.write)
    return cutting.report_of(result, changes, [adapter])


def as_lora(
    adapter: Adapter,
    options: ConvertOptions,
    read_weight: ReadWeight | None = None,
    on_progress: OnProgress = ignore_progress,
) -> tuple[Adapter, list[LayerChange]]:
    """The adapter with every change of a weight as a LoRA, and the layers that were approximated."""
    modules = [_module(part, options, read_weight) for part in adapter.parts]
    metadata = {key: text for key, text in adapter.metadata.items() if key != "ss_network_args"}
    if "ss_network_module" in metadata:
        metadata["ss_network_module"] = "networks.lora"
    renamed = replace(adapter, metadata=metadata)
    return cutting.cut_modules(renamed, modules, options.policy, on_progress)


def _module(part: Part, options: ConvertOptions, read_weight: ReadWeight | None) -> ModuleToCut:
    algorithms = [recipe.make(part.slots) for recipe in recipes(frozenset(part.slots))[0]]
    on_weight = [algorithm for algorithm in algorithms if algorithm.parameter == "weight"]
    if len(on_weight) == 1 and isinstance(on_weight[0], LoRA) and on_weight[0].is_low_rank:
        return _low_rank(part, algorithms, options, read_weight)
    slots = _other_slots(part, algorithms, read_weight)
    if all(_stays(part, algorithm) for algorithm in on_weight):
        kept = {s: part.slots[s] for s in ("diff",) if s in part.slots}
        return ModuleToCut(replace(part, slots={**kept, **slots}))
    _needs_weight(part, on_weight, read_weight)
    shape = _shape(part, on_weight)

    def change() -> Tensor:
        weight = _weight(part, "weight", shape, on_weight, read_weight)
        total = torch.zeros(shape)
        for algorithm in on_weight:
            total += algorithm.delta(weight)
        return total

    if len(shape) < 2 or _is_table(part):
        return ModuleToCut(replace(part, slots={**slots, "diff": change()}))
    policy = options.policy
    if policy is None:
        raise ToolError(
            f"{part.name} is {on_weight[0].name}, and no rank is chosen", "Give --rank."
        )
    layer = CutLayer(part.name, None, options.write.dtype or _dtype(part))
    seed = layer_seed(options.seed, layer.name)
    return ModuleToCut(
        replace(part, slots=slots),
        lambda: Cut.of_matrix(layer, change().flatten(1), shape[1:], policy, seed),
    )


def _low_rank(
    part: Part, algorithms: list[Algorithm], options: ConvertOptions, read_weight: ReadWeight | None
) -> ModuleToCut:
    """A LoRA stays as it is; a Tucker core is multiplied out, and the result cut if a rank is chosen."""
    others = _other_slots(part, algorithms, read_weight)
    factors = {slot: t for slot, t in part.slots.items() if slot in FACTOR_SLOTS}
    if "lora_mid" not in factors:
        return ModuleToCut(replace(part, slots={**factors, **others}))
    layer = CutLayer(part.name, part.rank, options.write.dtype or _dtype(part))
    if options.policy is None:
        return ModuleToCut(replace(part, slots={**product_of(part).slots(layer.dtype), **others}))
    return ModuleToCut(replace(part, slots=others), lambda: Cut.of_product(layer, product_of(part)))


def _stays(part: Part, algorithm: Algorithm) -> bool:
    """Whether it is the difference of a norm or of a table of rows, and not of a matrix."""
    return isinstance(algorithm, WeightDifference) and (_is_table(part) or algorithm.diff.dim() < 2)


def _is_table(part: Part) -> bool:
    return part.target.path.rpartition(".")[2] in TABLES


def _other_slots(
    part: Part, algorithms: list[Algorithm], read_weight: ReadWeight | None
) -> dict[str, Tensor]:
    """The changes of biases and modulations, as differences."""
    slots = {slot: part.slots[slot] for slot in ("diff_b", "diff_m") if slot in part.slots}
    shape = part.target.parameters.get("weight")
    companions = [more for algorithm in algorithms if shape for more in algorithm.companions(shape)]
    for algorithm in [*algorithms, *companions]:
        if algorithm.parameter == "bias" and "diff_b" not in algorithm.__dict__:
            name = part.target.parameter("bias")
            if isinstance(algorithm, PeftIA3Bias) and name is None:
                continue  # the module has none
            size = part.target.parameters.get("bias") or _bias_shape(algorithm)
            bias = _weight(part, "bias", size, [algorithm], read_weight)
            change = algorithm.delta(bias)
            slots["diff_b"] = slots["diff_b"].float() + change if "diff_b" in slots else change
    return slots


def _bias_shape(algorithm: Algorithm) -> Shape:
    return next(tuple(t.shape) for t in algorithm.__dict__.values() if isinstance(t, Tensor))


def _shape(part: Part, algorithms: list[Algorithm]) -> Shape:
    """The shape of the weight. Raises: ToolError if it is not known, or does not fit the part."""
    shape = part.target.parameters.get("weight")
    if shape is None:
        raise ToolError(f"the shape of {part.name} is not known", NEEDS_MODEL)
    for algorithm in algorithms:
        if misfit := algorithm.misfit(shape):
            raise ToolError(f"{part.name}: {misfit}", NEEDS_MODEL)
    return shape


def _weight(
    part: Part,
    parameter: str,
    shape: Shape,
    algorithms: list[Algorithm],
    read_weight: ReadWeight | None,
) -> Tensor:
    """The model's parameter; zeros of its shape if no change depends on it. Raises: ToolError."""
    if not _needs_weight(part, algorithms, read_weight) or read_weight is None:
        return torch.zeros(()).expand(shape)
    name = part.target.parameter(parameter) or parameter
    return read_weight(Place(part.target.component, part.target.path, name))


def _needs_weight(part: Part, algorithms: list[Algorithm], read_weight: ReadWeight | None) -> bool:
    """Whether a change depends on the weight. Raises: ToolError if so, and there is no model."""
    needing = next((a for a in algorithms if a.needs_weight), None)
    if needing and read_weight is None:
        why = f"{part.name} is {needing.name}, whose change depends on the model's weights"
        raise ToolError(why, NEEDS_MODEL)
    return needing is not None


def _dtype(part: Part) -> torch.dtype:
    """That of the largest tensor."""
    tensors = [t for s, t in part.slots.items() if t.is_floating_point() and s != "alpha"]
    return max(tensors, key=lambda tensor: tensor.numel()).dtype
