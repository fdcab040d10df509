"""Merging: W + sum of scale * delta, in float32, rounded once, written into the weight's own storage."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from lora.engine.plan import Merge
from lora.errors import LoraIncompatible
from lora.formats.algorithms import Algorithm, LowRank
from lora.formats.algorithms.base import placed

CHUNK_NUMBERS = 1 << 20
"""How many float32 numbers are merged at a time on a CPU: 4 MB stay in the caches of a few cores."""


@torch.no_grad()
def merge(weight: Tensor, original: Tensor, changes: Sequence[tuple[Algorithm, float]]) -> Tensor:
    """Writes the merged values into `weight`, [out, in(, kh, kw)]. `original` has its unchanged values,
    `changes` the algorithms and their scales.

    Returns the sum of the written values, a tensor of one float32 number on the weight's device: if it is
    finite, every value is (the reverse need not hold).
    """
    factors = [(algorithm.low_rank(), scale) for algorithm, scale in changes]
    plain = weight.is_contiguous() and original.is_contiguous() and weight.device == original.device
    if plain and weight.dim() >= 2 and all(factor is not None for factor, _ in factors):
        return _merge_factors(
            weight.flatten(1), original.flatten(1), [(f, s) for f, s in factors if f is not None]
        )
    base = original.to(weight.device)
    total = base.to(torch.float32, copy=True)
    for algorithm, scale in changes:
        total.add_(algorithm.delta(base), alpha=scale)
    weight.copy_(total)
    return _sum(weight)


def _merge_factors(
    weight: Tensor, original: Tensor, factors: Sequence[tuple[LowRank, float]]
) -> Tensor:
    """Merges one group of rows after the other, so that the float32 sums stay in the processor's cache."""
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
    """Whether every change is smaller than half the last digit of the dtype's largest number.

    Then a finite weight stays finite, and the pass over it that would check this is saved.
    """
    limits = torch.finfo(dtype)
    largest = float(up.abs().amax()) * float(down.abs().amax()) * up.shape[1]
    return largest < limits.max * limits.eps / 8


def _sum(written: Tensor) -> Tensor:
    """The sum in the tensor's own precision: it takes a tenth of the time of searching the largest value."""
    plain = written.dtype in (torch.float32, torch.bfloat16, torch.float16)
    return (written if plain else written.float()).sum().float()


def refuse_overflow(written: Mapping[nn.Parameter, tuple[Merge, Tensor]]) -> None:
    """`written`: weight -> its merge, and the sum that `merge` returned.

    Raises: LoraIncompatible with the first layer whose merged weight overflows its precision.
    """
    by_device: dict[torch.device, list[nn.Parameter]] = defaultdict(list)
    for weight, (_, total) in written.items():
        by_device[total.device].append(weight)
    for weights in by_device.values():
        sums = torch.stack([written[weight][1] for weight in weights])  # one wait for the device
        for weight, finite in zip(weights, sums.isfinite().tolist(), strict=True):
            if not finite and not bool(weight.detach().float().isfinite().all()):
                entry = written[weight][0]
                raise LoraIncompatible(
                    f"with these LoRAs the {entry.name} of {entry.target} overflows "
                    f"{str(weight.dtype).removeprefix('torch.')}",
                    "Lower the scale.",
                )
