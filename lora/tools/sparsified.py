"""Merging whole changes of a layer that are made sparse before: TIES and DARE."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor


def ties(tensors: Sequence[Tensor], density: float) -> Tensor:
    """Trim, elect signs, and merge what agrees (arXiv 2306.01708, algorithm 1, with lambda = 1).

    Float32 tensors of one shape -> their disjoint mean. Numbers as large as the smallest that stays stay too.
    """
    total, trimmed = torch.zeros_like(tensors[0]), []
    for tensor in tensors:
        sizes = tensor.abs().flatten()
        least = sizes.kthvalue(sizes.numel() - math.ceil(density * sizes.numel()) + 1).values
        trimmed.append(torch.where(tensor.abs() >= least, tensor, 0))
        total += trimmed[-1]
    sign, merged, count = total.sign(), torch.zeros_like(total), torch.zeros_like(total)
    for tensor in trimmed:
        agrees = (tensor.sign() == sign) & (tensor != 0)
        merged += torch.where(agrees, tensor, 0)
        count += agrees
    return merged / count.clamp_(min=1)


def dare(tensors: Sequence[Tensor], density: float, seed: int) -> Tensor:
    """Drop and rescale, then add up (arXiv 2311.03099, equations 2 and 3; 1 - `density` is the paper's p).

    The same seed drops the same numbers.
    """
    generator = torch.Generator().manual_seed(seed)
    total = torch.zeros_like(tensors[0])
    for tensor in tensors:
        kept = torch.rand(tensor.shape, generator=generator) < density
        total += torch.where(kept, tensor, 0) / density
    return total
