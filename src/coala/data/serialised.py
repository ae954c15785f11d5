"""Messages that a table or a program wrote as text: JSON, or what Python prints of lists, objects and NumPy arrays.

A value that looks like such messages is read as them or refused: it is never a reply. Knows no format.
"""

from __future__ import annotations

import ast
import json
import re
from collections.abc import Mapping
from typing import Any

from coala.data.containers import is_message
from coala.data.findings import Fault
from coala.data.json_files import parse
from coala.data.records import names
from coala.data.turns import Row

MAX_BYTES = 4 * 2**20  # Python's own parser takes a hundred times the size of its text
_MAX_DEPTH = 50
# The first field's name of the first message, after any brackets.
_LOOKS = re.compile(r"\s*(?:array\(\s*)?[\[(]?\s*\{\s*(['\"])[\w -]{1,30}\1\s*:")
_WHO = re.compile(r"(['\"])(?:role|from)\1\s*:")
_WHAT = re.compile(r"(['\"])(?:content|value)\1\s*:")
_QUOTED = re.compile(r"'(?:\\.|[^'\\])*'|\"(?:\\.|[^\"\\])*\"", re.DOTALL)
_NAMED = names("completions answers history turns")  # columns that are lists by their nature


def opened(row: Row) -> tuple[Row, list[str]]:
    """The row with messages read where a text or columns of nested parquet stand for them, and the names of these.

    Raises :class:`Fault` for a text that begins as messages do and cannot be read.
    """
    changed: dict[str, Any] = {}
    parsed = []
    for field, value in row.items():
        made = value
        if isinstance(value, str) and (_LOOKS.match(value) or (field in _NAMED and value[:1] == "[")):
            made = _read(value, str(field))
            if made is not value:
                parsed.append(str(field))
        if isinstance(made, Mapping):
            made = _transposed(made)
            if is_message(made) and not any(isinstance(one, list | Mapping) for one in _who(made)):
                made = [made]
        if made is not value:
            changed[field] = made
    return ({**row, **changed} if changed else row), parsed


def _who(message: Mapping[Any, Any]) -> list[Any]:
    return [message[key] for key in ("role", "from") if key in message]


def _transposed(value: Mapping[Any, Any]) -> Any:
    """``{role: [...], content: [...]}``, as nested columns are stored, as a list of messages."""
    lists = {key: held for key, held in value.items() if isinstance(held, list)}
    if not is_message(value) or set(lists) != set(value) or len({len(held) for held in lists.values()}) != 1:
        return value
    return [dict(zip(lists, held, strict=True)) for held in zip(*lists.values(), strict=True)]


def _read(said: str, field: str) -> Any:
    """The messages (or, in a column of lists, objects) a text stands for; the text itself if it stands for none."""
    suspect = bool(_WHO.search(said) and _WHAT.search(said))
    if not suspect and field not in _NAMED:
        return said
    value = _parsed(said)
    if value is not None:
        one = value if isinstance(value, list) else [value]
        if one and all(is_message(each) for each in one):
            return one
        if field in _NAMED and isinstance(value, list) and all(isinstance(each, dict | list) for each in value):
            return value
    if suspect and value is None and _LOOKS.match(said):
        found = f"messages written as text, which cannot be read ({said.strip()[:30]}...)"
        mend = "save the data as .jsonl or .parquet, which keep lists (pandas: to_json(orient='records', lines=True))"
        raise Fault(field, found, "a list of messages", mend)
    return said


def _parsed(said: str) -> Any:
    try:
        value, end = parse(said.strip())
        if not said.strip()[end:]:
            return value
    except (json.JSONDecodeError, Fault):
        pass
    return _python(said)


def _python(said: str) -> Any:
    """A Python literal, as ``repr`` writes lists and NumPy writes arrays of objects (without commas)."""
    if len(said) > MAX_BYTES:
        return None
    pieces, place, depth, deepest = [], 0, 0, 0
    for quoted in [*_QUOTED.finditer(said), None]:
        between = said[place : quoted.start() if quoted else len(said)]
        for mark in between:
            depth += (mark in "[{(") - (mark in ")}]")
            deepest = max(deepest, depth)
        between = re.sub(r"\}\s*\{", "}, {", between)
        between = re.sub(r"\barray\(|,\s*dtype=object\)", " ", between)
        pieces.append(between)
        if quoted:
            pieces.append(quoted[0])
            place = quoted.end()
    if deepest > _MAX_DEPTH:
        return None
    try:
        return ast.literal_eval("".join(pieces).strip())
    except (ValueError, SyntaxError, MemoryError, RecursionError, TypeError):
        return None
