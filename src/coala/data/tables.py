"""Tables: csv, tsv and parquet files as records. Knows nothing of what the columns mean."""

from __future__ import annotations

import csv
import io
from typing import Any

from coala.data import records
from coala.data.containers import leaves
from coala.data.findings import Fault, Finding
from coala.data.json_files import decoded
from coala.data.records import RecordsRead, RowRecord, refuse_bomb, require_few_values, unpacked_limit

_BATCH_BYTES = 256 * 2**20  # what a batch of parquet rows may decode to at the worst


def delimited(name: str, raw: bytes, delimiter: str) -> RecordsRead:
    """Records of a csv or tsv file: a header, then rows of as many fields. Cells stay text."""
    if not raw.strip():
        return
    text = decoded(raw)
    require_few_values(raw, records.MAX_VALUES, delimiter.encode() + b"\r\n")
    # The limit is one for the whole process: raised for this read only, which is why the table is read at once.
    limit = csv.field_size_limit(records.MAX_ROW_BYTES)
    rows: list[list[str]] = []
    broken: Finding | None = None
    try:
        for row in csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True):
            rows.append(row)  # noqa: PERF402 - the rows before a broken one are kept
    except csv.Error as error:
        mend = "close the quote that is open there, and double the quotes inside a field"
        if "field larger" in str(error):
            mend = "split that field, or close a quote that is open before it"
        broken = Finding(name, max(len(rows), 1), "", f"broken quoting ({error})", "closed quotes", mend)
    finally:
        csv.field_size_limit(limit)
    if not rows:
        if broken:
            yield broken
        return
    header = _header([column.strip() for column in rows[0]], delimiter)
    number = 0
    for row in rows[1:]:
        if not row:
            continue
        number += 1
        if len(row) != len(header):
            found = f"{len(row)} fields under {len(header)} columns"
            mend = "put fields that hold the separator, quotes or line breaks in double quotes"
            yield Finding(name, number, "", found, "as many fields as columns", mend)
        else:
            yield RowRecord(name, number, {c: v for c, v in zip(header, row, strict=True) if c})
    if broken:
        yield broken


def _header(header: list[str], delimiter: str) -> list[str]:
    if len(header) > records.MAX_COLUMNS:
        raise Fault("", f"{len(header):,} columns", f"at most {records.MAX_COLUMNS:,}", "keep the columns of the pairs")
    seen: set[str] = set()
    for column in header:
        if column in seen:
            raise Fault(column, "two columns of this name", "each column once", "rename or drop one of them")
        seen.update([column] if column else [])
    if len(header) == 1 and delimiter == "," and any(mark in header[0] for mark in ";\t"):
        mend = "save it with commas, or, where tabs separate the columns, name it .tsv"
        raise Fault("", f"one column named {header[0]!r}", "columns separated by commas", mend)
    return header


def parquet(name: str, raw: bytes) -> RecordsRead:
    """Records of a parquet file, decoded a few rows at a time."""
    try:
        from pyarrow import ArrowException, BufferReader
        from pyarrow.parquet import ParquetFile
    except ImportError:
        mend = "pip install 'coala-align[parquet]', or convert it to .jsonl"
        raise Fault("", "a parquet file, but no package pyarrow", "pyarrow", mend) from None
    try:
        file = ParquetFile(BufferReader(raw))
        about = file.metadata
        if about.num_columns > records.MAX_COLUMNS:
            found = f"{about.num_columns:,} columns"
            raise Fault("", found, f"at most {records.MAX_COLUMNS:,}", "keep the columns of the pairs")
        groups = [about.row_group(k).total_byte_size for k in range(about.num_row_groups)]
        if sum(groups) > unpacked_limit(len(raw)):
            raise refuse_bomb(len(raw))
        # No value is larger than its row group, but a dictionary can repeat it in every row.
        size = max(1, min(1024, _BATCH_BYTES // max([*groups, 1])))
        number = unpacked = 0
        for batch in file.iter_batches(batch_size=size):
            for row in batch.to_pylist():
                number += 1
                unpacked += sum(map(len, leaves(row)))
                if unpacked > unpacked_limit(len(raw)):
                    raise refuse_bomb(len(raw))
                yield RowRecord(name, number, _plain(row))
    except (ArrowException, OSError, ValueError, OverflowError, NotImplementedError, RecursionError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        mend = "fetch the file again, or write it again with pyarrow"
        raise Fault("", f"data not readable as parquet ({reason})", "a parquet file", mend) from None


def _plain(value: Any) -> Any:
    """Nested columns as JSON would have them: maps as objects; fields that a struct fills up with nulls stay null."""
    if isinstance(value, dict):
        return {key: _plain(one) for key, one in value.items()}
    if isinstance(value, list):
        if value and all(isinstance(one, tuple) and len(one) == 2 and isinstance(one[0], str) for one in value):
            return {key: _plain(one) for key, one in value}
        return [_plain(one) for one in value]
    return value
