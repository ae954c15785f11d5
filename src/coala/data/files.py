"""Containers: from a file or a hub data set to numbered records, whatever their columns mean.

jsonl, json, csv, tsv and parquet, each plain or gzipped. Trouble never raises: it comes out as a :class:`Finding` in
the stream of records, so that one bad line hides no other.
"""

from __future__ import annotations

import csv
import gzip
import hashlib
import io
import json
import re
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, cast

from coala.data.findings import DataError, Fault, Finding, listed
from coala.data.hub import ask_once

MAX_ROW_BYTES = 64 * 2**20  # one row; a longer "line" is a file without line breaks
GIVE_UP = 100  # unreadable lines at the head of a file after which it is not read as lines at all
LINES = (".jsonl", ".ndjson")
KINDS = (*LINES, ".json", ".csv", ".tsv", ".parquet")
HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]*\w(:\w+)?")
ROWS_KEYS = ("data", "rows", "train", "examples", "instances")
Source = str | Path | Sequence[str | Path]


@dataclass(frozen=True)
class Record:
    """One row as the file has it; ``row`` as in :class:`~coala.data.findings.Finding`."""

    file: str
    row: int
    value: Any


def sources(source: Source) -> list[str]:
    """One or several sources as a list of names."""
    if isinstance(source, str | Path):
        return [str(source)]
    names = [str(one) for one in source]
    if not names:
        raise DataError([Finding("(no file)", None, "", "no file was named", "at least one", "give a file of pairs")])
    return names


def is_hub_name(name: str) -> bool:
    """``owner/dataset`` or ``owner/dataset:split``, when no such file or folder lies here."""
    path = Path(name)
    return bool(HUB_NAME.fullmatch(name)) and _kind(name) is None and not path.exists() and not path.parent.exists()


def source_digest(source: str | Path) -> str:
    """SHA-256 of a file's bytes, or of a hub data set's name. Raises :class:`DataError` when there is no file."""
    name = str(source)
    if is_hub_name(name):
        return hashlib.sha256(f"hub {name}".encode()).hexdigest()
    try:
        with Path(name).open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except (OSError, ValueError) as error:
        raise DataError([_unopened(name, error)]) from None


def records(name: str) -> Iterator[Record | Finding]:
    """The rows of one source, in order. Blank lines are no rows; an empty source yields one error."""
    empty = True
    try:
        for event in _hub(name) if is_hub_name(name) else _file(name):
            empty = False
            yield event
    except EOFError:
        yield _whole(name, "the gzip stream breaks off", "a whole file", "fetch or copy the file again")
    except (gzip.BadGzipFile, zlib.error) as error:
        yield _whole(name, f"the gzip data are damaged ({error})", "a sound file", "fetch or copy the file again")
    except (OSError, ValueError) as error:
        yield _unopened(name, error)
    except Fault as fault:
        yield fault.at(name, None)
    else:
        if empty:
            yield _whole(name, "no rows", "at least one", "was the file written to its end?")


def _whole(name: str, found: str, expected: str, mend: str) -> Finding:
    return Finding(name, None, "", found, expected, mend)


def _unopened(name: str, error: Exception) -> Finding:
    if isinstance(error, FileNotFoundError):
        return _whole(name, "there is no such file", "a file or a hub data set owner/name", "check the path")
    if isinstance(error, IsADirectoryError):
        try:
            inside = sorted(path.name for path in Path(name).iterdir() if _kind(path.name))
        except OSError:
            inside = []
        mend = f"name its files: {listed(inside)}" if inside else "it holds no data file"
        return _whole(name, "this is a folder", "a file", mend)
    reason = getattr(error, "strerror", None) or str(error)
    return _whole(name, f"cannot be read ({reason})", "a readable file", "check the path and its permissions")


def _kind(name: str) -> str | None:
    """The container a name promises: its last suffix, ``.gz`` apart; ``None`` when unknown."""
    suffix = Path(name.lower().removesuffix(".gz")).suffix
    return suffix if suffix in KINDS else None


