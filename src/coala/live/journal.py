"""The journal of a session: one JSON line per event, only ever appended to; read back after a kill at any byte.

    begun      what the session is made of; the first line
    prompt     a prompt, and whether it is set aside for held-out clicks
    rater      somebody who compares, and their personal token
    scaled     the replies whose features settle the coordinates
    asked      a pair before it is shown: its replies, whether it is held out, and how the head orders it
    answered   what a rater said of it
    undone     an answer taken back

An event that is there twice counts once, so that whoever does not know whether it was kept may send it again. Knows
nothing of models or files.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Literal, get_args

from coala.values import CoalaError, Pair, Turn

VERSION = 1
Verdict = Literal["first", "second", "same", "skip", "edited"]
Side = Literal["first", "second", ""]
VERDICTS: tuple[Verdict, ...] = get_args(Verdict)
How = Literal["active", "random"]


class JournalError(CoalaError):
    """A journal that cannot be read, or an event that does not fit what went before."""


@dataclass(frozen=True)
class LivePrompt:
    """A prompt; pairs of one that is ``aside`` are held out."""

    id: str
    turns: tuple[Turn, ...]
    aside: bool


@dataclass(frozen=True)
class Reply:
    """A reply as a rater sees it: its id, text and where it came from."""

    id: str
    text: str
    policy: str


@dataclass(frozen=True)
class Asked:
    """A pair as it was put to a rater. ``margin``: log-odds of the head of then that the first is preferred."""

    id: str
    prompt: str
    first: Reply
    second: Reply
    held_out: bool
    how: How
    rater: str
    margin: float
    n_taught: int


@dataclass(frozen=True)
class Answered:
    """What was said of a pair: ``text`` is the ``side`` as the rater would have it, if that was edited.

    ``click`` is the id that the rater's page gave it: of the same click twice, one counts.
    """

    id: str
    click: str
    verdict: Verdict
    at: str
    tags: tuple[str, ...] = ()
    side: Side = ""
    text: str = ""
    order: int = 0

    def __post_init__(self) -> None:
        if self.verdict not in VERDICTS:
            raise JournalError(f"found the verdict {str(self.verdict)[:40]!r}, expected one of {', '.join(VERDICTS)}")
        if self.verdict == "edited" and not (self.side and self.text.strip()):
            raise JournalError("found an edit without a side or a text, expected both")


@dataclass
class Journal:
    """What a journal says. ``size``: its sound bytes; what follows them was torn off by a kill."""

    identity: Mapping[str, Any] | None = None
    size: int = 0
    prompts: dict[str, LivePrompt] = field(default_factory=dict)
    raters: dict[str, str] = field(default_factory=dict)  # token to name
    scaled: tuple[str, ...] = ()
    asked: dict[str, Asked] = field(default_factory=dict)
    answered: dict[str, Answered] = field(default_factory=dict)  # in the order of clicks
    clicks: set[str] = field(default_factory=set)
    undone: int = 0
    reopened: list[str] = field(default_factory=list)
    n_answers: int = 0

    def apply(self, event: Mapping[str, Any]) -> bool:
        """Take an event in; False for one that is there already. :class:`JournalError` for one that does not fit."""
        try:
            return self._apply(event)
        except (CoalaError, KeyError, TypeError, ValueError, AttributeError) as error:
            raise JournalError(
                f"an event of kind {str(event.get('kind'))[:40]!r} that does not fit ({type(error).__name__}: {error})"
            ) from None

    def _apply(self, event: Mapping[str, Any]) -> bool:
        kind = event["kind"]
        if (kind == "begun") != (self.identity is None):
            raise ValueError("a journal begins once, with its first line")
        if kind == "begun":
            if event["version"] != VERSION:
                raise ValueError(f"version {event['version']}, expected {VERSION}")
            self.identity = dict(event["identity"])
        elif kind == "prompt":
            if event["id"] in self.prompts:
                return False
            turns = tuple(Turn(role, text) for role, text in event["turns"])
            self.prompts[event["id"]] = LivePrompt(event["id"], turns, bool(event["aside"]))
        elif kind == "rater":
            if event["token"] in self.raters:
                return False
            self.raters[event["token"]] = str(event["name"])
        elif kind == "scaled":
            if self.scaled:
                return False
            self.scaled = tuple(event["replies"])
        elif kind == "asked":
            return self._ask(event)
        elif kind == "answered":
            return self._answer(event)
        elif kind == "undone":
            found = self.answered.get(event["id"])
            if found is None or found.click != event["click"]:
                return False
            del self.answered[event["id"]]
            self.reopened.append(event["id"])
            self.undone += 1
        else:
            raise ValueError("no such kind")
        return True

    def _ask(self, event: Mapping[str, Any]) -> bool:
        values = {name: event[name] for name in Asked.__dataclass_fields__}
        values |= {side: Reply(**event[side]) for side in ("first", "second")}
        if values["prompt"] not in self.prompts:
            raise ValueError("a question of no known prompt")
        if event["id"] in self.asked:
            return False
        self.asked[event["id"]] = Asked(**values)
        return True

    def _answer(self, event: Mapping[str, Any]) -> bool:
        found = Answered(
            event["id"],
            event["click"],
            event["verdict"],
            event["at"],
            tuple(event.get("tags", ())),
            event.get("side", ""),
            event.get("text", ""),
            self.n_answers + 1,
        )
        if found.id not in self.asked:
            raise ValueError("an answer to no known question")
        if found.id in self.answered or found.click in self.clicks:
            return False
        self.clicks.add(found.click)
        self.n_answers += 1
        self.answered[found.id] = found
        return True

    # --- what follows from it ----------------------------------------------------------------------------------------

    def open_question(self, rater: str) -> Asked | None:
        """The question that this rater took an answer back to last, else was asked last, and has not answered."""
        order = [*(self.asked[name] for name in reversed(self.reopened)), *reversed(self.asked.values())]
        return next((one for one in order if one.rater == rater and one.id not in self.answered), None)

    def last_answer(self, rater: str) -> Answered | None:
        """What this rater said last and has not taken back."""
        return next((a for a in reversed(self.answered.values()) if self.asked[a.id].rater == rater), None)

    def preferred(self, answer: Answered) -> tuple[str, str] | None:
        """Texts of the preferred reply and the other one; None for an answer that prefers neither."""
        asked = self.asked[answer.id]
        if answer.verdict == "first":
            return asked.first.text, asked.second.text
        if answer.verdict == "second":
            return asked.second.text, asked.first.text
        if answer.verdict == "edited":
            other = asked.first if answer.side == "first" else asked.second
            return None if answer.text == other.text else (answer.text, other.text)
        return None

    def pairs(self, *, held_out: bool) -> list[tuple[Pair, Answered]]:
        """The pairs of all answers, in their order, each with the answer it is of."""
        found = []
        for answer in self.answered.values():
            asked = self.asked[answer.id]
            if asked.held_out == held_out and (both := self.preferred(answer)) is not None:
                pair = Pair(self.prompts[asked.prompt].turns, *both, group=asked.prompt, rater=asked.rater)
                found.append((pair, answer))
        return found

    def outcomes(self) -> list[float]:
        """Of the held-out pairs as they were shown, in order: 1 where the head of then was right, a half if it was
        undecided, else 0. Edits are of no pair that was shown, and say nothing here."""
        found = []
        for answer in self.answered.values():
            asked = self.asked[answer.id]
            if asked.held_out and answer.verdict in ("first", "second"):
                toward = asked.margin if answer.verdict == "first" else -asked.margin
                found.append(0.5 if toward == 0 else float(toward > 0))
        return found


def line(event: Mapping[str, Any]) -> bytes:
    """One event as the bytes to append."""
    return (json.dumps(event, ensure_ascii=False, separators=(",", ":")) + "\n").encode("utf-8", "replace")


def events_of(raw: bytes, source: str) -> tuple[list[tuple[int, dict[str, Any]]], int]:
    """The events of a file of lines, each with its line number, and the number of sound bytes.

    A tail that is no event is what a kill left of a last write. An unreadable line with a sound one after it is damage.
    """
    found: list[tuple[int, dict[str, Any]]] = []
    size = start = 0
    torn = 0
    for number, piece in enumerate(raw.split(b"\n"), 1):
        end = start + len(piece) + 1
        try:
            event = json.loads(piece) if end <= len(raw) else None
        except (ValueError, RecursionError):
            event = None
        if isinstance(event, dict):
            if torn:
                raise JournalError(
                    f"{source}:{torn}: is not a line of a session although valid lines follow. Fix: delete that line."
                )
            found.append((number, event))
            size = end
        elif piece:
            torn = torn or number
        start = end
    return found, size


def read_journal(raw: bytes, source: str = "journal") -> Journal:
    """What ``raw``, the whole of a journal, says; :class:`JournalError` for damage and for somebody else's file."""
    journal = Journal()
    events, journal.size = events_of(raw, source)
    if raw.strip(b"\0") and not events and b"\n" in raw:
        raise JournalError(f"{source}: is not a journal of clicks. Fix: use another --out.")
    for number, event in events:
        try:
            journal.apply(event)
        except JournalError as error:
            raise JournalError(
                f"{source}:{number}: holds {error}. Fix: delete that line, or restore a backup."
            ) from None
    return journal


def asked_event(asked: Asked) -> dict[str, Any]:
    """The event of a question."""
    return {"kind": "asked", **asdict(asked)}


def answered_event(answer: Answered) -> dict[str, Any]:
    """The event of an answer; its place in the order is its place in the file."""
    plain = asdict(replace(answer, order=0))
    del plain["order"]
    return {"kind": "answered", **plain, "tags": list(answer.tags)}


def tags_of(given: Sequence[str]) -> tuple[str, ...]:
    """Tags without white space around them, each once, none of them empty."""
    return tuple(dict.fromkeys(tag for one in given if (tag := " ".join(one.split()))))
