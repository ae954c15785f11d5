"""Judges' requests to an OpenAI-compatible endpoint: within a budget, counted, and failures told as judges fail.

Knows nothing of what is asked.
"""

from __future__ import annotations

import asyncio
import json
import math
import threading
import weakref
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from functools import cache
from typing import Any, Protocol

from coala.endpoint import (
    Change,
    Client,
    Completion,
    Failed,
    Ledger,
    OutOfBudget,
    RetryPolicy,
    Server,
    Stopped,
    Usage,
    bare,
    change_for,
)
from coala.evaluation.judges.protocol import Cost, JudgeFailure, JudgeStopped
from coala.evaluation.judges.verdicts import Answer
from coala.evaluation.rows import shown
from coala.values import CoalaError

OPENAI = "https://api.openai.com/v1"
_LOWERINGS = 4  # of the limit of tokens for one request, each as the endpoint asks
_CHARACTERS_PER_TOKEN = 3  # where an endpoint does not count; English has about four, so budgets hold


class Endpoint(Protocol):
    """Whatever answers chat requests; ``identity`` is part of what an answer is kept under."""

    @property
    def identity(self) -> str: ...

    @property
    def cost(self) -> Cost: ...

    def ask(self, request: Mapping[str, Any]) -> Answer:
        """The answer, or JudgeFailure for this request, or JudgeStopped for all."""
        ...

    def begin(self) -> None: ...

    def interrupt(self) -> None: ...


@dataclass(frozen=True)
class Patience(RetryPolicy):
    """A :class:`~coala.endpoint.RetryPolicy`; after ``give_up_after`` requests in a row that all failed for good,
    nothing more is sent. A Retry-After above ``longest_wait`` ends the judging.
    """

    give_up_after: int = 10

    def __post_init__(self) -> None:
        if self.attempts < 1 or self.give_up_after < 1:
            raise CoalaError(f"Patience of {self.attempts} attempts and {self.give_up_after} failures; expected 1 up.")
        if not (self.first_wait >= 0 and self.longest_wait >= 0 and self.timeout > 0):
            raise CoalaError(
                f"Waits of {self.first_wait} to {self.longest_wait} s, timeout {self.timeout} s; expected seconds."
            )


@dataclass(frozen=True)
class Budget:
    """At most so many requests sent (repeated ones too), and no further request once so many tokens were used.

    Tokens are known when an answer is there: requests in flight at that moment are let finish and exceed the number.
    """

    calls: int | None = None
    tokens: int | None = None

    def __post_init__(self) -> None:
        for name, value in (("calls", self.calls), ("tokens", self.tokens)):
            if value is not None and value < 0:
                raise CoalaError(f"A budget of {value} {name}; expected 0 or more, or none at all.")


@cache
def _loop() -> asyncio.AbstractEventLoop:
    """Where all endpoints of this process wait for their answers, in a thread of its own."""
    loop = asyncio.new_event_loop()
    threading.Thread(target=loop.run_forever, name="endpoints", daemon=True).start()
    return loop


