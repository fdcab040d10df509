"""What an extraction tells: of every tensor, and of all of them."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class LayerReport:
    """One parameter that changed, and how well the file says so."""

    name: str
    """Component, module and parameter, with dots between."""
    shape: tuple[int, ...]
    kind: str
    """`lora`, `tucker` or `diff`."""
    rank: int | None
    dtype: str
    bytes: int
    energy: float
    """||D||_F^2, D = target - source."""
    kept: float
    """The share of it that the rank keeps, before rounding: 1 - (||D||^2 - sum s^2) / ||D||^2."""
    error: float
    """||D - D'||_F^2, D' what the stored numbers, as they were rounded, give."""
    largest: float
    """The largest |D - D'|."""
    unequal: int | None = None
    """Of a difference: how many numbers of source + difference do not round to the target's."""

    @property
    def relative_error(self) -> float:
        """||D - D'||_F / ||D||_F."""
        return math.sqrt(self.error / self.energy) if self.energy else 0.0

    def as_note(self) -> dict[str, Any]:
        """Plain values, for a journal."""
        return asdict(self)

    @classmethod
    def of_note(cls, note: Mapping[str, Any]) -> LayerReport:
        """What `as_note` gave."""
        return cls(**{**note, "shape": tuple(note["shape"])})


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
    """How many numbers differ, of `numbers`."""
    numbers: int


@dataclass(frozen=True)
class ExtractReport:
    """The whole of it. Layers, what was left out and what did not change are together both models."""

    output: Path
    layers: Sequence[LayerReport]
    left_out: Sequence[LeftOut]
    unchanged: int
    """Tensors that are the same, bit for bit."""
    resumed: int
    """Layers that a run which was killed had already written."""
    bytes: int
    seconds: float
    verified: Verified | None = None

    @property
    def energy(self) -> float:
        """||D||_F^2 over all layers."""
        return math.fsum(layer.energy for layer in self.layers)

    @property
    def relative_error(self) -> float:
        """Over all layers, after rounding."""
        error = math.fsum(layer.error for layer in self.layers)
        return math.sqrt(error / self.energy) if self.energy else 0.0

    @property
    def kept(self) -> float:
        """The share of the energy that the ranks keep, over all layers."""
        kept = math.fsum(layer.kept * layer.energy for layer in self.layers)
        return kept / self.energy if self.energy else 1.0

    @property
    def inexact(self) -> Sequence[LayerReport]:
        """The differences that do not give the target back, number by number."""
        return [layer for layer in self.layers if layer.unequal]
