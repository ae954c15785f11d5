"""The one thread that turns texts into tokens: a piece of each request in turn, so that a long one holds nobody up.

Apart from the model's thread and the event loop: while a tokenizer is at a large text, replies go on being written and
sent. Knows nothing of HTTP.
"""

from __future__ import annotations

import asyncio
import queue
import threading
from collections import deque
from collections.abc import Sequence
from contextlib import suppress

from coala.serve.work import Busy, Ended, News, Ticket, advance

# Seconds after which whoever finds no place may find one: pieces are short.
SOON = 1


class TokenReader:
    """Does chores, ``capacity`` of them at most, a piece of each in turn.

    All methods are for the event loop's thread, on which tickets are told; of what was cancelled no further piece is
    done.
    """

    def __init__(self, capacity: int) -> None:
        self.capacity = capacity
        self.unfinished = 0
        self._inbox: queue.SimpleQueue[Ticket | None] = queue.SimpleQueue()
        self._loop: asyncio.AbstractEventLoop | None = None
        self._thread: threading.Thread | None = None

    def start(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._thread = threading.Thread(target=self._run, name="coala-reading", daemon=True)
        self._thread.start()

    async def close(self) -> None:
        """Leave what is at hand, and wait for the thread to end."""
        if self._thread is not None:
            self._inbox.put(None)
            await asyncio.to_thread(self._thread.join)

    def take(self, tickets: Sequence[Ticket]) -> None:
        """Queue all of ``tickets`` or raise :class:`Busy`."""
        if self.unfinished + len(tickets) > self.capacity:
            raise Busy(SOON)
        self.unfinished += len(tickets)
        for ticket in tickets:
            self._inbox.put(ticket)

    def _deliver(self, ticket: Ticket, news: News) -> None:
        self.unfinished -= 1
        ticket.tell(news)

    def _run(self) -> None:
        chores: deque[Ticket] = deque()
        while self._take_in(chores):
            ticket = chores.popleft()
            news = advance(ticket)
            if news is None:
                chores.append(ticket)
            else:
                self._post(ticket, news)
        for ticket in chores:
            ticket.cancel()
            self._post(ticket, Ended(None))

    def _take_in(self, chores: deque[Ticket]) -> bool:
        """Take in what has come, waiting for some if there is none at hand; whether to go on at all."""
        while True:
            try:
                ticket = self._inbox.get(block=not chores)
            except queue.Empty:
                return True
            if ticket is None:
                return False
            chores.append(ticket)

    def _post(self, ticket: Ticket, news: News) -> None:
        assert self._loop is not None
        # The loop has gone if the server was ended at once; then nobody listens.
        with suppress(RuntimeError):
            self._loop.call_soon_threadsafe(self._deliver, ticket, news)
