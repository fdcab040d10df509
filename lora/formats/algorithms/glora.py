"""GLoRA (arXiv 2306.07967; LyCORIS `glora`): a low-rank change of the weight's inputs, plus an added one.

W' = W + alpha / rank * (W a1 a2 + b1 b2), as LyCORIS' `GLoRAModule` computes it. In an older layout the
factors of each pair are swapped, which their shapes show. PEFT's GLoRA is another method.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from lora.formats.algorithms.base import Algorithm, Flaw, placed, scaling, tucker
from lora.formats.names.slots import Shape


@dataclass(frozen=True, eq=False)
class GLoRA(Algorithm):
    """Two factor pairs, a and b."""

    name: ClassVar[str] = "glora"

    a1: Tensor
    """[in, rank(, 1, 1)]; in the older layout a1 and a2 are swapped."""
    a2: Tensor
    """[rank, in(, 1, 1)]."""
    b1: Tensor
    """[out, rank(, 1, 1)]; in the older layout b1 and b2 are swapped."""
    b2: Tensor
    """[rank, in(, kh, kw)]."""
    bm: Tensor | None = None
    """[rank, rank, kh, kw]; then b2 is [rank, in, 1, 1]."""
    alpha: Tensor | None = None

    @property
    def rank(self) -> int:
        """The shorter side of b1."""
        return min(self.b1.shape[:2]) if self.b1.dim() >= 2 else 0

    def misfit(self, shape: Shape) -> str | None:
        """See `Algorithm.misfit`."""
        factors = (self.a1, self.a2, self.b1, self.b2)
        if any(factor.dim() < 2 for factor in factors):
            return Flaw("a factor has less than two dimensions")
        if self._ordered(shape) is None:
            shapes = [list(factor.shape) for factor in factors]
            return f"factors {shapes} do not fit the layer {list(shape)}"
        return None

    def _ordered(self, shape: Shape) -> tuple[Tensor, Tensor, Tensor, Tensor] | None:
        """a1, a2, b1, b2 in today's layout; None if neither layout fits."""
        if len(shape) not in (2, 4):
            return None
        for a1, a2, b1, b2 in (
            (self.a1, self.a2, self.b1, self.b2),
            (self.a2, self.a1, self.b2, self.b1),
        ):
            rank, inputs = a2.shape[0], shape[1]
            fits = a1.shape[0] == a2.shape[1] == a2[0].numel() == inputs and b1.shape[0] == shape[0]
            fits = fits and a1[0].numel() == b1[0].numel() == b2.shape[0] == rank
            if self.bm is None:
                fits = fits and b2[0].numel() == math.prod(shape[1:])
            else:
                fits = fits and b2[0].numel() == inputs
                fits = fits and self.bm.shape == (rank, rank, *shape[2:])
            if fits:
                return a1, a2, b1, b2
        return None

    def delta(self, weight: Tensor) -> Tensor:
        """scaling * (W a1 a2 + b1 b2)."""
        ordered = self._ordered(tuple(weight.shape))
        if ordered is None:
            raise ValueError("the factors do not fit")  # `misfit` has refused it
        a1, a2, b1, b2 = (placed(t, weight).flatten(1) for t in ordered)
        base = placed(weight, weight)
        inside = torch.einsum("oi...,ir->or...", base, a1)
        change = torch.einsum("or...,rj->oj...", inside, a2)
        if self.bm is None:
            added = (b1 @ b2).reshape(weight.shape)
        else:
            added = tucker(placed(self.bm, weight), b1.t(), b2)
        return change.add_(added).mul_(scaling(self.alpha, ordered[1].shape[0]))
