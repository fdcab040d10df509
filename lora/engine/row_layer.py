"""One module's part of a batch whose rows have different adapters: buffers of factors, and the forward."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional

from lora.engine.dynamic import DeviceAndDtype, DeviceFactors, product_dtype
from lora.engine.modules import compute_place
from lora.engine.stack import Stack
from lora.errors import LoraIncompatible, LoraUnsupported
from lora.formats.names.keys import Target

ROOM = 32
"""The columns that a layer's buffers begin with."""


class Columns(NamedTuple):
    """Where one adapter's factors stand in a layer's buffers."""

    start: int
    end: int
    scaling: float
    """The adapter's own: alpha / rank."""


class Span(NamedTuple):
    """Columns that stand beside each other."""

    start: int
    width: int


class Added(NamedTuple):
    """What a layer adds to its output for the rows of one batch."""

    down: Tensor
    """[R, in], or [R, in, kh, kw] for a convolution."""
    up: Tensor
    """[R, out], or [out, R, 1, 1] for a convolution."""
    scales: Tensor
    """[rows, R]."""
    zeros: Tensor | None
    """[rows, R], where a scale is 0; None where a product cannot overflow before it is multiplied by it."""


class RowLayer:
    """One module's buffers of factors, and the `forward` that adds them. `added`: None adds nothing."""

    def __init__(self, module: nn.Module, target: Target) -> None:
        self.module, self.target = module, target
        self.columns: dict[str, Columns] = {}
        self.added: Added | None = None
        self.original: Any = None
        self._convolution = module if isinstance(module, nn.Conv2d) else None
        self._down: Tensor | None = None
        self._up: Tensor | None = None

    @property
    def place(self) -> DeviceAndDtype:
        """The device of the products, and their precision."""
        if self._down is None:
            device, dtype = compute_place(self.module)
            return device, product_dtype(device, dtype)
        return self._down.device, self._down.dtype

    def insert(self, key: str, factors: DeviceFactors, scaling: float) -> None:
        """Copies an adapter's factors into the first gap that is wide enough."""
        rank = factors.down.shape[0]
        start = self._gap(rank)
        self._widen(start + rank, factors)
        if self._down is None or self._up is None:
            raise ValueError("the layer has no buffers")
        self._down[start : start + rank] = factors.down
        self._of_up(self._up, start, start + rank).copy_(factors.up)
        self.columns[key] = Columns(start, start + rank, scaling)

    def _gap(self, rank: int) -> int:
        start = 0
        for taken in sorted(self.columns.values()):
            if taken.start - start >= rank:
                break
            start = taken.end
        return start

    def _widen(self, columns: int, like: DeviceFactors) -> None:
        """Makes room for so many columns; what a batch under way reads stays as it is."""
        have = 0 if self._down is None else self._down.shape[0]
        if columns <= have:
            return
        device, dtype = self.place
        room = max(columns, 2 * have, ROOM)
        shape = (*like.up.shape[:1], room, 1, 1) if self._convolution else (room, like.up.shape[1])
        # zeros, because 0 times what memory happens to hold may be NaN
        down = torch.zeros(room, *like.down.shape[1:], device=device, dtype=dtype)
        up = torch.zeros(shape, device=device, dtype=dtype)
        if self._down is not None and self._up is not None:
            down[:have] = self._down
            self._of_up(up, 0, have).copy_(self._up)
        self._down, self._up = down, up

    def _of_up(self, up: Tensor, start: int, end: int) -> Tensor:
        return up[:, start:end] if self._convolution else up[start:end]

    def between(self, span: Span, scales: Tensor) -> Added:
        """What the columns of the span add with these scales, [rows, width]."""
        if self._down is None or self._up is None:
            raise ValueError("the layer has no buffers")
        zeros = scales == 0 if scales.dtype is torch.float16 else None
        start, end = span.start, span.start + span.width
        return Added(self._down[start:end], self._of_up(self._up, start, end), scales, zeros)

    def __call__(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """The layer's output plus each row's own stack."""
        out: Tensor = self.original(x, *args, **kwargs)
        if (added := self.added) is None:
            return out
        if x.shape[0] != added.scales.shape[0]:
            raise LoraUnsupported(
                f"{self.target} gets {x.shape[0]} rows in a batch of {added.scales.shape[0]}",
                "This model mixes the rows of a batch; its LoRAs cannot share one.",
            )
        x = x.to(added.down.dtype)
        conv = self._convolution
        if conv is not None:
            inner = functional.conv2d(x, added.down, None, conv.stride, conv.padding, conv.dilation)
            return out.add_(functional.conv2d(_scaled(inner, added, 1), added.up))
        inner = _scaled(functional.linear(x, added.down), added, -1)
        inner, flat = inner.reshape(-1, inner.shape[-1]), out.view(-1, out.shape[-1])
        if inner.dtype == out.dtype:
            flat.addmm_(inner, added.up)
        else:
            flat.add_(inner @ added.up)
        return out


def _scaled(inner: Tensor, added: Added, axis: int) -> Tensor:
    """`inner` times each row's scales, whose columns lie along `axis`."""
    shape = [1] * inner.dim()
    shape[0], shape[axis] = added.scales.shape
    inner = inner.mul_(added.scales.view(shape))
    # in float16 a column of another row's adapter may be infinite, and infinity times 0 is NaN
    return inner if added.zeros is None else inner.masked_fill_(added.zeros.view(shape), 0.0)


def span_of(layer: RowLayer, keys: Collection[str]) -> Span:
    """The columns from the first to the last of these adapters, of which the layer has at least one."""
    columns = [own for key, own in layer.columns.items() if key in keys]
    start = min(own.start for own in columns)
    return Span(start, max(own.end for own in columns) - start)


def scales_of(layer: RowLayer, span: Span, stack: Stack) -> list[float]:
    """One row of a batch: what each column of the span is multiplied by."""
    row = [0.0] * span.width
    for use in stack:
        if own := layer.columns.get(use.lora.identity):
            scale = use.scale_of(layer.target) * own.scaling
            for column in range(own.start - span.start, own.end - span.start):
                row[column] += scale
    return row


def on_device(place: DeviceAndDtype, scales: Sequence[float]) -> Tensor:
    """The scales on a device, in one transfer. Raises: LoraIncompatible if one overflows."""
    flat = torch.tensor(scales)
    largest = float(flat.abs().max())
    if not largest <= torch.finfo(place[1]).max:
        raise LoraIncompatible(
            f"a layer's scale (scale * alpha / rank) of {largest:g} overflows "
            f"{str(place[1]).removeprefix('torch.')}",
            "Lower the scale.",
        )
    return flat.to(*place)
