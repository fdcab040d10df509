"""HRA: the inputs of a layer reflected at a chain of planes (arXiv 2405.17484; PEFT's `hra`).

W' = W H1 H2 ... Hr with H = I - 2 u u^T / |u|^2, as PEFT's `HRALinear.get_delta_weight` multiplies them. With
`apply_GS` the vectors are made orthogonal first, one after the other.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from lora.formats.algorithms.base import Algorithm, placed
from lora.formats.names.slots import Shape


@dataclass(frozen=True, eq=False)
class HRA(Algorithm):
    """PEFT's Householder reflections."""

    name: ClassVar[str] = "hra"

    hra_u: Tensor
    """[in * kh * kw, rank]: one vector per reflection."""
    gram_schmidt: Tensor | None = None
    """Whether the vectors are made orthogonal, by PEFT's config."""

    @property
    def rank(self) -> int | None:
        """How many reflections there are."""
        return self.hra_u.shape[1] if self.hra_u.dim() == 2 else None

    def misfit(self, shape: Shape) -> str | None:
        """See `Algorithm.misfit`."""
        inputs = math.prod(shape[1:])
        if self.hra_u.dim() != 2 or len(shape) < 2 or self.hra_u.shape[0] != inputs:
            return f"hra_u {list(self.hra_u.shape)} does not fit the layer {list(shape)}"
        return None

    def delta(self, weight: Tensor) -> Tensor:
        """W H1 ... Hr - W."""
        base = placed(weight, weight).flatten(1)
        vectors = placed(self.hra_u, weight)
        orthogonal = self.gram_schmidt is not None and bool(self.gram_schmidt)
        turned, done = base.clone(), list[Tensor]()
        for vector in vectors.unbind(1):
            for other in done if orthogonal else ():
                vector = vector - (other @ vector) * other  # noqa: PLW2901
            # A vector of zeros has no plane: it reflects nothing, and does not become NaN.
            unit = vector / torch.linalg.vector_norm(vector).clamp_min(1e-30)
            done.append(unit)
            turned.addr_(turned @ unit, unit, alpha=-2.0)
        return (turned - base).reshape(weight.shape)
