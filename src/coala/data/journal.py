"""The journal of a synthesis: one JSON line per event, only ever appended to; read back after a kill at any byte.

Lines and their meaning; knows nothing of files, endpoints or agents. Events:

    begun       what the data set is made of; the first line
    lease       the tokens and the money that may be spent before the next lease is written
    kept        a finished conversation
    dropped     an attempt that was thrown away: why, and what it cost
    given up    a conversation that no attempt finished
    resumed     what an earlier run may have spent without saying so
    ended       the run stopped in good order: all it spent is in the lines above
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from coala.data.agents import SynthesisError
from coala.data.findings import describe, printable
from coala.endpoint import Usage

VERSION = 1
KINDS = ("begun", "lease", "kept", "dropped", "given up", "resumed", "ended")


@dataclass
class Journal:
    """What a journal says. ``size`` is the number of sound bytes: what follows them was torn off by a kill."""

    identity: Mapping[str, Any] | None = None
    size: int = 0
    kept: dict[int, tuple[int, int]] = field(default_factory=dict)  # index to the place and length of its line
    digests: dict[bytes, int] = field(default_factory=dict)
    given_up: set[int] = field(default_factory=set)
    attempts: Counter[int] = field(default_factory=Counter)
    dropped: Counter[str] = field(default_factory=Counter)
    spent: Usage = field(default_factory=Usage)
    spent_on_kept: Usage = field(default_factory=Usage)
    leased: tuple[int, int] | None = None  # tokens, nanodollars; None once a run ended in good order

    @property
    def finished(self) -> int:
        return len(self.kept) + len(self.given_up)

    def lost(self) -> Usage:
        """What the last run may have spent without writing it down: the rest of its lease."""
        if self.leased is None:
            return Usage()
        tokens, money = self.leased
        return Usage(uncertain=max(0, tokens - self.spent.tokens), nanodollars=max(0, money - self.spent.nanodollars))


def line(kind: str, **content: Any) -> bytes:
    """One event as the bytes to append."""
    return (json.dumps({"kind": kind, **content}, ensure_ascii=False, separators=(",", ":")) + "\n").encode()


def read_journal(raw: bytes, source: str = "journal") -> Journal:
    """What ``raw``, the whole of a journal, says.

    A tail that is no event is what a kill left of a last write: it is not counted in ``size`` and the caller cuts it
    off. An unreadable line with a sound one after it is damage and raises :class:`SynthesisError`, as does a file that
    is no journal.
    """
    journal = Journal()
    start, number = 0, 0
    torn: tuple[int, str] | None = None
    while start < len(raw):
        end = raw.find(b"\n", start)
        end = len(raw) if end < 0 else end + 1
        number += 1
        try:
            event = _event(raw[start:end])
        except ValueError as error:
            torn = torn or (number, str(error))
        else:
            if torn:
                raise SynthesisError(
                    f"{source}:{torn[0]}: is not a line of a journal ({printable(torn[1])}) although valid lines "
                    "follow. Fix: delete that line, or use another --out to start over."
                )
            try:
                _apply(journal, event, start, end - start)
            except (KeyError, TypeError, ValueError, AttributeError, OverflowError) as error:
                raise SynthesisError(
                    f"{source}:{number}: a line of kind {event.get('kind')!r} that does not fit "
                    f"({type(error).__name__}: {printable(str(error))}). "
                    "Delete that line, or give another --out to start over."
                ) from None
            journal.size = end
        start = end
    begun = b'{"kind":"begun",'
    # A first write may be torn, or lie on the disk as NULs; any other beginning is a file of someone else's.
    if torn and not journal.size and raw.strip(b"\0") and (b"\n" in raw or raw[: len(begun)] != begun[: len(raw)]):
        raise SynthesisError(
            f"{source}: is not a journal of conversations (its first line: {printable(torn[1])}). Fix: use another "
            "--out."
        )
    return journal


def _event(raw: bytes) -> dict[str, Any]:
    if not raw.endswith(b"\n"):
        raise ValueError("the line has no end")
    try:
        event = json.loads(raw)
    except RecursionError:
        raise ValueError("nested too deep") from None
    if not isinstance(event, dict) or event.get("kind") not in KINDS:
        raise ValueError(describe(event))
    return event


def _apply(journal: Journal, event: dict[str, Any], place: int, length: int) -> None:
    kind = event["kind"]
    if (kind == "begun") != (journal.identity is None):
        raise ValueError("a journal begins once, with its first line")
    if kind == "begun":
        if event["version"] != VERSION:
            raise ValueError(f"version {event['version']}, expected {VERSION}")
        journal.identity = dict(event["identity"])
    elif kind == "lease":
        journal.leased = (_count(event["tokens"]), _count(event["nanodollars"]))
    elif kind == "ended":
        journal.leased = None
    else:
        usage = Usage(**{name: _count(value) for name, value in event["usage"].items()})
        if kind == "resumed":
            journal.leased = None
        else:
            index = _count(event["index"])
            if index in journal.kept or index in journal.given_up:
                raise ValueError(f"conversation {index} was finished before")
            if kind == "kept":
                journal.kept[index] = (place, length)
                journal.digests[bytes.fromhex(event["digest"])] = index
                journal.spent_on_kept += usage
            elif kind == "dropped":
                journal.attempts[index] += event["attempt"] is not None
                journal.dropped[str(event["reason"])] += 1
            else:
                journal.given_up.add(index)
        journal.spent += usage


def _count(value: Any) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or value < 0:
        raise ValueError(f"{describe(value)} where a count is expected")
    return value


def conversation_of(raw: bytes) -> dict[str, Any]:
    """The finished conversation that a line of kind ``kept`` holds."""
    held: dict[str, Any] = json.loads(raw)["conversation"]
    return held


def text_digest(texts: list[str]) -> bytes:
    """16 bytes, equal for texts that differ in white space and case only."""
    state = hashlib.blake2b(digest_size=16)
    for text in texts:
        state.update(" ".join(text.casefold().split()).encode("utf-8", "replace") + b"\0")
    return state.digest()
