"""The tools for adapter files and checkpoints, as functions; and how each reports its progress."""

from __future__ import annotations

from collections.abc import Callable

OnProgress = Callable[[int, int, str], None]
"""Called with (done, total, what); the unit is the tool's."""


def ignore_progress(done: int, total: int, what: str) -> None:
    """For callers who do not watch."""
