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

    max_rows: Annotated[int, Ge(1), Setting("Rows of the model's batch; blocks take one per candidate.")] = 40
    queue: Annotated[int, Ge(0), Setting("Replies that may wait besides; then 429 with Retry-After.")] = 112
    deadline: Annotated[float, Setting("Seconds a request may take, the queue included.")] = 120.0
    max_body: Annotated[int, Ge(1), Setting("Most bytes of a request.")] = 1 << 20
    max_tokens: Annotated[int, Ge(1), Setting("Most tokens of a reply.")] = 1024
    max_choices: int = 16
    max_texts: int = 256
    head_time: float = 20.0
    body_time: float = 20.0
    read_time: float = 30.0
    grace: Annotated[float, Setting("Seconds that requests at hand get when the server ends.")] = 30.0

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
