"""The one thread that owns the model: work goes in, news come out on the event loop, and what it takes on is bounded.

Between two steps of the engine the thread takes in new work, drops what was cancelled and does one piece of one chore
(work besides decoding, such as scoring), so that replies go on streaming while a long chore runs. Knows nothing of
HTTP.
"""

from __future__ import annotations

import asyncio
import logging
import math
import queue
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import TYPE_CHECKING

from coala.serve.memory import tidy
from coala.serve.work import Began, Busy, Ended, Failed, News, Piece, Ticket, advance
from coala.values import CoalaError

if TYPE_CHECKING:
    from coala.decoding import Engine

__all__ = ["Began", "Busy", "Ended", "Failed", "News", "Piece", "Ticket", "Worker"]
log = logging.getLogger("coala.serve")
# Finished work that the rate is measured over, at most so many and so many seconds back.
REMEMBERED, MEMORY = 100, 60.0
LONGEST_WAIT = 60
# Seconds of work between two times that memory is tidied, which takes some 30 ms.
TIDIED = 5.0
# Seconds without work after which it is tidied once more.
REST = 1.0


class Worker:
    """Steps an engine of ``make_engine`` in a thread of its own while there is work, ``capacity`` tickets at most.

    An engine that raises loses the replies at hand and is replaced by a new one. All methods are for the event loop's
    thread.
    """

    def __init__(self, make_engine: Callable[[], Engine], capacity: int) -> None:
        self.capacity = capacity
        self.unfinished = 0
        self.failures = 0
        self.running = self.waiting = 0  # as the engine had it after its latest step
        self._make_engine = make_engine
        self._inbox: queue.SimpleQueue[Ticket | None] = queue.SimpleQueue()
        self._finished: deque[float] = deque(maxlen=REMEMBERED)
        self._loop: asyncio.AbstractEventLoop | None = None
        self._thread: threading.Thread | None = None
        self._untidy = False
        self._news: list[tuple[Ticket, News]] = []  # the thread's own, until they are posted

    def start(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._thread = threading.Thread(target=self._run, name="coala-engine", daemon=True)
        self._thread.start()

    async def close(self) -> None:
        """Cancel what is at hand and wait for the thread to end."""
        if self._thread is not None:
            self._inbox.put(None)
            await asyncio.to_thread(self._thread.join)

    @property
    def alive(self) -> bool:
        return self._thread is not None and self._thread.is_alive()

    def take(self, tickets: Sequence[Ticket]) -> None:
        """Queue all of ``tickets`` or raise :class:`Busy`."""
        self.require(len(tickets))
        self.unfinished += len(tickets)
        for ticket in tickets:
            self._inbox.put(ticket)

    def require(self, places: int) -> None:
        """Raise :class:`Busy` if so many tickets would not be taken now."""
        if self.unfinished + places > self.capacity:
            raise Busy(self.patience(self.unfinished + places - self.capacity))

    def patience(self, places: int) -> int:
        """Whole seconds until ``places`` of the tickets in hand are done, at the rate of late; 1 to 60."""
        now = time.monotonic()
        recent = [at for at in self._finished if now - at < MEMORY]
        if not recent:
            return 1
        rate = len(recent) / max(now - recent[0], 1e-3)
        return max(1, min(math.ceil(places / rate), LONGEST_WAIT))

    def _deliver(self, news: Sequence[tuple[Ticket, News]]) -> None:
        """In the event loop's thread."""
        for ticket, one in news:
            if isinstance(one, Ended | Failed):
                self.unfinished -= 1
                self._finished.append(time.monotonic())
            ticket.tell(one)

    # --- in the worker's thread ----------------------------------------------------------------------------------

    def _run(self) -> None:
        engine = self._make_engine()
        replies: list[Ticket] = []
        chores: deque[Ticket] = deque()
        tidied = time.monotonic()
        while self._take_in(engine, replies, chores):
            self._untidy = True
            if time.monotonic() - tidied > TIDIED:
                tidy()
                tidied = time.monotonic()
            if chores:
                self._do_a_piece(chores)
            try:
                engine.step()
            except Exception as error:
                log.exception("the engine failed; %d replies are lost, a new engine takes over", len(replies))
                self.failures += 1
                self._news += [(ticket, Failed(error, refused=False)) for ticket in replies]
                replies.clear()
                engine = self._make_engine()
            for ticket in [ticket for ticket in replies if ticket.job is not None and ticket.job.done]:
                replies.remove(ticket)
                self._news.append((ticket, self._outcome(ticket)))
            self.running, self.waiting = engine.running, engine.waiting
            self._post()
        for ticket in (*replies, *chores):
            ticket.cancel()
            self._news.append((ticket, Ended(None)))
        self._post()

    def _take_in(self, engine: Engine, replies: list[Ticket], chores: deque[Ticket]) -> bool:
        """Begin the work that has come, waiting for some if there is none at hand; whether to go on at all."""
        idle = not replies and not chores
        while True:
            try:
                ticket = self._inbox.get(block=idle, timeout=REST if self._untidy else None)
            except queue.Empty:
                if not idle:
                    return True
                tidy()
                self._untidy = False
                continue
            idle = False
            if ticket is None:
                return False
            self._begin(ticket, engine, replies, chores)

    def _begin(self, ticket: Ticket, engine: Engine, replies: list[Ticket], chores: deque[Ticket]) -> None:
        if ticket.cancelled:
            self._news.append((ticket, Ended(None)))
        elif ticket.submit is None:
            self._news.append((ticket, Began()))
            chores.append(ticket)
        else:
            try:
                ticket.given(ticket.submit(engine, lambda text: self._hear(ticket, text)))
            except Exception as error:
                if not isinstance(error, CoalaError):
                    log.exception("a request could not be taken in")
                self._news.append((ticket, Failed(error, refused=True)))
                return
            self._news.append((ticket, Began()))
            replies.append(ticket)

    def _hear(self, ticket: Ticket, text: str) -> None:
        job = ticket.job
        tokens = None
        if ticket.with_tokens and job is not None:
            # Copies: the engine goes on writing to these lists.
            tokens = (tuple(job.tokens), tuple(job.log_probs), tuple(job.alternatives))
        self._news.append((ticket, Piece(text, tokens)))

    def _outcome(self, ticket: Ticket) -> News:
        assert ticket.job is not None
        error = ticket.job.error
        if error is None:
            return Ended(ticket.job)
        log.error("a reply failed", exc_info=error)
        return Failed(error, refused=False)

    def _do_a_piece(self, chores: deque[Ticket]) -> None:
        """The next piece of the chore whose turn it is."""
        ticket = chores.popleft()
        news = advance(ticket)
        if news is None:
            chores.append(ticket)
        else:
            self._news.append((ticket, news))

    def _post(self) -> None:
        if not self._news:
            return
        news, self._news = self._news, []
        assert self._loop is not None
        # The loop has gone if the server was ended at once; then nobody listens.
        with suppress(RuntimeError):
            self._loop.call_soon_threadsafe(self._deliver, news)
