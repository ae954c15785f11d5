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

from coala.serve.limits import Limits
from coala.values import CoalaError


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


class _Patient(H11Protocol):
    """A connection that is closed if a request's headers are not whole in time."""

    head_time = Limits.head_time
    _late: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._await_head()

    def data_received(self, data: bytes) -> None:
        if self._between_requests:
            self._await_head()
        super().data_received(data)
        if not self._between_requests:
            self._stop_waiting()

    def connection_lost(self, exc: Exception | None) -> None:
        self._stop_waiting()
        super().connection_lost(exc)

    @property
    def _between_requests(self) -> bool:
        return self.cycle is None or self.cycle.response_complete

    def _await_head(self) -> None:
        if self._late is None:
            self._late = self.loop.call_later(self.head_time, self._give_up)

    def _stop_waiting(self) -> None:
        if self._late is not None:
            self._late.cancel()
            self._late = None

    def _give_up(self) -> None:
        self._late = None
        if self._between_requests:
            self.transport.abort()


class _Server(uvicorn.Server):
    """Ends in order at SIGINT and SIGTERM, at once at the second, and returns to its caller instead of dying."""

    @contextmanager
    def capture_signals(self) -> Generator[None, None, None]:
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        before = {number: signal.signal(number, self.handle_exit) for number in (signal.SIGINT, signal.SIGTERM)}
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


def server(app: FastAPI, limits: Limits) -> uvicorn.Server:
    """What serves ``app`` by ``run(sockets=[...])`` until SIGINT, SIGTERM or ``should_exit``; what is at hand then has
    ``limits.grace`` seconds to end."""
    protocol = type("Patient", (_Patient,), {"head_time": limits.head_time})
    # No access log: it would hold who asked when. No server header: it tells a reader nothing they need.
    config = uvicorn.Config(
        app,
        http=protocol,
        ws="none",
        access_log=False,
        server_header=False,
        proxy_headers=False,
        log_level="warning",
        timeout_graceful_shutdown=max(1, round(limits.grace)),
    )
    return _Server(config)
