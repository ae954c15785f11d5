"""How far a cell is, told now and then."""

from __future__ import annotations

from collections.abc import Callable
from time import monotonic

EVERY = 1.0  # seconds between two tellings

# Called with a stage of the cell, units done, units in all (None: unknown) and a note.
OnStage = Callable[[str, float, float | None, str], None]


class Teller:
    """Tells how far a cell is at most once a second, and of a new stage at once."""

    def __init__(self, tell: OnStage, clock: Callable[[], float] = monotonic) -> None:
        self._tell, self._clock = tell, clock
        self._last: tuple[str, float] | None = None

    def __call__(self, stage: str, done: float, total: float | None, note: str = "") -> None:
        now = self._clock()
        if self._last is not None and self._last[0] == stage and now - self._last[1] < EVERY:
            return
        self._last = stage, now
        self._tell(stage, done, total, note)


def unheard(stage: str, done: float, total: float | None, note: str) -> None:
    pass
