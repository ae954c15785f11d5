"""Features on disk: shards while they are extracted, one file when they are done, rows mapped from files when large."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors.numpy import load as load_tensors
from safetensors.numpy import save as save_tensors

from coala.store.files import (
    StoreError,
    claim,
    digest,
    file_digest,
    load_arrays,
    load_object,
    read_as,
    save_json,
    to_json,
    write_atomic,
    write_error,
)
from coala.store.values import read_spec
from coala.values import FeatureSet

Arrays = dict[str, NDArray[Any]]


@dataclass(frozen=True)
class FeatureStore:
    """A folder of feature shards that a killed extraction resumes, and that several processes may fill together.

    ``plan`` fixes which rows a shard holds; a shard is written once, whole, and never touched again, so what a resumed
    or shared extraction leaves behind is byte for byte what an unbroken one would have left. On a slow machine a shard
    takes long: until it is whole, its passes are kept in pieces, wherever those were cut. A shard or piece carries the
    digest of its arrays; one that is not what was written is deleted, told, and made again.
    """

    folder: Path

    def begin(self, plan: Mapping[str, Any], on_note: Callable[[str], None] | None = None) -> set[int]:
        """Open the folder for ``plan`` and return the numbers of the shards already there and sound."""
        recorded = self.folder / "plan.json"
        with self.claim(PLAN, wait=True):
            if not recorded.exists():
                save_json(recorded, plan)
        found, wanted = load_object(recorded), json.loads(to_json(plan))
        if found != wanted:
            differing = sorted(k for k in {*found, *wanted} if found.get(k) != wanted.get(k))
            sides = "; ".join(f"{k}: {found.get(k)!r} there, {wanted.get(k)!r} now" for k in differing)
            raise StoreError(f"{self.folder}: holds features of another extraction ({sides}). Use a new folder.")
        numbers = sorted(int(p.stem.removeprefix("shard-")) for p in self.folder.glob("shard-*.safetensors"))
        return {number for number in numbers if self._sound(number, on_note)}

    def claim(self, shard: int, *, wait: bool = False) -> AbstractContextManager[bool]:
        """Whether this process may make ``shard`` now: no other is at it."""
        return claim(self.folder / "claims.lock", shard, wait=wait)

    def has(self, shard: int) -> bool:
        """Whether somebody wrote it; shards are renamed into place whole."""
        return self._path(shard).exists()

    def write(self, shard: int, arrays: Mapping[str, NDArray[Any]]) -> None:
        """Keep a whole shard; its pieces go."""
        self._write(self._path(shard), arrays)
        for path in self._pieces(shard).values():
            path.unlink(missing_ok=True)

    def write_piece(self, shard: int, span: tuple[int, int], arrays: Mapping[str, NDArray[Any]]) -> None:
        """Keep what is made so far of a shard: its passes from ``span[0]`` on, before ``span[1]``."""
        self._write(self.folder / f"piece-{shard:05d}-{span[0]:05d}-{span[1]:05d}.safetensors", arrays)

    def pieces(self, shard: int, on_note: Callable[[str], None] | None = None) -> list[tuple[int, Arrays]]:
        """The sound pieces of a shard that follow one another from its first pass on, each with where it ends.

        Whoever asks has claimed the shard. Others are of no use and deleted.
        """
        found: list[tuple[int, Arrays]] = []
        done = 0
        for (first, stop), path in sorted(self._pieces(shard).items()):
            try:
                if first != done or stop <= first:
                    raise StoreError(f"{path}: does not follow on what is there. Run again: it will be rebuilt.")
                found.append((stop, self._read(path)))
                done = stop
            except StoreError as error:
                path.unlink(missing_ok=True)
                if on_note is not None:
                    on_note(str(error).replace("Run again: it", "It"))
        return found

    def done_in_pieces(self, shard: int) -> int:
        """How many passes of a shard are in pieces, as their names say."""
        done = 0
        for first, stop in sorted(self._pieces(shard)):
            done = stop if first == done else done
        return done

    def _write(self, path: Path, arrays: Mapping[str, NDArray[Any]]) -> None:
        whole = {name: np.ascontiguousarray(array) for name, array in arrays.items()}
        write_atomic(path, save_tensors(whole, metadata={"digest": _digest_of(whole)}))

    def read(self, shard: int) -> Arrays:
        """The arrays of a shard; StoreError if they are not those that were written."""
        return self._read(self._path(shard))

    def _read(self, path: Path) -> Arrays:
        try:
            raw = path.read_bytes()
            arrays: Arrays = load_tensors(raw)
            recorded = _header(raw).get("__metadata__", {}).get("digest")
        except Exception as error:
            raise StoreError(f"{path}: cannot be read ({error}). Run again: it will be rebuilt.") from error
        if recorded != _digest_of(arrays):
            raise StoreError(f"{path}: its bytes are not those that were written. Run again: it will be rebuilt.")
        return arrays

    def discard(self) -> None:
        """Delete the folder, once the features are saved as one file."""
        shutil.rmtree(self.folder, ignore_errors=True)

    def _sound(self, shard: int, on_note: Callable[[str], None] | None) -> bool:
        try:
            self.read(shard)
        except StoreError as error:
            with self.claim(shard) as mine:
                if mine:
                    self._path(shard).unlink(missing_ok=True)
            if on_note is not None:
                on_note(str(error).replace("Run again: it", "It"))
            return False
        return True

    def _path(self, shard: int) -> Path:
        return self.folder / f"shard-{shard:05d}.safetensors"

    def _pieces(self, shard: int) -> dict[tuple[int, int], Path]:
        found = {}
        for path in self.folder.glob(f"piece-{shard:05d}-*.safetensors"):
            ends = path.stem.split("-")[2:]
            if len(ends) == 2 and all(end.isdecimal() for end in ends):
                found[int(ends[0]), int(ends[1])] = path
        return found


# The place of the lock file that belongs to no shard.
PLAN = 1 << 40


def _digest_of(arrays: Mapping[str, NDArray[Any]]) -> str:
    return digest(*(part for name in sorted(arrays) for part in (name, arrays[name])))


def _header(raw: bytes) -> dict[str, Any]:
    """A safetensors file begins with the length of a JSON header."""
    header: dict[str, Any] = json.loads(raw[8 : 8 + int.from_bytes(raw[:8], "little")])
    return header


def save_features(folder: Path, features: FeatureSet) -> None:
    """``features.safetensors`` (the arrays there are) and ``features.json``: what :func:`load_features` reads."""
    arrays = {name: getattr(features, name) for name in ("chosen", "rejected", "prompt", "log_ratio")}
    data = save_tensors({name: array for name, array in arrays.items() if array is not None})
    write_atomic(Path(folder) / "features.safetensors", data)
    save_json(
        Path(folder) / "features.json",
        {"spec": features.spec, "group": features.group, "sha256": hashlib.sha256(data).hexdigest()},
    )


def link_features(source: Path, folder: Path) -> None:
    """Put the features saved in ``source`` into ``folder`` too, sharing their bytes where the file system can."""
    folder.mkdir(parents=True, exist_ok=True)
    # The description last: features.json is what says that the features are there.
    for name in ("features.safetensors", "features.json"):
        target = folder / name
        target.unlink(missing_ok=True)
        try:
            os.link(source / name, target)
        except OSError:
            write_atomic(target, (source / name).read_bytes())


def load_features(folder: Path, *, mmap: bool = False) -> FeatureSet:
    """Read features; with ``mmap`` their arrays stay on disk, read-only, and are paged in as they are used."""
    folder = Path(folder)
    about = load_object(folder / "features.json", "sha256", "group", "spec")
    path = folder / "features.safetensors"
    if not path.exists():
        raise StoreError(f"{folder}: features.json is there but features.safetensors is missing. Extract again.")
    # The digest is of a stream, so that checking the file takes no memory either.
    if file_digest(path) != about["sha256"]:
        raise StoreError(f"{folder}: features.safetensors is not the file features.json describes. Extract again.")
    with read_as("features", path):
        return FeatureSet(
            **load_arrays(path, mmap=mmap),
            group=np.asarray(about["group"], dtype=str),
            spec=read_spec(about["spec"]),
        )


def write_rows(path: Path, blocks: Iterable[NDArray[Any]], n_rows: int) -> None:
    """Write blocks (..., m, d) of rows, ``n_rows`` in all, to one ``.npy`` file without holding more than a block.

    Raises:
        StoreError: if the blocks do not make ``n_rows`` rows, and on a full disk; the file is then of no use.
    """
    target: NDArray[Any] | None = None
    done = 0
    for block in blocks:
        if target is None:
            shape = (*block.shape[:-2], n_rows, block.shape[-1])
            target = _mapped(path, shape, block.dtype)
        if done + block.shape[-2] <= n_rows:
            target[..., done : done + block.shape[-2], :] = block
        done += block.shape[-2]
    if target is None or done != n_rows:
        raise StoreError(f"The blocks hold {done} rows; {n_rows} were announced. Give the number that is written.")
    target.flush()  # type: ignore[attr-defined]


def _mapped(path: Path, shape: tuple[int, ...], dtype: np.dtype[Any]) -> NDArray[Any]:
    """A new ``.npy`` file, mapped, its room taken: on a full disk an error here, and no bus error at a later write."""
    try:
        made: NDArray[Any] = np.lib.format.open_memmap(path, mode="w+", dtype=dtype, shape=shape)
        with path.open("r+b") as file:
            os.posix_fallocate(file.fileno(), 0, max(1, os.fstat(file.fileno()).st_size))
    except OSError as error:
        raise write_error(path, error) from error
    return made


def scratch(folder: Path) -> Callable[[tuple[int, ...], type[Any]], NDArray[Any]]:
    """A function that gives writable arrays mapped from files in ``folder``; they vanish when no longer used.

    The system writes their pages out when memory is short. The files have no name, so that a kill leaves nothing.
    """

    def allocate(shape: tuple[int, ...], dtype: type[Any]) -> NDArray[Any]:
        size = int(np.prod(shape)) * np.dtype(dtype).itemsize
        folder.mkdir(parents=True, exist_ok=True)
        try:
            file = tempfile.TemporaryFile(dir=folder)  # noqa: SIM115  the map keeps the file
            # Taken now, a full disk is an error here; found later, it would be a bus error in the middle of a solve.
            os.posix_fallocate(file.fileno(), 0, max(1, size))
        except OSError as error:
            raise write_error(folder / f"scratch file of {size / 2**30:.1f} GiB", error) from error
        return np.memmap(file, dtype=dtype, mode="r+", shape=shape)

    return allocate
