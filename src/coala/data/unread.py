"""What a row holds beside what its reader took: named, never dropped in silence.

Columns and fields of messages with words in them make a warning; images, sound and tool calls, which would change what
is learnt, an error; names, numbers and scores one line. Knows the names things go by, and no format.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Mapping, Set
from datetime import date
from functools import lru_cache
from typing import Any

from coala.data.containers import is_message, leaves
from coala.data.findings import Fault, Finding, listed
from coala.data.records import RowRecord, names

Row = Mapping[str, Any]
_MESSAGE_FIELDS = frozenset({"role", "from", "user", "content", "value", "text"})
_REPLY_FIELDS = frozenset({"response", "answer", "rank", "score", "overall_score", "fine-grained_score"})
_MEDIA = names("image images img imgs picture pictures photo photos audio audios video videos pixel pixels")
_ABOUT_MEDIA = names("id ids count num caption captions description alt tokens size width height")
_NOTHING = ("", "[]", "{}", "null", "None")
_PATH_WORDS = 6
_CALLS = ("tool_call", "function_call", "tool_use", "toolcall", "functioncall")
# What a column is about when its name ends (or, before a letter or number, nearly ends) in one of these.
_ABOUT = names(
    "id ids idx index uid uuid qid key row source src origin dataset data subset split config domain topic lesson "
    "category categories subcategory cluster type kind tag tags label labels lang language languages locale model "
    "models annotator annotators judge worker author license licence url urls link time timestamp tstamp date created "
    "updated version hash sha md5 len length tokens count num n seed score scores rating ratings rank reward rewards "
    "margin confidence prob probs logprob logprobs logp weight difficulty quality preference winner turn metadata meta "
    "info name file filename path unnamed status flag level ratio seconds group scenario valid loss"
)
_PLAIN = 12  # words up to which a value under such a name says no more than the name
_MANY, _FEW = 20, 0.1  # rows, and the share of different values, from which short texts are labels
_KEPT = 256


@lru_cache(4096)
def tokens_of(name: str) -> tuple[str, ...]:
    """The words of a column's name: ``chosenRating``, ``chosen-rating`` and ``chosen_rating`` alike."""
    found = re.findall(r"[A-Z]+(?![a-z])|[A-Z]?[a-z]+|\d+", name[:200])
    return tuple(one.lower() for one in found) or (name.lower(),)


def is_empty(value: Any) -> bool:
    """Null, an empty text, or a list or object of nothing but such: what a table writes where there is nothing."""
    if isinstance(value, Mapping):
        return all(is_empty(one) for one in value.values())
    if isinstance(value, list | tuple):
        return all(is_empty(one) for one in value)
    return value is None or (isinstance(value, str) and value.strip() in _NOTHING)


@lru_cache(4096)
def _names_call(name: str) -> bool:
    plain = name.lower().replace("-", "_").replace(" ", "_")
    return any(one in plain for one in _CALLS)


@lru_cache(4096)
def _names_media(name: str) -> bool:
    words = set(tokens_of(name))
    return bool(words & _MEDIA) and not words & _ABOUT_MEDIA


def is_call(name: str, value: Any) -> bool:
    return _names_call(name) and not is_empty(value) and not isinstance(value, bool | int | float)


def is_media(name: str, value: Any) -> bool:
    """Bytes, or a path, an address or an object under a name such as ``images``; a description is none."""
    if isinstance(value, bytes):
        return True
    if isinstance(value, str | int | float | None):
        return _names_media(name) and isinstance(value, str) and 0 < len(value.split()) <= _PATH_WORDS
    if _names_media(name) and not is_empty(value):
        return True
    held = value.values() if isinstance(value, Mapping) else value if isinstance(value, list) else ()
    return any(isinstance(one, bytes) for one in held)


def refuse(name: str, value: Any, place: str) -> None:
    """Raise :class:`Fault` for a field that holds a tool call, an image, sound or film."""
    if is_call(name, value):
        mend = "leave the row out (tool calls are not read), or write the call into the text"
        raise Fault(place, "a tool call", "text", mend)
    if is_media(name, value):
        mend = "leave the row out (only text is read), or drop the field if the text does without"
        raise Fault(place, "an image, sound or film", "text", mend)


def objects_of(field: str, value: Any) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """The objects in a column's value, messages or others, each with its place."""
    if isinstance(value, list):
        for number, one in enumerate(value):
            if isinstance(one, Mapping):
                yield f"{field}[{number}]", one
    elif isinstance(value, Mapping):
        yield field, value


def alike(row: Row) -> Fault:
    """Why two replies of the same text make no pair: the field that alone tells them apart, if there is one."""
    for place, first, second in _facing(row):
        if first != second and not (is_empty(first) and is_empty(second)):
            found = "the only difference between the replies, in a field that is not read"
            mend = "write into the reply's text what should be learnt, or delete the row"
            return Fault(place, found, "replies that differ in their text", mend)
    return Fault("rejected", "the same text as in chosen", "two different replies", "delete the row")


