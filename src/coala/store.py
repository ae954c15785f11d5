"""The run folder and the file form of every value: safetensors and JSON, written atomically, stamped with digests.

The only module that writes files. It knows the values and nothing of how they are made.

    RUN/run.json                    the settings the run was started with
    RUN/stages/<stage>.json         digest of what each stage read and of what it wrote
    RUN/pairs-train.jsonl, ...      one file or folder per value
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, fields, is_dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np
from numpy.typing import NDArray
from safetensors.numpy import load as load_tensors
from safetensors.numpy import save as save_tensors

from coala.values import (
    Certificate,
    CoalaError,
    ConvexHead,
    FeatureSet,
    FeatureSpec,
    Generation,
    Judgement,
    Pair,
    Turn,
)


class StoreError(CoalaError):
    """A file that cannot be read or written as asked."""


# --- bytes and digests -------------------------------------------------------------------------------------------


def write_atomic(path: Path, data: bytes | str) -> None:
    """Write all of ``data`` or nothing: temporary file beside ``path``, fsync, rename, fsync of the folder."""
    path = Path(path)
    raw = data.encode() if isinstance(data, str) else data
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".tmp")
    except OSError as error:
        raise _write_error(path, error) from error
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
        raise _write_error(path, error) from error
    except BaseException:
        with contextlib.suppress(OSError):
            os.unlink(name)
        raise


def _write_error(path: Path, error: OSError) -> StoreError:
    hint = {
        errno.ENOSPC: "The disk is full: free some space and run the same command again; finished work is kept.",
        errno.EACCES: "You may not write there: choose another folder with --out.",
        errno.EROFS: "That file system is read-only: choose another folder with --out.",
        errno.ENOTDIR: "A part of that path is a file, not a folder: choose another folder with --out.",
        errno.EEXIST: "A file has the name of a folder that is needed: choose another folder with --out.",
    }.get(error.errno or 0, "Run the same command again once that is mended; finished work is kept.")
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
            state.update(_dumps(part).encode("utf-8", "surrogatepass"))
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


def _plain(value: Any) -> Any:
    if is_dataclass(value) and not isinstance(value, type):
        return asdict(value)
    if isinstance(value, np.generic):
        return value.item()
    if isinstance(value, np.ndarray):
        return value.tolist()
    if isinstance(value, Mapping):
        return dict(value)
    if isinstance(value, Path):
        return str(value)
    raise TypeError(f"{type(value).__name__} has no JSON form")


def _dumps(value: Any, **options: Any) -> str:
    return json.dumps(value, default=_plain, sort_keys=True, ensure_ascii=False, **options)


def save_json(path: Path, value: Any) -> None:
    """Write a JSON file for people and programs: sorted keys, two-space indent."""
    write_atomic(path, _dumps(value, indent=2) + "\n")


def load_json(path: Path) -> Any:
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise StoreError(f"{path}: there is no such file. Check the path of the run folder.") from None
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise StoreError(f"{path}: is not JSON ({error}). Delete it and run the command that makes it again.") from None


def _save_lines(path: Path, values: Iterable[Any]) -> None:
    # surrogatepass is not used: the readers refuse lone surrogates, so that every line is valid UTF-8.
    write_atomic(path, "".join(_dumps(value) + "\n" for value in values))


def _load_lines(path: Path) -> Iterator[dict[str, Any]]:
    try:
        text = Path(path).read_text(encoding="utf-8")
    except FileNotFoundError:
        raise StoreError(f"{path}: there is no such file. Run the stage that makes it first.") from None
    for number, line in enumerate(text.split("\n"), 1):
        if line:
            try:
                yield json.loads(line)
            except json.JSONDecodeError as error:
                raise StoreError(f"{path}:{number}: is not JSON ({error}). Delete the file and run again.") from None


# --- values ------------------------------------------------------------------------------------------------------


def save_pairs(path: Path, pairs: Iterable[Pair]) -> None:
    """One JSON object per line, in the conversational preference format that TRL reads, plus ``group``."""

    def row(pair: Pair) -> dict[str, Any]:
        return {
            "prompt": [{"role": turn.role, "content": turn.text} for turn in pair.prompt],
            "chosen": [{"role": "assistant", "content": pair.chosen}],
            "rejected": [{"role": "assistant", "content": pair.rejected}],
            "group": pair.group,
        }

    _save_lines(path, map(row, pairs))


def load_pairs(path: Path) -> list[Pair]:
    """Read back what :func:`save_pairs` wrote; anything else goes through ``coala.data.read_pairs``."""
    return [
        Pair(
            prompt=tuple(Turn(turn["role"], turn["content"]) for turn in row["prompt"]),
            chosen=row["chosen"][0]["content"],
            rejected=row["rejected"][0]["content"],
            group=row["group"],
        )
        for row in _load_lines(path)
    ]


def save_head(folder: Path, head: ConvexHead) -> None:
    """``head.safetensors`` (gates, weights, linear) and ``head.json`` (all else, and the digest of the arrays)."""
    arrays = {"gates": head.gates, "weights": head.weights, "linear": head.linear}
    data = save_tensors(arrays)
    write_atomic(Path(folder) / "head.safetensors", data)
    about = {
        "spec": head.spec,
        "gate_on": head.gate_on,
        "temperature": head.temperature,
        "certificate": head.certificate,
        "sha256": hashlib.sha256(data).hexdigest(),
    }
    save_json(Path(folder) / "head.json", about)


def load_head(folder: Path) -> ConvexHead:
    """Read a head; a folder whose two files do not belong together is refused.

    Heads written before gates could act on prompts have gates on the reply and temperature 1.
    """
    folder = Path(folder)
    about = load_json(folder / "head.json")
    try:
        data = (folder / "head.safetensors").read_bytes()
    except FileNotFoundError:
        raise StoreError(f"{folder}: head.json is there but head.safetensors is missing. Fit the head again.") from None
    if hashlib.sha256(data).hexdigest() != about.get("sha256"):
        raise StoreError(f"{folder}: head.safetensors is not the file head.json describes. Fit the head again.")
    return ConvexHead(
        **load_tensors(data),
        spec=_spec(about["spec"]),
        gate_on=about.get("gate_on", "reply"),
        temperature=about.get("temperature", 1.0),
        certificate=_certificate(about["certificate"]),
    )


def _spec(row: Mapping[str, Any]) -> FeatureSpec:
    names = {f.name for f in fields(FeatureSpec)}
    if set(row) != names:
        raise StoreError(f"A feature spec has the fields {sorted(names)}; found {sorted(row)}. Extract features again.")
    return FeatureSpec(**row)


def _certificate(row: Mapping[str, Any] | None) -> Certificate | None:
    if not row:
        return None
    names = {f.name for f in fields(Certificate)}
    facts = {**row.get("facts", {}), **{name: value for name, value in row.items() if name not in names}}
    # Certificates were plain mappings once: what those did not record stays unknown, what has no field is a fact.
    unknown = {"program": facts.get("method"), "n_patterns": facts.get("n_neurons"), "precision": "unknown"}
    known = {name: row[name] for name in names & set(row)}
    try:
        return Certificate(**{**unknown, "violation": 0.0, "versions": {}, **known, "facts": facts})
    except TypeError as error:
        raise StoreError(f"The certificate of the head is not whole ({error}). Fit the head again.") from None


def save_generations(path: Path, generations: Iterable[Generation]) -> None:
    _save_lines(path, generations)


def load_generations(path: Path) -> list[Generation]:
    return [Generation(**row) for row in _load_lines(path)]


def save_judgements(path: Path, judgements: Iterable[Judgement]) -> None:
    _save_lines(path, judgements)


def load_judgements(path: Path) -> list[Judgement]:
    return [Judgement(**row) for row in _load_lines(path)]


# --- features: shards as they come -------------------------------------------------------------------------------


@dataclass(frozen=True)
class FeatureStore:
    """A folder of feature shards that a killed extraction continues.

    ``plan`` fixes which rows a shard holds; a shard is written once, whole, and never touched again, so what a resumed
    extraction leaves behind is byte for byte what an unbroken one would have left.
    """

    folder: Path

    def begin(self, plan: Mapping[str, Any]) -> set[int]:
        """Open the folder for ``plan`` and return the numbers of the shards already there and sound."""
        recorded = self.folder / "plan.json"
        if recorded.exists():
            found = load_json(recorded)
            wanted = json.loads(_dumps(plan))
            if found != wanted:
                differing = sorted(k for k in {*found, *wanted} if found.get(k) != wanted.get(k))
                sides = "; ".join(f"{k}: {found.get(k)!r} there, {wanted.get(k)!r} now" for k in differing)
                raise StoreError(f"{self.folder}: holds features of another extraction ({sides}). Use a new folder.")
        else:
            save_json(recorded, plan)
        return {number for number in map(self._number, self.folder.glob("shard-*.safetensors")) if self._sound(number)}

    def write(self, shard: int, arrays: Mapping[str, NDArray[Any]]) -> None:
        write_atomic(self._path(shard), save_tensors({k: np.ascontiguousarray(v) for k, v in arrays.items()}))

    def read(self, shard: int) -> dict[str, NDArray[Any]]:
        arrays: dict[str, NDArray[Any]] = load_tensors(self._path(shard).read_bytes())
        return arrays

    def discard(self) -> None:
        """Delete the folder, once the features are saved as one file."""
        shutil.rmtree(self.folder, ignore_errors=True)

    def _sound(self, shard: int) -> bool:
        # Shards are renamed into place whole; this guards against a file damaged or emptied by something else.
        try:
            return bool(self.read(shard))
        except Exception:  # noqa: BLE001 - any unreadable shard is simply made again
            self._path(shard).unlink(missing_ok=True)
            return False

    def _path(self, shard: int) -> Path:
        return self.folder / f"shard-{shard:05d}.safetensors"

    @staticmethod
    def _number(path: Path) -> int:
        return int(path.stem.removeprefix("shard-"))


def save_features(folder: Path, features: FeatureSet) -> None:
    """``features.safetensors`` (the arrays there are) and ``features.json``: what :func:`load_features` reads."""
    arrays = {name: getattr(features, name) for name in ("chosen", "rejected", "prompt", "log_ratio")}
    data = save_tensors({name: array for name, array in arrays.items() if array is not None})
    write_atomic(Path(folder) / "features.safetensors", data)
    save_json(
        Path(folder) / "features.json",
        {"spec": features.spec, "group": features.group, "sha256": hashlib.sha256(data).hexdigest()},
    )


def load_features(folder: Path, *, mmap: bool = False) -> FeatureSet:
    """Read features; with ``mmap`` their arrays stay on disk, read-only, and are paged in as they are used."""
    folder = Path(folder)
    about = load_json(folder / "features.json")
    path = folder / "features.safetensors"
    if not path.exists():
        raise StoreError(f"{folder}: features.json is there but features.safetensors is missing. Extract again.")
    # The digest is of a stream, so that checking the file takes no memory either.
    if file_digest(path) != about["sha256"]:
        raise StoreError(f"{folder}: features.safetensors is not the file features.json describes. Extract again.")
    arrays = _mapped(path) if mmap else load_tensors(path.read_bytes())
    return FeatureSet(**arrays, group=np.asarray(about["group"], dtype=str), spec=_spec(about["spec"]))


def _mapped(path: Path) -> dict[str, NDArray[Any]]:
    """The tensors of a safetensors file where they lie in it: a JSON header behind its length, then the bytes."""
    with path.open("rb") as file:
        size = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(size))
    header.pop("__metadata__", None)
    kinds = {"F32": "<f4", "F64": "<f8"}
    return {
        name: np.memmap(path, kinds[about["dtype"]], "r", 8 + size + about["data_offsets"][0], tuple(about["shape"]))
        if all(about["shape"])
        else np.empty(about["shape"], kinds[about["dtype"]])  # of nothing there is no map
        for name, about in header.items()
    }


# --- the run folder ----------------------------------------------------------------------------------------------


def write_rows(path: Path, blocks: Iterable[NDArray[Any]], n_rows: int) -> None:
    """Write blocks (..., m, d) of rows, ``n_rows`` in all, to one ``.npy`` file without holding more than a block.

    Raises:
        StoreError: if the blocks do not make ``n_rows`` rows; the file is then of no use.
    """
    target: NDArray[Any] | None = None
    done = 0
    for block in blocks:
        if target is None:
            shape = (*block.shape[:-2], n_rows, block.shape[-1])
            target = np.lib.format.open_memmap(path, mode="w+", dtype=block.dtype, shape=shape)
        if done + block.shape[-2] <= n_rows:
            target[..., done : done + block.shape[-2], :] = block
        done += block.shape[-2]
    if target is None or done != n_rows:
        raise StoreError(f"The blocks hold {done} rows; {n_rows} were announced. Give the number that is written.")
    target.flush()  # type: ignore[attr-defined]


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
            raise _write_error(folder / f"scratch file of {size / 2**30:.1f} GiB", error) from error
        return np.memmap(file, dtype=dtype, mode="r+", shape=shape)

    return allocate


class Run:
    """A folder that holds one alignment run; stages are skipped when what they read and wrote is unchanged."""

    def __init__(self, path: Path | str) -> None:
        self.path = Path(path)

    @classmethod
    def open(cls, path: Path | str) -> Run:
        """An existing run, for reading."""
        run = cls(path)
        if not (run.path / "run.json").exists():
            raise StoreError(f"{path}: is not a run folder (it has no run.json). Make one with `coala align`.")
        return run

    def start(self, settings: Mapping[str, Any]) -> None:
        """Begin, or continue with the same settings; other settings are an error that names both sides."""
        recorded = self.path / "run.json"
        wanted = json.loads(_dumps(settings))
        if recorded.exists():
            found = load_json(recorded)
            differing = sorted(k for k in {*found, *wanted} if found.get(k) != wanted.get(k))
            if differing:
                sides = "; ".join(f"{k} was {found.get(k)!r}, now {wanted.get(k)!r}" for k in differing)
                raise StoreError(
                    f"{self.path}: was started with other settings ({sides}). "
                    "Give another --out, the old settings, or --restart to delete it and begin anew."
                )
        else:
            if self.path.exists() and (not self.path.is_dir() or any(self.path.iterdir())):
                raise StoreError(f"{self.path}: exists and is not a run folder. Give another --out.")
            save_json(recorded, wanted)

    @property
    def settings(self) -> dict[str, Any]:
        return cast(dict[str, Any], load_json(self.path / "run.json"))

    def restart(self) -> None:
        """Delete the run, if this is one; any other folder is refused."""
        if self.path.exists():
            Run.open(self.path)
            shutil.rmtree(self.path)

    def done(self, stage: str, inputs: Mapping[str, Any]) -> bool:
        """Whether ``stage`` finished on these inputs and its outputs are as it left them."""
        recorded = self.path / "stages" / f"{stage}.json"
        if not recorded.exists():
            return False
        about = load_json(recorded)
        if about["inputs"] != json.loads(_dumps(inputs)):
            return False
        return all((self.path / n).exists() and file_digest(self.path / n) == d for n, d in about["outputs"].items())

    def finish(self, stage: str, inputs: Mapping[str, Any], outputs: Sequence[str], facts: Any = None) -> None:
        """Record that ``stage`` made ``outputs`` from ``inputs``; ``facts`` (counts, seconds) go to the report."""
        made = {name: file_digest(self.path / name) for name in outputs}
        save_json(self.path / "stages" / f"{stage}.json", {"inputs": inputs, "outputs": made, "facts": facts})

    def facts(self, stage: str) -> Any:
        return load_json(self.path / "stages" / f"{stage}.json")["facts"]
