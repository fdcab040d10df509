"""Sources that said no a moment ago."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

from lora.errors import AccessDenied, LoraError, LoraNotFound

Kinds = tuple[type[LoraError], ...]


class Refusals:
    """Remembers for some seconds who answered that there is nothing (404), or not for us (403)."""

    def __init__(self, seconds: float) -> None:
        self._seconds = seconds
        self._guard = threading.Lock()
        self._known: dict[str, tuple[float, LoraError]] = {}

    @contextmanager
    def remembered(
        self, key: str, *, ask_anyway: bool = False, kinds: Kinds = (LoraNotFound, AccessDenied)
    ) -> Iterator[None]:
        """Around asking a source: raises what it answered a moment ago, and remembers what it answers now.

        `kinds`: the errors that are worth it.
        """
        with self._guard:
            until, known = self._known.get(key, (0.0, None))
        if isinstance(known, kinds) and not ask_anyway and time.monotonic() < until:
            raise type(known)(known.sentence, known.hint)
        try:
            yield
        except kinds as error:
            now = time.monotonic()
            with self._guard:
                self._known = {k: v for k, v in self._known.items() if v[0] > now}
                self._known[key] = now + self._seconds, error
            raise
        with self._guard:
            self._known.pop(key, None)
