"""DoRA: an additive change, with the norms of the merged weight learned separately (arXiv 2402.09353).

W' = m * (W + D) / norm(W + D), where D is the inner algorithm's change at scale 1. The norm is taken over all
axes but one: the output's (LyCORIS' `weight_decompose` with `wd_on_out`, PEFT's `lora_magnitude_vector`)
or the input's (older LyCORIS, OneTrainer). Scaled: W + scale * (W' - W), so 0 is the base, 1 as trained.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from lora.formats.algorithms.base import Algorithm, placed
from lora.formats.names.slots import Shape


@dataclass(frozen=True, eq=False)
class DoRA(Algorithm):
    """An inner algorithm and the magnitudes."""

    name: ClassVar[str] = "dora"

    inner: Algorithm
    magnitude: Tensor
    """One value per output ([out], [out, 1(, 1, 1)]) or, if `may_be_input`, per input ([1, in(, 1, 1)])."""
    may_be_input: bool
    """False for PEFT, whose [1, out, 1, 1] for convolutions is the output's."""

    @property
    def rank(self) -> int | None:
        """The inner algorithm's."""
        return self.inner.rank

    def misfit(self, shape: Shape) -> str | None:
        """See `Algorithm.misfit`."""
        if self._axis(shape) is None:
            return f"the magnitudes {list(self.magnitude.shape)} do not fit the layer {list(shape)}"
        return self.inner.misfit(shape)

    def _axis(self, shape: Shape) -> int | None:
        """The axis that the magnitudes belong to: 0 (outputs) or 1 (inputs); None if they fit neither."""
        ours, count = tuple(self.magnitude.shape), self.magnitude.numel()
        if len(shape) < 2:
            return None
        if self.may_be_input and len(ours) >= 2 and ours[0] == 1 and shape[0] != 1:
            return 1 if ours[1] == shape[1] == count else None
        return 0 if count == shape[0] else None

    def delta(self, weight: Tensor) -> Tensor:
        """m * (W + D) / norm(W + D) - W."""
        base = placed(weight, weight)
        merged = self.inner.delta(weight).add_(base)
        axis = self._axis(tuple(weight.shape))
        others = [dim for dim in range(weight.dim()) if dim != axis]
        norm = torch.linalg.vector_norm(merged, dim=others, keepdim=True)
        # A row of zeros has no direction: it stays zero, and does not become NaN.
        factor = placed(self.magnitude, weight).reshape(norm.shape) / norm.clamp_min_(1e-30)
        return merged.mul_(factor).sub_(base)
