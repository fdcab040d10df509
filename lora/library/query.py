"""The library's answers: one adapter, a page of a list, the outcome of a scan."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from functools import cached_property
from typing import Any

from lora.library.notes import Note
from lora.library.states import State
from lora.volume.adapters import FileVersion, StoredAdapter

TRAINING = "training:"
"""How the names of adapters in the training folder begin; a cached file's name in a job never does."""


@dataclass(frozen=True)
class Item:
    """One adapter of the library, and what is known of it."""

    name: str
    adapter: StoredAdapter
    state: State
    sha256: str | None = None
    """Its hash as its record has it, where the state has none."""
    note: Note | None = None

    @cached_property
    def texts(self) -> str:
        """The text that a search looks through, in lower case."""
        noted = (*self.note.words, self.note.text) if self.note else ()
        texts = (self.name, self.state.source or "", *self.state.words, *noted)
        return "\n".join(texts).casefold()

    @property
    def file(self) -> str | None:
        """Its name for jobs; None for an adapter of the training folder that was not published."""
        return self.state.file if self.name.startswith(TRAINING) else self.name

    def as_answer(self) -> dict[str, Any]:
        """Everything about it, JSON-safe, with no path of this machine."""
        hidden, preview = (*FileVersion._fields, "decided"), self.adapter.preview
        state = {name: value for name, value in asdict(self.state).items() if name not in hidden}
        return {
            "name": self.name,
            **state,
            "state": str(self.state.state),
            "sha256": self.state.sha256 or self.sha256,
            "words": list(self.state.words),
            "note": self.note.as_answer() if self.note else None,
            "thumbnail": f"{preview.mtime_ns}-{preview.size}" if preview else None,
            "file": self.file,
            "bytes": self.adapter.version.size,
            "pinned": self.adapter.pinned,
        }


@dataclass(frozen=True)
class Query:
    """The filters of a list; None filters nothing. Upper and lower case are the same."""

    state: str | None = None
    base: str | None = None
    algorithm: str | None = None
    """One of the algorithms that occur in the file."""
    word: str | None = None
    """A trigger word, whole."""
    text: str | None = None
    """Anywhere in the name, the source, the trigger words or the note."""
    page: int = 1
    per_page: int = 100

    def fits(self, item: Item) -> bool:
        """Whether an adapter passes all filters."""
        state = item.state
        return (
            self.state in (None, state.state)
            and _is_one(self.base, [state.base or ""])
            and _is_one(self.algorithm, (state.algorithm or "").split("+"))
            and _is_one(self.word, state.words)
            and (self.text is None or self.text.casefold() in item.texts)
        )

    def page_of(self, items: Iterable[Item]) -> Page:
        """The page of the adapters that fit, in the order of their names."""
        fitting = sorted(filter(self.fits, items), key=lambda item: item.name)
        start = (self.page - 1) * self.per_page
        pages = -(-len(fitting) // self.per_page)
        return Page(tuple(fitting[start : start + self.per_page]), len(fitting), pages)


@dataclass(frozen=True)
class Page:
    """One page of a list."""

    items: tuple[Item, ...]
    total: int
    """How many adapters fit the query, on all pages."""
    pages: int


@dataclass(frozen=True)
class Scanned:
    """The outcome of a scan."""

    standings: Mapping[str, int]
    """How many adapters have each standing."""
    looked_at: int
    """How many were new, or changed since the last scan."""
    warnings: tuple[str, ...]


def _is_one(wanted: str | None, values: Iterable[str]) -> bool:
    return wanted is None or wanted.casefold() in [value.casefold() for value in values]
