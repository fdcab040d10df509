"""Answers of the last minutes, for a platform that asks again because an answer did not reach it."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from lora.lru import ByteLru

BYTES, SECONDS = 64_000_000, 600.0


@dataclass(frozen=True)
class _Kept:
    at: float
    request: Any
    answer: Mapping[str, Any]


class KeptAnswers:
    """Answers by job id and input: as long as they fit, and for ten minutes.

    A retry has the id and the input of the first try; nobody else's job has both.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._guard = threading.Lock()
        self._known: ByteLru[_Kept] = ByteLru(BYTES)

    def get(self, job: Mapping[str, Any]) -> dict[str, Any] | None:
        """The answer that this very job had a while ago."""
        with self._guard:
            found = self._known.get(str(job.get("id")))
        if found is None or self._clock() - found.at > SECONDS:
            return None
        return dict(found.answer) if found.request == job.get("input") else None

    def put(self, job: Mapping[str, Any], answer: Mapping[str, Any]) -> None:
        """Keeps an answer; of what it holds, nothing may be changed any more."""
        kept = _Kept(self._clock(), job.get("input"), dict(answer))
        with self._guard:
            self._known.put(
                str(job.get("id")), kept, _characters(kept.request) + _characters(answer)
            )


def _characters(value: Any) -> int:
    """About how many bytes a JSON value takes: the length of its texts."""
    if isinstance(value, str):
        return len(value)
    if isinstance(value, Mapping):
        return sum(_characters(name) + _characters(one) for name, one in value.items())
    return sum(map(_characters, value)) if isinstance(value, (list, tuple)) else 8