def _file(name: str) -> Iterator[Record | Finding]:
    with Path(name).open("rb") as raw:
        kind = _kind(name)
        if kind is None:
            ending = "".join(Path(name).suffixes[-2:]) or "none"
            raise Fault(
                "", f"the ending {ending} is not known", f"one of {', '.join(KINDS)}, or these with .gz", "rename"
            )
        zipped = raw.peek(2)[:2] == b"\x1f\x8b"
        if name.lower().endswith(".gz") and not zipped and raw.peek(1):
            raise Fault("", "is not gzip although its name ends in .gz", "gzip data", "take .gz off the name")
        stream = cast(BinaryIO, io.BufferedReader(gzip.GzipFile(fileobj=raw))) if zipped else cast(BinaryIO, raw)
        if kind == ".parquet":
            yield from _parquet(name, stream.read())
            return
        head = cast(io.BufferedReader, stream).peek(4)
        if head[:2] in (b"\xff\xfe", b"\xfe\xff"):
            raise Fault("", "is UTF-16", "UTF-8", "save it as UTF-8")
        if head[:3] == b"\xef\xbb\xbf":
            yield Finding(name, None, "", "begins with a byte-order mark", "none", "it was left out", severity="note")
            stream.read(3)
        if kind in (".csv", ".tsv"):
            yield from _table(name, stream.read(), "\t" if kind == ".tsv" else ",")
        elif kind in LINES and not cast(io.BufferedReader, stream).peek(64).lstrip().startswith(b"["):
            yield from _lines(name, stream)
        else:
            yield from _document(name, stream.read())


# --- JSON --------------------------------------------------------------------------------------------------------


def _object(items: list[tuple[str, Any]]) -> dict[str, Any]:
    value = dict(items)
    if len(value) != len(items):
        keys = [key for key, _ in items]
        twice = next(key for key in keys if keys.count(key) > 1)
        raise Fault(twice, "the field is there twice", "each field once", "keep one of the two")
    return value


_decoder = json.JSONDecoder(object_pairs_hook=_object)


def _parse(text: str) -> Any:
    """A JSON value; raises :class:`Fault` for what is not one, ``JSONDecodeError`` for what the caller can explain."""
    try:
        return _decoder.decode(text)
    except json.JSONDecodeError:
        raise
    except RecursionError:
        raise Fault("", "JSON nested too deep", "a flat object of fields", "keep the fields of a pair only") from None
    except ValueError as error:  # integers of thousands of digits
        raise Fault("", f"not readable as JSON ({error})", "ordinary numbers", "mend or delete the row") from None


def _utf8(raw: bytes) -> str:
    try:
        return raw.decode()
    except UnicodeDecodeError as error:
        where = f"byte 0x{raw[error.start]:02x} at position {error.start + 1} is not UTF-8"
        raise Fault("", where, "UTF-8 text", "convert the file, e.g. iconv -f latin1 -t utf-8") from None


def _lines(name: str, stream: BinaryIO) -> Iterator[Record | Finding]:
    sound = False
    number = faults = 0
    while raw := stream.readline(MAX_ROW_BYTES + 1):
        number += 1
        if len(raw) > MAX_ROW_BYTES:
            while raw and not raw.endswith(b"\n"):
                raw = stream.readline(MAX_ROW_BYTES)
            fault = Fault("", f"a line of over {MAX_ROW_BYTES >> 20} MiB", "one pair per line", "break the lines")
            yield fault.at(name, number)
            continue
        if not raw.strip():
            continue
        try:
            if b"\0" in raw:
                raise Fault("", "NUL bytes", "text", "the file is damaged or not text: fetch it again")
            text = _utf8(raw)
            try:
                value = _parse(text)
            except json.JSONDecodeError as error:
                if (not raw.endswith(b"\n") and error.pos >= len(text.rstrip()) - 1) or "Unterminated" in error.msg:
                    found = "the line breaks off in the middle"
                    raise Fault("", found, "a whole JSON object", "complete or delete the line") from None
                found = f"not JSON at column {error.colno} ({error.msg})"
                raise Fault("", found, "one JSON object per line", "mend or delete the line") from None
        except Fault as fault:
            yield fault.at(name, number)
            faults += 1
            if not sound and faults == GIVE_UP:
                yield _whole(name, f"the first {GIVE_UP} lines are all unreadable", "JSON lines", "is this the file?")
                return
        else:
            sound = True
            yield Record(name, number, value)


