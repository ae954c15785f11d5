"""What a long job tells while it runs: how far it is, and lines for whoever watches."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol


class OnProgress(Protocol):
    """Called with a stage, units done, units in all (``None``: unknown) and a note; without a stage, with a line."""

    def __call__(self, stage: str, done: float, total: float | None, note: str = "") -> None: ...


class OnNote(Protocol):
    """Called with a line for whoever watches: what was decided, guessed or left out."""

    def __call__(self, text: str, /) -> None: ...


OnFailure = Callable[[str, Exception], None]  # what failed, and why


def quiet(text: str, /) -> None:
    """Who does not want to hear."""


def silent(stage: str, done: float, total: float | None, note: str = "") -> None:
    """Who does not want to see."""
