"""The progress of several downloads, reported as one."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import NamedTuple

from lora.fetch.download import OnBytes


class Transfer(NamedTuple):
    """How far all downloads together are."""

    files: int
    """How many are running or complete."""
    done: int
    """Bytes."""
    total: int | None
    """Bytes; None as long as it is unknown for one of them."""
    rate: float
    """Bytes per second, since the first byte."""


Report = Callable[[Transfer], None]
"""A function that is told how far downloads are, from any thread."""


class Transfers:
    """Adds up the progress of each download, from any thread, and reports the sums in order."""

    def __init__(self, report: Report) -> None:
        self._report, self._guard = report, threading.Lock()
        self._progress: dict[int, tuple[int, int | None]] = {}
        self._begun: float | None = None

    def of(self, number: int) -> OnBytes:
        """The callback for the download of this number."""

        def on_bytes(done: int, total: int | None) -> None:
            with self._guard:
                self._begun = self._begun or time.monotonic()
                self._progress[number] = done, total
                self._report(self._sum(time.monotonic() - self._begun))

        return on_bytes

    def _sum(self, seconds: float) -> Transfer:
        done = sum(done for done, _ in self._progress.values())
        totals = [total for _, total in self._progress.values() if total is not None]
        total = sum(totals) if len(totals) == len(self._progress) else None
        return Transfer(len(self._progress), done, total, done / seconds if seconds > 0 else 0.0)
