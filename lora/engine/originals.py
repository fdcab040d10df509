"""Copies of the weights that are written to, and their exact restoration."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils.weak import WeakIdKeyDictionary

from lora.lru import ByteLru

WeightVersion = tuple[StorageWeakRef, int, int, torch.device, torch.dtype]
"""Storage, offset, version, device and dtype. Not the address: an allocator reuses those that were freed."""


@dataclass
class Seen:
    """A weight as we last saw it."""

    version: WeightVersion | None
    generation: int
    """How often its own values were seen to change. What was made from earlier ones is stale."""


class Original(NamedTuple):
    """A weight's own values, and of which generation they are."""

    values: Tensor
    seen: Seen

    @property
    def generation(self) -> int:
        """See `Seen.generation`."""
        return self.seen.generation


class Originals:
    """Copies of weights, taken before they are written to and copied back afterwards; never computed.

    After a block the copies stay, up to a budget, so that the next block need not make them again. A weight
    that someone else has written to, moved or converted since is noticed by its version and storage,
    and copied anew. (Writes through `.data` do not count as a version: call `forget` after them.)
    """

    def __init__(self, budget: int) -> None:
        self._kept: ByteLru[Tensor] = ByteLru(budget)  # by the parameter's id
        self._held: dict[nn.Parameter, Original] = {}
        # Weight -> Seen. Parameters that the model has dropped must not live on here.
        self._known: WeakIdKeyDictionary = WeakIdKeyDictionary()  # type: ignore[no-untyped-call]

    def missing_bytes(self, weights: list[nn.Parameter]) -> int:
        """How many bytes of new copies writing to all of these would take."""
        new = [w for w in weights if w not in self._held and id(w) not in self._kept]
        return sum(w.numel() * w.element_size() for w in new)

    def hold(self, weight: nn.Parameter) -> Original:
        """The weight's original, which is held until `restore`. The weight is not changed."""
        held = self._held.get(weight)
        if held is None:
            seen = self._look(weight)
            kept = self._kept.get(id(weight))
            held = self._held[weight] = Original(_copy(weight) if kept is None else kept, seen)
        return held

    def restore(self, weight: nn.Parameter) -> None:
        """Copies the original back into the weight's own storage, if it is held. Gradients must be off.

        If that fails for any reason, the original stays held. Otherwise it is kept if the budget allows.
        """
        original = self._held.get(weight)
        if original is None:
            return
        values = original.values
        weight.copy_(values)
        original.seen.version = _version(weight)
        del self._held[weight]
        self._kept.put(id(weight), values, values.numel() * values.element_size())

    def forget(self) -> None:
        """Drops every copy that is not held."""
        self._kept.clear()
        for weight in [w for w in self._known if w not in self._held]:
            del self._known[weight]

    def _look(self, weight: nn.Parameter) -> Seen:
        """Notes whether somebody else has changed a weight that we do not hold."""
        version = _version(weight)
        seen: Seen | None = self._known.get(weight)  # type: ignore[no-untyped-call]
        if seen is None:
            seen = self._known[weight] = Seen(None, -1)
        if version is None or seen.version != version:
            self._kept.pop(id(weight))
            seen.version, seen.generation = version, seen.generation + 1
        return seen


def _version(weight: nn.Parameter) -> WeightVersion | None:
    if weight.is_inference():  # inference tensors do not count their versions
        return None
    storage = StorageWeakRef(weight.untyped_storage())  # type: ignore[no-untyped-call]
    return storage, int(weight.storage_offset()), weight._version, weight.device, weight.dtype


@torch.no_grad()
def _copy(weight: nn.Parameter) -> Tensor:
    """A copy on the weight's device, or in the machine's memory if the device has no room."""
    try:
        return weight.detach().clone()
    except torch.OutOfMemoryError:
        return weight.detach().to("cpu", copy=True)
