"""What the texts of a worker took: per model name, as an answer and as Prometheus reads it."""

from __future__ import annotations

import threading
import time
from collections import defaultdict, deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any
from weakref import WeakKeyDictionary

import torch
from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from text.generation import Generation

WINDOW = 60.0
"""Seconds over which requests per second are counted."""

MEANINGS = {
    "texts": "Texts that have ended",
    "failed": "Texts that failed",
    "prompt_tokens": "Tokens of prompts",
    "tokens": "Tokens that were written",
    "latency_seconds": "Mean seconds of a text",
    "first_token_seconds": "Mean seconds to a text's first token",
    "queue_seconds": "Mean seconds that a text waits",
    "load_seconds": "Mean seconds in which a text's adapters are fetched and parsed",
    "tokens_per_second": "Tokens per second of a text",
    "queries_per_second": "Texts that ended per second, over the last minute",
}
"""Figures per model name."""

COUNTERS = ("texts", "failed", "prompt_tokens", "tokens")
"""Those of them that only grow; Prometheus' names of these end in `_total`."""


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

    def rows(self) -> dict[str, dict[str, float]]:
        """The figures of `MEANINGS` for each model name."""
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
        registry = CollectorRegistry()
        registry.register(Figures(self, lambda: counts))
        return {
            "models": self.rows(),
            **counts,
            "peak_memory_bytes": peak_memory(),
            "prometheus": generate_latest(registry).decode(),
        }


@dataclass(frozen=True)
class Figures(Collector):
    """The statistics of a worker as Prometheus' library collects them."""

    statistics: Statistics
    counts: Callable[[], Mapping[str, int]]
    """How many texts wait, and how many are under way."""

    def collect(self) -> Iterator[Metric]:
        """Each figure, per model name where it has one."""
        rows = self.statistics.rows()
        for figure, meaning in MEANINGS.items():
            kind = CounterMetricFamily if figure in COUNTERS else GaugeMetricFamily
            metric = kind(f"worker_text_{figure}", meaning, labels=["model"])
            for name, row in rows.items():
                metric.add_metric([name], row[figure])
            yield metric
        for name, count in self.counts().items():
            yield GaugeMetricFamily(f"worker_text_{name}", f"Texts that are {name}", count)
        meaning = "Most bytes of the device's memory so far"
        yield GaugeMetricFamily("worker_text_peak_memory_bytes", meaning, peak_memory())


def peak_memory() -> int:
    """Most bytes that this process has had on the device; 0 without one."""
    return torch.cuda.max_memory_allocated() if torch.cuda.is_available() else 0
