"""A session's figures, told once a second. Imports without torch."""

from __future__ import annotations

import threading
import time
from collections import Counter, defaultdict, deque
from pathlib import Path
from typing import Any

KEPT = 300
"""Percentiles are those of so many frames."""


class Monitor:
    """Counts frames, and keeps how long each part took. Any thread may call each method."""

    def __init__(self) -> None:
        self._guard = threading.Lock()
        self._counts: Counter[str] = Counter()
        self._all: Counter[str] = Counter()
        self._seconds: defaultdict[str, deque[float]] = defaultdict(lambda: deque(maxlen=KEPT))
        self._since = time.perf_counter()

    def count(self, what: str) -> None:
        """Counts one frame: `in`, `out`, `dropped`, `skipped` or `failed`."""
        with self._guard:
            self._counts[what] += 1
            self._all[what] += 1

    def took(self, part: str, seconds: float) -> None:
        """Notes how long one frame's part took: `frame`, `switch` or `queue`."""
        with self._guard:
            self._seconds[part].append(seconds)

    def figures(self) -> dict[str, Any]:
        """The message: frames per second since the last one, counts since the start, milliseconds, memory."""
        now = time.perf_counter()
        with self._guard:
            span, self._since = max(now - self._since, 1e-3), now
            counts, self._counts = self._counts, Counter()
            parts = {part: sorted(seconds) for part, seconds in self._seconds.items()}
            totals = dict(self._all)
        return {
            "type": "monitor",
            "fps_in": round(counts["in"] / span, 2),
            "fps_out": round(counts["out"] / span, 2),
            "frames": totals,
            "ms": {
                part: {"p50": _percentile(values, 0.5), "p95": _percentile(values, 0.95)}
                for part, values in parts.items()
            },
            "memory_mb": memory_mb(),
        }


def _percentile(values: list[float], share: float) -> float:
    return round(1000 * values[int(share * (len(values) - 1))], 2)


def memory_mb(status: Path = Path("/proc/self/status")) -> float | None:
    """What this process takes of the machine's memory; None where the system does not show it."""
    try:
        lines = status.read_text().splitlines()
    except OSError:
        return None
    kilobytes = [line.split()[1] for line in lines if line.startswith("VmRSS")]
    return round(int(kilobytes[0]) / 1000, 1) if kilobytes else None
