"""Prompts to tokens, a piece at a time: each once, however many replies are wanted, and none that is too long in full.

Knows nothing of threads, HTTP or scores.
"""

from __future__ import annotations

from collections.abc import Generator, Sequence
from typing import TYPE_CHECKING

from coala.values import CoalaError, ConvexHead, Turn

if TYPE_CHECKING:
    from coala.backbone import LanguageModel
    from coala.decoding import Rendered

# A conversation to be answered, or a text to be continued as it stands.
Prompt = tuple[Turn, ...] | str


class TooLong(CoalaError):
    """A prompt that leaves no room for a reply."""


def rendered(
    prompts: Sequence[Prompt], head: ConvexHead, backbone: LanguageModel
) -> Generator[None, None, list[Rendered]]:
    """Each of ``prompts`` as tokens, to be decoded from and as the head reads it; yields between any two.

    Raises :class:`TooLong` at the first that leaves no room for a reply: a prompt is never cut.
    """
    from coala.decoding import Rendered

    found = []
    for prompt in prompts:
        require_room(prompt, backbone)
        raw = isinstance(prompt, str)
        row = backbone.raw(prompt) if isinstance(prompt, str) else backbone.render(prompt)
        length = len(row.tokens) + row.dropped
        if row.dropped or length >= backbone.max_tokens:
            raise too_long(f"has {length}", backbone)
        read, most = row.tokens, head.spec.max_tokens
        if head.needs_prompt and length > most:
            cut = backbone.raw(prompt, max_tokens=most) if isinstance(prompt, str) else None
            read = (cut or backbone.render(prompt, max_tokens=most)).tokens
        found.append(Rendered(row.tokens, read, raw))
        yield
    return found


def require_room(prompt: Prompt, backbone: LanguageModel, what: str = "The prompt") -> None:
    """Raise :class:`TooLong` for a text whose beginning alone is longer than the model's context."""
    least = backbone.surplus(prompt, backbone.max_tokens)
    if least:
        raise too_long(f"has more than {least}", backbone, what)


def too_long(has: str, backbone: LanguageModel, what: str = "The prompt") -> TooLong:
    return TooLong(
        f"{what} {has} tokens; the model's context holds {backbone.max_tokens}, the reply among them. Send less."
    )
