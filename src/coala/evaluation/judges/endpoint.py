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
from dataclasses import dataclass, replace
from functools import cache
from typing import Any, Protocol

from coala.endpoint import (
    Change,
    Client,
    Ledger,
    OutOfBudget,
    RequestFailed,
    Server,
    Stopped,
    Usage,
    bare,
    change_for,
)
from coala.endpoint import Completion as Answer
from coala.endpoint import RetryPolicy as Patience
from coala.evaluation.judges.protocol import Cost, JudgeFailure, JudgeStopped
from coala.evaluation.rows import shown
from coala.values import CoalaError

_LOWERINGS = 4  # of the limit of tokens for one request, each as the endpoint asks
_CHARACTERS_PER_TOKEN = 3  # where an endpoint does not count; English has about four, so budgets hold


class JudgeEndpoint(Protocol):
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
    Refused for good: any other 4xx; 401, 403, 404, a redirect, a spent quota and a Retry-After above the longest wait
    end all (:class:`JudgeStopped`). A refusal that names a lower limit of tokens is met with that limit, which
    ``remarks`` tell. Answers are bounded in bytes and, as a whole, by the timeout; the key is struck out of all that
    comes back. ``headers`` are sent along.
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
            raise CoalaError("Found no key, which OpenAI's endpoint needs. Fix: set one, or use another base URL.")
        url = "https://api.openai.com/v1" if base_url is None else base_url
        # A name and password in the address are meant for it; a key may stand in the environment for another.
        self._server = Server.of(url, (key or "none") if bare(url) == url else "", headers)
        self.identity = str(URL(url)).rstrip("/")
        self._where = bare(self.identity)
        patience, budget = patience or Patience(), budget or Budget()
        policy = replace(patience, longest_asked=patience.longest_wait)
        self._client = Client(policy, Ledger((budget.calls, budget.tokens, None)), (key,) if key else ())
        # All of this changes in the loop's thread alone, so that there is nothing to lock.
        self._cost = Cost()
        self._failed_in_a_row = 0
        self._changes: dict[str, list[Change]] = {}
        self._remarks: dict[str, None] = {}
        self._loop = _loop()
        client, loop = self._client, self._loop
        weakref.finalize(self, lambda: asyncio.run_coroutine_threadsafe(client.close(), loop))

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
        asked = dict(request)
        for known in self._changes.get(str(request.get("model")), ()):
            asked = known.applied(asked)
        for lowering in range(_LOWERINGS + 1):
            try:
                found = await self._client.ask(self._server, asked, lambda found: _usage(found, plain))
            except Stopped:
                raise JudgeStopped("Judging was interrupted; paid verdicts are saved. Fix: rerun to resume.") from None
            except OutOfBudget as out:
                name, limit, spent = out.args
                raise JudgeStopped(
                    f"The budget of {limit} {name} is spent ({spent} used). Rerun with a new one to resume; paid "
                    "verdicts are saved."
                ) from None
            except RequestFailed as failed:
                failure = self._told(failed)
                change = change_for(failed.said, asked) if failed.status in (400, 413, 422) else None
                if change is None or lowering == _LOWERINGS:
                    break
                self._learn(change, asked)
                asked = change.applied(asked)
            else:
                used = _usage(found, plain)
                unmetered = int(None in (found.prompt_tokens, found.completion_tokens))
                self._cost += Cost(0, 1, 0, used.prompt, used.completion, unmetered)
                self._failed_in_a_row = 0
                return found
        if isinstance(failure, JudgeStopped):
            raise failure
        self._failed_in_a_row += 1
        if self._failed_in_a_row >= self._client.policy.give_up_after:
            raise JudgeStopped(
                f"{self._failed_in_a_row} requests to {self._where} failed in a row, the last one with: {failure} Fix "
                "that and rerun; paid verdicts are saved."
            )
        raise failure

    def _learn(self, change: Change, asked: Mapping[str, Any]) -> None:
        cut = "an answer that reaches the limit is a failure (cut short)"
        if change.name != change.old:
            said = f"{self._where} takes {change.name} in place of {change.old}"
        elif change.lasts:
            limit = f"takes at most {change.limit:,} tokens for an answer"
            said = f"{self._where} {limit}, so the judge asks for that in place of {asked[change.old]:,}; {cut}"
        else:
            room = f"the model's context has no room for {asked[change.old]:,} tokens"
            said = f"after some prompts {room}: fewer were asked for; {cut}"
        self._remarks[said] = None
        if change.lasts:
            self._changes.setdefault(str(asked.get("model")), []).append(change)

    def _told(self, failed: RequestFailed) -> JudgeFailure | JudgeStopped:
        code, kind, reason, after = failed.status, failed.kind, str(failed), failed.after
        if kind == "timeout":
            return JudgeFailure(kind, f"{reason[0].upper()}{reason[1:]}.")
        if kind == "connection":
            return JudgeFailure(kind, f"The connection failed: {shown(reason)}.")
        if kind == "not read":
            return JudgeFailure(kind, f"{self._where}: {reason}. Check that it is a chat endpoint.")
        if kind == "malformed":
            form = failed.headers.get("content-type", "")
            if "json" in form.lower():
                return JudgeFailure(kind, f"The answer is not a chat completion ({shown(reason)}).")
            form = f"it is {shown(form[:60])}" if form else "it names no content type"
            return JudgeFailure(kind, f"The answer is not a chat completion: {form}; expected application/json.")
        said = f"{self._where} answered {code}: {shown(failed.said, 200)}."
        if 300 <= code < 400:
            there = shown(self._client.struck(failed.headers.get("location", "another address")), 120)
            return JudgeStopped(
                f"{self._where} answered {code}: it redirects to {there}, and redirects are not followed, since the "
                "prompts and the key would go there. Fix: give that address as the base URL, if you trust it."
            )
        if code in (401, 403):
            return JudgeStopped(f"{said} Check the key.")
        if code == 404:
            return JudgeStopped(f"{said} Check the base URL and the model's name.")
        if failed.is_out_of_quota:
            return JudgeStopped(f"{said} The account's quota is spent; paid verdicts are saved.")
        if kind != "rejected" and after is not None and after > self._client.policy.longest_asked:
            return JudgeStopped(f"{said} It asks to wait {after:.0f} s: run again then; paid verdicts are saved.")
        return JudgeFailure(kind, said)


def _usage(found: Answer | None, request: str) -> Usage:
    """Tokens as they were counted, or taken from the characters; none as long as there is no answer."""
    if found is None:
        return Usage()
    asked, said = found.prompt_tokens, found.completion_tokens
    return Usage(
        math.ceil(len(request) / _CHARACTERS_PER_TOKEN) if asked is None else asked,
        math.ceil(len(found.text) / _CHARACTERS_PER_TOKEN) if said is None else said,
    )
