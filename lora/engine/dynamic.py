"""Low-rank changes that are added in a layer's forward: the weight is not touched.

y = W x + sum of scale * scaling * up (down x). The factors of a whole stack are concatenated along the rank,
so that N LoRAs cost one pair of products. On a GPU the products are in the layer's own precision. On a CPU
they are in float32 (thin products in half precision take 5 to 100 times as long there), and the factors stay
in the file's precision: each call of their layer widens them, to a copy that fits the processor's cache.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from lora.engine.modules import compute_place
from lora.errors import LoraIncompatible
from lora.formats.algorithms import LowRank
from lora.formats.tensors import COMPUTING

DeviceAndDtype = tuple[torch.device, torch.dtype]


def product_dtype(device: torch.device, dtype: torch.dtype) -> torch.dtype:
    """The precision of the two products for a layer on this device and of this precision."""
    return torch.promote_types(dtype, torch.float32) if device.type == "cpu" else dtype


@dataclass
class DeviceFactors:
    """The factors of all of a stack's changes of one layer, on the layer's device."""

    down: Tensor
    """[R, in] or [R, in, kh, kw], where R is the sum of the ranks."""
    up: Tensor
    """[R, out], or [out, R, 1, 1] for a convolution."""
    parts: tuple[LowRank, ...]
    """What they were made from, in order."""

    @property
    def size(self) -> int:
        """The bytes of the tensors."""
        return sum(t.numel() * t.element_size() for t in (self.down, self.up))


@dataclass
class ScaledFactors:
    """Factors, which stacks of the same files share, with one stack's scales."""

    factors: DeviceFactors
    each: tuple[float, ...]
    """What each part is multiplied by: the user's scale times its own scaling."""
    scales: Tensor
    """[R]: the same, for every row of `down`."""


def scaled(layers: Sequence[tuple[DeviceFactors, Sequence[float]]]) -> list[ScaledFactors]:
    """The factors of many layers with the user's scales, one per part. The factors are not changed.

    Raises: LoraIncompatible with a scale that overflows its layer's precision.
    """
    by_place: dict[DeviceAndDtype, list[int]] = defaultdict(list)
    for index, (factors, _) in enumerate(layers):
        device = factors.down.device
        by_place[device, product_dtype(device, factors.down.dtype)].append(index)
    made: dict[int, ScaledFactors] = {}
    for (device, dtype), indices in by_place.items():
        # One tensor for all layers: hundreds of small ones would take milliseconds.
        own = [layers[index] for index in indices]
        each = [
            tuple(s * part.scaling for s, part in zip(scales, factors.parts, strict=True))
            for factors, scales in own
        ]
        values = torch.tensor([value for layer in each for value in layer])
        largest = float(values.abs().max())
        if largest > torch.finfo(dtype).max:
            raise LoraIncompatible(
                f"a layer's scale (scale * alpha / rank) of {largest:g} overflows "
                f"{str(dtype).removeprefix('torch.')}",
                "Lower the scale.",
            )
        ranks = torch.tensor([part.down.shape[0] for factors, _ in own for part in factors.parts])
        rows = torch.repeat_interleave(values, ranks).to(device, dtype)
        split = torch.split(rows, [factors.down.shape[0] for factors, _ in own])
        for index, (factors, _), numbers, scales in zip(indices, own, each, split, strict=True):
            made[index] = ScaledFactors(factors, numbers, scales)
    return [made[index] for index in range(len(layers))]


