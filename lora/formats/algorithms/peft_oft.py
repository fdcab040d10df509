"""PEFT's and OneTrainer's OFT: the inputs of a layer rotated in blocks (arXiv 2306.07280).

W' = W R^T. The file has the upper triangle of each block's skew matrix Q. R is the Cayley transform's Neumann
series of a few terms, as PEFT's `OFTRotationModule._cayley_batch` computes it, unless its config says
otherwise. OneTrainer's `OFTModule` does the same for linear layers, and multiplies a convolution by R in
place of R^T; its scaled form divides the stored numbers by 2 sqrt(b - 1), b the size of a block.

Of OneTrainer's pull requests: 1492 (`clipped_oft`) shrinks a Q whose spectral norm is over the number that
the file has, which the trainer estimates by power iteration; 1512 (`cans_oft`) iterates towards the exact
transform (I + Q)(I - Q)^-1; 1335 (DoRA over OFT) multiplies the outputs: by exp(`dora_log_multiplier`), by
`dora_multiplier`, or, as it was at first, by `dora_scale` / `initial_norm`, the rows' norms before training.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from lora.formats.algorithms.base import Algorithm, Flaw, placed
from lora.formats.names.slots import Shape


def block_size(oft_r: Tensor) -> int:
    """b, of [n, b (b - 1) / 2]."""
    return (1 + math.isqrt(1 + 8 * oft_r.shape[-1])) // 2


@dataclass(frozen=True, eq=False)
class PeftOFT(Algorithm):
    """Rotations of blocks of inputs, and factors of the outputs."""

    name: ClassVar[str] = "oft"

    oft_r: Tensor
    """[n, b (b - 1) / 2]: the upper triangle of each block's Q; one block may serve for all inputs."""
    neumann_terms: Tensor | None = None
    """How many terms of the series; 0 for the exact transform (I - Q)(I + Q)^-1; PEFT's default is 5."""
    turned_back: Tensor | None = None
    """Whether R stands in the place of R^T: Q has the other sign."""
    scaled_oft: Tensor | None = None
    """Whether Q is 2 sqrt(b - 1) times as small as its numbers say."""
    clipped_oft: Tensor | None = None
    """The largest spectral norm of a Q."""
    cans_oft: Tensor | None = None
    """Whether R is (I + Q)(I - Q)^-1, in place of the series."""
    dora_log_multiplier: Tensor | None = None
    """[out], as `dora_multiplier` and the two that follow; a layer has one kind of them."""
    dora_multiplier: Tensor | None = None
    dora_scale: Tensor | None = None
    initial_norm: Tensor | None = None
    """Beside `dora_scale`; without it, the weight's own norms."""

    @property
    def rank(self) -> int:
        """The size of a block."""
        return block_size(self.oft_r)

    def plain(self) -> Tensor:
        """The triangles of Q as PEFT has them, for W R^T without a scale."""
        sign = -1.0 if self.turned_back is not None and bool(self.turned_back) else 1.0
        if self.scaled_oft is not None and bool(self.scaled_oft):
            sign /= 2 * math.sqrt(max(1, self.rank - 1))
        return self.oft_r if sign == 1.0 else self.oft_r.float() * sign

    @property
    def _factors(self) -> list[Tensor]:
        """Of the outputs: one tensor at most, and the norms by which it is divided."""
        kinds = (self.dora_log_multiplier, self.dora_multiplier, self.dora_scale, self.initial_norm)
        return [tensor for tensor in kinds if tensor is not None]

    def misfit(self, shape: Shape) -> str | None:
        """See `Algorithm.misfit`."""
        triangles, size = tuple(self.oft_r.shape), self.rank if self.oft_r.dim() == 2 else 0
        inputs = math.prod(shape[1:])
        if len(triangles) != 2 or size * (size - 1) // 2 != triangles[1]:
            return Flaw(f"oft_R {list(triangles)} holds no upper triangles")
        if self.clipped_oft is not None and float(self.clipped_oft) <= 0:
            return Flaw("clipped_oft is no norm")
        alone = self.initial_norm is not None and self.dora_scale is None
        if alone or len(self._factors) > (1 if self.initial_norm is None else 2):
            return Flaw("the factors of the outputs do not fit together")
        if triangles[0] * size != inputs and (triangles[0] != 1 or inputs % size):
            return f"oft_R {list(triangles)} does not make up the {inputs} inputs of the layer"
        for factors in self._factors:
            if factors.numel() != shape[0]:
                return f"the factors {list(factors.shape)} do not fit the layer {list(shape)}"
        return None

    def delta(self, weight: Tensor) -> Tensor:
        """W R^T - W, the outputs multiplied where it is a DoRA."""
        base = placed(weight, weight).flatten(1)
        size = self.rank
        blocks = base.reshape(base.shape[0], -1, size).transpose(0, 1)
        rotation = self._rotation(weight).expand(blocks.shape[0], size, size)
        turned = torch.bmm(blocks, rotation.transpose(1, 2)).transpose(0, 1).reshape(base.shape)
        if self._factors:
            turned = turned * self._multipliers(base)
        return (turned - base).reshape(weight.shape)

    def _multipliers(self, base: Tensor) -> Tensor:
        """[out, 1]."""
        factors, *norms = (placed(tensor, base).reshape(-1, 1) for tensor in self._factors)
        if self.dora_log_multiplier is not None:
            return factors.exp()
        if self.dora_scale is None:
            return factors
        norm = norms[0] if norms else torch.linalg.vector_norm(base, dim=1, keepdim=True)
        return factors / norm.clamp_min(1e-30)

    def _rotation(self, weight: Tensor) -> Tensor:
        values, size = placed(self.plain(), weight), self.rank
        rows, columns = torch.triu_indices(size, size, 1, device=values.device)
        skew = values.new_zeros(values.shape[0], size, size)
        skew[:, rows, columns] = values
        skew = skew - skew.transpose(1, 2)
        if self.clipped_oft is not None:
            limit = float(self.clipped_oft)
            norms = torch.linalg.matrix_norm(skew, ord=2, keepdim=True)
            skew = skew * (limit / norms.clamp_min(limit))
        identity = torch.eye(size, device=values.device).expand_as(skew)
        if self.cans_oft is not None and bool(self.cans_oft):
            return torch.linalg.solve(identity - skew, identity + skew)
        terms = 5 if self.neumann_terms is None else int(self.neumann_terms)
        if terms == 0:
            return torch.linalg.solve(identity + skew, identity - skew)
        # I + 2 Q + 2 Q^2 + ... + Q^n; PEFT counts the last power once, and stops at 3 at the earliest.
        total, power, last = identity.clone(), identity, 1 if terms == 2 else max(3, terms - 1)
        for exponent in range(1, last + 1 if terms > 1 else 1):
            power = torch.bmm(power, skew)
            total.add_(power, alpha=1.0 if exponent == last > 1 else 2.0)
        return total
