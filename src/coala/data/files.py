"""From a file or a hub data set to numbered records, whatever their columns mean.

jsonl, json, csv, tsv and parquet, each plain or gzipped. Trouble never raises: it comes out as a :class:`Finding` in
the stream of records, so that one bad line hides no other.
"""

from __future__ import annotations

import gzip
import hashlib
import io
import re
import zlib
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import BinaryIO, cast

from coala.data import json_files, tables
from coala.data.findings import DataError, Fault, Finding, listed
from coala.data.hub import ask_once
from coala.data.records import MAX_ROW_BYTES, RecordsRead, RowRecord, Unpacked, whole

__all__ = ["MAX_ROW_BYTES", "RowRecord", "Source", "is_hub_name", "parted", "records", "source_digest", "sources"]

LINES = (".jsonl", ".ndjson")
KINDS = (*LINES, ".json", ".csv", ".tsv", ".parquet")
HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]*\w(:\w+)?")
Source = str | Path | Sequence[str | Path]


def sources(source: Source) -> list[str]:
    """One or several sources as a list of names."""
    if isinstance(source, str | Path):
        return [str(source)]
    names = [str(one) for one in source]
    if not names:
        raise DataError([Finding("(no file)", None, "", "no file", "at least one", "name a file of pairs")])
    return names


def is_hub_name(name: str) -> bool:
    """``owner/dataset`` or ``owner/dataset:split``, when no such file or folder lies here."""
    path = Path(name)
    return (
        bool(HUB_NAME.fullmatch(name))
        and _kind(parted(name)[0]) is None
        and not path.exists()
        and not path.parent.exists()
    )


def parted(name: str) -> tuple[str, str]:
    """The file and the part of it that ``FILE.json:PART`` names; the part is empty where there is none."""
    before, _, part = name.rpartition(":")
    if part and _kind(before) and not _kind(name):
        return before, part
    return name, ""


def source_digest(source: str | Path) -> str:
    """SHA-256 of a file's bytes (and the part of it that is named), or of a hub data set's name.

    Raises :class:`DataError` when there is no file.
    """
    name = str(source)
    if is_hub_name(name):
        return hashlib.sha256(f"hub {name}".encode()).hexdigest()
    try:
        with Path(parted(name)[0]).open("rb") as file:
            whole_file = hashlib.file_digest(file, "sha256").hexdigest()
    except (OSError, ValueError) as error:
        raise DataError([_unopened(name, error)]) from None
    part = parted(name)[1]
    return hashlib.sha256(f"{whole_file} {part}".encode()).hexdigest() if part else whole_file


def records(name: str) -> RecordsRead:
    """The rows of one source, in order. Blank lines are no rows; an empty source yields one error."""
    empty = True
    path, part = parted(name)
    try:
        for event in _hub(name) if is_hub_name(name) else _file(path, part):
            empty = empty and isinstance(event, Finding) and event.severity != "error"
            yield replace(event, file=name) if part else event
    except EOFError:
        yield _whole(name, "a truncated gzip stream", "a whole file", "fetch or copy the file again")
    except (gzip.BadGzipFile, zlib.error) as error:
        yield _whole(name, f"damaged gzip data ({error})", "a sound file", "fetch or copy the file again")
    except Fault as fault:
        yield fault.at(name, None)
    except MemoryError:
        yield _whole(name, "more than fits in memory", "a smaller file", "split it, or write it as .jsonl")
    except (OSError, ValueError) as error:
        yield _unopened(name, error)
    else:
        if empty:
            yield _whole(name, "no rows", "at least one", "check that the file was written to its end")


def _whole(name: str, found: str, expected: str, mend: str) -> Finding:
    return Finding(name, None, "", found, expected, mend)


