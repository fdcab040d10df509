"""The algorithms that adapters use, one file each, and the one table that lists them.

An algorithm is a frozen dataclass whose fields are the tensors of one layer of a file, named as the slots
of `formats/names/keys.py`. To add one: write its file, add a row here and its suffixes to `keys.SLOTS`.

Semantics that all share:

- `delta` is W' - W at scale 1, in float32; the engine adds scale * delta to W and rounds once, after it
  added up everything. So a multiplicative algorithm is W + scale * (W' - W): 0 is the base, 1 as trained.
- Every part's delta is taken from the original W, whatever else changes the layer: kinds mix on one layer
  as the sum of their changes, and the order of a stack does not matter beyond float32's rounding.
  The sum itself goes in the stack's order, within one file in the order of this table.
- `alpha` missing or 0 means alpha = rank, as the trainers have it.
"""

from __future__ import annotations

from collections.abc import Mapping, Set
from dataclasses import dataclass
from functools import lru_cache

from torch import Tensor

from lora.formats.algorithms.base import Algorithm, LowRank, slots_of
from lora.formats.algorithms.dora import DoRA
from lora.formats.algorithms.full import (
    BiasDifference,
    BiasValue,
    ModulationDifference,
    WeightDifference,
    WeightValue,
)
from lora.formats.algorithms.glora import GLoRA
from lora.formats.algorithms.ia3 import IA3, PeftIA3
from lora.formats.algorithms.loha import LoHa
from lora.formats.algorithms.lokr import LoKr
from lora.formats.algorithms.lora import LoRA, LoRABias
from lora.formats.algorithms.oft import OFT, PeftOFT

ALGORITHMS: tuple[type[Algorithm], ...] = (
    LoRABias,  # before LoRA, from which it borrows
    LoRA,
    LoHa,
    LoKr,
    GLoRA,
    OFT,
    PeftOFT,
    IA3,  # before WeightValue, whose only slot it has too
    PeftIA3,
    WeightDifference,
    BiasDifference,
    ModulationDifference,
    WeightValue,
    BiasValue,
)

DECOMPOSABLE = (LoRA, LoHa, LoKr)
"""What DoRA can stand over."""

MAGNITUDES = {"dora_scale": True, "magnitude": False}
"""A DoRA layer's own slot -> whether it may belong to the inputs (see `DoRA`)."""

__all__ = ["ALGORITHMS", "Algorithm", "DoRA", "LowRank", "Recipe", "recipes"]


@dataclass(frozen=True)
class Recipe:
    """How some of a module's slots make up one algorithm."""

    algorithm: type[Algorithm]
    reads: tuple[str, ...]
    """The slots that go into its fields."""
    used: Set[str]
    """The slots that belong to it alone."""
    magnitude: str | None
    """The slot that makes it a DoRA over the algorithm."""

    def make(self, slots: Mapping[str, Tensor]) -> Algorithm:
        """The part."""
        part = self.algorithm(**{name: slots[name] for name in self.reads})
        if self.magnitude:
            return DoRA(part, slots[self.magnitude], MAGNITUDES[self.magnitude])
        return part


@lru_cache(maxsize=256)  # a file has a handful of different layers; their names may be a stranger's
def recipes(slots: Set[str]) -> tuple[tuple[Recipe, ...], Set[str]]:
    """The algorithms that slots of these names make up, in the table's order, and the slots that are left."""
    left, found = set(slots), []
    for algorithm in ALGORITHMS:
        reads, used = slots_of(algorithm, left)
        if not used:
            continue
        magnitude = next((slot for slot in MAGNITUDES if slot in left), None)
        if algorithm not in DECOMPOSABLE:
            magnitude = None
        used = used | ({magnitude} if magnitude else set())
        found.append(Recipe(algorithm, reads, used, magnitude))
        left -= used
    return tuple(found), frozenset(left)
