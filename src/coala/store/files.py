"""Bytes on disk: written whole or not at all, stamped with digests, locked against a second process.

Knows nothing of what the bytes mean.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import math
import os
import shutil
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, fields, is_dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from coala.documents import DocumentError, parse_json, tensors_header
from coala.values import CoalaError, Estimate

try:
    import fcntl
except ImportError:  # no such module on Windows, where nothing is locked
    fcntl = None  # type: ignore[assignment]


class StoreError(CoalaError):
    """A file that cannot be read or written as asked."""


class MisfitError(StoreError):
    """A file that can be read, but does not hold what it should."""


# --- bytes and digests -------------------------------------------------------------------------------------------


def write_atomic(path: Path, data: bytes | str) -> None:
    """Write all of ``data`` or nothing: temporary file beside ``path``, fsync, rename, fsync of the folder."""
    path = Path(path)
    raw = data.encode() if isinstance(data, str) else data
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".tmp")
    except OSError as error:
        raise write_error(path, error) from error
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(raw)
            file.flush()
            os.fsync(file.fileno())
        # mkstemp gives 0600; the run folder follows the user's umask like any other file.
        umask = os.umask(0)
        os.umask(umask)
        os.chmod(name, 0o666 & ~umask)
        os.replace(name, path)
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)
    except OSError as error:
        with contextlib.suppress(OSError):
            os.unlink(name)
        raise write_error(path, error) from error
    except BaseException:
        with contextlib.suppress(OSError):
            os.unlink(name)
        raise


def write_error(path: Path, error: OSError) -> StoreError:
    hint = {
        errno.ENOSPC: "The disk is full: free some space and rerun the same command; finished work is saved.",
        errno.EACCES: "You may not write there: choose another folder with --out.",
        errno.EROFS: "That file system is read-only: choose another folder with --out.",
        errno.ENOTDIR: "Part of that path is a file, not a folder: choose another folder with --out.",
        errno.EEXIST: "A file has the name of a required folder: choose another folder with --out.",
    }.get(error.errno or 0, "Fix that and rerun the same command; finished work is saved.")
    return StoreError(f"{path}: could not be written ({error.strerror}). {hint}")


def digest(*parts: Any) -> str:
    """SHA-256 over arrays, bytes, dataclasses and anything JSON can hold; equal values give equal digests."""
    state = hashlib.sha256()
    for part in parts:
        if isinstance(part, np.ndarray):
            raw = np.ascontiguousarray(part)
            state.update(f"array {raw.dtype.str} {raw.shape} ".encode())
            state.update(raw.tobytes())
        elif isinstance(part, bytes):
            state.update(b"bytes ")
            state.update(part)
        else:
            state.update(b"json ")
            state.update(to_json(part).encode("utf-8", "surrogatepass"))
        state.update(b"\0")
    return state.hexdigest()


def file_digest(path: Path) -> str:
    """SHA-256 of a file's bytes, or of a folder's file names and bytes in name order."""
    path = Path(path)
    if path.is_dir():
        names = sorted(p.relative_to(path).as_posix() for p in path.rglob("*") if p.is_file())
        return digest({name: file_digest(path / name) for name in names})
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def plain(value: Any) -> Any:
    """``value`` as JSON holds it: dataclasses, arrays, sets and paths unfolded, numbers that are not finite as null.

    TypeError for what has no such form.
    """
    if isinstance(value, str | bool | int) or value is None:
        return value
    if isinstance(value, float):
        return float(value) if math.isfinite(value) else None
    if isinstance(value, Estimate) and math.isnan(value.value):
        # The ends of an estimate of nothing are what is possible at all, not what was found.
        return {**plain(vars(value)), "low": None, "high": None}
    if is_dataclass(value) and not isinstance(value, type):
        return {item.name: plain(getattr(value, item.name)) for item in fields(value)}
    if isinstance(value, Mapping):
        return {str(key): plain(inner) for key, inner in value.items()}
    if isinstance(value, Sequence | set | frozenset):
        return [plain(inner) for inner in (value if isinstance(value, Sequence) else sorted(value, key=str))]
    return plain(_unfolded(value))


def _unfolded(value: Any) -> Any:
    if is_dataclass(value) and not isinstance(value, type):
        return asdict(value)
    if isinstance(value, np.generic | np.ndarray):
        return value.tolist()
    if isinstance(value, Mapping):
        return dict(value)
    if isinstance(value, Path):
        return str(value)
    raise TypeError(f"{type(value).__name__} has no JSON form")


def to_json(value: Any, **options: Any) -> str:
    return json.dumps(value, default=_unfolded, sort_keys=True, ensure_ascii=False, **options)


def save_json(path: Path, value: Any) -> None:
    """Write a JSON file for people and programs: sorted keys, two-space indent."""
    write_atomic(path, to_json(value, indent=2) + "\n")


def load_json(path: Path) -> Any:
    try:
        return parse_json(Path(path).read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError):
        raise StoreError(f"{path}: found no such file. Fix: check the path of the run folder.") from None
    except OSError as error:
        raise StoreError(f"{path}: cannot be read ({error.strerror}).") from None
    except (UnicodeDecodeError, DocumentError) as error:
        raise StoreError(f"{path}: is {error}. Fix: delete it and rerun its command.") from None


def load_object(path: Path, *fields: str) -> dict[str, Any]:
    """A JSON object with at least these fields."""
    found = load_json(path)
    if not (isinstance(found, dict) and set(fields) <= set(found)):
        told = f" with {', '.join(fields)}" if fields else ""
        raise MisfitError(f"{path}: is not a JSON object{told}. Fix: delete it and rerun its command.")
    return found


@contextlib.contextmanager
def read_as(what: str, path: Path) -> Iterator[None]:
    """Say that a file is not ``what`` where its values do not fit: someone else wrote it, or changed it."""
    try:
        yield
    except CoalaError:
        raise
    except (KeyError, IndexError, TypeError, ValueError, AttributeError) as error:
        raise MisfitError(
            f"{path}: is not {what} ({type(error).__name__}: {error}). Fix: delete it and rerun its command."
        ) from None


def load_arrays(path: Path, *, mmap: bool = False) -> dict[str, NDArray[Any]]:
    """The tensors of a safetensors file; with ``mmap`` they stay on disk, read-only, and are paged in as they are used.

    Raises ``StoreError`` for a file that is anything else, or breaks off.
    """
    from safetensors import SafetensorError
    from safetensors.numpy import load_file

    try:
        header, start = tensors_header(path)
        if not mmap:
            arrays: dict[str, NDArray[Any]] = load_file(path)
            return arrays
        kinds = {"F32": "<f4", "F64": "<f8"}
        if strange := sorted({about["dtype"] for about in header.values()} - set(kinds)):
            raise DocumentError(f"a safetensors file of {', '.join(strange)}; expected F32 or F64")
    except (DocumentError, SafetensorError, KeyError) as error:
        # KeyError: a number format that NumPy does not have.
        raise StoreError(f"{path}: is {error}. Fix: delete it and rerun its command.") from None
    except OSError as error:
        raise StoreError(f"{path}: cannot be read ({error.strerror}).") from None
    return {
        name: np.memmap(path, kinds[about["dtype"]], "r", start + about["data_offsets"][0], tuple(about["shape"]))
        if all(about["shape"])
        else np.empty(about["shape"], kinds[about["dtype"]])  # of nothing there is no map
        for name, about in header.items()
    }


def save_lines(path: Path, values: Iterable[Any]) -> None:
    # surrogatepass is not used: the readers refuse lone surrogates, so that every line is valid UTF-8.
    write_atomic(path, "".join(to_json(value) + "\n" for value in values))


def load_lines(path: Path) -> Iterator[dict[str, Any]]:
    try:
        text = Path(path).read_text(encoding="utf-8")
    except (FileNotFoundError, NotADirectoryError):
        raise StoreError(f"{path}: found no such file. Fix: first run the stage that writes it.") from None
    for number, line in enumerate(text.split("\n"), 1):
        if line:
            try:
                yield parse_json(line)
            except DocumentError as error:
                raise StoreError(f"{path}:{number}: is {error}. Fix: delete the file and rerun.") from None


@contextlib.contextmanager
def working_folder(folder: Path) -> Iterator[Path]:
    """A folder to fill beside ``folder``, which must be free, and to be renamed to it; gone if it is not."""
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise StoreError(f"{folder}: exists and is not empty. Fix: use another --out, or delete it.")
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        work = Path(tempfile.mkdtemp(dir=folder.parent, prefix=f".{folder.name}."))
        work.chmod(0o755)
    except OSError as error:
        raise write_error(folder, error) from error
    try:
        yield work
    finally:
        shutil.rmtree(work, ignore_errors=True)


def discard(path: Path) -> None:
    """Delete a file or folder that nothing needs any more, if it is there."""
    if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


# --- locks -------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def claim(path: Path, place: int = 0, *, wait: bool = False) -> Iterator[bool]:
    """Whether this process holds ``place`` of the lock file ``path``; a place is held by one process at a time.

    With ``wait``, not before that is so. The system frees the places of a process that ends, however it ends. Of two
    claims of one process to one place the second is granted too: this keeps processes apart, not threads.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
    except OSError as error:
        raise write_error(path, error) from error
    try:
        held = True
        if fcntl is not None:
            try:
                fcntl.lockf(handle, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB), 1, place)
            except OSError as error:
                if error.errno not in (errno.EACCES, errno.EAGAIN):
                    raise write_error(path, error) from error
                held = False
        yield held
    finally:
        os.close(handle)
