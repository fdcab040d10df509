"""A convolution's change as a small core between two thin matrices: LyCORIS' form with `lora_mid`.

D[o, i, h, w] = sum up[o, m] core[m, n, h, w] down[n, i]. The sequentially truncated higher-order SVD
(Vannieuwenhoven, Vandebril, Meerbergen 2012) to begin with, then a sweep of higher-order orthogonal iteration
(De Lathauwer, De Moor, Vandewalle 2000). Its error is at most sqrt(2) times the best of its kind.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from lora.tools.factors.svd import energy, truncated_svd


@dataclass(frozen=True, eq=False)
class TuckerFactors:
    """The approximation's three tensors, float32."""

    up: Tensor
    """[out, r], orthonormal columns."""
    core: Tensor
    """[r, r, kh, kw]."""
    down: Tensor
    """[r, in], orthonormal rows."""
    total: float
    """||D||_F^2 of the whole change."""

    @property
    def residual(self) -> float:
        """||D - D'||_F^2: the core has all of the energy that is kept."""
        return max(0.0, self.total - energy(self.core))

    def balanced(self) -> tuple[Tensor, Tensor, Tensor]:
        """(up, core, down) with the change's size spread evenly over the three."""
        size = energy(self.core) ** (1 / 6)
        if not size:
            return self.up, self.core, self.down
        return self.up * size, self.core / size**2, self.down * size


def tucker_svd(weight: Tensor, rank: int, seed: int = 0) -> TuckerFactors:
    """Factors of a float32 [out, in, kh, kw] with `rank` columns on both sides, or as many as it has."""
    rank = min(rank, *weight.shape[:2])
    down = _inputs(weight, rank, seed)
    up = _outputs(weight, down, rank, seed)
    down = _inputs(torch.einsum("oihw,om->mihw", weight, up), rank, seed)
    up = _outputs(weight, down, rank, seed)
    core = torch.einsum("oihw,om,ni->mnhw", weight, up, down)
    return TuckerFactors(up, core, down, energy(weight))


def _inputs(weight: Tensor, rank: int, seed: int) -> Tensor:
    """The leading directions of the inputs: [r, in]."""
    matrix = weight.movedim(1, 0).flatten(1)
    return truncated_svd(matrix, rank, seed).up.t()


def _outputs(weight: Tensor, down: Tensor, rank: int, seed: int) -> Tensor:
    """The leading directions of the outputs of what the inputs' leave: [out, r]."""
    matrix = torch.einsum("oihw,ni->onhw", weight, down).flatten(1)
    return truncated_svd(matrix, rank, seed).up
