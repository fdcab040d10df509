"""Makes the tensors that lead from one parameter of the source to that of the target, and measures them."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from lora.errors import ToolError
from lora.formats.names.slots import Shape
from lora.tools import dtype_name
from lora.tools.extract.options import (
    ExtractOptions,
    is_tucker,
    numbers_of,
    slot_of_difference,
    takes_factors,
)
from lora.tools.extract.report import LayerReport
from lora.tools.factors.ranks import RankPolicy
from lora.tools.factors.svd import energy, layer_seed, svd_by_policy, tucker_svd

PIECE = 1 << 20
"""How many numbers are compared at a time."""

EXACT_NUMBERS = 1 << 20
"""A larger difference keeps the output's dtype even if inexact, unless `diff_only`."""


@dataclass(frozen=True, eq=False)
class Pair:
    """The same parameter in both models, [out, in(, kh, kw)]."""

    name: str
    """Component, module and parameter, joined by dots."""
    source: Tensor
    target: Tensor

    @property
    def parameter(self) -> str:
        """Its name in its module."""
        return self.name.rpartition(".")[2]

    @property
    def shape(self) -> Shape:
        """The shape in both models."""
        return tuple(self.source.shape)


@dataclass(frozen=True, eq=False)
class StoredChange:
    """What is written into the file for one parameter."""

    tensors: Mapping[str, Tensor]
    """Slot -> tensor."""
    report: LayerReport


def difference(pair: Pair) -> Tensor:
    """target - source, float32. Raises: ToolError if either holds NaN or infinity."""
    change = torch.empty(pair.shape)
    three = (torch.split(t.reshape(-1), PIECE) for t in (change, pair.source, pair.target))
    for piece, source, target in zip(
        *three, strict=True
    ):  # the converted numbers stay in the cache
        piece.copy_(target).sub_(source.float())
    if not math.isfinite(float(change.sum())) and not bool(change.isfinite().all()):
        for which, tensor in (("source", pair.source), ("target", pair.target)):
            if not bool(tensor.float().isfinite().all()):
                raise ToolError(f"the {which} model's {pair.name[:200]} holds NaN or infinity")
        raise ToolError(f"the two models' {pair.name[:200]} are further apart than float32 reaches")
    return change


def spectrum_of(pair: Pair, policy: RankPolicy, options: ExtractOptions) -> list[float]:
    """The singular values of a change that the policy chooses; none if there is no change."""
    change = changed(pair, options)
    if isinstance(change, str):
        return []
    return svd_by_policy(change.flatten(1), policy, layer_seed(options.seed, pair.name)).s.tolist()


def changed(pair: Pair, options: ExtractOptions) -> Tensor | str:
    """target - source, float32; or the reason to store nothing, which is empty if both are the same.

    Raises: as `difference`.
    """
    if pair.source.dtype == pair.target.dtype and torch.equal(pair.source, pair.target):
        return ""
    change = difference(pair)
    largest = largest_of(change)
    if not largest:
        return ""
    if largest <= options.min_diff:
        return f"none of its numbers changed by more than {largest:.3g}"
    return change


def extract_layer(
    pair: Pair, change: Tensor, policy: RankPolicy, options: ExtractOptions
) -> StoredChange | None:
    """The tensors for one parameter; `change` is `difference(pair)`, `policy` that of this layer.

    Factors, if `takes_factors` and if they are smaller than the change itself; else the difference. None if
    adapters have no slot for it.

    Raises: ToolError if the factors overflow the output's dtype.
    """
    if takes_factors(pair.name, pair.shape, options):
        factors = _factors(pair, change, policy, options)
        if factors is not None:
            return factors
    slot = slot_of_difference(pair.parameter)
    return _difference(pair, change, slot, options) if slot else None


def _factors(
    pair: Pair, change: Tensor, policy: RankPolicy, options: ExtractOptions
) -> StoredChange | None:
    shape, seed = pair.shape, layer_seed(options.seed, pair.name)
    factors = svd_by_policy(change.flatten(1), policy, seed)
    rank = factors.rank
    if options.holds_differences and numbers_of(shape, rank, options) >= math.prod(shape):
        return None
    if is_tucker(shape, options):
        core = tucker_svd(change, rank, seed)
        rank, residual = core.up.shape[1], core.residual
        up, mid, down = core.balanced()
        tensors = {
            "lora_up": _as_conv(up, shape),
            "lora_down": _as_conv(down, shape),
            "lora_mid": mid,
        }
    else:
        (up, down), residual = factors.balanced(), factors.residual
        tensors = {"lora_up": _as_conv(up, shape), "lora_down": down.reshape(rank, *shape[1:])}
    rounded = {slot: _rounded(t, options, pair) for slot, t in tensors.items()}
    error, largest = _distance(change, rounded)
    report = LayerReport(
        name=pair.name,
        shape=shape,
        kind="tucker" if "lora_mid" in tensors else "lora",
        rank=rank,
        dtype=dtype_name(options.dtype),
        bytes=sum(t.nbytes for t in rounded.values()) + 4,
        energy=factors.total,
        kept=1 - residual / factors.total,
        error=error,
        largest=largest,
    )
    return StoredChange({**rounded, "alpha": _alpha(rank, options.dtype)}, report)


