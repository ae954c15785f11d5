"""What a chat server answers, read strictly, and the form it is kept in; knows nothing of how it came."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Completion:
    """The first choice: its ``text``, why it ends, and the likeliest first tokens (nats) if they were asked for.

    ``finish`` is "stop", "length", "content_filter" or the server's own word; ``reasoning`` what the server gives as
    thoughts, apart from the text; token counts are None where there are none. ``model`` is as the server names it, and
    is not kept.
    """

    text: str
    finish: str = "stop"
    refusal: str = ""
    top: tuple[tuple[str, float], ...] | None = None
    prompt_tokens: int | None = None
    completion_tokens: int | None = None
    reasoning: str = ""
    model: str = field(default="", compare=False)

    def to_json(self) -> str:
        return json.dumps({name: value for name, value in vars(self).items() if name != "model"})

    @classmethod
    def from_json(cls, text: str) -> Completion:
        row = json.loads(text)
        top = None if row["top"] is None else tuple((str(token), float(value)) for token, value in row["top"])
        return cls(**{**row, "top": top})


def read_completion(body: bytes, struck: Callable[[str], str] = str) -> Completion:
    """``struck`` is done to every text. Raises :class:`ValueError` for a body that is no chat completion."""
    try:
        document = json.loads(body)
        choice = document["choices"][0]
        message = choice["message"]
        text, refusal, finish = _text(message.get("content")), message.get("refusal"), choice.get("finish_reason")
        thoughts = message.get("reasoning_content") or message.get("reasoning") or ""
        if not isinstance(text, str | None) or not isinstance(refusal, str | None):
            raise TypeError("content is not a text")
        usage, model = document.get("usage"), document.get("model")
        usage = usage if isinstance(usage, dict) else {}
        return Completion(
            text=struck(text or ""),
            finish=str(finish or "stop"),
            refusal=struck(refusal or ""),
            top=_top(choice.get("logprobs")),
            prompt_tokens=_tokens(usage.get("prompt_tokens")),
            completion_tokens=_tokens(usage.get("completion_tokens")),
            reasoning=struck(thoughts if isinstance(thoughts, str) else json.dumps(thoughts)),
            model=struck(model) if isinstance(model, str) else "",
        )
    except (KeyError, IndexError, TypeError, AttributeError, RecursionError) as error:
        raise ValueError(str(error)) from None


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
