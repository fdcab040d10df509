"""The algorithms that adapters use, one file each, and the one table that lists them.

An algorithm is a frozen dataclass whose fields are the tensors of one layer of a file, named as the slots
of `formats/names/slots.py`. To add one: write its file, add a row here and its suffixes to `slots.SLOTS`.

All algorithms share these semantics:

- `delta` is W' - W at scale 1, in float32. The engine adds up scale * delta of the whole stack, adds this
  to W and rounds once. So a multiplicative algorithm is W + scale * (W' - W): 0 is the base, 1 as trained.
- Every delta is computed from the original W, also where other changes apply. So different algorithms on one
  layer add up, and the order of a stack does not matter beyond float32's rounding. The sum is taken in the
  stack's order, and within one file in the order of this table.
- `alpha` missing or 0 means alpha = rank, as the trainers define it.
"""

from __future__ import annotations

from collections.abc import Mapping, Set
from dataclasses import dataclass
from functools import lru_cache

from torch import Tensor

from lora.formats.algorithms.adalora import AdaLoRA
from lora.formats.algorithms.base import Algorithm, Flaw, LowRank, slots_of
from lora.formats.algorithms.dora import DoRA
from lora.formats.algorithms.full import (
    BiasDifference,
    BiasValue,
    ModulationDifference,
    WeightDifference,
    WeightValue,
)
from lora.formats.algorithms.glora import GLoRA
from lora.formats.algorithms.hra import HRA
from lora.formats.algorithms.ia3 import IA3, PeftIA3
from lora.formats.algorithms.loha import LoHa
from lora.formats.algorithms.lokr import LoKr
from lora.formats.algorithms.lora import LoRA, LoRABias
from lora.formats.algorithms.miss import MiSS
from lora.formats.algorithms.oft import OFT
from lora.formats.algorithms.peft_boft import PeftBOFT
from lora.formats.algorithms.peft_oft import PeftOFT
from lora.formats.algorithms.randlora import RandLoRA

ALGORITHMS: tuple[type[Algorithm], ...] = (
    LoRABias,  # before LoRA, whose tensors it reads too
    LoRA,
    LoHa,
    LoKr,
    GLoRA,
    OFT,
    PeftOFT,
    PeftBOFT,
    HRA,
    MiSS,
    RandLoRA,
    AdaLoRA,
    IA3,  # before WeightValue, whose only slot it has too
    PeftIA3,
    WeightDifference,
    BiasDifference,
    ModulationDifference,
    WeightValue,
    BiasValue,
)

DECOMPOSABLE = (LoRA, LoHa, LoKr)
"""The algorithms that a DoRA can have as its inner one."""

MAGNITUDES = {"dora_scale": True, "magnitude": False}
"""A DoRA layer's own slot -> whether it may belong to the inputs (see `DoRA`)."""

__all__ = ["ALGORITHMS", "Algorithm", "DoRA", "Flaw", "LowRank", "Recipe", "recipes"]


@dataclass(frozen=True)
class Recipe:
    """Which of a module's slots make up one algorithm."""

    algorithm: type[Algorithm]
    reads: tuple[str, ...]
    """The slots that go into its fields."""
    used: Set[str]
    """The slots that no other algorithm may use."""
    magnitude: str | None
    """The slot of magnitudes, if it is a DoRA over the algorithm."""

    def make(self, slots: Mapping[str, Tensor]) -> Algorithm:
        """The algorithm with its tensors."""
        made = self.algorithm(**{name: slots[name] for name in self.reads})
        if self.magnitude:
            return DoRA(made, slots[self.magnitude], MAGNITUDES[self.magnitude])
        return made


@lru_cache(maxsize=256)  # a file has a handful of kinds of layers, and may name slots as it likes
def recipes(slots: Set[str]) -> tuple[tuple[Recipe, ...], Set[str]]:
    """The algorithms that slots of these names make up, in the table's order, and the slots that are left."""
    left, made = set(slots), []
    for algorithm in ALGORITHMS:
        reads, used = slots_of(algorithm, left)
        if not used:
            continue
        magnitudes = [slot for slot in MAGNITUDES if slot in left and algorithm in DECOMPOSABLE]
        used |= set(magnitudes[:1])
        made.append(Recipe(algorithm, reads, used, next(iter(magnitudes), None)))
        left -= used
    return tuple(made), frozenset(left)
