"""Answers of the last minutes, for a platform that repeats a job because its answer was lost."""

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
    """Answers by job id and input, kept for ten minutes as long as they fit.

    A retry has the id and the input of the first try; no other job has both. A job without an id is not kept.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._guard = threading.Lock()
        self._answers: ByteLru[_Kept] = ByteLru(BYTES)

    def get(self, job: Mapping[str, Any]) -> dict[str, Any] | None:
        """The answer that this job had in the last minutes."""
        with self._guard:
            kept = self._answers.get(str(job.get("id")))
        if kept is None or self._clock() - kept.at > SECONDS:
            return None
        return dict(kept.answer) if kept.request == job.get("input") else None

    def put(self, job: Mapping[str, Any], answer: Mapping[str, Any]) -> None:
        """Keeps an answer, whose values must not be changed any more."""
        kept = _Kept(self._clock(), job.get("input"), dict(answer))
        size = _characters(kept.request) + _characters(answer)
        if job.get("id"):
            with self._guard:
                self._answers.put(str(job["id"]), kept, size)


def _characters(value: Any) -> int:
    """About the bytes that a JSON value takes: the length of its texts."""
    if isinstance(value, str):
        return len(value)
    if isinstance(value, Mapping):
        return sum(_characters(name) + _characters(inner) for name, inner in value.items())
    return sum(map(_characters, value)) if isinstance(value, (list, tuple)) else 8
