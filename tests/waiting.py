"""How tests wait: until something has happened, however busy the machine is; never until some time has passed.

The only file that reads a clock or sleeps (tests/test_tests.py sees to it). What ends by time in the product is
driven by a clock that a test moves: :class:`Clock`, and :func:`skip` for an event loop.
"""

from __future__ import annotations

import asyncio
import subprocess
import threading
import time
from collections.abc import Callable
from typing import Any

# Seconds after which a test is taken to hang: a net below it, which no load of a machine reaches; nothing to assert.
PATIENCE = 300.0


def wait_for(happened: Callable[[], Any], process: subprocess.Popen[Any] | None = None) -> None:
    """Until ``happened()`` is true. That ``process`` ends before is an error."""
    end = time.monotonic() + PATIENCE
    while not happened():
        if process is not None and process.poll() is not None:
            raise AssertionError(f"the process ended with code {process.returncode} before it happened")
        if time.monotonic() > end:
            raise AssertionError(f"did not happen in {PATIENCE:g} s")
        time.sleep(0.005)


def linger(seconds: float) -> None:
    """Be slow, as a server or a disk may be. What a test asserts must hold if this takes no time or ten times as
    much."""
    time.sleep(seconds)


class Clock:
    """Stands in for the module ``time`` (and for a sleep): it moves when somebody sleeps or a test says so."""

    def __init__(self, now: float = 1000.0) -> None:
        self._now, self._lock = now, threading.Lock()

    def time(self) -> float:
        return self._now

    monotonic = perf_counter = time

    def move(self, seconds: float) -> None:
        with self._lock:
            self._now += max(0.0, seconds)

    sleep = move

    async def asleep(self, seconds: float) -> None:
        """Of several who sleep at a time each wakes at its own moment."""
        until = self._now + seconds
        await asyncio.sleep(0)
        self.move(until - self._now)


def skip(loop: asyncio.AbstractEventLoop, seconds: float) -> None:
    """Move the clock of a loop that runs in another thread: whatever waits there for that moment or an earlier one is
    due."""
    moved = threading.Event()

    def move() -> None:
        now = loop.time
        loop.time = lambda: now() + seconds  # type: ignore[method-assign]
        loop.call_soon(moved.set)

    loop.call_soon_threadsafe(move)
    assert moved.wait(PATIENCE)
