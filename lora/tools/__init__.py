"""The tools for adapter files and checkpoints, as functions, and how each says how far it is."""

from __future__ import annotations

from collections.abc import Callable

Tell = Callable[[int, int, str], None]
"""Told of progress: how much is done, of how much, and what. The tool says in which unit."""


def tell_nobody(done: int, total: int, what: str) -> None:
    """For callers that do not watch."""
