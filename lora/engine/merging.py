"""W + sum of scale * delta, in float32, rounded once, written into the weight's own storage."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from lora.formats.algorithms import Algorithm, LowRank
from lora.formats.algorithms.base import placed

CHUNK_NUMBERS = 1 << 20
"""How many float32 numbers are worked on at a time on a CPU: 4 MB stay in the caches of a few cores."""


@torch.no_grad()
def merge(weight: Tensor, original: Tensor, parts: Sequence[tuple[Algorithm, float]]) -> Tensor:
    """Writes the merged values into `weight`, [out, in(, kh, kw)]; `original` has its values before.

    Returns the sum of the written values, a tensor of one float32 number on the weight's device: if it is
    finite, every value is (the reverse need not hold).
    """
    factors = [(part.low_rank(), scale) for part, scale in parts]
    plain = weight.is_contiguous() and original.is_contiguous() and weight.device == original.device
    if plain and weight.dim() >= 2 and all(factor is not None for factor, _ in factors):
        return _merge_factors(
            weight.flatten(1), original.flatten(1), [(f, s) for f, s in factors if f is not None]
        )
    base = original.to(weight.device)
    total = base.to(torch.float32, copy=True)
    for part, scale in parts:
        total.add_(part.delta(base), alpha=scale)
    weight.copy_(total)
    return _sum(weight)


def _merge_factors(
    weight: Tensor, original: Tensor, factors: Sequence[tuple[LowRank, float]]
) -> Tensor:
    """Row by row group, so that the float32 intermediate never leaves the processor's cache."""
    up = torch.cat([placed(f.up, weight) * (s * f.scaling) for f, s in factors], dim=1)
    down = torch.cat([placed(f.down, weight).flatten(1) for f, _ in factors])
    rows, columns = weight.shape
    step = rows if weight.is_cuda else max(1, CHUNK_NUMBERS // columns)
    harmless = not weight.is_cuda and _cannot_overflow(up, down, weight.dtype)
    buffer = torch.empty(min(step, rows), columns, device=weight.device)
    sums: list[Tensor] = []
    for start in range(0, rows, step):
        end = min(start + step, rows)
        total = buffer[: end - start]
        total.copy_(original[start:end])
        total.addmm_(up[start:end], down)
        weight[start:end].copy_(total)
        if not harmless:
            sums.append(_sum(weight[start:end]))
    return torch.stack(sums).sum() if sums else torch.zeros((), device=weight.device)


def _cannot_overflow(up: Tensor, down: Tensor, dtype: torch.dtype) -> bool:
    """Whether no change is as large as half the last digit of the dtype's largest number.

    Then a finite weight stays finite, and need not be looked at: one pass over it less.
    """
    limits = torch.finfo(dtype)
    largest = float(up.abs().amax()) * float(down.abs().amax()) * up.shape[1]
    return largest < limits.max * limits.eps / 8


def _sum(written: Tensor) -> Tensor:
    """In the tensor's own precision: a tenth of the time that looking for the largest takes."""
    plain = written.dtype in (torch.float32, torch.bfloat16, torch.float16)
    return (written if plain else written.float()).sum().float()
