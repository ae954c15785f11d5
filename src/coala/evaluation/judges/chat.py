"""A language model behind an endpoint as a judge: the request is made from a folder, its answer kept and read.

What was answered once is never asked again: answers are kept under a digest of everything that decides them. Knows
nothing of retries, files or scores of benchmarks.
"""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

from coala.endpoint import Completion as Answer
from coala.endpoint import RetryPolicy as Patience
from coala.evaluation.judges.endpoint import Budget, JudgeEndpoint, OpenAIEndpoint
from coala.evaluation.judges.instructions import Exchange, Instructions, asked
from coala.evaluation.judges.protocol import Cost, JudgeFailure, JudgeStopped, preference
from coala.evaluation.judges.verdicts import Verdict, read_rating, read_verdict
from coala.values import CoalaError, Generation, Judgement, Turn, conversation_text


class VerdictStore(Protocol):
    """Where answers are kept by key; `coala.store.verdict_cache.VerdictCache` keeps them on disk."""

    def get(self, key: str) -> str | None: ...

    def put(self, key: str, answer: str) -> None: ...


class VerdictMemory:
    """Keeps answers as long as it lives."""

    def __init__(self) -> None:
        self._kept: dict[str, str] = {}

    def get(self, key: str) -> str | None:
        return self._kept.get(key)

    def put(self, key: str, answer: str) -> None:
        self._kept[key] = answer


