"""The originals of the weights that are written to, and the exact way back."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef

from lora.lru import ByteLru

Stamp = tuple[StorageWeakRef, int, int, torch.device, torch.dtype]
"""Storage, offset, version, device and dtype. Not the address: an allocator gives a freed one again."""


@dataclass
class _Known:
    """What a weight looked like when we last left it."""

    stamp: Stamp | None
    generation: int


class Originals:
    """Copies of weights, taken before they are written to and put back afterwards; never computed.

    After a block the copies stay, up to a budget, so that the next one need not take them again. A weight
    that someone else has written to, moved or converted since is noticed by its version and storage,
    and its copy is taken anew. (Writes through `.data` leave no version: call `forget` after them.)
    """

    def __init__(self, budget: int) -> None:
        self._kept: ByteLru[Tensor] = ByteLru(budget)
        self._held: dict[nn.Parameter, Tensor] = {}
        self._known: dict[nn.Parameter, _Known] = {}

    @property
    def held(self) -> list[nn.Parameter]:
        """The weights that are written to now."""
        return list(self._held)

    def generation(self, weight: nn.Parameter) -> int:
        """How often the weight's own values have been seen to change: what was made from them is stale."""
        self._look(weight)
        return self._known[weight].generation

    def missing_bytes(self, weights: list[nn.Parameter]) -> int:
        """How much memory it would take to write to all of these."""
        new = [w for w in weights if w not in self._held and w not in self._kept]
        return sum(w.numel() * w.element_size() for w in new)

    def hold(self, weight: nn.Parameter) -> Tensor:
        """The weight's original, which stays until `release`. Nothing is changed."""
        if weight not in self._held:
            self._look(weight)
            kept = self._kept.get(weight)
            self._held[weight] = _copy(weight) if kept is None else kept
        return self._held[weight]

    @torch.no_grad()
    def restore(self, weight: nn.Parameter) -> None:
        """Writes the original back, into the weight's own storage. Raises: RuntimeError if it cannot."""
        original = self._held[weight]
        weight.copy_(original)
        self._known[weight].stamp = _stamp(weight)

    def release(self) -> None:
        """Ends the hold on all; the budget says which copies stay."""
        for weight, original in self._held.items():
            self._kept.put(weight, original, original.numel() * original.element_size())
        self._held.clear()

    def forget(self) -> None:
        """Drops every copy that is not held."""
        self._kept.clear()
        self._known = {weight: self._known[weight] for weight in self._held}

    def _look(self, weight: nn.Parameter) -> None:
        """Notices whether somebody else has changed a weight that we do not hold."""
        if weight in self._held:
            return
        known, stamp = self._known.get(weight), _stamp(weight)
        if known is None or stamp is None or known.stamp != stamp:
            self._kept.pop(weight)
            self._known[weight] = _Known(stamp, known.generation + 1 if known else 0)


def _stamp(weight: nn.Parameter) -> Stamp | None:
    if weight.is_inference():  # such tensors do not count their versions
        return None
    storage = StorageWeakRef(weight.untyped_storage())  # type: ignore[no-untyped-call]
    return storage, int(weight.storage_offset()), weight._version, weight.device, weight.dtype


@torch.no_grad()
def _copy(weight: nn.Parameter) -> Tensor:
    """On the weight's device, or in the machine's memory where the device has no room."""
    try:
        return weight.detach().clone()
    except torch.OutOfMemoryError:
        return weight.detach().to("cpu", copy=True)
