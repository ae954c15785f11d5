"""How far a cell is, from its own process to the one that waits for it: one small file in the cell's folder.

The file is replaced whole and at most once a second; whoever reads it sees the newest state or none.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from time import monotonic

from coala.store import StoreError, load_json, write_atomic
from coala.store.files import to_json

FILE = "progress.json"
EVERY = 1.0  # seconds between two writings

# Called with a stage of the cell, units done, units in all (None: unknown) and a note.
OnStage = Callable[[str, float, float | None, str], None]


class Teller:
    """Writes how far a cell is into its folder."""

    def __init__(self, folder: Path, clock: Callable[[], float] = monotonic) -> None:
        self._path, self._clock = folder / FILE, clock
        self._last: tuple[str, float] | None = None

    def __call__(self, stage: str, done: float, total: float | None, note: str = "") -> None:
        now = self._clock()
        # A new stage is told at once.
        if self._last is not None and self._last[0] == stage and now - self._last[1] < EVERY:
            return
        self._last = stage, now
        write_atomic(self._path, to_json([stage, done, total, note]))


class Listener:
    """Reads it, and passes on what is new."""

    def __init__(self, folder: Path, tell: OnStage) -> None:
        self._path, self._tell = folder / FILE, tell
        self._seen: object = None

    def __call__(self) -> None:
        try:
            found = load_json(self._path)
        except StoreError:
            return
        if found != self._seen and isinstance(found, list) and len(found) == 4:
            self._seen = found
            stage, done, total, note = found
            self._tell(stage, done, total, note)
