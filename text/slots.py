"""K and V of the requests that are under way: rows that join and leave, each with a length of its own."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers.cache_utils import Cache

ROOM = 128
"""The tokens that a buffer begins with; it doubles where a row needs more."""


class Forward(NamedTuple):
    """What the model's forward gets for one call."""

    mask: Tensor
    """[rows, 1, new, past + new]: True where a token may look."""
    positions: Tensor
    """[rows, new]."""


class Slots(Cache):  # type: ignore[misc]
    """The K and V of every row, [rows, heads, room, width] in each layer, made when a layer first asks.

    A row belongs to one request from its first token to its last, and its numbers are overwritten with 0
    when it ends: nothing that one adapter computed is ever read under another.
    """

    def __init__(self, rows: int, device: torch.device) -> None:
        super().__init__(layers=[])
        self.rows = rows
        self.lengths = [0] * rows
        self._device = device
        self._room = ROOM
        self._keys: dict[int, Tensor] = {}
        self._values: dict[int, Tensor] = {}
        self._at: tuple[int, ...] = ()
        self._sizes: tuple[int, ...] = ()
        self._new = self._end = 0

    def begin(self, at: Sequence[int], sizes: Sequence[int]) -> Forward:
        """Prepares a forward in which row `at[i]` gets `sizes[i]` tokens; shorter ones are padded at the end.

        `end` follows it, or `begin` again if the forward failed: what was written then counts for nothing,
        as padding does: it lies where the row's next tokens will, and no token looks beyond itself.
        """
        self._at, self._sizes, self._new = tuple(at), tuple(sizes), max(sizes)
        self._end = max(self.lengths[row] for row in at) + self._new
        self._widen(self._end)
        past = torch.tensor([self.lengths[row] for row in at], device=self._device)
        self._rows = torch.tensor(self._at, device=self._device)
        self._positions = past[:, None] + torch.arange(self._new, device=self._device)
        there = torch.arange(self._end, device=self._device)
        mask = there[None, None, None, :] <= self._positions[:, None, :, None]
        return Forward(mask, self._positions)

    def end(self) -> None:
        """The forward is done: its tokens count."""
        for row, size in zip(self._at, self._sizes, strict=True):
            self.lengths[row] += size

    def update(  # the base class's name and order
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Stores the new tokens' K and V, [rows, heads, new, width], and returns all up to them."""
        keys = self._of(self._keys, layer_idx, key_states)
        values = self._of(self._values, layer_idx, value_states)
        for store, new in ((keys, key_states), (values, value_states)):
            store[self._rows[:, None], :, self._positions] = new.transpose(1, 2)
        first, last = self._at[0], self._at[-1]
        if self._at == tuple(range(first, last + 1)):  # a view; anything else would be a copy
            return keys[first : last + 1, :, : self._end], values[first : last + 1, :, : self._end]
        return keys[self._rows, :, : self._end], values[self._rows, :, : self._end]

    def _of(self, stores: dict[int, Tensor], layer: int, like: Tensor) -> Tensor:
        if layer not in stores:
            shape = (self.rows, like.shape[1], self._room, like.shape[3])
            stores[layer] = torch.zeros(shape, dtype=like.dtype, device=like.device)
        return stores[layer]

    def _widen(self, room: int) -> None:
        if room <= self._room:
            return
        wide = max(room, 2 * self._room)
        for stores in (self._keys, self._values):
            for layer, old in stores.items():
                new = old.new_zeros(*old.shape[:2], wide, old.shape[3])
                new[:, :, : old.shape[2]] = old
                stores[layer] = new
        self._room = wide

    def move(self, source: int, target: int) -> None:
        """Puts a row in another's place, which must be free."""
        length = self.lengths[source]
        for store in (*self._keys.values(), *self._values.values()):
            store[target, :, :length] = store[source, :, :length]
        self.lengths[target] = length
        self.free(source)

    def free(self, row: int) -> None:
        """Ends a row. Its numbers become 0: a NaN would reach the next one through the mask."""
        for store in (*self._keys.values(), *self._values.values()):
            store[row].zero_()
        self.lengths[row] = 0

    @property
    def size(self) -> int:
        """The bytes of the buffers."""
        stores = (*self._keys.values(), *self._values.values())
        return sum(store.numel() * store.element_size() for store in stores)

    def get_seq_length(self, *args: Any, **kwargs: Any) -> int:
        """How many tokens lie before the new ones, in the longest row; models ask for it."""
        return self._end - self._new

    def get_mask_sizes(self, *args: Any, **kwargs: Any) -> tuple[int, int]:
        """The width of the mask, and its offset; models ask for it."""
        return self._end, 0
