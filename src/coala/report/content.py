"""The content of a report as plain JSON values."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from coala import store
from coala.pages.parts import Conversation
from coala.values import CoalaError

KEYS = (
    *("title", "command", "run", "created", "settings", "summary", "data_findings", "reads", "head", "curves"),
    *("layers", "path", "scores", "reliability", "by_length", "length_unit", "costs", "win_rates", "perplexity"),
    *("policy", "distilled", "samples", "evaluations", "receipts"),
)


def plain(content: Mapping[str, Any]) -> dict[str, Any]:
    """``content`` as JSON can hold it (:func:`coala.store.plain`), what is ``None`` left out."""
    unknown = sorted(set(content) - set(KEYS))
    if unknown:
        raise CoalaError(f"A report has no part {', '.join(map(repr, unknown))}; its parts are {', '.join(KEYS)}.")
    try:
        return {key: store.plain(value) for key, value in content.items() if value is not None}
    except TypeError as error:
        raise CoalaError(f"A report cannot hold this: {error}; expected numbers, text, lists and mappings.") from None


def mapping_of(value: Any) -> Mapping[str, Any]:
    """``value`` if it is one, else an empty one: every part of a content may be missing."""
    return value if isinstance(value, Mapping) else {}


def rows_of(value: Any) -> list[Mapping[str, Any]]:
    return [row for row in value if isinstance(row, Mapping)] if isinstance(value, list) else []


def conversation_of(prompt: Any) -> Conversation:
    """A prompt as it was kept: a text, or turns."""
    turns = [{name: str(turn.get(name) or "") for name in ("role", "text")} for turn in rows_of(prompt)]
    return turns or (str(prompt) if isinstance(prompt, str) else "")
