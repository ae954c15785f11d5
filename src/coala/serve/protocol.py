"""Answers as the OpenAI protocol words them: one JSON object, or server-sent events while replies grow.

Knows nothing of how replies come about.
"""

from __future__ import annotations

import json
import math
import secrets
import time
from collections.abc import AsyncIterator, Sequence
from typing import Any, Literal

from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from coala.serve.answers import Answering, Ask, Gone, Other, ReplyChoice, Replying, Told
from coala.serve.detokenize import UNFINISHED
from coala.serve.errors import Refusal
from coala.values import Generation


class Protocol:
    """How one of the two addresses words its answers."""

    def __init__(
        self, kind: Literal["chat", "text"], model: str, fingerprint: str, ask: Ask, note: str | None = None
    ) -> None:
        self.chat = kind == "chat"
        self._head = {
            "id": f"{'chatcmpl' if self.chat else 'cmpl'}-{secrets.token_hex(12)}",
            "created": int(time.time()),
            "model": model,
            "system_fingerprint": fingerprint,
        }
        self._settings: dict[str, Any] = {"seed": ask.seed, "guidance": str(ask.guidance)}
        if not self.chat:
            self._settings |= {"render": "raw" if isinstance(ask.prompts[0], str) else "turn", "note": note}
        self._wants = ask.n_top is not None
        self._n_top = ask.n_top or 0

    def whole(self, choices: Sequence[ReplyChoice], usage: dict[str, int]) -> dict[str, Any]:
        made = []
        for index, choice in enumerate(choices):
            content: dict[str, Any] = {"text": choice.generation.text}
            if self.chat:
                content = {
                    "message": {"role": "assistant", "content": choice.generation.text, "refusal": None},
                }
            made.append(
                {
                    "index": index,
                    **content,
                    "logprobs": self._log_probs(choice.told, 0),
                    "finish_reason": choice.finish,
                    "coala": facts(choice.generation),
                }
            )
        kind = "chat.completion" if self.chat else "text_completion"
        return {**self._head, "object": kind, "choices": made, "usage": usage, "coala": self._settings}

    def opening(self, index: int) -> dict[str, Any] | None:
        """What a choice's stream begins with."""
        if not self.chat:
            return None
        return self._event(index, {"delta": {"role": "assistant", "content": "", "refusal": None}}, None, None)

    def grown(self, index: int, text: str, told: Sequence[Told], offset: int) -> dict[str, Any]:
        """``offset`` characters of the reply are before ``text``."""
        content: dict[str, Any] = {"delta": {"content": text}} if self.chat else {"text": text}
        return self._event(index, content, self._log_probs(told, offset) if told else None, None)

    def ended(self, index: int, choice: ReplyChoice) -> dict[str, Any]:
        content: dict[str, Any] = {"delta": {}} if self.chat else {"text": ""}
        event = self._event(index, {**content, "coala": facts(choice.generation)}, None, choice.finish)
        return {**event, "coala": self._settings}

    def used(self, usage: dict[str, int]) -> dict[str, Any]:
        return {**self._chunk(), "choices": [], "usage": usage}

    def _chunk(self) -> dict[str, Any]:
        kind = "chat.completion.chunk" if self.chat else "text_completion"
        return {**self._head, "object": kind}

    def _event(self, index: int, content: dict[str, Any], log_probs: Any, finish: str | None) -> dict[str, Any]:
        choice = {"index": index, **content, "logprobs": log_probs, "finish_reason": finish}
        return {**self._chunk(), "choices": [choice]}

    def _log_probs(self, told: Sequence[Told], offset: int) -> dict[str, Any] | None:
        if not self._wants:
            return None
        if self.chat:
            return {
                "content": [
                    {
                        **_token(one.text, one.log_prob, one.spelt),
                        "top_logprobs": [
                            _token(_shown(other), other.log_prob, other.spelt) for other in one.alternatives
                        ],
                    }
                    for one in told
                ],
                "refusal": None,
            }
        offsets = []
        for one in told:
            offsets.append(offset)
            offset += len(one.text)
        # Two alternatives may have one text; the likelier comes last and stays.
        top = None
        if self._n_top:
            top = [{_shown(other, "bytes:"): other.log_prob for other in reversed(one.alternatives)} for one in told]
        return {
            "tokens": [one.text for one in told],
            "token_logprobs": [one.log_prob for one in told],
            "top_logprobs": top,
            "text_offset": offsets,
        }


def _token(text: str, log_prob: float, spelt: bytes | None) -> dict[str, Any]:
    return {"token": text, "logprob": log_prob, "bytes": None if spelt is None else list(spelt)}


def _shown(other: Other, mark: str = "") -> str:
    """An alternative as text; bytes that are no character by itself are written out, as the protocol does."""
    if UNFINISHED not in other.text or not other.spelt:
        return other.text
    return mark + "".join(f"\\x{byte:02x}" for byte in other.spelt)


def facts(generation: Generation) -> dict[str, float | None]:
    """What COALA tells of a reply; JSON has no word for what is not finite."""
    values = {"score": generation.score, "log_prob": generation.log_prob, "divergence": generation.divergence}
    return {name: value if value is not None and math.isfinite(value) else None for name, value in values.items()}


# --- streams --------------------------------------------------------------------------------------------------------


async def events(replying: Replying, protocol: Protocol, with_usage: bool) -> AsyncIterator[dict[str, Any]]:
    """The stream of an answer: each choice's opening, growth and end, then what was used."""
    ask = replying.ask
    if ask.drawn > ask.n:  # which are returned is known at the end
        async for _ in replying.grow():
            pass
        for index, choice in enumerate(replying.best()):
            for event in _at_once(protocol, index, choice):
                yield event
    else:
        opened: set[int] = set()
        async for which, text, told, whole in replying.grow():
            choice = replying.choices[which]
            opening = protocol.opening(which)
            if which not in opened and opening is not None:
                yield opening
            opened.add(which)
            if text or told:
                yield protocol.grown(which, text, told, _offset(choice, told))
            if whole:
                yield protocol.ended(which, choice)
    if with_usage:
        yield protocol.used(replying.usage)


def _at_once(protocol: Protocol, index: int, choice: ReplyChoice) -> list[dict[str, Any]]:
    opening = protocol.opening(index)
    middle = [protocol.grown(index, choice.generation.text, choice.told, 0)] if choice.generation.text else []
    return [*([opening] if opening else []), *middle, protocol.ended(index, choice)]


def _offset(choice: ReplyChoice, told: Sequence[Told]) -> int:
    """Characters of the tokens told before these."""
    return sum(len(one.text) for one in choice.told[: len(choice.told) - len(told)])


class EventStream(Response):
    """Server-sent events of ``made``; ``answering`` is closed when the stream ends."""

    media_type = "text/event-stream"

    def __init__(self, made: AsyncIterator[dict[str, Any]], answering: Answering) -> None:
        super().__init__(None)
        # Proxies must not hold events back.
        self.headers["X-Accel-Buffering"] = "no"
        del self.headers["content-length"]
        self._made, self._answering = made, answering

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def sending(body: bytes, more: bool = True) -> None:
            await send({"type": "http.response.body", "body": body, "more_body": more})

        try:
            await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
            try:
                async for event in self._made:
                    await sending(b"data: " + json.dumps(event, ensure_ascii=False).encode() + b"\n\n")
            except Refusal as refusal:  # the status is out: the error is the last event
                await sending(b"data: " + json.dumps(refusal.body).encode() + b"\n\n", more=False)
                return
            await sending(b"data: [DONE]\n\n", more=False)
        except Gone:
            pass  # nobody reads on
        finally:
            self._answering.close()
