"""A dictionary that keeps what was used lately, within a number of bytes."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Hashable
from typing import Generic, TypeVar

Value = TypeVar("Value")


class ByteLru(Generic[Value]):
    """A dictionary with a budget in bytes; what was used least recently goes first. Not thread-safe."""

    def __init__(self, budget: int) -> None:
        self.budget = budget
        self._entries: OrderedDict[Hashable, tuple[Value, int]] = OrderedDict()
        self.size = 0
        """The bytes of all values."""

    def __contains__(self, key: Hashable) -> bool:
        return key in self._entries

    def __len__(self) -> int:
        return len(self._entries)

    def get(self, key: Hashable) -> Value | None:
        """The value, which counts as used now; None if it is not there (any more)."""
        if key not in self._entries:
            return None
        self._entries.move_to_end(key)
        return self._entries[key][0]

    def put(self, key: Hashable, value: Value, size: int) -> None:
        """Keeps the value unless it is over the budget alone; removes the least recently used for it."""
        self.pop(key)
        if size > self.budget:
            return
        self._entries[key] = value, size
        self.size += size
        while self.size > self.budget:
            self.pop(next(iter(self._entries)))

    def pop(self, key: Hashable) -> None:
        """Forgets one entry."""
        if key in self._entries:
            self.size -= self._entries.pop(key)[1]

    def clear(self) -> None:
        """Forgets all entries."""
        self._entries.clear()
        self.size = 0
