"""Low-rank parts added in a layer's forward: the weight is not touched.

y = W x + sum of scale * scaling * up (down x). The factors of a whole stack stand side by side along the
rank, so that N LoRAs cost one pair of products. On a GPU these are in the layer's own precision; on a CPU in
float32 (thin products in half precision take 5 to 100 times as long there), and the factors stay as the file
has them: each is widened when its layer is called, a copy that fits the processor's cache.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional

from lora.engine.modules import compute_place
from lora.errors import LoraIncompatible
from lora.formats.algorithms import LowRank

Place = tuple[torch.device, torch.dtype]

PLAIN = frozenset({torch.float16, torch.bfloat16, torch.float32, torch.float64})
"""What torch can join and multiply; narrower kinds are only for storing."""


def product_dtype(device: torch.device, dtype: torch.dtype) -> torch.dtype:
    """The precision in which a layer of this place and precision gets its two products."""
    return torch.promote_types(dtype, torch.float32) if device.type == "cpu" else dtype


@dataclass
class Factors:
    """A stack's part of one layer, ready for its device."""

    down: Tensor
    """[R, in] or [R, in, kh, kw], R the sum of the ranks."""
    up: Tensor
    """[R, out], or [out, R, 1, 1] for a convolution."""
    parts: tuple[LowRank, ...]
    """What they were made from, in order."""
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
        each = tuple(s * part.scaling for s, part in zip(scales, factors.parts, strict=True))
        if each != factors.each:
            factors.each = ()  # until the tensor is there
            device = factors.down.device
            place = device, product_dtype(device, factors.down.dtype)
            by_place.setdefault(place, []).append(_Change(factors, each))
    for (device, dtype), found in by_place.items():
        # One tensor for all of them: hundreds of small ones would take milliseconds.
        values = torch.tensor([value for change in found for value in change.each])
        if float(values.abs().max()) > torch.finfo(dtype).max:
            raise LoraIncompatible(
                f"a layer's scale (scale * alpha / rank) of {float(values.abs().max()):g} overflows "
                f"{str(dtype).removeprefix('torch.')}",
                "Lower the scale.",
            )
        ranks = torch.tensor([part.down.shape[0] for one, _ in found for part in one.parts])
        rows = torch.repeat_interleave(values, ranks).to(device, dtype)
        sizes = [one.down.shape[0] for one, _ in found]
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
            dtype = _kept_dtype(out.device, out.dtype, self._factors.parts)
            own = [
                LowRank(p.down.to(out.device, dtype), p.up.to(out.device, dtype), p.scaling)
                for p in self._factors.parts
            ]
            self.down, self.up = _joined(self._module, own)
            self.scales = self.scales.to(out.device, product_dtype(out.device, out.dtype))
            # The next time they are there at once.
            self._factors.down, self._factors.up = self.down, self.up
            self._factors.scales = self.scales

    def __call__(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """The layer's output plus the stack's."""
        out = self.original(x, *args, **kwargs)
        dtype = product_dtype(out.device, out.dtype)
        if self.down.device != out.device or (dtype == out.dtype != self.down.dtype):
            self._follow(out)
        x, down, up = x.to(out.device, dtype), self.down.to(dtype), self.up.to(dtype)
        if self._convolution is not None:
            return self._add_convolution(self._convolution, x, down, up, out)
        inner = functional.linear(x, down)
        inner = inner.reshape(-1, inner.shape[-1])
        flat = out.view(-1, out.shape[-1])
        alpha = 1.0
        if torch.compiler.is_compiling() or self.uniform is None:
            inner = inner * self.scales
        else:  # in eager mode one kernel less; compiled, the number would be a constant of the graph
            alpha = self.uniform
        if dtype == out.dtype:
            flat.addmm_(inner, up, alpha=alpha)
        else:
            flat.add_(inner @ up, alpha=alpha)
        return out

    def _add_convolution(
        self, conv: nn.Conv2d, x: Tensor, down: Tensor, up: Tensor, out: Tensor
    ) -> Tensor:
        inner = functional.conv2d(x, down, None, conv.stride, conv.padding, conv.dilation)
        return out.add_(functional.conv2d(inner.mul_(self.scales[:, None, None]), up))


@torch.no_grad()
def make_factors(layers: Sequence[tuple[nn.Module, str, Sequence[LowRank]]]) -> list[Factors]:
    """The factors of many layers at once, each given by its module, its name and its parts.

    What is in the right place and precision already and stands alone is used as it is, without a copy:
    on a CPU, nearly everything.
    Raises: LoraIncompatible with a layer whose factors overflow its precision.
    """
    places = [_kept_place(module, parts) for module, _, parts in layers]
    placed = _Placed(
        [
            (tensor, place)
            for (_, _, parts), place in zip(layers, places, strict=True)
            for part in parts
            for tensor in (part.down, part.up)
        ]
    )
    made = []
    for (module, name, parts), place in zip(layers, places, strict=True):
        own = [
            LowRank(placed.get(p.down, place), placed.get(p.up, place), p.scaling) for p in parts
        ]
        factors = Factors(*_joined(module, own), tuple(parts))
        if not placed.all_finite and not all(
            bool(t.float().isfinite().all()) for t in (factors.down, factors.up)
        ):
            raise LoraIncompatible(
                f"the factors of {name} overflow {str(place[1]).removeprefix('torch.')}",
                "This LoRA cannot be used in the model's precision.",
            )
        made.append(factors)
    return made


def _kept_place(module: nn.Module, parts: Sequence[LowRank]) -> Place:
    device, dtype = compute_place(module)
    return device, _kept_dtype(device, dtype, parts)


def _kept_dtype(device: torch.device, dtype: torch.dtype, parts: Sequence[LowRank]) -> torch.dtype:
    """What a layer's factors are kept in: what they come in, if they are widened for the products anyway."""
    wide = product_dtype(device, dtype)
    if wide == dtype:
        return dtype
    found = {tensor.dtype for part in parts for tensor in (part.down, part.up)}
    return found.pop() if len(found) == 1 and found <= PLAIN else wide


def _joined(module: nn.Module, parts: Sequence[LowRank]) -> tuple[Tensor, Tensor]:
    """down and up of all parts side by side, in the forms that `Factors` has."""
    if len(parts) == 1:
        down = parts[0].down if parts[0].down.dim() == 2 else parts[0].down.flatten(1)
    else:
        down = torch.cat([part.down.flatten(1) for part in parts])
    up = parts[0].up if len(parts) == 1 else torch.cat([part.up for part in parts], dim=1)
    if isinstance(module, nn.Conv2d):
        return down.view(-1, *module.weight.shape[1:]), up[:, :, None, None]
    return down, up.t()


class _Placed:
    """Tensors in another place or precision. Those of one file share a storage, which goes as a whole
    if most of it is wanted.
    """

    def __init__(self, wanted: Sequence[tuple[Tensor, Place]]) -> None:
        self.all_finite = True
        """False if a number may have become infinite on the way to a narrower precision."""
        self._whole: dict[tuple[int, Place], Tensor] = {}
        self._wanted: dict[tuple[int, Place], int] = defaultdict(int)
        for tensor, place in wanted:
            if (tensor.device, tensor.dtype) != place:
                key = tensor.untyped_storage().data_ptr(), place
                self._wanted[key] += tensor.numel() * tensor.element_size()

    def get(self, tensor: Tensor, place: Place) -> Tensor:
        """The tensor there, itself if it is there already."""
        if (tensor.device, tensor.dtype) == place:
            return tensor
        storage = tensor.untyped_storage()
        key = storage.data_ptr(), place
        if 2 * self._wanted[key] < storage.nbytes():
            return self._moved(tensor, place)
        whole = self._whole.get(key)
        if whole is None:
            empty = torch.empty(0, dtype=tensor.dtype, device=tensor.device)
            whole = self._whole[key] = self._moved(empty.set_(storage), place)  # type: ignore[arg-type]
        return whole.as_strided(tensor.shape, tensor.stride(), tensor.storage_offset())

    def _moved(self, tensor: Tensor, place: Place) -> Tensor:
        moved = tensor.to(*place)
        if place[1] is torch.float16 and tensor.dtype is not torch.float16 and moved.numel():
            self.all_finite &= all(bool(end.isfinite()) for end in torch.aminmax(moved))
        return moved
