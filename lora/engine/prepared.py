"""What a stack needs, kept ready for the next time."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import NamedTuple

from torch import Tensor, nn

from lora.engine.dynamic import AdaptedForward, Factors, make_factors, set_scales
from lora.engine.plan import Part, Plan
from lora.formats.algorithms import LowRank


class Ready(NamedTuple):
    """A module, what stands in for its `forward`, and with what."""

    module: nn.Module
    forward: AdaptedForward
    factors: Factors


@dataclass(frozen=True)
class Merged:
    """A weight's merged values, and which of its own values they were made from."""

    values: Tensor
    generation: int


@dataclass
class Prepared:
    """A stack's plan, factors and merged weights."""

    plan: Plan
    strengths: tuple[object, ...]
    file_bytes: int
    """What the plan keeps in memory: the parsed files."""
    factors: dict[tuple[nn.Module, tuple[int, ...]], Factors] = field(default_factory=dict)
    """By module and the uses that change it: a scale of 0 leaves one out."""
    merged: dict[nn.Parameter, Merged] = field(default_factory=dict)
    _ready: list[Ready] | None = None

    @property
    def merged_size(self) -> int:
        """Bytes of the merged weights."""
        return sum(m.values.numel() * m.values.element_size() for m in self.merged.values())

    @property
    def size(self) -> int:
        """Bytes of all of it."""
        factors = sum(one.size for one in self.factors.values())
        return self.file_bytes + factors + self.merged_size

    def ready(self, forward_of: Callable[[nn.Module], AdaptedForward]) -> list[Ready]:
        """The plan's dynamic layers, with their factors (made where they are missing) and scales.

        Raises: LoraIncompatible if a factor or scale overflows.
        """
        if self._ready is None:
            self._ready = self._make_ready(forward_of)
        return self._ready

    def _make_ready(self, forward_of: Callable[[nn.Module], AdaptedForward]) -> list[Ready]:
        layers = self.plan.dynamic
        keys = [(one.module, tuple(part.use for part in one.parts)) for one in layers]
        missing = [n for n, key in enumerate(keys) if key not in self.factors]
        made = make_factors(
            [
                (layers[n].module, str(layers[n].target), [_low_rank(p) for p in layers[n].parts])
                for n in missing
            ]
        )
        self.factors.update(zip((keys[n] for n in missing), made, strict=True))
        ready = [Ready(key[0], forward_of(key[0]), self.factors[key]) for key in keys]
        scales = [[part.scale for part in one.parts] for one in layers]
        set_scales([(one.factors, own) for one, own in zip(ready, scales, strict=True)])
        return ready


def _low_rank(part: Part) -> LowRank:
    found = part.layer.algorithm.low_rank()
    if found is None:
        raise TypeError(f"{part.layer.algorithm.name} has no factors")
    return found
