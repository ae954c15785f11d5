"""What all servers share: hosts, pages of other sites, bodies and clients that leave what they are sent unread."""

from __future__ import annotations

import asyncio
import os
import signal
from importlib.metadata import version
from typing import Any

import pytest

pytest.importorskip("fastapi", reason="the extra `serve` is not installed")

from fastapi import FastAPI
from hypothesis import given
from hypothesis import strategies as st
from starlette.datastructures import Headers
from uvicorn.protocols.http.h11_impl import H11Protocol

from coala.values import CoalaError
from coala.web.bodies import TooLarge, TooSlow, replay, whole_body
from coala.web.listening import ENDINGS, LEAST_READ, Patient, server
from coala.web.strangers import LOOPBACK, foreign, host_name, known_host, names_of, origin_of

# --- who asks -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("host", "name"),
    [
        ("localhost", "localhost"),
        ("LocalHost:8000", "localhost"),
        ("127.0.0.1:80", "127.0.0.1"),
        ("[::1]", "::1"),
        ("[::1]:8000", "::1"),
        ("survey.example:443", "survey.example"),
        ("[::1].evil.example", ""),
        ("[::1]:80.evil.example", ""),
        ("[::1]evil.example:80", ""),
        ("localhost:80:90", ""),
        ("localhost:evil", ""),
        ("localhost@evil.example", ""),
        ("localhost/evil", ""),
        ("localhost evil", ""),
        ("[localhost]", ""),
        ("", ""),
        (":80", ""),
        ("localhost:", ""),
    ],
)
def test_the_name_in_a_host_header(host: str, name: str) -> None:
    assert host_name(host) == name


@given(st.sampled_from(LOOPBACK), st.text(min_size=1, max_size=12))
def test_nothing_behind_or_before_a_known_name_is_known(name: str, more: str) -> None:
    """But a port, which leads to the same machine."""
    shown = f"[{name}]" if ":" in name else name
    port = more[0] == ":" and more[1:].isascii() and more[1:].isdigit() and len(more) <= 6
    assert known_host(Headers({"host": shown}), LOOPBACK)
    assert host_name(shown + more) not in LOOPBACK or port
    assert host_name(more + shown) not in LOOPBACK


SITES = [
    ({}, False),  # no browser
    ({"sec-fetch-site": "same-origin"}, False),
    ({"sec-fetch-site": "none"}, False),
    ({"sec-fetch-site": "same-site"}, True),
    ({"sec-fetch-site": "cross-site"}, True),
    ({"sec-fetch-site": "what a later browser says"}, True),
    ({"origin": "http://localhost:8000"}, False),
    ({"origin": "http://localhost:9000"}, True),  # another server of this machine
    ({"origin": "http://localhost"}, True),
    ({"origin": "https://evil.example"}, True),
    ({"origin": "null"}, True),
    ({"origin": ""}, True),
    ({"origin": "https://survey.example", "sec-fetch-site": "same-origin"}, False),  # a proxy changed the host
    ({"origin": "http://localhost:8000", "sec-fetch-site": "cross-site"}, True),
]


@pytest.mark.parametrize(("headers", "expected"), SITES)
def test_pages_of_other_sites_are_told_apart(headers: dict[str, str], expected: bool) -> None:
    assert foreign(Headers({"host": "localhost:8000", **headers})) is expected


def test_the_site_behind_a_proxy() -> None:
    headers = {"host": "127.0.0.1:8000", "origin": "https://survey.example"}
    assert foreign(Headers(headers))
    assert not foreign(Headers(headers), origin_of("https://Survey.Example:443/"))
    assert foreign(Headers(headers), origin_of("http://survey.example"))
    assert "survey.example" in names_of("https://survey.example:8443")
    for wrong in (
        "survey.example",
        "ftp://a",
        "https://",
        "https://a/path",
        "https://a:b",
        "https://a?x",
        "https://[",
        "",
    ):
        with pytest.raises(CoalaError, match="expected an address"):
            origin_of(wrong)


