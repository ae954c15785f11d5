"""The bytes that a token stands for, also where they are only part of a character; knows tokenizers, not models."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from typing import Any

FALLBACK = re.compile(r"<0x([0-9A-Fa-f]{2})>")


class Spelling:
    """Tokens of a tokenizer to their own bytes, as far as its way of decoding is one that keeps bytes apart.

    Known are byte-level BPE (GPT-2's kind) and SentencePiece's with its bytes for unknown characters. Others join and
    mend words, so that a token alone stands for no bytes.
    """

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self._special = frozenset(int(token) for token in tokenizer.all_special_ids)
        steps = _steps(getattr(tokenizer, "backend_tokenizer", None))
        kinds = [step.get("type") for step in steps]
        self._alphabet = _alphabet() if "ByteLevel" in kinds else None
        known = {"ByteLevel"} if self._alphabet else {"Replace", "ByteFallback", "Fuse", "Strip", "Metaspace"}
        self._known = bool(kinds) and set(kinds) <= known
        self._falls_back = "ByteFallback" in kinds
        self._written = [pair for step in steps if (pair := _replaced(step)) is not None]

    def own(self, token: int) -> bytes | None:
        """The token's own bytes, none for a special token, which has no text; ``None`` where they are not known."""
        if token in self._special:
            return b""
        piece = self._tokenizer.convert_ids_to_tokens(token) if self._known else None
        if piece is None:
            return None
        if self._alphabet is not None:
            found = [self._alphabet.get(character) for character in piece]
            return piece.encode() if None in found else bytes(byte for byte in found if byte is not None)
        byte = FALLBACK.fullmatch(piece) if self._falls_back else None
        if byte:
            return bytes([int(byte[1], 16)])
        for written, meant in self._written:
            piece = piece.replace(written, meant)
        return str(piece).encode()

    def spelt(self, tokens: Sequence[int], texts: Sequence[str], *, first: bool) -> list[bytes]:
        """Bytes of each of a reply's ``tokens``, whose pieces are ``texts``: together exactly those of the text.

        They are the tokens' own wherever these make up the text. Where bytes were no characters, which the text
        shows by a replacement character, they are those of the pieces. ``first`` if the reply begins here, from which
        some tokenizers take a space.
        """
        found: list[bytes] = []
        begun: list[bytes | None] = []
        for token, text in zip(tokens, texts, strict=True):
            begun.append(self.own(token))
            if not text:
                continue
            found += _agreed(begun, text, first=first and not found)
            begun = []
        return found + [b""] * len(begun)


def _agreed(own: Sequence[bytes | None], text: str, *, first: bool) -> list[bytes]:
    """``own`` if together they are ``text``, else the text at the last of them, which completed it."""
    whole = text.encode()
    known = [one for one in own if one is not None]
    if len(known) == len(own):
        if b"".join(known) == whole:
            return known
        if first and b"".join(known) == b" " + whole:
            at = next(at for at, one in enumerate(known) if one)
            return [*known[:at], known[at][1:], *known[at + 1 :]]
    return [*[b""] * (len(own) - 1), whole]


def _steps(backend: Any) -> list[dict[str, Any]]:
    """What a tokenizer's decoder does, in order."""
    decoder = getattr(backend, "decoder", None)
    if decoder is None:
        return []
    made: dict[str, Any] = json.loads(decoder.__getstate__())
    steps: list[dict[str, Any]] = made["decoders"] if made.get("type") == "Sequence" else [made]
    return steps


def _replaced(step: dict[str, Any]) -> tuple[str, str] | None:
    if step.get("type") == "Metaspace":
        return str(step.get("replacement", "\u2581")), " "
    pattern = step.get("pattern")
    if step.get("type") == "Replace" and isinstance(pattern, dict) and "String" in pattern:
        return str(pattern["String"]), str(step.get("content", ""))
    return None


def _alphabet() -> dict[str, int]:
    """The characters by which byte-level tokenizers write bytes: those that can be seen stand for themselves, the
    others in order for the characters from 256 on."""
    seen = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in seen]
    return {chr(byte): byte for byte in seen} | {chr(256 + place): byte for place, byte in enumerate(others)}
