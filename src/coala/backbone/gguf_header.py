"""The header of a GGUF file, walked within bounds before any library sees it: they trust its lengths and counts."""

from __future__ import annotations

import math
import mmap
import struct
from collections import Counter
from dataclasses import dataclass
from functools import lru_cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from coala.backbone.checkpoint import AGAIN, kind_of
from coala.backbone.network import BackboneError

# More than any model has; the readers of transformers and gguf make objects of every entry.
MOST_ENTRIES, MOST_IN_ALL, MOST_TENSORS, MOST_KEYS = 1 << 20, 1 << 22, 1 << 16, 1 << 14
# Longer arrays of numbers (scores of a vocabulary) are known by their length alone.
_KEPT = 1 << 12
_NUMBERS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_STRING, _ARRAY = 8, 9
ORIGINAL = "Fix: use the original model (a folder or its hub name) instead of the GGUF file."


@dataclass(frozen=True)
class GGUFTensor:
    """A tensor as the header tells of it: shape in the order of torch; ``first`` counts bytes of the file."""

    name: str
    kind: str
    shape: tuple[int, ...]
    first: int
    last: int


@dataclass(frozen=True)
class Header:
    """What a GGUF file says before its weights. Arrays of strings and long ones of numbers are their length."""

    metadata: dict[str, Any]
    tensors: tuple[GGUFTensor, ...]

    @property
    def architecture(self) -> str:
        return str(self.metadata.get("general.architecture", ""))

    def of(self, key: str) -> Any:
        """A value of the model's own architecture."""
        return self.metadata.get(f"{self.architecture}.{key}")

    @property
    def numbers(self) -> int:
        """Weights in the file."""
        return sum(math.prod(tensor.shape) for tensor in self.tensors)

    @property
    def quantisation(self) -> str:
        """The types of its tensors, that of most weights first."""
        found: Counter[str] = Counter()
        for tensor in self.tensors:
            found[tensor.kind] += math.prod(tensor.shape)
        first, *others = [kind for kind, _ in found.most_common()]
        return f"{first} (with {', '.join(others)})" if others else first


def is_gguf(path: Path) -> bool:
    """Whether a path is that of a GGUF file, by its name or its first bytes."""
    return path.is_file() and (path.suffix.lower() == ".gguf" or kind_of(path) == "GGUF")


def only_gguf(folder: Path) -> Path | None:
    """The GGUF file that a folder without other weights holds; :class:`BackboneError` if there are several."""
    found = sorted(path for path in folder.glob("*") if path.suffix.lower() == ".gguf" and path.is_file())
    if len(found) > 1:
        shown = ", ".join(path.name for path in found[:4]) + (", ..." if len(found) > 4 else "")
        raise BackboneError(
            f"{folder}: holds {len(found)} GGUF files ({shown}); expected one. Fix: name the file, as in {found[0]}."
        )
    return found[0] if found else None


def read_header(path: Path) -> Header:
    """The header of a GGUF file, whose counts, lengths and places were all checked against the file.

    Raises :class:`BackboneError` for a file that is broken or no GGUF, and without the packages that read one.
    """
    missing = [name for name in ("gguf", "accelerate", "transformers.integrations.gguf") if find_spec(name) is None]
    if missing:
        raise BackboneError(
            f"{path}: is GGUF, which needs packages that are not installed, or newer ({', '.join(missing)}). Fix: pip "
            "install 'coala-align[gguf]'"
        )
    return _read_header(path, stamp(path))


def stamp(path: Path) -> tuple[int, ...]:
    """What tells that a path still leads to the same content."""
    about = path.stat()
    return about.st_dev, about.st_ino, about.st_size, about.st_mtime_ns


@lru_cache(maxsize=4)
def _read_header(path: Path, _stamp: tuple[int, ...]) -> Header:
    if kind_of(path) != "GGUF":
        raise _broken(path, f"is {kind_of(path) or 'not a GGUF file, despite its name'}; expected GGUF")
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
        return _Walk(path, content).header()


