"""Rows of a judgement file, their fields fetched by name and type; files are opened by :mod:`coala.data.files`.

Every fault is a :class:`CoalaError` that names file, row and field. Knows nothing of what the fields mean.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from coala.data.files import records
from coala.data.findings import DataError, Finding, printable
from coala.values import CoalaError


@dataclass(frozen=True)
class FileRow:
    """One row: ``number`` is the line of a JSON Lines file and the record of any other, from 1.

    Fields are asked for by one or several names, the first that is there counts; null and an empty CSV cell are as
    good as absent.
    """

    file: str
    number: int
    fields: Mapping[str, Any]

    def fault(self, field: str, found: str, expected: str, mend: str) -> CoalaError:
        return CoalaError(f"{self.file}:{self.number}: {field}: found {found}, expected {expected}. Fix: {mend}.")

    def name_of(self, *names: str) -> str | None:
        """The first of the names that has a value."""
        return next((name for name in names if self.fields.get(name) is not None), None)

    def get(self, *names: str) -> Any:
        """The raw value under the first of the names that has one; None without any."""
        name = self.name_of(*names)
        return None if name is None else self.fields[name]

    def _asked(self, names: Sequence[str], expected: str) -> tuple[str, Any]:
        name = self.name_of(*names)
        if name is None:
            # The last name is the plainest one: the text itself, where others are derived from it.
            if empty := next((one for one in reversed(names) if one in self.fields), None):
                raise self.fault(empty, "null or an empty cell", expected, "fill it in, or delete the row")
            there = ", ".join(shown(key) for key in list(self.fields)[:12]) or "no field at all"
            mend = "add the field, or check that this is the file you meant"
            raise self.fault(" or ".join(names), f"no such field among {there}", expected, mend)
        return name, self.fields[name]

    def text(self, *names: str) -> str:
        """A text, which may be empty."""
        name, value = self._asked(names, "a text")
        if not isinstance(value, str):
            raise self.fault(name, shown(value), "a text", "correct or delete the row")
        return value

    def label(self, *names: str) -> str:
        """A name or an identifier: a text that is not blank, or a whole number."""
        name, value = self._asked(names, "a name or number")
        if isinstance(value, int) and not isinstance(value, bool) and abs(value) < 2**63:
            return str(value)
        if not isinstance(value, str) or not value.strip():
            raise self.fault(name, shown(value), "a name or number", "correct or delete the row")
        return value

    def value(self, *names: str, low: float = -math.inf, high: float = math.inf) -> float:
        """A finite number in [low, high]."""
        bounds = f" from {low:g} to {high:g}" if math.isfinite(low) and math.isfinite(high) else ""
        bounds = bounds or (f" of at least {low:g}" if math.isfinite(low) else "")
        expected = f"a number{bounds}"
        name, value = self._asked(names, expected)
        number = as_number(value)
        if number is None or not low <= number <= high:
            raise self.fault(name, shown(value), expected, "correct or delete the row")
        return number

    def flag(self, *names: str) -> bool:
        """true or false, also as a CSV cell."""
        name, value = self._asked(names, "true or false")
        if isinstance(value, str) and value.lower() in ("true", "false"):
            return value.lower() == "true"
        if not isinstance(value, bool):
            raise self.fault(name, shown(value), "true or false", "correct or delete the row")
        return value


def read_rows(path: Path | str) -> list[FileRow]:
    """All rows of a file: jsonl, json, csv, tsv or parquet, plain or gzipped. CoalaError at the first bad one."""
    name = str(path)
    # A name without an ending would be looked for on the hub, where there are no judgements.
    if not Path(name).exists():
        raise CoalaError(f"{shown_path(name)}: found no such file, expected a file of rows. Fix: check the path.")
    rows = []
    for found in records(name):
        if isinstance(found, Finding):
            if found.severity != "note":  # a part that is left out is no small matter here
                raise DataError([found])
        elif not isinstance(found.value, dict):
            expected = "expected an object of fields. Fix: correct or delete it."
            raise CoalaError(f"{shown_path(name)}:{found.row}: found {shown(found.value)}, {expected}")
        else:
            # An empty cell of a table is no value; an empty text of JSON is one.
            table = name.lower().removesuffix(".gz").endswith((".csv", ".tsv"))
            rows.append(FileRow(shown_path(name), found.row, _cells(found.value) if table else found.value))
    return rows


def _cells(row: Mapping[str, Any]) -> dict[str, Any]:
    return {column: None if cell == "" else cell for column, cell in row.items()}


def as_number(value: Any) -> float | None:
    """A finite number from a JSON number or the text of one; None for anything else, true and false included."""
    if isinstance(value, bool) or not isinstance(value, int | float | str):
        return None
    try:
        number = float(value)
    except (ValueError, OverflowError):
        return None
    return number if math.isfinite(number) else None


def shown(value: Any, width: int = 60) -> str:
    """A value in ASCII and short enough for one line of an error message."""
    if isinstance(value, Mapping | list):
        return f"{'an object' if isinstance(value, Mapping) else 'a list'} of {len(value)}"
    if isinstance(value, int) and abs(value) >= 10**width:
        return "a very long number"
    said = ascii(value)
    return said if len(said) <= width else f"{said[:width]}..."


def shown_path(path: Path | str) -> str:
    """A path as an error message can hold it."""
    return printable(str(path)).encode("ascii", "backslashreplace").decode()
