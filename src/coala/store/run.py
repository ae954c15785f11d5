"""The run folder: which stage is done, on what, and who is at work in it."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from coala.store.files import StoreError, claim, file_digest, load_object, save_json, to_json
from coala.store.replacing import discard_unfinished, settle

LOCK = ".lock"
FORGOTTEN = "forgotten.json"
LIVE = "live"  # folder of the session that a run of `coala live` was clicked in
MOST_SHOWN = 200


class RunFolder:
    """A folder that holds one alignment run; stages are skipped when what they read and wrote is unchanged."""

    def __init__(self, path: Path | str) -> None:
        self.path = Path(path)

    @classmethod
    def open(cls, path: Path | str) -> RunFolder:
        """An existing run, for reading."""
        run = cls(path)
        settle(run.path)
        if not (run.path / "run.json").exists():
            raise StoreError(f"{path}: is not a run folder (it has no run.json). Make one with `coala align`.")
        return run

    def start(self, settings: Mapping[str, Any]) -> None:
        """Begin, or continue with the same settings; other settings are an error that names each that differs."""
        recorded = self.path / "run.json"
        wanted = json.loads(to_json(settings))
        if recorded.exists():
            if differing := differences(load_object(recorded), wanted):
                raise self.refusal(differing)
        else:
            self.require_free()
            save_json(recorded, wanted)

    def refusal(self, differing: Mapping[str, tuple[Any, Any]]) -> StoreError:
        """The error that says that the run cannot go on with settings that differ so."""
        return StoreError(
            f"{self.path}: was started with other settings:\n"
            + "\n".join(f"  {line}" for line in worded(differing))
            + "\nFix: use the old settings, another --out, or --restart to delete the run and start over."
        )

    def require_free(self) -> None:
        """StoreError if the folder is neither a run nor free for one."""
        if (self.path / "run.json").exists():
            return
        if self.path.exists() and not self.path.is_dir():
            raise StoreError(f"{self.path}: found a file, expected a run folder. Fix: give another --out.")
        if self.path.exists() and any(p.name != LOCK for p in self.path.iterdir()):
            raise StoreError(
                f"{self.path}: exists, is not empty and is not a run folder (it has no run.json). Fix: give another "
                "--out."
            )

    def change(self, settings: Mapping[str, Any], stages: Sequence[str], outputs: Sequence[str]) -> None:
        """Go on with other ``settings``, under which what ``stages`` recorded and wrote no longer holds.

        Records go before outputs, and all of them before the settings are written: killed at any moment, the run's
        settings are those of what is in it.
        """
        for stage in stages:
            (self.path / "stages" / f"{stage}.json").unlink(missing_ok=True)
        for name in outputs:
            path = self.path / name
            if path.is_dir():
                shutil.rmtree(path)
            else:
                path.unlink(missing_ok=True)
        save_json(self.path / "run.json", json.loads(to_json(settings)))

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
                settle(self.path)
                discard_unfinished(self.path)
                yield
            finally:
                lock.unlink(missing_ok=True)
                # A run that never began leaves no folder behind.
                with suppress(OSError):
                    self.path.rmdir()

    @property
    def settings(self) -> dict[str, Any]:
        return load_object(self.path / "run.json")

    @property
    def forgotten(self) -> set[str]:
        """Digests of pairs that this run was made to forget, which it does not read again (``pair_digest``)."""
        path = self.path / FORGOTTEN
        return set(load_object(path, "pairs")["pairs"]) if path.exists() else set()

    def restart(self) -> None:
        """Delete the run, if this is one; any other folder is refused."""
        if self.path.exists():
            RunFolder.open(self.path)
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


def differences(found: Any, wanted: Any, name: str = "") -> dict[str, tuple[Any, Any]]:
    """Each setting that differs, by its dotted name: what was found and what is wanted."""
    if isinstance(found, Mapping) and isinstance(wanted, Mapping):
        inside: dict[str, tuple[Any, Any]] = {}
        for key in sorted({*found, *wanted}):
            inside |= differences(found.get(key), wanted.get(key), f"{name}.{key}" if name else key)
        return inside
    return {} if found == wanted else {name: (found, wanted)}


def worded(differing: Mapping[str, tuple[Any, Any]]) -> list[str]:
    """``model.layer: -1 -> 20`` for each."""

    def short(value: Any) -> str:
        text = "none" if value is None else value if isinstance(value, str) else to_json(value)
        return text if len(text) <= MOST_SHOWN else text[: MOST_SHOWN - 3] + "..."

    return [f"{name}: {short(found)} -> {short(wanted)}" for name, (found, wanted) in differing.items()]
