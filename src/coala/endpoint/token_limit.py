"""From an endpoint's refusal to a request it takes: how many tokens a reply may have, in the words servers use.

Knows nothing of connections or judges.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

NAMES = ("max_tokens", "max_completion_tokens")
_NUMBER = r"(\d[\d,]*)"
_CONTEXT = re.compile(rf"(?:context|max_model_len)\D{{0,60}}?{_NUMBER}", re.IGNORECASE)
_INPUT = re.compile(
    rf"{_NUMBER} (?:input tokens|(?:tokens )?(?:in|from|of) the (?:messages|prompt|input))"
    rf"|(?:prompt|input|messages)\D{{0,40}}?{_NUMBER} (?:input )?tokens",
    re.IGNORECASE,
)
_ABOUT_REPLY = re.compile(r"max_(?:completion_|new_|output_)?tokens|(?:completion|output) tokens", re.IGNORECASE)


@dataclass(frozen=True)
class Change:
    """What to ask for instead: ``limit`` tokens under ``name``, which was ``old``. ``lasts`` for other prompts too."""

    old: str
    name: str
    limit: int
    lasts: bool

    def applied(self, request: Mapping[str, Any]) -> dict[str, Any]:
        """``request`` under this limit."""
        asked = request.get(self.old)
        if not isinstance(asked, int):
            return dict(request)
        rest = {name: value for name, value in request.items() if name != self.old}
        return {**rest, self.name: min(asked, self.limit)}


def change_for(refusal: str, request: Mapping[str, Any]) -> Change | None:
    """The change that the words of a ``refusal`` ask for; None if they are about something else.

    A model's context less the prompt holds for this prompt alone; a server's own limit, for all. A refusal that names
    no number is met with half.
    """
    name = next((name for name in NAMES if isinstance(request.get(name), int)), None)
    if name is None:
        return None
    asked = int(request[name])
    other = NAMES[1 - NAMES.index(name)]
    if re.search(rf"unsupported parameter|not supported.{{0,80}}use '?{other}", refusal, re.IGNORECASE | re.DOTALL):
        return Change(name, other, asked, True) if name in refusal and other in refusal else None
    context, prompt = _CONTEXT.search(refusal), _INPUT.search(refusal)
    if context and prompt:
        room = _whole(context[1]) - _whole(prompt[1] or prompt[2])
        return Change(name, name, room, False) if 0 < room < asked else None
    if not _ABOUT_REPLY.search(refusal):
        return None
    smaller = [n for n in map(_whole, re.findall(_NUMBER, refusal)) if 0 < n < asked]
    limit = max(smaller, default=asked // 2)
    return Change(name, name, limit, True) if limit else None


def _whole(written: str) -> int:
    digits = written.replace(",", "")
    return int(digits) if len(digits) < 10 else 0
