"""Conversations: reading them in the shapes they come in, and pairs by the Alternating Population Strategy.

Knows nothing of preference formats. Whether what the pairs teach is more than a place in the dialogue is for
:mod:`coala.data.cues` to say.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Set
from itertools import pairwise
from typing import Any, Literal

from coala.data.context import in_context
from coala.data.files import Source, records, sources
from coala.data.findings import DataError, Fault, Finding, describe, listed
from coala.data.records import names
from coala.data.serialised import opened
from coala.data.turns import Row, digest, is_messages, merged, named_group, same_reply, sound_text, text, turns
from coala.values import CoalaError, Pair, Role, Turn

_FLIPPED: Mapping[Role, Role] = {"user": "assistant", "assistant": "user", "system": "system"}
Context = Literal["all", "first"] | int


def alternate(
    conversation: Sequence[Turn], group: str, *, role: Role = "assistant", context: Context = "all"
) -> list[Pair]:
    """Pairs of one conversation: chosen is a reply of ``role``, rejected the same speaker's next reply.

    ``context`` says how much of what came before is the prompt:

    - ``"all"``: everything (COALA, section 6.3);
    - ``"first"``: the first utterance only (CVX-DPO, section 5.1). It is what the first reply answers, so the first
      and the second reply make the one pair;
    - a number n: the other's last n turns and the replies between them. System turns always stay.

    Consecutive turns of one speaker count as one reply (joined by a line break): what follows such a turn is no answer
    to what the other said. k replies give k - 1 pairs (one, for ``"first"``), except that

    - a reply with nothing before it but system turns gives none, since there is nothing it could be an answer to;
    - two replies of the same text give none.

    With ``role="user"`` the two speakers change places, so that the one who replies is the assistant of the pair.
    Raises :class:`~coala.values.CoalaError` for any other role or context.
    """
    if context not in ("all", "first") and (not isinstance(context, int) or context < 1):
        raise CoalaError(f"The context {context!r} is unknown; expected 'all', 'first' or a number of turns from 1.")
    if role not in ("assistant", "user"):
        raise CoalaError(f"Replies of role {role!r} cannot be compared; expected 'assistant' or 'user'.")
    said = merged(conversation, "\n")
    if role == "user":
        said = [Turn(_FLIPPED[turn.role], turn.text) for turn in said]
    places = [k for k, turn in enumerate(said) if turn.role == "assistant"]
    asked = next((k for k, turn in enumerate(said) if turn.role == "user"), len(said))
    return [
        Pair(_context(said[:here], context), said[here].text, said[after].text, group)
        for here, after in pairwise(places)
        if any(turn.role != "system" for turn in said[:here])
        and (context != "first" or here == next((k for k in places if k > asked), None))
        and not same_reply(said[here].text, said[after].text)
    ]


def _context(before: Sequence[Turn], context: Context) -> tuple[Turn, ...]:
    """The part of ``before`` that the prompt keeps."""
    if context == "all":
        return tuple(before)
    asked = [k for k, turn in enumerate(before) if turn.role == "user"]
    if context == "first":
        return tuple(turn for k, turn in enumerate(before) if turn.role == "system" or k == asked[0])
    start = asked[-context] if context <= len(asked) else 0
    return tuple(turn for k, turn in enumerate(before) if turn.role == "system" or k >= start)


def read_conversations(source: Source, format: str = "auto") -> Iterator[tuple[str, list[Turn]]]:
    """Conversations of one or several files or hub data sets, as (group, turns), in reading order.

    ``format`` is a name in :data:`SHAPES`, or ``auto``. A conversation that another of the same source only continues
    (a snapshot of it) is left out: its pairs would all come twice. Raises :class:`DataError` at the first bad row.
    """
    if format != "auto" and format not in SHAPES:
        raise CoalaError(f"There is no conversation format {format!r}; expected auto or one of {listed(SHAPES)}.")
    for name in sources(source):
        found: list[tuple[str, list[Turn]]] = []
        for event in records(name):
            if isinstance(event, Finding):
                if event.severity == "error":
                    raise DataError([event])
                continue
            try:
                row = opened(event.value)[0] if isinstance(event.value, Mapping) else event.value
                found.append(conversation(row, format))
            except Fault as fault:
                raise DataError([fault.at(event.file, event.row)]) from None
        for k in whole([said for _, said in found]):
            yield found[k]


def whole(conversations: Iterable[Sequence[Turn]]) -> list[int]:
    """The places of the conversations that no other one continues; of exact copies the first.

    Keeps a number per turn and none of the words, so that a first pass over a file can ask it.
    """
    begun: set[int] = set()
    ends: list[int] = []
    for said in conversations:
        # One number per beginning, each made from the one before, so a conversation costs its length once.
        so_far = [0]
        for turn in said:
            so_far.append(hash((so_far[-1], turn.role, turn.text)))
        begun.update(so_far[:-1])
        ends.append(so_far[-1])
    first = {end: k for k, end in reversed(list(enumerate(ends)))}
    return [k for k, end in enumerate(ends) if end not in begun and first[end] == k]


def conversation(row: Any, format: str = "auto") -> tuple[str, list[Turn]]:
    """The group and the turns of one row; raises :class:`Fault` when it is no conversation."""
    if not isinstance(row, Mapping):
        raise Fault("", describe(row), "an object with named fields", "write each conversation as an object")
    for name, (fields, make) in SHAPES.items():
        if format == name or (format == "auto" and fields <= set(row)):
            for field in sorted(fields - set(row)):
                raise Fault(
                    field, f"no such field (there are {listed(row) or 'none'})", "turns", "add or rename the field"
                )
            said, group = make(row)
            said = in_context(row, said, fields, ("system",))
            if not said:
                raise Fault(min(fields), "no turns", "a conversation", "delete the row")
            return group or named_group(row) or _first_words(said), said
    expected = "messages, conversations, turns, c_h and c_r, past_convo or conversation"
    raise Fault("", f"the fields {listed(row) or '(none)'}", expected, "rename the field that holds the turns")


def is_conversation(row: Row) -> bool:
    return any(fields <= set(row) for fields, _ in SHAPES.values())


def shape_columns(row: Row) -> Set[str]:
    """The columns whose words a conversation takes."""
    for fields, _ in SHAPES.values():
        if fields <= set(row):
            return fields | {"question", "student_incorrect_solution"} if fields == {"conversation"} else fields
    return frozenset()


def _first_words(said: Sequence[Turn]) -> str:
    return digest(next((turn.text for turn in said if turn.role == "user"), said[0].text))


# --- the shapes --------------------------------------------------------------------------------------------------

_MOVE = re.compile(r"\s*\((generic|focus|probing|telling)\)\s*")
Shaped = tuple[list[Turn], str | None]


def _messages(field: str) -> Callable[[Row], Shaped]:
    def read(row: Row) -> Shaped:
        value = row[field]
        if not is_messages(value):
            raise Fault(field, describe(value), "a list of messages", "write [{role, content}, ...]")
        own = row.get("id")
        group = named_group(row) or (str(own) if isinstance(own, int | str) and str(own).strip() else None)
        return turns(value, field), group

    return read


def _bridge(row: Row) -> Shaped:
    """The chat ``c_h`` and the tutor's reply ``c_r``, empty lines left out; cuts of one session share its number."""
    said = [turn for field in ("c_h", "c_r") for turn in turns(row[field], field, skip_empty=True)]
    return said, bridge_session(row)


