"""How much an adapter's parts change: the Frobenius norm of each delta, from its factors."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from lora.formats.algorithms import Algorithm
from lora.formats.algorithms.base import scaling
from lora.formats.algorithms.full import BiasDifference, ModulationDifference, WeightDifference
from lora.formats.algorithms.loha import LoHa
from lora.formats.algorithms.lokr import LoKr
from lora.formats.algorithms.lora import LoRA, LoRABias
from lora.formats.names.keys import Shape

MAX_NUMBERS = 1 << 28
"""Of a matrix that is formed: thin factors of a few megabytes can multiply to terabytes."""


@torch.no_grad()
def delta_norm(part: Algorithm, shape: Shape) -> float | None:
    """The Frobenius norm of the part's delta at scale 1; None where that depends on the model's weight, and
    where a matrix would have to be formed that is larger than any layer.

    `shape` is the parameter's, which the part fits (`Algorithm.misfit`). Of a product up @ down it is
    scaling * sqrt(trace((down down^T) (up^T up))), of a Kronecker product the product of the norms; no
    matrix of the layer's size is made but for LoHa and for a LoRA's sparse rest. In float64.
    """
    plain = isinstance(part, LoRA) and part.lora_mid is None and part.is_low_rank
    if not plain and math.prod(shape) > MAX_NUMBERS:
        return None
    if isinstance(part, LoRA) and (factors := part.low_rank()):
        return abs(factors.scaling) * product_norm(factors.up, factors.down)
    if isinstance(part, LoKr):
        return _kronecker_norm(part)
    whole = (LoRA, LoRABias, LoHa, WeightDifference, BiasDifference, ModulationDifference)
    if isinstance(part, whole):
        return float(part.delta(torch.zeros(shape)).double().norm())
    return None


def product_norm(up: Tensor, down: Tensor) -> float:
    """The Frobenius norm of up [out, rank] times down [rank, ...], which is not formed."""
    left, right = up.flatten(1).double(), down.flatten(1).double()
    # The trace of a product of two symmetric matrices is the sum of their elementwise product.
    squared = float(((left.t() @ left) * (right @ right.t())).sum())
    return math.sqrt(max(squared, 0.0))


def _kronecker_norm(part: LoKr) -> float:
    first = _factor_norm(part.lokr_w1, part.lokr_w1_a, part.lokr_w1_b, None)
    second = _factor_norm(part.lokr_w2, part.lokr_w2_a, part.lokr_w2_b, part.lokr_t2)
    factor = 1.0 if part.rank is None else scaling(part.alpha, part.rank)
    return abs(factor) * first * second


def _factor_norm(
    whole: Tensor | None, a: Tensor | None, b: Tensor | None, core: Tensor | None
) -> float:
    if whole is not None:
        return float(whole.double().norm())
    if a is None or b is None:
        raise ValueError("a factor is missing")
    if core is None:
        return product_norm(a, b)
    inner = torch.einsum("ijhw,jn->inhw", core.double(), b.double())
    return product_norm(a.t(), inner)
