"""One request to an OpenAI-compatible chat endpoint: paced, paid for, sent again while that can help.

Knows what a chat request and its answer look like; nothing of conversations.
"""

from __future__ import annotations

import asyncio
import json
import re
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from email.utils import parsedate_to_datetime
from typing import Any

from coala.data.agents import NANODOLLARS, Agent, Limits, SynthesisError, chance
from coala.data.budget import Budget
from coala.data.findings import printable
from coala.data.http import Address, Answer, Unanswered
from coala.data.journal import Usage
from coala.data.secrets import strike

Post = Callable[[Address, Mapping[str, str], bytes, float], Awaitable[Answer]]
LONGEST_WAIT = 60.0  # seconds, unless the endpoint itself asks for more
PASSING = (408, 409, 425, 429, 500, 502, 503, 504, 520, 522, 524, 529)
# No tokenizer of bytes makes more tokens than there are bytes; chat templates add a few for each message.
TOKENS_PER_MESSAGE, TOKENS_PER_REQUEST = 16, 64


@dataclass(frozen=True)
class Reply:
    """What came back: the words, why they end (``stop``, ``length``, ``content_filter``), and from which model."""

    text: str
    finish: str
    model: str


class Endpoint:
    """Chat endpoints under one set of limits. ``post`` sends bytes, ``keys`` maps an agent's ``key`` to the secret."""

    def __init__(self, limits: Limits, budget: Budget, post: Post, keys: Mapping[str, str]) -> None:
        self.limits = limits
        self.budget = budget
        self.requests = self.retries = 0
        self._post = post
        self._keys = keys
        self._secrets = tuple(keys.values())
        self._free_at = 0.0  # when the next request may start
        self._paused_until: dict[str, float] = {}
        self._addresses: dict[str, Address] = {}

    async def ask(
        self, agent: Agent, chat: Sequence[Mapping[str, str]], temperature: float, seed: int | None, count: Count
    ) -> Reply:
        """The reply to ``chat``; every token spent on the way is told to ``count``.

        Raises :class:`SynthesisError` for what sending again cannot mend, or has not after ``limits.retries`` times;
        :class:`~coala.data.budget.OutOfBudget` before anything is sent that might not be paid for.
        """
        address, headers = self._address(agent)
        body = _body(agent, chat, temperature, seed)
        bound = most(agent, chat)
        for time_of_asking in range(self.limits.retries + 1):
            await self._turn(agent.base_url)
            await self.budget.reserve((bound.tokens, bound.nanodollars))
            used = bound
            reply: Reply | None = None
            trouble, wait = "", None
            self.requests += 1
            try:
                answer = await self._post(address, headers, body, self.limits.timeout)
                said = _said(answer, self._secrets)
                used = Usage()
                if answer.status == 200:
                    used = bound
                    reply, used = _read(answer, agent, bound)
                    reply = replace(reply, text=self._struck(reply.text), model=self._struck(reply.model))
                else:
                    trouble = f"status {answer.status}: {said}"
                    wait = _retry_after(answer)
                    if answer.status == 400 and "content_filter" in said:
                        reply = Reply("", "content_filter", agent.model)
                    elif answer.status not in PASSING or "insufficient_quota" in said:
                        raise _refused(agent, answer, said, self._secrets)
            except Unanswered as error:
                trouble = self._struck(str(error))
                used = bound if error.sent else Usage()
            except ValueError as error:
                trouble = self._struck(str(error))
            finally:
                await self.budget.settle((bound.tokens, bound.nanodollars), used)
                count(used)
            if reply is not None:
                return reply
            if time_of_asking < self.limits.retries:
                self.retries += 1
                if wait is not None:
                    # The endpoint speaks to all of us, not to this request alone.
                    until = time.monotonic() + wait
                    self._paused_until[agent.base_url] = max(self._paused_until.get(agent.base_url, 0.0), until)
                else:
                    longest = min(LONGEST_WAIT, self.limits.backoff * 2.0**time_of_asking)
                    # Spread out, so that what failed together does not come back together.
                    await asyncio.sleep(longest * (0.5 + 0.5 * chance(seed, len(body), time_of_asking)))
        raise SynthesisError(
            f"{bare(agent.base_url)}: no usable answer after {self.limits.retries + 1} requests "
            f"(last: {printable(trouble)}). "
            "Finished conversations are kept: run the same command again once the endpoint is well, or raise "
            "limits.retries."
        )

    def _struck(self, text: str) -> str:
        return strike(text, self._secrets)

    def _address(self, agent: Agent) -> tuple[Address, dict[str, str]]:
        address = self._addresses.get(agent.base_url)
        if address is None:
            address = Address.of(agent.base_url.rstrip("/") + "/chat/completions")
            self._addresses[agent.base_url] = address
        headers = {"Content-Type": "application/json", "Accept": "application/json", "Accept-Encoding": "identity"}
        if agent.key and (key := self._keys.get(agent.key)):
            headers["Authorization"] = f"Bearer {key}"
        return address, headers

    async def _turn(self, base_url: str) -> None:
        """Wait until this request may start: one at a time through the gate, evenly spaced under a rate."""
        while (pause := self._paused_until.get(base_url, 0.0) - time.monotonic()) > 0:
            await asyncio.sleep(pause)
        if self.limits.requests_per_minute is None:
            return
        now = time.monotonic()
        start = max(now, self._free_at)
        self._free_at = start + 60 / self.limits.requests_per_minute
        if start > now:
            await asyncio.sleep(start - now)


