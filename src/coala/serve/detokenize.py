"""Tokens to the pieces of text they add; knows a model by what it makes of tokens, nothing of scores or requests."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from coala.serve.spelling import Spelling
from coala.values import user

if TYPE_CHECKING:
    from coala.backbone import LanguageModel

UNFINISHED = "\N{REPLACEMENT CHARACTER}"
# Tokens that decide how the next one is read, but for what they have not completed.
CONTEXT = 4


class PieceReader:
    """Tokens of ``backbone`` to text, as they read in the middle of a reply; ``raw`` if it continues a text as it
    stands."""

    def __init__(self, backbone: LanguageModel, *, raw: bool = False) -> None:
        self._backbone = backbone
        self.spelling = Spelling(backbone.tokenizer)
        # Many tokenizers drop the space a text begins with: pieces are read behind a token that has text.
        tokens = backbone.render(user("a")).tokens
        self._anchor = next(([token] for token in reversed(tokens) if backbone.decode([token]).strip()), [])
        # Replies of such a template begin with a space that is not theirs.
        self.strips = backbone.template.startswith("dialogue:") and not raw

    def text(self, tokens: Sequence[int]) -> str:
        """The text of ``tokens`` behind some word."""
        before = self._backbone.decode(self._anchor)
        whole = self._backbone.decode([*self._anchor, *tokens])
        return whole[len(before) :] if whole.startswith(before) else self._backbone.decode(tokens)

    def alternative(self, token: int, before: Sequence[int]) -> str:
        """What ``token`` would add behind ``before``; nothing for a token without text."""
        context = before[-CONTEXT:]
        return self.text([*context, token])[len(self.text(context)) :]

    def pieces(self, tokens: Sequence[int]) -> list[str]:
        """A piece for each of a reply's ``tokens``; together they are its text."""
        growing = Growing(self)
        found = [growing.add(token) for token in tokens]
        if found:
            found[-1] += growing.rest()
        return found


class Growing:
    """A reply to which tokens are added: each token's piece, from a window of few tokens.

    What a token only begins, such as the first bytes of a character, belongs to the token that completes it.
    """

    def __init__(self, reader: PieceReader) -> None:
        self._reader = reader
        self.tokens: list[int] = []
        self._first = self._told = 0  # the window's first token; the first whose text is still to be told
        self._begun = False

    def add(self, token: int) -> str:
        self.tokens.append(token)
        return self._tell(last=False)

    def rest(self) -> str:
        """What no token has completed."""
        return self._tell(last=True)

    def _tell(self, *, last: bool) -> str:
        before = self._reader.text(self.tokens[self._first : self._told])
        text = self._reader.text(self.tokens[self._first :])[len(before) :]
        if not text or (text.endswith(UNFINISHED) and not last):
            return ""
        self._first, self._told = self._told, len(self.tokens)
        if not self._begun and self._reader.strips:
            text = text.removeprefix(" ")
        self._begun = True
        return text
