"""How much a server takes on: one validated value."""

from __future__ import annotations

import math
from dataclasses import dataclass, fields
from typing import Annotated, get_type_hints

from annotated_types import Ge

from coala.messages import CoalaError
from coala.settings import Setting


@dataclass(frozen=True)
class Limits:
    """Bounds of a server; times in seconds, sizes in bytes.

    ``max_rows`` is the width of the model's batch (a reply of mode ``block`` or ``best_of`` takes a row for each
    candidate: 40 are 8 replies of 5) and ``queue`` how many replies may wait besides; a request beyond
    both is answered 429. ``deadline`` is a request's whole time, the queue included. ``max_tokens`` bounds a reply,
    ``max_choices`` the replies drawn for one prompt, ``max_texts`` the prompts, replies or documents of one request.
    ``head_time`` and ``body_time`` bound how long a client may take to send its headers and body, ``read_time`` how
    long it may leave what it is sent unread. ``grace`` is what requests at hand get when the server ends.
    """

    max_rows: Annotated[
        int, Ge(1), Setting("Batch size of the model, in rows; mode block takes one row per candidate.")
    ] = 40
    queue: Annotated[
        int, Ge(0), Setting("Maximum number of replies waiting; beyond it the server answers 429 with Retry-After.")
    ] = 112
    deadline: Annotated[float, Setting("Maximum time of a request, in seconds, including the queue.")] = 120.0
    max_body: Annotated[int, Ge(1), Setting("Maximum size of a request, in bytes.")] = 1 << 20
    max_tokens: Annotated[int, Ge(1), Setting("Maximum length of a reply, in tokens.")] = 1024
    max_choices: int = 16
    max_texts: int = 256
    head_time: float = 20.0
    body_time: float = 20.0
    read_time: float = 30.0
    grace: Annotated[float, Setting("Time that running requests get at shutdown, in seconds.")] = 30.0

    def __post_init__(self) -> None:
        kinds = get_type_hints(type(self))
        for field in fields(self):
            found, whole = getattr(self, field.name), kinds[field.name] is int
            least = 0 if field.name == "queue" else 1
            fits = isinstance(found, int if whole else int | float) and not isinstance(found, bool)
            if not fits or not (found >= least if whole else 0 < found < math.inf):
                expected = f"a whole number of at least {least}" if whole else "a number of seconds above 0"
                raise CoalaError(f"The server's {field.name} is {found!r}; expected {expected}.")

    @property
    def capacity(self) -> int:
        """Replies that may be in hand, running or waiting."""
        return self.max_rows + self.queue

    @property
    def choices(self) -> int:
        """Most replies drawn for one prompt."""
        return min(self.max_choices, self.capacity)

    @property
    def prompts(self) -> int:
        """Most prompts of one request, such that it fits in whatever it draws."""
        return self.capacity // self.choices