class ChatJudge:
    """Judges by asking ``endpoint`` for what ``instructions`` say; ``model`` overrides the one they name.

    An answer is kept even if no verdict can be read from it, and that failure stands when it is met again;
    ``ask_again`` buys such answers anew. One object may be used by many threads: of several that need one answer, one
    asks.
    """

    def __init__(
        self,
        instructions: Instructions,
        endpoint: JudgeEndpoint,
        *,
        model: str | None = None,
        keeper: VerdictStore | None = None,
        sampling: Mapping[str, Any] | None = None,
        ask_again: bool = False,
    ) -> None:
        chosen = model or instructions.model
        if not chosen:
            raise CoalaError(f"Judge {instructions.name!r} names no model. Give one.")
        if sampling:
            merged = {**instructions.sampling, **sampling}
            kept = {name: value for name, value in merged.items() if value is not None}
            instructions = Instructions(**{**vars(instructions), "sampling": kept})
        self.instructions, self.model = instructions, chosen
        self.name = f"{instructions.name} {chosen}"
        self._endpoint, self._ask_again = endpoint, ask_again
        # Not `or`: an empty keeper may well be false.
        self._keeper: VerdictStore = VerdictMemory() if keeper is None else keeper
        self._lock = threading.Lock()
        self._flights: dict[str, threading.Lock] = {}
        self._kept = 0
        self._bought: set[str] = set()

    @property
    def cost(self) -> Cost:
        with self._lock:
            return self._endpoint.cost + Cost(kept=self._kept)

    @property
    def endpoint(self) -> str:
        """Where it asks."""
        return self._endpoint.identity

    @property
    def remarks(self) -> tuple[str, ...]:
        """What was asked otherwise than the judge's file says."""
        return tuple(getattr(self._endpoint, "remarks", ()))

    def begin(self) -> None:
        self._endpoint.begin()

    def interrupt(self) -> None:
        self._endpoint.interrupt()

    def compare(self, prompt: Sequence[Turn], first: Generation, second: Generation) -> Judgement:
        """P(``first`` is better). A grading judge grades both and prefers the higher grade."""
        value: float | None
        if self.instructions.mode == "grade":
            question = self._question(prompt)
            value = preference(*(self.rate(asked([question], [[side.text]]))[0] for side in (first, second)))
        else:
            value = self.verdict(prompt, first, second).preference
        return Judgement(first.prompt_id, first.method, second.method, value, self.name)

    def verdict(self, prompt: Sequence[Turn], first: Generation, second: Generation) -> Verdict:
        """The verdict on two replies with its label; :class:`JudgeFailure` without one."""
        return self.settle(asked([self._question(prompt)], [[first.text], [second.text]]))

    def settle(self, exchange: Exchange) -> Verdict:
        """The verdict on an exchange with two sides, of one turn or two."""
        if self.instructions.mode == "grade" or len(exchange.answers) != 2:
            raise JudgeStopped(f"Judge {self.instructions.name!r} grades single answers. Name one that compares.")
        return read_verdict(self._answer(exchange), self.instructions)

    def known(self, prompt: Sequence[Turn], first: Generation, second: Generation) -> Verdict | None:
        """The verdict if its answer is kept and can be read; nothing is asked."""
        exchange = asked([self._question(prompt)], [[first.text], [second.text]])
        kept = self._recall(self.key(self.request(exchange)))
        try:
            return None if kept is None else read_verdict(kept, self.instructions)
        except JudgeFailure:
            return None

    def rate(self, exchange: Exchange) -> tuple[float, str]:
        """The grade in 1..10 of an exchange with one side, and what the judge said."""
        if self.instructions.mode != "grade" or len(exchange.answers) != 1:
            raise JudgeStopped(f"Judge {self.instructions.name!r} compares two answers. Name one that grades.")
        answer = self._answer(exchange)
        return read_rating(answer, self.instructions), answer.text

    def request(self, exchange: Exchange) -> dict[str, Any]:
        """The body of the request, all that is sent but the key."""
        sampling = dict(self.instructions.sampling)
        request = {"model": self.model, "messages": self.instructions.prompt_for(exchange).fill(exchange), **sampling}
        if self.instructions.mode == "weighted":
            request |= {"logprobs": True, "top_logprobs": sampling.get("top_logprobs", 5)}
        if schema := self.instructions.schema():
            form = {"name": "verdict", "strict": True, "schema": schema}
            request["response_format"] = {"type": "json_schema", "json_schema": form}
        return request

    def key(self, request: Mapping[str, Any]) -> str:
        """What an answer is kept under: endpoint, folder and request, in which model, texts and their order are."""
        parts = {"endpoint": self._endpoint.identity, "judge": self.instructions.digest, "request": request}
        plain = json.dumps(parts, sort_keys=True, ensure_ascii=True)
        return hashlib.sha256(plain.encode()).hexdigest()

    def _question(self, prompt: Sequence[Turn]) -> str:
        if not prompt:
            raise JudgeStopped(f"Judge {self.instructions.name!r} needs the prompts. Fix: pass them by id.")
        return conversation_text(prompt)

    def _answer(self, exchange: Exchange) -> Answer:
        """The kept answer, or else a bought one; threads that want the same one wait for the first."""
        request = self.request(exchange)
        key = self.key(request)
        with self._lock:
            flight = self._flights.setdefault(key, threading.Lock())
        with flight:
            answer = self._recall(key)
            if answer is not None and not (self._ask_again and key not in self._bought and self._fails(answer)):
                with self._lock:
                    self._kept += 1
                return answer
            answer = self._endpoint.ask(request)
            try:
                self._keeper.put(key, answer.to_json())
            except CoalaError as error:
                # To go on would be to buy what cannot be kept.
                raise JudgeStopped(str(error)) from None
            self._bought.add(key)
            return answer

    def _recall(self, key: str) -> Answer | None:
        """What is kept under ``key``; None if nothing is, or nothing that can be made out."""
        try:
            kept = self._keeper.get(key)
        except CoalaError as error:
            raise JudgeStopped(str(error)) from None
        try:
            return None if kept is None else Answer.from_json(kept)
        except (ValueError, KeyError, TypeError):
            return None

    def _fails(self, answer: Answer) -> bool:
        try:
            (read_rating if self.instructions.mode == "grade" else read_verdict)(answer, self.instructions)
        except JudgeFailure:
            return True
        return False


class OpenAIJudge(ChatJudge):
    """A :class:`ChatJudge` on any OpenAI-compatible endpoint: ``base_url`` (None: OpenAI's own) and its ``key``."""

    def __init__(
        self,
        instructions: Instructions,
        *,
        model: str | None = None,
        base_url: str | None = None,
        key: str | None = None,
        keeper: VerdictStore | None = None,
        sampling: Mapping[str, Any] | None = None,
        ask_again: bool = False,
        patience: Patience | None = None,
        budget: Budget | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        endpoint = OpenAIEndpoint(base_url, key, patience=patience, budget=budget, headers=headers)
        super().__init__(instructions, endpoint, model=model, keeper=keeper, sampling=sampling, ask_again=ask_again)
