"""A model's tensors as they are with adapters merged: the numbers, and in what dtype they are stored."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lora.engine.merging import merge
from lora.errors import ToolError
from lora.formats.algorithms import Algorithm
from lora.tools.models.checkpoints import Checkpoint, Place, Raw, Stored

NAMED: Mapping[str, torch.dtype] = {
    "fp32": torch.float32,
    "fp16": torch.float16,
    "bf16": torch.bfloat16,
    "fp8": torch.float8_e4m3fn,
}
"""What the tools call torch's dtypes."""

DTYPES: Mapping[str, torch.dtype | None] = {"same": None, **NAMED}
"""The names of the output's dtypes; `same`: each tensor keeps its own."""

Changes = Mapping[Place, Sequence[tuple[Algorithm, float]]]
"""Parameter -> what changes it, and by which factor."""


@dataclass(frozen=True)
class MergedTensors:
    """The model's tensors as they will be."""

    model: Checkpoint
    changes: Changes
    dtype: str

    def dtype_of(self, raw: Raw) -> torch.dtype:
        """What a tensor is stored as."""
        stored = self.model.holds.get(raw)
        dtype = DTYPES[self.dtype]
        if dtype is None or not stored:
            return raw.dtype
        small = dtype.itemsize == 1 and (len(raw.shape) < 2 or stored[0].place.component == "vae")
        return torch.bfloat16 if small else dtype

    def bytes_of(self, raw: Raw) -> int:
        """What it takes."""
        return torch.Size(raw.shape).numel() * self.dtype_of(raw).itemsize

    @torch.no_grad()
    def tensor(self, raw: Raw, whole: Tensor) -> Tensor:
        """The tensor with every change. Raises: ToolError if a number overflows."""
        stored, dtype = self.model.holds.get(raw, ()), self.dtype_of(raw)
        if not any(one.place in self.changes for one in stored):
            return _rounded(raw.name, whole, dtype)
        merged = torch.empty_like(whole, dtype=dtype)
        for one in stored:
            original, parts = _part(whole, one).contiguous(), self.changes.get(one.place)
            name = str(one.place)
            weight = _changed(name, original, parts, dtype) if parts else original
            _part(merged, one).copy_(_rounded(name, weight, dtype))
        return merged


def _changed(
    name: str, original: Tensor, parts: Sequence[tuple[Algorithm, float]], dtype: torch.dtype
) -> Tensor:
    """The merged weight; for fp8 in float32, since rounding to that would hide an overflow."""
    weight = torch.empty_like(original, dtype=torch.float32 if dtype.itemsize == 1 else dtype)
    total = merge(weight, original, parts)
    # `merge` knows that numbers cannot overflow only where the dtype stays.
    if weight.dtype == original.dtype and bool(total.isfinite()):
        return weight
    return _checked(name, weight, original)


def _rounded(name: str, tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """The tensor in another dtype. Raises: ToolError if a number is too large for it."""
    if dtype == tensor.dtype:
        return tensor
    # torch makes the largest number of what is too large for float8_e4m3fn.
    if dtype.itemsize == 1 and tensor.numel():
        largest = float(tensor.float().abs().max())
        if not largest <= torch.finfo(dtype).max:  # NaN, too
            raise _overflow(name, dtype)
    return _checked(name, tensor.to(dtype), tensor)


def _part(whole: Tensor, stored: Stored) -> Tensor:
    """The parameter's own numbers in a stored tensor, [out, in(, kh, kw)]: a view."""
    if stored.third is not None:
        rows = whole.shape[0] // 3
        return whole.narrow(0, stored.third * rows, rows)
    return whole.t() if stored.transposed else whole


def _checked(name: str, tensor: Tensor, original: Tensor) -> Tensor:
    """Raises: ToolError if the tensor holds NaN or infinity, and the original does not."""
    if not _finite(tensor) and _finite(original):
        raise _overflow(name, tensor.dtype)
    return tensor


def _overflow(name: str, dtype: torch.dtype) -> ToolError:
    return ToolError(
        f"{name[:200]} overflows {str(dtype).removeprefix('torch.')}",
        "Choose a smaller scale or a wider dtype.",
    )


def _finite(tensor: Tensor) -> bool:
    """By the sum first, which takes a tenth of the time; it may overflow where no number does."""
    numbers = tensor.float()
    return bool(numbers.sum().isfinite()) or bool(numbers.isfinite().all())
