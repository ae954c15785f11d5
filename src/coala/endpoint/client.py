"""One request to an OpenAI-compatible chat server: paced, paid for, sent again while that can help.

Knows what a chat request and its answer look like; nothing of what is asked, or of how a failure is told.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import math
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC
from email.utils import parsedate_to_datetime
from typing import Any

from coala.endpoint.budget import Ledger, Usage
from coala.endpoint.completion import Completion, read_completion
from coala.endpoint.secrets import strike
from coala.endpoint.transport import Answer, Connections, Post, Server, Unanswered
from coala.values import CoalaError

LONGEST_PAUSE = 86_400.0  # seconds, whatever a server asks for


@dataclass(frozen=True)
class RetryPolicy:
    """When to try again. Waits are ``first_wait`` 2^k seconds times 0.5 to 1, at most ``longest_wait``.

    A server's Retry-After is waited out by all requests to it; one above ``longest_asked`` is a failure. ``timeout`` is
    for one request, its whole answer with it. ``per_minute`` spaces requests evenly. After ``give_up_after`` requests
    in a row that all failed for good, who asks had better stop.
    """

    attempts: int = 6
    first_wait: float = 1.0
    longest_wait: float = 60.0
    timeout: float = 180.0
    give_up_after: int = 10
    longest_asked: float = math.inf
    per_minute: float | None = None

    def __post_init__(self) -> None:
        if self.attempts < 1 or self.give_up_after < 1:
            raise CoalaError(f"Patience of {self.attempts} attempts and {self.give_up_after} failures; expected 1 up.")
        if not (self.first_wait >= 0 and self.longest_wait >= 0 and self.timeout > 0):
            raise CoalaError(
                f"Waits of {self.first_wait} to {self.longest_wait} s, timeout {self.timeout} s; expected seconds."
            )


class RequestFailed(Exception):
    """No completion came, and to send the request again would not help, or has not after so many ``attempts``.

    ``kind`` is "timeout", "connection", "not read" (too large, or compressed), "malformed" (no completion), "rate
    limit", "server error" or "rejected". ``said`` is how the answer begins, on one line, the keys struck out.
    """

    def __init__(self, kind: str, reason: str, answer: Answer | None = None, said: str = "") -> None:
        super().__init__(reason)
        self.kind, self.said, self.attempts = kind, said, 1
        self.status, self.headers = (answer.status, answer.headers) if answer else (0, {})

    @property
    def after(self) -> float | None:
        """Seconds the server asks to wait: `retry-after-ms`, or `Retry-After` as seconds or a date; None without."""
        for name, unit in (("retry-after-ms", 1000.0), ("retry-after", 1.0)):
            with suppress(ValueError):
                seconds = float(self.headers.get(name, "")) / unit
                if math.isfinite(seconds):
                    return max(0.0, seconds)
        with suppress(ValueError, TypeError, OverflowError):
            date = parsedate_to_datetime(self.headers.get("retry-after", ""))
            return max(0.0, date.replace(tzinfo=date.tzinfo or UTC).timestamp() - time.time())
        return None

    @property
    def is_out_of_quota(self) -> bool:
        return "insufficient_quota" in self.said


class Stopped(Exception):
    """Nothing more is sent, since :meth:`Client.stop` was called."""


class Client:
    """Asks chat servers, many requests at a time, as ``policy`` says and ``ledger`` allows; for one event loop.

    ``secrets`` are struck out of all that comes back; ``post`` replaces the network.
    """

    def __init__(
        self, policy: RetryPolicy, ledger: Ledger, secrets: Iterable[str] = (), post: Post | None = None
    ) -> None:
        self.policy, self.ledger = policy, ledger
        self.requests = self.retries = 0
        self._connections = Connections()
        self.close = self._connections.close
        self._post = post or self._connections.post
        self._secrets = tuple(secrets)
        self._stopped = asyncio.Event()
        self._free_at = 0.0  # when the next request may start
        self._not_before: defaultdict[str, float] = defaultdict(float)

    def stop(self) -> None:
        """End all waits and send nothing more; what is under way is let finish."""
        self._stopped.set()

    def resume(self) -> None:
        self._stopped.clear()

    def struck(self, text: str) -> str:
        return strike(text, self._secrets)

    async def ask(
        self,
        server: Server,
        request: Mapping[str, Any],
        cost: Callable[[Completion | None], Usage],
        count: Callable[[Usage], None] = lambda used: None,
    ) -> Completion:
        """The completion of ``request``; every usage on the way is told to ``count``.

        ``cost`` tells what a completion took; of ``None``, what a request can take at most, which is set aside before,
        and counted where it may have been carried out and nobody knows.

        Raises :class:`RequestFailed`, :class:`Stopped`, and :class:`~coala.endpoint.budget.OutOfBudget` before anything
        is sent that might not be paid for.
        """
        body = json.dumps(request, ensure_ascii=False, separators=(",", ":")).encode("utf-8", "replace")
        bound, attempts = cost(None), 0
        while True:
            await self._turn(server)
            await self.ledger.reserve(bound)
            used = bound
            try:
                if self._stopped.is_set():
                    raise Stopped
                self.requests += 1
                answer = await self._post(server, body, self.policy.timeout)
                used = bound if answer.status < 300 else Usage()
                found = self._read(answer)
                used = cost(found)
                return found
            except Unanswered as error:
                failed = RequestFailed(error.kind, self.struck(str(error)))
                used = bound if error.sent else Usage()
            except RequestFailed as error:
                failed = error
            finally:
                await self.ledger.settle(bound, used)
                count(used)
            failed.attempts = attempts = attempts + 1
            if attempts >= self.policy.attempts or not self._may_pass(failed):
                raise failed
            self.retries += 1
            await self._wait(server, failed, body)

    def _read(self, answer: Answer) -> Completion:
        reason, kind = "", "rejected"
        if 200 <= answer.status < 300:
            try:
                return read_completion(answer.body, self.struck)
            except ValueError as error:
                reason, kind = self.struck(str(error)), "malformed"
        elif answer.status in (408, 409, 425) or answer.status >= 500:
            kind = "server error"
        elif answer.status == 429:
            kind = "rate limit"
        # Struck out before it is cut: a part of a key is a part of a secret.
        said = self.struck(answer.body[:5000].decode("utf-8", "replace"))[:1000]
        raise RequestFailed(kind, reason, answer, " ".join(said.split()))

    def _may_pass(self, failed: RequestFailed) -> bool:
        is_final = failed.kind in ("not read", "rejected") or failed.is_out_of_quota
        return not is_final and (failed.after is None or failed.after <= self.policy.longest_asked)

    async def _turn(self, server: Server) -> None:
        """Wait until this request may start: one at a time through the gate, evenly spaced under a rate."""
        while (pause := self._not_before[server.url] - time.monotonic()) > 0:
            await self._pause(pause)
        if self.policy.per_minute is not None:
            now = time.monotonic()
            start = max(now, self._free_at)
            self._free_at = start + 60 / self.policy.per_minute
            if start > now:
                await self._pause(start - now)

    async def _wait(self, server: Server, failed: RequestFailed, body: bytes) -> None:
        # Drawn from the request, so that no hidden state is needed and yet no two requests wait alike.
        drawn = hashlib.blake2b(f"{failed.attempts} ".encode() + body, digest_size=4).digest()
        share, policy = int.from_bytes(drawn, "big") / 2**32, self.policy
        if failed.after is None:
            longest = min(policy.longest_wait, policy.first_wait * 2.0 ** (failed.attempts - 1))
            await self._pause(longest * (0.5 + share / 2))
        else:
            # The server speaks to all of us; what is drawn keeps those it has refused from coming all at once.
            after = min(failed.after, LONGEST_PAUSE)
            self._not_before[server.url] = max(self._not_before[server.url], time.monotonic() + after)
            await self._pause(after + min(0.1 * after, policy.first_wait) * share)

    async def _pause(self, seconds: float) -> None:
        with suppress(TimeoutError):
            await asyncio.wait_for(self._stopped.wait(), seconds)
            raise Stopped
