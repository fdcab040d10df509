"""Answers of the last minutes, for a platform that asks again because an answer did not reach it."""

from __future__ import annotations

import hashlib
import json
import threading
import time
from collections.abc import Callable, Mapping
from typing import Any

from lora.lru import ByteLru

BYTES, SECONDS = 64_000_000, 600.0


class KeptAnswers:
    """Answers by job id and input, as JSON: as long as they fit, and for ten minutes."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._guard = threading.Lock()
        self._known: ByteLru[tuple[float, str]] = ByteLru(BYTES)

    def get(self, job: Mapping[str, Any]) -> dict[str, Any] | None:
        """The answer that this very job had a while ago."""
        with self._guard:
            found = self._known.get(_key(job))
        if found is None or self._clock() - found[0] > SECONDS:
            return None
        answer: dict[str, Any] = json.loads(found[1])
        return answer

    def put(self, job: Mapping[str, Any], answer: Mapping[str, Any]) -> None:
        """Keeps an answer. Raises: ValueError, TypeError if JSON cannot hold it."""
        text = json.dumps(answer, allow_nan=False)
        with self._guard:
            self._known.put(_key(job), (self._clock(), text), len(text))


def _key(job: Mapping[str, Any]) -> str:
    """A retry has the id and the input of the first try; nobody else's job has both."""
    text = json.dumps([job.get("id"), job.get("input")], sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()