def bridge_session(row: Row) -> str | None:
    """The session of a bridge row: ``c_id`` is ``<session>_<message>``."""
    return row["c_id"].rpartition("_")[0] or row["c_id"] if isinstance(row.get("c_id"), str) else None


def _cima(row: Row) -> Shaped:
    """``past_convo`` alternates, the tutor first. The exercise, which the student has in view, opens as a user turn."""
    value = row["past_convo"]
    if not isinstance(value, list) or not value:
        raise Fault("past_convo", describe(value), "a list of texts", "fill it in or delete the row")
    said = [
        Turn("user" if k % 2 else "assistant", sound_text(words, f"past_convo[{k}]").strip())
        for k, words in enumerate(value)
    ]
    if all(isinstance(row.get(field), str) for field in ("engPrep", "engColor", "engObj")):
        said.insert(0, Turn("user", f'In Italian: "{row["engPrep"]} {row["engColor"]} {row["engObj"]}"'))
    return said, digest("\n".join(turn.text for turn in said[:3]))


def _mathdial(row: Row) -> Shaped:
    """Turns joined by ``|EOM|``, the teacher's tagged with a move (taken off), empty ones left out.

    The question and the student's wrong solution, which the teacher answers, open as a user turn.
    """
    said = []
    for k, piece in enumerate(text(row, "conversation").split("|EOM|")):
        speaker, colon, words = piece.partition(":")
        if not colon:
            raise Fault(f"conversation[{k}]", describe(piece), "Teacher: ... or Student: ...", "name the speaker")
        teacher = speaker.strip() == "Teacher"
        words = _MOVE.sub("", words, count=1) if teacher and _MOVE.match(words) else words
        if words.strip():
            said.append(Turn("assistant" if teacher else "user", sound_text(words, f"conversation[{k}]").strip()))
    asked = [row[field] for field in ("question", "student_incorrect_solution") if isinstance(row.get(field), str)]
    if asked:
        said.insert(0, Turn("user", "\n\n".join(asked)))
    return said, str(row["qid"]) if isinstance(row.get("qid"), int | str) else None


def _turns_field(row: Row) -> Shaped:
    """Our own form: ``{"group" or "id", "turns": [{"role", "text"}]}``."""
    return _messages("turns")(row)


# What the tutoring data sets say about their dialogues.
SHAPES_LEFT = names(
    "e z_what z_why c_r_ c_revision img prep obj color grammarRules engPrep engColor engObj studentActions "
    "tutorResponses tutorActions tutorKeys student_profile teacher_described_confusion self-typical-interactions "
    "ground_truth mood field"
)

SHAPES: Mapping[str, tuple[frozenset[str], Callable[[Row], Shaped]]] = {
    "bridge": (frozenset({"c_h", "c_r"}), _bridge),
    "cima": (frozenset({"past_convo"}), _cima),
    "turns": (frozenset({"turns"}), _turns_field),
    "messages": (frozenset({"messages"}), _messages("messages")),
    "sharegpt": (frozenset({"conversations"}), _messages("conversations")),
    "mathdial": (frozenset({"conversation"}), _mathdial),
}
