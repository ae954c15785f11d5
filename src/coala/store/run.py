"""The run folder: which stage is done, on what, and who is at work in it."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from coala.store.files import StoreError, claim, file_digest, load_object, save_json, to_json

LOCK = ".lock"


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
        wanted = json.loads(to_json(settings))
        if recorded.exists():
            found = load_object(recorded)
            differing = sorted(k for k in {*found, *wanted} if found.get(k) != wanted.get(k))
            if differing:
                sides = "; ".join(f"{k} was {found.get(k)!r}, now {wanted.get(k)!r}" for k in differing)
                raise StoreError(
                    f"{self.path}: was started with other settings ({sides}). "
                    "Give another --out, the old settings, or --restart to delete it and begin anew."
                )
        else:
            if self.path.exists() and (not self.path.is_dir() or any(p.name != LOCK for p in self.path.iterdir())):
                raise StoreError(f"{self.path}: exists and is not a run folder. Give another --out.")
            save_json(recorded, wanted)

    @contextmanager
    def held(self) -> Iterator[None]:
        """While it lasts, no other process may work in this run; StoreError if one does."""
        lock = self.path / LOCK
        with claim(lock) as mine:
            if not mine:
                raise StoreError(
                    f"{self.path}: another process is at work in this run folder. Wait for it, stop it, or give "
                    "another --out."
                )
            try:
                yield
            finally:
                lock.unlink(missing_ok=True)
                # A run that never began leaves no folder behind.
                with suppress(OSError):
                    self.path.rmdir()

    @property
    def settings(self) -> dict[str, Any]:
        return load_object(self.path / "run.json")

    def restart(self) -> None:
        """Delete the run, if this is one; any other folder is refused."""
        if self.path.exists():
            Run.open(self.path)
            shutil.rmtree(self.path)

    def done(self, stage: str, inputs: Mapping[str, Any]) -> bool:
        """Whether ``stage`` finished on these inputs and its outputs are as it left them."""
        about = self.record(stage)
        if about is None:
            return False
        if about["inputs"] != json.loads(to_json(inputs)):
            return False
        return all((self.path / n).exists() and file_digest(self.path / n) == d for n, d in about["outputs"].items())

    def finish(self, stage: str, inputs: Mapping[str, Any], outputs: Sequence[str], facts: Any = None) -> None:
        """Record that ``stage`` made ``outputs`` from ``inputs``; ``facts`` (counts, seconds) go to the report."""
        made = {name: file_digest(self.path / name) for name in outputs}
        save_json(self.path / "stages" / f"{stage}.json", {"inputs": inputs, "outputs": made, "facts": facts})

    def record(self, stage: str) -> dict[str, Any] | None:
        """What :meth:`finish` recorded of a stage; None if it never did."""
        path = self.path / "stages" / f"{stage}.json"
        return load_object(path, "inputs", "outputs", "facts") if path.exists() else None

    def facts(self, stage: str) -> Any:
        return load_object(self.path / "stages" / f"{stage}.json", "facts")["facts"]
