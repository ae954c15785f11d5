"""What happens to every row before its format's reader sees it: opened, checked, and what is not read counted."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Set
from typing import Any

from coala.data.context import beside, in_context
from coala.data.findings import Fault, Finding, describe, listed
from coala.data.formats.ratings import check_ratings, rated_columns, ratings
from coala.data.formats.reader import Reader
from coala.data.records import MAX_COLUMNS, RowRecord
from coala.data.serialised import opened
from coala.data.turns import GROUP_FIELDS, RATER_FIELDS, source_field
from coala.data.unread import Unread, objects_of, refuse
from coala.values import Turn

_ASKED = (Turn("user", "?"),)
_PLACES = {"system": "as the system turn", "history": "as earlier turns", "more": "as part of the prompt"}


class Intake:
    """The rows of one source on their way to a reader. What is wrong with one goes to ``faults`` in its place."""

    def __init__(self, name: str, faults: list[Finding]) -> None:
        self._name, self._faults = name, faults
        self._parsed: Counter[str] = Counter()
        self._placed: Counter[tuple[str, str]] = Counter()
        self._unread: Unread | None = None

    def opened(self, events: Iterable[RowRecord | Finding]) -> Iterator[RowRecord]:
        """The records that are objects, messages written as text read; findings and all others are set aside."""
        for event in events:
            if isinstance(event, Finding):
                self._faults.append(event)
                continue
            try:
                row, parsed = opened(_object(event.value))
            except Fault as fault:
                self._faults.append(fault.at(event.file, event.row))
                continue
            self._parsed.update(parsed)
            yield event if row is event.value else RowRecord(event.file, event.row, row)

    def checked(self, rows: Iterable[RowRecord], reader: Reader) -> Iterator[RowRecord]:
        """The rows without tool calls or images beside what ``reader`` takes; everything else beside it is counted."""
        self._unread = Unread(self._name, reader.left)
        for record in rows:
            row = record.value
            used = reader.columns(row)
            try:
                _refuse(row, used, reader.left)
                places = beside(row, used, reader.around)
                if places:  # what cannot be placed is said here, once
                    in_context(row, _ASKED, used, reader.around)
            except Fault as fault:
                self._faults.append(fault.at(record.file, record.row))
                continue
            self._placed.update((key, part) for key, part in places.items())
            rated = ratings(row)
            self._faults.extend(check_ratings(record, rated))
            names = {*GROUP_FIELDS, *RATER_FIELDS, *filter(None, [source_field(row)]), *rated_columns(row, rated)}
            self._unread.see(record, {*used, *places}, names)
            yield record

    def remarks(self) -> Iterator[Finding]:
        """What was placed, parsed and left unread in the whole source."""
        for (key, part), rows in self._placed.items():
            yield self._note(f"read {key} {_PLACES[part]} ({rows} row{'s' * (rows != 1)})")
        if self._parsed:
            counted = listed(f"{key} ({rows} row{'s' * (rows != 1)})" for key, rows in self._parsed.items())
            yield self._note(f"read messages that were written as text, in {counted}")
        if self._unread is not None:
            yield from self._unread.findings()

    def _note(self, said: str) -> Finding:
        return Finding(self._name, None, "", said, "", "", severity="note")


def _object(value: Any) -> Mapping[str, Any]:
    if not isinstance(value, Mapping):
        raise Fault("", describe(value), "an object with named fields", "write each pair as an object")
    if len(value) > MAX_COLUMNS:
        raise Fault("", f"{len(value):,} fields", f"at most {MAX_COLUMNS:,}", "keep the fields of the pair")
    return value


def _refuse(row: Mapping[str, Any], used: Set[str], left: Set[str]) -> None:
    for field, value in row.items():
        if field not in used:
            if field not in left:
                refuse(str(field), value, str(field))
            continue
        for place, held in objects_of(field, value):
            for key, one in held.items():
                if f"{field}[].{key}" not in left:
                    refuse(str(key), one, f"{place}.{key}")
