"""LoHa: the elementwise product of two low-rank matrices (arXiv 2108.06098; LyCORIS `loha`).

W' = W + alpha / rank * (w1_a @ w1_b) * (w2_a @ w2_b), as LyCORIS' `LohaModule.forward` computes it. LyCORIS'
merge applies alpha / rank twice; the trained network does not, and neither do we.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from lora.formats.algorithms.base import Algorithm, Flaw, placed, scaling, tucker
from lora.formats.names.slots import Shape


@dataclass(frozen=True, eq=False)
class LoHa(Algorithm):
    """Two factor pairs; with `hada_t1` and `hada_t2`, each pair in Tucker form for a convolution."""

    name: ClassVar[str] = "loha"

    hada_w1_a: Tensor
    """[out, rank]; in Tucker form [rank, out]."""
    hada_w1_b: Tensor
    """[rank, in * kh * kw], or the same unflattened; in Tucker form [rank, in]."""
    hada_w2_a: Tensor
    hada_w2_b: Tensor
    hada_t1: Tensor | None = None
    """[rank, rank, kh, kw]."""
    hada_t2: Tensor | None = None
    alpha: Tensor | None = None

    @property
    def rank(self) -> int:
        """Rows of hada_w1_b."""
        return self.hada_w1_b.shape[0]

    def misfit(self, shape: Shape) -> str | None:
        """See `Algorithm.misfit`."""
        pairs = (
            (self.hada_w1_a, self.hada_w1_b, self.hada_t1),
            (self.hada_w2_a, self.hada_w2_b, self.hada_t2),
        )
        if any(t.dim() < 2 for pair in pairs for t in pair if t is not None):
            return Flaw("a factor has less than two dimensions")
        if (self.hada_t1 is None) != (self.hada_t2 is None):
            return Flaw("only one of hada_t1 and hada_t2 is there")
        for a, b, core in pairs:
            if core is None:
                fits = a.shape[0] == shape[0] and b[0].numel() == math.prod(shape[1:])
                fits = fits and a[0].numel() == b.shape[0]
            else:
                fits = (a.shape[-1], b.shape[-1]) == shape[:2] and core.shape[2:] == shape[2:]
                fits = fits and tuple(core.shape[:2]) == (a.shape[0], b.shape[0])
                fits = fits and (a.dim(), b.dim(), core.dim()) == (2, 2, 4)
            if not fits:
                return f"factors {list(a.shape)} and {list(b.shape)} do not fit the layer {list(shape)}"
        return None

    @property
    def needs_weight(self) -> bool:
        """False."""
        return False

    def delta(self, weight: Tensor) -> Tensor:
        """scaling * (w1_a @ w1_b) * (w2_a @ w2_b)."""
        first = _pair(self.hada_w1_a, self.hada_w1_b, self.hada_t1, weight)
        second = _pair(self.hada_w2_a, self.hada_w2_b, self.hada_t2, weight)
        return first.mul_(second).mul_(scaling(self.alpha, self.rank)).reshape(weight.shape)


def _pair(a: Tensor, b: Tensor, core: Tensor | None, weight: Tensor) -> Tensor:
    """One factor of the elementwise product: [out, in * kh * kw], or [out, in, kh, kw] in Tucker form."""
    a, b = placed(a, weight), placed(b, weight)
    if core is None:
        return a.flatten(1) @ b.flatten(1)
    return tucker(placed(core, weight), a, b)