def _facing(row: Row) -> Iterator[tuple[str, Any, Any]]:
    """Fields of the two replies' messages, and columns named after the two sides, that no reader takes."""
    sides = [list(objects_of(side, row.get(side))) for side in ("chosen", "rejected")]
    for (place, first), (_, second) in zip(sides[0][::-1], sides[1][::-1], strict=False):
        for key in dict.fromkeys((*first, *second)):
            if key not in _MESSAGE_FIELDS and _has_words(key, first.get(key), second.get(key)):
                yield f"{place}.{key}", first.get(key), second.get(key)
    for key, value in row.items():
        words = tokens_of(str(key))
        if "chosen" in words and len(words) > 1 and "response" not in words:
            other = next((k for k in row if tokens_of(str(k)) == tuple(map(_other, words))), None)
            if other is not None and _has_words(str(key), value, row[other]):
                yield str(key), value, row[other]


def _has_words(name: str, *values: Any) -> bool:
    return not _is_about(name) and any(one.strip() for one in leaves(values))


def _other(word: str) -> str:
    return "rejected" if word == "chosen" else word


@lru_cache(4096)
def _is_about(name: str) -> bool:
    """Whether a name is one of what stands about the text: identifiers, sources, models, scores, times."""
    words = list(tokens_of(name))
    while len(words) > 1 and (len(words[-1]) == 1 or words[-1].isdecimal()):
        words.pop()
    return words[-1] in _ABOUT or words[0] in ("metadata", "meta", "unnamed")


def _is_plain(name: str, value: Any) -> bool:
    """Whether a value is a name, a number or a date, or no more than its column's name lets expect."""
    if is_empty(value) or isinstance(value, bool | int | float | date):
        return True
    about = _is_about(name)
    if isinstance(value, str):
        said = value.split()
        return len(said) <= _PLAIN if about else len(said) == 1 and len(value) <= 64
    if about and isinstance(value, Mapping):
        return True
    return all(len(one.split()) <= (_PLAIN if about else 3) for one in leaves(value))


def _said(value: Any) -> Iterator[str]:
    """All texts within a value but the names of who speaks."""
    if isinstance(value, Mapping):
        for key, one in value.items():
            if key not in ("role", "from"):
                yield from _said(one)
    elif isinstance(value, list | tuple):
        for one in value:
            yield from _said(one)
    elif isinstance(value, str):
        yield value


class Unread:
    """Counts, over the rows of one source, what nobody reads."""

    def __init__(self, file: str, left: Set[str] = frozenset()) -> None:
        self._file = file
        self._left = left  # columns that a format is known to have and not to need
        self._worded: Counter[str] = Counter()
        self._first: dict[str, RowRecord] = {}
        self._values: dict[str, set[str] | None] = {}
        self._plain: dict[str, None] = {}

    def see(self, record: RowRecord, used: Set[str], read: Set[str]) -> None:
        """Count a row of which the columns ``used`` are read as words, and ``read`` otherwise (as ratings are)."""
        row = record.value
        text: str | None = None
        for field, value in row.items():
            if field in used:
                for _, held in objects_of(field, value):
                    known = _MESSAGE_FIELDS if is_message(held) else _REPLY_FIELDS
                    for key in held:
                        if key not in known:
                            self._count(record, f"{field}[].{key}", str(key), held[key])
            elif field not in read and not is_empty(value):
                if text is None:
                    text = "\n".join(leaves([row[one] for one in used if one in row]))
                said = [one.strip() for one in _said(value) if one.strip()]
                if not said or not all(one in text for one in said) or _is_plain(field, value):
                    self._count(record, field, field, value)

    def _count(self, record: RowRecord, shown: str, name: str, value: Any) -> None:
        if is_empty(value):
            return
        if shown in self._left or _is_plain(name, value):
            self._plain[shown] = None
            return
        self._worded[shown] += 1
        self._first.setdefault(shown, record)
        values = self._values.setdefault(shown, set())
        if values is not None:
            short = isinstance(value, str) and len(value.split()) <= 6
            self._values[shown] = None if not short or len(values) >= _KEPT else values | {value}

    def _is_label(self, name: str) -> bool:
        values = self._values[name]
        return values is not None and self._worded[name] >= _MANY and len(values) <= _FEW * self._worded[name]

    def findings(self) -> Iterator[Finding]:
        """One warning for all that holds words, one note for the rest."""
        worded = [name for name in self._worded if not self._is_label(name)]
        if worded:
            first = self._first[worded[0]]
            counted = listed(f"{name} ({self._worded[name]} row{'s' * (self._worded[name] != 1)})" for name in worded)
            mend = "put what matters into the prompt or the replies, and drop the rest"
            found = f"text that is not read, in {counted}"
            yield Finding(first.file, first.row, "", found, "text in columns that are read", mend, severity="warning")
        plain = [*self._plain, *(name for name in self._worded if name not in worded)]
        if plain:
            yield Finding(self._file, None, "", f"not read: {listed(plain)}", "", "", severity="note")