def _alpha(rank: int, dtype: torch.dtype) -> Tensor:
    """The rank, so that the scaling is 1. In the dtype of the factors if it is exact in that, because a file
    of one dtype is loaded as one piece.
    """
    alpha = torch.tensor(float(rank))
    return alpha.to(dtype) if float(alpha.to(dtype)) == rank else alpha


def _as_conv(factor: Tensor, shape: Shape) -> Tensor:
    """A matrix, followed by kernel axes of length 1 if the layer is a convolution."""
    return factor.reshape(*factor.shape, *[1] * (len(shape) - 2)).contiguous()


def _rounded(factor: Tensor, options: ExtractOptions, pair: Pair) -> Tensor:
    if options.clamp_quantile is not None:
        factor = _clamped(factor, options.clamp_quantile)
    rounded = factor.to(options.dtype).contiguous()
    if not bool(rounded.isfinite().all()):
        raise ToolError(
            f"the factors of {pair.name[:200]} are too large for {dtype_name(options.dtype)}",
            "Choose bf16 or fp32.",
        )
    return rounded


def _clamped(factor: Tensor, quantile: float) -> Tensor:
    place = max(1, math.ceil(quantile * factor.numel()))
    limit = float(factor.abs().flatten().kthvalue(place).values)
    return factor.clamp(-limit, limit)


def _distance(change: Tensor, rounded: Mapping[str, Tensor]) -> tuple[float, float]:
    """||D - D'||_F^2 and the largest |D - D'|, for the factors as they are stored."""
    up = rounded["lora_up"].float().flatten(1)
    down = rounded["lora_down"].float()
    if "lora_mid" in rounded:
        down = torch.einsum("mnhw,ni->mihw", rounded["lora_mid"].float(), down.flatten(1))
    rows, down = change.flatten(1), down.flatten(1)
    error, largest = [], 0.0
    step = max(1, PIECE // rows.shape[1])
    for start in range(0, len(rows), step):
        left = torch.addmm(rows[start : start + step], up[start : start + step], down, alpha=-1)
        error.append(energy(left))
        largest = max(largest, largest_of(left))
    return math.fsum(error), largest


def largest_of(tensor: Tensor) -> float:
    """The largest absolute value, 0 if there is none; in a tenth of the time of `abs().amax()`."""
    if not tensor.numel():
        return 0.0
    least, most = torch.aminmax(tensor)
    return max(-float(least), float(most))


def _difference(pair: Pair, change: Tensor, slot: str, options: ExtractOptions) -> StoredChange:
    """The change itself, in the output's dtype if that restores the target exactly, else in float32.

    A large table of rows is always in the output's dtype, unless all differences must be exact; the report
    has the number of inexact numbers.
    """
    stored = change.to(options.dtype)
    unequal = _unequal(pair, stored)
    exact = options.diff_only or stored.numel() <= EXACT_NUMBERS
    if unequal and exact and options.dtype is not torch.float32:
        wide = _unequal(pair, change)
        stored, unequal = (change, wide) if wide < unequal else (stored, unequal)
    left = stored.float() - change
    total, error = energy(change), energy(left)
    report = LayerReport(
        name=pair.name,
        shape=pair.shape,
        kind="diff",
        rank=None,
        dtype=dtype_name(stored.dtype),
        bytes=stored.nbytes,
        energy=total,
        kept=1.0,
        error=error,
        largest=largest_of(left),
        unequal=unequal,
    )
    return StoredChange({slot: stored.contiguous()}, report)


def _unequal(pair: Pair, stored: Tensor) -> int:
    """How many numbers of source + stored, added in float32, do not round to those of the target."""
    source, target, change = (
        torch.split(tensor.reshape(-1), PIECE) for tensor in (pair.source, pair.target, stored)
    )
    return sum(map(_differing, source, target, change))


def _differing(source: Tensor, target: Tensor, stored: Tensor) -> int:
    merged = (source.float() + stored.float()).to(source.dtype)
    return int((merged.float() != target.to(source.dtype).float()).sum())
