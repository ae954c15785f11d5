"""Requests to an endpoint that speaks OpenAI's chat protocol: retries, waits, a budget, and a count of everything.

Knows nothing of what is asked. The `openai` client (extra `judge`) is imported when the first endpoint is made.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from typing import Any, Protocol

from coala.data.secrets import strike
from coala.evaluation.judges.bounded_http import HEADERS, Clock, Unbounded, bounded_client
from coala.evaluation.judges.protocol import Cost, JudgeFailure, JudgeStopped
from coala.evaluation.judges.token_limit import Change, change_for
from coala.evaluation.judges.verdicts import Answer
from coala.evaluation.rows import as_number, shown
from coala.values import CoalaError

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
class Patience:
    """When to try again. Waits are ``first_wait`` 2^k seconds times 0.5 to 1, at most ``longest_wait``.

    A server's Retry-After is waited out by all requests; one above ``longest_wait`` ends the judging. ``timeout`` is
    for one request. After ``give_up_after`` requests in a row that all failed for good, nothing more is sent.
    """

    attempts: int = 6
    first_wait: float = 1.0
    longest_wait: float = 60.0
    timeout: float = 180.0
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


class OpenAIEndpoint:
    """An endpoint at ``base_url`` (None: OpenAI's own) with its ``key``; safe for many threads at once.

    Retried: 408, 409, 429, 5xx, timeouts, lost connections, and bodies that are not the answer they should be.
    Refused for good: any other 4xx; 401, 403, 404, a redirect and a spent quota end all (:class:`JudgeStopped`). A
    refusal that names a lower limit of tokens is met with that limit, which ``remarks`` tell. Answers are bounded in
    bytes and, as a whole, by the timeout; the key is struck out of all that comes back.
    """

    def __init__(
        self,
        base_url: str | None,
        key: str | None,
        *,
        patience: Patience | None = None,
        budget: Budget | None = None,
    ) -> None:
        try:
            import openai
        except ImportError:
            raise CoalaError(
                "A judge behind an endpoint needs the openai client, which is not installed. "
                "Install it: pip install 'coala-align[judge]'."
            ) from None
        if not key and base_url is None:
            raise CoalaError("OpenAI's endpoint needs a key and there is none. Give one, or another base URL.")
        self._openai = openai
        self._patience, self._budget = patience or Patience(), budget or Budget()
        self._secrets = (key,) if key else ()
        self._clock = Clock(self._patience.timeout)
        # The client's own retries are off: they would be neither counted nor told.
        self._client = openai.OpenAI(
            base_url=base_url,
            api_key=key or "none",
            max_retries=0,
            timeout=self._patience.timeout,
            default_headers=HEADERS,
            http_client=bounded_client(openai, self._clock),
        )
        self.identity = str(self._client.base_url).rstrip("/")
        self._lock = threading.Lock()
        self._cost = Cost()
        self._failed_in_a_row = 0
        self._not_before = 0.0
        self._interrupted = threading.Event()
        self._changes: dict[str, list[Change]] = {}
        self._remarks: dict[str, None] = {}

    @property
    def remarks(self) -> tuple[str, ...]:
        with self._lock:
            return tuple(self._remarks)

    @property
    def cost(self) -> Cost:
        with self._lock:
            return self._cost

    def begin(self) -> None:
        with self._lock:
            self._failed_in_a_row = 0
        self._interrupted.clear()

    def interrupt(self) -> None:
        self._interrupted.set()

    def ask(self, request: Mapping[str, Any]) -> Answer:
        plain = json.dumps(request, sort_keys=True)
        failure = JudgeFailure("connection", "no request was sent")
        asked, attempt, lowered = self._changed(request), 0, 0
        while attempt < self._patience.attempts:
            self._admit()
            try:
                answer = self._send(asked)
            except _Again as again:
                failure = JudgeFailure(again.kind, str(again))
                attempt += 1
                if attempt < self._patience.attempts:
                    self._wait(again.after, attempt - 1, plain)
            except _Otherwise as other:
                failure = other.failure
                lowered += 1
                if lowered > _LOWERINGS:
                    break
                self._learn(other.change, asked)
                asked = other.change.applied(asked)
            except JudgeFailure as found:
                failure = found
                break
            else:
                self._count(answer, plain)
                return answer
        with self._lock:
            self._failed_in_a_row += 1
            hopeless = self._failed_in_a_row >= self._patience.give_up_after
        if hopeless:
            raise JudgeStopped(
                f"{self._failed_in_a_row} requests to {self._where} failed in a row, the last one so: {failure} "
                "Mend that and run again; what was bought is kept."
            )
        raise failure

    @property
    def _where(self) -> str:
        """The address without the name and password that it may hold."""
        return re.sub(r"(?<=://)[^/@\s]*@", "", self.identity)

    def _changed(self, request: Mapping[str, Any]) -> dict[str, Any]:
        """``request`` under the limits that this endpoint has named for its model."""
        with self._lock:
            known = list(self._changes.get(str(request.get("model")), ()))
        changed = dict(request)
        for change in known:
            changed = change.applied(changed)
        return changed

    def _learn(self, change: Change, asked: Mapping[str, Any]) -> None:
        wanted = asked[change.old]
        if change.name != change.old:
            said = f"{self._where} takes {change.name} in place of {change.old}"
        elif change.lasts:
            said = (
                f"{self._where} takes at most {change.limit:,} tokens for an answer, so the judge asks for that in "
                f"place of {wanted:,}; an answer that reaches the limit is a failure (cut short)"
            )
        else:
            said = (
                f"after some prompts the model's context has no room for {wanted:,} tokens: fewer were asked for; an "
                "answer that reaches the limit is a failure (cut short)"
            )
        with self._lock:
            self._remarks[said] = None
            if change.lasts:
                self._changes.setdefault(str(asked.get("model")), []).append(change)

    def _admit(self) -> None:
        """Wait until requests are welcome again, then count one; JudgeStopped when there may be none."""
        while True:
            with self._lock:
                if self._interrupted.is_set():
                    raise JudgeStopped("Judging was interrupted. Run again to go on; what was bought is kept.")
                for name, spent in (("calls", self._cost.calls), ("tokens", self._cost.tokens)):
                    limit = getattr(self._budget, name)
                    if limit is not None and spent >= limit:
                        raise JudgeStopped(
                            f"The budget of {limit} {name} is spent ({spent} used). "
                            "Run again with a new one to go on; what was bought is kept."
                        )
                pause = self._not_before - time.monotonic()
                if pause <= 0:
                    self._cost = replace(self._cost, calls=self._cost.calls + 1)
                    return
            self._interrupted.wait(pause)

    def _send(self, request: Mapping[str, Any]) -> Answer:
        errors = self._openai
        self._clock.start()
        try:
            raw = self._client.chat.completions.with_raw_response.create(**request)
            answer = _read(raw.http_response.content, raw.http_response.headers.get("content-type", ""))
        except Unbounded as error:
            raise self._unread(error) from None
        except errors.APITimeoutError:
            raise _Again("timeout", f"No answer within {self._patience.timeout:g} s.") from None
        except errors.APIConnectionError as error:
            cause = error.__cause__ or error
            if isinstance(cause, Unbounded):
                raise self._unread(cause) from None
            said = self._struck(str(cause)) or type(cause).__name__
            raise _Again("connection", f"The connection failed: {shown(said)}.") from None
        except errors.APIStatusError as error:
            raise self._refused(error, request) from None
        return replace(
            answer,
            text=self._struck(answer.text),
            refusal=self._struck(answer.refusal),
            reasoning=self._struck(answer.reasoning),
        )

    def _struck(self, text: str) -> str:
        return strike(text, self._secrets)

    def _unread(self, error: Unbounded) -> Exception:
        if error.is_late:
            return _Again("timeout", f"No whole answer within {self._patience.timeout:g} s: {error}.")
        return JudgeFailure("not read", f"{self._where}: {error}. Check that it is a chat endpoint.")

    def _refused(self, error: Any, request: Mapping[str, Any]) -> Exception:
        code = error.status_code
        # The client puts the status before the server's words; it would be said twice, and taken for a limit of tokens.
        words = self._struck(str(error.message)).removeprefix(f"Error code: {code} - ")
        said = f"{self._where} answered {code}: {shown(words, 200)}."
        if 300 <= code < 400:
            there = shown(self._struck(error.response.headers.get("location", "another address")), 120)
            return JudgeStopped(
                f"{self._where} answered {code}: it redirects to {there}, and redirects are not followed, since the "
                "prompts and the key would go there. Fix: give that address as the base URL, if you trust it."
            )
        if code in (401, 403):
            return JudgeStopped(f"{said} Check the key.")
        if code == 404:
            return JudgeStopped(f"{said} Check the base URL and the model's name.")
        if getattr(error, "code", None) == "insufficient_quota":
            return JudgeStopped(f"{said} The account's quota is spent; what was bought is kept.")
        if code in (408, 409, 429) or code >= 500:
            after = _retry_after(error.response.headers)
            if after is not None and after > self._patience.longest_wait:
                return JudgeStopped(f"{said} It asks to wait {after:.0f} s: run again then; what was bought is kept.")
            return _Again("rate limit" if code == 429 else "server error", said, after)
        failure = JudgeFailure("rejected", said)
        change = change_for(words, request) if code in (400, 413, 422) else None
        return failure if change is None else _Otherwise(failure, change)

    def _wait(self, after: float | None, attempt: int, plain: str) -> None:
        # Drawn from the request, so that no hidden state is needed and yet no two requests wait alike.
        drawn = hashlib.sha256(f"{attempt} {plain}".encode("utf-8", "surrogatepass")).digest()
        share = int.from_bytes(drawn[:4], "big") / 2**32
        if after is not None:
            with self._lock:
                self._not_before = max(self._not_before, time.monotonic() + after)
            # The others wait as long; what is drawn keeps them from coming all at once.
            self._interrupted.wait(after + min(0.1 * after, self._patience.first_wait) * share)
            return
        wait = min(self._patience.longest_wait, self._patience.first_wait * 2**attempt)
        self._interrupted.wait(wait * (0.5 + share / 2))

    def _count(self, answer: Answer, plain: str) -> None:
        asked, said = answer.prompt_tokens, answer.completion_tokens
        with self._lock:
            self._failed_in_a_row = 0
            self._cost += Cost(
                answers=1,
                prompt_tokens=math.ceil(len(plain) / _CHARACTERS_PER_TOKEN) if asked is None else asked,
                completion_tokens=math.ceil(len(answer.text) / _CHARACTERS_PER_TOKEN) if said is None else said,
                unmetered=int(asked is None or said is None),
            )


class _Again(Exception):
    """A request that may be repeated, ``after`` so many seconds if the server said."""

    def __init__(self, kind: str, message: str, after: float | None = None) -> None:
        super().__init__(message)
        self.kind, self.after = kind, after


class _Otherwise(Exception):
    """A refusal that says how to ask instead."""

    def __init__(self, failure: JudgeFailure, change: Change) -> None:
        super().__init__(str(failure))
        self.failure, self.change = failure, change


def _retry_after(headers: Mapping[str, str]) -> float | None:
    """Seconds a server asks to wait: `retry-after-ms`, or `Retry-After` as seconds or a date; None without."""
    milliseconds, said = as_number(headers.get("retry-after-ms")), headers.get("retry-after")
    if milliseconds is not None and milliseconds >= 0:
        return milliseconds / 1000
    if said is None:
        return None
    seconds = as_number(said)
    if seconds is None:
        try:
            date = parsedate_to_datetime(said)
        except (ValueError, TypeError, OverflowError):
            return None
        date = date if date.tzinfo else date.replace(tzinfo=UTC)
        return max(0.0, (date - datetime.now(UTC)).total_seconds())
    return max(0.0, seconds)


def _read(body: bytes, kind: str = "application/json") -> Answer:
    """The first choice of a chat completion; anything else is worth another try."""
    try:
        document = json.loads(body)
        choice = document["choices"][0]
        message = choice["message"]
        text, refusal, finish = _text(message.get("content")), message.get("refusal"), choice.get("finish_reason")
        thoughts = message.get("reasoning_content") or message.get("reasoning") or ""
        if not isinstance(text, str | None) or not isinstance(refusal, str | None):
            raise TypeError("content is not a text")
        usage = document.get("usage") or {}
        return Answer(
            text=text or "",
            finish=str(finish or "stop"),
            refusal=refusal or "",
            top=_top(choice.get("logprobs")),
            prompt_tokens=_tokens(usage.get("prompt_tokens")),
            completion_tokens=_tokens(usage.get("completion_tokens")),
            reasoning=thoughts if isinstance(thoughts, str) else json.dumps(thoughts),
        )
    except (ValueError, KeyError, IndexError, TypeError, AttributeError, RecursionError) as error:
        if "json" not in kind.lower():
            found = f"it is {shown(kind[:60])}" if kind else "it names no content type"
            raise _Again(
                "malformed", f"The answer is no chat completion: {found}; expected application/json."
            ) from None
        raise _Again("malformed", f"The answer is no chat completion ({shown(str(error))}).") from None


def _text(content: Any) -> Any:
    """The text of a message; of content in parts those that are text, thoughts left out."""
    if not isinstance(content, list):
        return content
    return "".join(str(part["text"]) for part in content if part.get("type") in ("text", "output_text"))


def _top(found: Any) -> tuple[tuple[str, float], ...] | None:
    if not found or not found.get("content"):
        return None
    top = tuple((str(one["token"]), float(one["logprob"])) for one in found["content"][0]["top_logprobs"])
    if not all(value < math.inf for _, value in top):
        raise ValueError("a log-probability is not a number")
    return top


def _tokens(value: Any) -> int | None:
    return value if isinstance(value, int) and not isinstance(value, bool) and value >= 0 else None