def _unopened(name: str, error: Exception) -> Finding:
    if isinstance(error, FileNotFoundError):
        return _whole(name, "no such file", "a file or a hub data set owner/name", "check the path")
    if isinstance(error, IsADirectoryError):
        try:
            inside = sorted(path.name for path in Path(name).iterdir() if _kind(path.name))
        except OSError:
            inside = []
        mend = f"name its files: {listed(inside)}" if inside else "name a data file; this folder holds none"
        return _whole(name, "a folder", "a file", mend)
    reason = getattr(error, "strerror", None) or str(error)
    return _whole(name, f"an unreadable file ({reason})", "a readable one", "check the path and its permissions")


def _kind(name: str) -> str | None:
    """The container a name promises: its last suffix, ``.gz`` apart; ``None`` when unknown."""
    suffix = Path(name.lower().removesuffix(".gz")).suffix
    return suffix if suffix in KINDS else None


def _file(name: str, part: str) -> RecordsRead:
    with Path(name).open("rb") as raw:
        kind = _kind(name)
        if kind is None:
            ending = "".join(Path(name).suffixes[-2:])
            raise Fault(
                "",
                f"the ending {ending}" if ending else "a name without an ending",
                f"one of {', '.join(KINDS)}, or one of these with .gz",
                "rename the file",
            )
        zipped = raw.peek(2)[:2] == b"\x1f\x8b"
        if name.lower().endswith(".gz") and not zipped and raw.peek(1):
            raise Fault("", "plain data under a name that ends in .gz", "gzip data", "take .gz off the name")
        stream: BinaryIO = raw
        if zipped:
            unpacked = Unpacked(cast(BinaryIO, gzip.GzipFile(fileobj=raw)), Path(name).stat().st_size)
            stream = io.BufferedReader(unpacked, 2**16)
        if part and kind not in (*LINES, ".json"):
            raise Fault("", f"the part {part!r} of a {kind} file", "a .json file of lists", f"leave :{part} off")
        if kind == ".parquet":
            yield from tables.parquet(name, whole(stream))
            return
        head = cast(io.BufferedReader, stream).peek(4)
        if head[:2] in (b"\xff\xfe", b"\xfe\xff"):
            encoding = "UTF-32" if head[:4] == b"\xff\xfe\0\0" else "UTF-16"
            raise Fault("", encoding, "UTF-8", f"save it as UTF-8, e.g. iconv -f {encoding} -t UTF-8")
        if encoding := json_files.wide(cast(io.BufferedReader, stream).peek(256)[:256]):
            raise Fault("", f"{encoding} without a byte-order mark", "UTF-8", f"iconv -f {encoding} -t UTF-8")
        if head[:3] == b"\xef\xbb\xbf":
            yield Finding(name, None, "", "left out the byte-order mark at its beginning", "", "", severity="note")
            stream.read(3)
        if kind in (".csv", ".tsv"):
            yield from tables.delimited(name, whole(stream), "\t" if kind == ".tsv" else ",")
            return
        if kind in LINES and not cast(io.BufferedReader, stream).peek(64).lstrip().startswith(b"["):
            yield from json_files.lines(name, stream, part)
            return
        data = whole(stream)
        # Many a .json file of the hub holds JSON lines.
        if json_files.is_lines(data):
            yield from json_files.lines(name, io.BytesIO(data), part)
        else:
            yield from json_files.document(name, data, part)


# --- the hub -----------------------------------------------------------------------------------------------------


def _hub(name: str) -> RecordsRead:
    try:
        from datasets import load_dataset
    except ImportError:
        found = "no such file, and no package datasets to read it from the hub with"
        raise Fault("", found, "a file, or datasets", "check the path, or pip install 'coala-align[hub]'") from None
    dataset, _, part = name.partition(":")
    try:
        ask_once(dataset)
        rows = load_dataset(dataset, split=part or "train", streaming=True)
        for number, row in enumerate(rows, 1):
            yield RowRecord(name, number, row)
    except Exception as error:  # noqa: BLE001 - the hub's client raises errors of a dozen packages
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        mend = "check the name (owner/name or owner/name:split) and the network, or give a downloaded file"
        raise Fault("", f"a hub data set that could not be read ({reason})", "a public data set", mend) from None