# --- bodies ---------------------------------------------------------------------------------------------------------


def sender(parts: list[bytes], gone: bool = False) -> Any:
    left = list(parts)

    async def receive() -> dict[str, Any]:
        if left:
            body = left.pop(0)
            return {"type": "http.request", "body": body, "more_body": bool(left) or gone}
        if gone:
            return {"type": "http.disconnect"}
        await asyncio.Event().wait()
        raise AssertionError

    return receive


def taken(
    parts: list[bytes], most: int = 10, seconds: float = 60.0, gone: bool = False, **headers: str
) -> bytes | None:
    named = Headers({name.replace("_", "-"): value for name, value in headers.items()})
    return asyncio.run(whole_body(named, sender(parts, gone), most=most, seconds=seconds))


@given(st.lists(st.binary(max_size=6), min_size=1, max_size=5))
def test_a_body_is_whole_or_too_large(parts: list[bytes]) -> None:
    whole = b"".join(parts)
    if len(whole) > 10:
        with pytest.raises(TooLarge):
            taken(parts)
        return
    assert taken(parts) == whole

    async def again() -> list[Any]:
        receive = replay(whole, sender([], gone=True))
        return [await receive(), await receive()]

    first, then = asyncio.run(again())
    assert (first["body"], first["more_body"]) == (whole, False)
    assert then["type"] == "http.disconnect"


def test_bodies_that_do_not_come() -> None:
    assert taken([b"a"], gone=True) is None
    with pytest.raises(TooSlow):
        taken([], seconds=0.0)
    with pytest.raises(TooLarge):  # asked before it was sent
        taken([], content_length="11", expect="100-continue")
    with pytest.raises(TooLarge):
        taken([b"a"], content_length="9" * 5000)


# --- clients that do not read ---------------------------------------------------------------------------------------


class Loop:
    """Stands in for an event loop's clock: what was to be called later is called when a test says that it is late."""

    def __init__(self) -> None:
        self.timers: list[tuple[float, Any, Any]] = []

    def call_later(self, delay: float, call: Any, *arguments: Any) -> Any:
        timer = type("Timer", (), {"cancel": lambda own: self.timers.remove(own.entry)})()
        timer.entry = (delay, lambda: call(*arguments), timer)
        self.timers.append(timer.entry)
        return timer

    def late(self) -> None:
        entry = self.timers.pop(0)
        entry[1]()


class Wire:
    def __init__(self) -> None:
        self.unread, self.aborted, self.high = 0, False, 65536

    def get_write_buffer_size(self) -> int:
        return self.unread

    def set_write_buffer_limits(self, high: int) -> None:
        self.high = high

    def get_extra_info(self, *_: Any) -> Any:
        return None

    def is_closing(self) -> bool:
        return self.aborted

    def abort(self) -> None:
        self.aborted = True

    def close(self) -> None:
        pass


@pytest.fixture
def connection() -> Any:
    made = server(FastAPI(), head_time=7.0, read_time=3.0, grace=1.0)
    made.config.load()
    protocol = made.config.http_protocol_class(made.config, server_state=made.server_state, app_state={}, _loop=Loop())
    protocol.connection_made(Wire())
    protocol._stop("_late")
    assert protocol.loop.timers == []
    return protocol


def test_the_least_that_is_left_unread_is_seen(connection: Any) -> None:
    assert connection.transport.high == 0


def test_who_reads_nothing_is_hung_up_on(connection: Any) -> None:
    connection.transport.unread = 100
    connection.pause_writing()
    ((delay, _, _),) = connection.loop.timers
    assert delay == 3.0
    connection.loop.late()
    assert connection.transport.aborted


