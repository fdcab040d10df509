"""Copies of the weights that are written to, and their exact restoration."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils.weak import WeakIdKeyDictionary

from lora.lru import ByteLru

WeightVersion = tuple[StorageWeakRef, int, int, torch.device, torch.dtype]
"""Storage, offset, version, device and dtype. Not the address: an allocator reuses those that were freed."""


class Originals:
    """Copies of weights, taken before they are written to and copied back afterwards; never computed.

    After a block the copies stay, up to a budget, so that the next block need not make them again. A weight
    that someone else has written to, moved or converted since is noticed by its version and storage,
    and copied anew. (Writes through `.data` do not count as a version: call `forget` after them.)
    """

    def __init__(self, budget: int) -> None:
        self._kept: ByteLru[Tensor] = ByteLru(budget)  # by the parameter's id
        self._held: dict[nn.Parameter, Tensor] = {}
        # Weight -> its version when we last saw it, and its generation. Parameters that the model has dropped
        # must not live on here.
        self._known: WeakIdKeyDictionary = WeakIdKeyDictionary()  # type: ignore[no-untyped-call]

    def generation(self, weight: nn.Parameter) -> int:
        """How often the weight's own values were seen to change. What was made from earlier ones is stale."""
        self._look(weight)
        generation: int = self._known[weight][1]
        return generation

    def missing_bytes(self, weights: list[nn.Parameter]) -> int:
        """How many bytes of new copies writing to all of these would take."""
        new = [w for w in weights if w not in self._held and id(w) not in self._kept]
        return sum(w.numel() * w.element_size() for w in new)

    def hold(self, weight: nn.Parameter) -> Tensor:
        """The weight's original, which is held until `restore`. The weight is not changed."""
        if weight not in self._held:
            self._look(weight)
            kept = self._kept.get(id(weight))
            self._held[weight] = _copy(weight) if kept is None else kept
        return self._held[weight]

    @torch.no_grad()
    def restore(self, weight: nn.Parameter) -> None:
        """Copies the original back into the weight's own storage, if it is held.

        If that fails for any reason, the original stays held. Otherwise it is kept if the budget allows.
        """
        original = self._held.get(weight)
        if original is None:
            return
        weight.copy_(original)
        self._known[weight] = _version(weight), self._known[weight][1]
        del self._held[weight]
        self._kept.put(id(weight), original, original.numel() * original.element_size())

    def forget(self) -> None:
        """Drops every copy that is not held."""
        self._kept.clear()
        for weight in [w for w in self._known if w not in self._held]:
            del self._known[weight]

    def _look(self, weight: nn.Parameter) -> None:
        """Checks whether somebody else has changed a weight that we do not hold."""
        if weight in self._held:
            return
        known, generation = self._known.get(weight, (None, -1))  # type: ignore[no-untyped-call]
        version = _version(weight)
        if version is None or known != version:
            self._kept.pop(id(weight))
            self._known[weight] = version, generation + 1


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
