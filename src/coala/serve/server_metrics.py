"""What a server counts and times, for Prometheus; knows nothing of addresses but their names."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator, Iterable, Mapping
from typing import TYPE_CHECKING, Any, TypeVar

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, Metric, ProcessCollector, generate_latest
from prometheus_client.exposition import CONTENT_TYPE_PLAIN_0_0_4
from prometheus_client.registry import Collector

from coala.serve.limits import Limits
from coala.serve.worker import Worker

if TYPE_CHECKING:
    from coala.serve.answers import Replying

TYPE = CONTENT_TYPE_PLAIN_0_0_4
ADDRESSES = (
    *("/", "/page.css", "/playground.js", "/openapi.json", "/healthz", "/metrics", "/v1/models", "/v1/score"),
    *("/v1/rerank", "/v1/completions", "/v1/chat/completions"),
)
SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0)
T = TypeVar("T")


class Observed(Collector):
    """The server's counters; all methods are for the event loop's thread."""

    def __init__(self, worker: Worker, limits: Limits) -> None:
        self.worker = worker
        self._registry = registry = CollectorRegistry()
        about = "Requests by address and status; 499: the client hung up."
        self._requests = Counter("coala_requests_total", about, ["address", "status"], registry=registry)
        about = "Time of whole requests."
        self._seconds = Histogram("coala_request_seconds", about, ["address"], registry=registry, buckets=SECONDS)
        about = "Time from a request's start to its first text."
        self._first = Histogram("coala_first_text_seconds", about, registry=registry, buckets=SECONDS)
        about = "Tokens read and written, as usage counts them."
        self._tokens = Counter("coala_tokens_total", about, ["kind"], registry=registry)
        for name, about, read in (
            ("replies_in_hand", "Replies and chores, running or waiting.", lambda: worker.unfinished),
            ("replies_running", "Replies the model is writing.", lambda: worker.running),
            ("replies_waiting", "Replies that wait for a row.", lambda: worker.waiting),
            (
                "replies_capacity",
                "Maximum number in progress; further requests are answered 429.",
                lambda: limits.capacity,
            ),
            ("engine_failures", "Times the engine failed and was replaced.", lambda: worker.failures),
        ):
            Gauge(f"coala_{name}", about, registry=registry).set_function(read)
        ProcessCollector(registry=registry)

    def collect(self) -> Iterable[Metric]:
        """All of it, but for the times at which the client library began to count, which it would add to each."""
        for metric in self._registry.collect():
            metric.samples = [sample for sample in metric.samples if not sample.name.endswith("_created")]
            yield metric

    def exposition(self) -> bytes:
        """As Prometheus reads it, of content type ``TYPE``."""
        return generate_latest(self)

    def request(self, path: str, status: int, seconds: float) -> None:
        """An answered request. Addresses that do not exist share a label: what clients make up must not fill memory."""
        known = "/v1/models/{model}" if path.startswith("/v1/models/") else path if path in ADDRESSES else "other"
        self._requests.labels(known, status).inc()
        self._seconds.labels(known).observe(seconds)

    @property
    def n_requests(self) -> int:
        return _total(self._requests)

    @property
    def n_tokens(self) -> int:
        return _total(self._tokens)

    def usage(self, usage: Mapping[str, int]) -> None:
        self._tokens.labels("read").inc(usage["prompt_tokens"])
        self._tokens.labels("written").inc(usage["completion_tokens"])

    async def growth(self, growing: AsyncIterator[T]) -> AsyncIterator[T]:
        """Pass on, timing the first."""
        began = time.monotonic()
        first = True
        async for one in growing:
            if first:
                self._first.observe(time.monotonic() - began)
                first = False
            yield one

    async def stream(self, made: AsyncIterator[dict[str, Any]], replying: Replying) -> AsyncIterator[dict[str, Any]]:
        """Pass on a stream's events; what was used is counted if it comes to its end."""
        async for one in self.growth(made):
            yield one
        self.usage(replying.usage)


def _total(counter: Counter) -> int:
    samples = (sample for metric in counter.collect() for sample in metric.samples)
    return round(sum(sample.value for sample in samples if sample.name.endswith("_total")))