def _document(name: str, raw: bytes) -> Iterator[Record | Finding]:
    if b"\0" in raw:
        raise Fault("", "NUL bytes", "text", "the file is damaged or not text: fetch it again")
    if not raw.strip():
        return
    text = _utf8(raw)
    try:
        value = _parse(text)
    except json.JSONDecodeError as error:
        # Many a .json file of the hub holds JSON lines.
        if error.msg == "Extra data":
            yield from _lines(name, io.BytesIO(raw))
            return
        if error.pos >= len(text.rstrip()) - 1 or "Unterminated" in error.msg:
            raise Fault("", "the JSON breaks off before its end", "a closed list", "fetch or write it again") from None
        found = f"not JSON at line {error.lineno} column {error.colno} ({error.msg})"
        raise Fault("", found, "a list of objects", "mend the file there") from None
    if isinstance(value, dict):
        held = [value[key] for key in ROWS_KEYS if isinstance(value.get(key), list)]
        # A lone pair or conversation is a record itself; `{"data": [...]}` is a container.
        value = held[0] if len(held) == 1 and len(value) <= 3 and not {"chosen", "rejected"} & set(value) else [value]
    if not isinstance(value, list):
        raise Fault("", f"a lone JSON {type(value).__name__}", "a list of objects", "write one object per pair")
    for number, row in enumerate(value, 1):
        yield Record(name, number, row)


# --- tables ------------------------------------------------------------------------------------------------------


def _table(name: str, raw: bytes, delimiter: str) -> Iterator[Record | Finding]:
    if not raw.strip():
        return
    text = _utf8(raw)
    # The limit is one for the whole process: raised for this read only, which is why the table is read at once.
    limit = csv.field_size_limit(MAX_ROW_BYTES)
    rows: list[list[str]] = []
    broken: Finding | None = None
    try:
        for row in csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True):
            rows.append(row)  # noqa: PERF402 - the rows before a broken one are kept
    except csv.Error as error:
        broken = Finding(name, max(len(rows), 1), "", str(error), "closed quotes", "mend the quoting there")
    finally:
        csv.field_size_limit(limit)
    if not rows:
        if broken:
            yield broken
        return
    header = [column.strip() for column in rows[0]]
    for column in header:
        if column and header.count(column) > 1:
            raise Fault(column, "the column is there twice", "each column once", "rename or drop one")
    if len(header) == 1 and delimiter == "," and any(mark in header[0] for mark in ";\t"):
        raise Fault(
            "", f"one column named {header[0]!r}", "columns parted by commas", "save with commas, or name it .tsv"
        )
    number = 0
    for row in rows[1:]:
        if not row:
            continue
        number += 1
        if len(row) != len(header):
            found = f"{len(row)} fields under {len(header)} columns"
            yield Finding(name, number, "", found, "as many fields as columns", "mend the quoting of that record")
        else:
            yield Record(name, number, {c: _cell(v) for c, v in zip(header, row, strict=True) if c})
    if broken:
        yield broken


def _cell(value: str) -> Any:
    """A table's cell; a list of messages written as JSON is read as one, any other text stays text."""
    if value.startswith("[{") and value.endswith("}]"):
        try:
            turns = _parse(value)
        except (json.JSONDecodeError, Fault):
            return value
        if all(
            isinstance(turn, dict) and ({"role", "content"} <= set(turn) or {"from", "value"} <= set(turn))
            for turn in turns
        ):
            return turns
    return value


def _parquet(name: str, raw: bytes) -> Iterator[Record | Finding]:
    try:
        from pyarrow import ArrowException, BufferReader
        from pyarrow.parquet import ParquetFile
    except ImportError:
        mend = "pip install 'coala-align[parquet]', or convert it to .jsonl"
        raise Fault("", "a parquet file, but pyarrow is not installed", "pyarrow", mend) from None
    try:
        number = 0
        for batch in ParquetFile(BufferReader(raw)).iter_batches(batch_size=1024):
            for row in batch.to_pylist():
                number += 1
                yield Record(name, number, row)
    except (ArrowException, OSError, ValueError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise Fault("", f"not readable as parquet ({reason})", "a parquet file", "fetch or write it again") from None


# --- the hub -----------------------------------------------------------------------------------------------------


def _hub(name: str) -> Iterator[Record | Finding]:
    try:
        from datasets import load_dataset
    except ImportError:
        found = "there is no such file, and reading it as a hub data set needs the package datasets"
        raise Fault("", found, "a file, or datasets", "check the path, or pip install 'coala-align[hub]'") from None
    dataset, _, part = name.partition(":")
    try:
        ask_once(dataset)
        rows = load_dataset(dataset, split=part or "train", streaming=True)
        for number, row in enumerate(rows, 1):
            yield Record(name, number, row)
    except Exception as error:  # noqa: BLE001 - the hub's client raises errors of a dozen packages
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        mend = "check the name (owner/name or owner/name:split) and the network, or give a downloaded file"
        raise Fault("", f"the hub data set could not be read ({reason})", "a public data set", mend) from None
