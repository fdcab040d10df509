"""LoKr: the Kronecker product of two small matrices (LyCORIS `lokr`; arXiv 2309.14859).

W' = W + scaling * kron(w1, w2), where w1 and w2 are each whole or two factors; a convolution's w2 may also be
in Tucker form. scaling is alpha / rank. If both are whole, there is no rank, and scaling is 1 (LyCORIS'
`LokrModule` sets alpha to the rank then, and trainers write any number).
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
class LoKr(Algorithm):
    """kron(w1, w2), with w1 [out / k, in / n] and w2 [k, n(, kh, kw)]."""

    name: ClassVar[str] = "lokr"

    lokr_w1: Tensor | None = None
    lokr_w1_a: Tensor | None = None
    """[out / k, rank]."""
    lokr_w1_b: Tensor | None = None
    """[rank, in / n]."""
    lokr_w2: Tensor | None = None
    lokr_w2_a: Tensor | None = None
    """[k, rank]; in Tucker form [rank, k]."""
    lokr_w2_b: Tensor | None = None
    """[rank, n * kh * kw], or the same unflattened; in Tucker form [rank, n]."""
    lokr_t2: Tensor | None = None
    """[rank, rank, kh, kw]."""
    alpha: Tensor | None = None

    @property
    def rank(self) -> int | None:
        """Rows of the second factor's `_b`, else of the first's; None if both are whole."""
        factors = (self.lokr_w2_b, self.lokr_w1_b)
        return next((f.shape[0] for f in factors if f is not None and f.dim()), None)

    def misfit(self, shape: Shape) -> str | None:
        """See `Algorithm.misfit`."""
        first, trouble = _shape_of("lokr_w1", self.lokr_w1, self.lokr_w1_a, self.lokr_w1_b, None)
        if trouble:
            return Flaw(trouble)
        second, trouble = _shape_of(
            "lokr_w2", self.lokr_w2, self.lokr_w2_a, self.lokr_w2_b, self.lokr_t2
        )
        if trouble:
            return Flaw(trouble)
        if len(shape) < 2:
            return f"a Kronecker product is no {list(shape)}"
        columns = math.prod(second[1:])
        whole = first[0] * second[0], first[1] * columns
        fits = len(first) == 2 and whole == (shape[0], math.prod(shape[1:]))
        fits = fits and second[2:] in ((), shape[2:])
        if not fits:
            return f"lokr_w1 {list(first)} and lokr_w2 {list(second)} do not fit the layer {list(shape)}"
        return None

    @property
    def needs_weight(self) -> bool:
        """False."""
        return False

    def delta(self, weight: Tensor) -> Tensor:
        """scaling * kron(w1, w2)."""
        first = _whole(self.lokr_w1, self.lokr_w1_a, self.lokr_w1_b, None, weight)
        second = _whole(self.lokr_w2, self.lokr_w2_a, self.lokr_w2_b, self.lokr_t2, weight)
        # Flat: ComfyUI's trainer splits in * kh * kw, and w2 need not hold whole kernels.
        product = torch.kron(first, second.flatten(1))
        factor = 1.0 if self.rank is None else scaling(self.alpha, self.rank)
        return product.mul_(factor).reshape(weight.shape)


def _shape_of(
    name: str, whole: Tensor | None, a: Tensor | None, b: Tensor | None, core: Tensor | None
) -> tuple[Shape, str | None]:
    """The shape of one factor of the product, and what is wrong with it, if anything."""
    if whole is not None and a is None and b is None and core is None:
        return tuple(whole.shape), None if whole.dim() >= 2 else f"{name} is no matrix"
    if whole is not None or a is None or b is None:
        return (), f"{name} is neither one whole matrix nor two factors"
    if a.dim() < 2 or b.dim() < 2:
        return (), f"a factor of {name} has less than two dimensions"
    if core is None:
        fits = a.dim() == 2 and a.shape[1] == b.shape[0]
        shape = (a.shape[0], b[0].numel())
    else:
        fits = (a.dim(), b.dim(), core.dim()) == (2, 2, 4)
        fits = fits and tuple(core.shape[:2]) == (a.shape[0], b.shape[0])
        shape = (a.shape[1], b.shape[1], *core.shape[2:])
    return shape, None if fits else f"the factors of {name} do not fit together"


def _whole(
    whole: Tensor | None, a: Tensor | None, b: Tensor | None, core: Tensor | None, weight: Tensor
) -> Tensor:
    if whole is not None:
        return placed(whole, weight)
    if a is None or b is None:  # `misfit` has refused it
        raise ValueError("a factor is missing")
    if core is None:
        return placed(a, weight) @ placed(b, weight).flatten(1)
    return tucker(placed(core, weight), placed(a, weight), placed(b, weight))