Count = Callable[[Usage], None]


def _body(agent: Agent, chat: Sequence[Mapping[str, str]], temperature: float, seed: int | None) -> bytes:
    request: dict[str, Any] = {
        "model": agent.model,
        "messages": list(chat),
        "temperature": temperature,
        agent.limit_field: agent.max_tokens,
        **({} if seed is None else {"seed": seed}),
        **agent.options,
    }
    return json.dumps(request, ensure_ascii=False, separators=(",", ":")).encode("utf-8", "replace")


def price(agent: Agent, prompt: int, completion: int) -> int:
    """Billionths of a dollar."""
    return prompt * round(agent.input_price * NANODOLLARS) + completion * round(agent.output_price * NANODOLLARS)


def most(agent: Agent, chat: Sequence[Mapping[str, str]], bytes_per_token: int = 1) -> Usage:
    """The most that a request can cost, all of it counted as uncertain."""
    size = sum(len(message["content"].encode("utf-8", "replace")) for message in chat)
    prompt = size // bytes_per_token + TOKENS_PER_MESSAGE * len(chat) + TOKENS_PER_REQUEST
    return Usage(uncertain=prompt + agent.max_tokens, nanodollars=price(agent, prompt, agent.max_tokens))


def _read(answer: Answer, agent: Agent, bound: Usage) -> tuple[Reply, Usage]:
    """The reply in an answer of status 200; ``ValueError`` for what is none. Without a usage, ``bound`` is counted."""
    try:
        content = json.loads(answer.body)
        choice = content["choices"][0]
        text = choice["message"].get("content")
        finish = choice.get("finish_reason") or "stop"
        refusal = choice["message"].get("refusal")
        model = content.get("model") or agent.model
        usage = content.get("usage")
    except (ValueError, RecursionError, LookupError, TypeError, AttributeError) as error:
        raise ValueError(f"an unreadable answer ({type(error).__name__}: {answer.body[:60]!r})") from None
    if not isinstance(text, str | None) or not isinstance(finish, str) or not isinstance(model, str):
        raise ValueError(f"an answer without text ({answer.body[:60]!r})")
    used = bound
    if isinstance(usage, Mapping):
        prompt, completion = _count(usage.get("prompt_tokens")), _count(usage.get("completion_tokens"))
        if prompt is not None and completion is not None:
            used = Usage(prompt, completion, 0, price(agent, prompt, completion))
    return Reply(text or "", "content_filter" if refusal else finish, model), used


def _count(value: Any) -> int | None:
    return value if isinstance(value, int) and not isinstance(value, bool) and value >= 0 else None


def bare(address: str) -> str:
    """An address without the name and password that it may hold."""
    return re.sub(r"(?<=://)[^/@\s]*@", "", address)


def _said(answer: Answer, secrets: Sequence[str]) -> str:
    # Struck out before it is cut: a part of a key is a part of a secret.
    text = strike(answer.body[:5000].decode("utf-8", "replace"), secrets)
    return printable(" ".join(text[:500].split()))[:300]


def _retry_after(answer: Answer) -> float | None:
    """Seconds that Retry-After asks for, as a number or as a date; ``None`` without one, or with one unreadable."""
    written = answer.headers.get("retry-after", "")
    try:
        wait = float(written)
    except ValueError:
        try:
            wait = parsedate_to_datetime(written).timestamp() - time.time()
        except (ValueError, TypeError, OverflowError):
            return None
    return min(max(wait, 0.0), 86_400.0) if wait == wait else None


def _refused(agent: Agent, answer: Answer, said: str, secrets: Sequence[str]) -> SynthesisError:
    if 300 <= answer.status < 400:
        there = printable(strike(answer.headers.get("location", "another address"), secrets))[:120]
        return SynthesisError(
            f"{bare(agent.base_url)}: redirects to {there} (status {answer.status}); redirects are not followed, since "
            "the key would go there. Fix: write that address as base_url, if you trust it. Finished conversations are "
            "kept."
        )
    mend = {
        401: f"Set the environment variable {agent.key or '(none is named: set `key`)'} to a valid key.",
        403: "Check that the key may use this model.",
        404: "Check base_url (it usually ends in /v1) and model.",
        429: "The account has no credit left.",
    }.get(answer.status, "Mend the recipe or the endpoint.")
    return SynthesisError(
        f"{bare(agent.base_url)}: refused a request to {agent.model} with status {answer.status}: {said}. {mend} "
        "Finished conversations are kept."
    )
