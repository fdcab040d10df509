"""Low-rank parts added in a layer's forward: the weight is not touched.

y = W x + sum of scale * scaling * up (down x). The factors of a whole stack stand side by side along the
rank, so that N LoRAs cost one pair of products.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional

from lora.algorithms import LowRank
from lora.modules import compute_place

Place = tuple[torch.device, torch.dtype]


@dataclass
class Factors:
    """A stack's part of one layer, ready for its device."""

    down: Tensor
    """[R, in] or [R, in, kh, kw], R the sum of the ranks."""
    up: Tensor
    """[R, out], or [out, R, 1, 1] for a convolution."""
    segments: tuple[tuple[int, float], ...]
    """(rank, scaling) of each part, in order."""
    parts: tuple[LowRank, ...]
    """What they were made from."""
    each: tuple[float, ...] = ()
    """What each part is multiplied by now: the user's scale times its scaling."""
    scales: Tensor | None = None
    """[R]: the same for every row of `down`."""

    @property
    def size(self) -> int:
        """Bytes."""
        return sum(t.numel() * t.element_size() for t in (self.down, self.up))


class _Change(NamedTuple):
    factors: Factors
    each: tuple[float, ...]


def set_scales(changes: Sequence[tuple[Factors, Sequence[float]]]) -> None:
    """Gives many layers the user's scales, one per part; what has them already is left alone."""
    by_place: dict[Place, list[_Change]] = {}
    for factors, scales in changes:
        each = tuple(s * scaling for s, (_, scaling) in zip(scales, factors.segments, strict=True))
        if each != factors.each:
            factors.each = ()  # until the tensor is there
            place = factors.down.device, factors.down.dtype
            by_place.setdefault(place, []).append(_Change(factors, each))
    for (device, dtype), found in by_place.items():
        # One tensor for all of them: hundreds of small ones would take milliseconds.
        values = torch.tensor([value for change in found for value in change.each])
        ranks = torch.tensor([rank for one, _ in found for rank, _ in one.segments])
        rows = torch.repeat_interleave(values, ranks).to(device, dtype)
        sizes = [sum(rank for rank, _ in one.segments) for one, _ in found]
        for (one, each), own in zip(found, torch.split(rows, sizes), strict=True):
            one.scales, one.each = own, each


class AdaptedForward:
    """Stands in for one module's `forward` while a stack is applied.

    One object per module for ever: torch.compile guards on the object, so that another stack with the
    same ranks runs the graph that is there.
    """

    original: Callable[..., Tensor]
    down: Tensor
    up: Tensor
    scales: Tensor
    uniform: float | None
    """The scales as one number, where they are one."""

    def __init__(self, module: nn.Module) -> None:
        self._convolution = module if isinstance(module, nn.Conv2d) else None
        self._module = module
        self._factors: Factors | None = None

    def set(self, original: Callable[..., Tensor], factors: Factors) -> None:
        """What to compute from now on."""
        if factors.scales is None:
            raise ValueError("the factors have no scales")
        self.original, self._factors = original, factors
        self.down, self.up, self.scales = factors.down, factors.up, factors.scales
        self.uniform = factors.each[0] if len(factors.each) == 1 else None

    def clear(self) -> None:
        """Lets go of the tensors."""
        self._factors = None
        for name in ("original", "down", "up", "scales"):
            self.__dict__.pop(name, None)

    def _follow(self, out: Tensor) -> None:
        """Goes to where the layer's output is, in its precision: for layers that moved, or are packed."""
        if self._factors is not None:
            place = out.device, out.dtype
            made = _factors(self._module, self._factors.parts, _Placed(), place)
            self.down, self.up, self.scales = made.down, made.up, self.scales.to(out)
            # The next time they are there at once.
            self._factors.down, self._factors.up = self.down, self.up
            self._factors.scales = self.scales

    def __call__(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """The layer's output plus the stack's."""
        out = self.original(x, *args, **kwargs)
        if self.down.dtype != out.dtype or self.down.device != out.device:
            self._follow(out)
        if x.dtype != out.dtype or x.device != out.device:
            x = x.to(out)
        if self._convolution is not None:
            return self._add_convolution(self._convolution, x, out)
        inner = functional.linear(x, self.down)
        inner = inner.reshape(-1, inner.shape[-1])
        flat = out.view(-1, out.shape[-1])
        if torch.compiler.is_compiling() or self.uniform is None:
            flat.addmm_(inner * self.scales, self.up)
        else:  # in eager mode one kernel less; compiled, the number would be a constant of the graph
            flat.addmm_(inner, self.up, alpha=self.uniform)
        return out

    def _add_convolution(self, conv: nn.Conv2d, x: Tensor, out: Tensor) -> Tensor:
        inner = functional.conv2d(x, self.down, None, conv.stride, conv.padding, conv.dilation)
        return out.add_(functional.conv2d(inner.mul_(self.scales[:, None, None]), self.up))


@torch.no_grad()
def make_factors(layers: Sequence[tuple[nn.Module, Sequence[LowRank]]]) -> list[Factors]:
    """The factors of many layers at once.

    What is in the right place and precision already and stands alone is used as it is, without a copy.
    """
    placed = _Placed()
    return [_factors(module, parts, placed, compute_place(module)) for module, parts in layers]


class _Placed:
    """Tensors in another place or precision. Those of one file share a storage, which goes as a whole."""

    def __init__(self) -> None:
        self._whole: dict[tuple[int, torch.dtype, torch.device, torch.dtype], Tensor] = {}

    def get(self, tensor: Tensor, device: torch.device, dtype: torch.dtype) -> Tensor:
        if tensor.dtype == dtype and tensor.device == device:
            return tensor
        storage = tensor.untyped_storage()
        key = (storage.data_ptr(), tensor.dtype, device, dtype)
        whole = self._whole.get(key)
        if whole is None:
            empty = torch.empty(0, dtype=tensor.dtype, device=tensor.device)
            whole = self._whole[key] = empty.set_(storage).to(device, dtype)
        return whole.as_strided(tensor.shape, tensor.stride(), tensor.storage_offset())


def _factors(module: nn.Module, parts: Sequence[LowRank], placed: _Placed, place: Place) -> Factors:
    device, dtype = place
    segments = tuple((part.down.shape[0], part.scaling) for part in parts)
    downs = [placed.get(part.down, device, dtype).flatten(1) for part in parts]
    ups = [placed.get(part.up, device, dtype) for part in parts]
    down = downs[0] if len(downs) == 1 else torch.cat(downs)
    up = ups[0] if len(ups) == 1 else torch.cat(ups, dim=1)
    if isinstance(module, nn.Conv2d):
        return Factors(
            down.view(-1, *module.weight.shape[1:]), up[:, :, None, None], segments, tuple(parts)
        )
    return Factors(down, up.t(), segments, tuple(parts))
