"""A folder's safetensors: which of them are the model's, whether they are whole, and a digest of just what they hold.

Read before any library does, so that what is broken is named for what it is. Knows nothing of models.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeGuard

from coala.backbone.network import BackboneError

WEIGHTS, INDEX, ADAPTER = "model.safetensors", "model.safetensors.index.json", "adapter_model.safetensors"
# The bound of the format's own library; a header is read whole, so a larger one would only fill memory.
LONGEST_HEADER = 100 << 20
# A configuration or an index; tokenizers are larger.
LONGEST_JSON = 64 << 20
AGAIN = "Fix: download it again."
_BITS = {
    **dict.fromkeys(("BOOL", "U8", "I8", "F8_E5M2", "F8_E4M3", "F8_E8M0", "F8_E4M3FNUZ", "F8_E5M2FNUZ"), 8),
    **dict.fromkeys(("I16", "U16", "F16", "BF16"), 16),
    **dict.fromkeys(("I32", "U32", "F32"), 32),
    **dict.fromkeys(("I64", "U64", "F64", "C64"), 64),
    "F4": 4,
    "F6_E2M3": 6,
    "F6_E3M2": 6,
}


@dataclass(frozen=True)
class Stored:
    """A tensor as a file's header tells of it: ``first`` and ``last`` count bytes from the start of the file."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    first: int
    last: int


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file."""
    try:
        size = path.stat().st_size
        if size > LONGEST_JSON:
            raise BackboneError(f"{path}: has {size:,} bytes; expected at most {LONGEST_JSON:,}. {AGAIN}")
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        what = kind_of(path)
        raise BackboneError(
            f"{path}: is {what}, not JSON. {AGAIN}" if what else f"{path}: cannot be read as JSON ({error}). {AGAIN}"
        ) from error
    if not isinstance(content, dict):
        raise BackboneError(f"{path}: holds {type(content).__name__}; expected a JSON object. {AGAIN}")
    return content


def kind_of(path: Path) -> str:
    """What stands where something else was expected, by the first bytes of the file; empty if it is not known."""
    try:
        with path.open("rb") as file:
            begin = file.read(512)
    except OSError:
        return ""
    text = begin.lstrip().lower()
    if not begin:
        return "empty"
    if text.startswith(b"version https://git-lfs"):
        return "a git-lfs pointer (`git lfs pull` in its folder fetches the file)"
    if text.startswith((b"<!doctype", b"<html", b"<?xml", b"<head", b"<error")):
        return "a web page, perhaps an error of the server it came from"
    if begin.startswith(b"GGUF"):
        return "GGUF"
    if begin.startswith(b"PK\x03\x04") or begin[:2] in (b"\x80\x02", b"\x80\x03", b"\x80\x04", b"\x80\x05"):
        return "a pickle, which can run any code when it is loaded"
    if begin.startswith(b"\x1f\x8b"):
        return "gzip"
    return ""


# --- which files -------------------------------------------------------------------------------------------------


def weight_files(folder: Path) -> list[Path]:
    """The files that are loaded as the weights of a folder, and no others; empty if there are none.

    Raises :class:`BackboneError` for an index that names anything but files of its own folder.
    """
    for name in (WEIGHTS, INDEX, ADAPTER):
        if not (folder / name).is_file():
            continue
        return shards(folder / name) if name == INDEX else [folder / name]
    return sorted(folder.glob("*.safetensors"))


def shards(index: Path) -> list[Path]:
    """The files that an index names, whether they are there or not."""
    places = read_json(index).get("weight_map")
    if not isinstance(places, dict) or not places or not all(isinstance(name, str) for name in places.values()):
        found = type(places).__name__ if not isinstance(places, dict) else "names that are not file names"
        raise BackboneError(
            f"{index}: weight_map holds {found if places else 'nothing'}; expected file names by tensor. {AGAIN}"
        )
    files = []
    for name in sorted(set(places.values())):
        if name != Path(name).name or not name.endswith(".safetensors"):
            raise BackboneError(
                f"{index}: names {name!r}; expected a .safetensors file of its own folder. Fix: do not load this "
                "model unless you trust its author."
            )
        shard = index.parent / name
        if shard.is_symlink() and not _own(shard):
            raise BackboneError(
                f"{shard}: is a link out of its folder ({shard.resolve()}); expected a file. Fix: put the file itself "
                "there."
            )
        files.append(shard)
    return files


def _own(link: Path) -> bool:
    """Whether a link stays in its folder, or leads to where the hub's cache keeps the files of its snapshots."""
    folder, target = link.parent.resolve(), link.resolve()
    if target.is_relative_to(folder):
        return True
    return folder.parent.name == "snapshots" and target.parent == folder.parent.parent / "blobs"