class _Walk:
    """A walk over the bytes of a header, each step checked to stay in the file."""

    def __init__(self, path: Path, content: mmap.mmap) -> None:
        self.path, self.content, self.at, self.entries = path, content, 4, 0

    def header(self) -> Header:
        version, n_tensors, n_keys = self._numbers("IQQ")
        if version not in (2, 3):
            raise _broken(self.path, f"is GGUF of version {version}; expected 2 or 3, little-endian")
        if n_tensors > MOST_TENSORS or n_keys > MOST_KEYS:
            raise _broken(self.path, f"declares {n_tensors:,} tensors and {n_keys:,} keys; expected fewer")
        metadata: dict[str, Any] = {}
        for _ in range(n_keys):
            key = self._text(1 << 10)
            if key in metadata:
                raise self._damaged(f"{key[:60]!r} stands twice")
            metadata[key] = self._value(self._numbers("I")[0])
        alignment = metadata.get("general.alignment", 32)
        if type(alignment) is not int or not 1 <= alignment <= 1 << 20 or alignment & (alignment - 1):
            raise self._damaged("its alignment is not a power of two")
        entries = [self._tensor() for _ in range(n_tensors)]
        begin = -(-self.at // alignment) * alignment
        tensors = tuple(self._placed(begin, alignment, *entry) for entry in entries)
        end = begin
        for tensor in sorted(tensors, key=lambda t: (t.first, t.last)):
            if tensor.first < end:
                raise self._damaged(f"{tensor.name[:60]!r} overlaps the tensor before it")
            end = tensor.last
        if len({tensor.name for tensor in tensors}) < len(tensors):
            raise self._damaged("two tensors have one name")
        return Header(metadata, tensors)

    def _numbers(self, form: str) -> tuple[Any, ...]:
        return struct.unpack(f"<{form}", self._take(struct.calcsize(f"<{form}")))

    def _take(self, length: int) -> bytes:
        self._skip(length)
        return self.content[self.at - length : self.at]

    def _skip(self, length: int) -> None:
        if length > len(self.content) - self.at:
            raise _broken(self.path, f"is truncated in its header ({len(self.content):,} bytes)")
        self.at += length

    def _text(self, longest: int) -> str:
        (length,) = self._numbers("Q")
        if length > longest:
            raise self._damaged(f"a text has {length:,} bytes")
        try:
            return self._take(length).decode()
        except UnicodeDecodeError:
            raise self._damaged("a text is not UTF-8") from None

    def _value(self, kind: int) -> Any:
        if kind in _NUMBERS:
            return self._numbers(_NUMBERS[kind])[0]
        if kind == _STRING:
            return self._text(1 << 24)
        if kind != _ARRAY:
            raise self._damaged(f"a value is of type {kind}")
        of, count = self._numbers("IQ")
        self.entries += count
        if count > MOST_ENTRIES or self.entries > MOST_IN_ALL:
            raise self._damaged(f"an array has {count:,} entries")
        if of in _NUMBERS:
            if count <= _KEPT:
                return list(self._numbers(f"{count}{_NUMBERS[of]}"))
            self._skip(count * struct.calcsize(f"<{_NUMBERS[of]}"))
        elif of == _STRING:
            for _ in range(count):
                self._skip(self._numbers("Q")[0])
        else:
            raise self._damaged(f"an array is of type {of}")
        return count

    def _tensor(self) -> tuple[str, tuple[int, ...], int, int]:
        name = self._text(1 << 10)
        (rank,) = self._numbers("I")
        if not 1 <= rank <= 4:
            raise self._damaged(f"{name[:60]!r} has {rank} dimensions")
        shape = self._numbers(f"{rank}Q")
        kind, offset = self._numbers("IQ")
        return name, tuple(reversed(shape)), kind, offset

    def _placed(
        self, begin: int, alignment: int, name: str, shape: tuple[int, ...], kind: int, offset: int
    ) -> GGUFTensor:
        from gguf import GGML_QUANT_SIZES, GGMLQuantizationType

        known = {int(member): member for member in GGMLQuantizationType}
        if kind not in known:
            raise BackboneError(
                f"{self.path}: holds {name[:60]!r} in the number type {kind}; expected one that the package gguf "
                f"supports. Fix: update gguf and transformers, or {ORIGINAL.removeprefix('Fix: ')}"
            )
        block, size = GGML_QUANT_SIZES[known[kind]]
        numbers = math.prod(shape)
        if not numbers or shape[-1] % block or offset % alignment:
            raise self._damaged(f"{name[:60]!r} has shape {shape} at {offset:,} in {known[kind].name}")
        last = begin + offset + numbers // block * size
        if last > len(self.content):
            raise _broken(self.path, f"is truncated: {len(self.content):,} bytes, of {last:,} that its header declares")
        return GGUFTensor(name, known[kind].name, shape, begin + offset, last)

    def _damaged(self, what: str) -> BackboneError:
        return _broken(self.path, f"has a damaged header: {what}")


def _broken(path: Path, what: str) -> BackboneError:
    return BackboneError(f"{path}: {what}. {AGAIN}")
