"""What the library answers: one adapter, a page of a list, the outcome of a scan."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from lora.library.files import Adapter
from lora.library.states import State, as_answer

TRAINING = "training:"
"""Begins the names of what lies in the training folder; no job's name of a cached file can."""


@dataclass(frozen=True)
class Item:
    """One adapter of the library, and what is known of it."""

    name: str
    adapter: Adapter
    state: State

    @cached_property
    def texts(self) -> str:
        """What a search looks through, in lower case."""
        return "\n".join((self.name, self.state.source or "", *self.state.words)).casefold()

    @property
    def file(self) -> str | None:
        """What a job names it by; None for a training folder's that was not published."""
        return self.state.file if self.name.startswith(TRAINING) else self.name

    def as_answer(self) -> dict[str, Any]:
        """Everything about it, JSON-safe, with no path of this machine."""
        return {
            "name": self.name,
            **as_answer(self.state),
            "file": self.file,
            "bytes": self.adapter.stamp.size,
            "pinned": self.adapter.pinned,
        }


@dataclass(frozen=True)
class Query:
    """What a list is narrowed to. None: not by this. Upper and lower case are the same."""

    state: str | None = None
    base: str | None = None
    algorithm: str | None = None
    """One of those that occur in the file."""
    word: str | None = None
    """A trigger word, whole."""
    text: str | None = None
    """Anywhere in the name, the source or the trigger words."""
    page: int = 1
    per_page: int = 100

    def fits(self, item: Item) -> bool:
        """Whether an adapter is one of those."""
        state = item.state
        return (
            self.state in (None, state.state)
            and _is_one(self.base, [state.base or ""])
            and _is_one(self.algorithm, (state.algorithm or "").split("+"))
            and _is_one(self.word, state.words)
            and (self.text is None or self.text.casefold() in item.texts)
        )

    def page_of(self, items: Iterable[Item]) -> Page:
        """The page of those that fit, in the order of their names."""
        found = sorted((one for one in items if self.fits(one)), key=lambda one: one.name)
        start = (self.page - 1) * self.per_page
        pages = -(-len(found) // self.per_page)
        return Page(tuple(found[start : start + self.per_page]), len(found), pages)


@dataclass(frozen=True)
class Page:
    """One page of a list."""

    items: tuple[Item, ...]
    total: int
    """How many adapters fit the query, on all pages."""
    pages: int


@dataclass(frozen=True)
class Scanned:
    """What a scan found."""

    standings: Mapping[str, int]
    """How many adapters stand how."""
    looked_at: int
    """How many were new, or changed since the last scan."""
    warnings: tuple[str, ...]


def _is_one(wanted: str | None, there: Iterable[str]) -> bool:
    return wanted is None or wanted.casefold() in [one.casefold() for one in there]