class AdaptedForward:
    """What one module's `forward` calls while a stack is applied.

    torch.compile guards on the shapes of the tensors, not on this object: another stack with the same ranks,
    and another block with the same layers, run the graph that was compiled before.
    """

    original: Callable[..., Tensor]
    down: Tensor
    up: Tensor
    scales: Tensor
    uniform: float | None
    """The scale, if it is the same for every row."""

    def __init__(self, module: nn.Module) -> None:
        self._convolution = module if isinstance(module, nn.Conv2d) else None
        self._module = module
        self._added: ScaledFactors | None = None

    def set(self, original: Callable[..., Tensor], added: ScaledFactors) -> None:
        """Sets what is added to the output of `original` from now on."""
        self.original, self._added = original, added
        self.down, self.up, self.scales = added.factors.down, added.factors.up, added.scales
        self.uniform = added.each[0] if len(added.each) == 1 else None

    def clear(self) -> None:
        """Drops the references to the tensors."""
        self._added = None
        for name in ("original", "down", "up", "scales"):
            self.__dict__.pop(name, None)

    def _follow(self, out: Tensor) -> None:
        """Moves the factors to the output's device and precision: for layers that moved, or are packed."""
        if self._added is not None:
            factors = self._added.factors
            dtype = _kept_dtype(out.device, out.dtype, factors.parts)
            own = [
                LowRank(p.down.to(out.device, dtype), p.up.to(out.device, dtype), p.scaling)
                for p in factors.parts
            ]
            self.down, self.up = _joined(self._module, own)
            self.scales = self.scales.to(out.device, product_dtype(out.device, out.dtype))
            # Kept, so that the next block has them there at once.
            factors.down, factors.up, self._added.scales = self.down, self.up, self.scales

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
        else:  # saves a kernel in eager mode; compiled, the number would be a constant of the graph
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
def make_factors(layers: Sequence[tuple[nn.Module, str, Sequence[LowRank]]]) -> list[DeviceFactors]:
    """The factors of many layers at once. `layers`: the module, the name and the parts of each.

    Factors that are on the right device and in the right precision already, and are the only ones of their
    layer, are used without a copy: on a CPU, nearly all.
    Raises: LoraIncompatible with a layer whose factors overflow its precision.
    """
    places = [_kept_place(module, parts) for module, _, parts in layers]
    planned = list(zip(layers, places, strict=True))
    moves = [(t, place) for (_, _, parts), place in planned for p in parts for t in (p.down, p.up)]
    placed = _Placed(moves)
    made = []
    for (module, name, parts), place in planned:
        own = [
            LowRank(placed.get(p.down, place), placed.get(p.up, place), p.scaling) for p in parts
        ]
        factors = DeviceFactors(*_joined(module, own), tuple(parts))
        tensors = () if placed.all_finite else (factors.down, factors.up)
        if not all(bool(t.float().isfinite().all()) for t in tensors):
            raise LoraIncompatible(
                f"the factors of {name} overflow {str(place[1]).removeprefix('torch.')}",
                "This LoRA cannot be used in the model's precision.",
            )
        made.append(factors)
    return made


def _kept_place(module: nn.Module, parts: Sequence[LowRank]) -> DeviceAndDtype:
    device, dtype = compute_place(module)
    return device, _kept_dtype(device, dtype, parts)


def _kept_dtype(device: torch.device, dtype: torch.dtype, parts: Sequence[LowRank]) -> torch.dtype:
    """The precision that a layer's factors are kept in: their own, if the products widen them anyway."""
    wide = product_dtype(device, dtype)
    own = {tensor.dtype for part in parts for tensor in (part.down, part.up)}
    return own.pop() if wide != dtype and len(own) == 1 and own <= COMPUTING else wide


def _joined(module: nn.Module, parts: Sequence[LowRank]) -> tuple[Tensor, Tensor]:
    """down and up of all parts, concatenated, in the shapes that `DeviceFactors` has."""
    downs, ups = [part.down.flatten(1) for part in parts], [part.up for part in parts]
    down = downs[0] if len(parts) == 1 else torch.cat(downs)
    up = ups[0] if len(parts) == 1 else torch.cat(ups, dim=1)
    if isinstance(module, nn.Conv2d):
        return down.view(-1, *module.weight.shape[1:]), up[:, :, None, None]
    return down, up.t()


class _Placed:
    """Moves tensors to another device or precision. Those of one file share a storage, which is moved as a
    whole if most of it is wanted.
    """

    def __init__(self, wanted: Sequence[tuple[Tensor, DeviceAndDtype]]) -> None:
        self.all_finite = True
        """False if a number may have become infinite in a narrower precision."""
        self._whole: dict[tuple[int, DeviceAndDtype], Tensor] = {}
        self._wanted: dict[tuple[int, DeviceAndDtype], int] = defaultdict(int)
        for tensor, place in wanted:
            if (tensor.device, tensor.dtype) != place:
                key = tensor.untyped_storage().data_ptr(), place
                self._wanted[key] += tensor.numel() * tensor.element_size()

    def get(self, tensor: Tensor, place: DeviceAndDtype) -> Tensor:
        """The tensor on that device in that precision; itself, if it is so already."""
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

    def _moved(self, tensor: Tensor, place: DeviceAndDtype) -> Tensor:
        moved = tensor.to(*place)
        if place[1] is torch.float16 and tensor.dtype is not torch.float16 and moved.numel():
            self.all_finite &= all(bool(end.isfinite()) for end in torch.aminmax(moved))
        return moved
