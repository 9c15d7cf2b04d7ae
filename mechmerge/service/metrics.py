"""Figures for Prometheus (https://prometheus.io/docs/practices/naming/), in a registry of the server's own."""

from __future__ import annotations

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from mechmerge.service.store import Counts

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
"""What `generate_latest` writes."""


class Metrics:
    """The figures of one server."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self._requests = Counter(
            "mechmerge_http_requests_total", "Answered requests.", ["method", "route", "status"], registry=self.registry
        )
        self._latency = Histogram(
            "mechmerge_http_request_seconds",
            "Time to the first byte of an answer.",
            ["route"],
            buckets=(0.005, 0.01, 0.025, 0.05, 0.1, 0.2, 0.5, 1, 5),
            registry=self.registry,
        )
        self._streams = Gauge("mechmerge_event_streams", "Open event streams.", registry=self.registry)
        self._jobs = Gauge("mechmerge_jobs", "Jobs by state.", ["state"], registry=self.registry)
        self._slots = Gauge("mechmerge_slots", "Jobs that may run at once.", registry=self.registry)
        self._free = Gauge("mechmerge_disk_free_bytes", "Free space of the data folder's disk.", registry=self.registry)
        self._started = Counter("mechmerge_workers_started_total", "Workers that were started.", registry=self.registry)
        self._ended = Counter(
            "mechmerge_workers_ended_total", "Workers that ended, by how.", ["kind", "state"], registry=self.registry
        )
        self._seconds = Counter("mechmerge_worker_seconds_total", "Working time of workers that ended.", registry=self.registry)

    def answered(self, method: str, route: str, status: int, seconds: float) -> None:
        """A request was answered."""
        self._requests.labels(method, route, str(status)).inc()
        self._latency.labels(route).observe(seconds)

    def stream(self, change: int) -> None:
        """An event stream was opened (1) or closed (−1)."""
        self._streams.inc(change)

    def started(self) -> None:
        """A worker was started."""
        self._started.inc()

    def ended(self, kind: str, state: str, seconds: float) -> None:
        """A worker ended."""
        self._ended.labels(kind, state).inc()
        self._seconds.inc(seconds)

    def render(self, counts: Counts, slots: int, free: int) -> bytes:
        """Everything, in Prometheus' text format."""
        for state, number in counts.model_dump().items():
            self._jobs.labels(state).set(number)
        self._slots.set(slots)
        self._free.set(free)
        return generate_latest(self.registry)
