"""Sources that refused a moment ago are not asked again at once."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

from lora.errors import AccessDenied, LoraError, LoraNotFound

Kinds = tuple[type[LoraError], ...]


class Refusals:
    """Remembers for some seconds which source answered 404 (nothing is there) or 403 (not for us)."""

    def __init__(self, seconds: float) -> None:
        self._seconds = seconds
        self._guard = threading.Lock()
        self._until: dict[str, tuple[float, LoraError]] = {}

    @contextmanager
    def remembered(
        self, key: str, *, ask_anyway: bool = False, kinds: Kinds = (LoraNotFound, AccessDenied)
    ) -> Iterator[None]:
        """Wraps the asking of a source: raises its refusal of a moment ago, and remembers one of now.

        `kinds`: the errors that are remembered.
        """
        with self._guard:
            until, refusal = self._until.get(key, (0.0, None))
        if isinstance(refusal, kinds) and not ask_anyway and time.monotonic() < until:
            raise type(refusal)(refusal.sentence, refusal.hint)
        try:
            yield
        except kinds as error:
            now = time.monotonic()
            with self._guard:
                self._until = {k: v for k, v in self._until.items() if v[0] > now}
                self._until[key] = now + self._seconds, error
            raise
        with self._guard:
            self._until.pop(key, None)
