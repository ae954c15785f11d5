"""Rows of a judgement file: JSON Lines, one JSON list, or CSV, each plain or gzipped; fields fetched by name and type.

Every fault is a :class:`CoalaError` that names file, row and field. Knows nothing of what the fields mean.
"""

from __future__ import annotations

import csv
import gzip
import io
import json
import math
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from coala.values import CoalaError


@dataclass(frozen=True)
class Row:
    """One row: ``number`` is the line of a JSON Lines file and the record of any other, from 1.

    Fields are asked for by one or several names, the first that is there counts; null and an empty CSV cell are as
    good as absent.
    """

    file: str
    number: int
    fields: Mapping[str, Any]

    def fault(self, field: str, found: str, expected: str, mend: str) -> CoalaError:
        return CoalaError(f"{self.file}:{self.number}: {field}: found {found}; expected {expected}. {mend}")

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
            there = ", ".join(shown(key) for key in list(self.fields)[:12]) or "no field at all"
            mend = "Add the field, or check that this is the file that was meant."
            raise self.fault(" or ".join(names), f"no such field among {there}", expected, mend)
        return name, self.fields[name]

    def text(self, *names: str) -> str:
        """A text, which may be empty."""
        name, value = self._asked(names, "a text")
        if not isinstance(value, str):
            raise self.fault(name, shown(value), "a text", "Mend or delete the row.")
        return value

    def label(self, *names: str) -> str:
        """A name or an identifier: a text that is not blank, or a whole number."""
        name, value = self._asked(names, "a name or number")
        if isinstance(value, int) and not isinstance(value, bool) and abs(value) < 2**63:
            return str(value)
        if not isinstance(value, str) or not value.strip():
            raise self.fault(name, shown(value), "a name or number", "Mend or delete the row.")
        return value

    def value(self, *names: str, low: float = -math.inf, high: float = math.inf) -> float:
        """A finite number in [low, high]."""
        bounds = f" from {low:g} to {high:g}" if math.isfinite(low) and math.isfinite(high) else ""
        bounds = bounds or (f" of at least {low:g}" if math.isfinite(low) else "")
        expected = f"a number{bounds}"
        name, value = self._asked(names, expected)
        number = as_number(value)
        if number is None or not low <= number <= high:
            raise self.fault(name, shown(value), expected, "Mend or delete the row.")
        return number

    def flag(self, *names: str) -> bool:
        """true or false, also as a CSV cell."""
        name, value = self._asked(names, "true or false")
        if isinstance(value, str) and value.lower() in ("true", "false"):
            return value.lower() == "true"
        if not isinstance(value, bool):
            raise self.fault(name, shown(value), "true or false", "Mend or delete the row.")
        return value


def read_rows(path: Path | str) -> list[Row]:
    """All rows of a file; its form is known by its content and, for CSV, its name. CoalaError for anything else."""
    name = shown_path(path)
    text = _text(path, name)
    stem = str(path).lower().removesuffix(".gz")
    if stem.endswith((".csv", ".tsv")):
        rows = _table(name, text, "\t" if stem.endswith(".tsv") else ",")
    elif text.lstrip().startswith("["):
        rows = _list(name, text)
    else:
        rows = _lines(name, text)
    if not rows:
        raise CoalaError(f"{name}: found no row; expected one per judgement. Is this the file that was meant?")
    return rows


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
    return str(path).encode("ascii", "backslashreplace").decode()


def _text(path: Path | str, name: str) -> str:
    try:
        raw = Path(path).read_bytes()
    except FileNotFoundError:
        raise CoalaError(f"{name}: there is no such file. Check the path.") from None
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        raise CoalaError(f"{name}: could not be read ({reason}). Check the path.") from None
    if raw[:2] == b"\x1f\x8b":
        try:
            raw = gzip.decompress(raw)
        except (EOFError, OSError, zlib.error) as error:
            raise CoalaError(f"{name}: the gzip data are damaged ({error}). Fetch or copy the file again.") from None
    try:
        return raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise CoalaError(
            f"{name}: byte 0x{raw[error.start]:02x} at position {error.start + 1} is not UTF-8. Save it as UTF-8."
        ) from None


def _parsed(name: str, number: int | None, text: str) -> Any:
    place = name if number is None else f"{name}:{number}"
    try:
        return json.loads(text)
    except RecursionError:
        raise CoalaError(f"{place}: found JSON nested too deep; expected an object of fields. Mend the row.") from None
    except ValueError as error:
        reason = ascii(str(error))[1:-1]
        raise CoalaError(
            f"{place}: found no JSON ({reason}); expected one object per row. Mend or delete it."
        ) from None


def _row(name: str, number: int, value: Any) -> Row:
    if not isinstance(value, dict):
        raise CoalaError(f"{name}:{number}: found {shown(value)}; expected an object of fields. Mend or delete it.")
    return Row(name, number, value)


def _lines(name: str, text: str) -> list[Row]:
    # Not `splitlines`: JSON texts may hold U+2028 and its like unescaped.
    lines = enumerate(text.split("\n"), 1)
    return [_row(name, number, _parsed(name, number, line)) for number, line in lines if line.strip()]


def _list(name: str, text: str) -> list[Row]:
    return [_row(name, number, value) for number, value in enumerate(_parsed(name, None, text), 1)]


def _table(name: str, text: str, delimiter: str) -> list[Row]:
    try:
        records = [record for record in csv.reader(io.StringIO(text, newline=""), delimiter=delimiter) if record]
    except csv.Error as error:
        raise CoalaError(
            f"{name}: found no table ({error}); expected columns under a header. Mend the quoting."
        ) from None
    if not records:
        return []
    header = [column.strip() for column in records[0]]
    if len(set(header)) < len(header):
        raise CoalaError(f"{name}: found a column twice in {shown(','.join(header))}; expected each once. Rename one.")
    rows = []
    for number, record in enumerate(records[1:], 1):
        if len(record) != len(header):
            raise CoalaError(
                f"{name}:{number}: found {len(record)} fields under {len(header)} columns; expected as many. "
                "Mend the quoting of that record."
            )
        cells = {column: cell for column, cell in zip(header, record, strict=True) if cell != ""}
        rows.append(Row(name, number, cells))
    return rows
