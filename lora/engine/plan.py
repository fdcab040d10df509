"""Decides what a stack does to each module. Nothing is changed here.

A plan knows no scales, only which of them are 0: it holds for every strength of the same adapters.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Hashable, Set
from dataclasses import dataclass, field
from typing import NamedTuple

from torch import nn

from lora.engine.modules import takes_low_rank, writable
from lora.engine.stack import Mode, Stack
from lora.errors import LoraUnsupported
from lora.formats.contents import Layer
from lora.formats.names.keys import Target


class PlannedLayer(NamedTuple):
    """One layer of one of the stack's files."""

    layer: Layer
    use: int
    """The index in the stack of the use that it comes from."""

    def scale_in(self, stack: Stack) -> float:
        """Its scale in a stack that the plan holds for."""
        return stack[self.use].scale_of(self.layer.target)


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

    def content_in(self, stack: Stack) -> Hashable:
        """What the parameter holds when a stack is merged that the plan holds for."""
        return tuple(
            (stack[one.use].lora.identity, one.layer.target, one.scale_in(stack))
            for one in self.layers
        )


@dataclass
class Plan:
    """What is added in forwards, and what is written into weights."""

    dynamic: list[Dynamic] = field(default_factory=list)
    merges: dict[nn.Parameter, Merge] = field(default_factory=dict)
    """By parameter, not by module: a shared parameter must be rounded once."""
    forced: list[tuple[nn.Module, str]] = field(default_factory=list)
    """The layers that are dynamic although the mode is merged, since their weight cannot be written."""

    def is_stale(self) -> bool:
        """Whether a module's parameter was replaced since, or a weight that could not be written now can."""
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
    for index, use in enumerate(stack):
        targets = {layer.target for layer in use.lora.layers}
        scales = {target: use.scale_of(target) for target in targets}
        for layer in use.lora.layers:
            if scales[layer.target]:
                planned = PlannedLayer(layer, index)
                by_parameter[layer.target, layer.parameter].append(planned)
    plan = Plan()
    for (target, name), layers in by_parameter.items():
        module = find(target)
        weight = writable(module, name)
        forward = name == "weight" and takes_low_rank(module)
        if mode is Mode.MERGED and weight is not None and id(weight) not in shared:
            forward = False
        dynamic = [entry for entry in layers if forward and entry.layer.algorithm.is_low_rank]
        if dynamic:
            plan.dynamic.append(Dynamic(module, target, tuple(dynamic)))
            if mode is Mode.MERGED and weight is None:
                plan.forced.append((module, name))
        if len(dynamic) < len(layers):
            rest = [entry for entry in layers if entry not in dynamic] if dynamic else layers
            if weight is None:
                algorithm = rest[0].layer.algorithm.name
                raise LoraUnsupported(
                    f"{target} is quantised or offloaded, and {algorithm} needs its {name} itself",
                    "Only plain LoRA can be applied to such layers.",
                )
            merge = plan.merges.setdefault(weight, Merge(module, name, target, []))
            merge.layers.extend(rest)
    return plan
