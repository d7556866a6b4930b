"""What the service counts, in the form that Prometheus reads."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, Counter, Gauge, Histogram, generate_latest

__all__ = ["Counters"]

PREFIX = "varlora_serve"
SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60)
ROWS = (1, 2, 4, 8, 16, 32, 64, 128, 256)


class Counters:
    r"""The metrics of one service, in a registry of their own.

    Example:
        >>> counters = Counters()
        >>> counters.rows("answered", 3)
        >>> "varlora_serve_rows_total{outcome=\"answered\"} 3.0" in counters.text().decode()
        True
    """

    content_type = CONTENT_TYPE_LATEST

    def __init__(self) -> None:
        self.registry = CollectorRegistry()

        def made(kind: Any, name: str, text: str, *labels: str, **more: Any) -> Any:
            return kind(f"{PREFIX}_{name}", text, labels, registry=self.registry, **more)

        self._requests = made(Counter, "requests", "Requests by path and status.", "path", "status")
        self._seconds = made(
            Histogram, "request_seconds", "Seconds from a request's head to its answer.", "path", buckets=SECONDS
        )
        self._rows = made(Counter, "rows", "Rows that were answered, failed, or dropped unbegun.", "outcome")
        self._abstained = made(Counter, "abstained_rows", "Rows that were answered with the advice to abstain.")
        self._queue = made(Gauge, "queue_rows", "Rows in the queue, with those that a place is kept for.")
        self._batch = made(Histogram, "batch_rows", "Rows of a batch.", buckets=ROWS)
        self._batch_seconds = made(Histogram, "batch_seconds", "Seconds that a batch took.", buckets=SECONDS)
        self._waited = made(Histogram, "queue_seconds", "Seconds that a row was in the queue.", buckets=SECONDS)
        self._memory = made(Counter, "out_of_memory", "Batches that did not fit the memory and were halved.")
        for outcome in ("answered", "failed", "dropped"):
            self._rows.labels(outcome)

    def request(self, path: str, status: int, seconds: float) -> None:
        """A request was answered, or its client has gone (status 499)."""
        self._requests.labels(path, str(status)).inc()
        self._seconds.labels(path).observe(seconds)

    def answered(self) -> int:
        """Return how many requests for answers were answered with 200."""
        labels = {"path": "/v1/answer", "status": "200"}
        return int(self.registry.get_sample_value(f"{PREFIX}_requests_total", labels) or 0)

    def abstained(self, count: int) -> None:
        """Rows were answered with the advice to abstain."""
        self._abstained.inc(count)

    def rows(self, outcome: str, count: int) -> None:
        """Rows were `answered`, `failed` or `dropped`."""
        self._rows.labels(outcome).inc(count)

    def batch(self, rows: int, seconds: float) -> None:
        """A batch was drawn."""
        self._batch.observe(rows)
        self._batch_seconds.observe(seconds)

    def waited(self, seconds: float) -> None:
        """A row has left the queue."""
        self._waited.observe(seconds)

    def out_of_memory(self) -> None:
        """A batch did not fit and was halved."""
        self._memory.inc()

    def queue(self, length: Callable[[], int]) -> None:
        """Read the length of the queue by a call, when it is asked for."""
        self._queue.set_function(length)

    def text(self) -> bytes:
        """Return all metrics in Prometheus' text format."""
        return generate_latest(self.registry)
