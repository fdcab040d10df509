"""A dictionary that keeps what was used lately, within a number of bytes."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Hashable
from dataclasses import dataclass
from typing import Generic, TypeVar

Value = TypeVar("Value")


@dataclass
class _Entry(Generic[Value]):
    value: Value
    size: int


class ByteLru(Generic[Value]):
    """A dictionary with a budget in bytes; what was used least recently goes first. Not thread-safe."""

    def __init__(self, budget: int) -> None:
        self.budget = budget
        self._entries: OrderedDict[Hashable, _Entry[Value]] = OrderedDict()
        self.size = 0
        """The bytes of all that is kept."""

    def __contains__(self, key: Hashable) -> bool:
        return key in self._entries

    def __len__(self) -> int:
        return len(self._entries)

    def get(self, key: Hashable) -> Value | None:
        """The value, which counts as used now; None if it is not there (any more)."""
        entry = self._entries.get(key)
        if entry is None:
            return None
        self._entries.move_to_end(key)
        return entry.value

    def put(self, key: Hashable, value: Value, size: int) -> None:
        """Keeps the value if it fits the budget at all; what was used least recently is removed for it."""
        self.pop(key)
        if size > self.budget:
            return
        self._entries[key] = _Entry(value, size)
        self.size += size
        while self.size > self.budget:
            _, oldest = self._entries.popitem(last=False)
            self.size -= oldest.size

    def pop(self, key: Hashable) -> None:
        """Forgets one entry."""
        entry = self._entries.pop(key, None)
        self.size -= entry.size if entry else 0

    def clear(self) -> None:
        """Forgets all entries."""
        self._entries.clear()
        self.size = 0
