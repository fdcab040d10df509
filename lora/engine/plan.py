"""What a stack does to which module: decided here, without touching anything."""

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


class Part(NamedTuple):
    """One layer of one of the stack's files."""

    layer: Layer
    use: int
    """Which of the stack's uses it comes from."""
    scale: float


class Dynamic(NamedTuple):
    """All that a stack adds to one module's output."""

    module: nn.Module
    target: Target
    parts: tuple[Part, ...]


@dataclass(frozen=True)
class Merge:
    """All that a stack does to one parameter."""

    module: nn.Module
    name: str
    target: Target
    parts: list[Part]


@dataclass
class Plan:
    """What is added in forwards, and what is written into weights."""

    modules: int
    """How many modules are changed."""
    dynamic: list[Dynamic] = field(default_factory=list)
    merges: dict[nn.Parameter, Merge] = field(default_factory=dict)
    """By parameter, not by module: what is shared must be rounded once."""
    forced: list[tuple[nn.Module, str]] = field(default_factory=list)
    """The layers that go dynamic although the stack is merged, since their weight cannot be written."""

    def is_stale(self) -> bool:
        """Whether a module has another parameter than when this was made, or it can be written now."""
        merges = self.merges.items()
        return any(writable(m.module, m.name) is not weight for weight, m in merges) or any(
            writable(*layer) is not None for layer in self.forced
        )


def make_plan(
    stack: Stack, mode: Mode, find: Callable[[Target], nn.Module], shared: Set[int]
) -> Plan:
    """The plan of a stack, which is dynamic or merged. `shared`: ids of parameters of several modules.

    Raises: LoraUnsupported if a layer cannot be changed in the way that its part needs.
    """
    parts: dict[tuple[Target, str], list[Part]] = defaultdict(list)
    for number, use in enumerate(stack):
        scales: dict[Target, float] = {}
        for layer in use.lora.layers:
            scale = scales.get(layer.target)
            if scale is None:
                scale = scales[layer.target] = use.scale_of(layer.target)
            if scale:
                parts[layer.target, layer.parameter].append(Part(layer, number, scale))
    plan = Plan(modules=len({target for target, _ in parts}))
    for (target, name), found in parts.items():
        module = find(target)
        weight = writable(module, name)
        forward = name == "weight" and takes_low_rank(module)
        if mode is Mode.MERGED and weight is not None and id(weight) not in shared:
            forward = False
        dynamic = [part for part in found if forward and part.layer.algorithm.is_low_rank]
        if dynamic:
            plan.dynamic.append(Dynamic(module, target, tuple(dynamic)))
            if mode is Mode.MERGED and weight is None:
                plan.forced.append((module, name))
        if len(dynamic) < len(found):
            rest = [part for part in found if part not in dynamic] if dynamic else found
            _add_merge(plan, Merge(module, name, target, rest), weight)
    return plan


def _add_merge(plan: Plan, merge: Merge, weight: nn.Parameter | None) -> None:
    if weight is None:
        raise LoraUnsupported(
            f"{merge.target} is quantised or offloaded, and {merge.parts[0].layer.algorithm.name} needs its "
            f"{merge.name} itself",
            "Only LoRA without extras can be applied to such layers.",
        )
    if weight in plan.merges:
        plan.merges[weight].parts.extend(merge.parts)
    else:
        plan.merges[weight] = merge