class OpenAIEndpoint:
    """An endpoint at ``base_url`` (None: OpenAI's own) with its ``key``; safe for many threads at once.

    Retried: 408, 409, 425, 429, 5xx, timeouts, lost connections, and bodies that are not the answer they should be.
    Refused for good: any other 4xx; 401, 403, 404, a redirect and a spent quota end all (:class:`JudgeStopped`). A
    refusal that names a lower limit of tokens is met with that limit, which ``remarks`` tell. Answers are bounded in
    bytes and, as a whole, by the timeout; the key is struck out of all that comes back. ``headers`` are sent along.
    """

    def __init__(
        self,
        base_url: str | None,
        key: str | None,
        *,
        patience: Patience | None = None,
        budget: Budget | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        from yarl import URL

        if not key and base_url is None:
            raise CoalaError("OpenAI's endpoint needs a key and there is none. Give one, or another base URL.")
        url = OPENAI if base_url is None else base_url
        # A name and password in the address are meant for it; a key may stand in the environment for another.
        self._server = Server.of(url, (key or "none") if bare(url) == url else "", headers)
        self.identity = str(URL(url)).rstrip("/")
        self._patience, budget = patience or Patience(), budget or Budget()
        policy = replace(self._patience, longest_asked=self._patience.longest_wait)
        self._client = Client(policy, Ledger((budget.calls, budget.tokens, None)), (key,) if key else ())
        self._cost = Cost()
        self._failed_in_a_row = 0
        self._changes: dict[str, list[Change]] = {}
        self._remarks: dict[str, None] = {}
        # All of the above changes in the loop's thread alone, so that there is nothing to lock.
        self._loop = _loop()
        weakref.finalize(self, _abandon, self._client, self._loop)

    @property
    def remarks(self) -> tuple[str, ...]:
        return tuple(self._remarks)

    @property
    def cost(self) -> Cost:
        return replace(self._cost, calls=self._client.requests)

    def begin(self) -> None:
        self._failed_in_a_row = 0
        self._loop.call_soon_threadsafe(self._client.resume)

    def interrupt(self) -> None:
        self._loop.call_soon_threadsafe(self._client.stop)

    def ask(self, request: Mapping[str, Any]) -> Answer:
        asking = asyncio.run_coroutine_threadsafe(self._ask(request), self._loop)
        try:
            return asking.result()
        finally:
            # Whoever is interrupted while it waits wants no answer any more.
            asking.cancel()

    async def _ask(self, request: Mapping[str, Any]) -> Answer:
        plain = json.dumps(request, sort_keys=True)

        def cost(found: Completion | None) -> Usage:
            return Usage() if found is None else _usage(found, plain)

        asked = dict(request)
        for known in self._changes.get(str(request.get("model")), ()):
            asked = known.applied(asked)
        for lowerings in range(_LOWERINGS + 1):
            try:
                found = await self._client.ask(self._server, asked, cost)
            except Failed as error:
                failure = self._told(error)
                change = change_for(error.said, asked) if error.status in (400, 413, 422) else None
                if isinstance(failure, JudgeStopped):
                    raise failure from None
                if change is None or lowerings == _LOWERINGS:
                    break
                self._learn(change, asked)
                asked = change.applied(asked)
            except Stopped:
                raise JudgeStopped("Judging was interrupted. Run again to go on; what was bought is kept.") from None
            except OutOfBudget as out:
                raise JudgeStopped(
                    f"The budget of {out.limit} {out.name} is spent ({out.spent} used). "
                    "Run again with a new one to go on; what was bought is kept."
                ) from None
            else:
                used = _usage(found, plain)
                unmetered = found.prompt_tokens is None or found.completion_tokens is None
                self._failed_in_a_row = 0
                self._cost += Cost(0, 1, 0, used.prompt, used.completion, int(unmetered))
                return Answer(**{one.name: getattr(found, one.name) for one in fields(Answer)})
        self._failed_in_a_row += 1
        if self._failed_in_a_row >= self._patience.give_up_after:
            raise JudgeStopped(
                f"{self._failed_in_a_row} requests to {bare(self.identity)} failed in a row, the last one so: "
                f"{failure} Mend that and run again; what was bought is kept."
            )
        raise failure

    def _learn(self, change: Change, asked: Mapping[str, Any]) -> None:
        wanted, where = asked[change.old], bare(self.identity)
        if change.name != change.old:
            said = f"{where} takes {change.name} in place of {change.old}"
        elif change.lasts:
            said = (
                f"{where} takes at most {change.limit:,} tokens for an answer, so the judge asks for that in "
                f"place of {wanted:,}; an answer that reaches the limit is a failure (cut short)"
            )
        else:
            said = (
                f"after some prompts the model's context has no room for {wanted:,} tokens: fewer were asked for; an "
                "answer that reaches the limit is a failure (cut short)"
            )
        self._remarks[said] = None
        if change.lasts:
            self._changes.setdefault(str(asked.get("model")), []).append(change)

    def _told(self, failed: Failed) -> JudgeFailure | JudgeStopped:
        where, code, kind, reason = bare(self.identity), failed.status, failed.kind, str(failed)
        said = f"{where} answered {code}: {shown(failed.said, 200)}."
        if kind == "timeout":
            return JudgeFailure(kind, f"{reason[0].upper()}{reason[1:]}.")
        if kind == "connection":
            return JudgeFailure(kind, f"The connection failed: {shown(reason)}.")
        if kind == "not read":
            return JudgeFailure(kind, f"{where}: {reason}. Check that it is a chat endpoint.")
        if kind == "malformed":
            found = failed.headers.get("content-type", "")
            if "json" in found.lower():
                return JudgeFailure(kind, f"The answer is no chat completion ({shown(reason)}).")
            found = f"it is {shown(found[:60])}" if found else "it names no content type"
            return JudgeFailure(kind, f"The answer is no chat completion: {found}; expected application/json.")
        if 300 <= code < 400:
            there = shown(self._client.struck(failed.headers.get("location", "another address")), 120)
            return JudgeStopped(
                f"{where} answered {code}: it redirects to {there}, and redirects are not followed, since the "
                "prompts and the key would go there. Fix: give that address as the base URL, if you trust it."
            )
        if code in (401, 403):
            return JudgeStopped(f"{said} Check the key.")
        if code == 404:
            return JudgeStopped(f"{said} Check the base URL and the model's name.")
        if failed.is_out_of_quota:
            return JudgeStopped(f"{said} The account's quota is spent; what was bought is kept.")
        if failed.after is not None and failed.after > self._patience.longest_wait and kind != "rejected":
            return JudgeStopped(
                f"{said} It asks to wait {failed.after:.0f} s: run again then; what was bought is kept."
            )
        return JudgeFailure(kind, said)


def _usage(found: Completion, request: str) -> Usage:
    asked, said = found.prompt_tokens, found.completion_tokens
    return Usage(
        math.ceil(len(request) / _CHARACTERS_PER_TOKEN) if asked is None else asked,
        math.ceil(len(found.text) / _CHARACTERS_PER_TOKEN) if said is None else said,
    )


def _abandon(client: Client, loop: asyncio.AbstractEventLoop) -> None:
    asyncio.run_coroutine_threadsafe(client.close(), loop)
