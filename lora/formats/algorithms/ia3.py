"""IA3: one learned factor per input or output (arXiv 2205.05638).

LyCORIS stores what is added to 1, W' = W * (1 + w), and a tensor with the side (`IA3Module`). PEFT stores the
factor itself, W' = W * l, and its shape shows the side: [out, 1], or [1, in] for feed-forward layers.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from lora.formats.algorithms.base import Algorithm, Flaw, placed
from lora.formats.names.slots import Shape


@dataclass(frozen=True, eq=False)
class IA3(Algorithm):
    """LyCORIS' form."""

    name: ClassVar[str] = "ia3"

    weight: Tensor
    """[n] or [1, n, 1, 1], n the inputs or outputs."""
    on_input: Tensor
    """One number: 1 for the inputs, 0 for the outputs."""

    def misfit(self, shape: Shape) -> str | None:
        """See `Algorithm.misfit`."""
        if self.on_input.numel() != 1:
            return Flaw("on_input is not one number")
        if len(shape) < 2 or self.weight.numel() != shape[int(bool(self.on_input))]:
            return f"the factors {list(self.weight.shape)} do not fit the layer {list(shape)}"
        return None

    def delta(self, weight: Tensor) -> Tensor:
        """W * w."""
        return placed(weight, weight) * _along(self.weight, weight, int(bool(self.on_input)))


@dataclass(frozen=True, eq=False)
class PeftIA3(Algorithm):
    """PEFT's form."""

    name: ClassVar[str] = "ia3"

    ia3_l: Tensor
    """[out, 1], [1, in], or for a convolution [1, out, 1, 1] (outputs) or [1, in, 1, 1]."""
    on_input: Tensor | None = None
    """The side by PEFT's config, which is needed for square convolutions: their shape does not show it."""

    def misfit(self, shape: Shape) -> str | None:
        """See `Algorithm.misfit`."""
        if self._side(shape) is None:
            return f"the factors {list(self.ia3_l.shape)} do not fit the layer {list(shape)}"
        return None

    def _side(self, shape: Shape) -> int | None:
        ours, count = tuple(self.ia3_l.shape), self.ia3_l.numel()
        if len(shape) == 2 and len(ours) == 2:
            return next((side for side in (0, 1) if ours[side] == shape[side] == count), None)
        # A convolution's shape does not show the side; PEFT's default is the output.
        if len(shape) == 4 and len(ours) == 4 and ours[1] == count and count in shape[:2]:
            if self.on_input is not None and shape[0] == shape[1]:
                return int(bool(self.on_input))
            return shape.index(count)
        return None

    def delta(self, weight: Tensor) -> Tensor:
        """W * (l - 1)."""
        side = self._side(tuple(weight.shape)) or 0
        return placed(weight, weight) * (_along(self.ia3_l, weight, side) - 1)

    def companions(self, shape: Shape) -> tuple[Algorithm, ...]:
        """PEFT multiplies the whole output, the bias too."""
        return (PeftIA3Bias(self.ia3_l),) if self._side(shape) == 0 else ()


@dataclass(frozen=True, eq=False)
class PeftIA3Bias(Algorithm):
    """The outputs' factors on the bias: b' = b * l."""

    name: ClassVar[str] = "ia3"
    parameter: ClassVar[str] = "bias"
    ia3_l: Tensor

    def misfit(self, shape: Shape) -> str | None:
        """See `Algorithm.misfit`."""
        fits = (self.ia3_l.numel(),) == shape
        return None if fits else f"{list(self.ia3_l.shape)} does not fit the bias {list(shape)}"

    def delta(self, weight: Tensor) -> Tensor:
        """b * (l - 1)."""
        return placed(weight, weight) * (_along(self.ia3_l, weight, 0) - 1)


def _along(factors: Tensor, weight: Tensor, side: int) -> Tensor:
    """The factors, shaped to multiply one axis of the weight."""
    shape = [1] * weight.dim()
    shape[side] = -1
    return placed(factors, weight).reshape(shape)
