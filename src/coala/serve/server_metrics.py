"""What a server counts and times, for Prometheus; knows nothing of addresses but their names."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from coala.serve.limits import Limits
from coala.serve.metrics import Counter, Gauge, Histogram, Metric
from coala.serve.worker import Worker

if TYPE_CHECKING:
    from coala.serve.answers import Replying

ADDRESSES = (
    *("/", "/page.css", "/playground.js", "/openapi.json", "/healthz", "/metrics", "/v1/models", "/v1/score"),
    *("/v1/rerank", "/v1/completions", "/v1/chat/completions"),
)
STATM = Path("/proc/self/statm")
T = TypeVar("T")


class Observed:
    """The server's counters; all methods are for the event loop's thread."""

    def __init__(self, worker: Worker, limits: Limits) -> None:
        self.worker = worker
        self._requests = Counter("coala_requests_total", "Requests by address and status; 499: the client hung up.")
        self._seconds = Histogram("coala_request_seconds", "Time of whole requests.")
        self._first = Histogram("coala_first_text_seconds", "Time from a request's start to its first text.")
        self._tokens = Counter("coala_tokens_total", "Tokens read and written, as usage counts them.")
        self.metrics: list[Metric] = [
            self._requests,
            self._seconds,
            self._first,
            self._tokens,
            Gauge("coala_replies_in_hand", "Replies and chores, running or waiting.", lambda: worker.unfinished),
            Gauge("coala_replies_running", "Replies the model is writing.", lambda: worker.running),
            Gauge("coala_replies_waiting", "Replies that wait for a row.", lambda: worker.waiting),
            Gauge("coala_replies_capacity", "Most in hand; requests beyond are answered 429.", lambda: limits.capacity),
            Gauge("coala_engine_failures", "Times the engine failed and was replaced.", lambda: worker.failures),
        ]
        if STATM.exists():
            self.metrics.append(Gauge("process_resident_memory_bytes", "Resident memory.", _resident))

    def request(self, path: str, status: int, seconds: float) -> None:
        """An answered request. Addresses that do not exist share a label: what clients make up must not fill memory."""
        known = "/v1/models/{model}" if path.startswith("/v1/models/") else path if path in ADDRESSES else "other"
        self._requests.add(address=known, status=str(status))
        self._seconds.observe(seconds, address=known)

    @property
    def n_requests(self) -> int:
        return round(self._requests.total)

    @property
    def n_tokens(self) -> int:
        return round(self._tokens.total)

    def usage(self, usage: Mapping[str, int]) -> None:
        self._tokens.add(usage["prompt_tokens"], kind="read")
        self._tokens.add(usage["completion_tokens"], kind="written")

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


def _resident() -> float:
    import resource

    return int(STATM.read_text().split()[1]) * resource.getpagesize()