def test_who_reads_slowly_is_waited_for_and_who_trickles_is_not(connection: Any) -> None:
    wire, loop = connection.transport, connection.loop
    wire.unread = 10 * LEAST_READ
    connection.pause_writing()
    for _ in range(5):
        wire.unread -= LEAST_READ
        loop.late()
        assert not wire.aborted
    wire.unread -= LEAST_READ - 1
    loop.late()
    assert wire.aborted


def test_who_has_read_all_is_no_longer_waited_for(connection: Any) -> None:
    connection.transport.unread = 100
    connection.pause_writing()
    connection.resume_writing()
    assert connection.loop.timers == []
    connection.pause_writing()
    connection.connection_lost(None)
    assert connection.loop.timers == []
    assert not connection.transport.aborted


def test_uvicorn_is_as_patience_found_it() -> None:
    """Private parts of uvicorn that :class:`Patient` rests on, and when they change during a request."""
    changed = f"uvicorn {version('uvicorn')} has changed under coala.web.listening.Patient, and slow clients may go "
    changed += "unheeded: "
    for name in ("connection_made", "data_received", "connection_lost", "pause_writing", "resume_writing"):
        assert name in vars(H11Protocol), f"{changed}H11Protocol has no {name} of its own"
    answered = asyncio.Event()

    async def app(scope: Any, receive: Any, send: Any) -> None:
        await answered.wait()
        await send({"type": "http.response.start", "status": 204, "headers": []})
        await send({"type": "http.response.body"})

    async def connected() -> None:
        made = server(app, grace=1.0)  # type: ignore[arg-type]
        made.config.load()
        assert issubclass(made.config.http_protocol_class, Patient), f"{changed}its own protocol is used"
        plain = H11Protocol(made.config, server_state=made.server_state, app_state={})
        wire = Wire()
        wire.write = lambda data: None  # type: ignore[attr-defined]
        plain.connection_made(wire)  # type: ignore[arg-type]
        assert plain.transport is wire, f"{changed}no transport"
        assert plain.loop is asyncio.get_running_loop(), f"{changed}no loop"
        assert plain.cycle is None, f"{changed}a cycle before the first request"
        plain.data_received(b"GET / HTTP/1.1\r\nHost: loc")
        assert plain.cycle is None, f"{changed}a cycle before the headers are whole"
        plain.data_received(b"alhost\r\n\r\n")
        assert plain.cycle is not None, f"{changed}no cycle once the headers are whole"
        assert plain.cycle.response_complete is False, f"{changed}a response is complete before it was made"
        answered.set()
        await asyncio.gather(*made.server_state.tasks)
        assert plain.cycle.response_complete is True, f"{changed}a response that was made is not complete"
        plain.connection_lost(None)

    asyncio.run(connected())


def test_a_request_whose_headers_do_not_come_is_hung_up_on(connection: Any) -> None:
    connection.data_received(b"GET / HTTP/1.1\r\nHost: loc")
    ((delay, _, _),) = connection.loop.timers
    assert delay == 7.0
    connection.loop.late()
    assert connection.transport.aborted


# --- the end --------------------------------------------------------------------------------------------------------


def test_every_ending_ends_in_order_first_and_at_once_then() -> None:
    assert {signal.SIGINT, signal.SIGTERM} <= set(ENDINGS)
    for number in ENDINGS:
        app = FastAPI()
        made = server(app, head_time=1.0, read_time=1.0, grace=1.0)
        made.config.load()
        before = signal.getsignal(number)
        with made.capture_signals():
            os.kill(os.getpid(), number)
            assert (made.should_exit, made.force_exit) == (True, False)
            assert app.state.ending
            os.kill(os.getpid(), number)
            assert made.force_exit
        assert signal.getsignal(number) == before


@pytest.mark.skipif(not hasattr(signal, "SIGHUP"), reason="there is no SIGHUP here")
def test_a_terminal_that_is_closed_ends_it_in_order() -> None:
    assert signal.SIGHUP in ENDINGS
