"""Decides what a stack does to each module. Nothing is changed here."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Set
from dataclasses import dataclass, field
from typing import NamedTuple

from torch import nn

from lora.engine.modules import takes_low_rank, writable
from lora.engine.stack import Mode, Stack
from lora.errors import LoraUnsupported
from lora.formats.contents import Layer
from lora.formats.names.keys import Target


class PlannedLayer(NamedTuple):
    """One layer of one of the stack's files, and its scale."""

    layer: Layer
    use: int
    """The index in the stack of the use that it comes from."""
    scale: float


class Dynamic(NamedTuple):
    """Everything that a stack adds to one module's output."""

    module: nn.Module
    target: Target
    layers: tuple[PlannedLayer, ...]


@dataclass(frozen=True)
class Merge:
    """Everything that a stack merges into one parameter."""

    module: nn.Module
    name: str
    target: Target
    layers: list[PlannedLayer]


@dataclass
class Plan:
    """What is added in forwards, and what is written into weights."""

    dynamic: list[Dynamic] = field(default_factory=list)
    merges: dict[nn.Parameter, Merge] = field(default_factory=dict)
    """By parameter, not by module: a shared parameter must be rounded once."""
    forced: list[tuple[nn.Module, str]] = field(default_factory=list)
    """The layers that are dynamic although the mode is merged, since their weight cannot be written."""

    def is_stale(self) -> bool:
        """Whether a module has another parameter than when this was made, or a weight can be written now."""
        merges = self.merges.items()
        return any(writable(m.module, m.name) is not weight for weight, m in merges) or any(
            writable(*layer) is not None for layer in self.forced
        )


def make_plan(
    stack: Stack, mode: Mode, find: Callable[[Target], nn.Module], shared: Set[int]
) -> Plan:
    """The plan of a stack. `mode`: dynamic or merged. `shared`: ids of parameters of several modules.

    Raises: LoraUnsupported if a layer cannot be changed in the way that its algorithm needs.
    """
    by_parameter: dict[tuple[Target, str], list[PlannedLayer]] = defaultdict(list)
    for number, use in enumerate(stack):
        scales: dict[Target, float] = {}
        for layer in use.lora.layers:
            scale = scales.get(layer.target)
            if scale is None:
                scale = scales[layer.target] = use.scale_of(layer.target)
            if scale:
                planned = PlannedLayer(layer, number, scale)
                by_parameter[layer.target, layer.parameter].append(planned)
    plan = Plan()
    for (target, name), layers in by_parameter.items():
        module = find(target)
        weight = writable(module, name)
        forward = name == "weight" and takes_low_rank(module)
        if mode is Mode.MERGED and weight is not None and id(weight) not in shared:
            forward = False
        dynamic = [one for one in layers if forward and one.layer.algorithm.is_low_rank]
        if dynamic:
            plan.dynamic.append(Dynamic(module, target, tuple(dynamic)))
            if mode is Mode.MERGED and weight is None:
                plan.forced.append((module, name))
        if len(dynamic) < len(layers):
            rest = [one for one in layers if one not in dynamic] if dynamic else layers
            _add_merge(plan, Merge(module, name, target, rest), weight)
    return plan


def _add_merge(plan: Plan, merge: Merge, weight: nn.Parameter | None) -> None:
    if weight is None:
        raise LoraUnsupported(
            f"{merge.target} is quantised or offloaded, and {merge.layers[0].layer.algorithm.name} needs its "
            f"{merge.name} itself",
            "Only LoRA without extras can be applied to such layers.",
        )
    if weight in plan.merges:
        plan.merges[weight].layers.extend(merge.layers)
    else:
        plan.merges[weight] = merge
