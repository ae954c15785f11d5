"""One row of a file, and how much a file may unpack to, hold and nest before it is refused.

The limits bound memory by a small multiple of themselves, whatever a stranger's file claims. Knows no file format.
"""

from __future__ import annotations

import io
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, BinaryIO

from coala.data.findings import Fault, Finding

MAX_ROW_BYTES = 64 * 2**20  # one row; a longer "line" is a file without line breaks
MAX_WHOLE_BYTES = 2**30  # a file that has to be read in one piece: .json, .csv, .tsv, .parquet
MAX_VALUES = 32 * 2**20  # values in such a file; each costs some 60 bytes beside its text
MAX_ROW_VALUES = 2**20
MAX_COLUMNS = 10_000
MAX_BLANK_LINES = 2**20  # beside one for every other line
MAX_RATIO = 200  # real text packs to a tenth, perhaps a fiftieth; a bomb to a thousandth
FREE_BYTES = 256 * 2**20  # what any file may unpack to
_PIECE = 2**20


@dataclass(frozen=True)
class RowRecord:
    """One row as the file has it; ``row`` as in :class:`~coala.data.findings.Finding`."""

    file: str
    row: int
    value: Any


RecordsRead = Iterator[RowRecord | Finding]


def names(listed: str) -> frozenset[str]:
    """The words of a text, for lists of names."""
    return frozenset(listed.split())


def unpacked_limit(size: int) -> int:
    """How many bytes a packed file of ``size`` bytes may unpack to."""
    return max(FREE_BYTES, MAX_RATIO * size)


def refuse_bomb(size: int) -> Fault:
    limit = unpacked_limit(size)
    return Fault(
        "",
        f"a file of {size:,} bytes that unpacks to more than {limit:,}",
        f"at most {MAX_RATIO} times its size",
        "unpack it yourself if you trust it, and give the unpacked file",
    )


class Unpacked(io.RawIOBase):
    """A packed stream that is refused once it has grown past :func:`unpacked_limit` of ``size``."""

    def __init__(self, packed: BinaryIO, size: int) -> None:
        self._packed, self._size, self._seen = packed, size, 0

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        piece = self._packed.read(len(buffer))
        self._seen += len(piece)
        if self._seen > unpacked_limit(self._size):
            raise refuse_bomb(self._size)
        buffer[: len(piece)] = piece
        return len(piece)


def whole(stream: BinaryIO) -> bytes:
    """All bytes of a stream, at most :data:`MAX_WHOLE_BYTES`."""
    pieces, size = [], 0
    while piece := stream.read(_PIECE):
        pieces.append(piece)
        size += len(piece)
        if size > MAX_WHOLE_BYTES:
            found = f"more than {MAX_WHOLE_BYTES >> 20} MiB in a file that must be read in one piece"
            raise Fault("", found, "a smaller file", "write it as .jsonl, which is read line by line, or split it")
    return b"".join(pieces)


def require_few_values(raw: bytes, most: int, separators: bytes) -> None:
    """Refuse bytes that would become more than ``most`` values, counted by what separates them."""
    if len(raw) > most and sum(raw.count(bytes([one])) for one in separators) > most:
        raise Fault("", f"more than {most:,} values", "fewer", "split the file, and remove what is not text")
