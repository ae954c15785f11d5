"""Sockets, patience with slow clients and an orderly end: uvicorn, with what a server in the open needs besides."""

from __future__ import annotations

import asyncio
import signal
import socket
import threading
from collections.abc import Generator
from contextlib import contextmanager
from types import FrameType

import uvicorn
from fastapi import FastAPI
from uvicorn.protocols.http.h11_impl import H11Protocol

from coala.values import CoalaError

# Bytes that a client must take in each `read_time` while more is there for it.
LEAST_READ = 16 * 1024
# A terminal that is closed sends the last; Windows has none.
ENDINGS = tuple(getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name))


def listen(host: str, port: int) -> socket.socket:
    """A listening socket; raises :class:`CoalaError` where there is none to be had."""
    # Named as TCP, for asyncio sends small packets at once only on sockets that say so.
    made = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET, socket.SOCK_STREAM, socket.IPPROTO_TCP)
    try:
        made.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        made.bind((host, port))
    except OSError as error:
        made.close()
        raise CoalaError(
            f"Cannot listen on {host}, port {port} ({error.strerror}). Give another --port or --host, or end the "
            "program that uses it."
        ) from None
    return made


class Patient(H11Protocol):
    """A connection that is closed if a request's headers are not whole in time, or if what was sent is left unread.

    Rests on parts of uvicorn that it does not promise to keep: a test of tests/test_web.py names them one by one.
    """

    head_time: float
    read_time: float
    _late: asyncio.TimerHandle | None = None
    _unread: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        # Whatever the system does not take at once counts as unread: a reply of any size, not of over 64 KiB alone.
        transport.set_write_buffer_limits(high=0)
        self._await_head()

    def data_received(self, data: bytes) -> None:
        if self._between_requests:
            self._await_head()
        super().data_received(data)
        if not self._between_requests:
            self._stop("_late")

    def connection_lost(self, exc: Exception | None) -> None:
        self._stop("_late")
        self._stop("_unread")
        super().connection_lost(exc)

    @property
    def _between_requests(self) -> bool:
        return self.cycle is None or self.cycle.response_complete

    def _await_head(self) -> None:
        if self._late is None:
            self._late = self.loop.call_later(self.head_time, self._give_up)

    def _give_up(self) -> None:
        self._late = None
        if self._between_requests:
            self.transport.abort()

    def pause_writing(self) -> None:
        super().pause_writing()
        if self._unread is None:
            self._await_reading()

    def resume_writing(self) -> None:
        self._stop("_unread")
        super().resume_writing()

    def _await_reading(self) -> None:
        waiting = self.transport.get_write_buffer_size()
        self._unread = self.loop.call_later(self.read_time, self._look_again, waiting)

    def _look_again(self, before: int) -> None:
        if before - self.transport.get_write_buffer_size() < LEAST_READ:
            self._unread = None
            self.transport.abort()
        else:
            self._await_reading()

    def _stop(self, name: str) -> None:
        timer = getattr(self, name)
        if timer is not None:
            timer.cancel()
            setattr(self, name, None)


class _Server(uvicorn.Server):
    """Ends in order at SIGINT, SIGTERM and SIGHUP, at once at the second, and returns to its caller instead of
    dying."""

    @contextmanager
    def capture_signals(self) -> Generator[None, None, None]:
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        before = {number: signal.signal(number, self.handle_exit) for number in ENDINGS}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        if self.should_exit:
            self.force_exit = True
        self.should_exit = True
        self.config.app.state.ending = True  # type: ignore[union-attr]


def server(app: FastAPI, *, head_time: float = 20.0, read_time: float = 30.0, grace: float) -> uvicorn.Server:
    """What serves ``app`` by ``run(sockets=[...])`` until SIGINT, SIGTERM, SIGHUP or ``should_exit``.

    A client has ``head_time`` seconds for a request's headers and takes what it is sent within ``read_time``, or at
    least 16 KiB in each; what is at hand at the end has ``grace`` seconds to be finished.
    """
    protocol = type("Patient", (Patient,), {"head_time": head_time, "read_time": read_time})
    # No access log: it would hold who asked when. No server header: it tells a reader nothing they need.
    config = uvicorn.Config(
        app,
        http=protocol,
        ws="none",
        access_log=False,
        server_header=False,
        proxy_headers=False,
        log_level="warning",
        timeout_graceful_shutdown=max(1, round(grace)),
    )
    return _Server(config)
