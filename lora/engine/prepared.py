"""What a stack needs to be applied: its plan, factors and merged weights, kept for the next time."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import NamedTuple

from torch import Tensor, nn

from lora.engine.dynamic import AdaptedForward, DeviceFactors, ScaledFactors, make_factors, scaled
from lora.engine.plan import Plan, PlannedLayer
from lora.formats.algorithms import LowRank


class Ready(NamedTuple):
    """A module, the replacement for its `forward`, and what this is to add."""

    module: nn.Module
    forward: AdaptedForward
    added: ScaledFactors


@dataclass(frozen=True)
class Merged:
    """A weight's merged values, and the generation of the originals that they were made from."""

    values: Tensor
    generation: int


@dataclass
class Prepared:
    """A stack's plan, factors and merged weights."""

    plan: Plan
    all_scales: tuple[object, ...]
    file_bytes: int
    """The bytes of the parsed files, which the plan keeps in memory."""
    factors: dict[tuple[nn.Module, tuple[int, ...]], DeviceFactors] = field(default_factory=dict)
    """By module and the indices of the uses that change it: a use with scale 0 does not."""
    merged: dict[nn.Parameter, Merged] = field(default_factory=dict)
    _ready: list[Ready] | None = None

    @property
    def merged_size(self) -> int:
        """The bytes of the merged weights."""
        return sum(m.values.numel() * m.values.element_size() for m in self.merged.values())

    @property
    def size(self) -> int:
        """The bytes of everything."""
        factors = sum(factors.size for factors in self.factors.values())
        return self.file_bytes + factors + self.merged_size

    def ready(self, forward_of: Callable[[nn.Module], AdaptedForward]) -> list[Ready]:
        """The plan's dynamic modules with their factors, made where they are missing, and their scales.

        Raises: LoraIncompatible if a factor or scale overflows.
        """
        if self._ready is None:
            wanted = {(d.module, tuple(p.use for p in d.layers)): d for d in self.plan.dynamic}
            missing = {key: d for key, d in wanted.items() if key not in self.factors}
            made = make_factors(
                [
                    (d.module, str(d.target), [_low_rank(p) for p in d.layers])
                    for d in missing.values()
                ]
            )
            self.factors.update(zip(missing, made, strict=True))
            scales = [(self.factors[key], [p.scale for p in d.layers]) for key, d in wanted.items()]
            self._ready = [
                Ready(module, forward_of(module), added)
                for (module, _), added in zip(wanted, scaled(scales), strict=True)
            ]
        return self._ready


def _low_rank(planned: PlannedLayer) -> LowRank:
    algorithm = planned.layer.algorithm
    factors = algorithm.low_rank()
    if factors is None:
        raise TypeError(f"{algorithm.name} has no factors")
    return factors
