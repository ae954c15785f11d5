"""Work and the news of it: what is handed to a thread, who hears of it, and one piece of a chore done.

Knows nothing of threads or HTTP.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from coala.values import CoalaError

if TYPE_CHECKING:
    from coala.decoding import Engine, Job

log = logging.getLogger("coala.serve")


@dataclass(frozen=True)
class Began:
    """The engine has taken the work: it is sound, and will be done unless it is cancelled."""


@dataclass(frozen=True)
class Piece:
    """Text that a reply has grown by; ``tokens``, where asked for, are all of the reply's so far."""

    text: str
    tokens: tuple[Sequence[int], Sequence[float], Sequence[Sequence[tuple[int, float]]]] | None = None


@dataclass(frozen=True)
class Ended:
    """A reply's job or what a chore returned; ``None`` for work that was cancelled before it began."""

    result: Any


@dataclass(frozen=True)
class Failed:
    """``refused`` if the work was not sound, else something broke while it was done."""

    error: Exception
    refused: bool


News = Began | Piece | Ended | Failed


class Busy(Exception):
    """There is more work in hand than may wait; ``retry_after`` whole seconds until there may be room."""

    def __init__(self, retry_after: int) -> None:
        super().__init__(f"busy for {retry_after} s")
        self.retry_after = retry_after


@dataclass(eq=False)
class Ticket:
    """Work and who hears of it. ``tell`` is called on the event loop; an :class:`Ended` or :class:`Failed` is its last.

    Of ``submit`` and ``chore`` one is given: what hands a request to the engine, with the function that streamed text
    goes to, or pieces of work that end with a result. Both run in the worker's thread alone.
    """

    tell: Callable[[News], None]
    submit: Callable[[Engine, Callable[[str], None]], Job] | None = None
    chore: Generator[None, None, Any] | None = None
    with_tokens: bool = False
    job: Job | None = field(default=None, init=False)
    cancelled: bool = field(default=False, init=False)

    def cancel(self) -> None:
        """Any thread may call this, at any time and twice."""
        self.cancelled = True
        if self.job is not None:
            self.job.cancel()

    def given(self, job: Job) -> None:
        """The engine has taken it. Whichever of this and :meth:`cancel` comes second sees the other."""
        self.job = job
        if self.cancelled:
            job.cancel()


def advance(ticket: Ticket) -> News | None:
    """Do the next piece of a chore; what came of it if that was its last."""
    assert ticket.chore is not None
    if ticket.cancelled:
        ticket.chore.close()
        return Ended(None)
    try:
        next(ticket.chore)
    except StopIteration as end:
        return Ended(end.value)
    except CoalaError as error:
        return Failed(error, refused=True)
    except Exception as error:
        log.exception("a chore failed")
        return Failed(error, refused=False)
    return None
