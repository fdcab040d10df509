"""RandLora: a full-rank change by random bases that all layers share (arXiv 2502.00987; PEFT's `randlora`).

W' = W + alpha / rank * B A for a layer that has at least as many outputs as inputs, and its transpose for
others. A [rank * n, small] is the basis times lambda and gamma; B [large, n * rank] is a basis as it is. The
two are flattened in different orders, as PEFT's `get_scaled_bases` flattens them. Each layer takes the
beginning of the shared bases.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from lora.formats.algorithms.base import Algorithm, Flaw, placed
from lora.formats.names.slots import Shape


@dataclass(frozen=True, eq=False)
class RandLoRA(Algorithm):
    """PEFT's RandLora, for linear layers."""

    name: ClassVar[str] = "randlora"

    randlora_lambda: Tensor
    """[rank, n], n the number of bases."""
    randlora_gamma: Tensor
    """[n, small]: the smaller of outputs and inputs."""
    randlora_a: Tensor
    """[rank, 1, at least small]."""
    randlora_b: Tensor
    """[at least large, at least n, rank]."""
    randlora_alpha: Tensor | None = None
    """By PEFT's config."""

    @property
    def rank(self) -> int | None:
        """Of one basis."""
        return self.randlora_lambda.shape[0] if self.randlora_lambda.dim() else None

    def misfit(self, shape: Shape) -> str | None:
        """See `Algorithm.misfit`."""
        scales, gamma = tuple(self.randlora_lambda.shape), tuple(self.randlora_gamma.shape)
        a, b = tuple(self.randlora_a.shape), tuple(self.randlora_b.shape)
        if (len(scales), len(gamma), len(a), len(b)) != (2, 2, 3, 3):
            return Flaw("the tensors of RandLora have other axes than PEFT's")
        (rank, count), small = scales, gamma[1]
        if gamma[0] != count or a[:2] != (rank, 1) or b[2] != rank or b[1] < count:
            return Flaw(f"randlora_lambda {list(scales)} does not fit to its gamma and bases")
        if len(shape) != 2 or small != min(shape) or a[2] < small or b[0] < max(shape):
            return f"randlora_gamma {list(gamma)} or the bases do not fit the layer {list(shape)}"
        return None

    @property
    def needs_weight(self) -> bool:
        """False."""
        return False

    def delta(self, weight: Tensor) -> Tensor:
        """alpha / rank * B A, or its transpose."""
        (rank, count), (_, small) = self.randlora_lambda.shape, self.randlora_gamma.shape
        scales, gamma = placed(self.randlora_lambda, weight), placed(self.randlora_gamma, weight)
        a = scales[:, :, None] * placed(self.randlora_a[:, :, :small], weight) * gamma
        b = placed(self.randlora_b[: max(weight.shape), :count], weight)
        product = b.flatten(1) @ a.flatten(0, 1)
        if self.randlora_alpha is not None:
            product.mul_(float(self.randlora_alpha) / rank)
        return product if small == weight.shape[1] else product.t()
