"""What reading data can find: one remark with its place and its mend, the list of all of them, and the error.

Knows nothing of formats or files; every message of the package is built here.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from coala.values import CoalaError, Pair

SHOWN = 10  # findings spelled out in an error message; the rest are counted

Severity = Literal["error", "warning", "note"]


@dataclass(frozen=True)
class Finding:
    """One remark: ``FILE:ROW: FIELD: found X, expected Y. Fix: Z.``; without ``expected``, ``found`` is a sentence.

    ``row`` counts from 1: the line of a JSON Lines file, the record of any other; ``None`` speaks of the whole file.
    ``count`` is the number of rows the remark holds for, ``row`` being the first of them.
    """

    file: str
    row: int | None
    field: str
    found: str
    expected: str
    mend: str
    severity: Severity = "error"
    count: int = 1

    def __str__(self) -> str:
        place = self.file if self.row is None else f"{self.file}:{self.row}"
        found = f"{self.found} ({self.count} rows in all)" if self.count > 1 else self.found
        said = f"found {found}, expected {self.expected}" if self.expected else found
        if self.mend:
            said = f"{said}. Fix: {self.mend}."
        return printable(": ".join(part for part in (place, self.field, said) if part))


class DataError(CoalaError):
    """Data that cannot be used as they are; ``findings`` says where, why and what to do."""

    def __init__(self, findings: Sequence[Finding], way_on: str = "") -> None:
        self.findings = tuple(findings)
        lines = [str(finding) for finding in self.findings[:SHOWN]]
        if len(self.findings) > SHOWN:
            lines.append(f"... and {len(self.findings) - SHOWN} more; `coala data check` lists them all.")
        super().__init__("\n".join([*lines, way_on] if way_on else lines))


class Fault(Exception):
    """Why a row gives no pair; raised by readers, turned into a :class:`Finding` where file and row are known."""

    def __init__(self, field: str, found: str, expected: str = "", mend: str = "") -> None:
        super().__init__(field, found, expected, mend)
        self.parts = (field, found, expected, mend)

    def at(self, file: str, row: int | None) -> Finding:
        return Finding(file, row, *self.parts)


class NoPreference(Fault):
    """A sound row that prefers nothing (a tie, an only reply): left out and counted, not an error."""

    def at(self, file: str, row: int | None) -> Finding:
        return Finding(file, row, *self.parts, severity="warning")


@dataclass(frozen=True)
class Findings:
    """Everything :func:`coala.data.check` saw. ``pairs`` are the sound ones, in reading order.

    ``counts`` holds plain numbers for reports: rows, pairs, groups, duplicates, conflicts, shares of length rules.
    """

    errors: tuple[Finding, ...]
    warnings: tuple[Finding, ...]
    notes: tuple[Finding, ...]
    pairs: tuple[Pair, ...]
    counts: Mapping[str, int | float] = field(default_factory=dict)

    @property
    def n_pairs(self) -> int:
        return len(self.pairs)

    def raise_for_errors(self) -> None:
        """Raise :class:`DataError` with the errors, if there is one."""
        if self.errors:
            raise DataError(self.errors, self.way_on)

    @property
    def way_on(self) -> str:
        """What to do where some rows are bad and others are sound; empty otherwise."""
        rows = {(one.file, one.row) for one in self.errors if one.row is not None}
        if not rows or not self.pairs:
            return ""
        return (
            f"{len(rows)} bad row{'s' * (len(rows) > 1)}, {self.n_pairs} sound pair{'s' * (self.n_pairs > 1)}. Fix: "
            "correct the bad rows, or skip them with --skip-bad."
        )


def few(findings: Sequence[Finding], most: int = SHOWN) -> list[str]:
    """The findings as lines; of one kind, ``most`` are spelled out and the rest counted."""
    lines: list[str] = []
    seen: Counter[tuple[str, ...]] = Counter()
    for one in findings:
        kind = (one.file, one.field, one.found, one.expected, one.mend)
        seen[kind] += 1
        if seen[kind] <= most:
            lines.append(str(one))
    for (file, where, found, *_), n in seen.items():
        if n > most:
            lines.append(printable(f"{file}: {where}: {found}: {n - most} more rows of this kind"))
    return lines


def printable(text: str) -> str:
    """Text that any UTF-8 terminal or file can take: lone surrogates and control characters are escaped."""
    safe = text.encode("utf-8", "backslashreplace").decode()
    return "".join(c if c.isprintable() or c in "\n\t " else ascii(c)[1:-1] for c in safe)


def describe(value: Any, width: int = 40) -> str:
    """A value in a few words, for `found`: ``null``, ``the number 3``, ``a list of 2``, ``the text "abc..."``."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, int | float):
        if value != value:
            return "NaN"
        try:
            shown = str(value)
        except ValueError:  # Python refuses to spell out integers of thousands of digits
            return "a very long number"
        return f"the number {shown if len(shown) <= width else shown[:width] + '...'}"
    if isinstance(value, str):
        shown = value if len(value) <= width else value[:width] + "..."
        return f"the text {json.dumps(shown, ensure_ascii=False)}"
    if isinstance(value, Mapping):
        return f"an object with {listed(value)}" if value else "an empty object"
    if isinstance(value, list | tuple):
        return f"a list of {len(value)}" if value else "an empty list"
    return f"a value of type {type(value).__name__}"


def listed(names: Any, most: int = 12) -> str:
    """Names joined by commas, shortened: ``a, b, c and 9 more``."""
    shown = [str(name) if len(str(name)) <= 60 else str(name)[:60] + "..." for name in names]
    return ", ".join(shown[:most]) + (f" and {len(shown) - most} more" if len(shown) > most else "")
