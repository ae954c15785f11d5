"""JSON files as records: lines, lists, objects one after another however they are laid out, and containers.

What a single document holds is for :mod:`coala.data.containers` to say. Trouble with one line hides no other.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from typing import Any, BinaryIO

from coala.data import records
from coala.data.containers import contents
from coala.data.findings import Fault, Finding
from coala.data.records import RecordsRead, RowRecord, require_few_values

GIVE_UP = 100  # unreadable lines at the head of a file after which it is not read as lines at all
_BETWEEN = re.compile(r"[ \t\r\n,]*")
_NUL = Fault("", "NUL bytes", "text", "fetch the file again: it is damaged or no text")


def decoded(raw: bytes) -> str:
    """UTF-8 text, or a :class:`Fault` that names the encoding as far as it can be told."""
    if b"\0" in raw:
        raise _NUL
    try:
        return raw.decode()
    except UnicodeDecodeError as error:
        found = f"the byte 0x{raw[error.start]:02x} at position {error.start + 1}, which is not UTF-8"
        raise Fault("", found, "UTF-8 text", "convert the file, e.g. iconv -f latin1 -t utf-8") from None


def wide(head: bytes) -> str:
    """The name of an encoding of two or four bytes per character, by where the NUL bytes of Latin text lie."""
    for width in (4, 2):
        whole = head[: len(head) // width * width]
        places = [whole[k::width].count(0) * width for k in range(width)]
        if len(whole) >= 2 * width and sum(n == len(whole) for n in places) == width - 1:
            return f"UTF-{8 * width}{'LE' if places[0] != len(whole) else 'BE'}"
    return ""


# --- values ------------------------------------------------------------------------------------------------------


def _object(items: list[tuple[str, Any]]) -> dict[str, Any]:
    value = dict(items)
    if len(value) != len(items):
        seen: set[str] = set()
        twice = next(key for key, _ in items if key in seen or seen.add(key))  # type: ignore[func-returns-value]
        raise Fault(twice, "two fields of this name", "each field once", "keep one of the two")
    if len(value) > records.MAX_COLUMNS:
        raise Fault("", f"{len(value):,} fields", f"at most {records.MAX_COLUMNS:,}", "keep the fields of the pairs")
    return value


_decoder = json.JSONDecoder(object_pairs_hook=_object)


def parse(text: str, start: int = 0) -> tuple[Any, int]:
    """A JSON value and where it ends; :class:`Fault` for what is not one, ``JSONDecodeError`` for the caller."""
    try:
        return _decoder.raw_decode(text, start)
    except json.JSONDecodeError:
        raise
    except RecursionError:
        raise Fault("", "JSON nested too deep", "a flat object of fields", "keep the fields of a pair only") from None
    except ValueError:
        raise Fault("", "an integer of thousands of digits", "ordinary numbers", "correct or delete the row") from None


def values(text: str) -> Iterator[Any]:
    """The JSON values that stand one after another in a text, with white space or commas between them."""
    place = _after(text, 0)
    while place < len(text):
        value, place = parse(text, place)
        yield value
        place = _after(text, place)


def _after(text: str, place: int) -> int:
    found = _BETWEEN.match(text, place)
    return found.end() if found else place


def _breaks_off(error: json.JSONDecodeError, text: str) -> bool:
    return error.pos >= len(text.rstrip()) - 1 or "Unterminated" in error.msg


# --- lines -------------------------------------------------------------------------------------------------------


def lines(name: str, stream: BinaryIO, part: str = "") -> RecordsRead:
    """The rows of a JSON Lines file; of a file that turns out to be one document, what that holds."""
    first: RowRecord | None = None  # a lone line may be a container: held until a second one comes
    sound = False
    number = faults = blank = 0
    while raw := stream.readline(records.MAX_ROW_BYTES + 1):
        number += 1
        if len(raw) > records.MAX_ROW_BYTES:
            while raw and not raw.endswith(b"\n"):
                raw = stream.readline(records.MAX_ROW_BYTES)
            found = f"a line of over {records.MAX_ROW_BYTES >> 20} MiB"
            yield Finding(name, number, "", found, "one pair per line", "break the file into lines")
            continue
        if not raw.strip():
            blank += 1
            if blank > number - blank + records.MAX_BLANK_LINES:
                mend = "check that this is the file you meant, or delete the blank lines"
                yield Finding(name, number, "", f"{blank:,} blank lines", "one pair per line", mend)
                return
            continue
        opens = raw.lstrip().startswith((b"{", b"[")) and raw.rstrip().endswith((b"{", b"[", b","))
        if not sound and not faults and opens and not _is_whole(raw):
            # Objects laid out over several lines.
            yield from document(name, raw + records.whole(stream), part)
            return
        for row, event in _of_line(raw, number):
            number = row
            if isinstance(event, Fault):
                yield event.at(name, row)
                faults += 1
                if not sound and faults == GIVE_UP:
                    mend = "check that this is the file you meant"
                    found = f"nothing readable in the first {GIVE_UP} lines"
                    yield Finding(name, None, "", found, "JSON lines", mend)
                    return
            elif not sound and not faults:
                first, sound = RowRecord(name, row, event), True
            else:
                if first is not None:
                    _require_no_part(part)
                    yield first
                    first = None
                sound = True
                yield RowRecord(name, row, event)
    if first is not None:
        if isinstance(first.value, dict) and not faults:
            for held in contents(name, first.value, part):
                same = isinstance(held, RowRecord) and held.value is first.value
                yield first if same else held
        else:
            _require_no_part(part)
            yield first


def _require_no_part(part: str) -> None:
    if part:
        raise Fault("", f"the part {part!r} of a file of rows", "a file of several lists", f"leave :{part} off")


def _is_whole(raw: bytes) -> bool:
    try:
        parse(raw.decode().lstrip())
    except (UnicodeDecodeError, json.JSONDecodeError):
        return False
    except Fault:
        return True
    return True


def _of_line(raw: bytes, number: int) -> Iterator[tuple[int, Any]]:
    """The values of one line, each with its number, or a :class:`Fault` in place of one."""
    try:
        require_few_values(raw, records.MAX_ROW_VALUES, b",[{:")
        text = decoded(raw)
        try:
            yield number, _alone(text)
            return
        except json.JSONDecodeError as error:
            pieces = text.rstrip("\r\n").split("\r")
            if len(pieces) > 1:  # line ends of another age
                yield from _of_pieces(pieces, number)
                return
            if error.msg == "Extra data":
                try:
                    several = list(values(text))
                except json.JSONDecodeError:
                    several = []
                if several and all(isinstance(one, dict) for one in several):
                    yield from ((number, one) for one in several)
                    return
            if (not raw.endswith(b"\n") and error.pos >= len(text.rstrip()) - 1) or "Unterminated" in error.msg:
                found = "a truncated line"
                raise Fault("", found, "a whole JSON object", "complete or delete the line") from None
            found = f"invalid JSON at column {error.colno} ({error.msg})"
            raise Fault("", found, "one JSON object per line", "correct or delete the line") from None
    except Fault as fault:
        yield number, fault


def _of_pieces(pieces: list[str], number: int) -> Iterator[tuple[int, Any]]:
    for row, piece in enumerate(pieces, number):
        if piece.strip():
            for _, event in _of_line(piece.encode(), row):
                yield row, event


def _alone(text: str) -> Any:
    """The one value of a line."""
    value, end = parse(text, _after(text, 0))
    if rest := text[end:].strip():
        raise json.JSONDecodeError("Extra data", text, text.index(rest, end))
    return value


# --- documents ---------------------------------------------------------------------------------------------------


def document(name: str, raw: bytes, part: str = "") -> RecordsRead:
    """The rows of a file read in one piece: a list, a container, or objects one after another."""
    if not raw.strip():
        return
    require_few_values(raw, records.MAX_VALUES, b",[{:")
    text = decoded(raw)
    found: list[Any] = []
    try:
        found.extend(values(text))
    except json.JSONDecodeError as error:
        if _breaks_off(error, text):
            mend = "fetch or write the file again"
            raise Fault("", "truncated JSON", "a closed list", mend) from None
        where = f"invalid JSON at line {error.lineno} column {error.colno} ({error.msg})"
        raise Fault("", where, "a list of objects", "correct the file there") from None
    if len(found) == 1:
        yield from contents(name, found[0], part)
        return
    _require_no_part(part)
    for number, row in enumerate(found, 1):
        yield RowRecord(name, number, row)


def is_lines(raw: bytes) -> bool:
    """Whether the first line that is not blank is a JSON value of its own and others follow."""
    head, _, rest = raw.lstrip().partition(b"\n")
    return bool(rest.strip()) and head.lstrip().startswith(b"{") and _is_alone(head)


def _is_alone(raw: bytes) -> bool:
    try:
        _alone(raw.decode())
    except (UnicodeDecodeError, json.JSONDecodeError, Fault):
        return False
    return True
