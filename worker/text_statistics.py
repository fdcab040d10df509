"""What the texts of a worker took: per model name, as an answer and as Prometheus reads it."""

from __future__ import annotations

import threading
import time
from collections import defaultdict, deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any
from weakref import WeakKeyDictionary

import torch

from text.generation import Generation

WINDOW = 60.0
"""Seconds over which requests per second are counted."""


@dataclass
class _Sums:
    texts: int = 0
    failed: int = 0
    prompt_tokens: int = 0
    tokens: int = 0
    seconds: float = 0.0
    first_token_seconds: float = 0.0
    queue_seconds: float = 0.0
    decode_seconds: float = 0.0
    load_seconds: float = 0.0
    recent: deque[float] = field(default_factory=deque)


class Statistics:
    """Sums since the start. Any thread may add to them."""

    def __init__(self) -> None:
        self._guard = threading.Lock()
        self._sums: dict[str, _Sums] = defaultdict(_Sums)
        self._names: WeakKeyDictionary[Generation, str] = WeakKeyDictionary()

    def began(self, texts: Sequence[Generation], name: str, load_seconds: float) -> None:
        """Texts are to be written under this model name; loading their adapters took so long."""
        with self._guard:
            self._sums[name].load_seconds += load_seconds
            for text in texts:
                self._names[text] = name

    def ended(self, text: Generation) -> None:
        """A text has ended, well or not."""
        times, now = text.times, time.monotonic()
        with self._guard:
            sums = self._sums[self._names.pop(text, "")]
            sums.texts += 1
            sums.failed += text.error is not None
            sums.prompt_tokens += len(text.prompt)
            sums.tokens += len(text.tokens)
            sums.seconds += times.ended - times.queued
            if times.first:
                sums.first_token_seconds += times.first - times.queued
                sums.queue_seconds += times.begun - times.queued
                sums.decode_seconds += times.ended - times.first
            sums.recent.append(now)

    def _rows(self) -> dict[str, dict[str, float]]:
        now, rows = time.monotonic(), {}
        with self._guard:
            for name, sums in self._sums.items():
                while sums.recent and sums.recent[0] < now - WINDOW:
                    sums.recent.popleft()
                done = max(1, sums.texts - sums.failed)
                rows[name] = {
                    "texts": sums.texts,
                    "failed": sums.failed,
                    "prompt_tokens": sums.prompt_tokens,
                    "tokens": sums.tokens,
                    "latency_seconds": round(sums.seconds / max(1, sums.texts), 4),
                    "first_token_seconds": round(sums.first_token_seconds / done, 4),
                    "queue_seconds": round(sums.queue_seconds / done, 4),
                    "load_seconds": round(sums.load_seconds / max(1, sums.texts), 4),
                    "tokens_per_second": round(sums.tokens / sums.decode_seconds, 2)
                    if sums.decode_seconds
                    else 0.0,
                    "queries_per_second": round(len(sums.recent) / WINDOW, 4),
                }
        return rows

    def answer(self, counts: Mapping[str, int]) -> dict[str, Any]:
        """The figures per model name, the queue, the peak of the device's memory, and all as Prometheus text.

        Times are means per text.
        """
        rows = self._rows()
        peak = torch.cuda.max_memory_allocated() if torch.cuda.is_available() else 0
        lines = [
            f'worker_text_{figure}{{model="{_escaped(name)}"}} {value}'
            for name, row in rows.items()
            for figure, value in row.items()
        ]
        lines += [f"worker_text_{name} {value}" for name, value in counts.items()]
        lines.append(f"worker_text_peak_memory_bytes {peak}")
        return {
            "models": rows,
            **counts,
            "peak_memory_bytes": peak,
            "prometheus": "\n".join(lines) + "\n",
        }


def _escaped(name: str) -> str:
    return name.replace("\\", "\\\\").replace('"', '\\"').replace("\n", " ")