# --- what is in them ---------------------------------------------------------------------------------------------


def stored(path: Path) -> list[Stored]:
    """The tensors of a safetensors file, whose header and length were checked."""
    size = path.stat().st_size
    what = kind_of(path)
    if what:
        raise _broken(path, f"is {what}; expected safetensors")
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if size < 8 or length > size - 8:
            raise _broken(path, f"is truncated in its header, or not a safetensors file ({size:,} bytes)")
        if length > LONGEST_HEADER:
            raise _broken(path, f"has a header of {length:,} bytes; expected at most {LONGEST_HEADER:,}")
        try:
            header = json.loads(file.read(length))
        except (ValueError, RecursionError):
            raise _broken(path, "has a damaged header, or is not a safetensors file") from None
    if not isinstance(header, dict):
        raise _broken(path, "has a damaged header, or is not a safetensors file")
    header.pop("__metadata__", None)
    begin = 8 + length
    found = [_tensor(path, name, about, begin) for name, about in header.items()]
    if not found:
        raise _broken(path, "holds no tensors")
    end = begin
    for tensor in sorted(found, key=lambda t: (t.first, t.last)):
        if tensor.first != end:
            raise _broken(path, f"has a damaged header: {tensor.name!r} does not follow the tensor before it")
        end = tensor.last
    if end != size:
        verb = "is truncated" if size < end else "is too long"
        raise _broken(path, f"{verb}: found {size:,} bytes, expected {end:,} as its header declares")
    return found


def _tensor(path: Path, name: str, about: Any, begin: int) -> Stored:
    damaged = _broken(path, f"has a damaged header at {name[:80]!r}")
    if not isinstance(about, Mapping):
        raise damaged
    dtype, shape, offsets = about.get("dtype"), about.get("shape"), about.get("data_offsets")
    if not isinstance(dtype, str) or not _counts(shape) or not _counts(offsets) or len(offsets) != 2:
        raise damaged
    if dtype not in _BITS:
        raise _broken(path, f"holds {name[:80]!r} as {dtype[:20]}, an unknown number type")
    if 8 * (offsets[1] - offsets[0]) != _BITS[dtype] * math.prod(shape):
        raise damaged
    return Stored(name, dtype, tuple(shape), begin + offsets[0], begin + offsets[1])


def _counts(found: Any) -> TypeGuard[list[int]]:
    return isinstance(found, list) and all(isinstance(n, int) and not isinstance(n, bool) and n >= 0 for n in found)


def _broken(path: Path, what: str) -> BackboneError:
    return BackboneError(f"{path.parent}: {path.name} {what}. {AGAIN}")


def weights_digest(folder: Path) -> str:
    """SHA-256 over the names, dtypes, shapes and bytes of a folder's tensors, whatever files they are spread over.

    Of the checkpoint as stored, so that the device and dtype it is run with do not enter.
    """
    with ThreadPoolExecutor() as pool:  # hashing releases the interpreter lock
        tensors = [tensor for found in pool.map(_tensor_digests, weight_files(folder)) for tensor in found]
    return hashlib.sha256("\n".join(sorted(tensors)).encode()).hexdigest()


def _tensor_digests(path: Path) -> list[str]:
    """One line per tensor."""
    lines = []
    tensors = stored(path)
    with path.open("rb") as file:
        for tensor in tensors:
            file.seek(tensor.first)
            digest = hashlib.sha256()
            left = tensor.last - tensor.first
            while left and (block := file.read(min(left, 1 << 22))):
                digest.update(block)
                left -= len(block)
            lines.append(f"{tensor.name} {tensor.dtype} {list(tensor.shape)} {digest.hexdigest()}")
    return lines
