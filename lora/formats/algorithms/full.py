"""Whole parameters: a difference to add, or a new value.

W' = W + diff (LyCORIS `full` and `norm`, LightX2V's `diff`, `diff_b`, `diff_m`), or W' = value (ComfyUI's
`set_weight`, PEFT's `modules_to_save` and trained biases).
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import ClassVar

from torch import Tensor

from lora.formats.algorithms.base import Algorithm, placed
from lora.formats.names.slots import Shape


@dataclass(frozen=True, eq=False)
class _Whole(Algorithm):
    """The common base: one tensor in the parameter's own shape, except for axes of length 1."""

    name: ClassVar[str] = "full"

    @property
    def _tensor(self) -> Tensor:
        """The subclass's first field, which is named after its slot."""
        tensor: Tensor = getattr(self, fields(self)[0].name)
        return tensor

    def misfit(self, shape: Shape) -> str | None:
        """See `Algorithm.misfit`."""
        ours = tuple(self._tensor.shape)
        same = [n for n in ours if n != 1] == [n for n in shape if n != 1]
        return None if same else f"{list(ours)} is not the parameter's shape {list(shape)}"


class _Difference(_Whole):
    @property
    def needs_weight(self) -> bool:
        """False."""
        return False

    def delta(self, weight: Tensor) -> Tensor:
        """The difference."""
        return placed(self._tensor, weight).reshape(weight.shape)


class _Value(_Whole):
    def delta(self, weight: Tensor) -> Tensor:
        """The value less the original."""
        return placed(self._tensor, weight).reshape(weight.shape) - placed(weight, weight)


@dataclass(frozen=True, eq=False)
class WeightDifference(_Difference):
    """A weight's difference."""

    diff: Tensor
    alpha: Tensor | None = None
    """Some tools write it. It has no effect, since a difference has no rank."""


@dataclass(frozen=True, eq=False)
class BiasDifference(_Difference):
    """A bias' difference."""

    parameter: ClassVar[str] = "bias"
    diff_b: Tensor


@dataclass(frozen=True, eq=False)
class ModulationDifference(_Difference):
    """The difference of a block's modulation table (Wan; diffusers calls it `scale_shift_table`)."""

    parameter: ClassVar[str] = "modulation"
    diff_m: Tensor


@dataclass(frozen=True, eq=False)
class WeightValue(_Value):
    """A weight's new value."""

    weight: Tensor


@dataclass(frozen=True, eq=False)
class BiasValue(_Value):
    """A bias' new value."""

    parameter: ClassVar[str] = "bias"
    bias: Tensor
