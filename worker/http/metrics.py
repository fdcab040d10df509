"""What the server counts, as Prometheus reads it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from prometheus_client import CollectorRegistry, Counter, Histogram, ProcessCollector
from prometheus_client.core import GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from worker.http.line import Line

SECONDS = (0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 20, 40, 80, 160, 320)
"""Upper bounds of the histogram's buckets: from an action to RunPod's limit."""


class Metrics:
    """One server's figures, in a registry of their own."""

    def __init__(self, jobs: Line) -> None:
        self.registry = CollectorRegistry()
        ProcessCollector(registry=self.registry)
        self.registry.register(_InLine(jobs))
        self._requests = Counter(
            "worker_http_requests",
            "Requests that were answered",
            ["route", "status"],
            registry=self.registry,
        )
        self._seconds = Histogram(
            "worker_http_request_seconds",
            "Seconds from a request to the end of its answer",
            ["route"],
            buckets=SECONDS,
            registry=self.registry,
        )
        self._phases = Counter(
            "worker_phase_seconds",
            "Seconds that pictures took, by phase",
            ["phase"],
            registry=self.registry,
        )

    def answered(self, route: str, status: int, seconds: float) -> None:
        """Counts a request; `status` is 0 where the client hung up."""
        self._requests.labels(route, str(status)).inc()
        self._seconds.labels(route).observe(seconds)

    def drew(self, timings: Mapping[str, float]) -> None:
        """Counts the seconds of a job's phases."""
        for phase, seconds in timings.items():
            self._phases.labels(phase).inc(seconds)


class _InLine(Collector):
    def __init__(self, jobs: Line) -> None:
        self._jobs = jobs

    def collect(self) -> Iterator[Metric]:
        """How many jobs are worked on, and wait."""
        yield GaugeMetricFamily(
            "worker_jobs_running", "Jobs that are worked on", self._jobs.working
        )
        yield GaugeMetricFamily("worker_jobs_waiting", "Jobs that wait", self._jobs.waiting)
