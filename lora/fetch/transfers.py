"""Several downloads, told as one."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import NamedTuple

from lora.fetch.download import Progress


class Transfer(NamedTuple):
    """How far all of them are."""

    files: int
    """How many are coming in, or have."""
    done: int
    """Bytes."""
    total: int | None
    """Bytes; None as long as one of them does not tell."""
    rate: float
    """Bytes per second, since the first byte."""


class Transfers:
    """Adds up what each download tells, from whatever thread, and tells the sum in order."""

    def __init__(
        self, tell: Callable[[Transfer], None], clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._tell, self._clock = tell, clock
        self._guard = threading.Lock()
        self._known: dict[int, tuple[int, int | None]] = {}
        self._begun: float | None = None

    def of(self, number: int) -> Progress:
        """What the download of this number calls."""

        def progress(done: int, total: int | None) -> None:
            with self._guard:
                if self._begun is None:
                    self._begun = self._clock()
                self._known[number] = done, total
                self._tell(self._sum(self._clock() - self._begun))

        return progress

    def _sum(self, seconds: float) -> Transfer:
        done = sum(done for done, _ in self._known.values())
        totals = [total for _, total in self._known.values() if total is not None]
        total = sum(totals) if len(totals) == len(self._known) else None
        return Transfer(len(self._known), done, total, done / seconds if seconds > 0 else 0.0)
